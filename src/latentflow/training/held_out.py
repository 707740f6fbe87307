"""The loss on images that a model was not trained on, told this or told that."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from latentflow.data.batches import TrainingImages
from latentflow.flow.times import TrainingTimes, sum_by_time
from latentflow.model.conditioning import ConditionName
from latentflow.model.flow_model import FlowModel
from latentflow.training.step import training_step


@dataclass(frozen=True)
class HeldOutLoss:
    """The flow-matching loss of one set of conditions.

    Attributes:
        told: the conditions that were not null.
        loss: mean over images, noises and times.
        standard_error: of `loss`, from the spread between draws.
        by_time: mean over images whose time falls into each tenth of [0, 1].
    """

    told: tuple[ConditionName, ...]
    loss: float
    standard_error: float
    by_time: tuple[float, ...]


@torch.inference_mode()
def held_out_loss(
    model: FlowModel,
    images: TrainingImages,
    told: Collection[ConditionName],
    *,
    num_draws: int,
    batch_size: int = 64,
    seed: int = 0,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> HeldOutLoss:
    """The mean loss over `num_draws` draws of image, time and noise, times spread evenly over [0, 1].

    Equal arguments draw equal images, times and noises whatever the model is told, so that losses can be compared.

    Args:
        images: with the spatial data that `told` needs; images are taken in turn, in a random order.
        told: conditions that are given; the others are null.
    """
    losses, times = [], []
    for start in range(0, num_draws, batch_size):
        positions = range(start, min(start + batch_size, num_draws))
        result = training_step(
            model,
            model.velocity,
            images.at(positions),
            times=TrainingTimes(stratified=True),
            batch_size=len(positions),  # the last batch, too, spreads its times over all of [0, 1]
            seed=seed,
            told=told,
        )
        losses.append(result.loss.cpu())
        times.append(result.time.cpu())
        on_images(len(positions))
    values = torch.cat(losses).double()
    bins = sum_by_time(torch.cat(times), values)
    return HeldOutLoss(
        told=tuple(told),
        loss=values.mean().item(),
        standard_error=(values.std() / len(values) ** 0.5).item(),
        by_time=tuple((bins.sums / bins.counts.clamp(min=1)).tolist()),
    )
