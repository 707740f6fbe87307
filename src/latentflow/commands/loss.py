"""`latentflow loss`: the loss on images that a model may not have seen, and what it gains from each condition."""

from __future__ import annotations

from pathlib import Path

from latentflow.data.batches import SpatialData, TrainingImages
from latentflow.data.cache.reader import LatentCache, is_cache
from latentflow.data.items import ImageSource
from latentflow.data.sources.images import open_images, readable
from latentflow.errors import ConfigError
from latentflow.model.conditioning import Conditioning, ConditionName
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.training.held_out import HeldOutLoss, held_out_loss


def loss(
    model: str | Path,
    data: str | Path,
    *,
    num: int = 1000,
    batch_size: int = 64,
    seed: int = 0,
    runtime: Runtime | None = None,
) -> list[HeldOutLoss]:
    """The mean loss over `num` draws, told nothing, each condition alone, and everything, as far as the model can.

    Args:
        data: a folder or zip of images, 'synthetic:COUNT:SEED', or a latent cache, with the labels and semantic maps
            of the model.

    Raises:
        ArtifactError, ConfigError, DataError: the model or the data cannot be used, or do not fit each other.
    """
    flow = FlowModel.from_pretrained(model, precision="fp32", runtime=runtime)
    images = held_out_images(flow, data, seed=seed)
    sets = condition_sets(flow.config.conditioning)
    if num < 1:
        raise ConfigError(f"number of draws {num}: at least 1 is needed")
    with image_progress("measuring", num * len(sets)) as on_images:
        return [
            held_out_loss(flow, images, told, num_draws=num, batch_size=batch_size, seed=seed, on_images=on_images)
            for told in sets
        ]


def condition_sets(conditioning: Conditioning) -> list[list[ConditionName]]:
    """Nothing, each condition alone, all of them; what the model cannot do without is always told."""
    everything = list(conditioning.kinds)
    sets = [[], *([name] for name in everything), everything]
    return [list(told) for told in dict.fromkeys(tuple(conditioning.with_required(names)) for names in sets)]


def held_out_images(model: FlowModel, data: str | Path, *, seed: int = 0) -> TrainingImages:
    """Images to measure the loss of a model on, with the holes it learned to fill.

    Raises:
        ConfigError: classes, image size or autoencoder are not those of the model.
    """
    config, kept = model.config, None
    source: LatentCache | ImageSource
    if is_cache(data):
        source = LatentCache(data)
        source.verify()
        source.require_autoencoder(model.autoencoder)
        if source.plan.image_size != config.image_size:
            raise ConfigError(f"{data} holds images of {source.plan.image_size}, the model draws {config.image_size}")
    else:
        source = open_images(data, config.image_size)
        kept, _ = readable(source)
    conditioning = config.conditioning
    for what, found, wanted in (
        ("classes", source.class_names, conditioning.class_names),
        ("map classes", source.map_class_names, conditioning.map_class_names),
    ):
        if wanted and list(found) != wanted:
            raise ConfigError(f"{data} has the {what} {list(found)}, but the model knows {wanted}")
    cached = conditioning.inpainting and isinstance(source, LatentCache)
    if cached and not source.plan.mask_variants:
        raise ConfigError(f"{data} holds no images with holes; give the images, or encode with --mask-variants 4")
    spatial = SpatialData(
        config.autoencoder.factor,
        holes=config.masks if conditioning.inpainting else None,
        cached_holes=cached,
        maps=conditioning.num_map_classes > 0,
    )
    return TrainingImages(source, seed=seed, flip=False, kept=kept, spatial=spatial)
