"""Image files, opened: the only place that hands a file to Pillow.

What a file claims to be is not believed. Of Pillow's formats those of photographs and of lossless storage are read, and
none that starts another program (EPS starts Ghostscript). Only regular files are read. A picture's header is checked
before its pixels are decoded, and what a PNG carries beside its pixels never decides whether it is read.

One limit, `most_pixels`, bounds a single picture and the bytes of its file, and as much as that is what all threads
together may hold at once.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import SAFEBLOCK, ImageFile

from latentflow.console import notice
from latentflow.errors import ConfigError, DataError, LatentFlowError

__all__ = [
    "BrokenImage",
    "most_bytes",
    "most_pixels",
    "open_image",
    "orientation",
    "read_file",
    "reason",
    "room_for",
    "stored_mode",
    "upright",
]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")  # JPEG includes MPO
_MOST_PIXELS = 1 << 28  # 16,384 x 16,384; a phone's 200 megapixels are 16,320 x 12,240
_VARIABLE = "LATENTFLOW_MAX_PIXELS"
_BYTES_PER_PIXEL = 4

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_PNG_KEPT = (b"tRNS", b"eXIf", b"iCCP", b"cHRM", b"gAMA", b"sRGB", b"cICP", b"acTL", b"fcTL", b"fdAT")
_MOST_TEXT = 32 * SAFEBLOCK  # half of what Pillow takes of a whole file
_MOST_PROFILE = 32 * SAFEBLOCK  # the largest profiles of printers have some 4 MiB

if "PILLOW_BLOCK_SIZE" not in os.environ:
    # Pillow keeps pictures in blocks, of 16 MiB by default. Those above 32 MiB go back to the system when they are
    # free; of smaller ones each thread's heap keeps all that it ever had.
    Image.core.set_block_size(1 << 26)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What people give the name of an image: place and mark in the file, what it is, and what to do.
_AS_PNG = "save it as PNG"
_STRANGERS = (
    (0, b"%!PS", "EPS or PostScript", _AS_PNG),
    (0, b"\xc5\xd0\xd3\xc6", "EPS", _AS_PNG),
    (0, b"%PDF", "PDF", "save its pages as PNG"),
    (0, b"\xd7\xcd\xc6\x9a", "WMF", _AS_PNG),
    (40, b" EMF", "EMF", _AS_PNG),
    (0, b"SIMPLE  =", "FITS", "scale it to 8 or 16 bits and save it as PNG"),
    (0, b"8BPS", "a Photoshop document", _AS_PNG),
    (0, b"gimp xcf", "a GIMP document", _AS_PNG),
    (0, b"DDS ", "DDS", _AS_PNG),
    (0, b"\0\0\1\0", "a Windows icon", _AS_PNG),
    (0, b"qoif", "QOI", _AS_PNG),
    (0, b"\x76\x2f\x31\x01", "OpenEXR", "scale it to 8 or 16 bits and save it as PNG"),
    (0, b"#?RADIANCE", "Radiance HDR", "scale it to 8 or 16 bits and save it as PNG"),
    (0, b"\xff\x0a", "JPEG XL", _AS_PNG),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL", _AS_PNG),
    (4, b"ftyphei", "HEIC", "save it as JPEG or PNG"),
    (4, b"ftyphev", "HEIC", "save it as JPEG or PNG"),
    (4, b"ftypmif1", "HEIF", "save it as JPEG or PNG"),
    (128, b"DICM", "DICOM", "scale it to 8 or 16 bits and save it as PNG"),
    (0, b"\x93NUMPY", "a NumPy array", _AS_PNG),
    (0, b"\x89HDF", "HDF5", _AS_PNG),
    (0, b"PK\x03\x04", "a zip archive", "unpack it"),
    (0, b"\x1f\x8b", "gzip", "unpack it"),
    (0, b"version https://git-lfs", "a Git LFS pointer and not yet the file", "run git lfs pull"),
)
_DAMAGED = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"RIFF",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
)
_MARKUP = ((b"<svg", "SVG", _AS_PNG), (b"<html", "a web page", "download the image anew"))


class BrokenImage(DataError):
    """One file cannot be read as an image; others may be fine.

    Attributes:
        name: of the file, as the user knows it.
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"cannot read the image {self.name}: {self.reason}"


