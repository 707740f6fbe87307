"""Memory and disk space of a training run. Sizes of weights are exact; what a pass keeps and decodes is estimated."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from latentflow.data.cache.resident import stays_resident
from latentflow.model.config import AUTOENCODER_FOLDER
from latentflow.networks.in_training import frozen_parameters, sampled_part
from latentflow.networks.running import MEMORY_MODES
from latentflow.planning.machine import Machine
from latentflow.planning.planned_run import PlannedRun
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.preview import preview_drawing
from latentflow.sizes import Size
from latentflow.training.config import Recipe, TrainingConfig
from latentflow.training.memory import bytes_per_image, fitting_mode, micro_batch_that_fits, network_in_training
from latentflow.training.optim import optimizer_bytes, trained_parameters
from latentflow.training.student_recipe import StudentRecipe

_PNG_BYTES = 2  # per pixel of a preview, approximately
_DECODED = 12  # feature maps of the decoder's last width alive at once, float32, approximately
_DECODED_TOGETHER = 16


@dataclass(frozen=True)
class Memory:
    """Memory of one process of the run, in bytes.

    Attributes:
        exact: weights, gradients, average and optimizer, by name.
        estimated: everything else that does not depend on the memory mode, by name.
        kept_per_image: saved for the backward pass, by mode of `training.memory`.
        preview: while a preview is decoded; nothing is saved for a backward pass then.
        mode: of `training.memory` that the run uses.
        micro_batch_size: images in one forward pass.
        share: images of one process in one step.
        multiple: what a micro-batch has to be a multiple of.
    """

    exact: Mapping[str, int]
    estimated: Mapping[str, int]
    kept_per_image: Mapping[str, int]
    preview: int
    mode: str
    micro_batch_size: int
    share: int
    multiple: int = 1

    @property
    def fixed(self) -> int:
        """Bytes that are always in use."""
        return sum(self.exact.values()) + sum(self.estimated.values())

    def kept(self, mode: str) -> int:
        """Bytes saved for the backward pass of a micro-batch."""
        return self.kept_per_image[mode] * self.micro_batch_size

    @property
    def peak(self) -> int:
        """The approximate peak."""
        return self.fixed + max(self.kept(self.mode), self.preview)

    def largest_micro_batch(self, mode: str, memory: int | None) -> int:
        """The largest micro-batch that fits; 0: none does."""
        return micro_batch_that_fits(self.fixed, self.kept_per_image[mode], self.share, memory, self.multiple)

    def previews_fit(self, memory: int | None) -> bool:
        """Whether a preview can be decoded."""
        return micro_batch_that_fits(self.fixed, self.preview, 1, memory) == 1

    def fits(self, memory: int | None) -> bool:
        """Whether the run fits with its settings."""
        return self.largest_micro_batch(self.mode, memory) >= self.micro_batch_size and self.previews_fit(memory)


@dataclass(frozen=True)
class Disk:
    """Disk space in bytes, without file headers (a few hundred bytes per tensor).

    Attributes:
        checkpoint: one checkpoint: weights, average, optimizer.
        num_checkpoints: the most at any time, with milestones and the one being written.
        num_milestones: models that are kept besides that of the run.
        model: the model folder.
        averages: power function averages of one step; 0: none are kept.
        averages_kept: at how many steps they are kept.
        cache: the latent cache; None if the number of images is unknown, or training reads images.
        cache_is_here: whether it exists already.
        previews: all of them.
        free: on the disk of the run folder.
    """

    checkpoint: int
    num_checkpoints: int
    num_milestones: int
    model: int
    averages: int
    averages_kept: int
    cache: int | None
    cache_is_here: bool
    previews: int
    free: int

    @property
    def run(self) -> int:
        """Bytes of the run folder."""
        kept = self.model * (1 + self.num_milestones) + self.averages * self.averages_kept
        return self.checkpoint * self.num_checkpoints + kept + self.previews


def estimate_memory(subject: PlannedRun, machine: Machine, *, share: int, micro: int) -> Memory:
    """What one process of the run takes.

    Args:
        share: images of one process in one step.
        micro: images in one forward pass.
    """
    config, recipe, network = subject.config, subject.recipe, subject.network
    weights, moving = _bytes_of(network.parameters()), _moving_bytes(sampled_part(network))
    trained = _bytes_of(trained_parameters(network))
    exact = {
        "weights": weights,
        "gradients": trained,
        "moving average": moving * recipe.training.num_averages,
        "optimizer's moments": optimizer_bytes(network, recipe.optimizer),
    }
    if subject.teacher is not None:
        exact["teacher"] = _bytes_of(network_in_training(subject.teacher).parameters())
    latents = config.latent_shape[0] * config.latent_shape[1] * config.latent_shape[2]
    estimated = {"batch and noise": 5 * 4 * micro * latents}
    if machine.half:
        cast = (m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d))
        estimated[f"weights in {machine.precision}"] = sum(
            2 * p.numel() for m in cast for p in m.parameters(recurse=False)
        )
    if machine.num_processes > 1:
        estimated["gradients on their way"] = trained
    if subject.stage.num_bytes:
        estimated["autoencoder"] = subject.stage.num_bytes
    cached = cached_bytes(subject)
    if cached is not None and _stays_resident(subject, cached, machine):
        estimated["latent cache"] = cached
    if not machine.gpu:
        estimated["copy for a checkpoint"] = _checkpoint_bytes(network, recipe)
        if subject.keeps_best:
            estimated["copy of the best weights"] = moving
    given = {"half": machine.half, "aligned": recipe.training.is_aligned}
    size = Size(*config.latent_shape[1:])
    kept = {mode: bytes_per_image(config.network, size, memory=mode, **given) for mode in MEMORY_MODES}
    preview = 0
    if recipe.training.preview_every:
        together = min(len(preview_of(subject).seeds), _DECODED_TOGETHER, micro)
        decoded = together * _DECODED * 4 * (subject.stage.width or 128) * config.image_size.area
        preview = moving + decoded  # a preview sets the weights aside and uses their average
    mode = recipe.training.memory
    if mode == "auto":
        memory = machine.memory
        mode = "none"
        if memory is not None:
            own = {"averages": subject.num_copies, "trained": trained // 4}
            mode = fitting_mode(config, micro, memory=memory, **own, **given)
    return Memory(exact, estimated, kept, preview, mode, micro, share, subject.multiple)


def cached_bytes(subject: PlannedRun) -> int | None:
    """Bytes of the tensors of a latent cache, with flips; None if the number of images is unknown.

    Data that are not here are assumed to be encoded first, as the recipes advise.
    """
    data, config = subject.data, subject.config
    if data.num_images is None or (data.cache is None and not data.assumed):
        return None
    channels, positions = subject.stage.num_moments, Size(*config.latent_shape[1:]).area
    wide = data.cache is not None and data.cache.precision == "float32"
    moments = channels * positions * (4 if wide else 2) * (2 if subject.flips else 1)
    counts = positions * (1 if subject.stage.factor**2 <= 255 else 2)
    maps = counts * config.conditioning.num_map_classes
    per_image = moments + maps
    if data.cache is not None and config.conditioning.inpainting:
        per_image += data.cache.mask_variants * (moments + counts)
    if data.cache is not None and config.conditioning.augmentation:
        per_image += data.cache.variants * (moments + maps + 4 * len(config.conditioning.augmentation))
    return data.num_images * (per_image + (8 if config.conditioning.num_classes else 0))


def _stays_resident(subject: PlannedRun, num_bytes: int, machine: Machine) -> bool:
    """Whether training keeps the cache in memory, if all of the memory is free."""
    data = subject.recipe.data
    if (subject.teacher is None and data.images) or (data.resident == "auto" and data.num_workers):
        return False
    return stays_resident(data.resident, num_bytes, torch.device("cuda" if machine.gpu else "cpu"), machine.memory)


def preview_of(subject: PlannedRun) -> Drawing:
    """What a preview draws."""
    return preview_drawing(subject.config)


def _state_bytes(network: nn.Module) -> int:
    return _bytes_of(network.state_dict().values())


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _moving_bytes(network: nn.Module) -> int:
    """Of the tensors of a network that training changes."""
    return _state_bytes(network) - _bytes_of(frozen_parameters(network).values())


def _model_bytes(subject: PlannedRun) -> int:
    """Of the weights in a model folder, and of its adapter: factors, and whole tensors as they were and are."""
    state = sampled_part(subject.network).state_dict()
    whole = subject.made if subject.made and subject.recipe.finetuning.method == "lora" else ()
    return _bytes_of(state.values()) + 2 * _bytes_of(state[name] for name in whole)


def _checkpoint_bytes(network: nn.Module, recipe: Recipe | StudentRecipe) -> int:
    averages = recipe.training.num_averages * _moving_bytes(sampled_part(network))
    return _moving_bytes(network) + averages + optimizer_bytes(network, recipe.optimizer)


def _num_saved(training: TrainingConfig) -> int:
    """Checkpoints that are written in the whole run, the last one included."""
    every, milestones = training.checkpoint_every, training.keep_every
    number = training.steps // every
    if milestones:
        number += training.steps // milestones - training.steps // math.lcm(every, milestones)
    others = {*training.averages_at, *training.kept_at, training.steps}
    return number + sum(bool(step % every and (not milestones or step % milestones)) for step in others)


def estimate_disk(subject: PlannedRun) -> Disk:
    """What the run folder and the latent cache take. A model includes its adapter, if it has one."""
    training, config, network = subject.recipe.training, subject.config, subject.network
    embedded = config.autoencoder.reference == AUTOENCODER_FOLDER
    num_milestones = training.steps // training.keep_every if training.keep_every else 0
    at_shares = [step for step in training.kept_at if not (training.keep_every and step % training.keep_every == 0)]
    previews = -(-training.steps // training.preview_every) if training.preview_every else 0
    pixels = len(preview_of(subject).seeds) * config.image_size.area
    place = next((p for p in Path(subject.recipe.out or "runs").absolute().parents if p.is_dir()), Path.cwd())
    here = subject.data.num_bytes
    return Disk(
        checkpoint=_checkpoint_bytes(network, subject.recipe),
        num_checkpoints=min(training.keep_checkpoints + 1 + num_milestones, _num_saved(training)),
        num_milestones=num_milestones + len(at_shares) + subject.keeps_best,
        model=_model_bytes(subject) + (subject.stage.num_bytes or 0 if embedded else 0),
        averages=_moving_bytes(sampled_part(network)) * (training.num_averages - 1),
        averages_kept=len(training.averages_at),
        cache=cached_bytes(subject) if here is None else here,
        cache_is_here=here is not None,
        previews=previews * pixels * _PNG_BYTES,
        free=shutil.disk_usage(place).free,
    )
