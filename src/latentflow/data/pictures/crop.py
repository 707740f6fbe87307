"""The central square crop of a picture and of its semantic map.

FID depends on this rule, so it is the same for training images and references.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

CROP_RULE = "adm-center"
"""The name of this rule, as caches and reports record it."""

_MOST_RESIZED_PIXELS = 1 << 26  # a long, thin strip grows beyond this before it is cropped


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The central square crop of an image: [size, size, 3] uint8.

    The rule of ADM (Dhariwal & Nichol, arXiv 2105.05233), which published FID figures assume: halve with a
    box filter while the shorter side is at least twice `size`, make it exactly `size` with a bicubic
    filter, and crop the centre. Smaller images are enlarged.

    Args:
        image: RGB.
        size: height and width of the result in pixels.

    Raises:
        ValueError: the image is too long and thin to be enlarged before the crop.
    """
    for halved in _halvings(*image.size, size):
        image = image.resize(halved, Image.Resampling.BOX)
    width, height, left, top = _placed(*image.size, size)
    if width * height > _MOST_RESIZED_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels are too long and thin for a {size} x {size} square; crop it first"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image.crop((left, top, left + size, top + size)))


def crop_map(semantic_map: np.ndarray, size: int) -> np.ndarray:
    """The same crop of a semantic map: [size, size].

    Each pixel takes the class at its centre, so classes are not mixed.

    Args:
        semantic_map: [H, W] of any integers, of the size of its image.
        size: height and width of the result in pixels.
    """
    full_height, full_width = semantic_map.shape
    *_, halved = (full_width, full_height), *_halvings(full_width, full_height, size)
    width, height, left, top = _placed(*halved, size)
    # Every resize stretches the whole picture, so pixel i of `width` has its centre at (i + 1/2) / width of it.
    columns = (2 * np.arange(left, left + size) + 1) * full_width // (2 * width)
    rows = (2 * np.arange(top, top + size) + 1) * full_height // (2 * height)
    return semantic_map[rows[:, None], columns]


def _halvings(width: int, height: int, size: int) -> Iterator[tuple[int, int]]:
    """The sizes after each halving, while the shorter side is at least twice `size`."""
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        yield width, height


def _placed(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Width and height, the shorter of which is `size`, and the left and top of the central square."""
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    return width, height, (width - size) // 2, (height - size) // 2
