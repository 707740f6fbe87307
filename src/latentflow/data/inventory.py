"""What a set of images holds, counted: what would be read, before anything is written."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from pydantic import Field

from latentflow.columns import Column, ColumnValue
from latentflow.data.buckets import BucketedImages
from latentflow.data.items import ImageSource
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.prefetch import Reading, prefetch
from latentflow.progress import image_progress
from latentflow.records import Record

_READ_TOGETHER = 32


class ColumnCounts(Record):
    """The values of one column.

    Attributes:
        kind: see `Column`.
        unknown: how many images have no value.
        classes: images of each class; of a set each of its classes counts.
        without_class: images whose set is empty.
        least, mean, greatest: of the numbers; None for other kinds, and if there are none.
    """

    kind: str
    unknown: int
    classes: dict[str, int] = Field({})
    without_class: int = 0
    least: float | None = None
    mean: float | None = None
    greatest: float | None = None


class BucketCounts(Record):
    """The images of one bucket.

    Attributes:
        num_images: those that can be read.
        cut_mean, cut_most: share of these pictures that the crop leaves out.
    """

    num_images: int
    cut_mean: float
    cut_most: float


class Inventory(Record):
    """What was found in a set of images.

    Attributes:
        source: where they are and how many there are, in words.
        num_images: those that can be read.
        broken: the others, each with the reason.
        pixels: what they are read as.
        classes: images of each class; a class without a readable image has 0.
        columns: what is known of them besides, by name.
        formats: how many files are of each kind and format, most first.
        sizes: how many have each width and height, most first.
        duplicates: names of images whose files are equal, by size and checksum; each group once.
        contradictory: those among them that are in several classes.
        cut_mean, cut_most: share of the pictures that the crop leaves out.
        buckets: what goes to which size, most first; empty where all are of one size.
    """

    source: str
    num_images: int
    broken: list[str]
    pixels: str
    classes: dict[str, int]
    columns: dict[str, ColumnCounts]
    formats: dict[str, int]
    sizes: dict[str, int]
    duplicates: list[list[str]]
    contradictory: list[list[str]]
    cut_mean: float
    cut_most: float
    buckets: dict[str, BucketCounts] = Field({})

    @property
    def num_duplicates(self) -> int:
        """Images that another one repeats: one of each group is none."""
        return sum(len(group) - 1 for group in self.duplicates)


class _Seen(NamedTuple):
    """One image that was read, or why it cannot be."""

    kind: str = ""
    size: str = ""
    cut: float = 0.0
    problem: str = ""


def take_inventory(source: ImageSource, num_workers: int | None = None) -> Inventory:
    """Read every image of a source once and count what is there.

    Args:
        num_workers: worker processes that read; None: as many as speed it up.
    """
    parts = [range(start, min(start + _READ_TOGETHER, len(source))) for start in range(0, len(source), _READ_TOGETHER)]
    seen: list[_Seen] = []
    with (
        image_progress("looking at", len(source)) as on_images,
        prefetch(_Looking(source), parts, Reading(num_workers)) as read,
    ):
        for part in read:
            seen += part
            on_images(len(part))
    rows = [row for row, one in enumerate(seen) if not one.problem]
    found = [seen[row] for row in rows]
    duplicates = duplicates_in(source)
    labels = Counter(source.label(row) for row in rows)
    return Inventory(
        source=source.description,
        num_images=len(rows),
        broken=[f"{source.name(row)}: {one.problem}" for row, one in enumerate(seen) if one.problem],
        pixels=source.pixel_format.title,
        classes={name: labels[label] for label, name in enumerate(source.class_names)},
        columns=_columns(source.columns, [source.values(row) for row in rows]),
        formats=_counted(one.kind for one in found),
        sizes=_counted(one.size for one in found),
        duplicates=[[source.name(row) for row in group] for group in duplicates],
        contradictory=[[source.name(row) for row in group] for group in duplicates if _is_contradictory(source, group)],
        **_cut(found),
        buckets=_in_buckets(source, seen) if isinstance(source, BucketedImages) else {},
    )


def _in_buckets(source: BucketedImages, seen: Sequence[_Seen]) -> dict[str, BucketCounts]:
    counts = {}
    for bucket, rows in zip(source.buckets, source.ranges, strict=True):
        found = [seen[row] for row in rows if not seen[row].problem]
        counts[str(bucket.size)] = BucketCounts(num_images=len(found), **_cut(found))
    return counts


def _cut(found: Sequence[_Seen]) -> dict[str, float]:
    """The mean and the largest share that the crop leaves out."""
    cut = [one.cut for one in found]
    return {"cut_mean": sum(cut) / max(len(cut), 1), "cut_most": max(cut, default=0.0)}


def duplicates_in(source: ImageSource) -> list[list[int]]:
    """Groups of rows whose files are equal by size and checksum, in order."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row, content in enumerate(source.contents()):
        identity = content.partition(" ")[0]  # behind it stand the class and the map
        if identity not in ("", "unreadable"):
            groups[identity].append(row)
    return [group for group in groups.values() if len(group) > 1]


def _is_contradictory(source: ImageSource, group: Sequence[int]) -> bool:
    return len({source.label(row) for row in group}) > 1


class _Looking:
    """Reads images, in any thread or process."""

    def __init__(self, source: ImageSource):
        self.source = source
        self._facts: Callable | None = getattr(source, "file_facts", None)  # what is drawn has no file

    def __getitems__(self, rows: Sequence[int]) -> list[_Seen]:
        return [self._seen(row) for row in rows]

    def _seen(self, row: int) -> _Seen:
        try:
            item = self.source[row]
            if self._facts is None:
                height, width = item.pixels.shape[:2]
                return _Seen(f"drawn, {self.source.pixel_format.title}", f"{width} x {height}", item.cut)
            facts = self._facts(row)
        except BrokenImage as error:
            return _Seen(problem=error.reason)
        width, height = facts.size
        return _Seen(f"{facts.kind}, {facts.pixel_format.title.partition(', ')[0]}", f"{width} x {height}", item.cut)


def _counted(found: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(found).items(), key=lambda pair: (-pair[1], pair[0])))


def _columns(columns: Sequence[Column], rows: Sequence[tuple[ColumnValue, ...]]) -> dict[str, ColumnCounts]:
    return {column.name: _values(column, [row[place] for row in rows]) for place, column in enumerate(columns)}


def _values(column: Column, values: Sequence[ColumnValue]) -> ColumnCounts:
    known = [value for value in values if value is not None]
    counts = {"kind": column.kind, "unknown": len(values) - len(known)}
    if column.kind == "number":
        if not known:
            return ColumnCounts(**counts)
        return ColumnCounts(**counts, least=min(known), mean=sum(known) / len(known), greatest=max(known))
    sets = [value if isinstance(value, frozenset) else {value} for value in known]
    labels = Counter(label for one in sets for label in one)
    classes = {name: labels[label] for label, name in enumerate(column.class_names)}
    return ColumnCounts(**counts, classes=classes, without_class=sum(not one for one in sets))
