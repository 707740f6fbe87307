"""Requests of `latentflow loss` and `latentflow ema`. The request of a training run is its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from latentflow.requests import Number, Option, PathText, Request, RequestError, Whole


class LossRequest(Request):
    """Which images to measure the loss on, and how often."""

    data: str = Field(description="A folder or zip of images, 'synthetic:COUNT:SEED', or a latent cache.")
    num: Whole = Field(1000, ge=1, le=10**9, description="Draws of image, time and noise.")
    seed: Whole = Field(0, description="Seed of images, times, noise and holes.")


class EmaRequest(Request):
    """A run that has kept averages of its weights, and the average wanted."""

    run: Annotated[PathText, Option(argument=True)] = Field(
        description="The folder of a run that was trained with training.ema_lengths."
    )
    length: Number = Field(
        ge=0.001,
        le=0.28,
        description="Standard deviation of the average's profile over the steps, as a share of the run.",
    )
    step: Whole | None = Field(None, ge=1, description="Step of the average, of a snapshot; otherwise the last one.")
    out: Path | None = Field(None, description="Folder of the model; must be new.")
    write: bool = Field(False, description="Write it into the run's own model folder, in place of what is there.")

    @model_validator(mode="after")
    def _check(self) -> EmaRequest:
        if (self.out is None) is not self.write:
            raise RequestError(
                "out", ": give --out FOLDER for a new model, or --write for the run's own; one of the two"
            )
        return self
