"""The model that a recipe begins with: what the data and the autoencoder decide is read from them.

Its weights are random, or those of the recipe's `init_from`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import ValidationError

from latentflow.autoencoder import Autoencoder, LatentNormalisation
from latentflow.data.batches import SpatialData, TrainingImages, epoch_order
from latentflow.data.buckets import Bucket
from latentflow.data.cache.reader import LatentCache
from latentflow.data.hold_out import HeldOut
from latentflow.data.items import ImageSource
from latentflow.data.latent_statistics import ChannelSums
from latentflow.data.painting.input_rules import InputRules
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.painting.masks import masks_fingerprint
from latentflow.data.pictures.variants import VARIANT_NUMBERS
from latentflow.errors import ConfigError
from latentflow.model.conditioning import ColumnCondition, Conditioning
from latentflow.model.config import AutoencoderRecord, ModelConfig, TrainingRecord
from latentflow.model.flow_model import FlowModel
from latentflow.networks.dit import DiTConfig
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.randomness import derive_seed
from latentflow.records import explain
from latentflow.training.config import Recipe
from latentflow.training.data_columns import chosen_columns, measured_columns
from latentflow.training.finetuning import Source, finetuned, finetuned_config

_STATISTICS_IMAGES = 2048  # enough for per-channel means and deviations to three digits


@dataclass(frozen=True)
class DataConditions:
    """What the conditions of a model take from its training data.

    Attributes:
        class_names, map_class_names, map_palette: as in `ImageSource`; empty: the model has no such condition.
        columns: the named columns that it is conditioned on.
        masks: the holes of an inpainting model; None: holes are no condition.
        inputs: the paired inputs; None: the model gets none.
        input_format, pixel_format: of the pixels of these inputs, and of the images.
    """

    class_names: Sequence[str] = ()
    map_class_names: Sequence[str] = ()
    map_palette: Sequence[tuple[int, int, int]] = ()
    columns: Sequence[ColumnCondition] = ()
    masks: MaskRules | None = None
    inputs: InputRules | None = None
    input_format: PixelFormat | None = None
    pixel_format: PixelFormat = RGB

    @classmethod
    def of(cls, recipe: Recipe, images: TrainingImages) -> DataConditions:
        """As a recipe has them on its images.

        Raises:
            ConfigError: see `chosen_columns`.
        """
        source, has_maps, inputs = images.source, recipe.conditioning.semantic_map, None
        if recipe.conditioning.input and source.input_format is not None:
            inputs = recipe.data.inputs.resolved(source.input_format, source.pixel_format)
        return cls(
            class_names=source.class_names if recipe.data.labels else (),
            map_class_names=source.map_class_names if has_maps else (),
            map_palette=source.map_palette if has_maps else (),
            columns=measured_columns(chosen_columns(recipe.conditioning, source.columns, recipe.data.path), images),
            masks=images.spatial.holes if images.spatial else None,
            inputs=inputs,
            input_format=source.input_format if inputs else None,
            pixel_format=source.pixel_format,
        )

    def network_channels(self, autoencoder: AutoencoderRecord) -> int:
        """Channels of the input at latent size; 0 without inputs.

        Raises:
            ConfigError: see `InputRules.network_channels`.
        """
        if self.inputs is None or self.input_format is None:
            return 0
        formats = (self.input_format, self.pixel_format)
        return self.inputs.network_channels(*formats, autoencoder.factor, autoencoder.num_channels)


def build_model(
    recipe: Recipe,
    autoencoder: Autoencoder,
    images: TrainingImages,
    *,
    held_out: HeldOut | None = None,
    check: Callable[[ModelConfig], None] = lambda config: None,
    source: Source | None = None,
) -> FlowModel:
    """A fresh model for a recipe. Images without labels make an unconditional model.

    Args:
        held_out: which images of the data are not among `images`, to be recorded.
        check: called with the model's config before the network is built.
        source: the model of the recipe's `init_from`; what its method does not train is frozen.

    Raises:
        ConfigError: the network does not fit the latents.
    """
    conditions = DataConditions.of(recipe, images)
    own = recipe.normalise == "autoencoder"
    if source is not None:
        normalisation = source.config.normalisation
    else:
        normalisation = autoencoder.normalisation if own else _per_channel(autoencoder, images)
    config = model_config(
        recipe,
        AutoencoderRecord.of(autoencoder),
        normalisation,
        conditions,
        training=training_record(images, held_out, labelled=bool(conditions.class_names)),
    )
    buckets = _buckets(images) if len(images.buckets) > 1 else []
    config = config.model_copy(update={"buckets": buckets})
    require_fitting_sizes(config)
    if source is not None:
        config = finetuned_config(config, source)
    check(config)
    if source is not None:
        return finetuned(config, source, recipe, autoencoder)
    torch.manual_seed(derive_seed(recipe.training.seed, "weights"))
    return FlowModel(config, config.build_network(), autoencoder)


def model_config(
    recipe: Recipe,
    autoencoder: AutoencoderRecord,
    normalisation: LatentNormalisation,
    data: DataConditions,
    *,
    training: TrainingRecord | None = None,
) -> ModelConfig:
    """The config of the model that a recipe trains on data with these conditions.

    Raises:
        ConfigError: the network does not fit the latents, or the parts contradict each other.
    """
    latents, multiple = recipe.data.image_size.over(autoencoder.factor), recipe.network.size_multiple
    if not latents.is_multiple_of(multiple):
        pixels = autoencoder.factor * multiple
        raise ConfigError(
            f"network: latents of {latents.words} do not fit a {recipe.network.title}, which needs multiples of "
            f"{multiple}; choose another patch_size or fewer levels, or a data.image_size that is a multiple of "
            f"{pixels}, such as {' or '.join(map(str, recipe.data.image_size.nearest(pixels)))}"
        )
    _require_block_to_align(recipe)
    conditions = recipe.conditioning
    try:
        return ModelConfig(
            image_size=recipe.data.image_size,
            network=recipe.network,
            path=recipe.path,
            conditioning=Conditioning(
                class_names=list(data.class_names),
                label_dropout=conditions.label_dropout,
                inpainting=conditions.inpainting,
                inpainting_dropout=conditions.inpainting_dropout,
                map_class_names=list(data.map_class_names),
                map_palette=list(data.map_palette),
                map_dropout=conditions.map_dropout,
                columns=list(data.columns),
                input_channels=data.network_channels(autoencoder),
                input_dropout=conditions.input_dropout,
                augmentation=list(VARIANT_NUMBERS) if recipe.data.augment else [],
            ),
            masks=data.masks,
            inputs=data.inputs,
            input_format=data.input_format if data.inputs else None,
            pixel_format=data.pixel_format,
            autoencoder=autoencoder,
            normalisation=normalisation,
            sampling=recipe.sampling,
            training=training or TrainingRecord(),
        )
    except ValidationError as error:
        raise ConfigError(f"recipe: {explain(error, ModelConfig)}") from error


def _buckets(images: TrainingImages) -> list[Bucket]:
    """The sizes of a latent cache, with the number of images that are trained on."""
    pairs = zip(images.source.plan.sizes, images.buckets, strict=True)
    return [Bucket(size=size, num_images=len(rows)) for size, rows in pairs]


def require_fitting_sizes(config: ModelConfig) -> None:
    """Refuse buckets that the network cannot take.

    Raises:
        ConfigError: with the remedy.
    """
    multiple = config.pixel_multiple
    if wrong := [str(size) for size in config.sizes if not size.is_multiple_of(multiple)]:
        raise ConfigError(
            f"network: a {config.network.title} needs sides that are multiples of {multiple} pixels, and the latent "
            f"cache has buckets of {', '.join(wrong)}; encode it with --bucket-step {multiple}, or choose another "
            "patch_size or fewer levels"
        )


def _require_block_to_align(recipe: Recipe) -> None:
    """Refuse a head for training on a network without tokens, or after a block that is not there."""
    weight, block, network = recipe.training.align_weight, recipe.training.align_block, recipe.network
    if not recipe.training.is_aligned:
        return
    if not isinstance(network, DiTConfig):
        raise ConfigError(
            f"training.align_weight = {weight:g} needs the tokens of a transformer, and the network is a "
            f"{network.title}; use network.kind=dit, or training.align_weight=0"
        )
    if block > network.depth:
        raise ConfigError(
            f"training.align_block = {block}, but the network has {network.depth} blocks; use one from 1 to "
            f"{network.depth}"
        )


def training_record(images: TrainingImages, held_out: HeldOut | None, *, labelled: bool) -> TrainingRecord:
    """What a model is trained on, for its config.

    Args:
        held_out: images of the data that are not among `images`.
        labelled: whether it knows the classes of the data.
    """
    source = images.source
    if isinstance(source, LatentCache):
        description, fingerprint = source.plan.source, source.plan.source_fingerprint
    else:
        description, fingerprint = source.description, source.fingerprint()
    return TrainingRecord(
        data=description,
        data_fingerprint=fingerprint,
        masks_fingerprint=_masks_fingerprint(images.spatial, source),
        num_images=len(images),
        held_out=held_out,
        variants=source.plan.variants if images.augment else 0,
        images_per_class=images.images_per_class() if labelled else [],
    )


def _masks_fingerprint(spatial: SpatialData | None, source: LatentCache | ImageSource) -> str:
    if spatial is None or spatial.holes is None:
        return ""
    return source.plan.masks_fingerprint if spatial.cached_holes else masks_fingerprint(spatial.holes)


def _per_channel(autoencoder: Autoencoder, images: TrainingImages) -> LatentNormalisation:
    """Zero mean and unit variance per channel: from the cache's statistics, or from a sample of the images."""
    if isinstance(images.source, LatentCache):
        mean, std = images.source.index.channel_mean, images.source.index.channel_std
    else:
        sums = ChannelSums(autoencoder.num_channels)
        for index in epoch_order(0, len(images), 0)[:_STATISTICS_IMAGES].tolist():
            pixels = torch.from_numpy(images.source[int(images.kept[index])].pixels.copy()).permute(2, 0, 1)
            sums.add(autoencoder.encode(images.source.pixel_format.to_unit(pixels[None])))
        mean, std = sums.mean_and_std()
    return LatentNormalisation(shift=mean, scale=[1.0 / s for s in std])
