"""Files in tar archives: one, or the shards of a WebDataset. Nothing is unpacked; each file is read where it lies."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from latentflow.console import notice
from latentflow.data.pictures.decode import check_bytes, most_pixels
from latentflow.data.stores.files import Listing, StoredFile, as_text, is_clutter
from latentflow.errors import DataError
from latentflow.ledger import Ledger, one_at_a_time
from latentflow.progress import image_progress

TAR_FILE = ".tar"
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_MARK_BYTES = 4096  # enough to recognise a format

_Member = tuple[str, int, int]  # name, offset, size


class TarStore:
    """Members of tar archives; safe from several threads and processes, as nothing stays open.

    Args:
        path: as the user gave it.
        files: the archives, in order.

    Attributes:
        doubled: a name that two of the archives hold; "" if there is none.
    """

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path, self._files = path, list(files)
        self.doubled = ""

    def listing(self) -> Listing:
        """Every file and folder that is neither hidden nor clutter, by its path inside the archives.

        Where two archives hold the same name, each name begins with that of its archive, without the suffix.

        Raises:
            DataError: an archive cannot be read, is compressed or cut short, or holds a name twice.
        """
        found: dict[str, list[tuple[int, _Member]]] = {}
        for number, members in enumerate(self._members()):
            for member in members:
                found.setdefault(member[0], []).append((number, member))
        doubled = {name: places for name, places in found.items() if len(places) > 1}
        for name, places in doubled.items():
            if len({number for number, _ in places}) < len(places):
                raise DataError(f"{self.path} holds {name} twice; remove one of them")
        self.doubled = min(doubled, default="")
        files, folders = {}, set()
        for name, places in found.items():
            for number, (_, offset, size) in places:
                full = f"{self._files[number].stem}/{name}" if doubled else name
                files[full] = StoredFile(f"{number}/{offset}/{size}")
                parts = full.split("/")[:-1]
                folders |= {"/".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
        return Listing(files, sorted(folders))

    def files(self) -> dict[str, StoredFile]:
        """The files of `listing`."""
        return self.listing().files

    def read(self, path: str) -> bytes:
        """The content of a member.

        Raises:
            ValueError: it has more bytes than `decode.most_pixels`, or its archive has become shorter.
        """
        file, offset, size = self._place(path)
        check_bytes(size, most_pixels())
        content = self._read(file, offset, size)
        if len(content) < size:
            raise ValueError("its archive is cut short")
        return content

    def held_bytes(self, path: str) -> int:
        """Memory that reading a member takes."""
        return self._place(path)[2]

    def mark(self, path: str) -> bytes:
        """The first bytes of a member; empty if it cannot be read."""
        file, offset, size = self._place(path)
        try:
            return self._read(file, offset, min(size, _MARK_BYTES))
        except OSError:
            return b""

    def contents(self, paths: Sequence[str]) -> list[str]:
        """Size and CRC-32 of each member, as "1234:89abcdef".

        Members are read once; the results are remembered while their archive does not change.
        """
        found: list[str] = []
        with one_at_a_time(self.path), Ledger("tar crc32", self.path) as ledger:
            status = [file.stat() for file in self._files]
            names = [f"{self._files[int(path.partition('/')[0])]} {path}" for path in paths]
            with image_progress("looking for changes in", len(paths)) as on_files:
                for name, path in zip(names, paths, strict=True):
                    stamp = status[int(path.partition("/")[0])]
                    known = ledger.get(name, stamp)
                    if known is None:
                        file, offset, size = self._place(path)
                        known = f"{size}:{zlib.crc32(self._read(file, offset, size)):08x}"
                        ledger.put(name, stamp, known)
                    found.append(known)
                    on_files(1)
        return found

    def _members(self) -> list[list[_Member]]:
        """The members of each archive; remembered while it does not change."""
        with one_at_a_time(self.path), Ledger("tar members", self.path) as ledger:
            found = []
            with image_progress("listing", len(self._files)) as on_files:
                for file in self._files:
                    try:
                        status = file.stat()
                    except OSError as error:
                        raise DataError(f"{file} cannot be read ({error.strerror}); copy it again") from error
                    known = ledger.get(str(file), status)
                    if known is None:
                        known = _members_of(file)
                        ledger.put(str(file), status, known)
                    found.append([tuple(member) for member in known])
                    on_files(1)
        return found

    def _place(self, path: str) -> tuple[Path, int, int]:
        number, offset, size = map(int, path.split("/"))
        return self._files[number], offset, size

    def _read(self, file: Path, offset: int, size: int) -> bytes:
        with file.open("rb") as archive:
            archive.seek(offset)
            return archive.read(size)


def _members_of(file: Path) -> list[_Member]:
    """Name, offset and size of each regular file of an archive."""
    found, links, outside, size = [], 0, 0, file.stat().st_size
    try:
        with file.open("rb") as start:
            head = start.read(8)
        if command := next((name for mark, name in _COMPRESSED.items() if head.startswith(mark)), None):
            raise DataError(f"{file} is compressed, so that its files can only be read in a row; unpack it: {command}")
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                links += member.issym() or member.islnk()
                if not member.isreg():
                    continue
                name = as_text(member.name.encode("utf-8", "surrogateescape"), "latin-1")
                parts = [part for part in name.split("/") if part not in ("", ".")]
                outside += ".." in parts
                if any(map(is_clutter, parts)):
                    continue
                if member.offset_data + member.size > size:
                    raise DataError(f"{file} is cut short: it ends inside of {member.name}; copy it again")
                found.append(("/".join(parts), member.offset_data, member.size))
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{file} is not a readable tar archive ({error}); pack or copy it again") from error
    if links or outside:
        notice(f"{file}: {links + outside} links and members with paths outside the archive are skipped")
    return found
