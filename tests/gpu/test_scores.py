"""Scores and features on a GPU are those of the CPU, up to rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from latentflow.metrics.feature_scores import Scoring, feature_scores
from latentflow.metrics.features.extractors import open_features
from latentflow.metrics.scores import frechet_contributions, frechet_distance
from latentflow.metrics.statistics import FeatureStatistics

METRICS = ("fid", "kid", "is", "precision", "recall", "density", "coverage")
NUM, DIM = 1500, 128


@pytest.fixture(scope="module")
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    """Generated and real features on the CPU, a little apart and correlated."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(DIM, DIM, generator=generator) / DIM**0.5
    generated, real = ((torch.randn(NUM, DIM, generator=generator) @ mixed).relu() for _ in range(2))
    return 1.1 * generated + 0.02, real


@pytest.mark.parametrize("resamples", [None, 20])
def test_scores_and_intervals(device, sets, resamples):
    """Whether features are there already or are moved in parts."""
    logits = torch.randn(NUM, 50, generator=torch.Generator().manual_seed(1))
    given = {"features": "inception", "logits": logits}
    how = Scoring(resamples, neighbours=1200)
    here = feature_scores(METRICS, sets[0], FeatureStatistics.of(sets[1]), sets[1], how=how, **given)
    for generated, real in (sets, [x.to(device) for x in sets]):
        reference = FeatureStatistics.of(real, device)
        there = feature_scores(METRICS, generated, reference, real, how=replace(how, device=device), **given)
        for name in METRICS:
            tolerance = 2e-3 if name in METRICS[3:] else 1e-7  # a distance that is a radius may fall on either side
            for key in ("value", "low", "high", "standard_error"):
                assert getattr(there[name], key) == pytest.approx(getattr(here[name], key), abs=tolerance, rel=1e-6), (
                    name
                )


def test_singular_covariances(device):
    """Fewer images than features: eigenvalues that vanish are rounding errors of another solver."""
    generator = torch.Generator().manual_seed(0)
    generated, real = (torch.randn(100, 512, generator=generator) for _ in range(2))
    found = {}
    for place in ("cpu", device):
        statistics, reference = FeatureStatistics.of(generated, place), FeatureStatistics.of(real, place)
        spread = frechet_contributions(generated, statistics, reference).std()
        found[place] = frechet_distance(statistics, reference), float(spread)
    assert found[device] == pytest.approx(found["cpu"], rel=1e-5)


def test_features_in_every_precision(device, kl):
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in ("random", "latents"):
        given = {"autoencoder": kl, "image_size": 32}
        wanted = open_features(name, **given)(images)
        there = {word: open_features(name, device=device, precision=word, **given) for word in ("fp32", "tf32", "bf16")}
        found = {word: extract(images).cpu() for word, extract in there.items()}
        kl.to("cpu")
        errors = {word: float((features - wanted).norm() / wanted.norm()) for word, features in found.items()}
        assert errors["fp32"] < 1e-5
        assert errors["fp32"] <= errors["tf32"] < 5e-3
        assert errors["bf16"] < 3e-2
