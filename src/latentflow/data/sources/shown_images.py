"""The images of a source as they are shown: what feature networks learn from and judge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from latentflow.data.items import ImageItem, ImageSource
from latentflow.data.pictures.shown import as_shown
from latentflow.pixel_format import RGB, PixelFormat


def shown_images(source: ImageSource) -> ImageSource:
    """A source whose pixels are 8-bit RGB, by the rule of `as_shown`; the source itself, if they are."""
    return source if source.pixel_format == RGB else _ShownImages(source)


class _ShownImages:
    """All of a source but its pixels."""

    pixel_format: PixelFormat = RGB

    def __init__(self, source: ImageSource):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> ImageItem:
        """Image `index` as it is shown; raises what the source raises."""
        item = self._source[index]
        stored = torch.from_numpy(item.pixels.copy()).permute(2, 0, 1)[None]
        shown = as_shown(stored, self._source.pixel_format)
        return replace(item, pixels=shown[0].permute(1, 2, 0).numpy())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # before `__init__`, in a worker process
            raise AttributeError(name)
        return getattr(self._source, name)
