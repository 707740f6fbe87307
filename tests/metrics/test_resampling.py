"""Intervals of scores: resampled scores are those of the repeated images, and the width is the right one."""

from __future__ import annotations

import pytest
import torch

from latentflow.errors import ConfigError
from latentflow.metrics import scores as module
from latentflow.metrics.resampling import _student, bootstrap, draw_counts, interval_over_images
from latentflow.metrics.scores import (
    Resampled,
    frechet_contributions,
    frechet_distance,
    inception_contributions,
    inception_score,
    kernel_contributions,
    kernel_distance_of_all,
    resampled_frechet,
    resampled_inception_score,
    resampled_kernel,
)
from latentflow.metrics.statistics import FeatureStatistics


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_of(x: torch.Tensor):
    return lambda counts: counts @ x / counts.sum(1)


def repeated(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(counts.long(), 0)


@pytest.fixture
def counts():
    return draw_counts(60, 3, torch.Generator().manual_seed(1))


def test_counts_are_draws_with_replacement():
    counts = draw_counts(1000, 40, torch.Generator().manual_seed(0))
    assert torch.equal(counts.sum(1), torch.full((40,), 1000.0, dtype=torch.float64))
    assert float((counts == 0).double().mean()) == pytest.approx(0.3679, abs=0.005)  # 1/e are never drawn


def test_the_interval_of_a_mean_is_that_of_the_textbook():
    x = normal(400)
    found = bootstrap(mean_of(x), 400, num=1000)
    assert found.estimate == pytest.approx(float(x.mean()))
    assert found.standard_error == pytest.approx(float(x.std()) / 20, rel=0.1)
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(x.std()) / 20, rel=0.1)
    assert found.low < found.estimate < found.high
    assert (found.level, found.num_resamples) == (0.95, 1000)


def test_few_resamples_give_wider_bounds_that_hold():
    """Of ten resamples, 95 % intervals hold the mean in about 95 of 100; their quantiles did in about 80."""
    held = 0
    for seed in range(300):
        x = normal(60, seed=seed)
        found = bootstrap(mean_of(x), 60, num=10, seed=seed)
        held += found.low <= 0 <= found.high
    assert 0.91 < held / 300 < 0.99


@pytest.mark.parametrize(("freedom", "factor"), [(1, 12.706), (2, 4.3027), (3, 3.1824), (9, 2.2622), (99, 1.9842)])
def test_the_factors_are_students(freedom, factor):
    assert _student(0.975, freedom) == pytest.approx(factor, rel=0.01)


def test_seed_and_level():
    x = normal(50)
    found = bootstrap(mean_of(x), 50, num=120)
    assert found == bootstrap(mean_of(x), 50, num=120)
    assert found != bootstrap(mean_of(x), 50, num=120, seed=1)
    narrow = bootstrap(mean_of(x), 50, num=120, level=0.5)
    assert found.low < narrow.low < narrow.high < found.high
    for wrong in ({"num": 1}, {"level": 1.0}):
        with pytest.raises(ConfigError, match="take 2 or more"):
            bootstrap(mean_of(x), 50, **wrong)


def derivatives(score: Resampled, n: int) -> list[float]:
    """Of a score by the weight of each image, times N, by differences."""
    ones, step = torch.ones(n, n, dtype=torch.float64), 1e-4 * torch.eye(n, dtype=torch.float64)
    found = n * (score(ones + step) - score(ones - step)) / 2e-4
    return (found - found.mean()).tolist()  # resamples have weights of one sum


@pytest.mark.parametrize("dim", [5, 100])  # fewer and more features than images
def test_contributions_to_a_frechet_distance_are_its_derivatives(dim):
    x, reference = normal(30, dim) * 2 + 10, FeatureStatistics.of(normal(300, dim, seed=1) + 10)
    found = frechet_contributions(x, FeatureStatistics.of(x), reference)
    wanted = derivatives(resampled_frechet(x, reference), 30)
    assert found.tolist() == pytest.approx(wanted, rel=2e-3, abs=1e-3 * float(found.abs().max()))


def test_contributions_to_other_scores_are_their_derivatives(monkeypatch):
    x, real, logits = normal(30, 4) + 0.3, normal(50, 4, seed=1), 3 * normal(30, 10)
    assert inception_contributions(logits).tolist() == pytest.approx(
        derivatives(resampled_inception_score(logits), 30), rel=1e-5, abs=1e-6
    )
    wanted = derivatives(resampled_kernel(x, real), 30)
    for block in (1024, 7):
        monkeypatch.setattr(module, "_BLOCK", block)
        assert kernel_contributions(x, real).tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_contributions_to_kid_may_be_of_some_partners():
    x, real = normal(3000, 4) + 0.3, normal(3000, 4, seed=1)
    some, all_of_them = kernel_contributions(x, real, most=1500), kernel_contributions(x, real)
    assert 1 <= float(some.std()) / float(all_of_them.std()) < 1.15  # errs on the wide side
    assert float(torch.stack([some, all_of_them]).corrcoef()[0, 1]) > 0.95


