"""The training loop: the only file that knows accelerate.

Read `train` from top to bottom: set up, restore, then for each step read, compare, step, average, log, save.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn

from latentflow.data.batches import Batch, StreamPositions, TrainingImages, lost_workers, stream_batches
from latentflow.errors import ConfigError
from latentflow.latent_flow import LatentFlow, require_own_gpu
from latentflow.processes import process_rank
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


def make_accelerator(config: TrainingConfig, *, cpu: bool = False) -> Accelerator:
    """An Accelerator for this machine; every launcher of accelerate and torchrun works, on GPUs and on CPUs.

    Raises:
        ConfigError: sharded training is asked for, the batch cannot be shared out evenly, there are more processes than
            GPUs, or the processes do not find each other.
    """
    num_processes = process_rank()[1]
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    if num_processes > 1 and not torch.cuda.is_available():
        cpu = True  # accelerate lets processes on CPUs find each other only where it is told that they stay there
    if not cpu:
        require_own_gpu()
    precision = ("bf16" if _gains_from_bf16(cpu) else "fp32") if config.precision == "auto" else config.precision
    AcceleratorState._reset_state()  # a program may train twice, the second time in another precision
    try:
        accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=cpu)
    except (ValueError, RuntimeError) as error:
        if num_processes == 1:
            raise
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the {num_processes} processes of the launcher did not find each other ({reason}); start them with "
            "`accelerate launch` or torchrun"
        ) from error
    if accelerator.num_processes != num_processes:
        raise ConfigError(
            f"the launcher says {num_processes} processes, accelerate {accelerator.num_processes}; start them with "
            "`accelerate launch` or torchrun"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"{accelerator.distributed_type.value} shards the weights, which checkpoints here cannot hold; use DDP"
        )
    micro_batch_size = config.micro_batch_size or max(config.batch_size // accelerator.num_processes, 1)
    together = micro_batch_size * accelerator.num_processes
    if config.batch_size % together:
        raise ConfigError(
            f"training.batch_size = {config.batch_size} cannot be shared by {accelerator.num_processes} processes in "
            f"micro-batches of {micro_batch_size}; use a multiple of {together}"
        )
    accelerator.gradient_accumulation_steps = config.batch_size // together
    return accelerator


def train(
    recipe: Recipe,
    model: LatentFlow,
    images: TrainingImages,
    run: Path,
    accelerator: Accelerator,
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
    config, main = recipe.training, accelerator.is_main_process
    model.to(accelerator.device)
    network = model.network.train().requires_grad_()
    ema, optimizer = EMA(network, config.ema_decay), build_optimizer(network.parameters(), recipe.optimizer)
    newest = newest_checkpoint(run)
    progress = load_checkpoint(newest, network, ema, optimizer) if newest else Progress()
    wrapped, prepared = accelerator.prepare(network, optimizer)
    if progress.loss_scale is not None and accelerator.scaler is not None:
        accelerator.scaler.update(progress.loss_scale)
    batches = _open_stream(recipe, images, accelerator, first_position=progress.images_seen)
    compare = partial(
        training_step,
        model,
        times=recipe.times,
        batch_size=config.batch_size,
        seed=config.seed,
        device=accelerator.device,
    )
    call = torch.compile(wrapped) if config.compile else wrapped

    def save() -> None:
        if main:
            done = {"num_images": len(images), "step": progress.step, "images_seen": progress.images_seen}
            record = model.config.training.model_copy(update=done)
            model.config = model.config.model_copy(update={"training": record})
            # The model goes first: killed in between, the run repeats these steps and writes both again.
            model.save_pretrained(run / "model", weights=ema.average)
            scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else None
            save_checkpoint(
                run, replace(progress, loss_scale=scale), network, ema, optimizer, keep=config.keep_checkpoints
            )
        _wait_for_all(accelerator)

    log = RunLog(run, num_steps=config.steps, first_step=progress.step, enabled=main)
    if newest:
        log.say(f"resuming from step {progress.step} ({progress.images_seen:,} images seen)")
        if main:
            keep_newest(run, config.keep_checkpoints)
    guard = FiniteGuard(
        optimizer, accelerator.device, scaled=accelerator.scaler is not None, remedy=recipe.optimizer.gentler
    )
    losses, clock, saved_at, stopping = LossByTime(accelerator.device), Clock(), progress.step, False
    with log, closing(batches), lost_workers(recipe.data.num_workers), collected_signals() as received:
        while progress.step < config.steps and not stopping:
            rate = recipe.optimizer.rate(progress.step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            read = [next(batches) for _ in range(accelerator.gradient_accumulation_steps)]
            for number, batch in enumerate(read, start=1):
                with _exchange_gradients(accelerator, wrapped, number == len(read)):
                    result = compare(call, batch)
                    accelerator.backward(result.loss.mean())
                losses.add(result.time, result.loss)
            norm = accelerator.clip_grad_norm_(network.parameters(), recipe.optimizer.clip_norm or float("inf"))
            guard.watch(norm, result.loss, progress.step, read)
            prepared.step()
            prepared.zero_grad()
            ema.update(network, progress.step)
            progress = replace(progress, step=progress.step + 1, images_seen=progress.images_seen + config.batch_size)
            clock.count(config.batch_size)

            stopping = _all_agree_to_stop(accelerator, received, progress.step, config.log_every)
            ends = stopping or progress.step == config.steps
            saves = progress.step % config.checkpoint_every == 0 or ends
            if guard.is_due(progress.step, config.log_every) or saves:
                guard.raise_if_bad(compare, network, images, saved_at)
            if progress.step % config.log_every == 0 or ends:
                loss, by_time = losses.means(accelerator.reduce)
                speed = {"learning_rate": rate, "images_per_second": clock.rate()}
                seen = {"images_seen": progress.images_seen, "loss": loss, "grad_norm": float(norm)}
                log.metrics(progress.step, {**seen, **speed, "loss_by_time": by_time})
                losses, clock = LossByTime(accelerator.device), Clock()
            log.advance(progress.step)
            with clock.paused():
                if saves:
                    save()
                    saved_at = progress.step
                last = progress.step == config.steps
                if preview and main and config.preview_every and (progress.step % config.preview_every == 0 or last):
                    preview(model, ema.average, progress.step)
    return Outcome(progress.step, finished=progress.step >= config.steps, signal=received[0] if received else None)


def _open_stream(
    recipe: Recipe, images: TrainingImages, accelerator: Accelerator, *, first_position: int
) -> Generator[Batch, None, None]:
    """The batches of this process, from the image after the last one that the run has seen."""
    batch_size, num_processes = recipe.training.batch_size, accelerator.num_processes
    micro_batch_size = batch_size // num_processes // accelerator.gradient_accumulation_steps
    positions = StreamPositions(first_position, batch_size, micro_batch_size, accelerator.process_index, num_processes)
    return stream_batches(
        images, positions, num_workers=recipe.data.num_workers, pin_memory=accelerator.device.type == "cuda"
    )


def _wait_for_all(accelerator: Accelerator) -> None:
    """Wait until every process gets here. Accelerate's own barrier asks for a GPU of each, also of those on the CPU."""
    accelerator.reduce(torch.zeros(1, device=accelerator.device))


def _all_agree_to_stop(accelerator: Accelerator, received: list[int], step: int, every: int) -> bool:
    """Whether a signal has reached any process; processes ask each other at log steps only."""
    if accelerator.num_processes == 1:
        return bool(received)
    if step % every:
        return False
    return bool(accelerator.reduce(torch.tensor(len(received), device=accelerator.device)))


@contextmanager
def _exchange_gradients(accelerator: Accelerator, wrapped: nn.Module, now: bool) -> Iterator[None]:
    """Exchange gradients between processes now, or leave that to a later micro-batch of the step."""
    with nullcontext() if now else accelerator.no_sync(wrapped):
        yield


def _gains_from_bf16(cpu: bool) -> bool:
    return not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
