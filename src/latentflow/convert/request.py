"""Requests of `convert` and `export`: foreign weights to read, and foreign folders to write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from latentflow.requests import Option, Request, Whole

AUTOENCODER = "stabilityai/sd-vae-ft-mse"
"""The autoencoder of every published LFM, SiT and DiT model."""


class ConvertRequest(Request):
    """A foreign checkpoint, and what the file does not say about it."""

    family: Annotated[str, Option(argument=True)] = Field(
        description="The program that trained the weights: lfm, sit, dit or edm."
    )
    checkpoint: Annotated[Path, Option(argument=True)] = Field(
        description="A .pth, .pt, .ckpt or .safetensors file: a state_dict, or a training state that holds one."
    )
    options: Annotated[list[str] | None, Option(argument=True)] = Field(
        None, description="Arguments of the published network as key=value, for example name=SiT-XL/2."
    )
    experiment: str | None = Field(None, description="For lfm: the published experiment, for example ffhq_f8_dit.")
    autoencoder: str | Path = Field(AUTOENCODER, description="The autoencoder the model was trained with.")
    image_size: Whole | None = Field(
        None,
        ge=1,
        le=16_384,
        description="Height and width of its images in pixels; otherwise from the options.",
    )
    class_names: Path | None = Field(
        None,
        description="A text file of one class name per line; otherwise ImageNet's for 1000 classes, else numbers.",
    )
    encoder: Path | None = Field(
        None, description="For lfm: the file with the encoder of semantic maps, if it is separate."
    )
    check: bool = Field(True, description="Probe whether the result flows from noise to images.")


class ExportRequest(Request):
    """The kind of folder to write."""

    format: Literal["diffusers", "pipeline", "onnx"] = Field(
        "diffusers",
        description="What will load the folder: diffusers, by its own classes or by a pipeline in the folder, or "
        "onnxruntime and others.",
    )
