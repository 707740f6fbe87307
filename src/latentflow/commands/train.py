"""`latentflow train`: a recipe => a run folder with a model in it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

import latentflow
from latentflow.artifacts import make_folder, require_apart, require_writable, write_json, write_text
from latentflow.autoencoder import Autoencoder, LatentNormalisation, to_unit_range
from latentflow.data.batches import SpatialData, TrainingImages, epoch_order
from latentflow.data.cache.reader import LatentCache, is_cache
from latentflow.data.cache.resident import resident_bytes, stays_resident
from latentflow.data.items import ImageSource, require_every_class
from latentflow.data.latent_statistics import ChannelSums
from latentflow.data.painting.masks import check_masks, masks_fingerprint
from latentflow.data.sources.images import open_images, readable
from latentflow.errors import ConfigError, DataError
from latentflow.locks import writes
from latentflow.model.conditioning import Conditioning
from latentflow.model.config import AutoencoderRecord, ModelConfig, TrainingRecord
from latentflow.model.flow_model import CONFIG_FILE, FlowModel, read_config
from latentflow.progress import image_progress
from latentflow.randomness import derive_seed
from latentflow.records import explain
from latentflow.runtime import Runtime
from latentflow.sampling.drawing import check_drawing
from latentflow.sampling.preview import preview_request, save_preview
from latentflow.training.changes import RECIPE_FILE, Changes, as_begun, check_changes
from latentflow.training.config import CHANGES, Recipe
from latentflow.training.fitting import FITTED, Situation, fit, is_set, value_of, with_values
from latentflow.training.interruption import Outcome
from latentflow.training.loop import micro_batches
from latentflow.training.memory import (
    bytes_per_image,
    count_parameters,
    free_memory,
    memory_mode,
    require_memory,
    total_memory,
)
from latentflow.training.settings import load_settings, to_yaml
from latentflow.training.velocity import train_velocity

_REPLACED = ("model", "checkpoints", "samples")  # folders of a run
_STATISTICS_IMAGES = 2048  # enough for per-channel means and deviations to three digits


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked, before anything of it is written.

    Attributes:
        recipe: with everything decided.
        runtime: what it runs on.
        model: with fresh weights.
        images: what it learns from.
        broken: images that could not be read, each with the reason.
        changes: of the recipe since the run began; None for a new run.
        resident: whether the latent cache is to lie in the device's memory.
        reasons: why the recipe was fitted as it was, in a few lines.
    """

    recipe: Recipe
    runtime: Runtime
    model: FlowModel
    images: TrainingImages
    broken: list[str]
    changes: Changes | None
    resident: bool
    reasons: list[str]

    @property
    def run(self) -> Path:
        return Path(self.recipe.out)

    def describe(self) -> dict[str, str]:
        """The run in about ten lines."""
        config, told, training = self.model.config, self.model.config.conditioning, self.recipe.training
        num_images, side = len(self.images), config.latent_shape[-1]
        passes = training.steps * training.batch_size / num_images
        parameters = sum(parameter.numel() for parameter in self.model.network.parameters())
        optimizer, step = self.recipe.optimizer, self.changes.step if self.changes else 0
        size = f"{config.image_size} x {config.image_size}" + (", mirrored at random" if self.recipe.data.flip else "")
        rows = {
            "data": f"{num_images:,} images of {size}: {self.recipe.data.path}"
            + (", in memory" if self.resident else ""),
            "classes": _listed(told.class_names) if told.class_names else "none",
            "latents": f"{config.latent_shape[0]} x {side} x {side}, by {self.recipe.autoencoder}",
            "network": f"{config.network.title}, {parameters:,} parameters",
            "training": f"{training.steps:,} steps of {training.batch_size} images, {times(passes)} over the data",
            "optimizer": f"AdamW at {optimizer.learning_rate:g}, {optimizer.schedule}",
            "device": _device(self.runtime),
            "run": f"{self.run}, " + (f"going on after step {step:,}" if self.changes else "new"),
        }
        spatial = [name for name in told.dropout if name != "label"]
        if spatial:
            rows["told"] = ", ".join(told.dropout)
        if self.broken:
            rows["left out"] = f"{len(self.broken)} images that cannot be read"
        if self.reasons:
            rows["fitted"] = "; ".join(self.reasons)
        if not isinstance(self.images.source, LatentCache):
            rows["hint"] = "images are encoded in every step; `latentflow encode` does it once, which trains faster"
        return rows


