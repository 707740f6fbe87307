"""Which paired inputs a set of images is opened with. No torch here: the command line imports it."""

from __future__ import annotations

from dataclasses import dataclass

from latentflow.data.painting.input_rules import FILES
from latentflow.data.pixel_choice import PixelChoice
from latentflow.pixel_format import PixelFormat


@dataclass(frozen=True)
class PairedChoice:
    """Where inputs come from, and what those in files are read as.

    Attributes:
        origin: that of `InputRules`; `NO_INPUTS`: inputs in files are left out.
        pixels: the format of inputs in files, or what is said of it, see `choose_format`; None: 8-bit RGB.
        known: the format that an earlier call chose; its range is kept, if everything else is the same.
    """

    origin: str = FILES
    pixels: PixelFormat | PixelChoice | None = None
    known: PixelFormat | None = None
