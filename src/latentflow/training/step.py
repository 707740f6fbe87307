"""One training step's mathematics: from a batch to a loss per image."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from latentflow.autoencoder import to_unit_range
from latentflow.conditioning import ConditionName
from latentflow.data.batches import Batch
from latentflow.flow.loss import flow_matching_loss
from latentflow.flow.times import TrainingTimes
from latentflow.latent_flow import LatentFlow
from latentflow.randomness import ImageRandom, derive_seed
from latentflow.shapes import Condition


@dataclass(frozen=True)
class StepResult:
    """What one forward pass gives.

    Attributes:
        loss: [B] float32, the flow-matching loss of each image, with its graph.
        time: [B] float32, the time drawn for each image.
    """

    loss: Tensor
    time: Tensor


def training_step(
    model: LatentFlow,
    network: Callable[[Tensor, Tensor, Condition], Tensor],
    batch: Batch,
    *,
    times: TrainingTimes,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    told: Collection[ConditionName] | None = None,
) -> StepResult:
    """Draw time, latents, noise and dropped conditions for each image, and compare velocities.

    Every number is drawn from the image's own stream (seed, position), in this order.

    Args:
        network: the model's network as it is called in training (compiled, distributed).
        batch: from the data loader.
        batch_size: images per optimizer step over all processes, for stratified times.
        told: the conditions that every image is told; None: each is dropped at random, as training wants it.
    """
    random = ImageRandom.at(seed, "step", batch.positions)
    time = times.draw(random.uniform(), batch.positions, batch_size).to(device)
    batch = batch.to(device)
    moments = model.autoencoder.encode(to_unit_range(batch.pixels)) if batch.moments is None else batch.moments
    data = model.latents(moments, random)
    noise = random.normal(*data.shape[1:], device=data.device)
    dropped = model.config.conditioning.draw_dropped(random)
    if told is not None:
        dropped = {name: torch.full(rows.shape, name not in told) for name, rows in dropped.items()}
    condition = _condition(model, batch, data, dropped)
    # Dropout inside a network draws from torch's own generator; a resumed run must drop the same again.
    torch.manual_seed(derive_seed(seed, "dropout", int(batch.positions[0])))
    loss = flow_matching_loss(lambda x, t: network(x, t, condition), model.config.path, data, noise, time)
    return StepResult(loss, time)


def _condition(model: LatentFlow, batch: Batch, data: Tensor, dropped: dict[ConditionName, Tensor]) -> Condition:
    """What each image is told, less what is `dropped`. Images that are all hole are not encoded."""
    conditioning = model.config.conditioning
    masked_latents = None
    if batch.known_moments is not None:
        masked_latents = model.latents(batch.known_moments)
    elif batch.known_pixels is not None:
        told = (~dropped["inpainting"]).nonzero().flatten().to(data.device, non_blocking=True)
        masked_latents = torch.zeros_like(data)
        if len(told):
            masked_latents[told] = model.encode(to_unit_range(batch.known_pixels[told]))
    condition = conditioning.build(
        data.shape,
        data.device,
        labels=batch.labels if conditioning.num_classes else None,
        masked_latents=masked_latents,
        mask=batch.mask,
        class_fractions=batch.class_fractions,
    )
    return conditioning.drop(condition, dropped)
