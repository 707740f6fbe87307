"""What `latentflow encode` can be asked. No torch here: the command line reads these fields for its options."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from latentflow.data.painting.mask_rules import MaskRules
from latentflow.records import Record

PathText = Annotated[str, BeforeValidator(lambda given: os.fspath(given) if isinstance(given, os.PathLike) else given)]
"""A path, as text."""


class CacheOptions(Record):
    """What a latent cache stores of each image, and how the work is done."""

    flips: bool = Field(
        False, description="Also encode the mirrored images; an encoder does not commute with mirroring."
    )
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="How moments are stored; float16 rounds by at most 1 part in 2048."
    )
    shard_size: int = Field(
        1024, ge=1, description="Images per shard; a kill loses the shard being encoded and the one being written."
    )
    mask_variants: int = Field(
        0, ge=0, description="Random holes per image, each encoded with the image, for inpainting; 0: none."
    )
    masks: MaskRules = Field(MaskRules(), description="How these holes are drawn.")
    strict: bool = Field(False, description="Stop at a broken image instead of leaving it out.")
    batch_size: int | None = Field(
        None, ge=1, description="Images encoded together; default: 32, and on a GPU as many as make a megapixel."
    )
    num_workers: int | None = Field(
        None, ge=0, le=256, description="Worker processes that read images; 0: threads; default: as many as pay off."
    )


class EncodeRequest(CacheOptions):
    """One call of `encode`."""

    data: PathText = Field(description="A folder or zip of images, an LMDB, or synthetic:COUNT.")
    autoencoder: PathText = Field(description="A diffusers autoencoder: folder, hub id, or 'shapes'.")
    image_size: int = Field(256, description="Side of the square images in pixels.")
    first: int | None = Field(
        None, description="Encode so many images: the first of each class, then the second of each, and so on."
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        "tf32", description="What the autoencoder computes in; tf32 is float32 where there is no TF32."
    )
