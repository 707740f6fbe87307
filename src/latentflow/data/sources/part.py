"""Some images of a source, as a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentflow.data.items import ImageItem, ImageSource, fingerprint_of
from latentflow.data.rows import RowsOfSource
from latentflow.requests import Split
from latentflow.sizes import Size


class PartOfSource(RowsOfSource):
    """Some images of a source, in the order of `rows`.

    Args:
        rows: which images of `source`.
        split: the name of this part of the images that a model was trained with.
        size: of these images, where `source` has several; None: that of `source`.
    """

    def __init__(self, source: ImageSource, rows: Sequence[int], split: Split, size: Size | None = None):
        self.source, self.rows, self.split = source, list(rows), split
        self.image_size = source.image_size if size is None else size
        which = ["images" if split == "all" else f"{split} images", *([] if size is None else [f"of size {size}"])]
        self.description = f"{len(self.rows):,} {' '.join(which)} of {source.description}"

    def __getattr__(self, name: str) -> Any:
        """What holds of all images alike: classes, formats, columns, where they are."""
        if name == "source" or name.startswith("__"):  # asked for while a copy is made, before there is a source
            raise AttributeError(name)
        return getattr(self.source, name)

    def __getitem__(self, index: int) -> ImageItem:
        return self.source[self._row(index)]

    def fingerprint(self) -> str:
        """A hash of names, contents and values of these images."""
        return fingerprint_of(self, range(len(self)))
