"""Masks and semantic maps at latent size, and images with a hole.

Both shrink by area: a latent pixel covers factor x factor pixels and holds the share of them that lies in the hole, or
that belongs to each class. Thin structures survive, unlike under nearest neighbour.

Legend: H and W image height and width, C channels, h = H / factor, w = W / factor, K map classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from latentflow.data.painting.mask_rules import MaskForm
from latentflow.pixel_format import PixelFormat

HOLE_GRAY = 128
"""The gray level, of 255, that a hole is filled with before encoding: the middle of the range."""


def hide(
    pixels: np.ndarray, mask: np.ndarray, told_as: MaskForm = "share", pixel_format: PixelFormat | None = None
) -> np.ndarray:
    """An image with its hole filled: pixels [H, W, C], painted over where mask [H, W] is 1.

    Args:
        pixel_format: of the pixels; None: 8-bit RGB.
    """
    return np.where(mask[..., None] > 0, hole_shade(told_as, pixel_format or PixelFormat()), pixels)


def hole_shade(told_as: MaskForm, pixel_format: PixelFormat) -> np.ndarray:
    """The stored values that a hole is filled with, [C]: `HOLE_GRAY` of 8 bits, or what lies there in another range."""
    shade = 0 if told_as == "sign" else HOLE_GRAY
    return pixel_format.from_unit(np.full(pixel_format.channels, shade / 127.5 - 1))


def hole_counts(mask: np.ndarray, factor: int, told_as: MaskForm = "share") -> Tensor:
    """How many pixels of each latent pixel count as hole: mask [H, W] of 0 and 1 => [1, h, w] int64.

    As "sign", all of them count if the first one lies in the hole.
    """
    if told_as == "sign":
        mask = mask[::factor, ::factor].repeat(factor, 0).repeat(factor, 1)[: mask.shape[0], : mask.shape[1]]
    return class_counts(1 - mask, 1, factor)


def mask_input(hole_shares: Tensor, told_as: MaskForm) -> Tensor:
    """Shares of the hole in [0, 1] in the form that the network takes: unchanged, or as -1 and 1."""
    return 2 * hole_shares - 1 if told_as == "sign" else hole_shares


def class_counts(semantic_map: np.ndarray, num_classes: int, factor: int) -> Tensor:
    """How many pixels of each latent pixel belong to each class: [H, W] uint8 => [K, h, w] int64.

    Indices of `num_classes` and more, such as that of unlabelled pixels, count for no class.
    """
    height, width = semantic_map.shape[0] // factor, semantic_map.shape[1] // factor
    cells = semantic_map[: height * factor, : width * factor].reshape(height, factor, width, factor)
    named = np.minimum(cells.astype(np.int64), num_classes)
    place = np.arange(height)[:, None, None, None] * width + np.arange(width)[None, None, :, None]
    counts = np.bincount((named * (height * width) + place).ravel(), minlength=(num_classes + 1) * height * width)
    return torch.from_numpy(counts[: num_classes * height * width].reshape(num_classes, height, width))


def shares(counts: Tensor, factor: int) -> Tensor:
    """Counts of pixels => shares of latent pixels in [0, 1], float32 of the same shape."""
    return counts.float() / factor**2
