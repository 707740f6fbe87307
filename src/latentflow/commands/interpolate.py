"""`latentflow interpolate`: a model, two seeds and perhaps two classes => the frames between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentflow.artifacts import require_writable
from latentflow.commands.sample import GRID_IMAGES
from latentflow.locks import writes
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.contact_sheet import save_grid
from latentflow.sampling.edits import interpolation
from latentflow.sampling.picture_folder import PictureFolder, read_pixels


@dataclass(frozen=True)
class InterpolateResult:
    """What `interpolate` wrote.

    Attributes:
        files: one picture per frame, in order.
        grid: the first frames in one row.
        evaluations: mean network calls per frame.
        seconds: of solver and decoder.
    """

    files: list[Path]
    grid: Path
    evaluations: float
    seconds: float


@writes("out")
def interpolate(
    model: str | Path,
    out: str | Path,
    *,
    num: int = 9,
    batch_size: int = 16,
    runtime: Runtime | None = None,
    **request: Any,
) -> InterpolateResult:
    """Draw the frames of an interpolation; the request is that of `latentflow.sampling.edits.interpolation`.

    Raises:
        ArtifactError, ConfigError: before anything is written.
    """
    require_writable(out)
    flow = FlowModel.from_pretrained(model, runtime=runtime)
    frames = interpolation(flow, num=num, **request)
    folder = PictureFolder(flow, out, frames)
    with image_progress("interpolating", num) as on_images:
        drawn = folder.draw(frames, batch_size=batch_size, on_images=on_images)
    pixels = read_pixels(drawn.files[:GRID_IMAGES])
    grid = save_grid(folder.path / "grid.png", pixels, len(pixels))
    return InterpolateResult(drawn.files, grid, drawn.evaluations, drawn.seconds)
