"""The name of a guide: the model whose velocity takes the place of the null velocity in guidance.

Nothing here may import torch: the name is an option of the command line.
"""

from __future__ import annotations

import os
from typing import Any

from pydantic import Field, model_validator

from latentflow.records import Record

NO_GUIDE = "none"
"""The name that asks for the null condition of the model itself, whatever its preset says."""


class GuideReference(Record):
    """A guide by its name, and by its weights once they are known. A text stands for the name."""

    model: str = Field(
        min_length=1,
        max_length=10_000,
        description="A model folder, a run folder, a hub id, or a snapshot: RUN@1/8, RUN@1000, or @1/8 of the own run.",
    )
    weights: str = Field(
        default="", pattern="^([0-9a-f]{12})?$", description="The first digits of their SHA-256; empty: any."
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        if isinstance(given, str | os.PathLike) and os.fspath(given):
            return {"model": os.fspath(given)}
        if isinstance(given, dict | GuideReference):
            return given
        raise ValueError("give the name of a model, such as runs/photos@1/8")
