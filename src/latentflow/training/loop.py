"""The training loop, for whatever learns from images: a velocity network, a first stage.

Read `run_loop` from top to bottom: restore, then for each step read, compare, step, average, log, save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from latentflow.data.batches import Batch, StreamPositions, TrainingImages, stream_batches
from latentflow.data.prefetch import lost_workers
from latentflow.errors import ConfigError
from latentflow.networks.graphs import cuda_graph
from latentflow.networks.in_training import sampled_part
from latentflow.networks.running import compile_blocks
from latentflow.runtime import Runtime
from latentflow.training.captured_step import CapturedPasses
from latentflow.training.checkpoint import (
    CheckpointWriter,
    Keeping,
    Progress,
    SaveModel,
    clean_up,
    load_checkpoint,
    newest_checkpoint,
)
from latentflow.training.config import TrainingConfig
from latentflow.training.ema import EMA
from latentflow.training.guard import FiniteGuard
from latentflow.training.interruption import Outcome, SharedStop, collected_signals, ended_at_once
from latentflow.training.log import Clock, RunLog
from latentflow.training.optim import (
    OptimizerConfig,
    build_optimizer,
    clip_gradients,
    loss_scaler,
    prepare_step,
    scaler_state,
)
from latentflow.training.step import StepLosses


@dataclass(frozen=True)
class MicroBatches:
    """How an optimizer step is split: each process computes `number` micro-batches of `size` images."""

    size: int
    number: int


def micro_batches(config: TrainingConfig, runtime: Runtime) -> MicroBatches:
    """The micro-batches of one optimizer step of one process.

    Raises:
        ConfigError: the batch cannot be split evenly.
    """
    size = config.micro_batch_size or max(config.batch_size // runtime.world, 1)
    together = size * runtime.world
    if config.batch_size % together:
        raise ConfigError(
            f"training.batch_size = {config.batch_size} cannot be shared by {runtime.world} processes in "
            f"micro-batches of {size}; use a multiple of {together}"
        )
    return MicroBatches(size, config.batch_size // together)


class Meter(Protocol):
    """Sums the results of steps on the device between two lines of the log."""

    def add(self, result: Any) -> None:
        """Take in one micro-batch."""

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Means for the log, among them "loss"; `reduce` sums a tensor over all processes."""


class Pace(Protocol):
    """The part of a recipe that the loop follows."""

    steps: int
    batch_size: int
    ema_decay: float
    log_every: int

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""


class Watch(Protocol):
    """Measures averaged weights between steps, where a line of the log is due."""

    def is_due(self, step: int) -> bool:
        """Whether to measure after `step` steps."""

    def measure(self, average: Mapping[str, Tensor], step: int, images_seen: int) -> dict[str, Any]:
        """Numbers for the log; called in every process."""

    def write_best(self) -> Callable[[], None]:
        """A function that writes what has to be on disk before the next checkpoint; it may run in another thread."""


@dataclass(frozen=True)
class Job:
    """What the loop trains, and what it writes on the way.

    Attributes:
        network: in training mode, on the device of `runtime`.
        compare: (network, batch) => the losses of the batch.
        meter: makes the sums for the next line of the log, on a device.
        images: what is trained on.
        run: the run folder, for checkpoints and metrics.
        runtime: where it is trained, and with how many processes.
        config, optimizer: the parts of the recipe that the loop follows.
        parts: how each process splits an optimizer step.
        num_workers: processes that read ahead; see `stream_batches`.
        compiles: whether to compile the network's blocks, given the number of images left.
        captures: whether a step of one micro-batch becomes one CUDA graph.
        before_save: prepares for a checkpoint, while none is being written.
        save_model: writes the model folder that goes with a checkpoint.
        keeping: which checkpoints and averages stay on disk.
        watch: measures on images that are not trained on; None: there are none.
        ema_lengths: of the power function averages next to the exponential one.
        after_step: called in every process with the averaged weights and the number of steps done.
        track: the tracker that gets the numbers of the log; None: TensorBoard where it is installed.
    """

    network: nn.Module
    compare: Callable[[nn.Module, Batch], StepLosses]
    meter: Callable[..., Meter]
    images: TrainingImages
    run: Path
    runtime: Runtime
    config: Pace
    optimizer: OptimizerConfig
    parts: MicroBatches
    num_workers: int | None
    keeping: Keeping
    compiles: Callable[[int], bool] = lambda images_left: False
    captures: bool = False
    before_save: Callable[[Progress], None] = lambda progress: None
    save_model: SaveModel | None = None
    watch: Watch | None = None
    ema_lengths: Sequence[float] = ()
    after_step: Callable[[Mapping[str, Tensor], int], None] = lambda average, step: None
    track: str | None = None


