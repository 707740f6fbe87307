"""Requests of `latentflow loss`, `ema` and `train-features`. That of any other training run is its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentflow.data.pixel_choice import PixelChoice
from latentflow.data.table_options import LabelledTable
from latentflow.requests import ClassOrigins, FromText, Number, Option, PathText, Request, RequestError, Split, Whole
from latentflow.sizes import ImageSize, Size, bounded, typed_size

SHORTEST, LONGEST = 0.001, 0.28
"""Lengths of averages that can be asked for. 12^-0.5 = 0.2887 is that of the plain mean of all weights."""


class LossRequest(Request):
    """Which images to measure the loss on, and how often."""

    data: str = Field(description="A folder or zip of images, 'synthetic:COUNT:SEED', or a latent cache.")
    split: Split = Field(
        "all", description="Of the images that the model was trained with: held-out, training, or all of them."
    )
    num: Whole = Field(1000, ge=1, le=10**9, description="Draws of image, time and noise.")
    seed: Whole = Field(0, description="Seed of images, times, noise and holes.")


class EmaRequest(Request):
    """A run that has kept averages of its weights, and the average wanted."""

    run: Annotated[PathText, Option(argument=True)] = Field(
        description="The folder of a run that was trained with training.ema_lengths."
    )
    length: Number = Field(
        ge=SHORTEST,
        le=LONGEST,
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


class FinetuneRequest(Request):
    """A model to begin with, and images to finetune it to."""

    model: Annotated[PathText, Option(argument=True)] = Field(
        description="The model to begin with: a model folder, a run folder or a hub id."
    )
    data: PathText = Field(description="A latent cache, or images: whatever `latentflow encode` reads.")
    method: Literal["auto", "full", "lora", "biases"] = Field(
        "auto",
        description="What is trained besides the vectors of new classes and conditions: all weights, a difference of "
        "low rank for each matrix, or only biases; auto: lora below 500 images, else full.",
    )
    rank: Whole | None = Field(None, ge=1, le=1024, description="Rank of the differences of lora; otherwise 16.")
    class_from: ClassOrigins | None = Field(
        None,
        description="A class of the data that begins as one of the model, such as corgi=Pembroke; may be repeated. "
        "Other new classes begin with the mean of the old ones.",
    )

    @model_validator(mode="after")
    def _check(self) -> FinetuneRequest:
        if self.rank is not None and self.method in ("full", "biases"):
            raise RequestError("rank", f" {self.rank} is for --method lora, not for {self.method}; leave it out")
        return self


class TrainFeaturesRequest(Request, LabelledTable, PixelChoice):
    """Images to train a judge on. What is left open is decided by data and machine, and stays so when it goes on."""

    data: Annotated[PathText, Option(argument=True)] = Field(
        description="Images as for `encode`; sub-folders or a column of a table are classes."
    )
    out: Path = Field(description="Folder of the judge; repeat the command to go on after an interruption.")
    image_size: Annotated[ImageSize, bounded(16, 8192), FromText(typed_size)] = Field(
        Size(64, 64),
        description="Size of the images to be judged, that of your models, in pixels: 64 for squares, or WIDTHxHEIGHT, "
        "like 192x128.",
    )
    without_labels: bool = Field(False, description="Learn without the classes, even if there are some.")
    side: Whole | None = Field(
        None,
        ge=16,
        le=512,
        description="Side in pixels of the squares that the network reads; otherwise half the images' shorter side, "
        "from 32 to 64, or to 128 on a GPU.",
    )
    width: Whole | None = Field(
        None,
        ge=8,
        le=512,
        multiple_of=8,
        description="Channels of the first level; otherwise 64, or 32 for more than 32 pixels on a CPU.",
    )
    steps: Whole | None = Field(
        None,
        ge=1,
        le=10**9,
        description="Optimizer steps; otherwise 30 passes over the data, as far as ten minutes of two CPU cores allow.",
    )
    batch_size: Whole = Field(64, ge=2, le=2**20, description="Images per step, over all processes.")
    seed: Whole = Field(0, ge=0, le=2**63 - 1, description="Seed of weights, order, views and held-out images.")
    num_workers: Whole | None = Field(
        None, ge=0, le=256, description="Processes that read images; otherwise as many as speed it up."
    )
