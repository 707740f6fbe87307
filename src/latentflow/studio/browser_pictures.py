"""Pictures as a browser can show them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from latentflow.data.pictures.colour import to_rgb
from latentflow.data.pictures.decode import BrokenImage, open_image
from latentflow.errors import DataError


def shown_png(file: Path) -> bytes:
    """A picture, whatever its format: upright, 8 bits, sRGB, on white.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open_image(file) as image:
            return png_of(np.asarray(to_rgb(image)))
    except BrokenImage as error:
        raise DataError(f"{file.name} cannot be shown: {error.reason}") from error


def png_of(pixels: np.ndarray) -> bytes:
    """[H, W] or [H, W, 3] uint8 as a PNG file."""
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG", compress_level=1)
    return written.getvalue()
