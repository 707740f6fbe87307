"""`latentflow mask-to-image`: a model and a semantic map => pictures of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentflow.artifacts import require_writable
from latentflow.commands.progress import image_progress
from latentflow.latent_flow import LatentFlow
from latentflow.sampling.mask_to_image import mask_to_image as paint_map


@dataclass(frozen=True)
class PaintResult:
    """What `mask_to_image` wrote.

    Attributes:
        files: one picture per seed.
        evaluations: mean network calls per picture.
        seconds: of solver and decoder.
    """

    files: list[Path]
    evaluations: float
    seconds: float


def mask_to_image(
    model: str | Path,
    semantic_map: str | Path,
    out: str | Path,
    *,
    num: int = 1,
    device: str | None = None,
    **request: Any,
) -> PaintResult:
    """Paint a semantic map once per seed; the request is that of `latentflow.sampling.mask_to_image.mask_to_image`.

    Args:
        out: the PNG file; several pictures are named like it, with their seeds.

    Raises:
        ArtifactError, ConfigError, DataError: before anything is written.
    """
    require_writable(out, suffix=".png")
    flow = LatentFlow.from_pretrained(model, device=device)
    with image_progress("painting", num) as on_images:
        samples = paint_map(flow, semantic_map, num=num, on_images=on_images, **request)
    return PaintResult(samples.save_as(out), float(samples.evaluations.double().mean()), samples.seconds)
