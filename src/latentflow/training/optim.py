"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class OptimizerConfig(BaseModel):
    """AdamW and the course of its learning rate."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: float = Field(1e-4, gt=0, le=1e9, description="At its highest, after the warm-up.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0, le=1e3)
    warmup_steps: int = Field(0, ge=0, le=10**9, description="Steps of linear rise from zero.")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="cosine: fall to final_learning_rate at the last step."
    )
    final_learning_rate: float = Field(1e-5, ge=0, le=1e9, description="Where the cosine ends.")
    clip_norm: float | None = Field(1.0, gt=0, le=1e9, description="Largest gradient norm; null: no clipping.")

    def rate(self, step: int, num_steps: int) -> float:
        """The learning rate of step `step` (the first is 0) of `num_steps`; a function has nothing to store."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(num_steps - self.warmup_steps, 1)
        height = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * height

    @property
    def gentler(self) -> str:
        """What to add to the command of a run that met a number which is not finite."""
        changes = {"optimizer.learning_rate": self.learning_rate / 10}
        if self.clip_norm is None:
            changes["optimizer.clip_norm"] = 1.0
        told = " ".join(f"{key}={value:g} --allow-change {key}" for key, value in changes.items())
        return f"repeat the command with {told} in place of the old values"


def build_optimizer(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with the fused update of every device that has one."""
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
