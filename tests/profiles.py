"""Colour profiles for tests, as cameras, screens and printers embed them: the ICC format, versions 2.1 and 2.4.

A profile says what its numbers look like under D50: primaries, white and curves, or a table of Lab colours.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import product

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
# XYZ of red, green and blue, adapted to D50
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
PROPHOTO = ((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491))


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * np.abs(values) ** (1 / 2.4) - 0.055)


def stored_in(space: Sequence[Sequence[float]], gamma: float | None, pixels: np.ndarray) -> np.ndarray:
    """The numbers [..., 3] uint8 with which a space stores the sRGB colours of `pixels` [..., 3] uint8.

    Args:
        gamma: None: the curve of sRGB.
    """
    xyz = srgb_to_linear(pixels / 255) @ np.array(SRGB)
    linear = xyz @ np.linalg.inv(np.array(space))
    linear = linear.clip(0, 1)
    return np.rint(255 * (linear ** (1 / gamma) if gamma else linear_to_srgb(linear))).astype(np.uint8)


def rgb_profile(space: Sequence[Sequence[float]], gamma: float | None) -> bytes:
    """A matrix of primaries, and one curve: a power, or that of sRGB as 1,024 points (None), as HP's profile has it."""
    curve = struct.pack(">H", round(gamma * 256)) if gamma else _points(srgb_to_linear(np.linspace(0, 1, 1024)))
    curve = b"curv" + bytes(4) + struct.pack(">I", len(curve) // 2) + curve
    tags = {b"wtpt": _xyz(D50), **{b"%cXYZ" % c: _xyz(xyz) for c, xyz in zip(b"rgb", space, strict=True)}}
    return _profile(b"RGB ", b"XYZ ", tags | {b"%cTRC" % c: curve for c in b"rgb"})


def gray_profile(gamma: float) -> bytes:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    return _profile(b"GRAY", b"XYZ ", {b"wtpt": _xyz(D50), b"kTRC": curve})


def cmyk_profile(corner) -> bytes:
    """A printer whose full inks print the sRGB colours `corner(c, m, y, k)`, [3] in 0 to 1, and the rest in between."""
    return _table_profile(b"CMYK", b"prtr", corner, 4)


def rgb_table_profile(corner) -> bytes:
    """A scanner whose full numbers mean the sRGB colours `corner(r, g, b)`, [3] in 0 to 1; no way leads back."""
    return _table_profile(b"RGB ", b"scnr", corner, 3)


def _table_profile(colours: bytes, kind: bytes, corner, num_channels: int) -> bytes:
    table = b"".join(bytes(_lab(np.array(corner(*full)))) for full in product((0, 1), repeat=num_channels))
    identity = struct.pack(">9i", *(65536 * (n % 4 == 0) for n in range(9)))
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([num_channels, 3, 2, 0]) + identity + ramp * num_channels + table + ramp * 3
    return _profile(colours, b"Lab ", {b"wtpt": _xyz(D50), b"A2B0": lut, b"A2B1": lut}, kind)


def _lab(srgb: np.ndarray) -> tuple[int, int, int]:
    """An sRGB colour as the three bytes of 8-bit Lab."""
    ratio = srgb_to_linear(srgb) @ np.array(SRGB) / D50
    fx, fy, fz = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    lab = np.array([(116 * fy - 16) * 2.55, 500 * (fx - fy) + 128, 200 * (fy - fz) + 128])
    return tuple(np.rint(lab).clip(0, 255).astype(int).tolist())


def _points(curve: np.ndarray) -> bytes:
    return np.rint(65535 * curve).astype(">u2").tobytes()


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in values))


def _profile(colours: bytes, connection: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    place, table, data = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", place + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", place + len(data), bytes(4), 0x02400000, kind, colours, connection)
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz(D50)[8:] + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + data
