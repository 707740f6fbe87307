"""The loss on held-out images while a network is trained, and the weights with which it was lowest.

Each measurement has the same images, times, noises and dropped conditions, which cancel in the difference of two.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentflow.artifacts import restore
from latentflow.console import notice
from latentflow.data.batches import Batch, TrainingImages
from latentflow.flow.times import TrainingTimes, sum_by_time
from latentflow.model.flow_model import CONFIG_FILE, FlowModel, read_config
from latentflow.model.snapshots import BEST
from latentflow.networks.in_training import frozen_parameters
from latentflow.networks.running import borrowed_weights
from latentflow.randomness import derive_seed
from latentflow.training.config import TrainingConfig
from latentflow.training.log import NUM_TIME_BINS, bin_names
from latentflow.training.step import training_step

LEAST_DRAWS, MOST_DRAWS, DRAWS_PER_IMAGE = 64, 512, 16
COST = 0.02
"""The share of a run's computation that measuring takes at most, where a forward pass is a third of a training step."""

_RISE = 0.02  # of the held-out loss, with which it is certain to have turned


@dataclass(frozen=True)
class BestWeights:
    """The lowest held-out loss so far.

    Attributes:
        step: steps done then.
        loss: on the held-out images.
    """

    step: int
    loss: float


class HeldOutWatch:
    """Measures averaged weights on held-out images, and keeps those with the lowest loss as `RUN@best`.

    The first of several processes keeps them: in memory until the next checkpoint, and on disk before it. So a run that
    is killed goes on with what it had.

    Args:
        model: whose network is trained; its config, with step and images seen, is stored with the weights.
        images: held out; see `TrainingImages.only`.
        run: the run folder.
        times: the distribution that is trained on: the loss is a mean over it.
        config: of the recipe.
        micro_batch_size: images computed together.
        is_resumed: whether the run goes on after a checkpoint, and so with the best weights on disk.
    """

    def __init__(
        self,
        model: FlowModel,
        images: TrainingImages,
        run: Path,
        times: TrainingTimes,
        config: TrainingConfig,
        *,
        micro_batch_size: int,
        is_resumed: bool,
    ):
        self.model, self.images, self.run, self.runtime = model, images, run, model.runtime
        self.num_draws = min(max(DRAWS_PER_IMAGE * len(images), LEAST_DRAWS), MOST_DRAWS)
        self.every = steps_between(self.num_draws, config)
        self.steps, self.size = config.steps, micro_batch_size
        self.seed = derive_seed(config.seed, "held out")
        self.weights = _shares_of_bins(times)
        self._remembered: dict[range, Batch] = {}
        self._taken: tuple[FlowModel, _Copy] | None = None
        self.best = read_best(run) if is_resumed and self.runtime.is_main else None

    def is_due(self, step: int) -> bool:
        """Whether to measure after `step` steps, of those with a line in the log."""
        return step % self.every == 0 or step == self.steps

    def measure(self, average: Mapping[str, Tensor], step: int, images_seen: int) -> dict[str, Any]:
        """Measure averaged weights, and keep them if they are the best; returns numbers for the log.

        All processes call it, and each computes a share.
        """
        began = time.perf_counter()
        sums = torch.zeros(2, NUM_TIME_BINS, device=self.model.device)
        with borrowed_weights(self.model.network, average), torch.no_grad():
            for positions in self._parts:
                result = training_step(
                    self.model,
                    self.model.network,
                    self._batch(positions),
                    times=TrainingTimes(stratified=True),
                    batch_size=self.num_draws,
                    seed=self.seed,
                )
                sums += torch.stack(sum_by_time(result.time, result.velocity_loss, NUM_TIME_BINS))
        total, counts = self.runtime.sum(sums).double().cpu()
        means = total / counts
        loss = float((self.weights * means).sum())
        if self.runtime.is_main:
            self._compare(loss, average, step, images_seen)
        by_time = dict(zip(bin_names(), means.tolist(), strict=True))
        seconds = round(time.perf_counter() - began, 3)
        return {"held_out_loss": loss, "held_out_loss_by_time": by_time, "held_out_seconds": seconds}

    def write_best(self) -> Callable[[], None]:
        """A function that writes the best weights, if there are newer ones than on disk; to be called in any thread."""
        taken, self._taken = self._taken, None

        def write() -> None:
            if taken is not None:
                model, weights = taken
                model.save_pretrained(self.run / BEST, weights=weights.ready())

        return write

    @cached_property
    def _parts(self) -> list[range]:
        """The positions that this process measures, as many at a time as in training."""
        share = -(-self.num_draws // self.runtime.world)
        own = range(self.num_draws)[self.runtime.rank * share : (self.runtime.rank + 1) * share]
        parts = (own[start : start + self.size] for start in range(0, len(own), self.size))
        return [part for some in parts for part in self.images.parts(some)]

    def _batch(self, positions: range) -> Batch:
        """The batch at some positions. What would have to be decoded is encoded once, and remembered."""
        if not self.images.decodes:
            return self.images.at(positions)
        if positions not in self._remembered:
            batch = self.images.at(positions)
            encoded = {"moments": batch.pixels, "known_moments": batch.known_pixels}
            encode, device = self.model.moments, self.model.device
            moments = {n: encode(x.to(device)).cpu() for n, x in encoded.items() if x is not None}
            self._remembered[positions] = replace(batch, pixels=None, known_pixels=None, **moments)
        return self._remembered[positions]

    def _compare(self, loss: float, average: Mapping[str, Tensor], step: int, images_seen: int) -> None:
        """Take the weights if they are the best so far, or say that the loss has turned."""
        if not math.isfinite(loss):
            return
        best = self.best
        if best is None or loss < best.loss:
            self.best = BestWeights(step, loss)
            done = {"step": step, "images_seen": images_seen, "held_out_loss": loss}
            model, config = copy.copy(self.model), self.model.config
            model.config = config.model_copy(update={"training": config.training.model_copy(update=done)})
            self._taken = (model, _Copy(average, frozen_parameters(self.model.network)))
        elif loss > (1 + _RISE) * best.loss:
            notice(
                f"held-out loss rises: {best.loss:.4f} after step {best.step:,}, {loss:.4f} after step {step:,}; "
                f"{self.run}@{BEST} keeps the former",
                kind=f"held-out loss of {self.run} after step {best.step}",
            )


def steps_between(num_draws: int, config: TrainingConfig) -> int:
    """Steps between two measurements: lines of the log, as far apart that they take `COST` of a run at most."""
    least = math.ceil(num_draws / (3 * COST * config.batch_size))
    return -(-least // config.log_every) * config.log_every


def read_best(run: Path) -> BestWeights | None:
    """The step and the held-out loss of the weights that a run has kept as its best; None: none."""
    restore(run / BEST)
    if not (run / BEST / CONFIG_FILE).is_file():
        return None
    training = read_config(run / BEST).training
    return None if training.held_out_loss is None else BestWeights(training.step, training.held_out_loss)


def _shares_of_bins(times: TrainingTimes) -> Tensor:
    """The share of training times in each bin, [bins] float64."""
    quantiles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    drawn = times.model_copy(update={"stratified": False}).draw(quantiles)
    return sum_by_time(drawn, torch.ones_like(drawn), NUM_TIME_BINS).counts.double() / len(drawn)


class _Copy:
    """A copy of weights on the host, which the host does not wait for; frozen ones are not copied."""

    def __init__(self, weights: Mapping[str, Tensor], frozen: Collection[str]):
        self._copies = {name: weights[name] for name in frozen}
        self._made = None
        for name, tensor in weights.items():
            if name in self._copies:
                continue
            place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name] = place.copy_(tensor, non_blocking=tensor.is_cuda)
            if tensor.is_cuda:
                self._made = torch.cuda.current_stream(tensor.device).record_event()

    def ready(self) -> dict[str, Tensor]:
        """The copies once they are complete."""
        if self._made is not None:
            self._made.synchronize()
        return self._copies
