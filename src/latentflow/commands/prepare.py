"""`latentflow prepare`: a published data set of images and semantic maps => the layout of latentflow."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from latentflow.artifacts import require_apart
from latentflow.data.prepare import find_dataset
from latentflow.data.request import PrepareRequest
from latentflow.locks import writes
from latentflow.progress import image_progress


@dataclass(frozen=True)
class PrepareResult:
    """What `prepare` did.

    Attributes:
        num_images: pairs of image and map in each split, by the name of its folder.
        num_map_classes: the number of classes of the maps.
        seconds: wall time.
    """

    num_images: dict[str, int]
    num_map_classes: int
    seconds: float


@writes("out")
def prepare(request: PrepareRequest, out: str | Path) -> PrepareResult:
    """Convert a published data set to folders for training: out/train, out/val, ...

    Args:
        out: a new folder outside the data set.

    Raises:
        DataError, ArtifactError: see `find_dataset` and `PublishedData.write`.
    """
    began = time.perf_counter()
    require_apart(out, request.source)
    dataset = find_dataset(request.kind, request.source, link=request.link)
    with image_progress("preparing", len(dataset)) as on_images:
        dataset.write(out, on_images)
    num_images = {split: len(pairs) for split, pairs in dataset.splits.items()}
    return PrepareResult(num_images, len(dataset.classes), time.perf_counter() - began)
