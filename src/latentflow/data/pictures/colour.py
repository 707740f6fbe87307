"""Any picture as upright 8-bit sRGB: one rule for training images, references and edits, as FID depends on it.

In this order: the EXIF rotation is applied; numbers of 16 bits become 8 bits; the colours of a profile (see
`profile_of`) become those of sRGB; transparent parts are laid on white.

A picture without a profile, or whose profile is sRGB within 2 levels, keeps its numbers. A profile that is damaged, or
for another colour space than its picture's, is ignored with a notice.

Of 16 bits 65535 is white. Gray is rounded, and of colours Pillow reads the upper half.
"""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image

from latentflow.console import notice
from latentflow.data.pictures.decode import stored_mode, upright
from latentflow.data.pictures.profiles import open_profile, profile_of

PIXEL_RULES = "srgb"
"""The name of these rules; it changes when they give other pixels. Before this one, profiles were ignored."""

_HDR = (b"\x10", b"\x12")  # transfer functions of PNG's cICP: PQ and HLG
_DARKEST = 65536 // 8  # a picture whose numbers stay below may hold 12 bits, or 8, in a wider file


def to_rgb(image: Image.Image, name: str = "a picture") -> Image.Image:
    """Convert any Pillow image to upright 8-bit sRGB on white, without metadata; see `to_srgb`."""
    rgb, alpha = to_srgb(image, name)
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    return rgb


def to_srgb(image: Image.Image, name: str = "a picture") -> tuple[Image.Image, Image.Image | None]:
    """Convert any Pillow image to upright 8-bit sRGB without metadata, and its alpha channel, if it has one.

    Args:
        name: for notices.

    Raises:
        ValueError: its numbers are floating-point, negative or above 65535, so that white is undefined.
    """
    stored, profile = stored_mode(image), profile_of(image)  # before decoding, which may lose how it was stored
    if image.info.get("cicp", b"")[1:2] in _HDR:
        notice(f"{name} is HDR, which is not read correctly; save such files as 8-bit sRGB", kind="HDR")
    image, alpha = upright(image), None
    if image.mode.startswith(("I", "F")):
        image, alpha = _eight_bits(image, name)
    else:
        if image.has_transparency_data:
            is_tiff = image.format == "TIFF"
            image, alpha = _apart(image)
            if is_tiff:
                _notice_strange_alpha(alpha, name)
        if ";16" in stored:
            _notice_dark_colours(image, name)
    rgb = _in_srgb(image, profile, name)
    rgb.info = {}  # drop the rotation, profile and transparent colour, which have been applied
    return rgb, alpha


def zero_is_white(image: Image.Image) -> bool:
    """Whether the 16-bit numbers of a TIFF file count from white to black; Pillow only inverts those of 8 bits."""
    return getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0


def _apart(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """A picture with any kind of transparency as its colours, L or RGB, and its alpha channel."""
    if image.mode == "La":  # gray multiplied by alpha, which Pillow converts to nothing but this
        image = image.convert("LA")
    colours = "L" if image.mode in ("1", "L", "LA") else "RGB"
    image = image.convert(f"{colours}A")
    return image.convert(colours), image.getchannel("A")


def _notice_strange_alpha(alpha: Image.Image, name: str) -> None:
    """Programs that write satellite images mark a near-infrared band as alpha; opacity is mostly all or nothing."""
    counts = alpha.histogram()
    if counts[0] + counts[255] < sum(counts) // 100:
        notice(
            f"{name} is laid on white by its fourth channel, which is marked as alpha, and has hardly a pixel that is "
            "clear or opaque; if that is a band, such as near infrared, read such files with --pixels bands",
            kind="strange alpha",
        )


def _eight_bits(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """Gray of 16 or 32 bits as L, and its alpha channel where one number means transparent."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} have no defined white; save it as 8 or 16 bits a channel")
    top, wide = int(values.max()), image.mode == "I" and image.format != "PPM"  # PPM is scaled to 16 bits
    bits = max(top.bit_length(), 8)
    white = (1 << (bits if wide else bits + bits % 2)) - 1  # of 8, 10, 12 or 14 bits
    if white < 65535 and (wide or 0 < top < _DARKEST):
        notice(
            f"{name} holds {32 if wide else 16}-bit numbers, of which 65535 is white, and its largest is {top}; if "
            f"{white} is white there, scale all such files first and save them as PNG, in Pillow Image.fromarray("
            f"np.rint(np.asarray(image) * (65535 / {white})).astype(np.uint16))",
            kind=f"dark numbers of mode {image.mode}",
        )
    table = np.rint(np.arange(65536) / 257).astype(np.uint8)
    if zero_is_white(image):
        table = table[::-1]
    clear = image.info.get("transparency")
    alpha = None if clear is None else Image.fromarray(np.where(values == clear, np.uint8(0), np.uint8(255)))
    return Image.fromarray(table[values]), alpha


def _notice_dark_colours(image: Image.Image, name: str) -> None:
    top = int(np.max(image.getextrema()))
    if 0 < top < _DARKEST >> 8:
        notice(
            f"{name} holds 16-bit colours, of which 65535 is white, and its largest is about {257 * top}; if less is "
            "white there, as with 12 bits, save all such files again with values up to 65535, or with 8 bits a channel",
            kind="dark colours",
        )


def _in_srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """A picture without transparency as RGB; always a new picture."""
    mode = {"1": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    if not profile and mode == "CMYK":
        notice(
            f"{name} is CMYK without a colour profile, and its colours are a guess; convert such files to RGB with the "
            "profile that they were made for",
            kind="CMYK",
        )
    if profile and image.mode != "LAB":  # whose numbers are colours without a profile
        try:
            return open_profile(profile).to_srgb(image.convert(mode))
        except ValueError as error:
            notice(
                f"the colour profile of {name} cannot be used ({error}) and is ignored, like other such profiles; save "
                "such files as sRGB if their colours come out wrong",
                kind="profile",
            )
    return image.convert("RGB")
