"""Single pictures given by a user, read by the same rules as data sets."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from latentflow.artifacts import sha256_file
from latentflow.data.pictures.crop import center_crop
from latentflow.data.pictures.decode import check_bytes
from latentflow.data.pictures.raster import Raster
from latentflow.data.pictures.reading import read_raster
from latentflow.errors import DataError
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.sizes import Size

_NUMBERS = ("F", "I", "I;16", "I;16L", "I;16B", "I;16N", "CMYK", "LAB")  # modes that PNG does not keep


def read_picture(image: str | Path | Image.Image, pixel_format: PixelFormat = RGB) -> Raster:
    """A picture in a pixel format, upright; see `read_raster`.

    Args:
        image: a file, or a Pillow image.

    Raises:
        DataError: the file is missing, damaged, or no image; or it does not fit the format.
    """
    return read_upright(image, pixel_format)[0]


def read_upright(image: str | Path | Image.Image, pixel_format: PixelFormat) -> tuple[Raster, int]:
    """The same, and the EXIF orientation of its file, 1 to 8."""
    try:
        if not isinstance(image, str | Path):
            return read_raster(_content_of(image), "in memory", pixel_format)
        _require_file(image)
        check_bytes(Path(image).stat().st_size)
        return read_raster(Path(image).read_bytes(), Path(image).name, pixel_format)
    except ValueError as error:
        raise DataError(f"the image cannot be used: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {image}: {error.strerror}") from error


def _content_of(image: Image.Image) -> bytes:
    """A Pillow image as the content of a file that keeps its numbers, its profile and its orientation."""
    written, kept = io.BytesIO(), {name: image.info[name] for name in ("icc_profile", "exif") if name in image.info}
    kind = "TIFF" if image.mode in _NUMBERS else "PNG"
    image.save(written, format=kind, **kept)
    return written.getvalue()


def describe_file(file: str | Path) -> str:
    """A file as a request records it: "photo.jpg sha256:0123456789ab".

    Raises:
        DataError: the file is missing or cannot be read.
    """
    _require_file(file)
    try:
        return f"{Path(file).name} sha256:{sha256_file(file)[:12]}"
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def cropped_picture(picture: Raster, size: Size | int) -> Tensor:
    """The central crop of a picture, by `center_crop`: [1, P, height, width], stored values of its format.

    Raises:
        DataError: the picture is too long and thin.
    """
    try:
        pixels = picture.cropped(partial(center_crop, size=size))
    except ValueError as error:
        raise DataError(f"the image cannot be used: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def psnr(pixels: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / mean squared error): two of [B, P, H, W] => [B].

    Values are those of 8 bits, 0 to 255; for other formats see `data.pictures.shown.as_levels`.

    Equal images count as if a single value were off by 1, to keep the result finite.
    """
    squares = (pixels.double() - other.double()).square().flatten(1)
    return 10 * torch.log10(255**2 / squares.mean(1).clamp(min=1 / squares.shape[1]))


def _require_file(file: str | Path) -> None:
    path = Path(file)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "does not exist"
        raise DataError(f"{file} {what}; give an image file")
