"""The data of a recipe: a latent cache or images, with the holes and maps that its conditions need."""

from __future__ import annotations

from latentflow.data.batches import SpatialData
from latentflow.data.buckets import in_sizes
from latentflow.data.cache.reader import LatentCache, is_cache
from latentflow.data.cache.schema import CachePlan
from latentflow.data.items import ImageSource
from latentflow.data.painting.input_rules import FILES, NO_INPUTS
from latentflow.data.painting.masks import check_masks
from latentflow.data.paired_choice import PairedChoice
from latentflow.data.pixel_choice import PixelChoice
from latentflow.data.sources.images import open_images, table_with
from latentflow.data.sources.pixel_survey import choice_for
from latentflow.errors import ConfigError, DataError
from latentflow.progress import image_progress
from latentflow.training.config import DataConfig, Recipe
from latentflow.training.fitting import is_set, with_values

_AUGMENT = 0.5
"""The share of variants where a recipe does not set it: the image itself is still seen more often than any variant."""


def with_cached(recipe: Recipe, plan: CachePlan) -> Recipe:
    """A recipe in which a latent cache decides image size, flips, variants and autoencoder where they are not set."""
    cached = {"data.image_size": plan.image_size, "data.flip": plan.flips, "autoencoder": plan.autoencoder}
    if plan.variants and not recipe.conditioning.inpainting:
        cached["data.augment"] = _AUGMENT
    values = {key: value for key, value in cached.items() if not is_set(recipe, key)}
    if plan.inputs is not None and plan.inputs.agrees_with(recipe.data.inputs):
        values["data.inputs"] = plan.inputs
    return with_values(recipe, values)


def paired_choice(recipe: Recipe) -> PairedChoice:
    """The paired inputs that a recipe reads with its images."""
    return PairedChoice(recipe.data.inputs.origin if recipe.conditioning.input else NO_INPUTS, PixelChoice())


def open_source(recipe: Recipe) -> LatentCache | ImageSource:
    """The recipe's data: a latent cache if the path is one, else images.

    Raises:
        ConfigError: the data do not agree with the recipe.
        DataError, ArtifactError: see `open_images` and `LatentCache`.
    """
    path = recipe.data.path
    if is_cache(path):
        source: LatentCache | ImageSource = _open_cache(recipe)
    else:
        given = {"table": recipe.data, "inputs": paired_choice(recipe)}
        given["pixels"] = choice_for(recipe.data, recipe.autoencoder)
        source = open_images(path, recipe.data.image_size, **given)
    if recipe.data.augment:
        _require_variants(recipe, source)
    return source


def _open_cache(recipe: Recipe) -> LatentCache:
    data = recipe.data
    if data.asks_for_table and not data.images:
        raise ConfigError(
            f"data.label_column, data.columns and data.file_column are about a table, and {data.path} is a latent "
            "cache, whose classes and columns are those it was encoded with; leave them out, or encode it again"
        )
    cache = LatentCache(data.path)
    with image_progress("checking", len(cache)) as on_images:
        cache.verify(on_images)
    if cache.plan.image_size != data.image_size:
        size = cache.plan.image_size
        raise ConfigError(
            f"data.image_size = {data.image_size}, but {data.path} holds images of {size}; set data.image_size={size}"
        )
    if not data.agrees(cache.pixel_format):
        raise ConfigError(
            f"data.pixels = {data.pixels}, data.depth = {data.depth}, data.value_range = {data.value_range}, but "
            f"{data.path} was encoded as {cache.pixel_format.title}; leave them out, or encode the images again"
        )
    if data.flip and not cache.plan.flips:
        raise ConfigError(
            f"data.flip = true, but {data.path} holds no mirrored images; set data.flip=false or encode with --flips"
        )
    return cache


