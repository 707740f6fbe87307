"""Guidance: a velocity network and its conditions as one function of (x, t)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from latentflow.errors import ConfigError
from latentflow.shapes import Condition, per_image, send

VelocityFunction = Callable[[Tensor, Tensor, Condition], Tensor]
"""Called as network(latents [n, C, H, W], time [n] float32, condition of n images) => [n, C, H, W]."""


Part = TypeVar("Part")


def _present(part: Part | None) -> Part:
    """What `ConditionedVelocity` has wherever it is asked for, as its arguments are checked."""
    assert part is not None
    return part


def check_guidance(
    scale: float, interval: tuple[float, float] = (0.0, 1.0), guided_channels: int | None = None
) -> None:
    """Refuse settings of guidance that mean nothing.

    Raises:
        ConfigError: a scale below 0 or not finite, an interval that is not 0 <= low <= high <= 1, no guided channels.
    """
    low, high = interval
    if not 0 <= scale < float("inf"):
        raise ConfigError(f"guidance scale is {scale}: it must be a number >= 0; 1 means no guidance")
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"guidance interval is {low}..{high}: it must be two times 0 <= low <= high <= 1")
    if guided_channels is not None and guided_channels < 1:
        raise ConfigError(f"guided channels: {guided_channels}; give 1 or more, or none for all")


@dataclass(frozen=True)
class Guide:
    """Another network, whose velocity takes the place of the null velocity.

    Attributes:
        network: for the same latents and times.
        condition: of B images, as this network takes it.
        cost: of one of its calls, in calls of the network that it guides; above 0.
    """

    network: VelocityFunction
    condition: Condition
    cost: float = 1

    def select(self, rows: Tensor) -> Guide:
        """The same guide for the images at `rows` ([b] int64 or [B] bool)."""
        return replace(self, condition=self.condition.select(rows))


def guided_velocity(
    network: VelocityFunction,
    x: Tensor,
    time: Tensor,
    condition: Condition,
    null: Condition,
    scale: Tensor,
    guided_channels: int | None = None,
) -> Tensor:
    """v_cond + (s - 1) (v_cond - v_null) with a scale s of its own for each image: classifier-free guidance.

    Args:
        x: [B, C, H, W].
        time, scale: [B]; where the scale is 1, the result is v_cond.
        condition, null: of B images; the two velocities are computed in one batch.
        guided_channels: guide only the first latent channels; None: all of them.

    Returns:
        [B, C, H, W] in the dtype of x.
    """
    both = network(torch.cat([x, x]), torch.cat([time, time]), condition.concatenate(null)).to(x.dtype)
    v_cond, v_null = both.chunk(2)
    change = per_image(scale - 1, x) * (v_cond - v_null)
    if guided_channels is not None:
        guided = torch.arange(x.shape[1], device=x.device)[:, None, None] < guided_channels
        change = change * guided
    return v_cond + change


class ConditionedVelocity:
    """The velocity of `network` under one condition per image, guided away from the null condition or from a guide.

        v = v_null  + s (v_cond - v_null)     where interval[0] <= t <= interval[1], else v = v_cond
        v = v_guide + s (v_cond - v_guide)    likewise, with a guide

    Classifier-free guidance (arXiv 2207.12598, Eq. 6), in a limited interval of time (arXiv 2404.07724); its two
    velocities of an image are computed in one batch. Autoguidance (arXiv 2406.02507, section 4), whose guide is a worse
    version of the network, and domain guidance (arXiv 2504.01521), whose guide is the network before fine-tuning.

    Args:
        condition: of B images.
        null: the same images without the conditions that guidance strengthens; needed for every scale but 1, unless
            there is a guide.
        scale: s >= 0; 1 means no guidance, 0 the velocity of null condition or guide alone.
        interval: the times in [0, 1] between which guidance acts; each image has its own time.
        guided_channels: guide only the first latent channels, the others keep v_cond; None: guide all of them. The
            published samples of DiT and SiT were drawn with 3.
        guide: takes the place of the null condition.

    Raises:
        ConfigError: see `check_guidance`; also for a scale other than 1 without `null` or `guide`.
    """

    def __init__(
        self,
        network: VelocityFunction,
        condition: Condition,
        null: Condition | None = None,
        scale: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        guided_channels: int | None = None,
        guide: Guide | None = None,
    ):
        check_guidance(scale, interval, guided_channels)
        if scale != 1 and null is None and guide is None:
            raise ConfigError(f"guidance scale is {scale}, but the model has no null condition; use 1")
        self.network = network
        self.condition = condition
        self.null = null
        self.scale = scale
        self.interval = interval
        self.guided_channels = guided_channels
        self.guide = guide
        self._both = self._joined()
        self._known: float | Tensor | None = None  # the times of the next call, where the caller has them
        self._counter = _Counter(torch.int64 if guide is None or guide.cost == 1 else torch.float64)
        self._rows: Tensor | None = None  # which images of the counter these are; None means 0, 1, 2, ...

    @property
    def evaluations(self) -> Tensor:
        """Network calls per image so far, [B] on the CPU; shared with selections.

        A call that is guided by the null condition counts twice (int64), one that is guided by another network as
        1 + `guide.cost` (float64, unless the cost is 1).
        """
        return self._counter.counts

    def at(self, time: float | Tensor) -> ConditionedVelocity:
        """The same velocity, with the time of its next call known on the CPU: nothing is read back from the device.

        Args:
            time: one number for all images, or one for each, [b] on the CPU.
        """
        known = copy.copy(self)
        known._known = time
        return known

    def select(self, rows: Tensor) -> ConditionedVelocity:
        """The same velocity for the images at `rows` ([b] int64 or [B] bool); it adds to the same `evaluations`."""
        selection = copy.copy(self)
        selection.condition = self.condition.select(rows)
        selection.null = None if self.null is None else self.null.select(rows)
        selection.guide = None if self.guide is None else self.guide.select(rows)
        selection._both = selection._joined()
        rows = rows.cpu()
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        selection._rows = rows if self._rows is None else self._rows[rows]
        return selection

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        """The velocity at x ([b, C, H, W]) and time ([b] in [0, 1]): [b, C, H, W] in x's dtype."""
        inside = self._inside(time)
        rows = torch.arange(len(x)) if self._rows is None else self._rows
        cost = 1 if self.guide is None or self.guide.cost == 1 else self.guide.cost
        guided = inside.to(self._counter.counts.dtype) if isinstance(inside, Tensor) else inside
        self._counter.add(rows, 1 + (cost - self._only_null) * guided)
        time = time.float()
        if self.guide is not None:
            return self._guided_by_other(x, time, inside)
        if isinstance(inside, Tensor):
            return self._guided_some(x, time, inside)
        if not inside:
            return self.network(x, time, self.condition).to(x.dtype)
        if self._only_null:
            return self.network(x, time, _present(self.null)).to(x.dtype)
        v = self.network(torch.cat([x, x]), torch.cat([time, time]), _present(self._both)).to(x.dtype)
        return self._mixed(*v.chunk(2))

    def _guided_some(self, x: Tensor, time: Tensor, inside: Tensor) -> Tensor:
        """The velocity where some images are guided and others are not."""
        batch, null = len(x), _present(self.null)
        if self._only_null:
            rows = send(torch.arange(batch) + batch * inside, x.device)
            return self.network(x, time, self.condition.concatenate(null).select(rows)).to(x.dtype)
        guided = send(inside.nonzero().flatten(), x.device)
        v = self.network(
            torch.cat([x, x[guided]]),
            torch.cat([time, time[guided]]),
            self.condition.concatenate(null.select(guided)),
        ).to(x.dtype)
        v_cond, v_null = v[:batch], v[batch:]
        return v_cond.index_copy(0, guided, self._mixed(v_cond[guided], v_null))

    def _guided_by_other(self, x: Tensor, time: Tensor, inside: bool | Tensor) -> Tensor:
        """The velocity with a guide, which is called for the guided images only."""
        guide = _present(self.guide)
        if not isinstance(inside, Tensor):
            if inside and self._only_null:
                return guide.network(x, time, guide.condition).to(x.dtype)
            own = self.network(x, time, self.condition).to(x.dtype)
            return self._mixed(own, guide.network(x, time, guide.condition).to(x.dtype)) if inside else own
        guided = send(inside.nonzero().flatten(), x.device)
        other = guide.network(x[guided], time[guided], guide.condition.select(guided)).to(x.dtype)
        if not self._only_null:
            own = self.network(x, time, self.condition).to(x.dtype)
            return own.index_copy(0, guided, self._mixed(own[guided], other))
        rest = send((~inside).nonzero().flatten(), x.device)
        own = self.network(x[rest], time[rest], self.condition.select(rest)).to(x.dtype)
        return torch.empty_like(x).index_copy(0, guided, other).index_copy(0, rest, own)

    def _mixed(self, v_cond: Tensor, v_null: Tensor) -> Tensor:
        mixed = v_null + self.scale * (v_cond - v_null)
        if self.guided_channels is None:
            return mixed
        return torch.cat([mixed[:, : self.guided_channels], v_cond[:, self.guided_channels :]], dim=1)

    def _joined(self) -> Condition | None:
        """The conditions of the doubled batch, made once; None if no batch is doubled."""
        single = self.scale == 1 or self._only_null or self.guide is not None
        return None if single else self.condition.concatenate(_present(self.null))

    @property
    def _only_null(self) -> bool:
        """Whether v = v_null (or v_guide) inside the interval, so that v_cond is not computed there."""
        return self.scale == 0 and self.guided_channels is None

    def _inside(self, time: Tensor) -> bool | Tensor:
        """Whether all images are guided at their `time`, or which are: [b] bool on the CPU."""
        if self.scale == 1 or self.interval == (0.0, 1.0):
            return self.scale != 1
        low, high = self.interval
        known = time.cpu() if self._known is None else self._known
        if not isinstance(known, Tensor):
            return low <= known <= high
        inside = (known >= low) & (known <= high)
        return bool(inside.all()) if inside.all() or not inside.any() else inside