@pytest.mark.parametrize("shift", [0.5, 0.0])
def test_95_of_100_intervals_over_images_hold_what_fresh_images_give_on_average(shift):
    """Where the two sets are alike, the score is of second order and the interval wide: see `interval_over_images`."""
    reference, held, real = (
        FeatureStatistics.of(normal(4000, 5, seed=9)),
        {"fid": [], "kid": []},
        normal(500, 5, seed=9),
    )
    for seed in range(200):
        x = normal(60, 5, seed=1000 + seed) + shift
        statistics = FeatureStatistics.of(x)
        value = frechet_distance(statistics, reference)
        held["fid"].append(interval_over_images(frechet_contributions(x, statistics, reference), value))
        held["kid"].append(interval_over_images(kernel_contributions(x, real), kernel_distance_of_all(x, real)))
    for intervals in held.values():
        mean = sum(found.estimate for found in intervals) / len(intervals)
        share = sum(found.low <= mean <= found.high for found in intervals) / len(intervals)
        assert 0.91 <= share <= (0.99 if shift else 1.0)


def test_the_interval_over_images_of_a_mean_is_that_of_the_textbook():
    x = normal(400)
    found = interval_over_images(x - x.mean(), 3.0)
    assert (found.estimate, found.level, found.num_resamples) == (3.0, 0.95, 0)
    assert found.standard_error == pytest.approx(float(x.std()) / 20)
    assert (found.low, found.high) == pytest.approx(
        (3 - 1.96 * float(x.std()) / 20, 3 + 1.96 * float(x.std()) / 20), rel=1e-4
    )
    assert interval_over_images(x[:1], 3.0).standard_error == 0


@pytest.mark.parametrize("chunk", [7, 30])
def test_parts_do_not_show(monkeypatch, counts, chunk):
    x, reference = normal(60, 5) + 1, FeatureStatistics.of(normal(300, 5, seed=1))
    whole, statistics = resampled_frechet(x, reference)(counts), FeatureStatistics.of(x)
    contributions = frechet_contributions(x, statistics, reference)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    torch.testing.assert_close(resampled_frechet(x, reference)(counts), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(frechet_contributions(x, statistics, reference), contributions, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [5, 100])  # fewer and more features than images
def test_a_resampled_frechet_distance_is_that_of_the_repeated_images(counts, dim):
    x, reference = normal(60, dim) * 2 + 10, FeatureStatistics.of(normal(300, dim, seed=1) + 10)
    values = resampled_frechet(x, reference)(counts)
    expected = [frechet_distance(FeatureStatistics.of(repeated(x, row)), reference) for row in counts]
    assert values.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_interval_of_a_frechet_distance_stands_around_the_estimate():
    x, reference = normal(200, 8) + 0.5, FeatureStatistics.of(normal(1000, 8, seed=1))
    estimate = frechet_distance(FeatureStatistics.of(x), reference)
    scores = resampled_frechet(x, reference)
    found = bootstrap(scores, 200, num=100)
    assert found.estimate == pytest.approx(estimate, rel=1e-9)
    assert found.low < estimate < found.high
    raised = scores(draw_counts(200, 100, torch.Generator().manual_seed(0))).mean()
    assert raised > estimate + 0.5 * found.standard_error, "there would be no need to shift the interval"
    # the same over fresh images: what the interval is to foretell
    fresh = [frechet_distance(FeatureStatistics.of(normal(200, 8, seed=s) + 0.5), reference) for s in range(2, 62)]
    assert found.standard_error == pytest.approx(float(torch.tensor(fresh).std()), rel=0.35)


def test_a_resampled_kernel_distance_leaves_out_pairs_of_an_image_with_itself(counts):
    x, real = normal(60, 4) + 0.3, normal(50, 4, seed=1)
    scores = resampled_kernel(x, real)
    whole = kernel_distance_of_all(x, real)
    assert scores(torch.ones(1, 60, dtype=torch.float64)).item() == pytest.approx(whole, rel=1e-10)

    def kernel(a, b):
        return (a @ b.T / 4 + 1) ** 3

    for row, value in zip(counts, scores(counts), strict=True):
        pairs = torch.outer(row, row).fill_diagonal_(0)
        distinct = kernel(real, real)
        expected = (pairs * kernel(x, x)).sum() / pairs.sum() - 2 * (row / 60) @ kernel(x, real).mean(1)
        expected += (distinct.sum() - distinct.trace()) / (50 * 49)
        assert value.item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_resampled_inception_score_is_that_of_the_repeated_images(counts):
    logits = 3 * normal(60, 10)
    values = resampled_inception_score(logits)(counts)
    expected = [inception_score(repeated(logits, row), splits=1).mean for row in counts]
    assert values.tolist() == pytest.approx(expected, rel=1e-12)
