"""Classifier-free guidance: a velocity network and its conditions as one function of (x, t)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from latentflow.errors import ConfigError
from latentflow.shapes import Condition, send


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


class ConditionedVelocity:
    """The velocity of `network` under one condition per image, guided away from the null condition.

        v = v_null + s (v_cond - v_null)    where interval[0] <= t <= interval[1], else v = v_cond

    Classifier-free guidance (arXiv 2207.12598), in a limited interval of time (arXiv 2404.07724). The two
    velocities of an image are computed in one batch.

    Args:
        network: called as network(latents [n, C, H, W], time [n] float32, condition of n images).
        condition: of B images.
        null: the same images without the conditions that guidance strengthens; needed for every scale but 1.
        scale: s >= 0; 1 means no guidance, 0 the unconditional velocity.
        interval: the times in [0, 1] between which guidance acts; each image has its own time.
        guided_channels: guide only the first latent channels, the others keep v_cond; None: guide all of them. The
            published samples of DiT and SiT were drawn with 3.

    Raises:
        ConfigError: see `check_guidance`; also for a scale other than 1 without `null`.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, Condition], Tensor],
        condition: Condition,
        null: Condition | None = None,
        scale: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        guided_channels: int | None = None,
    ):
        check_guidance(scale, interval, guided_channels)
        if scale != 1 and null is None:
            raise ConfigError(f"guidance scale is {scale}, but the model has no null condition; use 1")
        self.network = network
        self.condition = condition
        self.null = null
        self.scale = scale
        self.interval = interval
        self.guided_channels = guided_channels
        self._both = self._joined()
        self._known: float | Tensor | None = None  # the times of the next call, where the caller has them
        self._counter = _Counter()
        self._rows: Tensor | None = None  # which images of the counter these are; None means 0, 1, 2, ...

    @property
    def evaluations(self) -> Tensor:
        """Network calls per image so far, [B] int64 on the CPU; guided ones count twice. Shared with selections."""
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
        self._counter.add(rows, 1 if self._only_null else 1 + inside)
        time = time.float()
        if isinstance(inside, Tensor):
            return self._guided_some(x, time, inside)
        if not inside:
            return self.network(x, time, self.condition).to(x.dtype)
        if self._only_null:
            return self.network(x, time, self.null).to(x.dtype)
        v = self.network(torch.cat([x, x]), torch.cat([time, time]), self._both).to(x.dtype)
        return self._mixed(*v.chunk(2))

    def _guided_some(self, x: Tensor, time: Tensor, inside: Tensor) -> Tensor:
        """The velocity where some images are guided and others are not."""
        batch = len(x)
        if self._only_null:
            rows = send(torch.arange(batch) + batch * inside, x.device)
            return self.network(x, time, self.condition.concatenate(self.null).select(rows)).to(x.dtype)
        guided = send(inside.nonzero().flatten(), x.device)
        v = self.network(
            torch.cat([x, x[guided]]),
            torch.cat([time, time[guided]]),
            self.condition.concatenate(self.null.select(guided)),
        ).to(x.dtype)
        v_cond, v_null = v[:batch], v[batch:]
        return v_cond.index_copy(0, guided, self._mixed(v_cond[guided], v_null))

    def _mixed(self, v_cond: Tensor, v_null: Tensor) -> Tensor:
        mixed = v_null + self.scale * (v_cond - v_null)
        if self.guided_channels is None:
            return mixed
        return torch.cat([mixed[:, : self.guided_channels], v_cond[:, self.guided_channels :]], dim=1)

    def _joined(self) -> Condition | None:
        """The conditions of the doubled batch, made once; None if no batch is doubled."""
        return None if self.scale == 1 or self._only_null else self.condition.concatenate(self.null)

    @property
    def _only_null(self) -> bool:
        """Whether v = v_null inside the interval, so that v_cond is not computed there."""
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


class _Counter:
    """Calls per image, as long as the largest image seen."""

    def __init__(self):
        self.counts = torch.zeros(0, dtype=torch.int64)

    def add(self, rows: Tensor, calls: int | Tensor) -> None:
        missing = max(0, int(rows.max()) + 1 - len(self.counts))
        self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
        self.counts[rows] += calls
