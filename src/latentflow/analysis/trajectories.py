"""How straight the trajectories from noise to data are, which limits how few steps a model can be sampled in.

Along dx/dt = v(x, t) from t = 1 to t = 0 an image moves by the chord x_1 - x_0. If v were equal to the chord at all
times, one Euler step would be exact (arXiv 2209.03003, which calls the integral below the straightness).

Legend: B images, K steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentflow.errors import DataError, NonFiniteError
from latentflow.flow.solvers import integrate


@dataclass(frozen=True)
class Trajectories:
    """The shapes of B trajectories; all tensors but `ends` are float64 on the CPU.

    Attributes:
        times: [K + 1], in the order of integration.
        ends: [B, ...], the final states, on the device of the velocity.
        excess: [B], the mean over time of |v - chord|^2, squares summed over the elements of an image.
        energy: [B], the mean over time of |v|^2 = |chord|^2 + excess.
        speeds: [B, K + 1], |v| at each time.
        turning: [B, K], angle between the velocities at the two ends of a step, in radians per unit of time.
    """

    times: Tensor
    ends: Tensor
    excess: Tensor
    energy: Tensor
    speeds: Tensor
    turning: Tensor

    @property
    def straightness(self) -> Tensor:
        """[B], `excess` over `energy`: 0 for a straight trajectory at constant speed, 1 for a closed one."""
        return torch.where(self.energy > 0, self.excess / self.energy, 0.0)

    @property
    def total_turning(self) -> Tensor:
        """[B], the sum of all angles in radians: 0 for a straight trajectory, pi for half a circle."""
        return (self.turning * self.times.diff().abs()).sum(1)

    @property
    def middles(self) -> Tensor:
        """[K], the time in the middle of each step, which `turning` belongs to."""
        return (self.times[1:] + self.times[:-1]) / 2

    def __add__(self, other: Trajectories) -> Trajectories:
        """The trajectories of two batches.

        Raises:
            DataError: they were not followed at the same times.
        """
        if not torch.equal(self.times, other.times):
            raise DataError("only trajectories that were followed at the same times can be joined")
        names = ("ends", "excess", "energy", "speeds", "turning")
        return Trajectories(self.times, *(torch.cat([getattr(self, name), getattr(other, name)]) for name in names))


@torch.no_grad()
def follow(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, times: Tensor, *, solver: str = "heun"
) -> Trajectories:
    """Integrate dx/dt = `velocity` from `noise`, and evaluate the velocity at every time of the grid.

    The means over time are those of the trapezoid rule, whose error falls as the square of the step.

    Args:
        velocity: a function of x [B, ...] and t [B].
        noise: [B, ...], the states at times[0].
        times: [K + 1], falling or rising, such as `flow.times.sampling_times(50)`.
        solver: a fixed-step solver; K + 1 evaluations come on top of its own.

    Raises:
        DataError: no images.
        ConfigError: times or a solver that cannot be used.
        NonFiniteError: a velocity is not finite.
    """
    if not len(noise):
        raise DataError("there are no trajectories to follow: the batch is empty")
    grid = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    states = [noise]
    solution = integrate(velocity, noise, grid, solver=solver, callback=lambda step, time, x: states.append(x))
    clock = torch.float32 if noise.device.type == "mps" else torch.float64
    velocities = []
    for state, time in zip(states, grid.tolist(), strict=True):
        v = velocity(state, torch.full((len(state),), time, dtype=clock, device=state.device))
        velocities.append(v.flatten(1).cpu().double())
        if not velocities[-1].isfinite().all():
            raise NonFiniteError(f"the velocity at t = {time:.6g} is not finite")
    v = torch.stack(velocities, 1)  # [B, K + 1, elements]
    span = grid[-1] - grid[0]
    chord = (solution.x.cpu().double() - noise.cpu().double()).flatten(1)[:, None] / span
    weights = grid.diff().abs()  # of the trapezoid rule, summing to 1
    weights = (torch.cat([weights, weights.new_zeros(1)]) + torch.cat([weights.new_zeros(1), weights])) / 2
    weights = weights / span.abs()
    speeds = v.norm(dim=2)
    return Trajectories(
        times=grid,
        ends=solution.x,
        excess=(v - chord).square().sum(2) @ weights,
        energy=speeds.square() @ weights,
        speeds=speeds,
        turning=_angles(v[:, 1:], v[:, :-1]) / grid.diff().abs(),
    )


def _angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between vectors [..., n], in [0, pi]; 0 where one of them is 0.

    2 atan2(|a - b|, |a + b|) of unit vectors a and b keeps all digits of small angles, where the arccosine loses half.
    """
    lengths = torch.stack([first.norm(dim=-1), second.norm(dim=-1)])
    a, b = first / lengths[0].clamp(min=1e-300)[..., None], second / lengths[1].clamp(min=1e-300)[..., None]
    angles = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
    return torch.where((lengths > 0).all(0), angles, 0.0)