class Learner:
    """A network with everything that trains it, as the newest complete checkpoint of the run left it."""

    def __init__(self, job: Job):
        self.job, self.network, self.parameters = job, job.network, list(job.network.parameters())
        self.ema = EMA(sampled_part(job.network), job.config.ema_decay, job.ema_lengths)
        self.optimizer = build_optimizer(job.network, job.optimizer)
        newest = newest_checkpoint(job.run)
        self.is_resumed = newest is not None
        self.progress = load_checkpoint(newest, job.network, self.ema, self.optimizer) if newest else Progress()
        self.scaler = loss_scaler(job.runtime, self.progress.loss_scale, self.progress.growth_tracker)
        scaled = self.scaler.is_enabled()
        self.guard = FiniteGuard(self.optimizer, job.runtime, scaled=scaled, remedy=job.optimizer.gentler)
        self.wrapped = _distributed(job.network, job.runtime)
        self.passes: Callable[[Batch], StepLosses] = self._passes
        if job.captures:
            self.passes = CapturedPasses(self._passes, self.parameters, job.runtime.device, cuda_graph)

    def backward(self, read: Sequence[Batch], meter: Meter) -> list[Tensor]:
        """Forward and backward passes of the micro-batches of one step; returns the losses [B] of each."""
        losses = []
        for number, batch in enumerate(read, start=1):
            with _exchange_gradients(self.wrapped, number == len(read)):
                result = self.passes(batch)
            meter.add(result)
            losses.append(result.loss.detach())
        return losses

    def _passes(self, batch: Batch) -> StepLosses:
        """Forward and backward pass of one micro-batch."""
        result = self.job.compare(self.wrapped, batch)
        self.scaler.scale(result.loss.mean() / self.job.parts.number).backward()
        return result

    def update(self, read: Sequence[Batch], losses: Sequence[Tensor]) -> tuple[float, Tensor]:
        """Clip, step and average, if the gradient is finite; returns the learning rate and the gradient norm."""
        step, batch_size = self.progress.step, self.job.config.batch_size
        rate = prepare_step(self.optimizer, self.job.optimizer, step, self.job.config.steps)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.job.optimizer.clip_norm)
        self.guard.watch(norm, losses, step, [batch.positions for batch in read])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(step)
        self.progress = replace(self.progress, step=step + 1, images_seen=self.progress.images_seen + batch_size)
        return rate, norm

    def watched(self) -> dict[str, Any]:
        """The numbers of `job.watch`, where it is due."""
        watch, progress = self.job.watch, self.progress
        if watch is None or not watch.is_due(progress.step):
            return {}
        return watch.measure(self.ema.average, progress.step, progress.images_seen)

    def save(self, writer: CheckpointWriter) -> None:
        """Begin to write a checkpoint."""
        writer.wait()
        self.job.before_save(self.progress)
        scale, tracker = scaler_state(self.scaler)
        progress = replace(self.progress, loss_scale=scale, growth_tracker=tracker)
        before = [self.job.watch.write_best()] if self.job.watch else []
        writer.save(progress, self.network, self.ema, self.optimizer, before)


