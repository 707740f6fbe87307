"""Times: the distribution that a network is trained on, and the grid that it is integrated on.

t = 0 is data, t = 1 is noise.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from latentflow.errors import ConfigError
from latentflow.records import Record


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times in [0, 1] (any shape) towards noise for `shift` > 1, towards data for `shift` < 1; 0 and 1 stay.

    SD3, arXiv 2403.03206, Eq. 23. The inverse is the shift by 1 / `shift`.
    """
    return (shift * t / (1 + (shift - 1) * t)).clamp(0, 1)


class TrainingTimes(Record):
    """The distribution of training times."""

    distribution: Literal["uniform", "logit_normal"] = Field(
        default="uniform",
        description="uniform on [0, 1] (arXiv 2307.08698), or sigmoid(N(mean, std^2)) (arXiv 2403.03206).",
    )
    mean: float = Field(
        default=0.0, ge=-30, le=30, description="logit_normal: above 0 prefers noise, below 0 prefers data."
    )
    std: float = Field(default=1.0, gt=0, le=30, description="logit_normal: the width, in logits.")
    shift: float = Field(
        default=1.0, gt=0, le=1e4, description="Shift towards noise (above 1), for large latents; 1 is off."
    )
    stratified: bool = Field(
        default=False, description="Spread the times of one global batch evenly: one per quantile."
    )

    def draw(self, uniforms: Tensor, positions: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        """Turn one uniform number per image into its training time.

        Args:
            uniforms: [B] float64 in [0, 1), the only randomness.
            positions: [B] int64, place of each image in the endless stream of training images; for `stratified`.
            batch_size: images in the global batch, over all processes; for `stratified`.

        Returns:
            [B] float32 in [0, 1].

        Raises:
            ValueError: `stratified` without `positions` and `batch_size`.
        """
        quantile = uniforms.double()
        if self.stratified:
            if positions is None or batch_size is None:
                raise ValueError("stratified times need the positions of the images and the global batch size")
            # The rank depends only on the position, so no process needs to know what the others draw.
            rank = positions.to(quantile.device) % batch_size
            quantile = (rank + quantile) / batch_size
        if self.distribution == "logit_normal":
            t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(quantile))
        else:
            t = quantile
        return shift_time(t, self.shift).float()


class TimeBins(NamedTuple):
    """Sums over the images whose time falls into each of n equal bins of [0, 1].

    Attributes:
        sums: [n] float32, sum of the values.
        counts: [n] float32, number of images.
    """

    sums: Tensor
    counts: Tensor


def sum_by_time(times: Tensor, values: Tensor, bins: int = 10) -> TimeBins:
    """Sum `values` ([B]) over `bins` equal bins of their `times` ([B] in [0, 1]), without waiting for the device.

    Sums and counts may be added over steps and processes before they are divided.
    """
    index = (times * bins).long().clamp(0, bins - 1)
    zeros = torch.zeros(bins, device=values.device)
    values = values.detach().float()
    return TimeBins(zeros.index_add(0, index, values), zeros.index_add(0, index, torch.ones_like(values)))


def sampling_times(steps: int, shift: float = 1.0, start: float = 1.0, end: float = 0.0) -> Tensor:
    """The grid of `steps` intervals from `start` (1 is noise) to `end` (0 is data): [steps + 1] float64 on the CPU.

    The grid is even before it is shifted by `shift` (see `shift_time`): above 1 it is finer near noise. With
    `start` < `end` it runs from data to noise. Both ends are exact.

    Raises:
        ConfigError: `steps` < 1, `shift` <= 0, or ends that are equal or outside [0, 1].
    """
    if steps < 1:
        raise ConfigError(f"steps is {steps}: at least 1 step is needed")
    if not (shift > 0 and math.isfinite(shift)):
        raise ConfigError(f"time shift is {shift}: it must be above 0; 1 means no shift")
    if not (0 <= start <= 1 and 0 <= end <= 1 and start != end):
        raise ConfigError(f"cannot integrate from t = {start} to t = {end}: the ends must be two times in [0, 1]")
    first, last = shift_time(torch.tensor([start, end], dtype=torch.float64), 1 / shift).tolist()
    passed = torch.arange(steps + 1, dtype=torch.float64)
    times = shift_time((first * (steps - passed) + last * passed) / steps, shift)
    times[0], times[-1] = start, end
    return times
