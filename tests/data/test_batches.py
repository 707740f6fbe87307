import itertools
import multiprocessing
import pickle
import re
import resource
import shutil
import time
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from latentflow.data import batches
from latentflow.data.batches import Batch, SpatialData, StreamPositions, TrainingImages, epoch_order, stream_batches
from latentflow.data.cache.reader import LatentCache
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.painting.masks import draw_mask
from latentflow.data.prefetch import lost_workers
from latentflow.data.sources.images import open_images
from latentflow.errors import DataError
from latentflow.flow.times import TrainingTimes
from latentflow.training.step import training_step
from tests import tiny
from tests.tiny import write_cache

SPOTS = list(range(60))  # five epochs of the segmented images


def first(stream, count):
    return list(itertools.islice(iter(stream), count))


@pytest.mark.parametrize(("num_processes", "micro_batch_size"), [(1, 12), (1, 3), (2, 6), (3, 2)])
def test_the_stream_is_the_same_however_it_is_shared(num_processes, micro_batch_size):
    """Every step covers the same positions, each exactly once."""
    per_step = 12 // num_processes // micro_batch_size
    shares = [
        first(StreamPositions(24, 12, micro_batch_size, rank, num_processes), 2 * per_step)
        for rank in range(num_processes)
    ]
    for step in range(2):
        read = [p for share in shares for batch in share[step * per_step : (step + 1) * per_step] for p in batch]
        assert sorted(read) == list(range(24 + 12 * step, 36 + 12 * step))


def test_a_stream_begun_later_goes_on_as_the_first_one():
    assert first(StreamPositions(0, 4, 4, 0, 1), 5)[3:] == first(StreamPositions(12, 4, 4, 0, 1), 2)


