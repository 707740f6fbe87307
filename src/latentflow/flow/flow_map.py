"""The objective of a student that jumps: it learns average velocities from the velocity of a trained model.

The average velocity u(x, t, s) between two times t > s takes a point of a trajectory in one step to another of its
points, whatever their distance, and u(x, t, t) is the velocity v(x, t) itself:

    x_s = x_t + (s - t) u(x_t, t, s)                              u(x_t, t, s) = mean of v(x_r, r) over s <= r <= t

A jump from t to s is a jump to a time l in between, and one from there to s. With l = t + a (s - t), this is

    u(x_t, t, s) = a u(x_t, t, l) + (1 - a) u(x_l, l, s)

in which the first jump is short, so that v of the teacher takes the place of u(x_t, t, l), and the second is by the
student itself, without gradient (SoFlow, arXiv 2512.15657; alpha-Flow, arXiv 2510.20771). No derivative in time is
needed. a = 1 is flow matching with the velocity of the teacher as the target, and s = t as well.

Legend: B images; t = 0 is data, t = 1 is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import Field, model_validator
from torch import Tensor

from latentflow.errors import ConfigError
from latentflow.flow.times import TrainingTimes
from latentflow.records import Record
from latentflow.shapes import image_mean, per_image

AverageFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""u(x, t, s): called with x [B, ...] and the times t and s [B], where t >= s."""

LEAST_STEP = 1e-4
"""The shortest jump to learn, and the shortest first part of one."""
_OFFSET = 0.01  # of the weight, which is at most its inverse


def average_target(
    average: AverageFunction, velocity: Tensor, x: Tensor, time: Tensor, end: Tensor, share: Tensor
) -> Tensor:
    """What u(x, t, s) is to be: u* = a v + (1 - a) sg[u(x_l, l, s)], with l = t + a (s - t) and x_l = x + (l - t) v.

    Args:
        average: u of the student; called without gradient.
        velocity: [B, ...], v at x and `time`, of the teacher.
        x: [B, ...].
        time, end: [B], t and s, where t >= s.
        share: [B] in (0, 1], a; where it is 1, the result is the velocity.

    Returns:
        [B, ...] in the dtype of x, without gradient.
    """
    with torch.no_grad():
        between = time + share * (end - time)
        x_between = x + per_image(between - time, x) * velocity
        return torch.lerp(average(x_between, between, end).to(x.dtype), velocity, per_image(share, x))


def average_loss(predicted: Tensor, target: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each image, w mean |u - u*|^2 / a with w = 1 / (e + 0.01), and its error e = mean |(u - u*) / a|^2.

    The weight w has no gradient. It balances times whose errors differ by orders of magnitude (SoFlow, arXiv
    2512.15657); 1 / a makes up for u* lying closer to u, the shorter the first part of the jump is.

    Args:
        predicted: [B, ...], u, with its graph.
        target: [B, ...], u*.
        share: [B] in (0, 1], a.

    Returns:
        Loss and error, [B] each, in float32 at least; the error has no gradient.
    """
    dtype = torch.promote_types(target.dtype, torch.float32)
    square, share = image_mean((predicted.to(dtype) - target.to(dtype)).square()), share.to(dtype)
    error = square.detach() / share.square()
    return square / share / (error + _OFFSET), error


class JumpTimes(Record):
    """From where to where a student learns to jump, and how much of a jump is the teacher's."""

    every: int = Field(
        2, ge=2, le=1000, description="One image in so many teaches jumps; the others teach the velocity, s = t."
    )
    velocity: TrainingTimes = Field(
        TrainingTimes(distribution="logit_normal", mean=-0.2, std=1.0),
        description="Times of the images that teach the velocity of the teacher.",
    )
    start: TrainingTimes = Field(TrainingTimes(), description="Times t of the images that teach jumps from t to s.")
    end: TrainingTimes = Field(TrainingTimes(), description="Their times s; where s is above t, the two are swapped.")
    first_share: float = Field(
        0.1, gt=0, le=1, description="Share a of a jump that is the teacher's, in the first step."
    )
    last_share: float = Field(
        0.02,
        gt=0,
        le=1,
        description="The same in the last step; in between it falls exponentially. Far below 0.02 it may diverge.",
    )

    @model_validator(mode="after")
    def _check(self) -> JumpTimes:
        for name in ("velocity", "start", "end"):
            if getattr(self, name).stratified:
                raise ConfigError(f"{name}.stratified = true: the times of jumps are drawn one by one; set it to false")
        if self.last_share > self.first_share:
            raise ConfigError(
                f"last_share = {self.last_share:g} is above first_share = {self.first_share:g}: the share falls; swap "
                "the two"
            )
        return self

    def rows(self, number: int, device: torch.device) -> Tensor:
        """The images of a batch of `number` that teach jumps, [number // every] int64: every so many, the last one."""
        return torch.arange(self.every - 1, number, self.every, device=device)

    def draw(self, first: Tensor, second: Tensor, jumps: Tensor) -> tuple[Tensor, Tensor]:
        """Turn two uniform numbers per image into its times t and s.

        Args:
            first, second: [B] float64 in [0, 1).
            jumps: [B] bool; where it is false, s = t.

        Returns:
            t and s, [B] float32 in [0, 1]; where `jumps`, t is above s by `LEAST_STEP` at least.
        """
        start, end = self.start.draw(first), self.end.draw(second)
        later = torch.maximum(start, end).clamp(min=LEAST_STEP)
        earlier = torch.minimum(torch.minimum(start, end), later - LEAST_STEP)
        time = self.velocity.draw(first)
        return torch.where(jumps, later, time), torch.where(jumps, earlier, time)

    def share_at(self, progress: Tensor) -> Tensor:
        """a after this share of a run: [B] in [0, 1] => [B] float32."""
        fall = math.log(self.last_share / self.first_share)
        return (self.first_share * (fall * progress.clamp(0, 1)).exp()).float()

    def shares(self, progress: Tensor, time: Tensor, end: Tensor) -> Tensor:
        """a of each image, such that the first part of its jump is no shorter than `LEAST_STEP`; 1 where s = t.

        Args:
            progress: [B] in [0, 1], the share of the run that is done.
            time, end: [B], t and s.
        """
        least = LEAST_STEP / (time - end).clamp(min=LEAST_STEP)
        return torch.where(time > end, torch.maximum(self.share_at(progress), least), 1.0)
