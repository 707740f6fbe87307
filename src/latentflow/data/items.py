"""The record that every image source hands out, and what a source must answer.

Legend: S image size (height and width in pixels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class ImageItem:
    """One picture, cropped and resized, with what is known about it.

    Attributes:
        pixels: [S, S, 3] uint8, RGB.
        label: index into the source's `class_names`; None in an unlabelled source.
        name: the path inside the source, with forward slashes, or "synthetic/000017".
        semantic_map: [S, S] uint8 class index of each pixel; None where the source has no maps.
    """

    pixels: np.ndarray
    label: int | None
    name: str
    semantic_map: np.ndarray | None = None


@runtime_checkable
class ImageSource(Protocol):
    """A finite, ordered set of square images. Item i does not depend on what was asked for before.

    Attributes:
        class_names: one name per label; empty when the source is unlabelled.
        image_size: height and width of every item in pixels.
        description: one line for people: where the images come from and how many there are.
    """

    class_names: tuple[str, ...]
    image_size: int
    description: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageItem: ...

    def fingerprint(self) -> str:
        """A stable hash of what is in the source: equal for equal contents, on every machine."""
        ...
