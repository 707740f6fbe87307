"""Opening image files safely: the only place where Pillow reads a file.

What a file claims to be is not trusted. Of Pillow's formats, those for photographs and lossless storage are read, and
none that starts another program (EPS starts Ghostscript). Only regular files are read. A picture's header is checked
before its pixels are decoded.

One limit, `most_pixels`, bounds a single picture, the bytes of its file, and what all threads together hold at once.
"""

from __future__ import annotations

import io
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from latentflow.console import notice
from latentflow.data.pictures.png_chunks import PNG, lean_png
from latentflow.errors import ConfigError, DataError, LatentFlowError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")  # JPEG includes MPO
_MOST_PIXELS = 1 << 28  # 16,384 x 16,384; a phone's 200 megapixels are 16,320 x 12,240
_VARIABLE = "LATENTFLOW_MAX_PIXELS"
_BYTES_PER_PIXEL = 4

if "PILLOW_BLOCK_SIZE" not in os.environ:
    # Pillow stores pictures in blocks, of 16 MiB by default. Freed blocks above 32 MiB are returned to the system;
    # smaller ones stay in the heap of their thread.
    Image.core.set_block_size(1 << 26)

ON_ITS_SIDE = (5, 6, 7, 8)
"""EXIF orientations in which width and height are exchanged."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What people name as an image: offset and magic bytes, the format, and the remedy.
_AS_PNG = "save it as PNG"
_AS_JPEG = "save it as JPEG or PNG, or install latentflow[data]"
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
    (4, b"ftyphei", "HEIC", _AS_JPEG),
    (4, b"ftyphev", "HEIC", _AS_JPEG),
    (4, b"ftypmif1", "HEIF", _AS_JPEG),
    (128, b"DICM", "DICOM", "scale it to 8 or 16 bits and save it as PNG"),
    (0, b"\x93NUMPY", "a NumPy array", _AS_PNG),
    (0, b"\x89HDF", "HDF5", _AS_PNG),
    (0, b"PK\x03\x04", "a zip archive", "unpack it"),
    (0, b"\x1f\x8b", "gzip", "unpack it"),
    (0, b"version https://git-lfs", "a Git LFS pointer and not yet the file", "run git lfs pull"),
)
_TIFF = (b"II*\0", b"MM\0*")
_DAMAGED = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"RIFF",
    b"BM",
    *_TIFF,
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
)
_MARKUP = ((b"<svg", "SVG", _AS_PNG), (b"<html", "a web page", "download the image again"))


class BrokenImage(DataError):
    """One file that cannot be read as an image; others may be fine.

    Attributes:
        name: the file, as the user knows it.
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"cannot read the image {self.name}: {self.reason}"