@contextmanager
def open_image(file: bytes | str | Path | Image.Image, name: str | None = None) -> Iterator[Image.Image]:
    """Open an image file. Its header is read; pixels are decoded when they are first asked for.

    Use the picture inside the context: so long it counts against what all threads may decode at once.

    Args:
        file: a path, the content of a file, or a picture in memory, which is handed on as it is.
        name: what to call it in errors; the path unless given.

    Yields:
        The picture as Pillow has it: the pixels as stored, not turned (see `upright`), in any mode.

    Raises:
        BrokenImage: it is missing, no regular file, too large, damaged, or of a format that is not read; also for
            whatever else goes wrong inside the context, since decoders of damaged files raise nearly anything.
        ConfigError: LATENTFLOW_MAX_PIXELS is no number.
    """
    name = name if name is not None else str(file) if isinstance(file, str | Path) else "in memory"
    try:
        if isinstance(file, Image.Image):
            yield file
            return
        content = file if isinstance(file, bytes) else read_file(file)
        with _identified(content, name) as image, _pixels.holding(_checked(image.width * image.height)):
            if _holds_more(image):
                notice(f"{name} holds several pictures, of which the first is read", kind="several pictures")
            yield image
    except LatentFlowError:
        raise
    except Image.DecompressionBombError as error:  # its message begins with the number of pixels
        raise BrokenImage(name, _too_many(int(re.search(r"\d+", str(error))[0]))) from error
    except Exception as error:
        raise BrokenImage(name, reason(error)) from error


def orientation(image: Image.Image) -> int:
    """How the pixels of a picture have to be turned, 1 to 8 as EXIF numbers it; 1 is upright, or nothing said.

    For TIFF this is what is stored until the pixels are decoded, and then 1: Pillow turns them as it decodes.
    """
    try:
        turn = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF says nothing
        return 1
    return turn if turn in _TURNS else 1


def stored_mode(image: Image.Image) -> str:
    """How the pixels lie in the file of an image that is not decoded yet, in Pillow's terms, such as "RGB;16B"."""
    if not isinstance(image, ImageFile) or not image.tile:
        return image.mode
    details = image.tile[0][3]
    return details if isinstance(details, str) else str(details[0]) if details else image.mode


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; the picture itself where there is nothing to turn."""
    image.load()
    turn = orientation(image)
    return image if turn == 1 else image.transpose(_TURNS[turn])


def read_file(path: str | Path) -> bytes:
    """The content of a regular file of a bounded size; links are followed.

    Raises:
        ValueError: it is a folder, a pipe or a device, which may never end, or has more bytes than `most_bytes`.
        OSError: it is missing or cannot be read.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116 - also of names that are bytes
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "no regular file"
        raise ValueError(f"it is {what}; give an image file")
    with open(path, "rb") as file:  # noqa: PTH123
        size = os.fstat(file.fileno()).st_size
        check_bytes(size)
        return file.read(size)  # and no more, should it be growing


def check_bytes(num_bytes: int, most: int | None = None) -> None:
    """Refuse a file that is larger than a picture may be.

    Args:
        most: bytes; `most_bytes` unless told otherwise, and in proportion to it.

    Raises:
        ValueError: with both numbers, and the remedy.
    """
    most = most_bytes() if most is None else most
    if num_bytes > most:
        pixels = -(-num_bytes * most_pixels() // most)
        raise ValueError(
            f"its {num_bytes:,} bytes are more than {most:,}; make it smaller, or allow more with {_VARIABLE}={pixels}"
        )


def most_pixels() -> int:
    """The most pixels of one picture, and of all that are decoded at once: LATENTFLOW_MAX_PIXELS, or 2^28.

    Raises:
        ConfigError: the environment variable is no whole number above 0.
    """
    text = os.environ.get(_VARIABLE, "")
    if not text:
        return _MOST_PIXELS
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ConfigError(f"{_VARIABLE}={text!r} is no whole number above 0; unset it for {_MOST_PIXELS}")
    return int(text)


def most_bytes() -> int:
    """The most bytes of one image file: 4 for each of `most_pixels`."""
    return _BYTES_PER_PIXEL * most_pixels()


def reason(error: Exception) -> str:
    """What went wrong with a file, in one line."""
    if isinstance(error, BrokenImage):
        return error.reason
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    if text.startswith("decoder error"):  # a number of libtiff's or Pillow's
        return "its data is damaged"
    return text or ("there is not enough memory" if isinstance(error, MemoryError) else type(error).__name__)


class _Budget:
    """What all threads may hold at once; a thread waits where there is no room for more."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self.reset()

    def reset(self) -> None:
        self._change = threading.Condition()
        self._held = 0
        self._thread = threading.local()

    @contextmanager
    def holding(self, amount: int) -> Iterator[None]:
        """Hold so much; a thread that holds something already does not wait, since it could wait for itself."""
        outer = getattr(self._thread, "depth", 0)
        with self._change:
            self._change.wait_for(lambda: outer or not self._held or self._held + amount <= self._limit())
            self._held += amount
        self._thread.depth = outer + 1
        try:
            yield
        finally:
            self._thread.depth = outer
            with self._change:
                self._held -= amount
                self._change.notify_all()


_bytes, _pixels = _Budget(most_bytes), _Budget(most_pixels)


def room_for(num_bytes: int) -> AbstractContextManager[None]:
    """Wait until a file of so many bytes may be held, beside those that other threads hold within their `room_for`."""
    return _bytes.holding(num_bytes)


if hasattr(os, "register_at_fork"):  # the threads that hold something do not exist in a child
    os.register_at_fork(after_in_child=_bytes.reset)
    os.register_at_fork(after_in_child=_pixels.reset)


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow knows."""
    Image.init()
    return tuple(name for name in (*FORMATS, "TGA") if name in Image.OPEN)


def _checked(num_pixels: int) -> int:
    if num_pixels > most_pixels():
        raise ValueError(_too_many(num_pixels))
    return num_pixels


def _too_many(num_pixels: int) -> str:
    return (
        f"its {num_pixels:,} pixels are more than {most_pixels():,}; make it smaller, or allow more with "
        f"{_VARIABLE}={num_pixels}"
    )


def _identified(content: bytes, name: str) -> ImageFile:
    if not content:
        raise ValueError("it is empty (0 bytes)")
    check_bytes(len(content))
    lean, said = _lean_png(content) if content.startswith(_PNG) else (content, {})
    # A TGA file has no mark at its beginning, and nearly anything could be one: there the name has to say so.
    formats = _formats() if name.lower().endswith(".tga") else [known for known in _formats() if known != "TGA"]
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, which also decoders ask; never made lower for others
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, most_pixels())
    try:
        image = Image.open(io.BytesIO(lean), formats=formats)
    except UnidentifiedImageError:
        raise ValueError(_strange(content)) from None
    image.info.update(said)
    return image


