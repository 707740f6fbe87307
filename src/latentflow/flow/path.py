"""Paths from data to noise, x_t = alpha(t) data + sigma(t) noise, and the conversions between their quantities.

t = 0 is data, t = 1 is noise. Images are [B, ...], times [B]. Given x_t, any one of four quantities determines the
others: the data, the noise, the velocity and the score. With D = alpha sigma' - alpha' sigma,

    x = alpha  data + sigma  noise             data  = (sigma' x - sigma v) / D
    v = alpha' data + sigma' noise             noise = (alpha v - alpha' x) / D
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor

from latentflow.records import Record
from latentflow.shapes import per_image


class Path(Record):
    """A path between data and noise, given by its two coefficients as functions of time."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data at times `t` in [0, 1], any shape; falls from 1 to 0."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise at times `t` in [0, 1], any shape; rises to 1."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """The derivative of `alpha` in t."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """The derivative of `sigma` in t."""

    def interpolate(self, data: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The point x_t of the path: [B, ...], with `data` and `noise` [B, ...] and `time` [B] in [0, 1]."""
        return per_image(self.alpha(time), data) * data + per_image(self.sigma(time), data) * noise

    def target(self, data: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The velocity dx_t/dt of one pair of data and noise, which the network learns to predict: [B, ...]."""
        return per_image(self.d_alpha(time), data) * data + per_image(self.d_sigma(time), data) * noise

    def data_from_velocity(self, x: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
        """The data that belongs to x_t = `x` ([B, ...]) and `velocity` ([B, ...]); any `time` [B] in [0, 1]."""
        _, sigma, _, d_sigma, determinant = self._coefficients(x, time)
        return (d_sigma * x - sigma * velocity) / determinant

    def noise_from_velocity(self, x: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
        """The noise that belongs to x_t = `x` ([B, ...]) and `velocity` ([B, ...]); any `time` [B] in [0, 1]."""
        alpha, _, d_alpha, _, determinant = self._coefficients(x, time)
        return (alpha * velocity - d_alpha * x) / determinant

    def velocity_from_data(self, x: Tensor, data: Tensor, time: Tensor) -> Tensor:
        """The velocity that belongs to x_t = `x` ([B, ...]) and `data` ([B, ...]), for `time` [B] in (0, 1].

        Divides by sigma(t): errors of `x` and `data` grow as 1/t towards t = 0, where the cosine path gives
        a non-finite result.
        """
        _, sigma, _, d_sigma, determinant = self._coefficients(x, time)
        return (d_sigma * x - determinant * data) / sigma

    def velocity_from_noise(self, x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The velocity that belongs to x_t = `x` ([B, ...]) and `noise` ([B, ...]), for `time` [B] in [0, 1).

        Divides by alpha(t): errors of `x` and `noise` grow as 1/(1 - t) towards t = 1, where the result is
        not meaningful.
        """
        alpha, _, d_alpha, _, determinant = self._coefficients(x, time)
        return (d_alpha * x + determinant * noise) / alpha

    def score_from_velocity(self, x: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
        """The score grad_x log p_t(x) = -E[noise | x] / sigma, for `time` [B] in (0, 1].

        Divides by sigma(t), as `velocity_from_data` does.
        """
        return -self.noise_from_velocity(x, velocity, time) / per_image(self.sigma(time), x)

    def _coefficients(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        functions = (self.alpha, self.sigma, self.d_alpha, self.d_sigma)
        alpha, sigma, d_alpha, d_sigma = (per_image(function(time), x) for function in functions)
        return alpha, sigma, d_alpha, d_sigma, alpha * d_sigma - d_alpha * sigma


class LinearPath(Path):
    """The straight path of arXiv 2307.08698: alpha = 1 - t, sigma = sigma_min + (1 - sigma_min) t."""

    kind: Literal["linear"] = "linear"
    sigma_min: float = Field(
        default=1e-5, ge=0, lt=1, description="Noise left on the data at t = 0; 0 ends exactly on it."
    )

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min + (1 - self.sigma_min) * t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 1 - self.sigma_min)


class CosinePath(Path):
    """The variance-preserving path ("GVP" of SiT, arXiv 2401.08740): alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    kind: Literal["cosine"] = "cosine"

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(math.pi / 2 * t)


def _kind(value: Any) -> str:
    return value.get("kind", "linear") if isinstance(value, dict) else getattr(value, "kind", "linear")


PathConfig = Annotated[
    Annotated[LinearPath, Tag("linear")] | Annotated[CosinePath, Tag("cosine")], Discriminator(_kind)
]
"""The path of a model in its config: `kind` selects the class; without it, the path is linear."""
