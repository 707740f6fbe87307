"""What a recipe would train, read or assumed: of data only headers are read, and nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from latentflow.autoencoder import BUILT_IN, Autoencoder, LatentNormalisation
from latentflow.columns import Column
from latentflow.data.cache.reader import LatentCache, is_cache
from latentflow.data.cache.schema import CachePlan
from latentflow.data.hold_out import count_held_out
from latentflow.data.items import ImageSource
from latentflow.data.painting.input_pixels import derived_format
from latentflow.data.sources.images import open_images
from latentflow.errors import ConfigError
from latentflow.model.config import AUTOENCODER_FOLDER, AutoencoderRecord, ModelConfig
from latentflow.model.surgery import graft
from latentflow.networks.in_training import sampled_part
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.planning.machine import Machine
from latentflow.planning.request import PlanRequest
from latentflow.sizes import Size
from latentflow.training.config import Recipe
from latentflow.training.data_columns import chosen_columns
from latentflow.training.finetuning import choose_trained, finetuned_config, open_source_model, with_preset, with_source
from latentflow.training.fitting import Situation
from latentflow.training.fresh_model import DataConditions, model_config, require_fitting_sizes
from latentflow.training.memory import network_in_training
from latentflow.training.student_recipe import StudentRecipe
from latentflow.training.training_data import paired_choice, with_cached
from latentflow.training.velocity_run import decided

_ASSUMED_IMAGES, _ASSUMED_CLASSES, _ASSUMED_MAP_CLASSES = 10_000, 10, 20


@dataclass(frozen=True)
class DataFacts:
    """Facts about the training data.

    Attributes:
        num_images: None if unknown.
        num_classes, num_map_classes: 0 if there are none.
        num_held_out: of the images, by the teacher of a student.
        class_names, map_class_names: if they are known.
        columns: named columns.
        cache: the plan of a latent cache, if the data are one.
        num_bytes: of this latent cache on disk.
        assumed: why these numbers are not read from the data; "" if they are.
        pixels, inputs: the formats of images and of paired inputs; None: there are no inputs.
    """

    num_images: int | None
    num_classes: int
    num_map_classes: int = 0
    num_held_out: int = 0
    class_names: tuple[str, ...] = ()
    map_class_names: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()
    cache: CachePlan | None = None
    num_bytes: int | None = None
    assumed: str = ""
    pixels: PixelFormat = RGB
    inputs: PixelFormat | None = None


@dataclass(frozen=True)
class StageFacts:
    """Facts about the first stage.

    Attributes:
        num_moments: channels in a latent cache.
        num_bytes: of its weights in memory; None if unknown.
        width: channels of its decoder at full resolution; None if unknown.
        assumed: as in `DataFacts`.
    """

    factor: int
    num_channels: int
    num_moments: int
    num_bytes: int | None = None
    width: int | None = None
    assumed: str = ""


@dataclass(frozen=True)
class PlannedRun:
    """What is planned: the resolved recipe, the model it trains, and how this is known.

    Attributes:
        made: names of parameters that the source of a finetuned model does not have; None: it has no source.
        teacher: the config of the model that is distilled; None: the model is no student.
    """

    recipe: Recipe | StudentRecipe
    config: ModelConfig
    data: DataFacts
    stage: StageFacts
    reasons: tuple[str, ...] = ()
    made: frozenset[str] | None = None
    teacher: ModelConfig | None = None

    @cached_property
    def network(self) -> nn.Module:
        """The network that is trained, without memory; what its method does not train is frozen."""
        return self.built(self.config, aligned=self.recipe.training.is_aligned)

    def built(self, config: ModelConfig, *, aligned: bool = False) -> nn.Module:
        """The network of a config, such as one of fewer blocks, without memory and with as much of it frozen."""
        network = network_in_training(config, aligned=aligned)
        if self.made is not None:
            choose_trained(sampled_part(network), self.recipe.finetuning, self.made, 0)
        return network

    @property
    def num_trained(self) -> int | None:
        """Images that are trained on, without those held out; None if unknown."""
        number = self.data.num_images
        if number is None or self.teacher is not None:
            return None if number is None else number - self.data.num_held_out
        return number - count_held_out(number, self.recipe.data.held_out)

    @property
    def autoencoder(self) -> str:
        """The name of the autoencoder."""
        if self.teacher is None:
            return self.recipe.autoencoder
        reference = self.teacher.autoencoder.reference
        return "that of the teacher" if reference == AUTOENCODER_FOLDER else reference

    @property
    def keeps_best(self) -> bool:
        """Whether the run keeps the weights with the lowest held-out loss."""
        measured = self.num_trained is not None and self.num_trained < self.data.num_images
        return measured and self.teacher is None

    @property
    def num_copies(self) -> int:
        """Copies of the weights that are in memory next to those that are trained: averages, and a teacher."""
        return self.recipe.training.num_averages + (self.teacher is not None)

    @property
    def multiple(self) -> int:
        """What the number of images that are computed together is a multiple of."""
        return 1 if self.teacher is None else self.recipe.jumps.every

    @property
    def flips(self) -> bool:
        """Whether images are mirrored at random."""
        return str(self.recipe.data.flip).lower() == "true"

    @property
    def assumed(self) -> list[str]:
        """What was assumed, a line each."""
        return [line for line in (self.data.assumed, self.stage.assumed) if line]


_SD = StageFacts(8, 4, 8, 334_615_452, 128)
_TAESD = StageFacts(8, 4, 4, 9_780_252, 64)
KNOWN_STAGES = {
    "stabilityai/sd-vae-ft-mse": _SD,
    "stabilityai/sd-vae-ft-ema": _SD,
    "stabilityai/sdxl-vae": _SD,
    "madebyollin/sdxl-vae-fp16-fix": _SD,
    "stabilityai/stable-diffusion-3-medium-diffusers/vae": StageFacts(8, 16, 32, 335_278_732, 128),
    "madebyollin/taesd": _TAESD,
    "madebyollin/taesdxl": _TAESD,
    "madebyollin/taesd3": StageFacts(8, 16, 16, 9_835_596, 64),
}
"""Published autoencoders by hub id, for machines without them."""

_CELEBA, _IMAGENET = DataFacts(27_000, 0), DataFacts(1_281_167, 1000)
PUBLISHED_DATA = {
    "bed_f8": DataFacts(120_000, 0),
    "church_f8": DataFacts(120_000, 0),
    "celeb_f8": _CELEBA,
    "celeb256_f8": _CELEBA,
    "celeb512_f8": DataFacts(30_000, 0),
    "celeb1024_f8": DataFacts(30_000, 0),
    "ffhq_f8": DataFacts(63_000, 0),
    "imnet_f8": _IMAGENET,
    "inpainting_kl": _CELEBA,
    "semantic_kl": DataFacts(27_000, 0, 19),
    "cifar10_64": DataFacts(50_000, 10),
    "camvid_128": DataFacts(367, 0, 32),
}
"""The data of the recipes in the package, by the beginning of their names."""


def plan_subject(recipe: Recipe, name: str, machine: Machine, request: PlanRequest) -> PlannedRun:
    """Find out what a recipe would train.

    Args:
        name: of the recipe; those that come with the package are for data of known sizes.
        machine: what a recipe that is to be fitted is fitted to.
        request: facts that replace what is assumed about data and autoencoder that are not here.

    Raises:
        ConfigError: the parts do not fit together, or an autoencoder is not here and nothing is known of it.
        DataError, ArtifactError: what is there is damaged.
    """
    begins = open_source_model(recipe)
    data = _data(recipe, name, request.images, request.classes)
    recipe = with_cached(recipe, data.cache) if data.cache else recipe
    if begins is not None:
        if data.cache:
            begins.require_autoencoder(data.cache.autoencoder, data.cache.autoencoder_hash, recipe.data.path)
        recipe = with_source(recipe, begins, Path(recipe.out) if recipe.out else None)
    stage = _stage(recipe, name, data.cache, request.latents)
    size = recipe.data.image_size
    if not size.is_multiple_of(stage.factor):
        raise ConfigError(
            f"data.image_size = {size} is not a multiple of {stage.factor}, the reduction factor of "
            f"{recipe.autoencoder}; use {' or '.join(map(str, size.nearest(stage.factor)))}"
        )
    reasons: list[str] = []
    if recipe.fit or begins is not None:
        if data.num_images is None:
            data = replace(data, num_images=_ASSUMED_IMAGES)
        situation = Situation(
            num_images=data.num_images - count_held_out(data.num_images, recipe.data.held_out),
            num_classes=data.num_classes if recipe.data.labels else 0,
            size=size.over(stage.factor),
            other_sizes=tuple(one.over(stage.factor) for one in data.cache.sizes[1:]) if data.cache else (),
            gpu=machine.gpu,
            memory=machine.memory,
            num_processes=machine.num_processes,
        )
        recipe, reasons = decided(recipe, situation, begins)
    config, made = _config(recipe, data, stage), None
    if begins is not None:
        config = finetuned_config(config, begins)
        former = recipe.finetuning.former_classes if data.class_names or not config.conditioning.num_classes else {}
        made = graft(begins.config, begins.stored.weights, config, former).made
        recipe = with_preset(recipe, begins.config, config.conditioning)
        config = config.model_copy(update={"sampling": recipe.sampling})
    if data.cache:
        config = config.model_copy(update={"buckets": data.cache.buckets})
        require_fitting_sizes(config)
    return PlannedRun(recipe, config, data, stage, tuple(reasons), made)


def _data(recipe: Recipe, name: str, num_images: int | None, num_classes: int | None) -> DataFacts:
    path = recipe.data.path
    if is_cache(path) if path else False:
        cache = LatentCache(path)
        plan, index = cache.plan, cache.index
        num_bytes = sum(shard.num_bytes for shard in index.shards)
        facts = replace(_facts(index.num_images, plan), columns=cache.columns, cache=plan, num_bytes=num_bytes)
        return replace(facts, pixels=plan.pixel_format, inputs=plan.input_format)
    if path and (path.startswith("synthetic:") or Path(path).exists()):
        source = open_images(path, recipe.data.image_size, table=recipe.data, inputs=paired_choice(recipe))
        facts = replace(_facts(len(source), source), columns=source.columns)
        return replace(facts, pixels=source.pixel_format, inputs=source.input_format)
    known = next((facts for start, facts in PUBLISHED_DATA.items() if name.startswith(start)), None)
    classes = _ASSUMED_CLASSES if recipe.data.labels else 0
    maps = _ASSUMED_MAP_CLASSES if recipe.conditioning.semantic_map else 0
    facts = known or DataFacts(_ASSUMED_IMAGES if recipe.fit else None, classes, maps)
    facts = replace(
        facts,
        num_images=facts.num_images if num_images is None else num_images,
        num_classes=facts.num_classes if num_classes is None else num_classes,
    )
    num_labels = facts.num_classes if recipe.data.labels else 0
    parts = [f"{facts.num_images:,} images" if facts.num_images else "an unknown number of images"]
    parts += [f"{num_labels:,} classes"] if num_labels else ["no classes"]
    parts += [f"{facts.num_map_classes} map classes"] if recipe.conditioning.semantic_map else []
    why = f"{path} is not there" if path else "data.path is not set"
    given = "; change with --images and --classes" if num_images is None or num_classes is None else ""
    return replace(facts, assumed=f"{why}: {', '.join(parts)}{' as published' if known else ''}{given}")


def _facts(num_images: int, named: CachePlan | ImageSource) -> DataFacts:
    """The number of images, and the classes of a source or of a latent cache."""
    names, maps = tuple(named.class_names), tuple(named.map_class_names)
    return DataFacts(num_images, len(names), len(maps), class_names=names, map_class_names=maps)


def _stage(recipe: Recipe, name: str, cache: CachePlan | None, latents: Sequence[int] | None) -> StageFacts:
    reference = recipe.autoencoder
    if latents is not None:
        channels, size = latents[0], Size(*latents[1:])
        factor = max(recipe.data.image_size.width // size.width, 1)
        if size.times(factor) != recipe.data.image_size:
            raise ConfigError(
                f"--latents {'x'.join(map(str, latents))}: {size.words} does not divide data.image_size = "
                f"{recipe.data.image_size}"
            )
        return StageFacts(factor, channels, 2 * channels, assumed=f"latents {'x'.join(map(str, latents))}, as given")
    if (here := stage_here(reference)) is not None:
        return here
    known = KNOWN_STAGES.get(reference)
    if cache is not None:
        facts = StageFacts(cache.factor, cache.num_channels, cache.moments_shape[0])
        return replace(facts, num_bytes=known.num_bytes, width=known.width) if known else facts
    if known is not None:
        what = f"{known.num_channels} channels, factor {known.factor}"
        return replace(known, assumed=f"the autoencoder {reference} is not available here: {what}, as published")
    if re.search("_f8(_|$)", name):
        return replace(
            _SD, num_bytes=None, assumed=f"the autoencoder {reference} is not available here: 4 channels, factor 8"
        )
    raise ConfigError(
        f"the autoencoder {reference} is not available here, and its latents are not known; add --latents 4x32x32 "
        "(channels, height and width of an image's latents), autoencoder=FOLDER, or data.path=CACHE"
    )


def stage_here(reference: str) -> StageFacts | None:
    """The facts of an autoencoder; None if it would have to be downloaded."""
    folder = _folder_here(reference)
    return None if folder is None else _facts_of(Autoencoder.from_pretrained(folder))


def _folder_here(reference: str) -> str | None:
    """A local folder of an autoencoder; None if it would have to be downloaded."""
    if reference in BUILT_IN or Path(reference).expanduser().exists():
        return reference
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    parts = reference.split("/")
    try:
        folder = Path(snapshot_download("/".join(parts[:2]), local_files_only=True)).joinpath(*parts[2:])
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return str(folder) if any(folder.rglob("*.safetensors")) else None


def _facts_of(autoencoder: Autoencoder) -> StageFacts:
    tensors = autoencoder.model.state_dict().values()
    pixels = autoencoder.pixel_channels
    ends = [m.in_channels for m in autoencoder.model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == pixels]
    return StageFacts(
        autoencoder.factor,
        autoencoder.num_channels,
        autoencoder.num_moments,
        sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        max(ends, default=None),
    )


def _config(recipe: Recipe, data: DataFacts, stage: StageFacts) -> ModelConfig:
    """The config of the model; normalisation, hash and unknown names are placeholders, which do not change its size."""
    has_maps = recipe.conditioning.semantic_map
    if has_maps and not data.num_map_classes:
        raise ConfigError(f"conditioning.semantic_map = true, but {recipe.data.path} has no semantic maps")
    num_classes = data.num_classes if recipe.data.labels else 0
    num_maps = data.num_map_classes if has_maps else 0
    inputs = recipe.data.inputs
    if recipe.conditioning.input and not data.assumed and data.inputs is None:
        raise ConfigError(f"conditioning.input = true, but {recipe.data.path} has no paired inputs")
    paired = (data.inputs or derived_format(inputs, data.pixels)) if recipe.conditioning.input else None
    autoencoder = AutoencoderRecord(
        reference=AUTOENCODER_FOLDER if _is_embedded(recipe.autoencoder) else recipe.autoencoder,
        content_hash="0" * 64,
        factor=stage.factor,
        num_channels=stage.num_channels,
    )
    return model_config(
        recipe,
        autoencoder,
        LatentNormalisation(shift=[0.0] * stage.num_channels, scale=[1.0] * stage.num_channels),
        DataConditions(
            data.class_names[:num_classes] or [f"#{number}" for number in range(num_classes)],
            data.map_class_names[:num_maps] or [f"#{number}" for number in range(num_maps)],
            [(0, 0, 0)] * num_maps,
            chosen_columns(recipe.conditioning, data.columns, recipe.data.path),
            inputs=inputs.resolved(paired, data.pixels) if paired else None,
            input_format=paired,
        ),
    )


def _is_embedded(reference: str) -> bool:
    """Whether a model folder holds the autoencoder itself."""
    return reference in BUILT_IN or Path(reference).is_dir()
