"""`latentflow image-to-image`: a model and an image => the image drawn again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentflow.artifacts import require_writable
from latentflow.commands.progress import image_progress
from latentflow.latent_flow import LatentFlow
from latentflow.sampling.edits import image_to_image as redraw


@dataclass(frozen=True)
class RedrawResult:
    """What `image_to_image` wrote.

    Attributes:
        files: one picture per seed.
        evaluations: mean network calls per picture.
        seconds: of solver and decoder.
    """

    files: list[Path]
    evaluations: float
    seconds: float


def image_to_image(
    model: str | Path,
    image: str | Path,
    out: str | Path,
    *,
    num: int = 1,
    device: str | None = None,
    **request: Any,
) -> RedrawResult:
    """Redraw an image once per seed; the request is that of `latentflow.sampling.edits.image_to_image`.

    Args:
        out: the PNG file; several pictures are named like it, with their seeds.

    Raises:
        ArtifactError, ConfigError, DataError: before anything is written.
    """
    require_writable(out, suffix=".png")
    flow = LatentFlow.from_pretrained(model, device=device)
    with image_progress("redrawing", num) as on_images:
        samples = redraw(flow, image, num=num, on_images=on_images, **request)
    return RedrawResult(samples.save_as(out), float(samples.evaluations.double().mean()), samples.seconds)
