"""Helpers for tensors with one row per image, and the conditions of a velocity network.

Legend: B images, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from latentflow.sizes import Size


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one value per image to broadcast over whole images: [B] => [B, 1, ..., 1] of `like`'s rank.

    The result has `like`'s device and dtype. A [B] tensor against [B, C, H, W] would otherwise
    broadcast silently along W.

    Raises:
        ValueError: `values` is not of shape [B].
    """
    if values.shape != like.shape[:1]:
        raise ValueError(f"expected one value per image, shape [{like.shape[0]}], got {list(values.shape)}")
    return values.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def constant_channels(values: Sequence[float], device: torch.device) -> Tensor:
    """A number for each channel, [C, 1, 1] float32 on a device.

    It is copied there once, as each copy from the host would wait for the device's queue.
    """
    return _constants(tuple(values), device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the cached tensor may take part in a training step later
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def moved_about(operation: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The result of an operation that moves numbers about without computing with them, of uint16 as well.

    On a GPU few operations know uint16; its bits are moved as int16.
    """
    if tensors[0].dtype != torch.uint16:
        return operation(*tensors)
    return operation(*(x.view(torch.int16) if x.dtype == torch.uint16 else x for x in tensors)).view(torch.uint16)


def send(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to `device` without waiting: to a GPU from pinned memory."""
    if torch.device(device).type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def image_mean(x: Tensor) -> Tensor:
    """Mean over everything but the batch: [B, ...] => [B]."""
    return x.flatten(1).mean(1)


def shrink(images: Tensor, size: Size | int) -> Tensor:
    """Images or latents [B, C, H, W] at a smaller size, with antialiasing: [B, C, *size]."""
    size = Size.of(size)
    if tuple(size) == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", antialias=True)


MOST_GUIDANCE = 8.0
"""The largest guidance scale that a student knows."""


@dataclass(frozen=True)
class Condition:
    """The conditions of a velocity network, one row per image; None: the model does not have that input.

    Attributes:
        labels: [B] int64, class index in [0, num_classes]; `num_classes` itself is the null label.
        masked_latents: [B, C, H, W], latents of the image with its hole filled with gray.
        mask: [B, 1, H, W] in [0, 1], fraction of each latent pixel inside the hole; with `masked_latents`. Some
            published models take -1 and 1 instead (`MaskRules.told_as`).
        class_fractions: [B, K, H, W] in [0, 1], fraction of each latent pixel that belongs to each of K map classes.
        input: [B, I, H, W], the paired image at latent size, see `InputRules`; 0 where there is none.
        columns: [B, W] float32, the values of the named columns, one after the other; see `columns.ColumnRow`.
        augmentation: [B, P], the numbers of the variant that an image was turned into for training; 0: none.
        span: [B] in [0, 1], of a student: t - s, where it gives the average velocity from t to s; None: 0, s = t.
        guidance: [B] in [1, MOST_GUIDANCE], of a student: the guidance scale of its velocity; None: 1, no guidance.
    """

    labels: Tensor | None = None
    masked_latents: Tensor | None = None
    mask: Tensor | None = None
    class_fractions: Tensor | None = None
    input: Tensor | None = None
    columns: Tensor | None = None
    augmentation: Tensor | None = None
    span: Tensor | None = None
    guidance: Tensor | None = None

    def select(self, rows: Tensor) -> Condition:
        """Keep the images at `rows` ([b] int64 or [B] bool)."""
        return self._map(lambda name, x: x[rows.to(x.device)])

    def concatenate(self, other: Condition) -> Condition:
        """Append the images of `other`; both must have the same fields."""
        if self.names != other.names:
            raise ValueError(f"cannot join a condition with {self.names} and one with {other.names}")
        return self._map(lambda name, x: torch.cat([x, getattr(other, name)]))

    def to(self, device: torch.device | str) -> Condition:
        """Move every tensor to `device`."""
        return self._map(lambda name, x: x.to(device, non_blocking=True))

    @property
    def names(self) -> list[str]:
        """The fields that are not None."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Condition:
        return replace(self, **{name: change(name, getattr(self, name)) for name in self.names})
