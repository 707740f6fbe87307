"""Embedded colour profiles (ICC), to sRGB and back."""

from __future__ import annotations

import io
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageCms

from latentflow.data.decode import reason

_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # by the colours that a profile is for
_LEVELS = np.arange(256, dtype=np.uint8)
_CUBE = np.stack(np.meshgrid(_LEVELS[::15], _LEVELS[::15], _LEVELS[::15]), -1).reshape(1, -1, 3)  # colours to try
_SAME = 2  # levels of 255; tables that stand for sRGB's curve are off by one


class Profile:
    """What the numbers of a picture mean.

    Colours are taken relative to white, with black point compensation: those that both spaces have stay as they are,
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
            ValueError: the profile leads to sRGB, but not back.
        """
        if mode == "L":  # before the colours change: what is shown then is the gray of what was painted
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
            raise ValueError("it leads to sRGB, but not back") from error

    @staticmethod
    def _transform(source, source_mode: str, target, target_mode: str) -> ImageCms.ImageCmsTransform:
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        if source_mode == "L":
            flags |= ImageCms.Flags.NOOPTIMIZE  # slow and exact, for 256 levels alone
        return ImageCms.buildTransform(source, target, source_mode, target_mode, intent, flags)


@lru_cache(maxsize=64)
def open_profile(content: bytes) -> Profile:
    """The profile in an image file; raises what `Profile` raises. Most pictures of a set have the same."""
    return Profile(content)
