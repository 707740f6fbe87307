"""The size of an image: height and width in pixels, read from one number or from WIDTHxHEIGHT.

Tensors have the height first, as in [B, C, H, W], and so has `Size`. Text has the width first, as people and cameras
write it: 192x128 is 192 wide and 128 high. A square is written as one number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from numbers import Integral
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

_TEXT = re.compile(r"\s*(\d{1,9})\s*(?:[xX×]\s*(\d{1,9}))?\s*", re.ASCII)
_FORM = "one number for a square, or WIDTHxHEIGHT like 192x128"


class Size(NamedTuple):
    """Height and width of an image, in pixels or in latent pixels."""

    height: int
    width: int

    @classmethod
    def of(cls, given: Any) -> Size:
        """A size from an int (a square), from the text WIDTHxHEIGHT, or from a pair (height, width).

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(given, Size):
            return given
        if isinstance(given, str) and (found := _TEXT.fullmatch(given)):
            width, height = found[1], found[2] or found[1]
            return cls(int(height), int(width))
        if isinstance(given, Integral) and not isinstance(given, bool):
            return cls(int(given), int(given))
        if isinstance(given, Sequence) and len(given) == 2 and all(isinstance(side, Integral) for side in given):
            return cls(*map(int, given))
        raise ValueError(f"is no size; give {_FORM}")

    def __str__(self) -> str:
        """As an option or a recipe has it: 64, or 192x128."""
        return str(self.width) if self.is_square else f"{self.width}x{self.height}"

    @property
    def written(self) -> int | str:
        """As a file has it: a number for a square, as before there were others."""
        return self.width if self.is_square else str(self)

    @property
    def words(self) -> str:
        """For people: 64 x 64, or 192 x 128; the width first."""
        return f"{self.width} x {self.height}"

    @property
    def is_square(self) -> bool:
        return self.height == self.width

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.height * self.width

    @property
    def aspect(self) -> float:
        """Width divided by height."""
        return self.width / self.height

    def is_multiple_of(self, number: int) -> bool:
        """Whether both sides are positive multiples of `number`."""
        return min(self) >= number and all(side % number == 0 for side in self)

    def over(self, factor: int) -> Size:
        """The size in units of `factor` pixels, rounded down: that of latents, or of a grid of patches."""
        return Size(self.height // factor, self.width // factor)

    def times(self, factor: int) -> Size:
        """The size `factor` times as high and as wide."""
        return Size(self.height * factor, self.width * factor)

    def nearest(self, number: int) -> list[Size]:
        """The two sizes next to this one whose sides are multiples of `number`, squares for a square."""
        below = [max(side // number, 1) * number for side in self]
        if self.is_square:
            return [Size(below[0], below[0]), Size(below[0] + number, below[0] + number)]
        around = (sorted({low, low + (number if side % number else 0)}) for low, side in zip(below, self, strict=True))
        sizes = (Size(*sides) for sides in product(*around))
        return sorted(sizes, key=lambda size: abs(size.height - self.height) + abs(size.width - self.width))[:2]


def bounded(least: int, most: int, remedy: str = "64 or 256 are usual") -> AfterValidator:
    """Refuses sizes with a side outside of [`least`, `most`] pixels."""

    def check(size: Size) -> Size:
        if not least <= min(size) or not max(size) <= most:
            raise ValueError(f"give {least} to {most:,} pixels for a side: {_FORM}; {remedy}")
        return size

    return AfterValidator(check)


def typed_size(text: str) -> int | str:
    """A size from the command line, for `Size.of`: a whole number as one, so that messages show it without quotes."""
    try:
        return int(text)
    except ValueError:
        return text


ImageSize = Annotated[Size, BeforeValidator(Size.of), PlainSerializer(lambda size: size.written)]
"""A field of a record: read from an int, from WIDTHxHEIGHT or from (height, width), written as `Size.written`."""
