"""The record of one image, and the protocol of image sources.

Legend: n images, H and W image height and width in pixels, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from latentflow.columns import Column, ColumnValue, written_values
from latentflow.errors import DataError
from latentflow.pixel_format import PixelFormat
from latentflow.sizes import Size

UNLABELLED = 255
"""The value of a semantic map where the class of a pixel is unknown."""


@dataclass(frozen=True)
class ImageItem:
    """One picture, cropped and resized, with its label and map.

    Attributes:
        pixels: [H, W, C], stored values of the source's `pixel_format`.
        label: index into the source's `class_names`; None in an unlabelled source.
        name: the path inside the source, with forward slashes, or "synthetic/000017".
        semantic_map: [H, W] uint8, an index into the source's `map_class_names` for each pixel, or
            `UNLABELLED` where the class is unknown; None if the source has no maps.
        cut: share of the picture that the crop leaves out, in [0, 1).
        input: [H / N, W / N, c], the paired image, which shows what `pixels` show, N times smaller by `InputRules`;
            None if the source has no inputs.
    """

    pixels: np.ndarray
    label: int | None
    name: str
    semantic_map: np.ndarray | None = None
    cut: float = 0.0
    input: np.ndarray | None = None


class FileFacts(NamedTuple):
    """What the header of an image file says.

    Attributes:
        kind: PNG, JPEG, TIFF, ...
        size: width and height, before it is turned by its EXIF orientation.
        upright_size: height and width afterwards.
        pixel_format: of its numbers, with the full range of their dtype.
    """

    kind: str
    size: tuple[int, int]
    upright_size: Size
    pixel_format: PixelFormat


@runtime_checkable
class ImageSource(Protocol):
    """A finite, ordered set of images of one size. Item i does not depend on earlier accesses.

    Attributes:
        class_names: one name per label; empty when the source is unlabelled.
        map_class_names: one name per class of the semantic maps; empty when there are no maps.
        map_palette: the colour of each of `map_class_names`, RGB in 0..255.
        image_size: of every item.
        columns: what is known of each image besides its class; empty in most sources.
        pixel_format: channels, dtype and range of every item's pixels.
        input_format: channels, dtype and range of the paired inputs; None when there are none.
        input_origin: where they come from, see `InputRules`; "" when there are none.
        description: one line for people: where the images come from and how many there are. It is stored in models that
            are shared, so it only contains the last part of a path.
    """

    class_names: tuple[str, ...]
    map_class_names: tuple[str, ...]
    map_palette: tuple[tuple[int, int, int], ...]
    image_size: Size
    columns: tuple[Column, ...]
    pixel_format: PixelFormat
    input_format: PixelFormat | None
    input_origin: str
    description: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageItem: ...

    def name(self, index: int) -> str:
        """The name of item `index`, without decoding it."""
        ...

    def label(self, index: int) -> int | None:
        """The label of item `index`, without decoding it; None in an unlabelled source."""
        ...

    def values(self, index: int) -> tuple[ColumnValue, ...]:
        """The value of each of `columns` for item `index`, without decoding it."""
        ...

    def fingerprint(self) -> str:
        """A stable hash of the source: equal for equal contents, on every machine."""
        ...

    def contents(self) -> Sequence[str]:
        """An identifier of the content of each item: equal for equal bytes, on every machine."""
        ...


def stack_pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures [H, W, C] => [n, C, H, W] of the same dtype."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def fingerprint_of(source: ImageSource, rows: Iterable[int], more: str = "") -> str:
    """A hash of the names, contents and column values of some images of a source, and of `more`."""
    digest, contents = hashlib.sha256(more.encode("utf-8", "backslashreplace")), source.contents()
    for row in rows:
        digest.update(f"{source.name(row)}\0{contents[row]}\0".encode("utf-8", "backslashreplace"))
        if source.columns:
            digest.update(f"{written_values(source.values(row))}\0".encode())
    return digest.hexdigest()


def require_every_class(class_names: Sequence[str], labels: Iterable[int], where: object, remedy: str) -> None:
    """Refuse a class without images, which a model could not learn.

    Raises:
        DataError: naming these classes.
    """
    seen = set(labels)
    if unseen := [name for label, name in enumerate(class_names) if label not in seen]:
        some = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        raise DataError(f"{where} has no readable image of {len(unseen)} of its classes ({some}); {remedy}")
