"""A run of `latentflow train` before its first step: everything is decided and checked, and nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from latentflow.autoencoder import Autoencoder
from latentflow.data.batches import TrainingImages, class_labels, image_names
from latentflow.data.cache.reader import LatentCache, is_cache
from latentflow.data.cache.resident import Switch, resident_bytes, stays_resident
from latentflow.data.hold_out import HeldOut, count_held_out, hold_out
from latentflow.data.items import ImageSource, require_every_class
from latentflow.data.sources.readable import readable
from latentflow.errors import ConfigError, DataError
from latentflow.model.config import ModelConfig
from latentflow.model.flow_model import CONFIG_FILE, FlowModel, folders_of, read_config
from latentflow.model.snapshots import BEST
from latentflow.runtime import Runtime
from latentflow.sizes import Size
from latentflow.training.changes import RECIPE_FILE, Changes, as_begun, check_changes, trained_steps
from latentflow.training.compiling import captures
from latentflow.training.config import CHANGES, Recipe
from latentflow.training.data_columns import chosen_columns
from latentflow.training.finetuning import (
    FITTED_TO_SOURCE,
    Source,
    count_trained,
    fit_to_source,
    open_source_model,
    trained_share,
    with_method,
    with_preset,
    with_source,
)
from latentflow.training.fitting import FITTED, Situation, fit, is_set, value_of, with_values
from latentflow.training.fresh_model import build_model
from latentflow.training.loop import micro_batches
from latentflow.training.memory import (
    bytes_per_image,
    count_parameters,
    free_memory,
    memory_mode,
    memory_of_process,
    require_memory,
    state_bytes,
)
from latentflow.training.run_folder import PreparedRun, check_places
from latentflow.training.settings import load_settings
from latentflow.training.training_data import open_source, spatial_data, with_cached

_REPLACED = ("model", "checkpoints", "samples", BEST)  # folders of a run
_MOST_NAMED = 6


class HowToRead(Protocol):
    """The part of a recipe that says how its data are read."""

    num_workers: int | None
    resident: Switch


@dataclass(frozen=True)
class PreparedVelocity(PreparedRun):
    """A checked run of a velocity network.

    Attributes:
        model: with fresh weights.
        held_out: images of the same source that are never trained on; None: there are none.
        resident: whether the latent cache is kept in the device's memory.
        reasons: why the recipe was fitted as it was, in a few lines.
    """

    recipe: Recipe
    model: FlowModel
    held_out: TrainingImages | None
    resident: bool
    reasons: list[str]

    def describe(self) -> dict[str, str]:
        """The run in about ten lines."""
        config, conditioning = self.model.config, self.model.config.conditioning
        optimizer = self.recipe.optimizer
        size = " or ".join(one.words for one in config.sizes)
        size += ", mirrored at random" if self.recipe.data.flip else ""
        if share := self.recipe.data.augment:
            size += f", {share:.0%} of them as one of {config.training.variants} variants"
        trained, parameters = trained_share(self.model.network)[0], count_parameters(config)
        in_memory, names = ", in memory" if self.resident else "", conditioning.class_names
        listed = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
        rows = {
            "data": f"{len(self.images):,} images of {size}: {self.recipe.data.path}{in_memory}",
            "held out": f"{len(self.held_out):,} images, never trained on" if self.held_out else "none",
            "classes": f"{len(names)}: {listed}" if names else "none",
            "latents": f"{' x '.join(map(str, config.latent_shape))}, by {self.recipe.autoencoder}",
            "network": f"{config.network.title}, {parameters:,} parameters",
            "optimizer": f"{optimizer.title} at {optimizer.learning_rate:g}, {optimizer.schedule}",
            **self.rows(),
        }
        training = self.recipe.training
        if self.recipe.init_from:
            own = self.recipe.finetuning
            method = own.method if own.rank is None else f"{own.method} of rank {own.rank}"
            rows["begins as"] = f"{self.recipe.init_from}, weights {own.weights}"
            rows["method"] = f"{method}: {trained:,} parameters are trained"
        if training.is_aligned:
            rows["head"] = (
                f"on block {training.align_block}, in training only; its loss counts {training.align_weight:g}"
            )
        if set(conditioning.dropout) - {"label"}:
            rows["conditions"] = ", ".join(conditioning.dropout)
        if lengths := self.recipe.training.ema_lengths:
            listed = ", ".join(f"{length:g}" for length in lengths)
            rows["averages"] = f"of lengths {listed} next to the EMA, in {self.recipe.training.ema_snapshots} snapshots"
        if self.reasons:
            rows["fitted"] = "; ".join(self.reasons)
        if not isinstance(self.images.source, LatentCache):
            rows["hint"] = "images are encoded in every step; `latentflow encode` does it once, which trains faster"
        return rows


def prepare_velocity(recipe: Recipe, runtime: Runtime, *, allow_change: Sequence[str] = ()) -> PreparedVelocity:
    """Decide what a recipe leaves open and check all of it; nothing is written.

    Args:
        allow_change: keys of the recipe that may differ from the run's although they change what is computed.

    Raises:
        ConfigError, DataError, ArtifactError: the first thing that is wrong.
    """
    also_read = [recipe.data.images, recipe.data.masks.folder]
    also_read += [str(folder) for folder in folders_of(recipe.init_from)] if recipe.init_from else []
    run = check_places(recipe, "images, a zip, or a latent cache", also_read, replaced=_REPLACED)
    if is_cache(recipe.data.path):
        recipe = with_cached(recipe, LatentCache(recipe.data.path).plan)
    begins = open_source_model(recipe)
    if begins is not None:
        recipe = with_source(recipe, begins, run)
    recipe = as_begun(_fitted_before(recipe, run), run, CHANGES)
    changes = None if recipe.fit else check_changes(run, recipe, CHANGES, allow_change)
    source, autoencoder = open_source(recipe), Autoencoder.from_pretrained(recipe.autoencoder)
    if begins is not None:
        begins.require_autoencoder(autoencoder.reference, autoencoder.content_hash, recipe.data.path)
    usable, broken = _usable(recipe, source, autoencoder)
    kept, held_out, rule = _divided(recipe, source, usable)
    situation = _situation(recipe, source, len(kept), autoencoder.latent_size(recipe.data.image_size), runtime)
    recipe, reasons = decided(recipe, situation, begins)
    runtime = runtime.with_precision(recipe.training.precision)
    micro_batches(recipe.training, runtime)
    autoencoder = autoencoder.to(runtime.for_autoencoder())
    spatial = spatial_data(recipe, source, autoencoder.factor)
    data, seed = recipe.data, recipe.training.seed
    columns = [one.name for one in chosen_columns(recipe.conditioning, source.columns, data.path)]
    read = {"kept": kept, "spatial": spatial, "columns": columns, "augment": data.augment}
    images = TrainingImages(source, seed=seed, flip=data.flip, **read, batch_size=recipe.training.batch_size)
    _require_same_batches(changes, images)
    check = partial(_require_memory, recipe, runtime)
    model = build_model(recipe, autoencoder, images, held_out=rule, check=check, source=begins)
    if begins is not None:
        recipe = with_preset(recipe, begins.config, model.config.conditioning)
        model.config = model.config.model_copy(update={"sampling": recipe.sampling})
    _refuse_other_content(run, recipe, model.config)
    captures(recipe.training, model, images, runtime)  # refuses what cannot be
    resident = stays_in_memory(recipe.data, images, runtime)
    return PreparedVelocity(
        recipe=recipe,
        runtime=runtime,
        images=images,
        broken=broken,
        changes=changes,
        model=model,
        held_out=images.only(held_out, "held out") if held_out else None,
        resident=resident,
        reasons=reasons,
    )


def decided(recipe: Recipe, situation: Situation, begins: Source | None) -> tuple[Recipe, list[str]]:
    """The recipe with what it leaves to the data and the machine, and why."""
    if begins is not None:
        recipe = with_method(recipe, situation.num_images)
        return fit_to_source(recipe, situation, count_parameters(begins.config)) if recipe.fit else (recipe, [])
    return fit(recipe, situation) if recipe.fit else (recipe, [])


def _require_same_batches(changes: Changes | None, images: TrainingImages) -> None:
    """Refuse another batch size in the middle of a stream of buckets, whose batches are of one bucket each.

    Raises:
        ConfigError: with the remedy.
    """
    if changes is not None and len(images.buckets) > 1 and (sizes := changes.values.get("training.batch_size")):
        raise ConfigError(
            f"training.batch_size = {sizes[1]}, but the run began with {sizes[0]}, and the order of its buckets "
            "depends on it; restore it, or choose another out"
        )


def _fitted_before(recipe: Recipe, run: Path) -> Recipe:
    """A recipe to be fitted, with what was fitted when its run began; one without a saved step begins again."""
    if not recipe.fit or trained_steps(run) is None:
        return recipe
    old, keys = load_settings(Recipe, run / RECIPE_FILE), FITTED_TO_SOURCE if recipe.init_from else FITTED
    values = {key: value_of(old, key) for key in keys if not is_set(recipe, key)}
    return with_values(recipe, {"fit": False, **values})


def _usable(
    recipe: Recipe, source: LatentCache | ImageSource, autoencoder: Autoencoder
) -> tuple[Sequence[int], list[str]]:
    """Which images of the source can be read, and those that cannot, each with the reason."""
    if isinstance(source, LatentCache):
        source.require_autoencoder(autoencoder)
        kept, broken = range(len(source)), source.index.broken
    else:
        kept, unreadable = readable(source, processes=recipe.data.num_workers != 0)
        broken = [f"{error.name}: {error.reason}" for error in unreadable]
        if not kept:
            raise DataError(f"{recipe.data.path}: none of {len(broken)} images can be read; {unreadable[0]}")
    if recipe.data.labels and source.class_names:
        remedy = f"{broken[0]}; repair them or take the folders away" if broken else "encode it again"
        labels = class_labels(source, kept).tolist()
        require_every_class(source.class_names, labels, recipe.data.path, f"{remedy}, or set data.labels=false")
    return kept, broken


def _divided(
    recipe: Recipe, source: LatentCache | ImageSource, usable: Sequence[int]
) -> tuple[Sequence[int], list[int], HeldOut | None]:
    """The images to train on, those that are held out, and which these are by name; None: there are none."""
    share = recipe.data.held_out
    if not count_held_out(len(usable), share):
        return usable, [], None
    names, labels = image_names(source, usable), class_labels(source, usable) if recipe.data.labels else None
    rule = hold_out(names, share, None if labels is None else labels.tolist())
    places = set(rule.rows(names)) if rule else set()
    kept = [row for place, row in enumerate(usable) if place not in places]
    return kept, [row for place, row in enumerate(usable) if place in places], rule


def _situation(
    recipe: Recipe, source: LatentCache | ImageSource, num_images: int, size: Size, runtime: Runtime
) -> Situation:
    return Situation(
        num_images=num_images,
        num_classes=len(source.class_names) if recipe.data.labels else 0,
        size=size,
        other_sizes=_other_latent_sizes(source),
        gpu=runtime.device.type == "cuda",
        memory=memory_of_process(runtime),
        num_processes=runtime.world,
    )


def _other_latent_sizes(source: LatentCache | ImageSource) -> tuple[Size, ...]:
    """Those of the other buckets of a latent cache."""
    if not isinstance(source, LatentCache):
        return ()
    return tuple(size.over(source.plan.factor) for size in source.plan.sizes[1:])


def _require_memory(recipe: Recipe, runtime: Runtime, config: ModelConfig) -> None:
    """Refuse a network or a batch that the memory cannot hold, before it is built."""
    share, half = micro_batches(recipe.training, runtime).size, runtime.precision in ("bf16", "fp16")
    averages = recipe.training.num_averages
    aligned = recipe.training.is_aligned
    kept = {"averages": averages, "trained": count_trained(config, recipe.finetuning)}
    mode = memory_mode(recipe.training.memory, config, share, runtime, aligned=aligned, **kept)
    free, shared = free_memory(runtime.device), 1 if runtime.device.type == "cuda" else runtime.local_world
    num_parameters = count_parameters(config, aligned=aligned)
    require_memory(
        config.network.title,
        num_parameters,
        state_bytes(num_parameters, **kept),
        bytes_per_image(config.network, Size(*config.latent_shape[1:]), half=half, memory=mode, aligned=aligned),
        share,
        free // shared if free else None,
        key="training.micro_batch_size",
    )


def stays_in_memory(data: HowToRead, images: TrainingImages, runtime: Runtime) -> bool:
    """Whether the latent cache is kept in the device's memory.

    Not where pictures are decoded for each batch, and with "auto" not where worker processes are to read it.
    """
    device = runtime.device
    if images.decodes or (data.resident == "auto" and data.num_workers):
        return False
    num_bytes = resident_bytes(images.source, images.cached_tensors, flips=images.flip)
    sharing = 1 if device.type == "cuda" else runtime.local_world
    return stays_resident(data.resident, num_bytes, device, free_memory(device), sharing)


def _refuse_other_content(run: Path, recipe: Recipe, config: ModelConfig) -> None:
    """Images and autoencoder may have moved since the run began; their content must be the same."""
    if not (run / "model" / CONFIG_FILE).exists():
        return
    before = read_config(run / "model")
    if config.autoencoder.content_hash != before.autoencoder.content_hash:
        raise ConfigError(
            f"{run} was trained with an autoencoder of hash {before.autoencoder.content_hash[:12]}, but "
            f"{recipe.autoencoder} has {config.autoencoder.content_hash[:12]}; restore that one or choose another out"
        )
    if config.conditioning.class_names != before.conditioning.class_names:
        raise ConfigError(
            f"{run} was trained on the classes {_named(before)}, but {recipe.data.path} has {_named(config)}; restore "
            "them or choose another out"
        )
    if config.masks != before.masks:
        raise ConfigError(f"{run} was trained with the holes {before.masks}, not {config.masks}; choose another out")
    if config.training.variants != before.training.variants:
        raise ConfigError(
            f"{run} was trained with {before.training.variants} variants of each image, but {recipe.data.path} holds "
            f"{config.training.variants}; restore that latent cache or choose another out"
        )
    require_same_images(run, before, config)


def _named(config: ModelConfig) -> str:
    names = config.conditioning.class_names
    return ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "") or "none"


def require_same_images(run: Path, before: ModelConfig, now: ModelConfig) -> None:
    """Refuse to resume a run on other images, or with other mask files.

    Raises:
        ConfigError: they are not those that it was trained on.
    """
    if now.training.data_fingerprint != before.training.data_fingerprint:
        raise ConfigError(
            f"{run} was trained on other images ({before.training.data}) than data.path holds now "
            f"({now.training.data}); restore them or choose another out"
        )
    if before.training.masks_fingerprint and now.training.masks_fingerprint != before.training.masks_fingerprint:
        raise ConfigError(
            f"the mask files in {now.masks.folder} have changed since {run} was begun; restore them or choose "
            "another out"
        )