def _holds_more(image: ImageFile) -> bool:
    """Whether a file holds pictures beside the first: an animation, or pages; not the previews that cameras add."""
    try:
        return image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # the first may be whole where the second is damaged
        image.seek(0)
        return False


def _strange(content: bytes) -> str:
    """What a file is that Pillow does not read."""
    for place, mark, what, remedy in _STRANGERS:
        if content.startswith(mark, place):
            return f"its content is {what}, which is not read: {remedy}"
    start = content[:1024].lower()
    for mark, what, remedy in _MARKUP:
        if mark in start:
            return f"its content is {what}, which is not read: {remedy}"
    if content.startswith(_DAMAGED) or content[4:12] == b"ftypavif":
        return "its content is damaged, or of a kind that Pillow does not know: copy it anew, or save it as 8-bit PNG"
    if not any(content[:4096]):
        return "its content is zeros, as after a copy that failed: copy it anew"
    return "its content is no image that Pillow can read"


def _lean_png(content: bytes) -> tuple[bytes, dict[str, bytes]]:
    """A PNG file without the chunks that do not change its pixels, and what it says that Pillow would not tell.

    Pillow refuses a file for large or damaged texts. Texts of usual size stay, as they may hold the orientation.
    """
    kept, said, text, start, copied = [], {}, 0, len(_PNG), 0
    while start + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        end = start + 12 + length
        if end > len(content):  # cut short: what is left is for Pillow to judge
            break
        keep = kind[:1].isupper()
        if not keep:
            chunk = content[start + 8 : end - 4]
            whole = zlib.crc32(kind + chunk) == int.from_bytes(content[end - 4 : end], "big")
            keep = whole and kind in _PNG_KEPT
            if whole and kind in _PNG_TEXT:
                size = _text_size(kind, chunk)
                text += size
                keep = size <= SAFEBLOCK and text <= _MOST_TEXT
            elif whole and kind == b"iCCP":
                unpacked = _unpacked(chunk.partition(b"\0")[2][1:], _MOST_PROFILE)
                keep = len(unpacked) <= SAFEBLOCK
                if SAFEBLOCK < len(unpacked) <= _MOST_PROFILE:
                    said["icc_profile"] = unpacked
            elif whole and kind == b"cICP":
                said["cicp"] = chunk
        if not keep:
            kept.append(content[copied:start])
            copied = end
        start = end
    return (b"".join([*kept, content[copied:]]) if kept else content), said


def _text_size(kind: bytes, chunk: bytes) -> int:
    """Bytes of a PNG text once it is unpacked, counted to just above what Pillow takes."""
    rest = chunk.partition(b"\0")[2]
    if kind == b"zTXt":
        return len(_unpacked(rest[1:], SAFEBLOCK))
    if kind == b"iTXt" and rest[:1] != b"\0":
        return len(_unpacked(rest[2:].partition(b"\0")[2].partition(b"\0")[2], SAFEBLOCK))
    return len(chunk)


def _unpacked(stream: bytes, most: int) -> bytes:
    """A zlib stream, unpacked as far as one byte beyond `most`; nothing if it is damaged."""
    try:
        return zlib.decompressobj().decompress(stream, most + 1)
    except zlib.error:
        return b""
