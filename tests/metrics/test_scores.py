"""Fréchet distance, kernel distance and Inception Score: published values, closed forms, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from latentflow.errors import ConfigError, DataError
from latentflow.metrics.scores import (
    SCORES,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_of_all,
    require_enough,
)
from latentflow.metrics.statistics import FeatureStatistics

of = FeatureStatistics.of


def normal(n: int, dim: int, seed: int, *, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(n, dim, generator=generator, dtype=torch.float64)


def covariance(dim: int, seed: int) -> torch.Tensor:
    root = normal(dim, dim, seed)
    return root @ root.T


@pytest.fixture
def sets(metric_values):
    """The features of the published scores, by name."""
    return {name.removeprefix("inputs/"): x for name, x in metric_values.items() if name.startswith("inputs/")}


@pytest.fixture
def published(metric_values):
    """A published score."""
    return lambda name: metric_values[f"outputs/{name}"].item()


def test_published_fid(sets, published, metric_values):
    generated, real = of(sets["gen"]), of(sets["real"])
    torch.testing.assert_close(generated.mean, metric_values["outputs/fid_stats/mu_gen"], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(real.covariance, metric_values["outputs/fid_stats/sigma_real"], rtol=1e-13, atol=1e-13)
    for name in ("fid", "fid_swapped", "tf_fid_double"):
        assert frechet_distance(generated, real) == pytest.approx(published(name), rel=1e-10)
    assert frechet_distance(generated, real) == pytest.approx(published("tf_fid"), rel=1e-6)
    assert frechet_distance(generated, generated) == pytest.approx(published("fid_self"), abs=1e-11)


def test_published_fid_of_fewer_images_than_features(sets, published):
    value = frechet_distance(of(sets["gen_few"]), of(sets["real_few"]))
    assert value == pytest.approx(published("fid_few"), rel=1e-7)
    assert value == pytest.approx(published("tf_fid_few_double"), rel=1e-7)


def test_published_kid(sets, published):
    for size in (100, 300):
        found = kernel_distance(sets["gen"], sets["real"], subset_size=size)
        assert found.mean == pytest.approx(published(f"kid_n300_size{size}_double_mean"), rel=1e-9)
        assert found.mean == pytest.approx(published(f"kid_n300_size{size}_mean"), rel=1e-5)
        assert found.std == pytest.approx(published(f"kid_n300_size{size}_double_std"), rel=1e-9, abs=1e-12)
    seeded = kernel_distance(sets["gen"], sets["real"], subset_size=100, seed=0)
    assert seeded.mean == pytest.approx(published("kid_n300_size100_seed0_double_mean"), rel=1e-9)
    assert seeded.std == pytest.approx(published("kid_n300_size100_seed0_double_std"), rel=1e-9)
    whole = kernel_distance_of_all(sets["gen"], sets["real"])
    assert whole == pytest.approx(published("kid_n300_size300_double_mean"), rel=1e-9)


def test_published_kid_with_the_usual_settings(sets, published):
    found = kernel_distance(sets["gen_big"], sets["real_big"])
    assert found.mean == pytest.approx(published("kid_n1200_default_double_mean"), rel=1e-9)
    assert found.std == pytest.approx(published("kid_n1200_default_double_std"), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [("default", {}), ("noshuffle", {"shuffle_seed": None}), ("splits7", {"splits": 7}), ("splits1", {"splits": 1})],
)
def test_published_inception_score(sets, published, name, options):
    found = inception_score(sets["logits"], **options)
    assert found.mean == pytest.approx(published(f"isc_{name}_mean"), rel=1e-9)
    assert found.std == pytest.approx(published(f"isc_{name}_std"), rel=1e-9, abs=1e-12)


def test_frechet_distance_of_gaussians_that_commute():
    """Of diagonal covariances it is the sum of (m_1 - m_2)^2 + (s_1 - s_2)^2, and zero variances are no trouble."""
    means = torch.tensor([[0.0, 1.0, 2.0, 0.0], [3.0, 1.0, 0.0, 0.0]])
    spreads = torch.tensor([[1.0, 2.0, 0.0, 0.0], [4.0, 2.0, 0.5, 0.0]])
    turn = torch.linalg.qr(normal(4, 4, 0)).Q
    pair = [
        FeatureStatistics.from_moments(turn @ m.double(), turn @ s.double().square().diag() @ turn.T, 10)
        for m, s in zip(means, spreads, strict=True)
    ]
    assert frechet_distance(*pair) == pytest.approx(9 + 4 + 9 + 0.25, abs=1e-6)


def test_frechet_distance_of_two_by_two_covariances():
    """There tr (S_1 S_2)^(1/2) = sqrt(tr(S_1 S_2) + 2 sqrt(det(S_1 S_2)))."""
    first, second = covariance(2, 1), covariance(2, 2)
    product = first @ second
    root_trace = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = float(first.trace() + second.trace()) - 2 * root_trace
    pair = [FeatureStatistics.from_moments(torch.zeros(2), s, 10) for s in (first, second)]
    assert frechet_distance(*pair) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_is_symmetric_and_zero_of_itself():
    for n in (2000, 20):  # more and fewer images than features
        first, second = of(normal(n, 48, 1)), of(normal(n, 48, 2, mean=0.3, std=2.0))
        assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-13)
        floor = float(first.covariance.trace()) * (1e-12 if n > 48 else 1e-7)
        assert abs(frechet_distance(first, first)) < floor


def test_frechet_distance_refuses_other_features():
    with pytest.raises(DataError, match="4 and of 5"):
        frechet_distance(FeatureStatistics(4), FeatureStatistics(5))


def test_kernel_distance_by_hand():
    """D = 1: k(x, y) = (xy + 1)^3."""
    generated, real = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    within = (0 + 1) ** 3 + (2 + 1) ** 3
    across = (1 + 1 + 2**3 + 3**3) / 4
    assert kernel_distance_of_all(generated, real) == pytest.approx(within - 2 * across)


def test_kernel_distance_in_blocks_and_of_unlike_numbers():
    generated, real = normal(1500, 3, 1), normal(1100, 3, 2)

    def kernel(x, y):
        return (x @ y.T / 3 + 1) ** 3

    def distinct(x):
        return (kernel(x, x).sum() - kernel(x, x).trace()) / (len(x) * (len(x) - 1))

    expected = distinct(generated) + distinct(real) - 2 * kernel(generated, real).mean()
    assert kernel_distance_of_all(generated, real) == pytest.approx(float(expected), rel=1e-9)


def test_inception_score_of_sure_and_unsure_classifiers():
    sure = 1e3 * torch.eye(4).repeat(5, 1)
    assert inception_score(sure, splits=5, shuffle_seed=None).mean == pytest.approx(4)
    assert inception_score(torch.zeros(20, 4), splits=5) == inception_score(torch.ones(20, 4), splits=5)
    assert inception_score(torch.zeros(20, 4)).mean == pytest.approx(1)


def test_too_few_images():
    with pytest.raises(DataError, match=r"kid needs at least 1000 images per set, for subsets of 1000; got "):
        kernel_distance(normal(300, 4, 0), normal(2000, 4, 1))
    with pytest.raises(DataError, match="10 splits"):
        inception_score(torch.zeros(9, 4))
    with pytest.raises(DataError, match="5 neighbours"):
        require_enough("coverage", 5)
    with pytest.raises(DataError, match="fid needs at least 2 images per set, for a covariance"):
        require_enough("fid", 1)
    assert "singular" in require_enough("fid", 2048, dim=2048)
    assert require_enough("fid", 2049, dim=2048) is None
    assert "meaningless" in require_enough("u_ids", 1000, dim=2048)
    assert all(require_enough(score, 50_000, dim=2048) is None for score in SCORES)
    with pytest.raises(ConfigError, match="did you mean 'recall'"):
        require_enough("recal", 5)


def test_features_that_do_not_match_or_are_not_finite():
    with pytest.raises(DataError, match="3 features and the others 4"):
        kernel_distance(normal(10, 3, 0), normal(10, 4, 0), subset_size=5)
    with pytest.raises(DataError, match="1 of 10 generated"):
        kernel_distance_of_all(normal(10, 4, 0).index_fill(0, torch.tensor([3]), torch.nan), normal(10, 4, 0))
