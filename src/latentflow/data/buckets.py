"""Aspect-ratio buckets: sizes of about equal area, to the nearest of which each image is cropped.

Which sizes there are follows from one size and a multiple, where an image goes from its shape alone. All images of a
batch are of one bucket; `latentflow.data.bucket_order` says of which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol, runtime_checkable

from pydantic import Field

from latentflow.columns import Column
from latentflow.data.items import FileFacts, ImageItem, ImageSource, fingerprint_of
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.prefetch import in_threads
from latentflow.data.rows import RowsOfSource
from latentflow.errors import DataError
from latentflow.pixel_format import PixelFormat
from latentflow.records import Record
from latentflow.sizes import ImageSize, Size

WIDEST = 2.0
"""The largest aspect ratio of a bucket; 1 / `WIDEST` is the smallest. What is wider or taller is cropped to it."""
_STEPS = 16  # at most, in the side of the square


class Bucket(Record):
    """The images of one size."""

    size: ImageSize
    num_images: int = Field(ge=0)


@runtime_checkable
class Croppable(ImageSource, Protocol):
    """A source that can crop its pictures to other sizes than its `image_size`."""

    def file_facts(self, index: int) -> FileFacts:
        """What the header of picture `index` says.

        Raises:
            BrokenImage: it cannot be read.
        """
        ...

    def picture_size(self, index: int) -> Size:
        """Of picture `index` as it is stored, upright; only its header is read.

        Raises:
            BrokenImage: it cannot be read.
        """
        ...

    def cropped(self, index: int, size: Size) -> ImageItem:
        """Item `index` at another size."""
        ...


def bucket_sizes(size: Size, multiple: int) -> list[Size]:
    """Sizes of about the area of `size` whose sides are multiples of `multiple`, from tall to wide.

    There is a wide and a tall one for each length that the shorter side can have; the longer side is the multiple that
    comes nearest to the area. Where two shorter sides have the same longer one, the size nearer to the area is taken.
    """
    found: dict[int, Size] = {}
    least, most = math.sqrt(size.area / WIDEST), math.sqrt(size.area)
    first = max(math.ceil(least / multiple), 1) * multiple
    for short in range(first, max(math.floor(most), first) + 1, multiple):
        long = max(round(size.area / short / multiple), 1) * multiple
        new, old = Size(short, max(short, long)), found.get(long)
        if old is None or abs(new.area - size.area) < abs(old.area - size.area):
            found[long] = new
    both = {*found.values(), *(Size(one.width, one.height) for one in found.values())}
    return sorted(both, key=lambda one: (one.aspect, one.height))


def usual_step(size: Size, factor: int) -> int:
    """What the sides of buckets are multiples of, in pixels: a multiple of twice the autoencoder's `factor`.

    It is the least one that leaves about a dozen buckets: 16 for 256 pixels and a factor of 8, 64 for 1024.
    """
    return 2 * factor * max(math.ceil(math.sqrt(size.area) / (_STEPS * 2 * factor)), 1)


def nearest_bucket(picture: Size, sizes: Sequence[Size]) -> int:
    """The index of the size with the nearest aspect ratio, on a logarithmic scale; of two equally near, the first."""
    return min(range(len(sizes)), key=lambda place: abs(math.log(sizes[place].aspect / picture.aspect)))


def named_sizes(buckets: Sequence[Bucket]) -> dict[str, dict[str, int]]:
    """What a table says of several sizes: the number of images of each; nothing where there is one."""
    return {"sizes": {str(bucket.size): bucket.num_images for bucket in buckets}} if buckets else {}


def in_sizes(source: ImageSource, sizes: Sequence[Size]) -> ImageSource:
    """The images at the sizes of a model or a cache: each in its bucket, if there are several.

    Args:
        sizes: `source.image_size` alone, or several.
    """
    return source if len(sizes) == 1 else BucketedImages.of(source, sizes)


@dataclass(frozen=True)
class BucketedImages(RowsOfSource):
    """The images of a source, each at the size of its bucket; bucket after bucket, in the source's order within each.

    Attributes:
        source: the images.
        buckets: those that hold images, the one with the most images first, then from tall to wide.
        rows: the index in `source` of each image.
    """

    source: Croppable
    buckets: tuple[Bucket, ...]
    rows: tuple[int, ...]

    @classmethod
    def of(
        cls, source: ImageSource, sizes: Sequence[Size], on_images: Callable[[int], None] = lambda num_images: None
    ) -> BucketedImages:
        """Read the header of every picture, and put it into the nearest of some buckets.

        A picture whose header cannot be read counts as a square, among which it will be broken.

        Raises:
            DataError: the source has pictures of one size only, which are drawn and not cropped.
        """
        if not isinstance(source, Croppable):
            raise DataError(f"{source.description} have one size; leave out --buckets")

        def place(index: int) -> int:
            try:
                return nearest_bucket(source.picture_size(index), sizes)
            except BrokenImage:
                return nearest_bucket(Size(1, 1), sizes)

        rows: dict[Size, list[int]] = {size: [] for size in sizes}
        for index, found in enumerate(in_threads(place, range(len(source)))):
            rows[sizes[found]].append(index)
            on_images(1)
        filled = [size for size in sizes if rows[size]]
        most = max(filled, key=lambda size: len(rows[size]))
        filled = [most, *(size for size in filled if size != most)]
        return cls(
            source,
            tuple(Bucket(size=size, num_images=len(rows[size])) for size in filled),
            tuple(index for size in filled for index in rows[size]),
        )

    @property
    def image_size(self) -> Size:
        """Of the bucket with the most images."""
        return self.buckets[0].size

    @property
    def pixel_format(self) -> PixelFormat:
        return self.source.pixel_format

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def map_class_names(self) -> tuple[str, ...]:
        return self.source.map_class_names

    @property
    def map_palette(self) -> tuple[tuple[int, int, int], ...]:
        return self.source.map_palette

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.source.columns

    @property
    def input_format(self) -> PixelFormat | None:
        return self.source.input_format

    @property
    def input_origin(self) -> str:
        return self.source.input_origin

    @property
    def place(self) -> object:
        """Where the images are, as the source has it."""
        return getattr(self.source, "place", self.source.description)

    @property
    def description(self) -> str:
        return f"{self.source.description}, in {len(self.buckets)} shapes"

    def file_facts(self, index: int) -> FileFacts:
        """What the header of image `index` says; raises what reading it raises."""
        return self.source.file_facts(self._row(index))

    def __iter__(self) -> Iterator[ImageItem]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> ImageItem:
        return self.source.cropped(self._row(index), self.size(index))

    @property
    def ranges(self) -> list[range]:
        """The indices of the images of each bucket."""
        ends = [0, *accumulate(bucket.num_images for bucket in self.buckets)]
        return [range(*pair) for pair in pairwise(ends)]

    def size(self, index: int) -> Size:
        """Of item `index`."""
        pairs = zip(self.buckets, self.ranges, strict=True)
        return next(bucket.size for bucket, rows in pairs if index in rows)

    def only(self, size: Size, indices: Sequence[int] | None = None) -> BucketedImages:
        """The images of one bucket; of those at `indices`, if given.

        Raises:
            DataError: none of them goes there.
        """
        rows = tuple(self.rows[index] for index in self.of_size(size, indices))
        return BucketedImages(self.source, (Bucket(size=size, num_images=len(rows)),), rows)

    def of_size(self, size: Size, indices: Sequence[int] | None = None) -> list[int]:
        """The indices of the images of one bucket; of those at `indices`, if given.

        Raises:
            DataError: none of them goes there.
        """
        wanted = range(len(self)) if indices is None else indices
        found = [index for index in wanted if self.size(index) == size]
        if not found:
            raise DataError(f"{self.source.description}: none of them is nearest to the shape {size}")
        return found

    def fingerprint(self) -> str:
        """A hash of the images and of their buckets."""
        sizes = ", ".join(f"{bucket.num_images} of {bucket.size}" for bucket in self.buckets)
        return fingerprint_of(self, range(len(self)), f"{self.source.fingerprint()} {sizes}")
