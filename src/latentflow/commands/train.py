"""`latentflow train`: a recipe => a run folder with a model in it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import latentflow
from latentflow.artifacts import make_folder, write_json, write_text
from latentflow.autoencoder import Autoencoder, LatentNormalisation, to_unit_range
from latentflow.commands.preview import preview_request, save_preview
from latentflow.conditioning import Conditioning
from latentflow.data.batches import SpatialData, TrainingImages, epoch_order
from latentflow.data.images import open_images, readable
from latentflow.data.items import ImageSource
from latentflow.data.latent_cache import ChannelSums, LatentCache, is_cache
from latentflow.data.masks import check_masks
from latentflow.errors import ConfigError, DataError
from latentflow.latent_flow import CONFIG_FILE, LatentFlow, read_config
from latentflow.model_config import AutoencoderRecord, ModelConfig, TrainingRecord
from latentflow.randomness import derive_seed
from latentflow.sampling.request import check_request
from latentflow.training.changes import RECIPE_FILE, check_changes
from latentflow.training.config import CHANGES, Recipe
from latentflow.training.loop import Outcome, make_accelerator
from latentflow.training.loop import train as run_loop
from latentflow.training.settings import to_yaml

_STATISTICS_IMAGES = 2048  # enough for per-channel means and deviations to three digits


@dataclass(frozen=True)
class TrainResult:
    """What `train` did: the run folder, the loop's outcome, names of images that could not be read."""

    run: Path
    outcome: Outcome
    broken: list[str]


def train(recipe: Recipe, *, cpu: bool = False, allow_change: Sequence[str] = ()) -> TrainResult:
    """Train one recipe; repeating the call resumes exactly.

    Everything that can be wrong is found before the run folder is touched.

    Args:
        recipe: checked; `out` and `data.path` must be set.
        cpu: stay on the CPU even if there is a GPU.
        allow_change: keys of the recipe that may differ from the run's although they alter what is computed.

    Raises:
        ConfigError, DataError, ArtifactError: before anything is written.
        NonFiniteError: during training.
    """
    if not recipe.data.path:
        raise ConfigError("data.path is not set; add data.path=FOLDER (images, a zip, or a latent cache)")
    if not recipe.out:
        raise ConfigError("out is not set; add out=runs/NAME")
    run = Path(recipe.out)
    changes = check_changes(run, recipe, CHANGES, allow_change)
    accelerator = make_accelerator(recipe.training, cpu=cpu)
    source = open_source(recipe)
    autoencoder = Autoencoder.from_pretrained(recipe.autoencoder).to(accelerator.device)
    if isinstance(source, LatentCache):
        source.require_autoencoder(autoencoder)
        kept, broken = None, source.index.broken
    else:
        kept, unreadable = readable(source)
        broken = [f"{error.name}: {error.reason}" for error in unreadable]
        if not kept:
            raise DataError(f"{recipe.data.path}: none of {len(broken)} images can be read; {unreadable[0]}")
    spatial = spatial_data(recipe, source, autoencoder.factor)
    images = TrainingImages(source, seed=recipe.training.seed, flip=recipe.data.flip, kept=kept, spatial=spatial)
    model = build_model(recipe, autoencoder, images)
    check_request(model, preview_request(model))
    _refuse_other_content(run, recipe, model.config)
    if accelerator.is_main_process:
        make_folder(run)
        if changes:
            changes.tell()
            changes.record()
        write_text(run / RECIPE_FILE, to_yaml(recipe))
        write_json(run / "environment.json", environment(accelerator.device, accelerator.num_processes))

    def preview(model: LatentFlow, weights: Mapping[str, Tensor], step: int) -> None:
        save_preview(model, weights, images, run / "samples" / f"step-{step:08d}.png")

    outcome = run_loop(recipe, model, images, run, accelerator, preview=preview)
    return TrainResult(run, outcome, broken)


def open_source(recipe: Recipe) -> LatentCache | ImageSource:
    """The recipe's data: a latent cache if the path is one, else images.

    Raises:
        ConfigError: the cache does not agree with the recipe.
        DataError, ArtifactError: see `open_images` and `LatentCache`.
    """
    data = recipe.data
    if not is_cache(data.path):
        return open_images(data.path, data.image_size)
    cache = LatentCache(data.path)
    if cache.plan.image_size != data.image_size:
        size = cache.plan.image_size
        raise ConfigError(
            f"data.image_size = {data.image_size}, but {data.path} holds images of {size}; set data.image_size={size}"
        )
    if data.flip and not cache.plan.flips:
        raise ConfigError(
            f"data.flip = true, but {data.path} holds no mirrored images; set data.flip=false or encode with --flips"
        )
    return cache


