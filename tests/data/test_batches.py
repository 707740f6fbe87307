import itertools
import pickle

import pytest
import torch

from latentflow.data.batches import StreamPositions, TrainingImages, epoch_order, stream_batches
from latentflow.data.images import open_images
from latentflow.data.latent_cache import LatentCache
from latentflow.flow.times import TrainingTimes
from latentflow.training.step import training_step
from tests import tiny


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
    one, two = images.indices_at(range(n)), images.indices_at(range(n, 2 * n))
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
    assert set(stream.indices_at(range(9))) == set(kept)


def test_labels_and_moments_belong_to_the_same_image(cache):
    source = LatentCache(cache)
    batch = TrainingImages(source, seed=1, flip=False).__getitems__(list(range(10)))
    indices = batch.indices.tolist()
    assert torch.equal(batch.labels, source.labels(indices))
    assert torch.equal(batch.moments, source.moments(indices, [False] * 10))


def test_half_of_the_images_are_mirrored_anew_in_each_epoch(cache):
    source = LatentCache(cache)
    images = TrainingImages(source, seed=1, flip=True)
    positions = list(range(20 * len(images)))
    batch = images.__getitems__(positions)
    straight = source.moments(batch.indices.tolist(), [False] * len(positions))
    mirrored = source.moments(batch.indices.tolist(), [True] * len(positions))
    is_mirrored = (batch.moments == mirrored).flatten(1).all(1)
    assert ((batch.moments == straight).flatten(1).all(1) | is_mirrored).all()
    # binomial over 360 draws: standard error 0.026
    assert abs(is_mirrored.double().mean() - 0.5) < 4 * 0.026
    assert torch.equal(images.__getitems__(positions[7:9]).moments, batch.moments[7:9])


def test_cache_and_images_give_the_same_training_step(images, cache, kl):
    """Same order, flips, times, noise and posterior draws: only the float16 of the cache differs."""
    steps = []
    for source in (LatentCache(cache), open_images(images, tiny.IMAGE_SIZE)):
        batch = TrainingImages(source, seed=5, flip=True).__getitems__(list(range(12)))
        model = tiny.model(kl)
        steps.append(
            training_step(
                model, model.network, batch, times=TrainingTimes(), batch_size=12, seed=5, device=torch.device("cpu")
            )
        )
    assert torch.equal(steps[0].time, steps[1].time)
    assert torch.allclose(steps[0].loss, steps[1].loss, rtol=5e-3)
    assert not torch.equal(steps[0].loss, torch.zeros(12))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_from_any_number_of_workers(cache, num_workers):
    images = TrainingImages(LatentCache(cache), seed=2, flip=True)
    batches = first(
        stream_batches(images, StreamPositions(3, 5, 5, 0, 1), num_workers=num_workers, pin_memory=False), 4
    )
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(3, 23))
    whole = images.__getitems__(list(range(3, 23)))
    assert torch.equal(torch.cat([batch.moments for batch in batches]), whole.moments)


def test_training_images_can_be_sent_to_a_worker(cache):
    images = TrainingImages(LatentCache(cache), seed=2, flip=False)
    images.__getitems__([0])
    assert pickle.loads(pickle.dumps(images)).indices_at(range(30)) == images.indices_at(range(30))
