"""Requests of the verbs that prepare data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from latentflow.data.painting.input_rules import FILES, NO_INPUTS, ORIGINS, InputForm, InputRules
from latentflow.data.painting.mask_rules import MaskPolicy, MaskRules
from latentflow.data.paired_choice import PairedChoice
from latentflow.data.pixel_choice import PixelChoice, checked_range
from latentflow.data.table_options import TableOptions
from latentflow.errors import ConfigError
from latentflow.pixel_format import PixelMode
from latentflow.requests import FromText, Option, PathText, Request, RequestError, Whole
from latentflow.sizes import ImageSize, Size, bounded, typed_size

MOST_PIXELS = 16_384
"""On a side of an image."""


def _origin(text: str) -> str:
    try:
        return text if text == NO_INPUTS else InputRules(origin=text).origin
    except ConfigError:
        raise ValueError(f"give {ORIGINS}, or {NO_INPUTS}") from None


class CacheOptions(Request):
    """What a latent cache stores of each image, and how the work is done."""

    flips: bool = Field(False, description="Also encode the mirrored images, so that training can mirror.")
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="How moments are stored; float16 rounds by at most 1 part in 2048."
    )
    batch_size: Whole | None = Field(
        None, ge=1, description="Images encoded together; otherwise 32, and on a GPU as many as make a megapixel."
    )
    shard_size: Whole = Field(
        1024, ge=1, description="Images per shard; a kill loses the one being encoded and the one being written."
    )
    num_workers: Whole | None = Field(
        None,
        ge=0,
        le=256,
        description="Worker processes that read images; 0: threads; otherwise as many as speed it up.",
    )
    mask_variants: Whole = Field(
        0, ge=0, le=1000, description="Masked copies to encode per image, for inpainting; 0: none."
    )
    variants: Whole = Field(
        0, ge=0, le=100, description="Zoomed, turned and shifted copies to encode per image, for data.augment; 0: none."
    )
    input_form: InputForm = Field(
        "auto",
        description="How paired inputs reach the network. latents: encoded by the autoencoder; pixels: those below a "
        "latent pixel become its channels; auto: latents where the autoencoder can encode them.",
    )
    strict: bool = Field(False, description="Stop at a broken image instead of leaving it out.")

    @model_validator(mode="after")
    def _check_variants(self) -> CacheOptions:
        if self.variants and self.mask_variants:
            raise RequestError(
                "variants",
                f" {self.variants}: the holes of mask_variants {self.mask_variants} are encoded for the images alone; "
                "leave one of the two out",
            )
        return self


class EncodeRequest(CacheOptions, TableOptions, PixelChoice):
    """Images, and the autoencoder that encodes them."""

    data: Annotated[PathText, Option(argument=True)] = Field(
        description="Images: a folder, zip, table, parquet, tar shards, LMDB, hf:owner/name or synthetic:COUNT."
    )
    autoencoder: PathText = Field(description="A diffusers autoencoder: folder, hub id, or 'shapes'.")
    image_size: Annotated[ImageSize, bounded(1, MOST_PIXELS), FromText(typed_size)] = Field(
        Size(256, 256), description="Size of the images in pixels: 256 for squares, or WIDTHxHEIGHT, like 192x128."
    )
    buckets: bool = Field(
        False,
        description="Keep the images' shapes: crop each to the nearest of several sizes of about the area of the image "
        "size, from twice as tall as wide to twice as wide as tall.",
    )
    bucket_step: Whole | None = Field(
        None,
        ge=1,
        le=MOST_PIXELS,
        description="With --buckets: what the sides of these sizes are multiples of, in pixels; otherwise twice the "
        "autoencoder's factor, or as many times that as leave about a dozen sizes.",
    )
    first: Annotated[Whole, Option(remedy="leave it out for all images")] | None = Field(
        None, ge=1, description="Encode only this many images: the first of each class, then the second, and so on."
    )
    inputs: Annotated[str, AfterValidator(_origin)] = Field(
        FILES,
        description="Paired inputs, for `translate`. files: the folder inputs/ next to images/, if there is one; none; "
        "shrink:N: means of N x N pixels of the image, for N-fold super-resolution; gray: for colouring.",
    )
    input_pixels: PixelMode | Literal["auto"] = Field(
        "auto", description="What the channels of inputs in files are, as --pixels says it of images."
    )
    input_depth: Literal["auto", "8", "16", "float"] = Field(
        "auto", description="Bits of a value of inputs in files, as --depth says it of images."
    )
    input_value_range: Annotated[str, BeforeValidator(checked_range), Option(metavar="RANGE")] = Field(
        "auto", description="Values of inputs in files that become -1 and 1, as --value-range says it of images."
    )
    mask_policy: MaskPolicy = Field("mixed", description="How the holes are drawn.")
    mask_folder: PathText | None = Field(
        None, description="Folder of masks to draw from instead; white is the region to fill."
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        "tf32", description="What the autoencoder computes in; tf32 is float32 where there is no TF32."
    )

    @property
    def paired(self) -> PairedChoice:
        """The paired inputs."""
        chosen = {"pixels": self.input_pixels, "depth": self.input_depth, "value_range": self.input_value_range}
        return PairedChoice(self.inputs, PixelChoice(**chosen))

    @property
    def masks(self) -> MaskRules:
        """The rules of the holes."""
        return MaskRules(policy=self.mask_policy, folder=self.mask_folder or "")


class PrepareRequest(Request):
    """A published data set of images and semantic maps."""

    kind: Annotated[str, Option(argument=True)] = Field(description="camvid, celebamask-hq, ade20k or coco-stuff.")
    source: Annotated[PathText, Option(argument=True)] = Field(
        description="The data set as published: a folder or a zip."
    )
    link: bool = Field(False, description="Hard links instead of copies: editing one then edits the original as well.")
