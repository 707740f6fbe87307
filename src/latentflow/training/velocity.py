"""Training a velocity network: what `run_loop` needs to know of a flow-matching model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from latentflow.data.batches import TrainingImages
from latentflow.model.flow_model import FlowModel
from latentflow.networks.align_head import add_align_head
from latentflow.networks.running import restore_blocks, set_memory
from latentflow.randomness import derive_seed
from latentflow.runtime import Runtime
from latentflow.training.checkpoint import Keeping, Progress, newest_checkpoint
from latentflow.training.compiling import captures, compiles
from latentflow.training.config import Recipe, TrainingConfig
from latentflow.training.finetuning import trained_share
from latentflow.training.held_out_watch import HeldOutWatch
from latentflow.training.interruption import Outcome
from latentflow.training.log import LossBins
from latentflow.training.loop import Job, micro_batches, run_loop
from latentflow.training.memory import memory_mode
from latentflow.training.step import training_step

Preview = Callable[[FlowModel, Mapping[str, Tensor], int], None]
"""Called with (model, averaged weights, step) in every process; together they draw a grid."""


def train_velocity(
    recipe: Recipe,
    model: FlowModel,
    images: TrainingImages,
    run: Path,
    runtime: Runtime,
    *,
    held_out: TrainingImages | None = None,
    preview: Preview | None = None,
) -> Outcome:
    """Train `model.network` until the recipe's last step, or until SIGTERM or Ctrl-C; see `run_loop`.

    Of a network with some frozen parameters, the others are trained; otherwise all of them.

    Args:
        run: the run folder; checkpoints, metrics and the model go there.
        held_out: images to measure the loss on; see `HeldOutWatch`.
        preview: draws sample grids. Sampling is a sibling of training, so it is passed in.

    Raises:
        NonFiniteError: a gradient was not finite; the weights are those from before that step.
    """
    config, parts = recipe.training, micro_batches(recipe.training, runtime)
    network = model.to(runtime).network.train()
    if not any(parameter.requires_grad for parameter in network.parameters()):
        network.requires_grad_()
    trained, _ = trained_share(network)
    kept = {"averages": config.num_averages, "aligned": config.is_aligned, "trained": trained}
    set_memory(network, memory_mode(config.memory, model.config, parts.size, runtime, **kept))
    compare = partial(training_step, model, times=recipe.times, batch_size=config.batch_size, seed=config.seed)

    job = Job(
        network=_with_head(network, config),
        compare=partial(compare, align_weight=config.align_weight),
        meter=LossBins,
        images=images,
        run=run,
        runtime=runtime,
        config=config,
        optimizer=recipe.optimizer,
        parts=parts,
        num_workers=recipe.data.num_workers,
        keeping=Keeping(config.keep_checkpoints, config.keep_every, config.kept_at, config.keeps_averages),
        compiles=lambda images_left: compiles(config.compile, model.config, images_left, runtime),
        captures=captures(config, model, images, runtime),
        before_save=partial(record_progress, model, len(images)),
        save_model=lambda folder, average: model.save_pretrained(folder, weights=average),
        watch=_watch(recipe, model, held_out, run, parts.size),
        ema_lengths=config.ema_lengths or (),
        after_step=partial(draw_if_due, preview, model, config),
        track=config.track,
    )
    outcome, _ = run_loop(job)
    restore_blocks(network.eval().requires_grad_(False))
    return outcome


def record_progress(model: FlowModel, num_images: int, progress: Progress) -> None:
    """Write into the config of a model how long it was trained, and on how many images."""
    done = {"num_images": num_images, "step": progress.step, "images_seen": progress.images_seen}
    training = model.config.training.model_copy(update=done)
    model.config = model.config.model_copy(update={"training": training})


def draw_if_due(
    preview: Preview | None, model: FlowModel, config: TrainingConfig, average: Mapping[str, Tensor], step: int
) -> None:
    """Draw a preview, where one is due after `step` steps."""
    every = config.preview_every
    if preview and every and (step % every == 0 or step == config.steps):
        preview(model, average, step)


def _watch(
    recipe: Recipe, model: FlowModel, held_out: TrainingImages | None, run: Path, micro_batch_size: int
) -> HeldOutWatch | None:
    if held_out is None:
        return None
    begun, times = newest_checkpoint(run) is not None, recipe.times
    given = {"micro_batch_size": micro_batch_size, "is_resumed": begun}
    return HeldOutWatch(model, held_out, run, times, recipe.training, **given)


def _with_head(network: nn.Module, config: TrainingConfig) -> nn.Module:
    """The network that is trained: the model's, with the head that the recipe asks for."""
    if not config.is_aligned:
        return network
    return add_align_head(network, config.align_block, derive_seed(config.seed, "align head"))
