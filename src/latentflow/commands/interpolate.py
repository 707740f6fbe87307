"""`latentflow interpolate`: a model, two seeds and perhaps two classes => the frames between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentflow.artifacts import require_writable
from latentflow.commands.grid import save_grid
from latentflow.latent_flow import LatentFlow
from latentflow.progress import image_progress
from latentflow.sampling.edits import interpolate as draw_frames


@dataclass(frozen=True)
class InterpolateResult:
    """What `interpolate` wrote.

    Attributes:
        files: one picture per frame, in order.
        grid: all frames in one row.
        evaluations: mean network calls per frame.
        seconds: of solver and decoder.
    """

    files: list[Path]
    grid: Path
    evaluations: float
    seconds: float


def interpolate(
    model: str | Path, out: str | Path, *, num: int = 9, device: str | None = None, **request: Any
) -> InterpolateResult:
    """Draw the frames of an interpolation; the request is that of `latentflow.sampling.edits.interpolate`.

    Raises:
        ArtifactError, ConfigError: before anything is written.
    """
    require_writable(out)
    flow = LatentFlow.from_pretrained(model, device=device)
    with image_progress("interpolating", num) as on_images:
        samples = draw_frames(flow, num=num, on_images=on_images, **request)
    files = samples.save(out)
    grid = save_grid(Path(out) / "grid.png", samples.pixels, len(files))
    return InterpolateResult(files, grid, float(samples.evaluations.double().mean()), samples.seconds)
