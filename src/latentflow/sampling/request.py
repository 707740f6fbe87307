"""Requests of the verbs that draw: what a person asks of a model, before it is known which model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from latentflow.requests import Classes, Names, Number, Option, Request, Times, Whole

MOST_IMAGES, MOST_SEED, MOST_STEPS = 1_000_000, 2**63 - 1, 10_000


class SamplingRequest(Request):
    """How to draw. What is None comes from the preset in the model folder."""

    guidance: Annotated[Number, Option(remedy="1 switches it off, 1.5 to 4 are usual")] | None = Field(
        None, ge=0, le=1000, description="Guidance scale; 1: off."
    )
    guidance_interval: Times | None = Field(
        None, description="Times between which guidance acts, for example 0.1,0.8; otherwise always."
    )
    guided_by: Names | None = Field(
        None, description="What guidance strengthens: label, inpainting, semantic_map; otherwise every condition given."
    )
    guided_channels: Whole | None = Field(
        None, ge=1, le=65_536, description="Guidance acts on the first latent channels only; otherwise on all."
    )
    solver: str | None = Field(None, description="euler, midpoint, heun, rk4, ab2, ab3, bosh3 or dopri5.")
    steps: Annotated[Whole, Option(remedy="25 are usual")] | None = Field(
        None, ge=1, le=MOST_STEPS, description="Intervals of a fixed-step solver."
    )
    shift: Annotated[Number, Option(remedy="1 is an even grid")] | None = Field(
        None, ge=1e-4, le=1e4, description="Time shift of the grid; 1: even, above 1: more steps near the noise."
    )
    rtol: Annotated[Number, Option(remedy="1e-5 is usual")] | None = Field(
        None, ge=1e-9, le=1, description="Relative tolerance of bosh3 and dopri5."
    )
    atol: Annotated[Number, Option(remedy="1e-5 is usual")] | None = Field(
        None, ge=1e-9, le=100, description="Absolute tolerance of bosh3 and dopri5."
    )

    def preset(self) -> dict[str, object]:
        """What was asked for of a sampling preset."""
        own = {name: getattr(self, name) for name in SamplingRequest.model_fields}
        return {name: value for name, value in own.items() if value is not None}


class SampleRequest(SamplingRequest):
    """Images from seeds and classes."""

    num: Annotated[Whole, Option(called="number of images", remedy="draw more with another seed")] = Field(
        16, ge=1, le=MOST_IMAGES, description="Number of images."
    )
    classes: Classes | None = Field(
        None,
        description="Names, cycled over the images: cat,dog or 'cat,\"Doe, Jane\"' where a name has a comma; or "
        "indices, '#3,#7' in quotes. 'none' ('#none' where a class is called none): unconditional.",
    )
    seed: Whole = Field(0, ge=0, le=MOST_SEED, description="Seed of the first image; image i has seed SEED + i.")
