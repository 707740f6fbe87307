"""The files below a folder or inside a zip archive, under names that are the same for both."""

from __future__ import annotations

import os
import posixpath
import stat
import threading
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from latentflow.data.decode import read_file
from latentflow.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".avif")

_MOST_UNPACKED_BYTES = 1 << 30  # a zip member that claims more is no photograph


class StoredFile(NamedTuple):
    """Where a store keeps one file.

    Attributes:
        path: what `read` of the store takes.
        num_bytes: unpacked size; 0 for files of a folder that are not images.
    """

    path: str
    num_bytes: int


def open_store(path: Path) -> FolderStore | ZipStore:
    """Open a folder or a .zip archive.

    Raises:
        DataError: there is nothing at `path`, or a file of another kind.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(
            f"cannot open {path}: {error.strerror}; give a folder of images, a .zip file, or 'synthetic'"
        ) from error
    if stat.S_ISDIR(mode):
        return FolderStore(path)
    if path.suffix.lower() == ".zip":
        return ZipStore(path)
    raise DataError(f"{path} is a single file; give the folder it lies in, or a .zip file, or 'synthetic'")


class FolderStore:
    """Files below a folder."""

    def __init__(self, path: Path):
        self.path = path

    def files(self) -> dict[str, StoredFile]:
        """Every file that is not hidden, by its path inside the folder."""
        found = self._walk(self.path, "", frozenset([self.path.resolve()]))
        return {name: StoredFile(name, num_bytes) for name, num_bytes in found}

    def read(self, path: str) -> bytes:
        return read_file(self.path / path)

    def _walk(self, folder: Path, prefix: str, parents: frozenset[Path]) -> Iterator[tuple[str, int]]:
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise DataError(f"cannot list {folder}: {error.strerror}") from error
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                real = Path(entry.path).resolve()
                if real not in parents:  # a link to a folder above would never end
                    yield from self._walk(Path(entry.path), f"{prefix}{entry.name}/", parents | {real})
            else:
                yield prefix + entry.name, _file_size(entry) if is_image(entry.name) else 0


class ZipStore:
    """Members of a zip archive. Every process opens its own handle: a fork would share the file position."""

    def __init__(self, path: Path):
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile, threading.Lock] | None = None

    def files(self) -> dict[str, StoredFile]:
        """Every file that is not hidden, by its path inside the archive."""
        found = {}
        for member in self._archive()[0].infolist():
            name = _tidy(member.filename)
            if not member.is_dir() and not any(map(_is_hidden, name.split("/"))):
                found[name] = StoredFile(member.filename, member.file_size)
        return found

    def read(self, path: str) -> bytes:
        archive, lock = self._archive()
        if archive.getinfo(path).file_size > _MOST_UNPACKED_BYTES:
            raise ValueError(f"it claims to unpack to {archive.getinfo(path).file_size} bytes")
        with lock:
            return archive.read(path)

    def _archive(self) -> tuple[zipfile.ZipFile, threading.Lock]:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            try:
                self._opened = opened = (os.getpid(), zipfile.ZipFile(self.path), threading.Lock())
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(f"{self.path} is not a readable zip archive ({error}); pack or copy it anew") from error
        return opened[1:]

    def __getstate__(self) -> dict:
        return {"path": self.path, "_opened": None}


def is_image(name: str) -> bool:
    """Whether a file's suffix is that of an image, in either case."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 - ten times as fast as Path


def wrapper(names: Iterable[str]) -> str:
    """The path that all names have in front, where a single folder wraps everything, with its last slash."""
    folder = posixpath.commonpath([posixpath.dirname(name) for name in names])
    return f"{folder}/" if folder else ""


def _file_size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a dangling link is listed, and reported as broken when it is read
        return 0


def _tidy(name: str) -> str:
    """Forward slashes only, and no "./" in front, whatever program packed the archive."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # a "..", which would lead out of the archive, included
