"""The loss on images that a model was not trained on, given some of its conditions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from latentflow.data.batches import MEASURED_TOGETHER, SpatialData, TrainingImages
from latentflow.data.buckets import in_sizes
from latentflow.data.cache.reader import LatentCache, is_cache
from latentflow.data.items import ImageSource
from latentflow.data.sources.images import open_images, table_with
from latentflow.data.sources.readable import readable
from latentflow.errors import ConfigError
from latentflow.flow.times import TrainingTimes, sum_by_time
from latentflow.model.conditioning import Conditioning, ConditionName
from latentflow.model.config import ModelConfig, require_same_format
from latentflow.model.flow_model import FlowModel
from latentflow.model.own_images import is_own, rows_of_split
from latentflow.requests import Split
from latentflow.training.step import training_step


@dataclass(frozen=True)
class HeldOutLoss:
    """The flow-matching loss of one set of conditions.

    Attributes:
        told: the conditions that were given; the others were null.
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
    conditions: Collection[ConditionName],
    *,
    num_draws: int,
    batch_size: int = 64,
    seed: int = 0,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> HeldOutLoss:
    """The mean loss over `num_draws` draws of image, time and noise, with times spread evenly over [0, 1].

    Images, times and noise follow from `seed` only, so that losses with different conditions can be compared.

    Args:
        images: with the spatial data that `conditions` need; they are cycled, in a random order.
        conditions: those that are given; the others are null.
    """
    losses, times = [], []
    starts = range(0, num_draws, batch_size)
    for positions in (part for at in starts for part in images.parts(range(at, min(at + batch_size, num_draws)))):
        result = training_step(
            model,
            model.velocity,
            images.at(positions),
            times=TrainingTimes(stratified=True),
            batch_size=len(positions),  # the last batch, too, spreads its times over all of [0, 1]
            seed=seed,
            conditions=conditions,
        )
        losses.append(result.loss.cpu())
        times.append(result.time.cpu())
        on_images(len(positions))
    values = torch.cat(losses).double()
    bins = sum_by_time(torch.cat(times), values)
    return HeldOutLoss(
        told=tuple(conditions),
        loss=values.mean().item(),
        standard_error=(values.std() / len(values) ** 0.5).item(),
        by_time=tuple((bins.sums / bins.counts.clamp(min=1)).tolist()),
    )


def condition_sets(conditioning: Conditioning) -> list[list[ConditionName]]:
    """No condition, each condition by itself, and all of them; a condition that the model requires is always there."""
    everything = list(conditioning.kinds)
    sets = [[], *([name] for name in everything), everything]
    return [list(given) for given in dict.fromkeys(tuple(conditioning.with_required(names)) for names in sets)]


def _require_same_inputs(config: ModelConfig, source: LatentCache | ImageSource, data: str | Path) -> None:
    """Refuse data without paired inputs, or with others than the model was trained on."""
    found = source.plan.inputs if isinstance(source, LatentCache) else config.inputs
    if source.input_format is None or found != config.inputs:
        there = f"inputs {found.title}" if source.input_format and found else "no paired inputs"
        raise ConfigError(
            f"{data} holds {there}, but the model was trained on inputs {config.inputs.title}; give the images "
            "themselves, or encode them so"
        )
    require_same_format(config, source.input_format, data)


def images_for(
    model: FlowModel,
    data: str | Path,
    *,
    split: Split | None = "all",
    seed: int = 0,
    flip: bool = False,
    batch_size: int = MEASURED_TOGETHER,
) -> TrainingImages:
    """Images for a model, to measure its loss on or to teach a student by it, with holes as it was trained on.

    Args:
        split: which of them, if they are those that the model was trained with; None: all but those that it held out.
        flip: mirror them at random.
        batch_size: images of a step.

    Raises:
        ConfigError: the autoencoder is not that of the model; see also `open_data`.
    """
    config, conditioning = model.config, model.config.conditioning
    source = open_data(config, data)
    if cached := isinstance(source, LatentCache):
        source.verify()
        source.require_autoencoder(model.autoencoder)
    kept = None if cached else readable(source)[0]  # None: all
    if split is None:
        own = config.training.held_out is not None and is_own(config.training, source)
        split = "training" if own else "all"
    if split != "all":
        chosen = set(rows_of_split(config.training, source, split))
        kept = [row for row in (range(len(source)) if kept is None else kept) if row in chosen]
    columns = [one.name for one in conditioning.columns]
    spatial = SpatialData(
        config.autoencoder.factor,
        holes=config.masks if conditioning.inpainting else None,
        cached_holes=cached and conditioning.inpainting,
        maps=conditioning.num_map_classes > 0,
        inputs=config.inputs is not None,
    )
    read = {"kept": kept, "spatial": spatial, "columns": columns, "batch_size": batch_size}
    return TrainingImages(source, seed=seed, flip=flip, **read)


def open_data(config: ModelConfig, data: str | Path) -> LatentCache | ImageSource:
    """A latent cache, or images as a model reads them. Of a cache only the index is read.

    Raises:
        ConfigError: image sizes, pixel format, classes, paired inputs, holes or columns are not those of the model.
    """
    conditioning = config.conditioning
    if is_cache(data):
        source = LatentCache(data)
        _require_same_plan(config, source, data)
    else:
        table = table_with(data, [one.column for one in conditioning.columns], class_names=conditioning.class_names)
        given = {"pixels": config.pixel_format, "inputs": config.paired, "table": table}
        source = in_sizes(open_images(data, config.image_size, **given), config.sizes)
    _require_same_classes(config, source, data)
    if config.inputs is not None:
        _require_same_inputs(config, source, data)
    if conditioning.inpainting and isinstance(source, LatentCache) and not source.plan.mask_variants:
        raise ConfigError(f"{data} holds no images with holes; give the images, or encode with --mask-variants 4")
    conditioning.require_columns(source.columns, data)
    return source


def _require_same_plan(config: ModelConfig, cache: LatentCache, data: str | Path) -> None:
    """Refuse a cache of other image sizes or another pixel format."""
    if not {*cache.plan.sizes} <= {*config.sizes}:
        held, drawn = (" and ".join(map(str, sizes)) for sizes in (cache.plan.sizes, config.sizes))
        raise ConfigError(f"{data} holds images of {held}, the model draws {drawn}")
    if cache.pixel_format != config.pixel_format:
        held, drawn = cache.pixel_format.title, config.pixel_format.title
        raise ConfigError(f"{data} holds images of {held}, the model draws {drawn}")


def _require_same_classes(config: ModelConfig, source: LatentCache | ImageSource, data: str | Path) -> None:
    conditioning = config.conditioning
    for what, found, wanted in (
        ("classes", source.class_names, conditioning.class_names),
        ("map classes", source.map_class_names, conditioning.map_class_names),
    ):
        if wanted and list(found) != wanted:
            raise ConfigError(
                f"{data} has the {what} {list(found)}, but the model knows {wanted}; give data of the model's {what}"
            )
