"""Patterns that stand for several files: data/train-*.parquet, shards/{0000..0012}.tar."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from latentflow.errors import DataError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")
_MOST_FILES = 100_000


def is_pattern(path: str | Path) -> bool:
    """Whether a path stands for several files, and is none itself."""
    text = str(path)
    has_marks = any(mark in text for mark in "*?[") or _RANGE.search(text) or _LIST.search(text)
    return bool(has_marks) and not os.path.lexists(text)


def braces_expanded(text: str) -> list[str]:
    """The texts that a pattern with braces stands for, in order.

    >>> braces_expanded("{08..10}-{a,b}.tar")
    ["08-a.tar", "08-b.tar", "09-a.tar", "09-b.tar", "10-a.tar", "10-b.tar"]

    Raises:
        DataError: it stands for too many, or for none.
    """
    found = min(
        (match for match in (_RANGE.search(text), _LIST.search(text)) if match), key=re.Match.start, default=None
    )
    if found is None:
        return [text]
    if found.re is _RANGE:
        first, last = found.groups()
        numbers = range(int(first), int(last) + 1)
        if not 0 < len(numbers) <= _MOST_FILES:
            raise DataError(f"{found[0]} stands for {len(numbers):,} files; write fewer, such as {{0000..0012}}")
        width = len(first) if first.startswith("0") else 0
        parts = [f"{number:0{width}}" for number in numbers]
    else:
        parts = found[1].split(",")
    return [one for part in parts for one in braces_expanded(text[: found.start()] + part + text[found.end() :])]


def expanded(path: str | Path) -> list[Path]:
    """The files that a pattern stands for: those of a star in the order of their names.

    Raises:
        DataError: there are none, or one of those that braces name is missing.
    """
    files = []
    for text in braces_expanded(str(path)):
        if any(mark in text for mark in "*?["):
            files += sorted(Path(name) for name in glob.glob(text, recursive=True) if os.path.isfile(name))  # noqa: PTH113, PTH207
        elif os.path.isfile(text):  # noqa: PTH113
            files.append(Path(text))
        else:
            raise DataError(f"{path} names {text}, which is not there; correct the numbers, or copy the file")
    if not files:
        raise DataError(f"no file is called like {path}; check the pattern")
    return files
