"""Which bucket each batch is of: near its share at any time, and a function of seed and number alone."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from latentflow.data.bucket_order import BucketOrder, epoch_order


def buckets(order: BucketOrder, num_batches: int, first: int = 0) -> np.ndarray:
    return np.array([order.at(batch) for batch in range(first, first + num_batches)])


def test_one_bucket_is_the_stream_itself():
    assert [BucketOrder([37], 8, seed=3).at(batch) for batch in (0, 1, 4, 5, 99)] == [(0, k) for k in (0, 1, 4, 5, 99)]


@pytest.mark.parametrize(
    ("counts", "batch_size"), [([70, 20, 10], 4), ([900, 90, 10], 64), ([5, 3], 64), ([1, 0, 3], 2)]
)
def test_every_bucket_has_its_share_at_any_time(counts, batch_size):
    num = 3000
    found = buckets(BucketOrder(counts, batch_size, seed=1), num)[:, 0]
    so_far = np.stack([(found == bucket).cumsum() for bucket in range(len(counts))])
    wanted = np.arange(1, num + 1) * np.array(counts)[:, None] / sum(counts)
    rounds = -(-sum(counts) // batch_size)
    at_ends = np.abs(so_far - wanted)[:, rounds - 1 :: rounds]
    assert at_ends.max() < 4  # a random order would miss by tens
    assert so_far[:, -1].sum() == num
    assert (so_far[np.array(counts) == 0] == 0).all()


def test_the_batches_of_a_bucket_are_counted_without_a_gap():
    order = BucketOrder([50, 30, 7], 4, seed=5)
    found = buckets(order, 500)
    for bucket in range(3):
        assert found[found[:, 0] == bucket, 1].tolist() == list(range((found[:, 0] == bucket).sum()))


def test_it_does_not_depend_on_what_was_asked_before():
    order, again = BucketOrder([50, 30, 7], 4, seed=5), BucketOrder([50, 30, 7], 4, seed=5)
    there = buckets(order, 40, first=2000)
    assert np.array_equal(buckets(order, 40), buckets(again, 40))  # backwards
    assert np.array_equal(there, buckets(pickle.loads(pickle.dumps(again)), 40, first=2000))
    assert not np.array_equal(there, buckets(BucketOrder([50, 30, 7], 4, seed=6), 40, first=2000))


def test_the_batches_of_a_round_are_mixed():
    found = buckets(BucketOrder([50, 50], 1, seed=0), 100)[:, 0]
    assert 20 < (np.diff(found) != 0).sum() < 80


def test_buckets_have_orders_of_their_own():
    assert epoch_order(0, 50, 0).tolist() == epoch_order(0, 50, 0, bucket=0).tolist()
    orders = [epoch_order(0, 50, 0, bucket).tolist() for bucket in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
