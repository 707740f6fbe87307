"""Velocity networks whose flow is known exactly, in the place of a trained one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentflow.shapes import Condition, per_image
from tests.exact import GaussianData


class LinearField(nn.Module):
    """v = rate x + level of the label; an exact flow from time a to b multiplies x by e^(rate (b - a)) for level 0.

    Args:
        levels: [num_classes + 1], the last for the null label; None: all are 0.
    """

    def __init__(self, rate: float = 0.0, levels: Tensor | None = None):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate), requires_grad=False)
        self.levels = levels

    def forward(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        velocity = self.rate * latents
        return velocity if self.levels is None else velocity + per_image(self.levels[condition.labels], latents)


class GaussianField(nn.Module):
    """The velocity of `data`."""

    def __init__(self, data: GaussianData):
        super().__init__()
        self.data = data
        self.where = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.data.velocity(latents, time)
