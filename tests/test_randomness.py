"""The counter-based generator: its published numbers, and that what it gives is random and independent."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latentflow import randomness
from latentflow.randomness import ImageRandom, derive_seed, on_device, philox


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_philox_4x32_10(counter, key, words):
    """The vectors that Random123, the authors' library, is tested with."""
    given = [torch.tensor([number]) for number in counter]
    assert tuple(word.item() for word in philox(given, key)) == words
    given = [word.expand(shape) for word, shape in zip(given, [(1, 1), (3, 1), (1, 5), (1,)], strict=True)]
    assert all((word == expected).all() for word, expected in zip(philox(given, key), words, strict=True))
    assert [word.shape for word in philox(given, key)] == [(3, 5)] * 4


def test_numbers_never_change():
    """Pictures of a seed and resumed runs depend on them."""
    assert derive_seed("sample", 0) == 9041044525071353427
    random = ImageRandom.at(7, "step", [0, 2**40])
    assert random.uniform().tolist() == [0.22106163304422466, 0.40908878810746985]
    torch.testing.assert_close(
        random.normal(3),
        torch.tensor([[-1.4889555, 0.9407663, 0.1077839], [0.9516022, 1.2162079, -0.7607062]]),
        rtol=1e-6,
        atol=1e-6,
    )


def test_an_image_draws_the_same_numbers_in_any_batch(monkeypatch):
    together = ImageRandom.at(7, "step", [3, 10, 4])
    alone = ImageRandom.at(7, "step", torch.tensor([10]))
    assert torch.equal(together.uniform()[1:2], alone.uniform())
    assert torch.equal(together.normal(4, 2, 2)[1:2], alone.normal(4, 2, 2))
    whole = ImageRandom.at(7, "step", range(50)).normal(30)
    monkeypatch.setattr(randomness, "_WORDS_AT_A_TIME", 64)
    assert torch.equal(ImageRandom.at(7, "step", range(50)).normal(30), whole)
    shuffled = torch.randperm(50)
    assert torch.equal(ImageRandom.at(7, "step", shuffled).normal(30), whole[shuffled])


@pytest.mark.parametrize("num_words", [0, 1, 4, 12, 37, 1000])
def test_computing_ahead_changes_nothing(num_words):
    def draws(random: ImageRandom) -> list[Tensor]:
        return [random.uniform(), random.normal(5), random.uniform(3), random.normal(2, 9), random.normal(1)]

    plain = draws(ImageRandom.at(1, "step", range(6)))
    ahead = draws(ImageRandom.at(1, "step", range(6)).ahead(num_words))
    assert all(torch.equal(a, b) for a, b in zip(plain, ahead, strict=True))


def test_moments_of_a_million_draws():
    draws = ImageRandom.at(3, "moments", range(250)).normal(4000).double()
    assert draws.dtype == torch.float64
    error = 1 / math.sqrt(draws.numel())
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10170)}.items():
        assert abs((draws**power).mean() - moment) < 4 * error * math.sqrt(variance), power
    inside = (draws.abs() < 1).double().mean()  # 0.6827 of all
    assert abs(inside - 0.682689) < 4 * error * math.sqrt(0.6827 * 0.3173)
    assert 4.2 < draws.abs().max() < 6.8


def test_uniform_numbers_fill_the_unit_interval():
    draws = ImageRandom.at(3, "uniform", range(100)).uniform(10_000)
    assert draws.dtype == torch.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws.float(), 100, 0, 1)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 99 + 5 * math.sqrt(2 * 99)  # chi squared
    assert (draws * 2**53 % 1 == 0).all()


def test_streams_and_their_numbers_are_independent():
    """Correlations of 100,000 pairs have a standard error of 0.0032."""
    first = ImageRandom.at(0, "step", range(100)).normal(1000)
    pairs = {
        "the next number": (first[:, :-1], first[:, 1:]),
        "cosine and sine": (first[:, :500], first[:, 500:]),
        "their squares": (first[:, :500] ** 2, first[:, 500:] ** 2),
        "the next position": (first[:-1], first[1:]),
        "a far position": (first, ImageRandom.at(0, "step", range(2**33, 2**33 + 100)).normal(1000)),
        "another purpose": (first, ImageRandom.at(0, "flip", range(100)).normal(1000)),
        "another seed": (first, ImageRandom.at(1, "step", range(100)).normal(1000)),
        "a later draw": (first, _second(100)),
    }
    for what, (one, other) in pairs.items():
        assert abs(correlation(one, other)) < 4.5 / math.sqrt(one.numel()), what


def _second(count: int) -> Tensor:
    random = ImageRandom.at(0, "step", range(count))
    random.normal(1000)
    return random.normal(1000)


def test_positions_beyond_32_bits_differ():
    draws = ImageRandom.at(0, "step", [0, 2**32, 2**62, 2**63 - 1]).uniform()
    assert len(set(draws.tolist())) == 4


def test_the_largest_position_is_the_same_in_any_batch():
    last = 2**63 - 1
    assert torch.equal(ImageRandom.at(0, "step", [last]).uniform(), ImageRandom.at(0, "step", [last, 0]).uniform()[:1])


def test_a_handful_of_operations_whatever_the_batch():
    """Nothing is done image by image."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for number in (4, 400):
        with Counter() as counter:
            random = ImageRandom.at(0, "step", range(number), "meta").ahead(4 + 2 * 64)
            random.uniform(), random.normal(64), random.normal(64)
        counts.append(counter.calls)
    assert counts[0] == counts[1] < 250


def test_positions_that_follow_each_other_are_counted_on_the_device():
    assert torch.equal(on_device(torch.arange(5, 9), "cpu"), torch.arange(5, 9))
    assert on_device([3, 1, 4], "cpu").tolist() == [3, 1, 4]
    assert on_device(range(4), "meta").device.type == "meta"
    assert len(ImageRandom.at(0, "step", []).normal(3)) == 0


def test_derived_seeds_distinguish_numbers_from_names_and_do_not_run_together():
    tuples = [(1, 23), (12, 3), ("1", 23), (1, "23"), (123,), ("a", 1), ("a/int:1",), ('a", 1',), ("a, 1",)]
    assert len({derive_seed(*parts) for parts in tuples}) == len(tuples)
    assert all(0 <= derive_seed(*parts) < 2**63 for parts in tuples)
    assert derive_seed("order", torch.tensor(5).numpy().item()) == derive_seed("order", 5)
