"""The training loop.

Read `train` from top to bottom: set up, restore, then for each step read, compare, step, average, log, save.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from latentflow.data.batches import Batch, StreamPositions, TrainingImages, lost_workers, stream_batches
from latentflow.errors import ConfigError
from latentflow.latent_flow import LatentFlow
from latentflow.runtime import Runtime
from latentflow.training.checkpoint import Progress, keep_newest, load_checkpoint, newest_checkpoint, save_checkpoint
from latentflow.training.config import Recipe, TrainingConfig
from latentflow.training.ema import EMA
from latentflow.training.guard import FiniteGuard
from latentflow.training.interruption import Outcome, collected_signals
from latentflow.training.log import Clock, LossByTime, RunLog
from latentflow.training.optim import build_optimizer
from latentflow.training.step import training_step

Preview = Callable[[LatentFlow, Mapping[str, Tensor], int], None]
"""Called with (model, EMA weights, step) on the main process to draw a grid."""


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
    model: LatentFlow,
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
    ema, optimizer = EMA(network, config.ema_decay), build_optimizer(network.parameters(), recipe.optimizer)
    newest = newest_checkpoint(run)
    progress = load_checkpoint(newest, network, ema, optimizer) if newest else Progress()
    scaler = torch.amp.GradScaler(
        runtime.device.type, init_scale=progress.loss_scale or 2.0**16, enabled=runtime.precision == "fp16"
    )
    wrapped = _distributed(network, runtime)
    batches = _open_stream(recipe, images, runtime, parts, first_position=progress.images_seen)
    compare = partial(training_step, model, times=recipe.times, batch_size=config.batch_size, seed=config.seed)
    call = torch.compile(wrapped) if config.compile else wrapped

    def save() -> None:
        if main:
            done = {"num_images": len(images), "step": progress.step, "images_seen": progress.images_seen}
            record = model.config.training.model_copy(update=done)
            model.config = model.config.model_copy(update={"training": record})
            # The model goes first: killed in between, the run repeats these steps and writes both again.
            model.save_pretrained(run / "model", weights=ema.average)
            scale = scaler.get_scale() if scaler.is_enabled() else None
            save_checkpoint(
                run, replace(progress, loss_scale=scale), network, ema, optimizer, keep=config.keep_checkpoints
            )
        runtime.barrier()

    log = RunLog(run, num_steps=config.steps, first_step=progress.step, enabled=main)
    if newest:
        log.say(f"resuming from step {progress.step} ({progress.images_seen:,} images seen)")
        if main:
            keep_newest(run, config.keep_checkpoints)
    guard = FiniteGuard(optimizer, runtime.device, scaled=scaler.is_enabled(), remedy=recipe.optimizer.gentler)
    losses, clock, saved_at, stopping = LossByTime(runtime.device), Clock(), progress.step, False
    with (
        log,
        closing(batches),
        lost_workers(recipe.data.num_workers),
        runtime.float32_policy(),
        collected_signals() as received,
    ):
        while progress.step < config.steps and not stopping:
            rate = recipe.optimizer.rate(progress.step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            read = [next(batches) for _ in range(parts.number)]
            for number, batch in enumerate(read, start=1):
                with _exchange_gradients(wrapped, number == len(read)):
                    result = compare(call, batch)
                    scaler.scale(result.loss.mean() / len(read)).backward()
                losses.add(result.time, result.loss)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(network.parameters(), recipe.optimizer.clip_norm or float("inf"))
            guard.watch(norm, result.loss, progress.step, read)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ema.update(network, progress.step)
            progress = replace(progress, step=progress.step + 1, images_seen=progress.images_seen + config.batch_size)
            clock.count(config.batch_size)

            stopping = _all_agree_to_stop(runtime, received, progress.step, config.log_every)
            ends = stopping or progress.step == config.steps
            saves = progress.step % config.checkpoint_every == 0 or ends
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
                if preview and main and config.preview_every and (progress.step % config.preview_every == 0 or last):
                    preview(model, ema.average, progress.step)
    network.eval().requires_grad_(False)
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


def _all_agree_to_stop(runtime: Runtime, received: list[int], step: int, every: int) -> bool:
    """Whether a signal has reached any process; processes ask each other at log steps only."""
    if runtime.world == 1:
        return bool(received)
    if step % every:
        return False
    return bool(runtime.sum(torch.tensor(len(received))))


@contextmanager
def _exchange_gradients(wrapped: nn.Module, now: bool) -> Iterator[None]:
    """Exchange gradients between processes now, or leave that to a later micro-batch of the step."""
    with nullcontext() if now or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync():
        yield
