"""Shapes that travel through the whole house, and the record of what a network is told.

Legend: B images, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Shape one value per image so that it multiplies whole images: [B] => [B, 1, ..., 1] of `like`'s rank.

    The result has `like`'s device and dtype. A [B] tensor against [B, C, H, W] would otherwise
    broadcast silently along W.

    Raises:
        ValueError: `values` is not of shape [B].
    """
    if values.shape != like.shape[:1]:
        raise ValueError(f"expected one value per image, shape [{like.shape[0]}], got {list(values.shape)}")
    return values.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def image_mean(x: Tensor) -> Tensor:
    """Mean over everything but the batch: [B, ...] => [B]."""
    return x.flatten(1).mean(1)


@dataclass(frozen=True)
class Condition:
    """What a velocity network is told beside latents and time, one row per image.

    Attributes:
        labels: [B] int64, class index in [0, num_classes]; `num_classes` itself is the null label.
            None for a model without labels.
    """

    labels: Tensor | None = None

    def select(self, rows: Tensor) -> Condition:
        """Keep the images at `rows` ([b] int64 or [B] bool)."""
        return Condition(labels=None if self.labels is None else self.labels[rows.to(self.labels.device)])

    def concatenate(self, other: Condition) -> Condition:
        """Stack the images of `other` behind these; both must carry the same fields."""
        if (self.labels is None) != (other.labels is None):
            raise ValueError("cannot join a condition with labels and one without")
        return Condition(labels=None if self.labels is None else torch.cat([self.labels, other.labels]))

    def to(self, device: torch.device | str) -> Condition:
        """Move every tensor to `device`."""
        return Condition(labels=None if self.labels is None else self.labels.to(device, non_blocking=True))
