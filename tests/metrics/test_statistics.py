"""Mean and covariance in one pass, in any batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentflow.errors import DataError
from latentflow.metrics.statistics import FeatureStatistics, require_features


def features(n: int, dim: int = 7, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(n, dim, generator=generator) @ mixing + offset


def gathered(x: torch.Tensor, size: int) -> FeatureStatistics:
    statistics = FeatureStatistics(x.shape[1])
    for batch in x.split(size):
        statistics.update(batch)
    return statistics


def test_they_are_those_of_numpy():
    x = features(5000)
    statistics = gathered(x, 100)
    assert statistics.n == 5000
    torch.testing.assert_close(statistics.mean, x.double().mean(0), rtol=1e-13, atol=1e-13)
    expected = torch.from_numpy(np.cov(x.double().numpy(), rowvar=False))
    torch.testing.assert_close(statistics.covariance, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 2048, 5000])
def test_batches_of_any_size_give_the_same_bits(size):
    x = features(5000)
    statistics, expected = gathered(x, size), gathered(x, 100)
    assert torch.equal(statistics.mean, expected.mean)
    assert torch.equal(statistics.covariance, expected.covariance)


def test_a_large_offset_costs_no_digits():
    """Sums of squares would lose all of them here."""
    x = features(5000).double()
    statistics = gathered(x + 1e7, 64)
    expected = gathered(x, 64).covariance
    torch.testing.assert_close(statistics.covariance, expected, rtol=1e-8, atol=1e-8)


def test_a_batch_may_be_overwritten_afterwards():
    x = features(10)
    statistics = FeatureStatistics(7).update(x)
    expected = x.double().mean(0)
    x.zero_()
    torch.testing.assert_close(statistics.mean, expected)


def test_reading_in_between_changes_nothing_but_rounding():
    x = features(300)
    statistics = FeatureStatistics(7).update(x[:100])
    torch.testing.assert_close(statistics.mean, x[:100].double().mean(0))
    statistics.update(x[100:])
    torch.testing.assert_close(statistics.covariance, FeatureStatistics.of(x).covariance, rtol=1e-12, atol=1e-12)


def test_state_round_trip():
    statistics = FeatureStatistics.of(features(20))
    restored = FeatureStatistics.from_state(statistics.state())
    assert restored.n == 20
    torch.testing.assert_close(restored.mean, statistics.mean, rtol=0, atol=0)
    torch.testing.assert_close(restored.covariance, statistics.covariance, rtol=1e-15, atol=0)
    with pytest.raises(DataError, match="lack covariance"):
        FeatureStatistics.from_state({"mean": torch.zeros(2), "n": torch.tensor(1)})


def test_one_image_has_no_covariance():
    statistics = FeatureStatistics.of(torch.tensor([[1.0, 2.0]]))
    assert statistics.mean.tolist() == [1, 2]
    assert not statistics.covariance.any()


def test_an_empty_batch_adds_nothing():
    assert FeatureStatistics(4).update(torch.zeros(0, 4)).n == 0


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (torch.zeros(2), torch.eye(3), "do not belong together"),
        (torch.zeros(2), torch.full((2, 2), torch.nan), "NaN"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
    ],
)
def test_moments_that_cannot_be(mean, covariance, message):
    with pytest.raises(DataError, match=message):
        FeatureStatistics.from_moments(mean, covariance, 5)


def test_what_is_no_table_of_finite_numbers_is_refused():
    x = features(20)
    x[3, 1], x[7, 0], x[7, 1] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(DataError, match="2 of 20 generated images"):
        require_features(x, "generated")
    statistics = FeatureStatistics.of(features(9))
    with pytest.raises(DataError, match="2 of 20"):
        statistics.update(x)
    assert statistics.n == 9
    with pytest.raises(DataError, match="5 features and the others 7"):
        statistics.update(torch.zeros(2, 5))
    with pytest.raises(DataError, match=r"\[4\]"):
        require_features(torch.zeros(4), "real")
    with pytest.raises(DataError, match="uint8"):
        require_features(torch.zeros(4, 2, dtype=torch.uint8), "real")


def test_huge_finite_features_are_no_error():
    assert require_features(torch.full((4, 4), 3e38), "real").shape == (4, 4)
