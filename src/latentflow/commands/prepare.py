"""`latentflow prepare`: a published data set of images and semantic maps => the layout that is read here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from latentflow.artifacts import require_apart
from latentflow.data.prepare import find_dataset
from latentflow.locks import writes
from latentflow.progress import image_progress


@dataclass(frozen=True)
class PrepareResult:
    """What `prepare` did.

    Attributes:
        num_images: pairs of image and map in each split, by the name of its folder.
        num_map_classes: classes of the maps.
        seconds: wall time.
    """

    num_images: dict[str, int]
    num_map_classes: int
    seconds: float


@writes("out")
def prepare(kind: str, source: str | Path, out: str | Path, *, link: bool = False) -> PrepareResult:
    """Bring a published data set into folders that can be trained on: out/train, out/val, ...

    Args:
        kind: one of `latentflow.data.prepare.KINDS`.
        source: the data set as published: a folder or a zip.
        out: a new folder, outside of `source`.
        link: hard links instead of copies; see `find_dataset`.

    Raises:
        DataError, ArtifactError: see `find_dataset` and `PublishedData.write`.
    """
    began = time.perf_counter()
    require_apart(out, source)
    dataset = find_dataset(kind, source, link=link)
    with image_progress("preparing", len(dataset)) as on_images:
        dataset.write(out, on_images)
    num_images = {split: len(pairs) for split, pairs in dataset.splits.items()}
    return PrepareResult(num_images, len(dataset.classes), time.perf_counter() - began)
