"""Paired inputs in a latent cache: what is stored, what the stream reads, and that all ways give the same condition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from latentflow.autoencoder import to_uint8, to_unit_range
from latentflow.data.batches import SpatialData, TrainingImages
from latentflow.data.cache.reader import LatentCache
from latentflow.data.items import stack_pixels
from latentflow.data.painting.input_pixels import at_image_size, derived_inputs, stack_inputs
from latentflow.data.painting.input_rules import InputRules
from latentflow.data.pictures.variants import draw_variants, variants_of
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, ConfigError
from latentflow.flow.times import TrainingTimes
from latentflow.pixel_format import PixelFormat
from latentflow.training.step import training_step
from tests import tiny
from tests.tiny import write_cache

POSITIONS = range(3, 60)
WAYS = [(origin, form) for origin in ("files", "shrink:2", "shrink:4", "gray") for form in ("pixels", "latents")]


@pytest.fixture(scope="module")
def paired(tmp_path_factory) -> Path:
    return tiny.write_paired(tmp_path_factory.mktemp("paired") / "fruit")


@pytest.fixture(scope="module")
def caches(tmp_path_factory, paired, kl):
    """Latent caches by origin and form, with mirrored images, in shards of 5; made once each."""
    folder, made = tmp_path_factory.mktemp("caches"), {}

    def cache(origin: str, form: str, **options) -> LatentCache:
        key = "-".join([origin.replace(":", ""), form, *map(str, options)])
        if key not in made:
            source = open_images(paired, tiny.IMAGE_SIZE, inputs=origin)
            write_cache(source, kl, folder / key, flips=True, shard_size=5, input_form=form, **options)
            made[key] = folder / key
        return LatentCache(made[key])

    return cache


def stream(source, *, augment: float = 0.0, flip: bool = True) -> TrainingImages:
    spatial = SpatialData(tiny.FACTOR, inputs=True)
    return TrainingImages(source, seed=3, flip=flip, spatial=spatial, augment=augment)


@pytest.mark.parametrize(("origin", "form"), WAYS)
@pytest.mark.parametrize("flip", [False, True])
def test_what_is_stored_is_the_input_of_each_image(caches, paired, kl, origin, form, flip):
    cache, source = caches(origin, form), open_images(paired, tiny.IMAGE_SIZE, inputs=origin)
    pixels = stack_inputs([item.input for item in source], PixelFormat())
    pixels = pixels.flip(-1) if flip else pixels
    stored = cache.inputs(range(len(source)), [flip] * len(source))
    if form == "pixels":
        assert torch.equal(stored, pixels)
        return
    images = at_image_size(to_unit_range(pixels), InputRules(origin=origin).shrinking, 3)
    assert images.shape == (len(source), 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert torch.allclose(stored.float(), kl.encode(images), atol=2e-3)


@pytest.mark.parametrize(("origin", "form"), WAYS)
def test_the_condition_is_the_same_from_a_cache_and_from_images(caches, paired, kl, origin, form):
    """And from the cache in memory."""
    cache, source = caches(origin, form), open_images(paired, tiny.IMAGE_SIZE, inputs=origin)
    rules, seen = InputRules(origin=origin, form=form), []
    model = tiny.model(kl, inputs=rules, input_channels=source.input_format.channels)
    held = stream(cache)
    held.hold(torch.device("cpu"))
    for images in (stream(cache), held, stream(source)):

        def network(x, time, condition):
            seen.append(condition.input)
            return torch.zeros_like(x)

        given = {"times": TrainingTimes(), "batch_size": 57, "seed": 0, "conditions": ["input"]}
        training_step(model, network, images.at(POSITIONS), **given)
    assert seen[0].shape[1] == model.config.conditioning.input_channels
    assert torch.equal(seen[0], seen[1])
    assert torch.allclose(seen[0], seen[2], atol=0 if form == "pixels" else 5e-3)
    assert seen[0].abs().max() > 0.1


@pytest.mark.parametrize(("origin", "form"), [("files", "pixels"), ("shrink:4", "pixels"), ("gray", "latents")])
def test_variants_have_their_own_inputs(caches, paired, kl, origin, form):
    cache, source = caches(origin, form, variants=2), open_images(paired, tiny.IMAGE_SIZE, inputs=origin)
    rules, rows = InputRules(origin=origin), range(len(source))
    pictures = to_unit_range(stack_pixels([item.pixels for item in source]))
    for variant, numbers in enumerate(draw_variants(rows, 2).unbind(1), start=1):
        if rules.is_derived:
            expected = derived_inputs(to_uint8(variants_of(pictures, numbers)), rules)
        else:
            inputs = to_unit_range(stack_inputs([item.input for item in source], PixelFormat()))
            expected = to_uint8(variants_of(inputs, numbers))
        stored = cache.inputs(rows, None, np.full(len(rows), variant))
        if form == "latents":
            expected = kl.encode(at_image_size(to_unit_range(expected), 1, 3))
        assert torch.allclose(stored.float(), expected.float(), atol=2e-3 if form == "latents" else 0)
    images, held = stream(cache, augment=0.5), stream(cache, augment=0.5)
    held.hold(torch.device("cpu"))
    name = cache.plan.input_tensor
    batches = [one.at(POSITIONS) for one in (images, held)]
    assert torch.equal(*(getattr(batch, name) for batch in batches))
    assert (batches[0].augmentation != 0).any()


def test_a_cache_without_inputs_is_what_it_was(images, kl, tmp_path):
    index = write_cache(open_images(images, tiny.IMAGE_SIZE), kl, tmp_path / "cache")
    assert (index.plan.inputs, index.plan.input_format, index.plan.input_tensor) == (None, None, "")


def test_a_cache_is_not_continued_with_other_inputs(caches, paired, kl):
    folder = caches("gray", "pixels").folder
    with pytest.raises(ArtifactError, match="inputs"):
        write_cache(
            open_images(paired, tiny.IMAGE_SIZE, inputs="gray"),
            kl,
            folder,
            flips=True,
            shard_size=5,
            input_form="latents",
        )


def test_a_shrinking_that_does_not_fit_the_latents_is_refused(paired, kl, tmp_path):
    source = open_images(paired, 18, inputs="shrink:3")
    with pytest.raises(ConfigError, match="reduces by 2, which neither divides nor is divided by 3"):
        write_cache(source, kl, tmp_path / "cache", input_form="pixels")
    assert not (tmp_path / "cache").exists()