class AverageVelocity(ConditionedVelocity):
    """The average velocity of a student under one condition per image; one call costs one evaluation, guided or not.

    The guidance scale is an input of the network. Called as it is, this is the velocity at a time; `towards` makes it
    the average velocity from there to another time, of which one step is exact.

    Args:
        condition: of B images; with `guidance` where the network takes it.
    """

    def __init__(self, network: VelocityFunction, condition: Condition):
        super().__init__(network, condition)
        self._end: float | None = None

    def towards(self, end: float) -> AverageVelocity:
        """The average velocity from the time t of a call to the time `end` = s <= t; it adds to the same count."""
        jumping = copy.copy(self)
        jumping._end = end
        return jumping

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        """The average velocity at x ([b, C, H, W]) and time ([b] in [0, 1]): [b, C, H, W] in x's dtype."""
        span = torch.zeros_like(time) if self._end is None else time - self._end
        spanned = copy.copy(self)
        spanned.condition = replace(self.condition, span=span.float())
        return super(AverageVelocity, spanned).__call__(x, time)


class _Counter:
    """Calls per image, as long as the largest image seen."""

    def __init__(self, dtype: torch.dtype):
        self.counts = torch.zeros(0, dtype=dtype)

    def add(self, rows: Tensor, calls: float | Tensor) -> None:
        missing = max(0, int(rows.max()) + 1 - len(self.counts))
        self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
        self.counts[rows] += calls
