"""Images of a source, read ahead while a network works: by threads, or by processes if they are faster.

Legend: n images, H and W image height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentflow.data.items import ImageItem, ImageSource, stack_pixels
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.prefetch import Reading, in_threads, prefetch
from latentflow.evaluation.shards import Work


@dataclass(frozen=True)
class ReadImages:
    """The readable images of a batch.

    Attributes:
        num_tried: images of the batch, broken ones included.
        rows: of the n others.
        labels: [n] int64, -1 where there are none.
        pixels: [n, P, S, S], stored values of the source's pixel format.
    """

    num_tried: int
    rows: list[int]
    labels: Tensor
    pixels: Tensor

    def pin_memory(self) -> ReadImages:
        """Pin the pixels, which go to the device; called while reading ahead."""
        return replace(self, pixels=self.pixels.pin_memory())


class _Batches(Dataset):
    """Reads batches of rows, in any thread or process."""

    def __init__(self, source: ImageSource):
        self.source = source

    def __getitems__(self, rows: Sequence[int]) -> ReadImages:
        found = []
        for row in rows:
            try:
                found.append((row, self.source[row]))
            except BrokenImage:
                continue
        labels = torch.tensor([-1 if item.label is None else item.label for _, item in found], dtype=torch.int64)
        size, pixel_format = self.source.image_size, self.source.pixel_format
        none = torch.zeros(0, pixel_format.channels, *size, dtype=getattr(torch, pixel_format.dtype))
        pixels = stack_pixels([item.pixels for _, item in found]) if found else none
        return ReadImages(len(rows), [row for row, _ in found], labels, pixels)


class ImageReader:
    """Reads the images of shards, batch by batch, in the order in which they will be needed.

    Args:
        rows: of the source; a shard is a range of places among them.
        device: where they go: for a GPU they are pinned.
        work: batch size (the last batch of a shard may have fewer images) and processes that read.
    """

    def __init__(self, source: ImageSource, rows: Sequence[int], device: torch.device, work: Work):
        self.source, self.rows, self.batch_size = source, rows, work.batch_size
        self.how = Reading(
            work.num_workers,
            batch_bytes=source.pixel_format.bytes_per_pixel * source.image_size.area * work.batch_size,
            pin_memory=device.type == "cuda",
            cpu_is_busy=device.type == "cpu",
            sharing=work.runtime.local_world,
        )
        self._stack = ExitStack()

    def begin(self, shards: Sequence[range]) -> None:
        """Read these shards from now on."""
        batches = [
            [self.rows[place] for place in shard[start : start + self.batch_size]]
            for shard in shards
            for start in range(0, len(shard), self.batch_size)
        ]
        self._read = self._stack.enter_context(prefetch(_Batches(self.source), batches, self.how))

    def __next__(self) -> ReadImages:
        return next(self._read)

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def read_batches(
    source: ImageSource, rows: Sequence[int], batch_size: int
) -> Iterator[list[tuple[int, ImageItem | BrokenImage]]]:
    """Batches of (row, item or error), in order; threads decode ahead."""

    def read(row: int) -> tuple[int, ImageItem | BrokenImage]:
        try:
            return row, source[row]
        except BrokenImage as error:
            return row, error

    with closing(in_threads(read, rows)) as found:
        for start in range(0, len(rows), batch_size):
            yield [next(found) for _ in rows[start : start + batch_size]]


def require_readable(found: ImageItem | BrokenImage) -> ImageItem:
    """An item of `read_batches` that could be read before.

    Raises:
        DataError: it no longer can.
    """
    if isinstance(found, BrokenImage):
        raise found
    return found