def _require_variants(recipe: Recipe, source: LatentCache | ImageSource) -> None:
    """Refuse data without augmented variants, and holes, which are cut into the images alone."""
    data = recipe.data
    if not isinstance(source, LatentCache) or not source.plan.variants:
        what = "holds no variants" if isinstance(source, LatentCache) else "is no latent cache, which would hold them"
        raise ConfigError(
            f"data.augment = {data.augment:g}, but {data.path} {what}; encode it with --variants 4, or set "
            "data.augment=0"
        )
    if recipe.conditioning.inpainting:
        raise ConfigError(
            f"data.augment = {data.augment:g}, but conditioning.inpainting = true, and holes are cut into the images "
            "alone, not into their variants; set data.augment=0"
        )


def spatial_data(recipe: Recipe, source: LatentCache | ImageSource, factor: int) -> SpatialData | None:
    """Where holes, semantic maps and inputs come from; None for a model with none of these conditions.

    Raises:
        ConfigError: the data have no maps or inputs, or there are no holes to train on.
        DataError: `data.images` are not the images of the latent cache.
    """
    conditions, data = recipe.conditioning, recipe.data
    if conditions.semantic_map and not source.map_class_names:
        raise ConfigError(
            f"conditioning.semantic_map = true, but {data.path} has no semantic maps; lay the data out as images/, "
            "masks/ and classes.json (`latentflow prepare --help`), or set it to false"
        )
    if conditions.input:
        _require_inputs(recipe, source)
    read = {"maps": conditions.semantic_map, "inputs": conditions.input}
    if not conditions.inpainting:
        return SpatialData(factor, **read) if any(read.values()) else None
    if data.images or not isinstance(source, LatentCache):
        check_masks(data.masks, *data.image_size)
    if not isinstance(source, LatentCache):
        return SpatialData(factor, holes=data.masks, **read)
    if data.images:
        pictures = _images_of_cache(data, source)
        return SpatialData(factor, holes=data.masks, pictures=pictures, **read)
    if not source.plan.mask_variants:
        raise ConfigError(
            f"conditioning.inpainting = true, but {data.path} holds no images with holes; set data.images to the "
            "images it was made from, or encode with --mask-variants 4"
        )
    return SpatialData(factor, holes=source.plan.masks, cached_holes=True, **read)


def _require_inputs(recipe: Recipe, source: LatentCache | ImageSource) -> None:
    """Refuse data without paired inputs, or with others than the recipe is for."""
    data = recipe.data
    if source.input_format is None:
        how = "encode with --inputs " if isinstance(source, LatentCache) else "set data.inputs.origin="
        raise ConfigError(
            f"conditioning.input = true, but {data.path} has no paired inputs; lay the data out as images/ and "
            f"inputs/, or make inputs from the images: {how}shrink:4, or gray"
        )
    if isinstance(source, LatentCache) and not (found := source.plan.inputs).agrees_with(data.inputs):
        raise ConfigError(
            f"data.inputs is {data.inputs.title}, but {data.path} holds {found.title}; encode it with --inputs "
            f"{data.inputs.origin} --input-form {data.inputs.form}, or train with data.inputs.origin={found.origin} "
            f"data.inputs.form={found.form}"
        )


def _images_of_cache(data: DataConfig, cache: LatentCache) -> ImageSource:
    """The images at `data.images`, which must be those that a cache was made from."""
    path, plan = data.images, cache.plan
    own = table_with(path, plan.columns, class_names=plan.class_names)
    is_paired = plan.inputs is not None and not plan.inputs.is_derived
    given = {
        "table": data if data.asks_for_table else own,
        "pixels": plan.pixel_format,
        "inputs": PairedChoice(FILES if is_paired else NO_INPUTS, plan.input_format),
    }
    images = open_images(path, plan.image_size, **given)
    if len(images) > plan.num_source_images:  # the cache may hold the first of them
        images = open_images(path, plan.image_size, first=plan.num_source_images, **given)
    if plan.identity == "sizes":  # of an earlier version, which has only names to compare
        same = set(cache.names()) <= {images.name(row) for row in range(len(images))}
    else:
        images = in_sizes(images, plan.sizes)
        same = images.fingerprint() == plan.source_fingerprint
    if not same:
        raise DataError(
            f"data.images = {path} ({images.description}) are not the images that {data.path} was made from "
            f"({plan.source})"
        )
    return images
