"""Velocities composed of other velocities; each is again a function of (x, t).

Legend: B images of the whole, b images of a call, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.path import Path
from latentflow.shapes import per_image


class BlendedVelocity:
    """Between two conditions: v = (1 - w) v_a + w v_b with one weight for each image.

    Args:
        first, second: v_a and v_b of the same B images; both are called each time.
        weight: [B] in [0, 1].
    """

    def __init__(self, first: ConditionedVelocity, second: ConditionedVelocity, weight: Tensor):
        self.first = first
        self.second = second
        self.weight = weight

    @property
    def evaluations(self) -> Tensor:
        """Network calls per image so far, [B] int64 on the CPU."""
        return self.first.evaluations + self.second.evaluations

    def at(self, time: float | Tensor) -> BlendedVelocity:
        """The same velocity, with the time of its next call known on the CPU: one number for all images, or [b]."""
        return BlendedVelocity(self.first.at(time), self.second.at(time), self.weight)

    def towards(self, end: float) -> BlendedVelocity:
        """Of students: the blend of their average velocities from the time of a call to the time `end`."""
        return BlendedVelocity(self.first.towards(end), self.second.towards(end), self.weight)

    def select(self, rows: Tensor) -> BlendedVelocity:
        """The same velocity for the images at `rows` ([b] int64 or [B] bool)."""
        weight = self.weight[rows.to(self.weight.device)]
        return BlendedVelocity(self.first.select(rows), self.second.select(rows), weight)

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        """The velocity at x ([b, C, H, W]) and time ([b] in [0, 1]): [b, C, H, W] in x's dtype."""
        return torch.lerp(self.first(x, time), self.second(x, time), per_image(self.weight, x))


class KnownRegionVelocity:
    """Any velocity inside a hole; outside it, the path from the noise to a known image.

        v = m v_model + (1 - m) u,    u = alpha'(t) data + sigma'(t) noise

    Started at x_t of the path, the known region stays on the path: the model sees it at the right noise level while it
    fills the hole. This needs no training for inpainting.

    Args:
        velocity: of the model.
        path: from data to noise.
        data: [B, C, H, W], latents of the known image.
        noise: [B, C, H, W], the noise it starts from.
        hole: [B, 1, H, W] of 0 and 1, m.
    """

    def __init__(
        self, velocity: ConditionedVelocity | BlendedVelocity, path: Path, data: Tensor, noise: Tensor, hole: Tensor
    ):
        self.velocity = velocity
        self.path = path
        self.data, self.noise, self.hole = data, noise, hole
        self._end: float | None = None

    @property
    def evaluations(self) -> Tensor:
        """Network calls per image so far, [B] int64 on the CPU."""
        return self.velocity.evaluations

    def at(self, time: float | Tensor) -> KnownRegionVelocity:
        """The same velocity, with the time of its next call known on the CPU: one number for all images, or [b]."""
        known = copy.copy(self)
        known.velocity = self.velocity.at(time)
        return known

    def towards(self, end: float) -> KnownRegionVelocity:
        """Of a student: the average velocity from the time of a call to the time `end`, that of the path as well."""
        jumping = copy.copy(self)
        jumping.velocity, jumping._end = self.velocity.towards(end), end
        return jumping

    def select(self, rows: Tensor) -> KnownRegionVelocity:
        """The same velocity for the images at `rows` ([b] int64 or [B] bool)."""
        selection = copy.copy(self)
        rows = rows.to(self.data.device)
        selection.velocity = self.velocity.select(rows)
        selection.data, selection.noise, selection.hole = self.data[rows], self.noise[rows], self.hole[rows]
        return selection

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        """The velocity at x ([b, C, H, W]) and time ([b] in [0, 1]): [b, C, H, W] in x's dtype."""
        return torch.where(self.hole > 0, self.velocity(x, time), self._along_path(time).to(x.dtype))

    def _along_path(self, time: Tensor) -> Tensor:
        if self._end is None:
            return self.path.target(self.data, self.noise, time)
        end = torch.full_like(time, self._end)
        change = self.path.interpolate(self.data, self.noise, end) - self.path.interpolate(self.data, self.noise, time)
        return change / per_image(end - time, change)
