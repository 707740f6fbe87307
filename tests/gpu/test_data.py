"""Latent caches on a GPU: written from there, and held there."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from latentflow.artifacts import read_tensors
from latentflow.autoencoder import Autoencoder
from latentflow.data.batches import Batch, SpatialData, StreamPositions, TrainingImages, stream_batches
from latentflow.data.cache.reader import LatentCache
from latentflow.data.prefetch import Reading
from latentflow.data.sources.images import open_images
from tests import tiny
from tests.tiny import write_cache

SMALL = {"flips": True, "shard_size": 5, "batch_size": 3, "dtype": "float32"}
MANY = ({"mask_variants": 2}, {"variants": 2})


@pytest.fixture
def encoder(kl_folder, runtime) -> Autoencoder:
    return Autoencoder.from_pretrained(kl_folder).to(runtime("fp32"))


def read(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a cache, its shards one after the other."""
    shards = [read_tensors(file) for file in sorted(folder.glob("shard-*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


@pytest.fixture
def varied_cache(segmented, kl, tmp_path) -> Path:
    write_cache(open_images(segmented, tiny.IMAGE_SIZE), kl, tmp_path / "varied", variants=2, **SMALL)
    return tmp_path / "varied"


@pytest.mark.parametrize("many", MANY, ids=["holes", "variants"])
def test_shards_are_those_of_the_cpu_whoever_reads(segmented, encoder, kl, tmp_path, many):
    source, options = open_images(segmented, tiny.IMAGE_SIZE), {**SMALL, **many}
    write_cache(source, kl, tmp_path / "here", **options)
    expected = read(tmp_path / "here")
    for num_workers in (0, 2):
        index = write_cache(source, encoder, tmp_path / str(num_workers), num_workers=num_workers, **options)
        found = read(tmp_path / str(num_workers))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-3)
        assert index.channel_std == pytest.approx(LatentCache(tmp_path / "here").index.channel_std, rel=1e-3)


@pytest.mark.parametrize("spatial", [None, SpatialData(tiny.FACTOR, maps=True, cached_holes=True)])
def test_a_cache_that_is_held_gives_what_its_files_give(segmented_cache, device, spatial):
    files, held = (TrainingImages(LatentCache(segmented_cache), seed=3, flip=True, spatial=spatial) for _ in range(2))
    same_batch(files, held, device)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_that_are_held_are_those_of_their_files(images, device, num_workers):
    source = open_images(images, tiny.IMAGE_SIZE)
    kept = range(1, len(source))
    files, held = (TrainingImages(source, seed=3, flip=True, kept=kept) for _ in range(2))
    same_batch(files, held, device, Reading(num_workers, pin_memory=True))


def test_held_variants_are_those_of_the_files(varied_cache, device):
    spatial, source = SpatialData(tiny.FACTOR, maps=True), LatentCache(varied_cache)
    files, held = (TrainingImages(source, seed=3, flip=True, spatial=spatial, augment=0.5) for _ in range(2))
    same_batch(files, held, device)


def same_batch(files: TrainingImages, held: TrainingImages, device: str, how: Reading | None = None) -> None:
    """What is read from files is what is read after `hold`."""
    held.hold(torch.device(device), how)
    one, other = files.at(range(5, 65)).to(device), held.at(range(5, 65)).to(device)
    for field in fields(Batch):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert (left is None) == (right is None)
        if left is not None:
            assert left.device == right.device
            torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("augment", [0, 0.5])
def test_reading_batches_never_waits_for_the_gpu(segmented_cache, varied_cache, cuda, hold, num_workers, augment):
    spatial = SpatialData(tiny.FACTOR, maps=True, cached_holes=not augment)
    source = LatentCache(varied_cache if augment else segmented_cache)
    images = TrainingImages(source, seed=3, flip=True, spatial=spatial, augment=augment)
    if hold:
        images.hold(torch.device(cuda))
    batches = stream_batches(images, StreamPositions(0, 8, 8, 0, 1), num_workers=num_workers, pin_memory=True)
    next(batches).to(cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        read = [next(batches).to(cuda) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        batches.close()
    assert [int(batch.positions[0]) for batch in read] == [8, 16, 24, 32, 40]
