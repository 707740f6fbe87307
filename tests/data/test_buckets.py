"""Aspect-ratio buckets: which sizes there are, where an image goes, and caches and batches of several sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.data.batches import SpatialData, StreamPositions, TrainingImages
from latentflow.data.buckets import BucketedImages, bucket_sizes, in_sizes, nearest_bucket, usual_step
from latentflow.data.cache.reader import LatentCache
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.pictures.crop import center_crop
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.sources.images import open_images
from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.errors import DataError
from latentflow.sizes import Size
from tests import tiny
from tests.tiny import write_cache

SIZES = [Size(20, 12), Size(16, 16), Size(12, 20)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return tiny.write_mixed(tmp_path_factory.mktemp("mixed") / "photos")


@pytest.fixture(scope="module")
def bucketed(mixed):
    return BucketedImages.of(open_images(mixed, 16), SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bucketed, kl):
    """A cache of three buckets, with mirrored images and holes; shards of 4."""
    folder = tmp_path_factory.mktemp("caches") / "mixed"
    write_cache(bucketed, kl, folder, flips=True, mask_variants=1, shard_size=4, dtype="float32", batch_size=3)
    return folder


# Sizes


@pytest.mark.parametrize(
    ("size", "step"), [(Size(64, 64), 4), (Size(256, 256), 16), (Size(1024, 1024), 64), (Size(128, 192), 16)]
)
def test_sizes_have_about_the_same_area_and_all_shapes_between_1_to_2_and_2_to_1(size, step):
    sizes = bucket_sizes(size, step)
    assert all(one.is_multiple_of(step) for one in sizes)
    assert all(abs(one.area / size.area - 1) < 0.1 for one in sizes)
    aspects = [one.aspect for one in sizes]
    assert aspects == sorted(aspects) and len(set(sizes)) == len(sizes)
    assert aspects[0] == pytest.approx(1 / 2, rel=0.15) and aspects[-1] == pytest.approx(2, rel=0.15)
    assert {Size(one.width, one.height) for one in sizes} == set(sizes)  # what can be wide can be tall
    assert size in sizes


@pytest.mark.parametrize(
    ("side", "factor", "step"), [(64, 2, 4), (256, 8, 16), (512, 8, 32), (1024, 8, 64), (64, 8, 16), (32, 4, 8)]
)
def test_the_usual_step_leaves_about_a_dozen_buckets(side, factor, step):
    assert usual_step(Size(side, side), factor) == step
    assert len(bucket_sizes(Size(side, side), step)) <= 13


def test_a_picture_goes_to_the_nearest_shape():
    sizes = [Size(96, 64), Size(80, 80), Size(64, 96)]
    for picture, wanted in (((300, 200), 0), ((200, 300), 2), ((100, 100), 1), ((9, 10), 1), ((10, 90), 2)):
        assert nearest_bucket(Size(*picture), sizes) == wanted
    assert nearest_bucket(Size(100, 1), sizes) == 0


# Images


def test_each_image_has_the_size_of_its_bucket(bucketed, mixed):
    assert [(one.size, one.num_images) for one in bucketed.buckets] == [
        (Size(12, 20), 9),  # with the most images first
        (Size(20, 12), 5),
        (Size(16, 16), 6),
    ]
    assert bucketed.image_size == (12, 20) and len(bucketed) == 20
    for index in range(20):
        item, shape = bucketed[index], bucketed.name(index).rpartition("_")[2].removesuffix(".png")
        assert (
            item.pixels.shape[:2]
            == bucketed.size(index)
            == {"wide": (12, 20), "tall": (20, 12), "square": (16, 16)}[shape]
        )
        assert (item.name, item.label) == (bucketed.name(index), bucketed.label(index))
    first = next(index for index in range(20) if bucketed.name(index).endswith("00_wide.png"))
    with Image.open(mixed / bucketed.name(first)) as picture:
        assert np.array_equal(bucketed[first].pixels, center_crop(picture, Size(12, 20)))


def test_one_bucket_can_be_taken_alone(bucketed):
    tall = bucketed.only(Size(20, 12))
    assert [tall.name(index) for index in range(5)] == [bucketed.name(index) for index in range(9, 14)]
    assert tall[4].pixels.shape == (20, 12, 3)
    with pytest.raises(DataError, match="none of them is nearest to the shape 64x16"):
        bucketed.only(Size(16, 64))


def test_a_header_that_cannot_be_read_is_a_broken_image(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    source = BucketedImages.of(open_images(tmp_path, 16), SIZES)
    (broken,) = [index for index in range(2) if source.name(index) == "b.png"]
    assert source.size(broken) == (16, 16)
    with pytest.raises(BrokenImage, match=r"b\.png"):
        source[broken]


def test_what_is_drawn_has_no_shapes():
    with pytest.raises(DataError, match="have one size; leave out --buckets"):
        BucketedImages.of(SyntheticShapes(3, 16), SIZES)
    source = SyntheticShapes(3, 16)
    assert in_sizes(source, [source.image_size]) is source


# Caches


def test_every_shard_is_of_one_bucket(folder, bucketed, kl):
    cache = LatentCache(folder)
    plan = cache.plan
    assert plan.sizes == [Size(12, 20), Size(20, 12), Size(16, 16)] and plan.image_size == (12, 20)
    assert [shard.num_images for shard in cache.index.shards] == [4, 4, 1, 4, 1, 4, 2]
    assert [plan.shape_of(number) for number in (0, 3, 6)] == [(8, 6, 10), (8, 10, 6), (8, 8, 8)]
    assert [list(plan.rows(number)) for number in (2, 3)] == [[8], [9, 10, 11, 12]]
    assert cache.ranges == [range(9), range(9, 14), range(14, 20)]
    assert cache.names() == [bucketed.name(index) for index in range(20)]
    for index in (3, 11, 19):
        pixels = torch.from_numpy(bucketed[index].pixels).permute(2, 0, 1)[None] / 127.5 - 1
        torch.testing.assert_close(cache.moments([index]), kl.encode(pixels), atol=1e-5, rtol=1e-4)


def test_encoding_again_does_nothing_and_other_sizes_are_refused(folder, bucketed, kl, mixed):
    kept = []
    options = {"flips": True, "mask_variants": 1, "shard_size": 4, "dtype": "float32"}
    before = tiny.tree(folder)
    write_cache(BucketedImages.of(open_images(mixed, 16), SIZES), kl, folder, **options, on_kept=kept.append)
    assert sum(kept) == 20 and tiny.tree(folder) == before


# Batches


def spatial() -> SpatialData:
    return SpatialData(tiny.FACTOR, holes=MaskRules(), cached_holes=True)


@pytest.mark.parametrize("held", [False, True])
def test_a_batch_is_of_one_bucket_and_every_image_is_seen(folder, held):
    cache = LatentCache(folder)
    images = TrainingImages(cache, seed=1, flip=True, batch_size=4, spatial=spatial())
    if held:
        images.hold(torch.device("cpu"))
    seen = []
    for start in range(0, 4 * 60, 4):
        batch = images.at(range(start, start + 4))
        rows = cache.ranges[images.bucket_at(batch.positions)]
        assert all(index in rows for index in batch.indices.tolist())
        size = cache.plan.sizes[images.bucket_at(batch.positions)].over(tiny.FACTOR)
        assert batch.moments.shape[2:] == batch.mask.shape[2:] == size
        assert torch.equal(batch.labels, cache.labels(batch.indices))
        seen += batch.indices.tolist()
    counts = np.bincount(seen, minlength=20)
    assert counts.min() >= 7 and counts.max() <= 17  # 240 / 20 = 12, in batches of 4


def test_what_is_held_in_memory_is_what_is_read(folder):
    cache = LatentCache(folder)
    read, held = (TrainingImages(cache, seed=1, flip=True, batch_size=4, spatial=spatial()) for _ in range(2))
    held.hold(torch.device("cpu"))
    for start in range(0, 80, 4):
        one, other = (images.at(range(start, start + 4)) for images in (read, held))
        for name in ("indices", "labels", "moments", "known_moments", "mask"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_micro_batches_of_all_processes_are_of_one_bucket_in_the_same_order(folder):
    cache = LatentCache(folder)
    whole = TrainingImages(cache, seed=1, flip=False, batch_size=8)
    shares = [TrainingImages(cache, seed=1, flip=False, batch_size=8) for _ in range(2)]
    streams = [iter(StreamPositions(16, 8, 2, rank, 2)) for rank in range(2)]
    for step in range(2, 12):
        read = [images.at(next(stream)) for images, stream in zip(shares, streams, strict=True) for _ in range(2)]
        together = whole.at(range(8 * step, 8 * step + 8))
        assert torch.equal(torch.cat([batch.indices for batch in read]), together.indices)
        assert torch.equal(torch.cat([batch.moments for batch in read]), together.moments)


def test_positions_are_cut_where_batches_end(folder):
    images = TrainingImages(LatentCache(folder), seed=1, flip=False, batch_size=4)
    assert images.parts(range(2, 11)) == [range(2, 4), range(4, 8), range(8, 11)]
    some = images.only([0, 1, 10, 15], "held out")
    assert {int(index) for part in some.parts(range(32)) for index in some.at(part).indices} == {0, 1, 10, 15}