def spatial_data(recipe: Recipe, source: LatentCache | ImageSource, factor: int) -> SpatialData | None:
    """Where holes and semantic maps come from; None for a model that is told neither.

    Raises:
        ConfigError: the data have no maps, or no holes can be had.
        DataError: `data.images` are not the images of the latent cache.
    """
    told, data = recipe.conditioning, recipe.data
    if told.semantic_map and not source.map_class_names:
        raise ConfigError(
            f"conditioning.semantic_map = true, but {data.path} has no semantic maps; lay the data out as images/, "
            "masks/ and classes.json (`latentflow prepare --help`), or set it to false"
        )
    if not told.inpainting:
        return SpatialData(factor, maps=True) if told.semantic_map else None
    if data.images or not isinstance(source, LatentCache):
        check_masks(data.masks, data.image_size, data.image_size)
    if not isinstance(source, LatentCache):
        return SpatialData(factor, holes=data.masks, maps=told.semantic_map)
    if data.images:
        pictures, wanted = open_images(data.images, source.plan.image_size), source.plan.num_source_images
        if len(pictures) > wanted:  # the cache may hold the first of them
            pictures = open_images(data.images, source.plan.image_size, first=wanted)
        if pictures.fingerprint() != source.plan.source_fingerprint:
            raise DataError(
                f"data.images = {data.images} ({pictures.description}) are not the images that {data.path} was made "
                f"from ({source.plan.source})"
            )
        return SpatialData(factor, holes=data.masks, maps=told.semantic_map, pictures=pictures)
    if not source.plan.mask_variants:
        raise ConfigError(
            f"conditioning.inpainting = true, but {data.path} holds no images with holes; set data.images to the "
            "images it was made from, or encode with --mask-variants 4"
        )
    return SpatialData(factor, holes=source.plan.masks, cached_holes=True, maps=told.semantic_map)


def build_model(recipe: Recipe, autoencoder: Autoencoder, images: TrainingImages) -> LatentFlow:
    """A fresh model for a recipe: what the data and the autoencoder decide is read from them.

    Unlabelled images make an unconditional model.

    Raises:
        ConfigError: the network does not fit the latents.
    """
    source, told, spatial = images.source, recipe.conditioning, images.spatial
    class_names = list(source.class_names) if recipe.data.labels else []
    if isinstance(source, LatentCache):
        description, fingerprint = source.plan.source, source.plan.source_fingerprint
    else:
        description, fingerprint = source.description, source.fingerprint()
    side, multiple = autoencoder.latent_side(recipe.data.image_size), recipe.network.size_multiple
    if side % multiple:
        raise ConfigError(
            f"network: latents of {side} x {side} do not fit a {recipe.network.title}, which needs multiples of "
            f"{multiple}; choose another patch_size or fewer levels, or a data.image_size that is a multiple of "
            f"{autoencoder.factor * multiple}"
        )
    config = ModelConfig(
        image_size=recipe.data.image_size,
        network=recipe.network,
        path=recipe.path,
        conditioning=Conditioning(
            class_names=class_names,
            label_dropout=told.label_dropout,
            inpainting=told.inpainting,
            inpainting_dropout=told.inpainting_dropout,
            map_class_names=list(source.map_class_names) if told.semantic_map else [],
            map_palette=list(source.map_palette) if told.semantic_map else [],
            map_dropout=told.map_dropout,
        ),
        masks=spatial.holes if spatial else None,
        autoencoder=AutoencoderRecord.of(autoencoder),
        normalisation=autoencoder.normalisation
        if recipe.normalise == "autoencoder"
        else _per_channel(autoencoder, images),
        sampling=recipe.sampling,
        training=TrainingRecord(data=description, data_fingerprint=fingerprint, num_images=len(images)),
    )
    torch.manual_seed(derive_seed(recipe.training.seed, "weights"))
    return LatentFlow(config, config.build_network(), autoencoder)


def _refuse_other_content(run: Path, recipe: Recipe, config: ModelConfig) -> None:
    """Images and autoencoder may have moved since the run began; what is in them must be the same."""
    if not (run / "model" / CONFIG_FILE).exists():
        return
    before = read_config(run / "model")
    if config.autoencoder.content_hash != before.autoencoder.content_hash:
        raise ConfigError(
            f"{run} was trained with an autoencoder of hash {before.autoencoder.content_hash[:12]}, but "
            f"{recipe.autoencoder} has {config.autoencoder.content_hash[:12]}; restore that one or choose another out"
        )
    if config.masks != before.masks:
        raise ConfigError(f"{run} was trained with the holes {before.masks}, not {config.masks}; choose another out")
    if config.training.data_fingerprint != before.training.data_fingerprint:
        raise ConfigError(
            f"{run} was trained on other images ({before.training.data}) than data.path holds now "
            f"({config.training.data}); restore them or choose another out"
        )


def _per_channel(autoencoder: Autoencoder, images: TrainingImages) -> LatentNormalisation:
    """Zero mean and unit variance per channel: from the cache's statistics, or from a sample of the images."""
    if isinstance(images.source, LatentCache):
        mean, std = images.source.index.channel_mean, images.source.index.channel_std
    else:
        sums = ChannelSums(autoencoder.num_channels)
        for index in epoch_order(0, len(images), 0)[:_STATISTICS_IMAGES].tolist():
            pixels = torch.from_numpy(images.source[int(images.kept[index])].pixels.copy()).permute(2, 0, 1)
            sums.add(autoencoder.encode(to_unit_range(pixels[None])))
        mean, std = sums.mean_and_std()
    return LatentNormalisation(shift=mean, scale=[1.0 / s for s in std])


def environment(device: torch.device, num_processes: int) -> dict[str, object]:
    """What a run ran on, for environment.json."""
    return {
        "latentflow": latentflow.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "num_processes": num_processes,
        "num_threads": torch.get_num_threads(),
    }
