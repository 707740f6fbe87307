"""`latentflow vary`: a model and a seed => its picture and others near it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentflow.artifacts import require_writable
from latentflow.commands.sample import GRID_IMAGES
from latentflow.locks import writes
from latentflow.model.conditioning import ClassList
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.contact_sheet import save_grid
from latentflow.sampling.edits import at_most_one, variations
from latentflow.sampling.picture_folder import PictureFolder, read_pixels
from latentflow.sampling.request import make_request


@dataclass(frozen=True)
class VaryResult:
    """What `vary` wrote.

    Attributes:
        original: the picture of the seed itself.
        files: the variations, in order.
        grid: the original, then the first variations, in rows of at most 9.
        evaluations: mean network calls per picture.
        seconds: of solver and decoder.
    """

    original: Path
    files: list[Path]
    grid: Path
    evaluations: float
    seconds: float


@writes("out")
def vary(
    model: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    num: int = 8,
    amount: float = 0.3,
    classes: ClassList | None = None,
    batch_size: int = 16,
    runtime: Runtime | None = None,
    **preset: Any,
) -> VaryResult:
    """Draw the picture of a seed and variations of it; the request is that of `latentflow.sampling.edits.variations`.

    Raises:
        ArtifactError, ConfigError: before anything is written.
    """
    require_writable(out)
    flow = FlowModel.from_pretrained(model, runtime=runtime)
    original = make_request(flow, classes=at_most_one(flow, classes), seed=seed, **preset)
    near = variations(flow, seed=seed, num=num, amount=amount, classes=classes, **preset)
    folder = PictureFolder(flow, out, original, near)
    with image_progress("varying", num + 1) as on_images:
        first = folder.draw(original, batch_size=1, on_images=on_images)
        drawn = folder.draw(near, batch_size=batch_size, on_images=on_images)
    pixels = read_pixels([*first.files, *drawn.files][:GRID_IMAGES])
    grid = save_grid(folder.path / "grid.png", pixels, min(len(pixels), 9))
    evaluations = (first.evaluations + num * drawn.evaluations) / (num + 1)
    return VaryResult(first.files[0], drawn.files, grid, evaluations, first.seconds + drawn.seconds)
