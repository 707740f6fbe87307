"""What every format of `export` has in common: the result, the probes to compare with, and the largest difference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from latentflow.errors import ArtifactError
from latentflow.model.conditioning import Conditioning, NamedColumn
from latentflow.model.config import ModelConfig
from latentflow.shapes import Condition

LIMIT = 1e-5
"""Largest difference that rounding explains, relative to the largest velocity."""


@dataclass(frozen=True)
class Exported:
    """An exported folder.

    Attributes:
        folder: its path.
        parts: what is in it, by name: classes or files.
        error: largest difference between our velocity and that of the folder, relative to the largest velocity.
    """

    folder: Path
    parts: dict[str, str]
    error: float


def random_inputs(
    config: ModelConfig, num_images: int, *, seed: int = 0, sides: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Condition]:
    """Random latents, times and conditions for a network: every condition is given, and a label may be the null label.

    Args:
        sides: height and width of the latents; None: the model's.

    Returns:
        latents [B, C, h, w], time [B] from noise to data, and the condition of B images.
    """
    conditioning, generator = config.conditioning, torch.Generator().manual_seed(seed)
    channels, *own = config.latent_shape
    latents = torch.randn(num_images, channels, *(sides or own), generator=generator)
    given = Condition()
    if conditioning.num_classes:
        last = conditioning.num_classes - 1
        ends = torch.tensor([0, conditioning.null_label, last, last // 2])
        given = replace(given, labels=ends[(torch.arange(num_images) + seed) % 4])
    condition = conditioning.build(latents.shape, "cpu", given)
    for name in condition.names:
        value = getattr(condition, name)
        if name in ("masked_latents", "input"):
            value = torch.randn(value.shape, generator=generator)
        elif name in ("mask", "class_fractions"):
            value = torch.rand(value.shape, generator=generator)
        elif name == "columns":
            value = _known_columns(conditioning, value, generator)
        condition = replace(condition, **{name: value})
    time = torch.rand(num_images, generator=generator)
    time[0], time[-1] = float(seed % 2), 1.0  # both ends
    return latents, time, condition


def _known_columns(conditioning: Conditioning, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows in which every second image has a value in each column, and the others none."""
    known = torch.zeros_like(rows)
    for kind, column in zip(NamedColumn.all_of(conditioning), conditioning.columns, strict=True):
        width, start = kind.row.width, kind.place.start
        if column.kind == "number":
            drawn = torch.randn(len(rows), generator=generator) * column.deviation + column.mean
            known[:, start] = drawn
        elif column.kind == "label":
            known[:, start] = torch.randint(len(column.class_names), (len(rows),), generator=generator).float()
        else:
            known[:, start : start + width - 1] = torch.randint(2, (len(rows), width - 1), generator=generator).float()
    return torch.where(torch.arange(len(rows))[:, None] % 2 == 0, known, rows)


def largest_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Largest |found - expected| / largest |expected| over all pairs (found, expected); 0 where both are zero."""
    differences, sizes = [], []
    for found, expected in pairs:
        differences.append((found - expected).abs().max())
        sizes.append(expected.abs().max())
    largest = torch.stack(sizes).max().clamp(min=torch.finfo(torch.float32).tiny)
    return (torch.stack(differences).max() / largest).item()


def require_no_student(config: ModelConfig, what: str) -> None:
    """Refuse a student, whose output depends on the end of its jump as well.

    Args:
        what: it would be exported to.

    Raises:
        ArtifactError: naming its teacher.
    """
    if config.student is not None:
        raise ArtifactError(
            f"a student, whose network takes the end of a jump as well, cannot be exported to {what}; export its "
            f"teacher, {config.student.teacher}"
        )
