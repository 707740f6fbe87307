"""The pictures in an LMDB environment, the form in which LSUN, CelebA-HQ 256 and FFHQ 256 are distributed.

Two layouts are in use, distinguished by their values:

    raw pixels      every value is 3 x side x side bytes, RGB row by row, without a header (CelebA-HQ and FFHQ of NVAE)
    image files     every value is an encoded image (LSUN: webp; NVAE with `is_encoded`)

Keys that are all ASCII numbers are in numerical order, others in the database's own, bytewise: the order in which the
first N images of LSUN are counted. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from latentflow.data.packed import PackedBytes, PackedText
from latentflow.data.pictures.decode import BrokenImage, open_image
from latentflow.data.stores.first import check_first
from latentflow.errors import DataError
from latentflow.ledger import Ledger, one_at_a_time
from latentflow.progress import image_progress

if TYPE_CHECKING:
    import lmdb

_LEAST_SIDE = 8  # fewer raw pixels are a number or a label, not a picture
_NUM_LOOKED_AT = 16  # values from which the layout is recognised
_READ_TOGETHER = 64  # values


class LmdbStore:
    """The pictures of an LMDB environment, read-only; safe from several threads, and when forked or spawned.

    Args:
        path: as the user gave it: the folder that holds data.mdb, or a single file.
        first: how many pictures to list; None: all. Listing the 3 million of LSUN bedroom takes seconds.

    Attributes:
        keys: the pictures' keys, in order.
        num_entries: the number of pictures in the environment.

    Raises:
        DataError: the environment is damaged or empty, holds no pictures, or has fewer than `first`.
    """

    def __init__(self, path: Path, first: int | None = None):
        self.path = path
        self._file = environment_file(path)
        self._handle: _Handle | None = None
        self._contents: PackedText | None = None
        with self._transaction() as transaction:
            self.num_entries = transaction.stat()["entries"]
            if not self.num_entries:
                raise DataError(f"{path} is an empty LMDB environment; give one that holds images")
            check_first(first, self.num_entries, path)
            self.keys, wanted = PackedBytes(_ordered_keys(transaction, first)), first or self.num_entries
            if len(self.keys) != wanted:
                raise DataError(
                    f"{path} is a damaged LMDB environment ({len(self.keys)} keys of {wanted}); copy it again"
                )
            self._is_raw = _is_raw(path, {key: transaction.get(key) for key in self.keys[:_NUM_LOOKED_AT]})

    def read(self, key: bytes) -> bytes:
        """A picture as an image file; raw pixels become a PPM file, which is a header followed by the pixels.

        Raises:
            ValueError: it is not a square of raw pixels, although the others are.
            DataError: the environment is damaged there.
        """
        with self._transaction() as transaction:
            value = transaction.get(key)
        if not self._is_raw:
            return value
        side = _side(value)
        if not side:
            raise ValueError(f"its {len(value)} bytes are not a square of RGB pixels (3 x side x side)")
        return b"P6 %d %d 255\n" % (side, side) + value

    def contents(self) -> Sequence[str]:
        """Size and CRC-32 of each value, as "1234:89abcdef".

        All values are read once; the result is remembered while the environment does not change.
        """
        if self._contents is None:
            self._contents = PackedText(self._checksums())
        return self._contents

    def _checksums(self) -> list[str]:
        with one_at_a_time(self._file), Ledger("lmdb crc32", self._file) as ledger:
            status, name = self._file.stat(), f"first {len(self.keys)}"
            if (known := ledger.get(name, status)) is None:
                known = []
                with image_progress("looking for changes in", len(self.keys)) as on_images:
                    for start in range(0, len(self.keys), _READ_TOGETHER):
                        with self._transaction() as transaction:
                            values = [transaction.get(key) for key in self.keys[start : start + _READ_TOGETHER]]
                        known += [f"{len(value)}:{zlib.crc32(value):08x}" for value in values]
                        on_images(len(values))
                ledger.put(name, status, " ".join(known))
                return known
            return known.split()

    @contextmanager
    def _transaction(self) -> Iterator[lmdb.Transaction]:
        if self._handle is None or self._handle.process != os.getpid():
            self._handle = _handle(self.path, self._file)
        import lmdb

        try:
            with self._handle.environment.begin() as transaction:
                yield transaction
        except lmdb.Error as error:
            raise DataError(f"{self.path} is a damaged LMDB environment ({error}); copy it again") from error

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None, "_contents": None}


def environment_file(path: Path) -> Path | None:
    """The file that holds the LMDB environment at `path`; None if there is no such environment."""
    file = path if path.suffix.lower() in (".mdb", ".lmdb") and not path.is_dir() else path / "data.mdb"
    return file if os.path.isfile(file) else None  # noqa: PTH113 - false where access is denied


@dataclass(eq=False)
class _Handle:
    """An open environment, and the process that opened it."""

    process: int
    environment: lmdb.Environment


_handles: WeakValueDictionary[tuple[int, int], _Handle] = WeakValueDictionary()  # by device and inode
_locks: dict[int, threading.Lock] = {}  # by process: a fork may copy a lock that is held


def _handle(path: Path, file: Path) -> _Handle:
    """This process's handle on an environment: lmdb refuses to open it twice, and a fork must not use its parent's."""
    try:
        import lmdb
    except ImportError as error:
        raise DataError(
            f"{path} is an LMDB environment, which needs the lmdb library: pip install latentflow[data]"
        ) from error
    with _locks.setdefault(os.getpid(), threading.Lock()):
        try:
            status = file.stat()
            handle = _handles.get((status.st_dev, status.st_ino))
            if handle is not None and handle.process != os.getpid():
                handle.environment.close()  # only in this process; the parent's stays open
                handle = None
            if handle is None:
                opened = lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False)
                handle = _Handle(os.getpid(), opened)
                _handles[status.st_dev, status.st_ino] = handle
        except (lmdb.Error, OSError) as error:
            raise DataError(f"{path} is not a readable LMDB environment ({error}); copy it again") from error
        needed = (handle.environment.info()["last_pgno"] + 1) * handle.environment.stat()["psize"]
        if status.st_size < needed:  # reading what is missing would kill the process (SIGBUS)
            raise DataError(f"{path} is cut short: {status.st_size} bytes of {needed}; copy it again")
        return handle


def _ordered_keys(transaction: lmdb.Transaction, first: int | None) -> list[bytes]:
    """The first keys, without reading values; of numbers all must be seen, as "10" is stored before "2"."""
    keys, numbered = [], True
    for key in transaction.cursor().iternext(keys=True, values=False):
        keys.append(key)
        numbered = numbered and key.isdigit()
        if not numbered and first is not None and len(keys) >= first:
            break
    return (sorted(keys, key=int) if numbered else keys)[:first]


def _is_raw(path: Path, values: dict[bytes, bytes]) -> bool:
    """Whether these values are raw pixels, not image files; single ones may be broken, or look like the other kind."""
    num_square = sum(_side(value) > 0 for value in values.values())
    num_files = sum(map(_is_file, values.values()))
    if 2 * num_square > len(values) > num_files:
        return True
    if num_files:
        return False
    key, value = next(iter(values.items()))
    pickled = value[:1] == b"\x80" and value[-1:] == b"."
    what = "a pickled object, which latentflow does not load: it could run any code" if pickled else "neither"
    raise DataError(
        f"{path} has no values that are image files (JPEG, PNG, WebP, BMP, GIF, TIFF) or square RGB pixels "
        f"(3 x side x side bytes): the first, {key!r} of {len(value)} bytes, is {what}; "
        "write image files into it, or into a folder"
    )


def _side(value: bytes) -> int:
    """The side of a square of raw RGB pixels; 0 if it is not one."""
    side = math.isqrt(len(value) // 3)
    return side if side >= _LEAST_SIDE and 3 * side * side == len(value) else 0


def _is_file(value: bytes) -> bool:
    try:
        with open_image(value) as image:
            return image.format != "PPM"  # raw pixels may well begin with its two magic letters
    except BrokenImage:
        return False