@dataclass(frozen=True)
class TrainResult:
    """What `train` did: the run folder, the loop's outcome, names of images that could not be read."""

    run: Path
    outcome: Outcome
    broken: list[str]


@writes(lambda given: given["recipe"].out, launch=True)
def train(
    recipe: Recipe,
    *,
    allow_change: Sequence[str] = (),
    on_prepared: Callable[[Prepared], None] = lambda prepared: None,
    runtime: Runtime | None = None,
) -> TrainResult:
    """Train one recipe; repeating the call resumes exactly.

    Everything that can be wrong is found before the run folder is touched.

    Args:
        recipe: checked; `out` and `data.path` must be set.
        allow_change: keys of the recipe that may differ from the run's although they alter what is computed.
        on_prepared: called once all has been checked.
        runtime: where to train; the recipe says in what precision.

    Raises:
        ConfigError, DataError, ArtifactError: before anything is written.
        NonFiniteError: during training.
    """
    assert runtime is not None  # opened by `writes`
    prepared = prepare(recipe, runtime, allow_change=allow_change)
    on_prepared(prepared)
    run = prepared.run
    if runtime.is_main:
        make_folder(run)
        if prepared.changes:
            prepared.changes.tell()
            prepared.changes.record()
        write_text(run / RECIPE_FILE, to_yaml(prepared.recipe))
        write_json(run / "environment.json", environment(prepared.runtime))

    if prepared.resident:
        prepared.images.hold(prepared.runtime.device)
    batch_size = micro_batches(prepared.recipe.training, prepared.runtime).size

    def preview(model: FlowModel, weights: Mapping[str, Tensor], step: int) -> None:
        file = run / "samples" / f"step-{step:08d}.png"
        save_preview(model, weights, prepared.images, file, prepared.runtime, batch_size)

    outcome = train_velocity(prepared.recipe, prepared.model, prepared.images, run, prepared.runtime, preview=preview)
    return TrainResult(run, outcome, prepared.broken)


def prepare(recipe: Recipe, runtime: Runtime, *, allow_change: Sequence[str] = ()) -> Prepared:
    """Decide what a recipe leaves open and check all of it; nothing is written.

    Raises:
        ConfigError, DataError, ArtifactError: see `train`.
    """
    if not recipe.data.path:
        raise ConfigError("data.path is not set; add data.path=FOLDER (images, a zip, or a latent cache)")
    if not recipe.out:
        raise ConfigError("out is not set; add out=runs/NAME")
    usable_name(recipe.data.path, "data.path")
    run = require_writable(usable_name(recipe.out, "out"))
    require_apart(run, recipe.data.path, recipe.data.images, recipe.data.masks.folder, replaced=_REPLACED)
    recipe = as_begun(_as_begun(_as_cached(recipe), run), run)
    changes = None if recipe.fit else check_changes(run, recipe, CHANGES, allow_change)
    source = open_source(recipe)
    autoencoder = Autoencoder.from_pretrained(recipe.autoencoder)
    if isinstance(source, LatentCache):
        source.require_autoencoder(autoencoder)
        kept, broken = None, source.index.broken
    else:
        kept, unreadable = readable(source, processes=recipe.data.num_workers != 0)
        broken = [f"{error.name}: {error.reason}" for error in unreadable]
        if not kept:
            raise DataError(f"{recipe.data.path}: none of {len(broken)} images can be read; {unreadable[0]}")
    if recipe.data.labels and source.class_names:
        remedy = f"{broken[0]}; repair them or take the folders away" if broken else "encode it anew"
        labels = source.labels(range(len(source))).tolist() if kept is None else map(source.label, kept)
        require_every_class(source.class_names, labels, recipe.data.path, f"{remedy}, or set data.labels=false")
    side, reasons = autoencoder.latent_side(recipe.data.image_size), []
    if recipe.fit:
        num_images = len(source) if kept is None else len(kept)
        recipe, reasons = fit(recipe, _situation(recipe, source, num_images, side, runtime))
    runtime = runtime.with_precision(recipe.training.precision)
    micro_batches(recipe.training, runtime)
    autoencoder = autoencoder.to(runtime.for_autoencoder())
    spatial = spatial_data(recipe, source, autoencoder.factor)
    images = TrainingImages(source, seed=recipe.training.seed, flip=recipe.data.flip, kept=kept, spatial=spatial)
    model = build_model(recipe, autoencoder, images, check=partial(_require_memory, recipe, runtime))
    _check_preview(recipe, model)
    _refuse_other_content(run, recipe, model.config)
    resident = _stays_resident(recipe, images, runtime)
    return Prepared(recipe, runtime, model, images, broken, changes, resident, reasons)