def test_every_image_is_seen_once_in_an_epoch_and_in_another_order_in_the_next(cache):
    images = TrainingImages(LatentCache(cache), seed=3, flip=False)
    n = len(images)
    one, two = images.indices_at(range(n)).tolist(), images.indices_at(range(n, 2 * n)).tolist()
    assert sorted(one) == sorted(two) == list(range(n))
    assert one != two


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_number():
    orders = [epoch_order(seed, 50, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_images_that_cannot_be_read_are_left_out(images):
    source = open_images(images, tiny.IMAGE_SIZE)
    kept = [0, 3, 4]
    stream = TrainingImages(source, seed=0, flip=False, kept=kept)
    assert set(stream.indices_at(range(9)).tolist()) == set(kept)


def test_labels_and_moments_belong_to_the_same_image(cache):
    source = LatentCache(cache)
    batch = TrainingImages(source, seed=1, flip=False).at(list(range(10)))
    indices = batch.indices.tolist()
    assert torch.equal(batch.labels, source.labels(indices))
    assert torch.equal(batch.moments, source.moments(indices, [False] * 10))


def test_half_of_the_images_are_mirrored_independently_in_each_epoch(cache):
    source = LatentCache(cache)
    images = TrainingImages(source, seed=1, flip=True)
    positions = list(range(20 * len(images)))
    batch = images.at(positions)
    straight = source.moments(batch.indices.tolist(), [False] * len(positions))
    mirrored = source.moments(batch.indices.tolist(), [True] * len(positions))
    is_mirrored = (batch.moments == mirrored).flatten(1).all(1)
    assert ((batch.moments == straight).flatten(1).all(1) | is_mirrored).all()
    # binomial over 360 draws: standard error 0.026
    assert abs(is_mirrored.double().mean() - 0.5) < 4 * 0.026
    assert torch.equal(images.at(positions[7:9]).moments, batch.moments[7:9])


def test_cache_and_images_give_the_same_training_step(images, cache, kl):
    """Same order, flips, times, noise and posterior draws: only the float16 of the cache differs."""
    steps = []
    for source in (LatentCache(cache), open_images(images, tiny.IMAGE_SIZE)):
        batch = TrainingImages(source, seed=5, flip=True).at(list(range(12)))
        model = tiny.model(kl)
        steps.append(training_step(model, model.network, batch, times=TrainingTimes(), batch_size=12, seed=5))
    assert torch.equal(steps[0].time, steps[1].time)
    assert torch.allclose(steps[0].loss, steps[1].loss, rtol=5e-3)
    assert not torch.equal(steps[0].loss, torch.zeros(12))


def test_batches_are_read_again_from_their_positions(images, segmented_cache):
    """In any order, singly or together, over the ends of epochs, and far along the stream."""
    far = 3 * 2**40
    for source, spatial in (
        (open_images(images, tiny.IMAGE_SIZE), None),
        (LatentCache(segmented_cache), SpatialData(tiny.FACTOR, cached_holes=True, maps=True)),
    ):
        stream = TrainingImages(source, seed=1, flip=True, spatial=spatial)
        for first in (0, 7, 8190, far):
            whole, again = stream.at(range(first, first + 30)), stream.at(torch.arange(first, first + 30).flip(0))
            names = [field.name for field in fields(Batch) if getattr(whole, field.name) is not None]
            assert all(torch.equal(getattr(whole, name), getattr(again, name).flip(0)) for name in names)
            single = stream.at(whole.positions[4:5])
            assert all(torch.equal(getattr(whole, name)[4:5], getattr(single, name)) for name in names)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_from_any_number_of_workers(cache, num_workers):
    images = TrainingImages(LatentCache(cache), seed=2, flip=True)
    read = first(stream_batches(images, StreamPositions(3, 5, 5, 0, 1), num_workers=num_workers, pin_memory=False), 4)
    assert torch.cat([batch.positions for batch in read]).tolist() == list(range(3, 23))
    whole = images.at(list(range(3, 23)))
    assert torch.equal(torch.cat([batch.moments for batch in read]), whole.moments)


def test_training_images_can_be_sent_to_a_worker(cache):
    images = TrainingImages(LatentCache(cache), seed=2, flip=False)
    images.at([0])
    assert torch.equal(pickle.loads(pickle.dumps(images)).indices_at(range(30)), images.indices_at(range(30)))


def test_another_number_of_processes_goes_on_where_the_others_stopped():
    before = [p for batch in first(StreamPositions(0, 6, 6, 0, 1), 3) for p in batch]
    after = [p for rank in range(2) for batch in first(StreamPositions(18, 6, 3, rank, 2), 2) for p in batch]
    assert sorted(before + after) == list(range(30))


def test_cache_and_images_have_the_same_order_names_and_flips(images, cache):
    source, spots = open_images(images, tiny.IMAGE_SIZE), list(range(60))
    pixels, moments = (TrainingImages(s, seed=3, flip=True) for s in (source, LatentCache(cache)))
    assert torch.equal(pixels.indices_at(spots), moments.indices_at(spots))
    assert (
        pixels.names_at(spots) == moments.names_at(spots) == [source[i].name for i in pixels.indices_at(spots).tolist()]
    )
    batch = pixels.at(spots)
    plain = torch.stack([torch.from_numpy(source[i].pixels).permute(2, 0, 1) for i in batch.indices.tolist()])
    flipped = (batch.pixels == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(batch.pixels, torch.where(flipped[:, None, None, None], plain.flip(-1), plain))
    assert 0 < flipped.sum() < 60
    stored = LatentCache(cache).moments(batch.indices.tolist(), flipped.tolist())
    assert torch.equal(moments.at(spots).moments, stored)


def test_moving_a_batch_keeps_positions_on_the_cpu():
    batch = Batch(torch.tensor([1]), torch.tensor([2]), pixels=torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).to("meta")
    assert batch.pixels.device.type == "meta"
    assert batch.positions.device.type == batch.indices.device.type == "cpu"
    assert batch.labels is None


def losses(model, images, spots):
    given = {"times": TrainingTimes(stratified=True), "batch_size": 6, "seed": 7}
    return training_step(model, model.network, images.at(spots), **given).loss


def test_float32_moments_give_the_step_of_pixels(images, cache, kl, tmp_path):
    """The same posterior draw, noise, time and label: the losses agree to rounding."""
    source, model, spots = open_images(images, tiny.IMAGE_SIZE), tiny.model(kl), list(range(12, 24))
    write_cache(source, kl, tmp_path / "exact", flips=True, dtype="float32")
    pixels, exact, rounded = (
        losses(model, TrainingImages(s, seed=7, flip=True), spots)
        for s in (source, LatentCache(tmp_path / "exact"), LatentCache(cache))
    )
    assert torch.allclose(exact, pixels, rtol=1e-5)
    assert torch.allclose(rounded, pixels, rtol=1e-4)  # float16, measured: 6e-6


def test_an_image_has_its_own_step_whatever_the_batch(cache, kl):
    """Time, posterior draw, noise and dropped label come from the position, not from the neighbours."""
    model, images = tiny.model(kl), TrainingImages(LatentCache(cache), seed=7, flip=True)
    whole = losses(model, images, list(range(12)))
    assert torch.allclose(whole, torch.cat([losses(model, images, [p]) for p in range(12)]), rtol=1e-5)
    assert torch.allclose(whole.flip(0), losses(model, images, list(range(11, -1, -1))), rtol=1e-5)


def test_stratified_times_fill_every_batch(cache, kl):
    """One time in each sixth of [0, 1] per global batch of 6, read in halves by two processes."""
    model, images = tiny.model(kl), TrainingImages(LatentCache(cache), seed=7, flip=False)
    given = {"times": TrainingTimes(stratified=True), "batch_size": 6, "seed": 7}
    for step in range(3):
        shares = [first(StreamPositions(6 * step, 6, 3, rank, 2), 1)[0] for rank in range(2)]
        times = [training_step(model, model.network, images.at(s), **given).time for s in shares]
        assert sorted((torch.cat(times) * 6).long().tolist()) == [0, 1, 2, 3, 4, 5]


# Spatial conditions


def spatial_images(source, *, flip: bool = True, **spatial) -> TrainingImages:
    return TrainingImages(source, seed=3, flip=flip, spatial=SpatialData(tiny.FACTOR, **spatial))


@pytest.fixture
def pictures(segmented):
    return open_images(segmented, tiny.IMAGE_SIZE)


@pytest.fixture
def holes(monkeypatch) -> list[np.ndarray]:
    """The holes that are cut while batches are read, in their order."""
    cut = []

    def draw(*given):
        cut.append(draw_mask(*given))
        return cut[-1]

    monkeypatch.setattr(batches, "draw_mask", draw)
    return cut


def mirrored_rows(images: TrainingImages) -> list[bool]:
    """Which images are mirrored at `SPOTS`, seen from their pixels."""
    batch, source = images.at(SPOTS), images.source
    straight = torch.stack([torch.from_numpy(source[i].pixels).permute(2, 0, 1) for i in batch.indices.tolist()])
    flipped = (batch.pixels == straight.flip(-1)).flatten(1).all(1)
    assert (flipped | (batch.pixels == straight).flatten(1).all(1)).all()
    assert 0 < flipped.sum() < len(SPOTS)
    return flipped.tolist()


def same(one: Batch, other: Batch, *names: str) -> None:
    for name in names:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_holes_are_cut_into_the_mirrored_picture(pictures, holes):
    images = spatial_images(pictures, holes=MaskRules(), maps=True)
    batch = images.at(SPOTS)
    assert len(holes) == len(SPOTS)
    hole = torch.from_numpy(np.stack(holes))[:, None].bool()
    assert torch.equal(batch.known_pixels, batch.pixels.masked_fill(hole, 128))
    counted = avg_pool2d(hole.double(), tiny.FACTOR)
    assert torch.equal(batch.mask, counted.float())
    assert len({one.tobytes() for one in holes}) > 50  # resampled each time; two halves may be alike


def test_image_map_moments_known_part_and_mask_are_of_one_mirror(pictures, segmented_cache, kl):
    flipped = mirrored_rows(spatial_images(pictures))
    images = spatial_images(LatentCache(segmented_cache), cached_holes=True, maps=True)
    batch, cache = images.at(SPOTS), images.source
    indices = batch.indices.tolist()
    assert torch.equal(batch.moments, cache.moments(indices, flipped))
    assert torch.equal(batch.class_fractions, cache.class_fractions(indices, flipped))
    variants = [cache.known(indices, [v] * len(indices), flipped) for v in range(3)]
    chosen = [(batch.known_moments == moments).flatten(1).all(1) for moments, _ in variants]
    for rows, (_, mask) in zip(chosen, variants, strict=True):
        assert torch.equal(batch.mask[rows], mask[rows])
        assert 8 <= rows.sum() <= 32  # a third of 60; binomial: 20 +- 3.7
    assert sum(rows.int() for rows in chosen).eq(1).all()


def test_cache_and_images_give_the_same_maps_and_holes(pictures, segmented_cache):
    """One order, one mirror, one hole for each position, wherever the moments come from."""
    cache = LatentCache(segmented_cache)
    encoded = spatial_images(cache, holes=MaskRules(), maps=True, pictures=pictures).at(SPOTS)
    direct = spatial_images(pictures, holes=MaskRules(), maps=True).at(SPOTS)
    same(encoded, direct, "positions", "indices", "labels", "known_pixels", "mask", "class_fractions")
    assert encoded.pixels is None
    assert direct.moments is None


@pytest.mark.parametrize("of", ["cached holes", "holes in pictures", "holes in images"])
def test_an_image_has_the_same_conditions_in_any_batch(pictures, segmented_cache, of):
    """Read singly, in the shares of two processes, or by a worker."""
    cache, options = LatentCache(segmented_cache), {"maps": True}
    source = pictures if of == "holes in images" else cache
    options |= {"cached_holes": True} if of == "cached holes" else {"holes": MaskRules()}
    images = spatial_images(source, **options, **({"pictures": pictures} if of == "holes in pictures" else {}))
    whole = images.at(list(range(24)))
    names = [f.name for f in fields(Batch) if getattr(whole, f.name) is not None]
    assert len(names) == 7
    for position in (0, 7, 23):
        single = images.at([position])
        assert all(torch.equal(getattr(single, name)[0], getattr(whole, name)[position]) for name in names)
    shares = [first(StreamPositions(0, 12, 3, rank, 2), 4) for rank in range(2)]
    for positions in itertools.chain(*shares):
        part = images.at(positions)
        assert all(torch.equal(getattr(part, name), getattr(whole, name)[list(positions)]) for name in names)
    sent = pickle.loads(pickle.dumps(images)).at([5, 2])
    assert all(torch.equal(getattr(sent, name), getattr(whole, name)[[5, 2]]) for name in names)


def test_pictures_are_found_by_name_where_broken_images_were_left_out(tmp_path, segmented, kl):
    folder = shutil.copytree(segmented, tmp_path / "images")
    (folder / "images" / "apple" / "1.png").write_bytes(b"no picture")
    source = open_images(folder, tiny.IMAGE_SIZE)
    write_cache(source, kl, tmp_path / "cache")
    images = spatial_images(LatentCache(tmp_path / "cache"), flip=False, holes=MaskRules(), pictures=source)
    assert len(images) == len(source) - 1
    positions = list(range(len(images)))
    batch, at = images.at(positions), {source.name(row): row for row in range(len(source))}
    for row, name in enumerate(images.names_at(positions)):
        picture = torch.from_numpy(source[at[name]].pixels).permute(2, 0, 1)
        known = (batch.mask[row] == 0).repeat_interleave(2, 1).repeat_interleave(2, 2).expand(3, -1, -1)
        assert known.any()
        assert torch.equal(batch.known_pixels[row][known], picture[known])


def test_a_batch_without_spatial_data_has_none(pictures, segmented_cache):
    for source in (pictures, LatentCache(segmented_cache)):
        batch = TrainingImages(source, seed=3, flip=True).at([0, 1])
        assert [getattr(batch, name) for name in ("mask", "known_moments", "known_pixels", "class_fractions")] == (
            [None] * 4
        )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_goes_missing_is_one_line_with_and_without_workers(tmp_path, num_workers):
    folder = tiny.write_images(tmp_path / "fruit")
    images = TrainingImages(open_images(folder, tiny.IMAGE_SIZE), seed=0, flip=False)
    for file in folder.rglob("*.png"):
        file.unlink()
    positions = StreamPositions(0, 2, 2, 0, 1)
    batches = stream_batches(images, positions, num_workers=num_workers, pin_memory=False)
    with pytest.raises(DataError) as caught:
        next(batches)
    assert "\n" not in str(caught.value)
    assert "No such file" in str(caught.value)


def test_without_shared_memory_workers_are_refused(cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    images = TrainingImages(LatentCache(cache), seed=0, flip=False)
    with pytest.raises(DataError, match=r"/dev/shm has 1 MiB; use data\.num_workers=0"):
        stream_batches(images, StreamPositions(0, 2, 2, 0, 1), num_workers=2, pin_memory=False)
    assert next(stream_batches(images, StreamPositions(0, 2, 2, 0, 1), num_workers=0, pin_memory=False))


def test_with_few_open_files_workers_are_refused(cache, monkeypatch):
    allowed = [32]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (allowed[0], 4096))
    images = TrainingImages(LatentCache(cache), seed=0, flip=False)
    with pytest.raises(DataError, match=r"needs 144 open files, and 32 are allowed.*data\.num_workers=0") as said:
        stream_batches(images, StreamPositions(0, 2, 2, 0, 1), num_workers=2, pin_memory=False)
    allowed[0] = int(re.search(r"ulimit -n (\d+)", str(said.value))[1])
    assert next(stream_batches(images, StreamPositions(0, 2, 2, 0, 1), num_workers=2, pin_memory=False))
    allowed[0] = resource.RLIM_INFINITY
    assert next(stream_batches(images, StreamPositions(0, 2, 2, 0, 1), num_workers=1, pin_memory=False))


def test_a_reading_process_that_is_killed_is_one_line(images):
    batches = stream_batches(
        TrainingImages(open_images(images, tiny.IMAGE_SIZE), seed=0, flip=False),
        StreamPositions(0, 2, 2, 0, 1),
        num_workers=1,
        pin_memory=False,
    )
    next(batches)
    with (
        pytest.raises(DataError, match=r"one of 1 worker processes .* was lost .*data\.num_workers=0"),
        lost_workers(1),
    ):
        multiprocessing.active_children()[-1].kill()
        while True:
            next(batches)
            time.sleep(0.01)  # torch may find out in here, too
    with pytest.raises(RuntimeError, match="another fault"), lost_workers(1):
        raise RuntimeError("another fault")


def test_steps_of_another_size_are_as_if_made_so(cache):
    given = {"seed": 3, "flip": True}
    made, changed = (TrainingImages(LatentCache(cache), **given, batch_size=size) for size in (6, 4))
    one, other = (images.at(range(12)) for images in (made, changed.in_batches_of(6)))
    assert torch.equal(one.indices, other.indices) and torch.equal(one.moments, other.moments)
    assert changed.batch_size == 4