@contextmanager
def open_image(file: bytes | str | Path | Image.Image, name: str | None = None) -> Iterator[Image.Image]:
    """Open an image file. Only its header is read; pixels are decoded on first use.

    Use the picture inside the context, while it counts towards what all threads may decode at once.

    Args:
        file: a path, the content of a file, or a picture in memory, which is yielded unchanged.
        name: for messages; default: the path.

    Yields:
        The picture as Pillow reads it: pixels as stored, not turned (see `upright`), in any mode.

    Raises:
        BrokenImage: it is missing, not a regular file, too large, damaged, or of a format that is not read; also for
            any other exception inside the context, since decoders of damaged files raise nearly anything.
        ConfigError: LATENTFLOW_MAX_PIXELS is not a number.
    """
    name = name if name is not None else str(file) if isinstance(file, str | Path) else "in memory"
    try:
        if isinstance(file, Image.Image):
            yield file
            return
        content = file if isinstance(file, bytes) else read_file(file)
        with _identified(content, name) as image, _pixels.holding(_checked(image.width * image.height)):
            if _holds_more(image):
                notice(f"{name} holds several pictures; the first is read", kind="several pictures")
            yield image
    except LatentFlowError:
        raise
    except Image.DecompressionBombError as error:  # its message begins with the number of pixels
        raise BrokenImage(name, _too_many(int(re.search(r"\d+", str(error))[0]))) from error
    except Exception as error:
        raise BrokenImage(name, reason(error)) from error


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture, 1 to 8; 1 is upright, or not stated.

    For TIFF this is the stored value until the pixels are decoded, and then 1: Pillow turns them while decoding.
    """
    try:
        turn = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF
        return 1
    return turn if turn in _TURNS else 1


def stored_mode(image: Image.Image) -> str:
    """Pillow's name for the pixel layout in the file of an image that is not decoded yet, such as "RGB;16B"."""
    if not isinstance(image, ImageFile) or not image.tile:
        return image.mode
    details = image.tile[0][3]
    return details if isinstance(details, str) else str(details[0]) if details else image.mode


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture by its EXIF orientation; returns the picture itself if it is upright."""
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
        most: limit in bytes; default: `most_bytes`.

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
    """The most pixels of one picture, and of all pictures decoded at once: LATENTFLOW_MAX_PIXELS, or 2^28.

    Raises:
        ConfigError: the environment variable is not a whole number above 0.
    """
    text = os.environ.get(_VARIABLE, "")
    if not text:
        return _MOST_PIXELS
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ConfigError(f"{_VARIABLE}={text!r} is not a whole number above 0; unset it for {_MOST_PIXELS}")
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
    """A limit on what all threads hold at once; a thread waits until there is room."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self.reset()

    def reset(self) -> None:
        self._change = threading.Condition()
        self._held = 0
        self._thread = threading.local()

    @contextmanager
    def holding(self, amount: int) -> Iterator[None]:
        """Hold `amount`; a thread that already holds something does not wait, since it could wait for itself."""
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
    """Wait until a file of so many bytes may be held in memory; other threads count what they hold in the same way."""
    return _bytes.holding(num_bytes)


def room_for_pixels(width: int, height: int) -> AbstractContextManager[None]:
    """Wait until a picture of so many pixels may be decoded, like those that `open_image` opens.

    Raises:
        ValueError: it has more than `most_pixels`.
    """
    return _pixels.holding(_checked(width * height))


if hasattr(os, "register_at_fork"):  # the threads that hold something do not exist in the child
    os.register_at_fork(after_in_child=_bytes.reset)
    os.register_at_fork(after_in_child=_pixels.reset)


def has_library(name: str) -> bool:
    """Whether a library that reads files of one kind is installed."""
    return find_spec(name) is not None


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow knows, and HEIC where pillow-heif is installed."""
    Image.init()
    if has_library("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in (*FORMATS, "HEIF", "TGA") if name in Image.OPEN)


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
    lean, metadata = lean_png(content) if content.startswith(PNG) else (content, {})
    # A TGA file has no magic bytes and nearly anything could be one, so its name has to say so.
    formats = _formats() if name.lower().endswith(".tga") else [known for known in _formats() if known != "TGA"]
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, checked by decoders; never lowered for others
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, most_pixels())
    try:
        image = Image.open(io.BytesIO(lean), formats=formats)
    except UnidentifiedImageError:
        raise ValueError(_strange(content)) from None
    image.info.update(metadata)
    return image


def _holds_more(image: ImageFile) -> bool:
    """Whether a file holds more than one picture: an animation or pages; not the previews that cameras add."""
    try:
        return image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # the first may be intact where the second is damaged
        image.seek(0)
        return False


def _strange(content: bytes) -> str:
    """What a file is if Pillow does not read it."""
    for place, mark, what, remedy in _STRANGERS:
        if content.startswith(mark, place):
            return f"its content is {what}, which is not read: {remedy}"
    start = content[:1024].lower()
    for mark, what, remedy in _MARKUP:
        if mark in start:
            return f"its content is {what}, which is not read: {remedy}"
    if content.startswith(_TIFF) and not has_library("tifffile"):
        return "its content is a TIFF that Pillow does not read: install latentflow[data], or copy it again"
    if content.startswith(_DAMAGED) or content[4:12] == b"ftypavif":
        return "its content is damaged, or of a kind that Pillow does not know: copy it again, or save it as 8-bit PNG"
    if not any(content[:4096]):
        return "its content is zeros, as after a failed copy: copy it again"
    return "its content is no image that Pillow can read"