def run_loop(job: Job) -> tuple[Outcome, Mapping[str, Tensor]]:
    """Train until the last step, or until SIGTERM or Ctrl-C; returns how it ended, and the averaged weights.

    The newest complete checkpoint in the run folder is continued exactly: on the CPU the weights equal those of an
    uninterrupted run bit for bit.

    Raises:
        NonFiniteError: a gradient was not finite; the weights are those from before that step.
    """
    config, runtime, learner = job.config, job.runtime, Learner(job)
    batches = _open_stream(job, first_position=learner.progress.images_seen)
    if is_compiling := job.compiles((config.steps - learner.progress.step) * config.batch_size):
        compile_blocks(job.network)
    log = _open_log(job, learner.progress if learner.is_resumed else None)
    if runtime.is_main:
        clean_up(job.run, job.keeping, learner.progress.step)
    meter, clock, saved_at, stopping = job.meter(runtime.device), Clock(), learner.progress.step, False
    with (
        log,
        closing(batches),
        lost_workers(job.num_workers),
        runtime.float32_policy(),
        collected_signals() as received,
        CheckpointWriter(job.run, runtime.device, job.keeping, job.save_model) as writer,
    ):
        stop = SharedStop(runtime, received)
        while learner.progress.step < config.steps and not stopping:
            read = [next(batches) for _ in range(job.parts.number)]
            began = time.perf_counter()
            with ended_at_once("the network was compiled") if is_compiling else nullcontext():
                losses = learner.backward(read, meter)
            if is_compiling:
                if received:
                    break  # somewhere in the first step, of which nothing is left; what was before it is on disk
                log.say(f"compiled in {time.perf_counter() - began:.0f} s")
                is_compiling = False
            rate, norm = learner.update(read, losses)
            clock.count(config.batch_size)
            writer.raise_failure()
            step, stopping = learner.progress.step, stop.is_due()
            ends = stopping or step == config.steps
            saves = config.is_saved(step) or ends
            if learner.guard.is_due(step, config.log_every) or saves:
                learner.guard.raise_if_bad(job.compare, job.network, job.images, saved_at)
            if step % config.log_every == 0 or ends:
                numbers = {"images_seen": learner.progress.images_seen, **meter.means(runtime.sum)}
                speed = {"learning_rate": rate, "images_per_second": clock.rate()}
                log.metrics(step, {**numbers, "grad_norm": float(norm), **speed, **learner.watched()})
                meter, clock = job.meter(runtime.device), Clock()
            log.advance(step)
            with clock.paused():
                if saves and runtime.is_main:
                    learner.save(writer)
                saved_at = step if saves else saved_at
                job.after_step(learner.ema.average, step)
        else:
            writer.wait()
            runtime.barrier()  # the model of the run is there when any process returns
    step, signal = learner.progress.step, received[0] if received else None
    return Outcome(step, finished=step >= config.steps, signal=signal), learner.ema.average


def _open_log(job: Job, resumed: Progress | None) -> RunLog:
    """The log of the run, which a resumed run continues."""
    done = resumed or Progress()
    steps = {"num_steps": job.config.steps, "first_step": done.step}
    log = RunLog(job.run, **steps, enabled=job.runtime.is_main, track=job.track)
    if resumed:
        log.say(f"resuming from step {done.step} ({done.images_seen:,} images seen)")
    return log


def _distributed(network: nn.Module, runtime: Runtime) -> nn.Module:
    """The network, exchanging its gradients with those of the other processes."""
    if runtime.world == 1:
        return network
    devices = [runtime.device] if runtime.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)


def _open_stream(job: Job, *, first_position: int) -> Generator[Batch, None, None]:
    """The batches of this process, from the image after the last one that the run has seen."""
    runtime = job.runtime
    positions = StreamPositions(first_position, job.config.batch_size, job.parts.size, runtime.rank, runtime.world)
    return stream_batches(
        job.images,
        positions,
        num_workers=job.num_workers,
        pin_memory=runtime.device.type == "cuda",
        sharing=runtime.local_world,
    )


@contextmanager
def _exchange_gradients(wrapped: nn.Module, now: bool) -> Iterator[None]:
    """Exchange gradients between processes now, or leave that to a later micro-batch of the step."""
    with nullcontext() if now or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync():
        yield
