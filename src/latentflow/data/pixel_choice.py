"""How a person says what the pixels of a data set are to be read as."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from latentflow.pixel_format import PixelDtype, PixelFormat
from latentflow.records import Record
from latentflow.requests import Option

DEPTHS: dict[str, PixelDtype] = {"8": "uint8", "16": "uint16", "float": "float32"}
"""What --depth calls the dtypes."""

EIGHT_BIT_RGB = {"data.pixels": "rgb", "data.depth": "8", "data.value_range": "full"}
"""The choice of recipes that were written before there was one."""

_RANGE_LIKE = "give full, a range like 0,4095, one for each band like 0,4095;0,10000, or percentile:0.1,99.9"


def checked_range(text: object) -> object:
    """Refuse what `PixelChoice.value_range` does not understand."""
    if not isinstance(text, str) or text in ("auto", "full"):
        return text
    pairs = text.removeprefix("percentile:").split(";")
    try:
        numbers = [[float(part) for part in pair.split(",")] for pair in pairs]
    except ValueError:
        raise ValueError(f"is no range of values; {_RANGE_LIKE}") from None
    if any(len(pair) != 2 or not pair[0] < pair[1] for pair in numbers):
        raise ValueError(f"is no range of values from low to high; {_RANGE_LIKE}")
    if text.startswith("percentile:") and (len(numbers) > 1 or numbers[0][0] < 0 or numbers[0][1] > 100):
        raise ValueError(f"is no pair of percentiles from 0 to 100; {_RANGE_LIKE}")
    return text


class PixelChoice(Record):
    """Channels, depth and range of the pixels; what is left open follows from the files."""

    pixels: Literal["auto", "rgb", "gray", "rgba", "gray-alpha", "bands"] = Field(
        "auto",
        description="What the channels are: colours, with or without alpha, or bands. auto: rgb for files of 8 bits a "
        "channel, otherwise what the files have.",
    )
    depth: Literal["auto", "8", "16", "float"] = Field(
        "auto", description="Bits of a value: 8, 16 or float; auto: those of the files, which must be alike."
    )
    value_range: Annotated[str, BeforeValidator(checked_range), Option(metavar="RANGE")] = Field(
        "auto",
        description="Values that become -1 and 1: full (all that the depth can hold), LOW,HIGH (one pair, or one for "
        "each band with semicolons between) or percentile:LOW,HIGH (of the images). auto: full for 8 bits, otherwise "
        "the least and the greatest value of the images.",
    )

    def agrees(self, pixel_format: PixelFormat) -> bool:
        """Whether images that were read in a format could have been read by this choice."""
        low, high = self.given_range or (pixel_format.low, pixel_format.high)
        rule = "full range" if self.value_range == "full" else ""
        if self.value_range.startswith("percentile:"):
            rule = "percentiles {:g} and {:g} ".format(*self.percentiles)
        return (
            self.pixels in ("auto", pixel_format.mode)
            and (self.depth == "auto" or DEPTHS[self.depth] == pixel_format.dtype)
            and (low, high) == (pixel_format.low, pixel_format.high)
            and pixel_format.rule.startswith(rule)
        )

    def followed(self, usual: PixelFormat) -> PixelChoice:
        """The same choice, with the values of a format where it leaves something open; itself if the depths differ."""
        if self.depth != "auto" and DEPTHS[self.depth] != usual.dtype:
            return self
        chosen = self.model_dump(include={*PixelChoice.model_fields})
        if self.value_range == "auto" and self.pixels in ("auto", usual.mode):
            spans = (f"{low!r},{high!r}" for low, high in zip(usual.low, usual.high, strict=True))
            chosen["value_range"] = "full" if usual.is_full_range else ";".join(spans)
        if self.pixels == "auto":
            chosen["pixels"] = usual.mode
        return PixelChoice(**chosen)

    @property
    def given_range(self) -> tuple[list[float], list[float]] | None:
        """Low and high as they are given, for each channel or one for all; None: they follow from the files."""
        if self.value_range in ("auto", "full") or self.value_range.startswith("percentile:"):
            return None
        pairs = [[float(number) for number in pair.split(",")] for pair in self.value_range.split(";")]
        return [low for low, _ in pairs], [high for _, high in pairs]

    @property
    def percentiles(self) -> tuple[float, float]:
        """Those that are asked for; 0 and 100 are the least and the greatest value."""
        if not self.value_range.startswith("percentile:"):
            return 0.0, 100.0
        low, high = self.value_range.removeprefix("percentile:").split(",")
        return float(low), float(high)


class ChoiceForAutoencoder(PixelChoice):
    """A choice that follows what an autoencoder was trained on, where it leaves something open.

    It does so for files of the same depth; others are read as without the autoencoder.
    """

    trained_on: PixelFormat | None = None
