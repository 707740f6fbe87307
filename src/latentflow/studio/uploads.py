"""Pictures that clients send, as files: checked first, and under names of our own.

Those of the page are kept in a folder of the process, by the hash of their content; those that come with a request of
another program last as long as the request.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from latentflow.data.pictures.decode import BrokenImage, open_image, upright
from latentflow.errors import ConfigError, DataError
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.sampling.picture_file import read_facts
from latentflow.studio.refusals import Refused

MOST_BYTES = 64 * 2**20
"""Of one file of the page."""
MOST_PIXELS = 100_000_000
"""Of one picture of the page; browsers paint on no more."""
MOST_KEPT = 2 * 2**30
"""Of all files of the page together; the oldest are forgotten first."""

_LONGEST_NAME = 80
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"P4", b"P5", b"P6")


@dataclass(frozen=True)
class Upload:
    """A file of the page.

    Attributes:
        key: the first digits of the SHA-256 of name and content.
        name: as the page gave it, without folders.
        file: where it is.
        size: width and height of the upright picture.
        facts: the metadata of a picture of latentflow, or None.
    """

    key: str
    name: str
    file: Path
    size: tuple[int, int]
    facts: Mapping[str, Any] | None


class Uploads:
    """The files of a process, in `folder`, which is its own. Safe from several threads."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._kept: dict[str, Upload] = {}
        self._lock = Lock()

    def add(self, name: str, content: bytes) -> Upload:
        """Keep a picture.

        Raises:
            DataError: it is no picture that can be read, or too large.
        """
        name = safe_name(name)
        if len(content) > MOST_BYTES:
            raise DataError(f"{name} has {len(content):,} bytes; at most {MOST_BYTES:,} can be uploaded")
        key = hashlib.sha256(name.encode() + b"\0" + content).hexdigest()[:24]
        with self._lock:
            if key in self._kept:
                return self._kept[key]
        size, facts = _looked_at(content, name)
        place = self.folder / key
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
        with self._lock:
            self._kept[key] = Upload(key, name, place / name, size, facts)
            self._forget()
            return self._kept[key]

    def find(self, key: object) -> Upload:
        """A file by its key.

        Raises:
            ConfigError: there is none.
        """
        with self._lock:
            found = self._kept.get(str(key))
        if found is None:
            raise ConfigError("this file is no longer there; upload it again")
        return found

    def _forget(self) -> None:
        sizes = {key: one.file.stat().st_size for key, one in self._kept.items() if one.file.exists()}
        for key in list(self._kept)[:-1]:
            if sum(sizes.values()) <= MOST_KEPT:
                return
            self._kept.pop(key).file.unlink(missing_ok=True)
            sizes.pop(key, None)


def safe_name(name: str) -> str:
    """The last part of a name, without what a file system or a terminal takes for more than a letter."""
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    plain = "".join(one if one.isprintable() and one not in '<>:"|?*' else "_" for one in last).strip(" .")
    stem, dot, suffix = plain.rpartition(".")
    return f"{stem[:_LONGEST_NAME]}{dot}{suffix[:12]}" if stem else plain[:_LONGEST_NAME] or "picture"


def _looked_at(content: bytes, name: str) -> tuple[tuple[int, int], Mapping[str, Any] | None]:
    """Width and height of the upright picture, which is decoded once to see that it is whole; and its metadata."""
    try:
        with open_image(content, name) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise DataError(
                    f"{name} has {width} x {height} pixels; the page takes at most {MOST_PIXELS:,}, the commands more"
                )
            size = upright(image).size
        return size, read_facts(content, name)
    except BrokenImage as error:
        raise DataError(f"{name} cannot be used: {error.reason}; give a picture such as PNG or JPEG") from error


@contextmanager
def as_files(
    images: Mapping[str, bytes], most_pixels: int, pixel_format: PixelFormat = RGB
) -> Iterator[dict[str, Path]]:
    """The images of a request as files, for as long as the context lasts.

    Raises:
        Refused: one is no image (415), or has too many pixels (413).
    """
    for name, content in images.items():
        if name != "image" or pixel_format == RGB:  # others may be arrays, whose bytes are counted
            _check_picture(name, content, most_pixels)
    with tempfile.TemporaryDirectory(prefix="latentflow-") as folder:
        files = {name: Path(folder) / name for name in images}
        for name, content in images.items():
            files[name].write_bytes(content)
        yield files


def _check_picture(name: str, content: bytes, most_pixels: int) -> None:
    """Look at the header of an image."""
    try:
        with open_image(content, name) as image:
            width, height = image.size
    except BrokenImage as error:
        status = 422 if content.startswith(_PICTURES) else 415
        if "pixels" in error.reason:
            status = 413
        raise Refused(status, str(error)) from None
    if width * height > most_pixels:
        raise Refused(
            413, f"{name} has {width} x {height} pixels; at most {most_pixels:,} are taken, so send a smaller one"
        )