def usable_name(path: str, key: str) -> str:
    """Refuse a path with a part that is too long to be the name of a file.

    Raises:
        ConfigError: with the key of the recipe.
    """
    longest = max((len(os.fsencode(part)) for part in Path(path).parts), default=0)
    if longest > 255:
        raise ConfigError(f"{key} = {path[:20]!r}... has a name of {longest} bytes; 255 are the most")
    return path


def _as_cached(recipe: Recipe) -> Recipe:
    """A recipe with what a latent cache decides, where it is not set."""
    if not is_cache(recipe.data.path):
        return recipe
    plan = LatentCache(recipe.data.path).plan
    told = {"data.image_size": plan.image_size, "data.flip": plan.flips, "autoencoder": plan.autoencoder}
    return with_values(recipe, {key: value for key, value in told.items() if not is_set(recipe, key)})


def _as_begun(recipe: Recipe, run: Path) -> Recipe:
    """A recipe to be fitted, with what was fitted when its run began."""
    file = run / RECIPE_FILE
    if not recipe.fit or not file.exists():
        return recipe
    old = load_settings(Recipe, file)
    values = {key: value_of(old, key) for key in FITTED if not is_set(recipe, key)}
    return with_values(recipe, {"fit": False, **values})


def _situation(
    recipe: Recipe, source: LatentCache | ImageSource, num_images: int, side: int, runtime: Runtime
) -> Situation:
    memory, gpu = total_memory(runtime.device), runtime.device.type == "cuda"
    shared = 1 if gpu else runtime.local_world
    return Situation(
        num_images=num_images,
        num_classes=len(source.class_names) if recipe.data.labels else 0,
        side=side,
        gpu=gpu,
        memory=memory // shared if memory else None,
        num_processes=runtime.world,
    )


def _require_memory(recipe: Recipe, runtime: Runtime, config: ModelConfig) -> None:
    """Refuse a network or a batch that the memory cannot hold, before it is built."""
    share, half = micro_batches(recipe.training, runtime).size, runtime.precision in ("bf16", "fp16")
    per_image = bytes_per_image(
        config.network,
        config.latent_shape[-1],
        half=half,
        memory=memory_mode(recipe.training.memory, config, share, runtime),
    )
    free, shared = free_memory(runtime.device), 1 if runtime.device.type == "cuda" else runtime.local_world
    require_memory(
        config.network.title,
        count_parameters(config),
        per_image,
        share,
        free // shared if free else None,
        key="training.micro_batch_size",
    )


