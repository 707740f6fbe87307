"""Options of `latentflow plan`: another machine, and facts about data that are not here."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from latentflow.requests import FromText, Number, Request, Whole


def _latent_shape(text: str) -> tuple[int, int, int]:
    if not re.fullmatch("[1-9][0-9]{0,4}(x[1-9][0-9]{0,4}){2}", text):
        raise ValueError("is not three numbers like 4x32x32: channels, height and width")
    channels, height, width = map(int, text.split("x"))
    if height != width:
        raise ValueError("is not square, as training images and their latents are")
    return channels, height, width


LatentShape = Annotated[tuple[Whole, Whole, Whole], FromText(_latent_shape)]


class PlanRequest(Request):
    """What to plan for, where it is not this machine and these data."""

    device_memory: Number | None = Field(
        None, ge=0.001, le=100_000, description="Plan for a GPU with this many GiB of memory instead of this machine."
    )
    device_tflops: Number | None = Field(
        None,
        ge=0.001,
        le=100_000,
        description="Its peak speed in TFLOP/s as the maker states it, instead of a few steps measured here.",
    )
    processes: Whole | None = Field(
        None, ge=1, le=1_000_000, description="Number of processes that share a batch, one device each."
    )
    images: Whole | None = Field(
        None, ge=1, le=10**12, description="Number of training images, if the data are not available here."
    )
    classes: Whole | None = Field(
        None, ge=0, le=1_000_000, description="Number of classes, if the data are not available here."
    )
    latents: LatentShape | None = Field(
        None, description="Shape of an image's latents, such as 4x32x32, if the autoencoder is not available here."
    )
