"""The request of `latentflow loss`. The request of a training run is its recipe."""

from __future__ import annotations

from pydantic import Field

from latentflow.requests import Request, Whole


class LossRequest(Request):
    """Which images to measure the loss on, and how often."""

    data: str = Field(description="A folder or zip of images, 'synthetic:COUNT:SEED', or a latent cache.")
    num: Whole = Field(1000, ge=1, le=10**9, description="Draws of image, time and noise.")
    seed: Whole = Field(0, description="Seed of images, times, noise and holes.")
