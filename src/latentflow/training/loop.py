"""The training loop.

Read `train` from top to bottom: set up, restore, then for each step read, compare, step, average, log, save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from latentflow.data.batches import Batch, StreamPositions, TrainingImages, lost_workers, stream_batches
from latentflow.errors import ConfigError
from latentflow.model.flow_model import FlowModel
from latentflow.networks.running import compile_blocks, restore_blocks, set_memory
from latentflow.runtime import Runtime
from latentflow.training.checkpoint import CheckpointWriter, Progress, keep_newest, load_checkpoint, newest_checkpoint
from latentflow.training.compiling import compiles
from latentflow.training.config import Recipe, TrainingConfig
from latentflow.training.ema import EMA
from latentflow.training.guard import FiniteGuard
from latentflow.training.interruption import Outcome, SharedStop, collected_signals, ended_at_once
from latentflow.training.log import Clock, LossByTime, RunLog
from latentflow.training.memory import memory_mode
from latentflow.training.optim import build_optimizer, clip_gradients, loss_scaler, scaler_state
from latentflow.training.step import training_step

Preview = Callable[[FlowModel, Mapping[str, Tensor], int], None]
"""Called with (model, EMA weights, step) in every process to draw a grid together."""


@dataclass(frozen=True)
class MicroBatches:
    """How an optimizer step is shared: each process computes `number` micro-batches of `size` images."""

    size: int
    number: int


def micro_batches(config: TrainingConfig, runtime: Runtime) -> MicroBatches:
    """The micro-batches of one optimizer step of one process.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """
    size = config.micro_batch_size or max(config.batch_size // runtime.world, 1)
    together = size * runtime.world
    if config.batch_size % together:
        raise ConfigError(
            f"training.batch_size = {config.batch_size} cannot be shared by {runtime.world} processes in "
            f"micro-batches of {size}; use a multiple of {together}"
        )
    return MicroBatches(size, config.batch_size // together)


def train(
    recipe: Recipe,
    model: FlowModel,
    images: TrainingImages,
    run: Path,
    runtime: Runtime,
    *,
    preview: Preview | None = None,
) -> Outcome:
    """Train `model.network` until the recipe's last step, or until SIGTERM or Ctrl-C.

    The newest complete checkpoint in `run` is continued exactly: on the CPU the weights equal those of an
    uninterrupted run bit for bit.

    Args:
        run: the run folder; checkpoints, metrics and the model go there.
        preview: draws sample grids; sampling belongs to a sibling layer, so it is handed in.

    Raises:
        NonFiniteError: a gradient was not finite; the weights are those from before that step.
    """
    config, main, parts = recipe.training, runtime.is_main, micro_batches(recipe.training, runtime)
    network = model.to(runtime).network.train().requires_grad_()
    set_memory(network, memory_mode(config.memory, model.config, parts.size, runtime))
    ema, optimizer = EMA(network, config.ema_decay), build_optimizer(network, recipe.optimizer)
    parameters = list(network.parameters())
    newest = newest_checkpoint(run)
    progress = load_checkpoint(newest, network, ema, optimizer) if newest else Progress()
    scaler = loss_scaler(runtime, progress.loss_scale, progress.growth_tracker)
    wrapped = _distributed(network, runtime)
    batches = _open_stream(recipe, images, runtime, parts, first_position=progress.images_seen)
    compare = partial(training_step, model, times=recipe.times, batch_size=config.batch_size, seed=config.seed)
    images_left = (config.steps - progress.step) * config.batch_size
    if first_step_compiles := compiles(config.compile, model.config, images_left, runtime):
        compile_blocks(network)

    def save() -> None:
        if main:
            writer.wait()  # until the model's config is not read any more
            done = {"num_images": len(images), "step": progress.step, "images_seen": progress.images_seen}
            record = model.config.training.model_copy(update=done)
            model.config = model.config.model_copy(update={"training": record})
            scale, tracker = scaler_state(scaler)
            writer.save(replace(progress, loss_scale=scale, growth_tracker=tracker), network, ema, optimizer)

    def save_model(folder: Path, average: Mapping[str, Tensor]) -> None:
        model.save_pretrained(folder, weights=average)

    kept = {"keep": config.keep_checkpoints, "keep_every": config.keep_every}
    log = RunLog(run, num_steps=config.steps, first_step=progress.step, enabled=main)
    if newest:
        log.say(f"resuming from step {progress.step} ({progress.images_seen:,} images seen)")
        if main:
            keep_newest(run, **kept)
    guard = FiniteGuard(optimizer, runtime, scaled=scaler.is_enabled(), remedy=recipe.optimizer.gentler)
    losses, clock, saved_at, stopping = LossByTime(runtime.device), Clock(), progress.step, False
    with (
        log,
        closing(batches),
        lost_workers(recipe.data.num_workers),
        runtime.float32_policy(),
        collected_signals() as received,
        CheckpointWriter(run, runtime.device, **kept, save_model=save_model) as writer,
    ):
        stop = SharedStop(runtime, received)
        while progress.step < config.steps and not stopping:
            rate = recipe.optimizer.rate(progress.step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            read = [next(batches) for _ in range(parts.number)]
            results = []
            began = time.perf_counter()
            with ended_at_once("the network was compiled") if first_step_compiles else nullcontext():
                for number, batch in enumerate(read, start=1):
                    with _exchange_gradients(wrapped, number == len(read)):
                        result = compare(wrapped, batch)
                        scaler.scale(result.loss.mean() / len(read)).backward()
                    losses.add(result.time, result.loss)
                    results.append(result.loss.detach())
            if first_step_compiles:
                if received:
                    break  # somewhere in the first step, of which nothing is left; what was before it is on disk
                log.say(f"compiled in {time.perf_counter() - began:.0f} s")
                first_step_compiles = False
            scaler.unscale_(optimizer)
            norm = clip_gradients(parameters, recipe.optimizer.clip_norm)
            guard.watch(norm, results, progress.step, [batch.positions for batch in read])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ema.update(progress.step)
            progress = replace(progress, step=progress.step + 1, images_seen=progress.images_seen + config.batch_size)
            clock.count(config.batch_size)

            writer.raise_failure()
            stopping = stop.is_due()
            ends = stopping or progress.step == config.steps
            saves = config.is_saved(progress.step) or ends
            if guard.is_due(progress.step, config.log_every) or saves:
                guard.raise_if_bad(compare, network, images, saved_at)
            if progress.step % config.log_every == 0 or ends:
                loss, by_time = losses.means(runtime.sum)
                speed = {"learning_rate": rate, "images_per_second": clock.rate()}
                seen = {"images_seen": progress.images_seen, "loss": loss, "grad_norm": float(norm)}
                log.metrics(progress.step, {**seen, **speed, "loss_by_time": by_time})
                losses, clock = LossByTime(runtime.device), Clock()
            log.advance(progress.step)
            with clock.paused():
                if saves:
                    save()
                    saved_at = progress.step
                last = progress.step == config.steps
                if preview and config.preview_every and (progress.step % config.preview_every == 0 or last):
                    preview(model, ema.average, progress.step)
        else:
            writer.wait()
            runtime.barrier()  # the model of the run is there when any process returns
    restore_blocks(network.eval().requires_grad_(False))
    return Outcome(progress.step, finished=progress.step >= config.steps, signal=received[0] if received else None)


def _distributed(network: nn.Module, runtime: Runtime) -> nn.Module:
    """The network, exchanging its gradients with those of the other processes."""
    if runtime.world == 1:
        return network
    devices = [runtime.device] if runtime.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)


def _open_stream(
    recipe: Recipe, images: TrainingImages, runtime: Runtime, parts: MicroBatches, *, first_position: int
) -> Generator[Batch, None, None]:
    """The batches of this process, from the image after the last one that the run has seen."""
    positions = StreamPositions(first_position, recipe.training.batch_size, parts.size, runtime.rank, runtime.world)
    return stream_batches(
        images,
        positions,
        num_workers=recipe.data.num_workers,
        pin_memory=runtime.device.type == "cuda",
        sharing=runtime.local_world,
    )


@contextmanager
def _exchange_gradients(wrapped: nn.Module, now: bool) -> Iterator[None]:
    """Exchange gradients between processes now, or leave that to a later micro-batch of the step."""
    with nullcontext() if now or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync():
        yield
