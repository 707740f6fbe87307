"""The option `first`: only some of the images of a data set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from latentflow.errors import DataError


def check_first(first: int | None, available: int, path: object) -> None:
    """Refuse to take the first 0 images, or more than there are; None means all.

    Raises:
        DataError: with both numbers.
    """
    if first is not None and first < 1:
        raise DataError(f"first must be at least 1 image, got {first}; leave it out for all {available}")
    if first is not None and first > available:
        raise DataError(f"first = {first}, but {path} has {available} images; give at most {available}")


def evenly(labels: Sequence[int], first: int) -> list[int]:
    """The places of `first` images, in order: the first of each class, then the second of each, and so on."""
    seen: dict[int, int] = defaultdict(int)
    turns = []
    for place, label in enumerate(labels):
        turns.append((seen[label], label, place))
        seen[label] += 1
    return sorted(place for _, _, place in sorted(turns)[:first])
