"""A velocity network made into a function of (x, t), with classifier-free guidance."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from latentflow.errors import ConfigError
from latentflow.shapes import Condition


class ConditionedVelocity:
    """The velocity of `network` under one condition per image, guided away from the null condition.

        v = v_null + s (v_cond - v_null)    where interval[0] <= t <= interval[1], else v = v_cond

    Classifier-free guidance (arXiv 2207.12598), in a limited interval of time (arXiv 2404.07724). The two
    velocities of an image are computed in one batch.

    Args:
        network: called as network(latents [n, C, H, W], time [n] float32, condition of n images).
        condition: what each of the B images is told.
        null: the null condition of the same images; needed for every scale but 1.
        scale: s >= 0; 1 means no guidance, 0 the null velocity alone.
        interval: the times in [0, 1] between which guidance acts; each image has its own time.
        guided_channels: guidance acts on the first channels alone, the others stay v_cond; None: on all, as it should.
            The published samples of DiT and SiT were drawn with 3.

    Raises:
        ConfigError: a negative scale, an interval that is not 0 <= low <= high <= 1, no null condition, or no channels.
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
        low, high = interval
        if not 0 <= scale < float("inf"):
            raise ConfigError(f"guidance scale is {scale}: it must be a number >= 0; 1 means no guidance")
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"guidance interval is {low}..{high}: it must be two times 0 <= low <= high <= 1")
        if scale != 1 and null is None:
            raise ConfigError(f"guidance scale is {scale}, but the model has no null condition; use 1")
        if guided_channels is not None and guided_channels < 1:
            raise ConfigError(f"guided channels: {guided_channels}; give 1 or more, or none for all")
        self.network = network
        self.condition = condition
        self.null = null
        self.scale = scale
        self.interval = (low, high)
        self.guided_channels = guided_channels
        self._counter = _Counter()
        self._rows: Tensor | None = None  # which images of the counter these are; None means 0, 1, 2, ...

    @property
    def evaluations(self) -> Tensor:
        """Network calls per image so far, [B] int64 on the CPU; guided ones count twice. Shared with selections."""
        return self._counter.counts

    def select(self, rows: Tensor) -> ConditionedVelocity:
        """The same velocity for the images at `rows` ([b] int64 or [B] bool); it adds to the same `evaluations`."""
        selection = copy.copy(self)
        selection.condition = self.condition.select(rows)
        selection.null = None if self.null is None else self.null.select(rows)
        rows = rows.cpu()
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        selection._rows = rows if self._rows is None else self._rows[rows]
        return selection

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        """The velocity at x ([b, C, H, W]) and time ([b] in [0, 1]): [b, C, H, W] in x's dtype."""
        inside = self._inside(time)
        time = time.float()
        batch = len(x)
        self._counter.add(
            torch.arange(batch) if self._rows is None else self._rows,
            torch.ones(batch, dtype=torch.int64) if self._is_null_alone else 1 + inside.long(),
        )
        if not inside.any():
            return self.network(x, time, self.condition).to(x.dtype)
        if self._is_null_alone:
            told = (torch.arange(batch) + batch * inside).to(x.device, non_blocking=True)
            return self.network(x, time, self.condition.concatenate(self.null).select(told)).to(x.dtype)
        guided = inside.nonzero().flatten().to(x.device, non_blocking=True)
        v = self.network(
            torch.cat([x, x[guided]]),
            torch.cat([time, time[guided]]),
            self.condition.concatenate(self.null.select(guided)),
        ).to(x.dtype)
        v_cond, v_null = v[:batch], v[batch:]
        mixed = v_null + self.scale * (v_cond[guided] - v_null)
        if self.guided_channels is not None:
            mixed = torch.cat([mixed[:, : self.guided_channels], v_cond[guided][:, self.guided_channels :]], dim=1)
        return v_cond.index_copy(0, guided, mixed)

    @property
    def _is_null_alone(self) -> bool:
        """Whether v = v_null, so that v_cond need not be computed."""
        return self.scale == 0 and self.guided_channels is None

    def _inside(self, time: Tensor) -> Tensor:
        """Which images are guided at their `time`: [b] bool on the CPU. Only a true interval waits for the device."""
        if self.scale == 1 or self.interval == (0.0, 1.0):
            return torch.full(time.shape, self.scale != 1)
        low, high = self.interval
        return ((time >= low) & (time <= high)).cpu()


class _Counter:
    """Calls per image, as long as the largest image seen."""

    def __init__(self):
        self.counts = torch.zeros(0, dtype=torch.int64)

    def add(self, rows: Tensor, calls: Tensor) -> None:
        missing = max(0, int(rows.max()) + 1 - len(self.counts))
        self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
        self.counts[rows] += calls
