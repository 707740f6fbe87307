"""The numbers of an image file as they are stored, whatever reads it: Pillow, tifffile, pydicom or NumPy.

| file | read by | numbers |
|---|---|---|
| PNG, JPEG, WebP, AVIF, BMP, GIF, ... of 8 bits | Pillow | sRGB, by its colour profile |
| HEIC | pillow-heif | sRGB |
| PNG of 16 bits, gray or colours, with alpha or without | Pillow | all 16 bits |
| TIFF of 8 bits in 1, 3 or 4 (alpha) channels | Pillow | sRGB |
| TIFF of other depths or channels | tifffile | as stored |
| NPY, and NPZ with one array | NumPy | as stored: [H, W], [H, W, C] or [C, H, W] |
| DICOM | pydicom | rescaled by slope and intercept; MONOCHROME1 is inverted |

Whole numbers of other kinds become floating-point: those of 16 bits with a sign always, larger ones where nothing is
lost. A TIFF's fourth channel of more than 8 bits is a band, even where it is marked as alpha, since programs that write
maps and satellite images mark it so.

Legend: H and W height and width, C channels.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from PIL import Image

from latentflow.console import notice
from latentflow.data.pictures.colour import to_srgb, zero_is_white
from latentflow.data.pictures.decode import (
    ON_ITS_SIDE,
    check_bytes,
    has_library,
    open_image,
    orientation,
    room_for_pixels,
    stored_mode,
    upright,
)
from latentflow.data.pictures.orientation import turned
from latentflow.pixel_format import MOST_CHANNELS, PixelFormat, PixelMode
from latentflow.sizes import Size

_TIFF, _NPY, _ZIP = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), b"\x93NUMPY", b"PK\x03\x04"
_DICOM, _DICOM_AT = b"DICM", 128
_EXACT = 1 << 24  # up to here float32 holds every whole number
_GRAYS = ("1", "L", "LA", "La")
_ORIENTATION_TAG, _NO_DATA_TAG = 274, 42113


class StoredPicture(Protocol):
    """An image file whose header is read.

    Attributes:
        pixel_format: of its numbers, with the full range of their dtype.
        kind: of the file, as Pillow calls it: PNG, JPEG, TIFF, ..., or NPY or DICOM.
        size: width and height, as they are stored.
        upright_size: height and width of what `numbers` returns.
    """

    pixel_format: PixelFormat
    kind: str
    size: tuple[int, int]

    @property
    def upright_size(self) -> Size: ...

    def numbers(self, *, raw: bool) -> tuple[np.ndarray, int]:
        """Its numbers [H, W, C], upright, and the EXIF orientation of the file, 1 to 8.

        Args:
            raw: as they are stored; otherwise 8-bit colours become sRGB.

        Raises:
            ValueError: they cannot be kept.
        """
        ...


@contextmanager
def open_stored(content: bytes, name: str, *, as_colours: bool = False) -> Iterator[StoredPicture]:
    """Open an image file; only its header is read. Use it inside the context, while it counts as decoded.

    Args:
        as_colours: it will be read as 8-bit colours: Pillow reads all that it can.

    Raises:
        BrokenImage: see `open_image`.
        ValueError: it is of another kind, damaged, or needs a library that is not installed.
    """
    found: StoredPicture | None = None
    if content.startswith(_NPY) or (content.startswith(_ZIP) and name.lower().endswith(".npz")):
        found = _Array(content)
    elif content[_DICOM_AT : _DICOM_AT + 4] == _DICOM:
        found = _Dicom(content, name, as_colours)
    elif content.startswith(_TIFF) and not _is_pillows(content, as_colours):
        found = _Tiff(content, name)
    if found is None:
        with open_image(content, name) as image:
            yield PillowPicture(image, content, name)
        return
    with room_for_pixels(*found.size):
        yield found


class PillowPicture:
    """A file that Pillow reads.

    Args:
        image: from `open_image`, not decoded yet.
        content: of the file.
        name: for notices.
    """

    def __init__(self, image: Image.Image, content: bytes, name: str):
        self.image, self._content, self._name = image, content, name
        self._stored = stored_mode(image)  # decoding forgets it
        self.kind, self.size = str(image.format), image.size

    @cached_property
    def pixel_format(self) -> PixelFormat:
        mode = self.image.mode
        if self.image.format == "TIFF" and ";16" in self._stored and not mode.startswith("I"):
            _library("tifffile", "TIFF files with colours of 16 bits")
        if mode.startswith("I;16") or (mode == "I" and self.image.format == "PPM"):
            return PixelFormat(channels=1, dtype="uint16")
        if mode in ("I", "F"):
            return PixelFormat(channels=1, dtype="float32")
        colours: PixelMode = "gray" if mode in _GRAYS or self._stored.startswith("LA") else "rgb"
        if self.image.has_transparency_data:
            colours = "gray-alpha" if colours == "gray" else "rgba"
        return PixelFormat(mode=colours, dtype="uint16" if self._has_16_bits else "uint8")

    @property
    def upright_size(self) -> Size:
        already = self.image.format == "TIFF"  # whose size Pillow gives upright
        return _upright(self.image.size, 1 if already else orientation(self.image))

    def numbers(self, *, raw: bool) -> tuple[np.ndarray, int]:
        image, before = self.image, orientation(self.image) if self.image.format == "TIFF" else 0
        colours, dtype = self.pixel_format.mode, self.pixel_format.dtype
        if self._has_16_bits:
            values = self._sixteen_bits()
        elif dtype != "uint8":
            values = np.asarray(upright(image))
            _require_data(values, getattr(image, "tag_v2", {}).get(_NO_DATA_TAG, ""))
            values = values.astype(np.uint16) if dtype == "uint16" else _kept(values)
            if dtype == "uint16" and zero_is_white(image):
                values = 65535 - values
        elif raw and image.mode in ("L", "LA", "RGB", "RGBA"):
            values = np.asarray(upright(image))
        else:
            rgb, alpha = to_srgb(image, self._name)
            parts = [np.asarray(rgb)[..., : 1 if colours.startswith("gray") else 3]]
            values = np.dstack(parts if alpha is None else [*parts, np.asarray(alpha)])
        return np.atleast_3d(values), before or orientation(image)

    @property
    def _has_16_bits(self) -> bool:
        return self.image.format == "PNG" and self._stored in ("RGB;16B", "RGBA;16B", "LA;16B")

    def _sixteen_bits(self) -> np.ndarray:
        """PNG colours of 16 bits, [H, W, C]; Pillow gives the upper half of each, then the lower one."""
        if self._stored == "LA;16B":  # two numbers of 16 bits are as large as four of 8
            values = self._decoded_as("RGBA").view(">u2").astype(np.uint16)
        else:
            upper, lower = self._decoded_as(self._stored), self._decoded_as(self._stored.replace("16B", "16L"))
            values = upper.astype(np.uint16) * 256 + lower
        clear = self.image.info.get("transparency")
        if isinstance(clear, tuple):  # one colour, all 16 bits of it
            shown = (values != np.uint16(clear)).any(axis=2, keepdims=True)
            values = np.concatenate([values, shown * np.uint16(65535)], axis=2)
        return turned(values, orientation(self.image))

    def _decoded_as(self, layout: str) -> np.ndarray:
        """The pixels, taken for another layout of the same size."""
        with open_image(self._content, self._name) as image:
            image.tile = [image.tile[0]._replace(args=layout)]
            return np.asarray(image)


class _Array:
    """A NumPy file: one array, [H, W], [H, W, C] or [C, H, W]."""

    kind = "NPY"

    def __init__(self, content: bytes):
        array = _one_array(content)
        if array.ndim == 3 and array.shape[0] < min(array.shape[1:]) and array.shape[0] < array.shape[2]:
            array = np.moveaxis(array, 0, 2)
        if array.ndim not in (2, 3) or not array.size:
            raise ValueError(f"its array has the shape {list(array.shape)}; save one of [H, W] or [H, W, C]")
        self._values = array if array.ndim == 3 else array[..., None]
        self.size = self._values.shape[1::-1]
        self.pixel_format = _format_of(self._values.shape[2], array.dtype)
        self.upright_size = _upright(self.size)

    def numbers(self, *, raw: bool) -> tuple[np.ndarray, int]:
        return _kept(self._values), 1


def _one_array(content: bytes) -> np.ndarray:
    """The array of a file; np.load unpickles nothing without allow_pickle."""
    if content.startswith(_NPY):
        return np.load(io.BytesIO(content))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.infolist():
            check_bytes(member.file_size)
    with np.load(io.BytesIO(content)) as arrays:
        if len(arrays.files) != 1:
            raise ValueError(f"it holds {len(arrays.files)} arrays ({', '.join(arrays.files[:5])}); save one in a file")
        return arrays[arrays.files[0]]


class _Tiff:
    """A TIFF file with other channels or depths than Pillow keeps."""

    kind = "TIFF"

    def __init__(self, content: bytes, name: str):
        tifffile = _library("tifffile", "TIFF files of several bands or of floating-point numbers")
        self._file = tifffile.TiffFile(io.BytesIO(content))
        self._page = page = self._file.pages[0]
        if len(self._file.pages) > 1:
            notice(f"{name} holds {len(self._file.pages)} pages; the first is read", kind="several pictures")
        if page.ndim - (page.samplesperpixel > 1) != 2:
            raise ValueError(f"its first page has the axes {page.axes}; save pages of height, width and channels")
        self.size = (page.imagewidth, page.imagelength)
        self.pixel_format = _format_of(page.samplesperpixel, page.dtype)
        self.upright_size = _upright(self.size, self._tag(_ORIENTATION_TAG, 1))

    def numbers(self, *, raw: bool) -> tuple[np.ndarray, int]:
        page, turn = self._page, self._tag(_ORIENTATION_TAG, 1)
        values = page.asarray()
        if page.axes.startswith("S"):  # one band after the other
            values = np.moveaxis(values, 0, 2)
        values = np.atleast_3d(values)
        _require_data(values, self._tag(_NO_DATA_TAG, ""))
        if page.photometric == 0 and values.dtype.kind == "u":  # zero is white
            values = np.iinfo(values.dtype).max - values
        return turned(_kept(values), turn), turn

    def _tag(self, code: int, default: Any) -> Any:
        tag = self._page.tags.get(code)
        return default if tag is None else tag.value


def _require_data(values: np.ndarray, mark: object) -> None:
    """Refuse pixels of the number that stands for no data in TIFF files of GDAL; `mark` is its text."""
    try:
        missing = float(str(mark).strip("\0 "))
    except ValueError:
        return
    if count := int((values == missing).sum()):
        raise ValueError(f"{count:,} of its {values.size:,} numbers are {missing:g}, its mark of no data; fill them")


def _is_pillows(content: bytes, as_colours: bool) -> bool:
    """Whether Pillow keeps the numbers of a TIFF, or nothing else is there to read it."""
    if not has_library("tifffile"):
        return True
    import tifffile

    try:
        page = tifffile.TiffFile(io.BytesIO(content)).pages[0]
        samples, dtype, kind = page.samplesperpixel, page.dtype, page.photometric
        marks = [int(mark) for mark in page.extrasamples or ()]
    except Exception:  # Pillow says what is wrong
        return True
    if as_colours and (samples <= 3 or kind != tifffile.PHOTOMETRIC.MINISBLACK):
        return samples <= 4
    if dtype not in (np.uint8, np.bool_):
        return samples == 1 and dtype in (np.uint16, np.float32)
    return samples in (1, 3) or marks in ([1], [2]) or kind == tifffile.PHOTOMETRIC.SEPARATED


class _Dicom:
    """A DICOM file, of which the first frame is read.

    Args:
        as_colours: in 8 bits, by its window, as a viewer shows it; otherwise its numbers.
    """

    kind = "DICOM"

    def __init__(self, content: bytes, name: str, as_colours: bool):
        pydicom = _library("pydicom", "DICOM files")
        self._data = data = pydicom.dcmread(io.BytesIO(content))
        if "PixelData" not in data:
            raise ValueError("it is DICOM without pixels, such as a report; leave it out")
        if int(data.get("NumberOfFrames") or 1) > 1:
            notice(f"{name} holds {data.NumberOfFrames} frames; the first is read", kind="several pictures")
        self.size, self._as_colours = (int(data.Columns), int(data.Rows)), as_colours
        self.upright_size = _upright(self.size)
        self._is_gray = str(data.PhotometricInterpretation).startswith("MONOCHROME")
        slope, intercept = float(data.get("RescaleSlope") or 1), float(data.get("RescaleIntercept") or 0)
        self._is_rescaled = (slope, intercept) != (1, 0) or "ModalityLUTSequence" in data
        if not self._is_gray:
            self.pixel_format = PixelFormat(mode="rgb")
        elif self._is_rescaled:
            self.pixel_format = PixelFormat(channels=1, dtype="float32")
        else:
            kind = "i" if data.PixelRepresentation else "u"
            self.pixel_format = _format_of(1, np.dtype(f"{kind}{-(-int(data.BitsAllocated) // 8)}"))

    def numbers(self, *, raw: bool) -> tuple[np.ndarray, int]:
        from pydicom import pixels

        data = self._data
        values = pixels.pixel_array(data, index=0)
        if not self._is_gray:
            if data.PhotometricInterpretation == "PALETTE COLOR":
                values = pixels.apply_color_lut(values, data)
            white = np.iinfo(values.dtype).max
            return values if white == 255 else np.rint(values / (white / 255)).astype(np.uint8), 1
        bits, lowest = int(data.BitsStored), 0
        if data.PixelRepresentation:
            lowest = -(1 << (bits - 1))
        limits = np.array([lowest, lowest + (1 << bits) - 1], values.dtype)
        inverted = data.PhotometricInterpretation == "MONOCHROME1"
        if self._as_colours:
            levels = self._windowed(*(self._rescaled(each) for each in (values, limits)))
            return (255 - levels if inverted else levels)[..., None], 1
        if inverted:
            values = (limits.astype(np.int64).sum() - values).astype(values.dtype)
        return _kept(self._rescaled(values))[..., None], 1

    def _rescaled(self, values: np.ndarray) -> np.ndarray:
        from pydicom import pixels

        return pixels.apply_modality_lut(values, self._data) if self._is_rescaled else values

    def _windowed(self, values: np.ndarray, limits: np.ndarray) -> np.ndarray:
        """Gray levels by the first window, or by what could be stored (DICOM PS3.3, C.11.2.1.2): uint8."""
        centre, width = (_first(self._data.get(name)) for name in ("WindowCenter", "WindowWidth"))
        if centre is None or width is None or width <= 1:
            low, high = limits.min(), limits.max()
        else:
            low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
        return np.rint(((values - float(low)) / float(high - low)).clip(0, 1) * 255).astype(np.uint8)


def _upright(size: tuple[int, int], turn: int = 1) -> Size:
    """The upright size of a picture of `size`, width and height, that is stored in an EXIF orientation."""
    width, height = size
    return Size(width, height) if turn in ON_ITS_SIDE else Size(height, width)


def _first(value: Any) -> float | None:
    """The first of the numbers of a DICOM element, of which there may be several."""
    if value is None or value == "":
        return None
    return float(value if isinstance(value, int | float) else next(iter(value), 0))


def _library(name: str, what: str) -> Any:
    """A library that is only needed for some files."""
    if not has_library(name):
        raise ValueError(f"{what} are read by {name}, which is not installed; install latentflow[data]")
    return __import__(name)


def _format_of(channels: int, dtype: np.dtype) -> PixelFormat:
    """The format of stored numbers: one channel is gray, three are colours, others are bands."""
    if channels > MOST_CHANNELS:
        raise ValueError(f"it has {channels} channels, and at most {MOST_CHANNELS} are read")
    return PixelFormat(channels=channels, dtype=_kept(np.zeros(1, dtype)).dtype.name)


def _kept(values: np.ndarray) -> np.ndarray:
    """Numbers of any kind as uint8, uint16 or float32.

    Raises:
        ValueError: float32 would round whole numbers, or they are no numbers.
    """
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype in (np.uint8, np.uint16):
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype.kind not in "iuf":
        raise ValueError(f"its numbers are {values.dtype}; save them as uint8, uint16 or float32")
    if values.dtype.kind in "iu" and values.dtype.itemsize > 2 and np.abs(values.astype(np.float64)).max() > _EXACT:
        raise ValueError(f"its whole numbers reach {values.max():,}, and float32 is exact to {_EXACT:,}; scale them")
    return values.astype(np.float32)
