"""Single pictures given by a user, read by the same rules as data sets."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from latentflow.artifacts import sha256_file
from latentflow.data.pictures.colour import to_rgb
from latentflow.data.pictures.crop import center_crop
from latentflow.data.pictures.decode import open_image
from latentflow.errors import DataError
from latentflow.sizes import Size


def read_picture(file: str | Path) -> Image.Image:
    """The picture in a file, as upright 8-bit sRGB.

    Raises:
        DataError: the file is missing, damaged, or no image.
    """
    _require_file(file)
    with open_image(file) as image:
        return to_rgb(image, Path(file).name)


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


def cropped_picture(image: Image.Image, size: Size | int) -> Tensor:
    """The central crop of a picture of any mode, by `to_rgb` and `center_crop`: [1, 3, height, width] uint8.

    Raises:
        DataError: the picture is too long and thin, or of a mode without a defined white.
    """
    try:
        pixels = center_crop(to_rgb(image), size)
    except ValueError as error:
        raise DataError(f"the image cannot be used: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def psnr(pixels: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of 8-bit images, 10 log10(255^2 / mean squared error): [B, 3, H, W] => [B].

    Equal images count as if a single value were off by 1, to keep the result finite.
    """
    squares = (pixels.double() - other.double()).square().flatten(1)
    return 10 * torch.log10(255**2 / squares.mean(1).clamp(min=1 / squares.shape[1]))


def _require_file(file: str | Path) -> None:
    path = Path(file)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "does not exist"
        raise DataError(f"{file} {what}; give an image file")
