"""The files below a folder or inside a zip archive, under names that are the same for both.

Names have forward slashes and composed accents (NFC), however a Mac writes them. A file or folder name that is not
UTF-8 is read as Latin-1, or as code page 437 in an archive packed under DOS or Windows. Hidden files and files that
systems leave behind (`is_clutter`) are not listed.
"""

from __future__ import annotations

import os
import posixpath
import stat
import struct
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from latentflow.console import notice
from latentflow.data.pictures.decode import check_bytes, has_library, most_pixels, read_file
from latentflow.data.prefetch import in_threads
from latentflow.errors import DataError
from latentflow.ledger import Ledger, one_at_a_time
from latentflow.progress import image_progress

SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".webp", ".bmp", ".dib", ".tif")
SUFFIXES += (".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".avif")
ARRAY_SUFFIXES = (".npy", ".npz")
LIBRARY_OF = {".heic": "pillow_heif", ".heif": "pillow_heif", ".hif": "pillow_heif", ".dcm": "pydicom"}
"""What reads files of a suffix, where it is installed."""

_CLUTTER = {"__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "lost+found", "system volume information"}
_CLUTTER |= {"thumbs.db", "ehthumbs.db", "desktop.ini"}
_UTF8_FLAG, _ENCRYPTED_FLAG, _DOS, _UNICODE_PATH = 0x800, 0x1, 0, 0x7075
_MARK_BYTES = 4096  # enough to recognise a format
_CHUNK = 1 << 20  # bytes read at a time
_READ_TOGETHER, _SAVED_TOGETHER = 64, 4096  # files

T = TypeVar("T")


class StoredFile(NamedTuple):
    """Where a store keeps one file.

    Attributes:
        path: the argument of the store's `read`.
    """

    path: str


class Listing(NamedTuple):
    """The contents of a store.

    Attributes:
        files: by name.
        folders: names of all folders, including empty ones.
    """

    files: dict[str, StoredFile]
    folders: list[str]


class FileStore(Protocol):
    """What holds files: a folder or an archive.

    Attributes:
        path: as the user gave it.
    """

    path: Path

    def listing(self) -> Listing:
        """Every file and folder that is neither hidden nor clutter, by its path."""
        ...

    def read(self, path: str) -> bytes:
        """The content of a file."""
        ...

    def held_bytes(self, path: str) -> int:
        """Memory that reading a file takes, if it is known beforehand; else 0."""
        ...

    def mark(self, path: str) -> bytes:
        """The first bytes of a file; empty if it cannot be read."""
        ...

    def contents(self, paths: Sequence[str]) -> list[str]:
        """Size and CRC-32 of each file, as "1234:89abcdef"."""
        ...


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
    if path.suffix.lower() == ".zip" and stat.S_ISREG(mode):
        return ZipStore(path)
    raise DataError(f"{path} is a single file; give its folder, the folder it unpacks to, a .zip file, or 'synthetic'")


class FolderStore:
    """Files below a folder."""

    def __init__(self, path: Path):
        self.path = path

    def listing(self) -> Listing:
        """Every file and folder that is neither hidden nor clutter, by its path inside the folder.

        Raises:
            DataError: a folder cannot be listed, or two files have the same name up to normalisation.
        """
        found, special, guessed = Listing({}, []), [], []
        for name, path, entry in self._walk(self.path, "", "", frozenset([self.path.resolve()])):
            if not _is_utf8(os.fsencode(path)):
                guessed.append(name)
            if _is(entry, "is_dir"):
                found.folders.append(name)
            elif _is(entry, "is_file") or not os.path.exists(entry.path):  # noqa: PTH110 - a dangling link is broken
                _add(found, name, StoredFile(path), self.path)
            else:
                special.append(name)
        if special:
            some = f"{min(special)}{', ...' if len(special) > 1 else ''}"
            notice(f"{self.path}: {len(special)} pipes, sockets, devices or looping links are skipped ({some})")
        _notice_guessed(self.path, guessed, "rename them")
        return found

    def files(self) -> dict[str, StoredFile]:
        """The files of `listing`."""
        return self.listing().files

    def read(self, path: str) -> bytes:
        return read_file(self._place(path))

    def held_bytes(self, path: str) -> int:
        """Memory that reading a file takes, if it is known beforehand: not for a folder."""
        return 0

    def mark(self, path: str) -> bytes:
        """The first bytes of a file; empty if it cannot be read."""
        try:
            with open(self._place(path), "rb") as file:  # noqa: PTH123
                return file.read(_MARK_BYTES)
        except OSError:
            return b""

    def contents(self, paths: Sequence[str]) -> list[str]:
        """Size and CRC-32 of each file, as "1234:89abcdef"; "unreadable" for one that cannot be read.

        Files are read once; the results are remembered while the files do not change.
        """
        with one_at_a_time(self.path), Ledger("crc32", self.path) as ledger:
            looked_up = in_threads(lambda some: [self._remembered(path, ledger) for path in some], _parts(paths))
            found = list(chain.from_iterable(looked_up))
            unknown = [place for place, content in enumerate(found) if content is None]
            with image_progress("looking for changes in", len(unknown)) as on_files:
                for start in range(0, len(unknown), _SAVED_TOGETHER):
                    parts = list(_parts(unknown[start : start + _SAVED_TOGETHER]))
                    computed = in_threads(lambda some: [self._content(paths[place], ledger) for place in some], parts)
                    for some, contents in zip(parts, computed, strict=True):
                        for place, content in zip(some, contents, strict=True):
                            found[place] = content
                        on_files(len(some))
                    ledger.save()
        return found

    def _place(self, path: str) -> str:
        """Where a file is; joining `Path` objects would take longer than opening it."""
        return f"{self.path}/{path}"

    def _remembered(self, path: str, ledger: Ledger) -> str | None:
        try:
            return ledger.get(path, os.stat(self._place(path)))  # noqa: PTH116
        except OSError:
            return "unreadable"

    def _content(self, path: str, ledger: Ledger) -> str:
        crc = size = 0
        try:
            with open(self._place(path), "rb", buffering=0) as file:  # noqa: PTH123
                status = os.fstat(file.fileno())
                while chunk := file.read(_CHUNK):
                    crc, size = zlib.crc32(chunk, crc), size + len(chunk)
        except OSError:
            return "unreadable"
        ledger.put(path, status, content := _identity(size, crc))
        return content

    def _walk(
        self, folder: Path, name: str, path: str, parents: frozenset[Path]
    ) -> Iterator[tuple[str, str, os.DirEntry]]:
        """Name, path and entry of everything below a folder, whose name and path end in a slash."""
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise DataError(f"cannot list {folder}: {error.strerror}") from error
        for entry in entries:
            if is_clutter(entry.name):
                continue
            found = name + as_text(os.fsencode(entry.name), "latin-1"), path + entry.name
            if not _is(entry, "is_dir"):
                yield *found, entry
                continue
            real = Path(entry.path).resolve()
            if real not in parents:  # a link to a parent folder would never end
                yield *found, entry
                yield from self._walk(Path(entry.path), *(f"{one}/" for one in found), parents | {real})


class ZipStore:
    """Members of a zip archive. Every process opens its own handle, since a fork would share the file position."""

    def __init__(self, path: Path):
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile, threading.Lock] | None = None

    def listing(self) -> Listing:
        """Every file and folder that is neither hidden nor clutter, by its path inside the archive.

        Raises:
            DataError: it is encrypted, or two members have the same name up to normalisation.
        """
        found, folders, outside, guessed = Listing({}, []), set(), [], []
        for member in self._archive()[0].infolist():
            name = _member_name(member)
            if not _is_utf8(_raw_name(member)):
                guessed.append(name)
            if ".." in name.split("/"):
                outside.append(name)
            if any(map(is_clutter, name.split("/"))):
                continue
            parts = name.split("/")[: None if member.is_dir() else -1]
            folders |= {"/".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
            if member.is_dir():
                continue
            if member.flag_bits & _ENCRYPTED_FLAG:
                raise DataError(f"{self.path} is encrypted ({name}); unpack it with its password, and give the folder")
            _add(found, name, StoredFile(member.filename), self.path)
        if outside:
            notice(f"{self.path}: {len(outside)} members with paths outside the archive are skipped ({min(outside)})")
        unpack = f'zipfile.ZipFile("{self.path}", metadata_encoding="cp932").extractall("DST")'
        _notice_guessed(self.path, guessed, f"unpack it with the right one, in Python 3.11 {unpack}, and give DST")
        found.folders.extend(sorted(folders))
        return found

    def files(self) -> dict[str, StoredFile]:
        """The files of `listing`."""
        return self.listing().files

    def held_bytes(self, path: str) -> int:
        """Memory that reading a member takes: its unpacked size."""
        return self._archive()[0].getinfo(path).file_size

    def read(self, path: str) -> bytes:
        """The content of a member.

        Raises:
            ValueError: it claims to unpack to more bytes than `decode.most_pixels`.
            zipfile.BadZipFile: it is damaged; decoders may raise nearly anything else.
        """
        archive, lock = self._archive()
        check_bytes(archive.getinfo(path).file_size, most_pixels())
        with lock:
            return archive.read(path)

    def mark(self, path: str) -> bytes:
        """The first bytes of a member; empty if it cannot be read."""
        archive, lock = self._archive()
        try:
            with lock, archive.open(path) as file:
                return file.read(_MARK_BYTES)
        except Exception:  # damaged archives raise nearly anything
            return b""

    def contents(self, paths: Sequence[str]) -> list[str]:
        """Size and CRC-32 of each member, in the form of `FolderStore.contents`; the archive states both."""
        members = map(self._archive()[0].getinfo, paths)
        return [_identity(member.file_size, member.CRC) for member in members]

    def _archive(self) -> tuple[zipfile.ZipFile, threading.Lock]:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            try:
                self._opened = opened = (os.getpid(), zipfile.ZipFile(self.path), threading.Lock())
            except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
                raise DataError(
                    f"{self.path} is not a readable zip archive ({error}); pack or copy it again"
                ) from error
        return opened[1:]

    def __getstate__(self) -> dict:
        return {"path": self.path, "_opened": None}


def is_image(name: str) -> bool:
    """Whether a file has the suffix of an image, in upper or lower case."""
    return _suffix(name) in SUFFIXES


def pictures_among(names: Iterable[str]) -> list[str]:
    """The files that are read as pictures, in the order of their names; arrays are, where there are no others.

    HEIC and DICOM count where the library is installed that reads them.
    """
    names = sorted(names)
    found = [name for name in names if is_image(name) or _is_read(_suffix(name))]
    return found or [name for name in names if _suffix(name) in ARRAY_SUFFIXES]


def _is_read(suffix: str) -> bool:
    return suffix in LIBRARY_OF and has_library(LIBRARY_OF[suffix])


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - ten times as fast as Path


def is_clutter(name: str) -> bool:
    """Whether a file or folder is hidden or left behind by a system: thumbnails, recycle bins, resource forks."""
    return name.startswith(".") or name.lower() in _CLUTTER  # including "..", which would lead out of the archive


def wrapper(names: Iterable[str]) -> str:
    """The common parent of all names, where a single folder wraps everything, with its trailing slash."""
    folder = posixpath.commonpath({posixpath.dirname(name) for name in names})
    return f"{folder}/" if folder else ""


def _is(entry: os.DirEntry, what: str) -> bool:
    try:
        return getattr(entry, what)()
    except OSError:  # a link to itself
        return False


def _add(found: Listing, name: str, file: StoredFile, where: Path) -> None:
    other = found.files.setdefault(name, file)
    if other is not file:
        same = "twice" if other.path == file.path else "in two ways of writing the same letters"
        raise DataError(f"{where} holds {name} {same}; rename or remove one of them")


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """What one thread takes at a time: for small files handing over each would take longer than reading it."""
    return (items[start : start + _READ_TOGETHER] for start in range(0, len(items), _READ_TOGETHER))


def _identity(size: int, crc: int) -> str:
    return f"{size}:{crc:08x}"


def _member_name(member: zipfile.ZipInfo) -> str:
    """A member's name with forward slashes and without a leading "./" or "/", whatever program packed the archive."""
    other = "cp437" if member.create_system == _DOS else "latin-1"
    parts = _raw_name(member).replace(b"\\", b"/").split(b"/")
    return "/".join(as_text(part, other) for part in parts if part not in (b"", b"."))


def _raw_name(member: zipfile.ZipInfo) -> bytes:
    """The bytes of a member's name; UTF-8 if the archive says so."""
    if member.flag_bits & _UTF8_FLAG:
        return member.filename.encode("utf-8", "surrogatepass")
    raw = member.filename.encode("cp437", "replace")  # undoes how Python decoded the bytes
    return _unicode_path(member.extra, raw) or raw


def _unicode_path(extra: bytes, raw: bytes) -> bytes | None:
    """The UTF-8 name that WinRAR and Info-ZIP add to one in a code page (APPNOTE 4.6.9); None if there is none."""
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and field[1:5] == zlib.crc32(raw).to_bytes(4, "little") and _is_utf8(field[5:]):
            return field[5:]
    return None


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def as_text(name: bytes, otherwise: str) -> str:
    """Decode a part of a path, as UTF-8 if it is that."""
    return unicodedata.normalize("NFC", name.decode() if _is_utf8(name) else name.decode(otherwise))


def _notice_guessed(where: Path, names: Sequence[str], remedy: str) -> None:
    """Print a notice that an encoding is guessed."""
    if names:
        notice(
            f"{where}: {len(names)} names are not UTF-8, and their encoding is guessed (such as {min(names)}); if they "
            f"read wrong, {remedy}"
        )
