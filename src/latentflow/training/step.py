"""The mathematics of a training step: from a batch to a loss per image."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from latentflow.data.batches import Batch
from latentflow.flow.loss import align_loss, flow_matching_loss
from latentflow.flow.times import TrainingTimes
from latentflow.model.conditioning import ConditionName
from latentflow.model.flow_model import FlowModel
from latentflow.networks.velocity_network import NoisePredictor
from latentflow.randomness import ImageRandom, derive_seed, on_device
from latentflow.shapes import Condition


class StepLosses(Protocol):
    """What a forward pass gives: the loss [B] of each image, with its graph."""

    @property
    def loss(self) -> Tensor: ...


@dataclass(frozen=True)
class StepResult:
    """The result of one forward pass.

    Attributes:
        velocity_loss: [B] float32, the flow-matching loss of each image, with its graph; of a network that predicts the
            noise, that of the noise.
        time: [B] float32, the time drawn for each image.
        align_loss: [B] float32, that of the predicted latents, with its graph; None without `align_weight`.
        align_weight: weight of `align_loss`.
    """

    velocity_loss: Tensor
    time: Tensor
    align_loss: Tensor | None = None
    align_weight: float = 0.0

    @property
    def loss(self) -> Tensor:
        """[B] float32, what is minimised."""
        if self.align_loss is None:
            return self.velocity_loss
        return self.velocity_loss + self.align_weight * self.align_loss


def training_step(
    model: FlowModel,
    network: Callable[[Tensor, Tensor, Condition], Tensor | tuple[Tensor, Tensor]],
    batch: Batch,
    *,
    times: TrainingTimes,
    batch_size: int,
    seed: int,
    conditions: Collection[ConditionName] | None = None,
    align_weight: float = 0.0,
) -> StepResult:
    """Draw time, latents, noise and dropped conditions for each image, and compare velocities.

    Every number is drawn from the image's own stream (seed, position), in this order. Nothing synchronises with the
    device.

    Args:
        network: the model's network, possibly compiled and distributed; called under `runtime.autocast`.
        batch: from the data loader; its tensors go to the model's device. Positions may lie there already.
        batch_size: images per optimizer step over all processes, for stratified times.
        conditions: those given for every image; None: dropout, each is dropped at random.
        align_weight: of the loss of the latents that `network`, an `AlignedNetwork`, returns with the velocity; 0:
            it returns the velocity alone.
    """
    device = model.device
    positions = on_device(batch.positions, device)
    # Of each image: one uniform number for the time, two normal ones per latent value, and a uniform one per condition.
    random = ImageRandom.at(seed, "step", positions, device).ahead(16 + 2 * math.prod(model.config.latent_shape) + 8)
    time = times.draw(random.uniform(), positions, batch_size)
    batch = batch.to(device)
    moments = model.moments(batch.pixels) if batch.moments is None else batch.moments
    data = model.latents(moments, random)
    noise = random.normal(*data.shape[1:])
    dropped = model.config.conditioning.draw_dropped(random)
    if conditions is not None:
        dropped = {name: torch.full_like(rows, name not in conditions) for name, rows in dropped.items()}
    condition, predicted = batch_condition(model, batch, data, dropped), None

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal predicted
        with model.runtime.autocast(), repeatable_dropout(model.network, seed, batch.positions):
            found = network(x, t, condition)
        found, predicted = found if align_weight else (found, None)
        return found

    velocity_loss = flow_matching_loss(velocity, model.config.path, data, noise, time)
    if isinstance(model.network, NoisePredictor):
        velocity_loss = velocity_loss * model.network.loss_weight(time)
    aligned = None if predicted is None else align_loss(predicted, data)
    return StepResult(velocity_loss, time, aligned, align_weight)


def has_dropout(network: nn.Module) -> bool:
    """Whether layers of a network drop features at random in training; then the host must know where the batch is."""
    return any(isinstance(module, nn.Dropout) and module.p for module in network.modules())


@contextmanager
def repeatable_dropout(network: nn.Module, seed: int, positions: Tensor) -> Iterator[None]:
    """Make dropout layers repeatable in a resumed run, without changing the caller's random state."""
    if not (network.training and has_dropout(network)):
        yield
        return
    device = next(network.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "dropout", int(positions[0])))
        yield


def batch_condition(model: FlowModel, batch: Batch, data: Tensor, dropped: dict[ConditionName, Tensor]) -> Condition:
    """The condition of each image, without what is `dropped`."""
    conditioning = model.config.conditioning
    masked_latents = None
    if batch.known_moments is not None:
        masked_latents = model.latents(batch.known_moments)
    elif batch.known_pixels is not None:
        # Of all images: to skip those that are all hole, the host would have to wait for the device.
        masked_latents = model.latents(model.moments(batch.known_pixels))
    paired = None
    if batch.input_moments is not None:
        paired = model.latents(batch.input_moments)
    elif batch.inputs is not None:
        paired = model.paired_input(batch.inputs)
    given = Condition(
        labels=batch.labels if conditioning.num_classes else None,
        masked_latents=masked_latents,
        mask=batch.mask,
        class_fractions=batch.class_fractions,
        input=paired,
        columns=batch.columns,
        augmentation=batch.augmentation if conditioning.augmentation else None,
    )
    return conditioning.drop(conditioning.build(data.shape, data.device, given), dropped)
