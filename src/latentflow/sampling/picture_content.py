"""Drawn pictures as the content of files, in the pixel format of their model.

| file | holds | metadata |
|---|---|---|
| .png | gray or colours, with opacity or without, of 8 or 16 bits | in a text chunk |
| .tiff, .tif | everything | in the description of the image |
| .npy | everything: [H, W, P] | none |

Legend: H and W height and width in pixels, P channels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

from latentflow.data.pictures.decode import BrokenImage, reason
from latentflow.data.pictures.numbers import open_stored
from latentflow.errors import ConfigError, nearest
from latentflow.pixel_format import PixelFormat
from latentflow.sampling.png import encode_png

SUFFIXES = (".png", ".tiff", ".tif", ".npy")
METADATA = "latentflow"
"""The name of the text chunk of a PNG with the metadata, as JSON."""
TIFF = b"II*\0"
"""The first bytes of a TIFF, as this program writes it."""


def usual_suffix(pixel_format: PixelFormat) -> str:
    """PNG where it holds the format, else TIFF."""
    return ".png" if _fits_png(pixel_format) else ".tiff"


def require_suffix(suffix: str, pixel_format: PixelFormat) -> None:
    """Refuse a kind of file that cannot hold a format, or that needs a library that is not installed.

    Raises:
        ConfigError: with the remedy.
    """
    kind = suffix.lower()
    if kind not in _WRITERS:
        raise ConfigError(f"pictures are not written as {suffix!r}; {nearest(suffix, _WRITERS)}")
    if kind == ".png" and not _fits_png(pixel_format):
        raise ConfigError(f"PNG does not hold {pixel_format.title}; use .tiff or .npy")
    if kind in (".tiff", ".tif") and find_spec("tifffile") is None:
        other = ".png" if _fits_png(pixel_format) else ".npy"
        raise ConfigError(f"TIFF files need the tifffile library: pip install 'latentflow[data]', or use {other}")


def encode_picture(pixels: np.ndarray, pixel_format: PixelFormat, facts: str, suffix: str) -> bytes:
    """The content of a file.

    Args:
        pixels: stored values [H, W, P].
        facts: the metadata, ASCII.
        suffix: of the file; see `require_suffix`.
    """
    return _WRITERS[suffix.lower()](pixels, pixel_format, facts)


def decode_picture(content: bytes, name: str) -> np.ndarray:
    """The stored values of a PNG or TIFF that this program wrote: [H, W, P].

    Raises:
        BrokenImage: it is damaged.
    """
    try:
        with open_stored(content, name) as stored:
            return stored.numbers(raw=True)[0]
    except BrokenImage:
        raise
    except Exception as error:  # damaged files raise nearly anything
        raise BrokenImage(name, reason(error)) from error


def _fits_png(pixel_format: PixelFormat) -> bool:
    return pixel_format.mode != "bands" and pixel_format.dtype != "float32"


def _png(pixels: np.ndarray, pixel_format: PixelFormat, facts: str) -> bytes:
    return encode_png(pixels, {METADATA: facts})


def _tiff(pixels: np.ndarray, pixel_format: PixelFormat, facts: str) -> bytes:
    from tifffile import imwrite

    is_rgb, written = pixel_format.mode in ("rgb", "rgba"), io.BytesIO()
    others = pixel_format.channels - (3 if is_rgb else 1)
    imwrite(
        written,
        pixels if pixel_format.channels > 1 else pixels[..., 0],
        photometric="rgb" if is_rgb else "minisblack",
        planarconfig="contig" if pixel_format.channels > 1 else None,
        extrasamples=["unassalpha" if pixel_format.has_alpha else "unspecified"] * others,
        compression="zlib",
        description=facts,
        metadata=None,  # no description by tifffile
        software="latentflow",
    )
    return written.getvalue()


def _npy(pixels: np.ndarray, pixel_format: PixelFormat, facts: str) -> bytes:
    written = io.BytesIO()
    np.save(written, np.ascontiguousarray(pixels))
    return written.getvalue()


_WRITERS: dict[str, Callable[[np.ndarray, PixelFormat, str], bytes]] = {
    ".png": _png,
    ".tiff": _tiff,
    ".tif": _tiff,
    ".npy": _npy,
}
