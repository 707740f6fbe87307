"""What a source says of some of its images, which another source takes in an order of its own."""

from __future__ import annotations

from collections.abc import Sequence

from latentflow.columns import ColumnValue
from latentflow.data.items import ImageSource


class RowsOfSource:
    """Base of sources that hold images of another one.

    Attributes:
        source: the other one.
        rows: the index in `source` of each image.
    """

    source: ImageSource
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """See `ImageSource.name`."""
        return self.source.name(self._row(index))

    def label(self, index: int) -> int | None:
        """See `ImageSource.label`."""
        return self.source.label(self._row(index))

    def values(self, index: int) -> tuple[ColumnValue, ...]:
        """See `ImageSource.values`."""
        return self.source.values(self._row(index))

    def contents(self) -> list[str]:
        """See `ImageSource.contents`."""
        found = self.source.contents()
        return [found[row] for row in self.rows]

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a source of {len(self)}")
        return self.rows[index]
