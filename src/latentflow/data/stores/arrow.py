"""Rows of Arrow tables in files: parquet, and the folders that the library `datasets` writes with `save_to_disk`.

Images are encoded files in a column: bytes, or the struct of bytes and path that `datasets` calls Image. What it knows
of other columns, such as the names of classes, stands in the schema of the files.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentflow.data.packed import PackedText
from latentflow.data.pictures.decode import check_bytes
from latentflow.errors import DataError
from latentflow.ledger import Ledger, one_at_a_time
from latentflow.progress import image_progress

if TYPE_CHECKING:
    import pyarrow

ARROW_FILES = (".parquet", ".arrow")
_MOST_HELD = 256 << 20  # bytes of images in row groups that one process keeps
_MOST_OPEN = 8  # files


class ArrowStore:
    """The images in a column of some files, read-only; safe from several threads, and when forked or spawned.

    A row is known by its number over all files, as text. A row group of parquet is unpacked as a whole, so that rows
    are read fastest in their order; a few groups are kept.

    Args:
        path: as the user gave it.
        files: in order; all of the same columns.

    Attributes:
        schema: of the first file.
        features: what `datasets` says of its columns, by name; empty if it did not write them.

    Raises:
        DataError: there is no row, a file cannot be read or has other columns than the first, or pyarrow is missing.
    """

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path, self._files = path, list(files)
        self._image_column = ""
        self._contents: PackedText | None = None
        self._opened: _Opened | None = None
        groups, ends = [], [0]
        for number, file in enumerate(self._files):
            part = self._part(number)
            if number == 0:
                self.schema = part.schema.remove_metadata()
                self.features = _features(part.schema)
            elif not part.schema.remove_metadata().equals(self.schema):
                raise DataError(f"{file} has other columns than {self._files[0]}; give one of the two")
            for group, num_rows in enumerate(part.groups):
                groups.append((number, group))
                ends.append(ends[-1] + num_rows)
        self._groups, self._ends = np.array(groups), np.array(ends)
        if not len(self):
            raise DataError(f"{path} has no rows; give a table of images")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take_images(self, column: str) -> None:
        """Read the images of this column from now on."""
        self._image_column = column

    def column(self, name: str, inner: str = "") -> list[Any]:
        """All cells of one column, or of one field of a struct, as Python objects."""
        from pyarrow import compute

        cells: list[Any] = []
        for number, file in enumerate(self._files):
            with _explained(file):
                found = self._part(number).read(f"{name}.{inner}" if inner else name)
                cells += (compute.struct_field(found, inner) if inner else found).to_pylist()
        return cells

    def image_columns(self) -> list[str]:
        """The columns that hold images: by their feature, as a struct with bytes, or by the first of their bytes."""
        from pyarrow import types

        def holds_images(field: pyarrow.Field) -> bool:
            if _is_image(self.features.get(field.name)):
                return True
            if types.is_struct(field.type):
                return field.type.get_field_index("bytes") >= 0
            return types.is_binary(field.type) or types.is_large_binary(field.type)

        return [field.name for field in self.schema if holds_images(field)]

    def stored_paths(self) -> list[str | None]:
        """The path that stands next to the bytes of each image; None where there is none."""
        from pyarrow import types

        kind = self.schema.field(self._image_column).type
        if not types.is_struct(kind) or kind.get_field_index("path") < 0:
            return [None] * len(self)
        return self.column(self._image_column, "path")

    def read(self, path: str) -> bytes:
        """The image of a row, as an image file.

        Raises:
            ValueError: the row holds none.
            DataError: the file is damaged.
        """
        row = int(path)
        place = int(np.searchsorted(self._ends, row, "right")) - 1
        cell = self._group(place)[row - int(self._ends[place])].as_py()
        content, where = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if content is None:
            raise ValueError(f"its row holds the path {where} and not the image" if where else "its row holds no image")
        check_bytes(len(content))
        return content

    def held_bytes(self, path: str) -> int:
        """Memory that reading a row takes, which is not known beforehand."""
        return 0

    def contents(self, paths: Sequence[str]) -> list[str]:
        """Size and CRC-32 of each image, as "1234:89abcdef"; "unreadable" where a row holds none.

        All rows are read once; the result is remembered while the files do not change.
        """
        if self._contents is None:
            self._contents = PackedText(self._checksums())
        return [self._contents[int(path)] for path in paths]

    def _checksums(self) -> list[str]:
        found: list[str] = []
        with (
            one_at_a_time(self.path),
            Ledger(f"arrow crc32 {self._image_column}", self.path) as ledger,
            image_progress("looking for changes in", len(self)) as on_images,
        ):
            for number, file in enumerate(self._files):
                status, own = file.stat(), np.flatnonzero(self._groups[:, 0] == number)
                known = ledger.get(str(file), status)
                if known is None:
                    rows = range(self._ends[own[0]], self._ends[own[-1] + 1]) if len(own) else range(0)
                    known = [self._checksum(row) for row in rows]
                    ledger.put(str(file), status, known)
                    ledger.save()
                found += known
                on_images(len(known))
        return found

    def _checksum(self, row: int) -> str:
        try:
            content = self.read(str(row))
        except ValueError:
            return "unreadable"
        return f"{len(content)}:{zlib.crc32(content):08x}"

    def _group(self, place: int) -> pyarrow.ChunkedArray:
        """The images of one row group."""
        opened = self._here()
        held = opened.held
        with opened.lock:
            if place not in held:
                number, group = map(int, self._groups[place])
                with _explained(self._files[number]):
                    held[place] = opened.part(number, self._files[number]).read(self._image_column, group)
            held.move_to_end(place)
            while len(held) > 1 and sum(array.nbytes for array in held.values()) > _MOST_HELD:
                held.popitem(last=False)
            return held[place]

    def _part(self, number: int) -> _Parquet | _Stream:
        opened = self._here()
        with opened.lock, _explained(self._files[number]):
            return opened.part(number, self._files[number])

    def _here(self) -> _Opened:
        """What this process has open."""
        opened = self._opened
        if opened is None or opened.process != os.getpid():
            self._opened = opened = _Opened()
        return opened

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None, "_contents": None}


class _Opened:
    """Files and row groups that one process holds; a fork must not use its parent's, nor its lock."""

    def __init__(self) -> None:
        self.process, self.lock = os.getpid(), threading.Lock()
        self._parts: OrderedDict[int, _Parquet | _Stream] = OrderedDict()
        self.held: OrderedDict[int, pyarrow.ChunkedArray] = OrderedDict()

    def part(self, number: int, file: Path) -> _Parquet | _Stream:
        """File `number`, opened if it is not."""
        if number not in self._parts:
            self._parts[number] = (_Parquet if file.suffix.lower() == ".parquet" else _Stream)(file)
        self._parts.move_to_end(number)
        while len(self._parts) > _MOST_OPEN:
            self._parts.popitem(last=False)
        return self._parts[number]