def _stays_resident(recipe: Recipe, images: TrainingImages, runtime: Runtime) -> bool:
    """Whether a latent cache is to lie in the device's memory.

    Not where pictures are decoded for each batch, and not unasked where processes are to read it.
    """
    data, device = recipe.data, runtime.device
    if images.decodes or (data.resident == "auto" and data.num_workers):
        return False
    num_bytes = resident_bytes(images.source, images.cached_tensors, flips=images.flip)
    sharing = 1 if device.type == "cuda" else runtime.local_world
    return stays_resident(data.resident, num_bytes, device, free_memory(device), sharing)


def _check_preview(recipe: Recipe, model: FlowModel) -> None:
    """Refuse guidance, solvers and conditions that no picture could be drawn with."""
    conditioning, scale = model.config.conditioning, recipe.sampling.guidance
    if scale != 1 and not conditioning.can_guide:
        why, other = f"{recipe.data.path} has no labels, so nothing is told that it could strengthen", ""
        if conditioning.dropout:
            key = next(iter(conditioning.kinds.values())).dropout_key
            why, other = f"conditioning.{key} = 0: what is never left out cannot be strengthened", f" or raise {key}"
        raise ConfigError(f"sampling.guidance = {scale:g}, but {why}; add sampling.guidance=1{other}")
    check_drawing(model, preview_request(model))


def _device(runtime: Runtime) -> str:
    return f"{runtime.device_name}, {runtime.precision}" + (f", {runtime.world} processes" if runtime.world > 1 else "")


def times(passes: float) -> str:
    """How often, in words."""
    return f"{passes:,.0f} passes" if passes >= 10 else f"{passes:.2g} passes"


def _listed(names: Sequence[str], most: int = 6) -> str:
    """So many names, and how many there are."""
    shown = ", ".join(names[:most])
    return f"{len(names)}: {shown}" + (", ..." if len(names) > most else "")


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
    with image_progress("checking", len(cache)) as on_images:
        cache.verify(on_images)
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
        if source.plan.identity == "sizes":  # of an earlier version, which has names alone to compare
            same = set(source.names()) <= {pictures.name(row) for row in range(len(pictures))}
        else:
            same = pictures.fingerprint() == source.plan.source_fingerprint
        if not same:
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


def build_model(
    recipe: Recipe,
    autoencoder: Autoencoder,
    images: TrainingImages,
    *,
    check: Callable[[ModelConfig], None] = lambda config: None,
) -> FlowModel:
    """A fresh model for a recipe: what the data and the autoencoder decide is read from them.

    Unlabelled images make an unconditional model.

    Args:
        check: called with the model's config before the network is built.

    Raises:
        ConfigError: the network does not fit the latents.
    """
    source, told, spatial = images.source, recipe.conditioning, images.spatial
    class_names = list(source.class_names) if recipe.data.labels else []
    images_per_class = images.images_per_class() if class_names else []
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
    try:
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
            training=TrainingRecord(
                data=description,
                data_fingerprint=fingerprint,
                masks_fingerprint=_masks_fingerprint(spatial, source),
                num_images=len(images),
                images_per_class=images_per_class,
            ),
        )
    except ValidationError as error:
        raise ConfigError(f"recipe: {explain(error, ModelConfig)}") from error
    check(config)
    torch.manual_seed(derive_seed(recipe.training.seed, "weights"))
    return FlowModel(config, config.build_network(), autoencoder)


def _masks_fingerprint(spatial: SpatialData | None, source: LatentCache | ImageSource) -> str:
    if spatial is None or spatial.holes is None:
        return ""
    return source.plan.masks_fingerprint if spatial.cached_holes else masks_fingerprint(spatial.holes)


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
    if before.training.masks_fingerprint and config.training.masks_fingerprint != before.training.masks_fingerprint:
        raise ConfigError(
            f"the mask files in {config.masks.folder} have changed since {run} was begun; restore them or choose "
            "another out"
        )
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


def environment(runtime: Runtime) -> dict[str, object]:
    """What a run ran on, for environment.json."""
    return {
        "latentflow": latentflow.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": runtime.device_name,
        "num_processes": runtime.world,
        "num_threads": torch.get_num_threads(),
    }
