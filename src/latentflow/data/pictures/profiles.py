"""Colour profiles (ICC), to sRGB and back: what the numbers of a picture mean.

A picture has a profile embedded, or says with a few numbers what `matrix_profile` makes one of: PNG with cICP, or gAMA
and cHRM (PNG 3, section 4.3); cameras set to Adobe RGB only say so in EXIF (DCF 2.0).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms

from latentflow.data.pictures.decode import reason

_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # by the colours that a profile is for
_LEVELS = np.arange(256, dtype=np.uint8)
_CUBE = np.stack(np.meshgrid(_LEVELS[::15], _LEVELS[::15], _LEVELS[::15]), -1).reshape(1, -1, 3)  # colours to try
_SAME = 2  # levels of 255; tables that stand for sRGB's curve are off by one


class Profile:
    """What the numbers of a picture mean.

    Colours are relative to white, with black point compensation: those in both spaces are unchanged,
    and the darkest black of a printer is black. For the profiles of cameras and screens, a matrix and curves, all
    intents are the same.

    Args:
        content: an ICC profile.

    Attributes:
        mode: Pillow's name of the colours it is for: L, RGB or CMYK.

    Raises:
        ValueError: it is damaged, or for other colours.
    """

    def __init__(self, content: bytes):
        try:
            self._profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
            space = self._profile.profile.xcolor_space.strip()
            self._srgb = ImageCms.createProfile("sRGB")
            if space not in _MODES:
                raise ValueError(f"it is for {space} colours")
            self.mode = _MODES[space]
            self._to_srgb = self._transform(self._profile, self.mode, self._srgb, "RGB")
        except Exception as error:  # lcms and what wraps it raise nearly anything
            raise ValueError(reason(error)) from error

    def to_srgb(self, image: Image.Image) -> Image.Image:
        """A picture of mode L, RGB or CMYK as RGB; the numbers it has, where they are those of sRGB.

        Raises:
            ValueError: the profile is for other colours.
        """
        if self.mode != image.mode and (self.mode, image.mode) != ("RGB", "L"):  # a gray of that space is common
            raise ValueError(f"it is for {self.mode.replace('L', 'gray')}, and the picture is {image.mode}")
        if self.mode == "L":
            return image.point(self._curve.tolist()).convert("RGB")
        image = image.convert(self.mode)
        return image if self.is_srgb else ImageCms.applyTransform(image, self._to_srgb)

    def from_srgb(self, image: Image.Image, mode: str) -> Image.Image:
        """An RGB picture in sRGB as a picture of this profile, of mode L or RGB; in L only the brightness stays.

        Raises:
            ValueError: the profile converts to sRGB, but not back.
        """
        if mode == "L":  # before the conversion, so that the result shows the gray of what was painted
            image = image.convert("L").convert("RGB")
        if not self.is_srgb:
            image = ImageCms.applyTransform(image, self._from_srgb)
        return image.convert(mode)

    @cached_property
    def is_srgb(self) -> bool:
        """Whether its numbers are those of sRGB, or of sRGB's grays."""
        if self.mode == "CMYK":
            return False
        if self.mode == "L":
            return bool((self._curve == _LEVELS).all())
        converted = np.asarray(ImageCms.applyTransform(Image.fromarray(_CUBE), self._to_srgb))
        return bool(np.abs(converted.astype(int) - _CUBE).max() <= _SAME)

    @cached_property
    def _curve(self) -> np.ndarray:
        """Of gray: the sRGB level of each of 256 levels; [256] uint8."""
        curve = np.asarray(ImageCms.applyTransform(Image.fromarray(_LEVELS[None]), self._to_srgb))[0, :, 1]
        return _LEVELS if np.abs(curve.astype(int) - _LEVELS).max() <= _SAME else curve

    @cached_property
    def _from_srgb(self) -> ImageCms.ImageCmsTransform:
        try:
            return self._transform(self._srgb, "RGB", self._profile, self.mode)
        except ImageCms.PyCMSError as error:
            raise ValueError("it converts to sRGB, but not back") from error

    @staticmethod
    def _transform(source, source_mode: str, target, target_mode: str) -> ImageCms.ImageCmsTransform:
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        if source_mode == "L":
            flags |= ImageCms.Flags.NOOPTIMIZE  # slow and exact, for just 256 levels
        return ImageCms.buildTransform(source, target, source_mode, target_mode, intent, flags)


