"""A latent cache, or images, in the memory of a device gives what its files give."""

from __future__ import annotations

from dataclasses import fields
from itertools import islice

import pytest
import torch

from latentflow.commands.train import prepare, train
from latentflow.data.batches import Batch, SpatialData, StreamPositions, TrainingImages, stream_batches
from latentflow.data.cache.reader import LatentCache
from latentflow.data.cache.resident import resident_bytes, stays_resident
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.prefetch import Reading
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.training.config import DataConfig, load_recipe
from tests import tiny
from tests.tiny import write_cache

CPU, GPU = torch.device("cpu"), torch.device("cuda")
POSITIONS = range(5, 65)


def both(cache, *, flip=True, **spatial) -> tuple[TrainingImages, TrainingImages]:
    """The same images, read from files and held in memory."""
    given = SpatialData(tiny.FACTOR, **spatial) if spatial else None
    read, held = (TrainingImages(LatentCache(cache), seed=3, flip=flip, spatial=given) for _ in range(2))
    held.hold(CPU)
    return read, held


def same(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert (left is None) == (right is None), field.name
        assert left is None or (left.dtype == right.dtype and torch.equal(left, right)), field.name


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("spatial", [{}, {"maps": True, "cached_holes": True}])
def test_batches_are_those_of_the_files(segmented_cache, flip, spatial):
    read, held = both(segmented_cache, flip=flip, **spatial)
    same(read.at(POSITIONS), held.at(POSITIONS))
    assert (read.at(POSITIONS).known_moments is not None) == bool(spatial)
    one, other = (
        stream_batches(images, StreamPositions(3, 8, 4, 1, 2), num_workers=None, pin_memory=False)
        for images in (read, held)
    )
    for _ in range(5):
        same(next(one), next(other))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("labelled", [True, False])
def test_batches_of_images_are_those_of_their_files(images, flip, num_workers, labelled):
    source = open_images(images if labelled else images / "apple", tiny.IMAGE_SIZE)
    kept = list(range(1, len(source), 2))
    read, held = (TrainingImages(source, seed=3, flip=flip, kept=kept) for _ in range(2))
    held.hold(CPU, Reading(num_workers))
    same(read.at(POSITIONS), held.at(POSITIONS))
    assert read.at(POSITIONS).pixels.is_contiguous() and held.at(POSITIONS).pixels.is_contiguous()
    positions = StreamPositions(3, 8, 4, 1, 2)
    streams = (stream_batches(one, positions, num_workers=num_workers, pin_memory=False) for one in (read, held))
    for one, other in islice(zip(*streams, strict=True), 5):
        same(one, other)


def test_an_image_that_cannot_be_read_any_more_is_named(tmp_path):
    source = open_images(tiny.write_images(tmp_path / "own"), tiny.IMAGE_SIZE)
    (tmp_path / "own" / "apple" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cannot read the image apple/3\.png"):
        TrainingImages(source, seed=0, flip=False).hold(CPU)


def test_holes_as_signs_and_unlabelled_images(tmp_path, segmented, kl):
    source = open_images(segmented / "images" / "apple", tiny.IMAGE_SIZE)
    write_cache(source, kl, tmp_path / "cache", mask_variants=2, masks=MaskRules(told_as="sign"), shard_size=3)
    read, held = both(tmp_path / "cache", flip=False, cached_holes=True)
    same(read.at(POSITIONS), held.at(POSITIONS))
    assert held.at(POSITIONS).labels is None
    assert set(held.at(POSITIONS).mask.unique().tolist()) == {-1.0, 1.0}


def test_a_shard_of_broken_images_is_passed_over(tmp_path, images, kl):
    own = tiny.write_images(tmp_path / "own")
    for number in range(5):
        (own / "apple" / f"{number}.png").write_bytes(b"no picture")
    write_cache(open_images(own, tiny.IMAGE_SIZE), kl, tmp_path / "cache", shard_size=5)
    read, held = both(tmp_path / "cache", flip=False)
    same(read.at(POSITIONS), held.at(POSITIONS))


def test_a_shard_that_was_cut_off_is_named_while_it_is_loaded(tmp_path, images, kl):
    write_cache(open_images(images, tiny.IMAGE_SIZE), kl, tmp_path / "cache", shard_size=5)
    cache = LatentCache(tmp_path / "cache")
    with (tmp_path / "cache" / "shard-00001.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors is truncated"):
        TrainingImages(cache, seed=0, flip=False).hold(CPU)


def test_bytes_are_those_that_are_held(segmented_cache):
    for flip in (False, True):
        _, held = both(segmented_cache, flip=flip, maps=True, cached_holes=True)
        expected = resident_bytes(held.source, held.cached_tensors, flips=flip)
        assert sum(tensor.nbytes for tensor in held.held[0]._tensors.values()) == expected
    assert set(held.cached_tensors) == {"moments", "labels", "class_counts", "known_moments", "hole_counts"}


@pytest.mark.parametrize(
    ("wanted", "device", "num_bytes", "sharing", "stays"),
    [
        ("auto", GPU, 33, 1, True),
        ("auto", GPU, 34, 1, False),
        ("auto", CPU, 25, 1, True),
        ("auto", CPU, 25, 2, False),
        ("auto", torch.device("mps"), 1, 1, False),
        ("true", GPU, 99, 1, True),
        ("true", CPU, 50, 2, True),
        ("false", GPU, 1, 1, False),
    ],
)
def test_a_small_part_of_the_memory_is_taken_unasked(wanted, device, num_bytes, sharing, stays):
    assert stays_resident(wanted, num_bytes, device, 100, sharing) is stays


def test_where_nobody_knows_what_is_free():
    assert not stays_resident("auto", 1, CPU, None)
    assert stays_resident("true", 1, CPU, None)


def test_what_does_not_fit_is_refused_with_numbers():
    with pytest.raises(ConfigError, match=r"takes 30\.00 GiB of GPU memory, and 20\.00 GiB are free; set .*=auto"):
        stays_resident("true", 30 << 30, GPU, 20 << 30)
    with pytest.raises(ConfigError, match=r"takes 30\.00 GiB of memory in 2 processes, and 20\.00 GiB are free"):
        stays_resident("true", 15 << 30, CPU, 20 << 30, 2)


def test_the_recipe_says_it(cache, kl_folder, tmp_path):
    assert DataConfig().resident == "auto"
    assert DataConfig(resident=True).resident == "true"
    given = {"data": {"path": cache}, "autoencoder": kl_folder, "out": tmp_path / "run", "training": {"steps": 2}}
    for wanted, stays in (("auto", True), ("true", True), ("false", False)):
        recipe = tiny.recipe(**{**given, "data": {"path": cache, "resident": wanted}})
        prepared = prepare(recipe, tiny.CPU)
        assert prepared.resident is stays
        assert not prepared.images.held  # nothing is loaded before all has been checked
        assert ("in memory" in prepared.describe()["data"]) is stays
    for key in ("true", "false", "auto"):
        assert load_recipe("celeb256_f8_adm", [f"data.resident={key}"]).data.resident == key


def test_a_run_may_go_on_from_memory_or_from_files_and_learns_the_same(cache, kl_folder, tmp_path):
    weights = []
    for steps in ([("true", 4)], [("false", 2), ("true", 4)]):
        out = tmp_path / str(len(steps))
        for wanted, last in steps:
            data = {"path": cache, "resident": wanted, "flip": True}
            training = {"steps": last, "checkpoint_every": 2}
            train(tiny.recipe(data=data, autoencoder=kl_folder, out=out, training=training), runtime=tiny.CPU)
        weights.append((out / "model" / "velocity.safetensors").read_bytes())
    assert weights[0] == weights[1]
