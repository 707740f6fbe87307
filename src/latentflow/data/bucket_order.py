"""Which bucket each batch is of, a function of seed and number of the batch alone.

The stream is cut into rounds of M = ceil(N / B) batches, for N images and batches of B: about an epoch. In round r the
M points (i + u_r) / M, i = 0 ... M - 1, lie on a line on which each bucket has a part as long as its share of the
images. Each point is a batch of the bucket that it lies in, and the batches of a round are in random order. The offset
u_r moves by the golden ratio from round to round, which keeps the batches of every bucket near its share over many
rounds, also where a round has fewer batches than there are buckets.

Each bucket has an endless stream of its images, as a whole data set without buckets has. With one bucket, batch k is
batch k of its stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from latentflow.randomness import derive_seed

_GOLDEN = (5**0.5 - 1) / 2
_ROUNDS_TOGETHER = 1 << 16


class BucketOrder:
    """The buckets of an endless sequence of batches.

    Args:
        counts: images of each bucket, at least one in all.
        batch_size: images of a batch.
        seed: of the order.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int):
        self.counts, self.batch_size, self.seed = tuple(counts), batch_size, seed
        self.num_batches = -(-sum(counts) // batch_size)  # of a round
        self._ends = self.num_batches * np.cumsum(counts) / sum(counts)
        self._first_offset = derive_seed(seed, "bucket offset") / 2**63
        self._round = lru_cache(maxsize=2)(self._computed)
        self._known = 0, np.zeros(len(counts), np.int64)  # a round, and what comes before it

    def __getstate__(self) -> tuple[tuple[int, ...], int, int]:
        return self.counts, self.batch_size, self.seed

    def __setstate__(self, state: tuple[tuple[int, ...], int, int]) -> None:
        self.__init__(*state)

    def at(self, batch: int) -> tuple[int, int]:
        """The bucket of a batch, and how many batches of this bucket came before it."""
        number, place = divmod(batch, self.num_batches)
        buckets, before = self._round(number)
        return int(buckets[place]), int(before[place])

    def batches_before(self, number: int) -> np.ndarray:
        """How many batches of each bucket the rounds before round `number` have."""
        first, before = self._known if self._known[0] <= number else (0, np.zeros(len(self.counts), np.int64))
        for start in range(first, number, _ROUNDS_TOGETHER):
            before = before + self._batches_of(np.arange(start, min(start + _ROUNDS_TOGETHER, number))).sum(0)
        self._known = number, before
        return before

    def _batches_of(self, numbers: np.ndarray) -> np.ndarray:
        """Batches of each bucket in some rounds, [rounds, buckets]: the points below the ends of the buckets' parts."""
        offsets = (self._first_offset + numbers * _GOLDEN) % 1
        below = np.ceil(self._ends[None] - offsets[:, None]).clip(0, self.num_batches).astype(np.int64)
        below[:, -1] = self.num_batches
        return np.diff(below, axis=1, prepend=0)

    def _computed(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of each batch of a round, and how many batches of it came before: [M] int64 each."""
        own = self._batches_of(np.array([number]))[0]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "buckets", number))
        shuffled = torch.randperm(self.num_batches, generator=generator).numpy()
        buckets = np.repeat(np.arange(len(own)), own)[shuffled]
        before = np.empty(self.num_batches, np.int64)
        for bucket, earlier in enumerate(self.batches_before(number).tolist()):
            places = np.flatnonzero(buckets == bucket)
            before[places] = earlier + np.arange(len(places))
        return buckets, before


def epoch_order(seed: int, num_images: int, epoch: int, bucket: int = 0) -> Tensor:
    """The order of one epoch of a bucket: a permutation of range(num_images), int64."""
    more = (bucket,) if bucket else ()
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch, *more))
    return torch.randperm(num_images, generator=generator)
