"""Data for which every quantity of a path is known: one Gaussian, alike in each element.

With data ~ N(mean, std^2), noise ~ N(0, 1) and x_t = alpha data + sigma noise, x_t is N(alpha mean, S^2) with
S^2 = alpha^2 std^2 + sigma^2, and data and noise given x_t are linear in it. The velocity the best network has is

    v(x, t) = alpha' mean + S'/S (x - alpha mean),      S S' = alpha alpha' std^2 + sigma sigma'

Along dx/dt = v the standardised (x - alpha mean) / S has derivative 0, so the exact flow keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from latentflow.flow.path import Path
from latentflow.shapes import per_image


@dataclass(frozen=True)
class GaussianData:
    """N(mean, std^2) in each element, seen along `path`."""

    path: Path
    mean: float = 1.5
    std: float = 0.4

    def velocity(self, x: Tensor, time: Tensor) -> Tensor:
        """The marginal velocity E[alpha' data + sigma' noise | x_t = x]; x [B, ...], time [B]."""
        alpha, sigma = self.path.alpha(time), self.path.sigma(time)
        d_alpha, d_sigma = self.path.d_alpha(time), self.path.d_sigma(time)
        growth = (alpha * d_alpha * self.std**2 + sigma * d_sigma) / self._variance(time)
        return per_image(d_alpha * self.mean, x) + per_image(growth, x) * (x - self._center(x, time))

    def score(self, x: Tensor, time: Tensor) -> Tensor:
        """grad_x log p_t(x); x [B, ...], time [B]."""
        return -(x - self._center(x, time)) / per_image(self._variance(time), x)

    def expected_data(self, x: Tensor, time: Tensor) -> Tensor:
        """E[data | x_t = x]; x [B, ...], time [B]."""
        gain = self.path.alpha(time) * self.std**2 / self._variance(time)
        return self.mean + per_image(gain, x) * (x - self._center(x, time))

    def flow(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Where the exact flow carries x from time `start` to time `end` (both [B])."""
        stretch = (self._variance(end) / self._variance(start)).sqrt()
        return self._center(x, end) + per_image(stretch, x) * (x - self._center(x, start))

    def _center(self, x: Tensor, time: Tensor) -> Tensor:
        return per_image(self.path.alpha(time) * self.mean, x)

    def _variance(self, time: Tensor) -> Tensor:
        return self.path.alpha(time) ** 2 * self.std**2 + self.path.sigma(time) ** 2
