"""Where the paired input of an image comes from, and how a network gets it. No torch here: the command line reads this.

A model with the condition `input` draws images from images: high resolution from low, colours from gray, photographs
from maps. The input of an image is a file of the same name, or is made from the image itself.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from latentflow.errors import ConfigError
from latentflow.pixel_format import PixelFormat
from latentflow.records import Record
from latentflow.sizes import Size

InputForm = Literal["auto", "pixels", "latents"]

FILES, GRAY = "files", "gray"
NO_INPUTS = "none"
"""Leaves inputs out where files have some."""
ORIGINS = f"{FILES}, shrink:N (means of N x N pixels) or {GRAY}"
_SHRINK = re.compile(r"shrink:([0-9]{1,4})")


class InputRules(Record):
    """Where inputs come from and how a network gets them; stored in recipes, latent caches and model folders.

    Raises:
        ConfigError: there is no such origin.
    """

    origin: str = Field(
        FILES,
        description="files: the folder inputs/ next to images/; shrink:N: the means of N x N pixels of the image, for "
        "N-fold super-resolution; gray: the brightness of the image, for colouring.",
    )
    form: InputForm = Field(
        "auto",
        description="latents: encoded by the autoencoder; pixels: those below each latent pixel become its channels "
        "(pixel unshuffle), which loses nothing; auto: latents where the autoencoder can encode them.",
    )

    @field_validator("origin")
    @classmethod
    def _known(cls, origin: str) -> str:
        shrunk = _SHRINK.fullmatch(origin)
        if origin not in (FILES, GRAY) and (shrunk is None or int(shrunk[1]) < 2):
            raise ConfigError(f"inputs {origin!r}: give {ORIGINS}, such as shrink:4")
        return origin

    @property
    def title(self) -> str:
        """For people: "shrink:4 as pixels"."""
        return f"{self.origin} as {self.form}"

    @property
    def is_derived(self) -> bool:
        """Whether inputs are made from the images."""
        return self.origin != FILES

    @property
    def shrinking(self) -> int:
        """Side of the image divided by the side of its input."""
        shrunk = _SHRINK.fullmatch(self.origin)
        return int(shrunk[1]) if shrunk else 1

    def agrees_with(self, wanted: InputRules) -> bool:
        """Whether these rules have every value that `wanted` sets."""
        return all(getattr(wanted, name) in (getattr(self, name), "auto") for name in wanted.model_fields_set)

    def resolved(self, inputs: PixelFormat, images: PixelFormat) -> InputRules:
        """The same with a form for inputs and images of these formats: latents, if an input has one channel or as many
        as an image."""
        if self.form != "auto":
            return self
        can_encode = inputs.channels in (1, images.channels)
        return self.model_copy(update={"form": "latents" if can_encode else "pixels"})

    def size(self, image_size: Size | int) -> Size:
        """The size of the input of an image.

        Raises:
            ConfigError: a side of the image is no multiple of `shrinking`.
        """
        image_size = Size.of(image_size)
        if not image_size.is_multiple_of(self.shrinking):
            near = Size(*(max(round(side / self.shrinking), 1) * self.shrinking for side in image_size))
            raise ConfigError(
                f"inputs {self.origin}: {image_size} pixels are not a multiple of {self.shrinking}; use an image size "
                f"of {near}"
            )
        return image_size.over(self.shrinking)

    def network_channels(self, inputs: PixelFormat, images: PixelFormat, factor: int, latent_channels: int) -> int:
        """How many channels a network gets at each latent pixel.

        Args:
            inputs, images: the formats of their pixels.
            factor: image side divided by latent side.

        Raises:
            ConfigError: pixels of the input and latent pixels do not fit together, or the autoencoder of the images
                cannot encode the inputs.
        """
        assert self.form != "auto"
        channels = inputs.channels
        if self.form == "latents":
            if channels not in (1, images.channels):
                raise ConfigError(
                    f"inputs of {channels} channels cannot be encoded like images of {images.channels}; use the form "
                    "'pixels'"
                )
            return latent_channels
        if factor % self.shrinking and self.shrinking % factor:
            fitting = [str(n) for n in range(2, 2 * factor + 1) if factor % n == 0 or n % factor == 0]
            raise ConfigError(
                f"inputs {self.origin}: the autoencoder reduces by {factor}, which neither divides nor is divided by "
                f"{self.shrinking}; use {', '.join(fitting)}, or the form 'latents'"
            )
        return channels * max(factor // self.shrinking, 1) ** 2
