"""PNG files of 8 or 16 bits, encoded by many threads at once.

Pillow holds the interpreter lock while it compresses, some 50 ms for a photograph of 256 pixels; numpy and zlib release
it. Nor does it write colours of 16 bits. Only runs are searched for (Z_RLE): in filtered rows, longer matches save 1 %
of the size at several times the cost.

Legend: H and W image height and width, P channels; n bytes of a pixel; a, b, c are the bytes of the pixels to the left,
above, and above left.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np

PILLOW_OPTIONS = {"compress_type": zlib.Z_RLE, "compress_level": 1}
"""The same compression for pictures of other modes, which Pillow writes."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of gray, gray with alpha, RGB, RGBA


def encode_png(pixels: np.ndarray, text: Mapping[str, str]) -> bytes:
    """A PNG file of [H, W, P] uint8 or uint16, with P = 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA).

    Args:
        text: metadata, ASCII values by ASCII names of at most 79 letters.
    """
    height, width, channels = pixels.shape
    compressor = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, _COLOUR_TYPES[channels], 0, 0, 0)
    return b"".join(
        [
            _SIGNATURE,
            _chunk(b"IHDR", header),
            *(_chunk(b"tEXt", f"{name}\0{value}".encode("ascii")) for name, value in text.items()),
            _chunk(b"IDAT", compressor.compress(_filtered(_bytes(pixels))) + compressor.flush()),
            _chunk(b"IEND", b""),
        ]
    )


def _bytes(pixels: np.ndarray) -> np.ndarray:
    """The bytes of each pixel, of a number the highest first: [H, W, n] uint8."""
    if pixels.itemsize == 1:
        return pixels
    return np.ascontiguousarray(pixels, ">u2").view(np.uint8)


def _filtered(pixels: np.ndarray) -> np.ndarray:
    """Each row as its differences from a prediction, preceded by the number of the prediction: [H, 1 + n W] uint8.

    Of the five predictions of PNG, "left" (1), "above" (2) and Paeth's (4) are tried, and each row takes the one
    with the least sum of differences.
    """
    height, width, size = pixels.shape
    padded = np.zeros((height + 1, (width + 1) * size), dtype=np.uint8)
    padded[1:, size:] = pixels.reshape(height, -1)
    row, a, b, c = padded[1:, size:], padded[1:, :-size], padded[:-1, size:], padded[:-1, :-size]
    tried = np.stack([row - a, row - b, row - _paeth(a, b, c)])
    best = np.abs(tried.view(np.int8)).view(np.uint8).sum(2, dtype=np.int32).argmin(0)
    filtered = np.empty((height, 1 + width * size), dtype=np.uint8)
    filtered[:, 0] = np.array([1, 2, 4], dtype=np.uint8)[best]
    filtered[:, 1:] = tried[best, np.arange(height)]
    return filtered


def _paeth(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Of a, b and c the one nearest to a + b - c, in that order where two are as near."""
    wide = c.astype(np.int16)
    up, across = b.astype(np.int16) - wide, a.astype(np.int16) - wide
    from_a, from_b, from_c = np.abs(up), np.abs(across), np.abs(up + across)
    nearest = np.where(from_b <= from_c, b, c)
    np.copyto(nearest, a, where=(from_a <= from_b) & (from_a <= from_c))
    return nearest


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
