"""A picture as its file holds it, so that a part can be repainted and the rest is preserved to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from latentflow.data.pictures.colour import to_rgb, zero_is_white
from latentflow.data.pictures.decode import stored_mode, upright
from latentflow.data.pictures.profiles import open_profile, profile_of

_COLOURS = {"1": "L", "L": "L", "LA": "L", "La": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB"}
_COLOURS |= {"RGBX": "RGB", "RGBa": "RGB"}


@dataclass(frozen=True)
class Original:
    """What a PNG can keep of a picture.

    Attributes:
        rgb: what a model sees of it (see `to_rgb`): [H, W, 3] uint8 sRGB, upright, on white.
        numbers: the numbers of the file, upright: [H, W] or [H, W, C], uint8 or uint16.
        mode: Pillow's name for them: L, LA, RGB, RGBA or I;16.
        profile: the ICC profile that says what the numbers mean; None: they are sRGB.
        transparent: the number of I;16 that means transparent, if any.
        lost: what is not kept, for messages: for example "its CMYK colours"; "" if nothing.
    """

    rgb: np.ndarray
    numbers: np.ndarray
    mode: str
    profile: bytes | None = None
    transparent: int | None = None
    lost: str = ""

    def painted(self, picture: np.ndarray, hole: np.ndarray) -> Image.Image:
        """This picture with a part repainted; everything else keeps its numbers, alpha and profile.

        Args:
            picture: [H, W, 3] uint8 sRGB; only used inside the hole.
            hole: [H, W], above 0 where to repaint; the result is opaque there.

        Returns:
            An image with its profile and transparent number in `info`, where saving as PNG finds them.
        """
        new = np.asarray(_from_srgb(Image.fromarray(picture), self.profile, _COLOURS.get(self.mode, "L")))
        if self.mode == "I;16":
            new = new.astype(np.uint16) * 257
            if self.transparent is not None:
                new[new == self.transparent] ^= 1  # the nearest number that is seen
        if self.mode.endswith("A"):
            new = np.dstack([new, np.full(hole.shape, 255, np.uint8)])
        inside = hole > 0 if self.numbers.ndim == 2 else hole[..., None] > 0
        image = Image.fromarray(np.where(inside, new, self.numbers))
        facts = {"icc_profile": self.profile, "transparency": self.transparent}
        image.info = {name: fact for name, fact in facts.items() if fact is not None}
        return image


def original_of(image: Image.Image, name: str = "a picture") -> Original:
    """A picture that `open_image` yields, or one in memory, with what a PNG can keep of it.

    Args:
        name: for notices.

    Raises:
        ValueError: what `to_rgb` raises.
    """
    stored, profile = stored_mode(image), profile_of(image)  # decoding may forget how it was stored
    rgb = to_rgb(image, name)
    image = upright(image)
    if image.mode.startswith("I"):
        numbers, clear, colours = np.asarray(image).astype(np.uint16), image.info.get("transparency"), "L"
        facts = {"mode": "I;16", "numbers": 65535 - numbers if zero_is_white(image) else numbers, "transparent": clear}
    elif colours := _COLOURS.get(image.mode):
        mode = f"{colours}A" if image.has_transparency_data else colours
        image = image.convert("LA") if image.mode == "La" else image
        facts = {"mode": mode, "numbers": np.asarray(image.convert(mode))}
    else:
        return Original(np.asarray(rgb), np.asarray(rgb), "RGB", lost=f"its {image.mode} colours")
    lost = ["the lower half of its 16 bits"] if ";16" in stored and facts["mode"] != "I;16" else []
    if profile:
        try:
            open_profile(profile).to_srgb(Image.new(colours, (1, 1)))
        except ValueError:
            profile, lost = None, [*lost, "its colour profile"]
    try:
        _from_srgb(Image.new("RGB", (1, 1)), profile, colours)
    except ValueError:
        return Original(np.asarray(rgb), np.asarray(rgb), "RGB", lost="its colour profile, depth and transparency")
    return Original(np.asarray(rgb), profile=profile, lost=" and ".join(lost), **facts)


def _from_srgb(image: Image.Image, profile: bytes | None, mode: str) -> Image.Image:
    return open_profile(profile).from_srgb(image, mode) if profile else image.convert(mode)