class _Parquet:
    """One parquet file. No threads of Arrow's, which a fork would lose."""

    def __init__(self, file: Path):
        from pyarrow import parquet

        self._file = parquet.ParquetFile(file, memory_map=True)
        self.schema = self._file.schema_arrow
        self.groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]

    def read(self, column: str, group: int | None = None) -> pyarrow.ChunkedArray:
        """One column of one row group, or of all; "image.path" is one field of a struct."""
        groups = range(len(self.groups)) if group is None else [group]
        return self._file.read_row_groups(groups, columns=[column], use_threads=False).column(0)


class _Stream:
    """One Arrow file, as a stream or with an index; its memory stays on the disk."""

    def __init__(self, file: Path):
        from pyarrow import ipc, memory_map

        source = memory_map(str(file))
        has_index = source.read(6) == b"ARROW1"
        source.seek(0)
        self._table = (ipc.open_file if has_index else ipc.open_stream)(source).read_all()
        self.schema, self.groups = self._table.schema, [self._table.num_rows]

    def read(self, column: str, group: int | None = None) -> pyarrow.ChunkedArray:
        """One column; of "image.path" the whole struct."""
        return self._table.column(column if column in self._table.column_names else column.rpartition(".")[0])


def _features(schema: pyarrow.Schema) -> dict[str, Any]:
    """What `datasets` has written about the columns."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_image(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "Image"


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn any exception of pyarrow into a `DataError` that names the file."""
    try:
        yield
    except ImportError as error:
        raise DataError(f"{file} needs the pyarrow library: pip install 'latentflow[data]'") from error
    except (DataError, MemoryError):
        raise
    except Exception as error:  # pyarrow's own, OSError, and of damaged files nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file} cannot be read ({reason[:160]}); copy it again") from error
