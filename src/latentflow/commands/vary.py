"""`latentflow vary`: a model and a seed => its picture and others near it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentflow.artifacts import require_writable
from latentflow.commands.grid import save_grid
from latentflow.latent_flow import LatentFlow
from latentflow.progress import image_progress
from latentflow.sampling.edits import vary as draw_variations
from latentflow.sampling.pipeline import sample


@dataclass(frozen=True)
class VaryResult:
    """What `vary` wrote.

    Attributes:
        original: the picture of the seed itself.
        files: the variations, in order.
        grid: the original, then the variations, in rows of at most 9.
        evaluations: mean network calls per picture.
        seconds: of solver and decoder.
    """

    original: Path
    files: list[Path]
    grid: Path
    evaluations: float
    seconds: float


def vary(
    model: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    num: int = 8,
    amount: float = 0.3,
    classes: Sequence[int | str] | None = None,
    batch_size: int = 16,
    device: str | None = None,
    **preset: Any,
) -> VaryResult:
    """Draw the picture of a seed and variations of it; the arguments are those of `latentflow.sampling.edits.vary`.

    Raises:
        ArtifactError, ConfigError: before anything is written.
    """
    require_writable(out)
    flow = LatentFlow.from_pretrained(model, device=device)
    common = {"seed": seed, "classes": classes or [], **preset}
    with image_progress("varying", num) as on_images:
        variations = draw_variations(flow, num=num, amount=amount, batch_size=batch_size, on_images=on_images, **common)
    original = sample(flow, num=1, **common)
    (first,) = original.save(out)
    files = variations.save(out)
    pixels = torch.cat([original.pixels, variations.pixels])
    grid = save_grid(Path(out) / "grid.png", pixels, min(len(pixels), 9))
    evaluations = torch.cat([original.evaluations, variations.evaluations]).double().mean()
    return VaryResult(first, files, grid, float(evaluations), original.seconds + variations.seconds)
