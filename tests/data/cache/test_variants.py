"""Augmented variants in a latent cache: what is stored, what the stream reads, and caches of earlier versions."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from latentflow.artifacts import read_json
from latentflow.autoencoder import to_unit_range
from latentflow.commands.info import describe
from latentflow.data.batches import SpatialData, StreamPositions, TrainingImages, stream_batches
from latentflow.data.cache.reader import LatentCache
from latentflow.data.cache.resident import resident_bytes
from latentflow.data.painting.latent_size import class_counts, shares
from latentflow.data.pictures.variants import draw_variants, mirrored_numbers, variant_of_map, variants_of
from latentflow.data.request import CacheOptions
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, ConfigError
from tests import tiny
from tests.tiny import write_cache

NUM_IMAGES, VARIANTS = 12, 3
OPTIONS = {"flips": True, "shard_size": 5, "variants": VARIANTS}
SHARE = 0.6
POSITIONS = range(5, 400)


@pytest.fixture(scope="module")
def source(segmented):
    return open_images(segmented, tiny.IMAGE_SIZE)


@pytest.fixture(scope="module")
def varied_cache(tmp_path_factory, source, kl) -> Path:
    """A latent cache of `segmented` with mirrored images and 3 variants of each, in shards of 5."""
    folder = tmp_path_factory.mktemp("caches") / "varied"
    write_cache(source, kl, folder, **OPTIONS)
    return folder


@pytest.fixture
def stored(varied_cache) -> LatentCache:
    return LatentCache(varied_cache)


def stream(cache: Path, *, flip: bool = True, maps: bool = True) -> TrainingImages:
    spatial = SpatialData(tiny.FACTOR, maps=True) if maps else None
    return TrainingImages(LatentCache(cache), seed=3, flip=flip, spatial=spatial, augment=SHARE)


@pytest.mark.parametrize("flip", [False, True])
def test_a_variant_is_the_encoded_window_with_its_numbers_and_map(stored, source, kl, flip):
    rows, flipped = range(NUM_IMAGES), [flip] * NUM_IMAGES
    drawn = draw_variants(rows, VARIANTS)
    pixels = torch.stack([to_unit_range(torch.from_numpy(item.pixels.copy()).permute(2, 0, 1)) for item in source])
    for variant in range(VARIANTS):
        numbers, chosen = drawn[:, variant], [variant + 1] * NUM_IMAGES
        shown = variants_of(pixels, numbers)
        expected = kl.encode(shown.flip(-1) if flip else shown)
        # float16 keeps 11 bits; the encoder itself differs by rounding in batches of another shape
        assert torch.allclose(stored.moments(rows, flipped, chosen).float(), expected, rtol=2**-11, atol=1e-5)
        told = stored.augmentation(rows, flipped, torch.tensor(chosen))
        assert torch.equal(told, mirrored_numbers(numbers) if flip else numbers)
        maps = [variant_of_map(item.semantic_map, one) for item, one in zip(source, numbers, strict=True)]
        counts = torch.stack([class_counts(one[:, ::-1] if flip else one, 3, tiny.FACTOR) for one in maps])
        assert torch.equal(stored.class_fractions(rows, flipped, chosen), shares(counts, tiny.FACTOR))


def test_the_images_themselves_and_their_statistics_are_as_without_variants(tmp_path, stored, source, kl):
    index = write_cache(source, kl, tmp_path / "plain", flips=True, shard_size=5)
    plain, rows = LatentCache(tmp_path / "plain"), range(NUM_IMAGES)
    for flipped in ([False] * NUM_IMAGES, [True] * NUM_IMAGES):
        assert torch.equal(stored.moments(rows, flipped, [0] * NUM_IMAGES), plain.moments(rows, flipped))
        assert torch.equal(stored.moments(rows, flipped), plain.moments(rows, flipped))
        assert not stored.augmentation(rows, flipped, torch.zeros(NUM_IMAGES, dtype=torch.int64)).any()
    assert (index.channel_mean, index.channel_std) == (stored.index.channel_mean, stored.index.channel_std)
    assert describe(tmp_path / "plain")["variants"] == 0
    assert describe(stored.folder)["variants"] == VARIANTS


def test_variants_are_chosen_one_by_one(stored):
    rows, variants, flipped = [11, 0, 5, 4, 11], torch.tensor([2, 0, 1, 3, 0]), [True, False, True, False, False]
    moments, fractions = stored.moments(rows, flipped, variants), stored.class_fractions(rows, flipped, variants)
    numbers = stored.augmentation(rows, flipped, variants)
    for place, (row, variant, flip) in enumerate(zip(rows, variants.tolist(), flipped, strict=True)):
        assert torch.equal(moments[place], stored.moments([row], [flip], [variant])[0])
        assert torch.equal(fractions[place], stored.class_fractions([row], [flip], [variant])[0])
        assert torch.equal(numbers[place], stored.augmentation([row], [flip], torch.tensor([variant]))[0])


def test_resumed_after_a_kill_and_by_two_processes_it_is_the_same_to_the_byte(tmp_path, source, varied_cache, kl):
    def die(num_images: int) -> None:
        seen.append(num_images)
        if len(seen) == 3:
            raise KeyError("killed here")

    seen: list[int] = []
    with pytest.raises(KeyError):
        write_cache(source, kl, tmp_path / "cache", batch_size=2, on_images=die, **OPTIONS)
    tiny.leave_half_written(tmp_path / "cache" / "shard-00000.safetensors")
    assert write_cache(source, kl, tmp_path / "cache", runtime=tiny.one_of_two(1), **OPTIONS) is None
    assert write_cache(source, kl, tmp_path / "cache", runtime=tiny.one_of_two(0), **OPTIONS) is not None
    assert tiny.tree(tmp_path / "cache") == tiny.tree(varied_cache)


def test_the_stream_draws_a_variant_for_each_position(varied_cache):
    images = stream(varied_cache)
    batch = images.at(POSITIONS)
    variants = images._variants(batch.positions)
    drawn = variants.bincount(minlength=VARIANTS + 1) / len(variants)
    assert torch.allclose(drawn, torch.tensor([1 - SHARE, *[SHARE / VARIANTS] * VARIANTS]), atol=0.07)
    assert torch.equal(batch.augmentation.any(1), variants > 0)
    flipped = images._uniform("flip", batch.positions) < 0.5
    assert torch.equal(batch.moments, images.source.moments(batch.indices, flipped, variants))
    assert torch.equal(batch.class_fractions, images.source.class_fractions(batch.indices, flipped, variants))
    assert torch.equal(batch.augmentation, images.source.augmentation(batch.indices, flipped, variants))


def test_without_augmentation_it_gives_the_images_themselves(varied_cache):
    images = stream(varied_cache)
    batch, itself = images.at(POSITIONS), images.at(POSITIONS, augmented=False)
    plain = ~batch.augmentation.any(1)
    assert itself.augmentation is None
    for name in ("moments", "class_fractions", "labels"):
        assert torch.equal(getattr(batch, name)[plain], getattr(itself, name)[plain]), name
    assert (batch.moments != itself.moments)[~plain].any()
    never = TrainingImages(LatentCache(varied_cache), seed=3, flip=True, spatial=images.spatial)
    same(itself, never.at(POSITIONS))


def same(one, other) -> None:
    for field in fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert (left is None) == (right is None), field.name
        assert left is None or (left.dtype == right.dtype and torch.equal(left, right)), field.name


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("maps", [False, True])
def test_a_resident_cache_gives_the_same(varied_cache, flip, maps):
    read, held = (stream(varied_cache, flip=flip, maps=maps) for _ in range(2))
    held.hold(tiny.CPU.device)
    same(read.at(POSITIONS), held.at(POSITIONS))
    taken = sum(x.numel() * x.element_size() for x in held.held[0]._tensors.values())
    assert taken == resident_bytes(held.source, held.cached_tensors, flips=flip)


def test_a_batch_depends_on_its_positions_alone(varied_cache):
    """Two processes read what one reads, in worker processes or not, from the start or later."""
    images = stream(varied_cache)
    whole = stream_batches(images, StreamPositions(0, 8, 8, 0, 1), num_workers=0, pin_memory=False)
    for step in range(3):
        alone = next(whole)
        for rank in range(2):
            share = stream_batches(images, StreamPositions(8 * step, 8, 4, rank, 2), num_workers=0, pin_memory=False)
            part = next(share)
            for name in ("moments", "augmentation", "class_fractions"):
                assert torch.equal(getattr(part, name), getattr(alone, name)[4 * rank : 4 * rank + 4]), name
    workers = stream_batches(images, StreamPositions(16, 8, 8, 0, 1), num_workers=1, pin_memory=False)
    same(next(workers), alone)
    workers.close()


def test_a_cache_of_an_earlier_version_is_read_and_continued(tmp_path, source, kl):
    """Earlier versions did not write of variants."""
    folder, options = tmp_path / "cache", {"flips": True, "shard_size": 5}
    write_cache(source, kl, folder, **options)
    before = LatentCache(folder).moments(range(NUM_IMAGES))
    for file in ("plan.json", "index.json"):
        record = read_json(folder / file)
        plan = record.get("plan", record)
        assert plan.pop("variants") == 0
        assert plan.pop("variant_rules") == ""
        (folder / file).write_text(json.dumps(record))
    assert torch.equal(LatentCache(folder).moments(range(NUM_IMAGES)), before)
    (folder / "index.json").unlink()
    (folder / "shard-00001.json").unlink()
    assert write_cache(source, kl, folder, **options).num_images == NUM_IMAGES
    with pytest.raises(ArtifactError, match="variants: 0, now 3"):
        write_cache(source, kl, folder, **OPTIONS)


def test_holes_and_variants_together_are_refused():
    with pytest.raises(ConfigError, match="variants 4: the holes of mask_variants 8 are encoded for the images alone"):
        CacheOptions(variants=4, mask_variants=8)
