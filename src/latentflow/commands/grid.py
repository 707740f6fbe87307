"""Contact sheets: many pictures as one."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from latentflow.artifacts import atomic_file


def image_grid(pixels: Tensor, columns: int, *, gap: int = 2) -> Image.Image:
    """Lay [B, 3, S, S] uint8 pictures out in rows of `columns`, `gap` white pixels apart."""
    num_images, _, height, width = pixels.shape
    rows = -(-num_images // columns)
    sheet = torch.full((3, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for number, picture in enumerate(pixels):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = picture
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())


def save_grid(file: str | Path, pixels: Tensor, columns: int) -> Path:
    """Write a contact sheet as PNG, complete or not at all."""
    with atomic_file(file) as temporary:
        image_grid(pixels, columns).save(temporary)
    return Path(file)