@lru_cache(maxsize=64)
def open_profile(content: bytes) -> Profile:
    """The profile in an image file; raises what `Profile` raises. Most pictures of a set have the same."""
    return Profile(content)


# x and y of white, red, green and blue
_D65 = (0.3127, 0.3290)
_BT709 = (*_D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_BT2020 = (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046)
_DISPLAY_P3 = (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
_ADOBE_RGB = (*_D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)

_CICP_PRIMARIES = {1: _BT709, 9: _BT2020, 12: _DISPLAY_P3}  # of ITU-T H.273
_CICP_GAMMAS = {4: 2.2, 8: 1.0, 13: None}
_USUAL_GAMMA = 1 / 2.2  # which programs write for sRGB, although its curve differs
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_D50 = np.array([0.9642, 1.0, 0.8249])


def profile_of(image: Image.Image) -> bytes | None:
    """The ICC profile of a picture, or one made from its other metadata; None: it is sRGB.

    Call this before the picture is changed, which may lose its metadata.
    """
    info = image.info
    cicp = info.get("cicp", b"")
    if len(cicp) == 4 and cicp[0] in _CICP_PRIMARIES and cicp[1] in _CICP_GAMMAS:
        return matrix_profile(_CICP_PRIMARIES[cicp[0]], _CICP_GAMMAS[cicp[1]])
    if info.get("icc_profile"):
        return info["icc_profile"]
    if image.format == "PNG" and "srgb" not in info and ("gamma" in info or "chromaticity" in info):
        gamma, corners = info.get("gamma", _USUAL_GAMMA), info.get("chromaticity", _BT709)
        try:
            return matrix_profile(corners, None if abs(gamma - _USUAL_GAMMA) < 0.01 else 1 / gamma)
        except (ArithmeticError, ValueError, struct.error):  # numbers that are no colours
            return None
    if image.format in ("JPEG", "MPO") and "exif" in info and _says_adobe_rgb(image):
        return matrix_profile(_ADOBE_RGB, 563 / 256)
    return None


@lru_cache(maxsize=64)
def matrix_profile(corners: Sequence[float], gamma: float | None) -> bytes:
    """An ICC profile of an RGB space.

    Args:
        corners: x and y of white, red, green and blue.
        gamma: the power that makes light of numbers; None: the curve of sRGB.
    """
    points = zip(corners[::2], corners[1::2], strict=True)
    white, *primaries = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in points)
    rgb = np.stack(primaries, 1)
    rgb = rgb * np.linalg.solve(rgb, white)  # of such strengths that they make white
    adapt = np.linalg.solve(_BRADFORD, np.diag(_BRADFORD @ _D50 / (_BRADFORD @ white)) @ _BRADFORD)
    curve = (0, gamma) if gamma else (3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # type, parameters
    parts = b"para" + struct.pack(">IHH", 0, curve[0], 0) + _fixed(curve[1:])
    tags = {b"wtpt": b"XYZ " + bytes(4) + _fixed(_D50)}
    for name, column in zip(b"rgb", (adapt @ rgb).T, strict=True):
        tags |= {b"%cXYZ" % name: b"XYZ " + bytes(4) + _fixed(column), b"%cTRC" % name: parts}
    table, data, place = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", place + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4xI12s6H", place + len(data), 0x04200000, b"mntrRGB XYZ ", 2000, 1, 1, 0, 0, 0)
    head += b"acsp" + bytes(28) + _fixed(_D50) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + data


def _fixed(values: Sequence[float]) -> bytes:
    """Numbers of 32 bits, of which 16 are behind the point."""
    return struct.pack(f">{len(values)}i", *(round(65536 * float(value)) for value in values))


def _says_adobe_rgb(image: Image.Image) -> bool:
    try:
        exif = image.getexif()
        space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        return space == 2 or (space == 65535 and exif.get_ifd(ExifTags.IFD.Interop).get(1) == "R03")
    except Exception:  # damaged EXIF
        return False
