"""Reports: scores with intervals, what two of them must agree in, and the way to disk and back."""

from __future__ import annotations

import pytest
import torch

from latentflow import progress
from latentflow.artifacts import read_json, write_json
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.metrics.evaluation_report import (
    EvaluationProtocol,
    EvaluationReport,
    FeatureFacts,
    ModelFacts,
    ReferenceFacts,
    Score,
    compare,
)
from latentflow.metrics.feature_scores import Scoring, check_metrics, feature_scores, frechet_name
from latentflow.metrics.neighbours import neighbour_scores
from latentflow.metrics.scores import (
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_of_all,
    some_of,
)
from latentflow.metrics.statistics import FeatureStatistics

ALL = ("fid", "kid", "precision", "recall", "density", "coverage")


def report(**changed) -> EvaluationReport:
    protocol = {
        "task": "sample",
        "num_images": 20,
        "image_size": 16,
        "first_seed": 0,
        "label_policy": "balanced",
        "features": FeatureFacts(name="random", hash="a" * 64, label="relative"),
        "reference": ReferenceFacts(
            data="cats", fingerprint="b" * 64, num_images=30, image_size=16, resize="adm-center"
        ),
        "model": ModelFacts(name="runs/cats", weights="c" * 64),
        "sampling": {"solver": "heun"},
        "device": "cpu",
        "versions": {"torch": "2"},
    }
    scores = changed.pop("scores", {"fd": Score(label="FD", value=3.0, low=2.0, high=4.0, standard_error=0.3)})
    return EvaluationReport(protocol=EvaluationProtocol(**{**protocol, **changed}), scores=scores)


@pytest.fixture(scope="module")
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    """60 generated and 80 real rows of 5 features, a little apart."""
    generator = torch.Generator().manual_seed(0)
    return 0.3 + torch.randn(60, 5, generator=generator), torch.randn(80, 5, generator=generator)


@pytest.mark.parametrize("resamples", [None, 50])
def test_values_are_those_of_the_scores_and_lie_in_their_intervals(sets, resamples):
    generated, real = sets
    reference = FeatureStatistics.of(real)
    scores = feature_scores(ALL, generated, reference, real, features="inception", how=Scoring(resamples))
    near = neighbour_scores(generated, real)
    wanted = {name: getattr(near, name) for name in ALL[2:]}
    wanted |= {"fid": frechet_distance(FeatureStatistics.of(generated), reference)}
    wanted |= {"kid": kernel_distance_of_all(generated, real)}
    assert {name: score.value for name, score in scores.items()} == wanted
    for score in scores.values():
        assert score.resamples == (resamples or 0)
        assert score.low < score.value < score.high
        assert score.standard_error > 0
    assert "1000" in scores["kid"].notes[0]


def test_both_kinds_of_interval_agree(sets):
    given = (sets[0], FeatureStatistics.of(sets[1]), sets[1])
    over_images, resampled = (
        feature_scores(ALL, *given, features="inception", how=Scoring(number)) for number in (None, 400)
    )
    for name, score in over_images.items():
        assert score.standard_error == pytest.approx(resampled[name].standard_error, rel=0.2)


def test_shares_of_images_lie_between_0_and_1():
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    generated = torch.cat([rows, 50 + rows[:1]])
    scores = feature_scores(("precision",), generated, FeatureStatistics.of(rows), rows, features="random")
    assert scores["precision"].value < scores["precision"].high == 1


def test_bounds_from_few_resamples_are_called_what_they_are():
    def text(resamples: int) -> str:
        return Score(label="FD", value=3, low=2, high=4, resamples=resamples).text

    assert (text(0), text(200)) == ("3 [2, 4]", "3 [2, 4]")
    assert text(199) == "3 [2, 4] (spread of 199 resamples)"


def test_neighbours_are_looked_for_among_some_images_drawn_from_all(sets):
    generated, real = sets
    given = (generated, FeatureStatistics.of(real), real)
    scores = feature_scores(("recall", "fid"), *given, features="inception", how=Scoring(neighbours=70))
    assert scores["recall"].value == neighbour_scores(generated, real[some_of(80, 70)]).recall
    assert scores["recall"].notes == [
        "computed on 60 of 60 images and 70 of 80 real ones, chosen at random (--neighbours)"
    ]
    assert scores["fid"].notes == []
    assert feature_scores(("recall",), *given, features="inception", how=Scoring(neighbours=80))["recall"].notes == []
    assert some_of(80, 70).tolist() == some_of(80, 70).sort().values.unique().tolist() != list(range(70))


def test_scoring_reports_progress_without_a_terminal(sets, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    given = (sets[0], FeatureStatistics.of(sets[1]), sets[1])
    for resamples, total in ((None, 2 * 60 + 60 + 80 + 60), (40, 41 * 60 + 60 + 80 + 60)):
        feature_scores(("fid", "recall"), *given, features="inception", how=Scoring(resamples))
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith(f"scoring 60/{total} images")
        assert lines[-1].startswith(f"scoring {total}/{total} images")


def test_kid_of_many_images_is_the_published_mean_over_subsets():
    generator = torch.Generator().manual_seed(0)
    generated, real = torch.randn(1001, 3, generator=generator), torch.randn(1100, 3, generator=generator)
    given = (("kid",), generated, FeatureStatistics.of(real), real)
    score = feature_scores(*given, features="inception", how=Scoring(0))["kid"]
    found = kernel_distance(generated, real)
    assert (score.value, score.spread, score.low, score.notes) == (found.mean, found.std, None, [])


def test_inception_score_is_of_logits(sets):
    logits = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    reference = FeatureStatistics.of(sets[1])
    score = feature_scores(("is",), sets[0], reference, None, features="inception", logits=logits, how=Scoring(0))["is"]
    assert (score.value, score.spread) == tuple(vars(inception_score(logits)).values())


def test_other_features_are_named(sets):
    generated, real = sets
    scores = feature_scores(
        ("fid", "kid"), generated, FeatureStatistics.of(real), real, features="random", how=Scoring(0)
    )
    assert list(scores) == ["fd", "kid"]
    assert scores["fd"].label == "FD (random features), a relative measure"
    assert scores["kid"].label == "KID (random features)"
    assert (frechet_name("inception"), frechet_name("dinov2")) == (("fid", "FID"), ("fd", "FD-DINOv2"))


def test_singular_covariances_are_warned_of_in_the_score():
    rows = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    scores = feature_scores(("fid",), rows[:6], FeatureStatistics.of(rows[6:]), None, features="random", how=Scoring(0))
    assert "singular" in scores["fd"].notes[0]
    assert report(scores=scores).warnings[0].startswith("FD (random features)")


def test_statistics_are_not_enough_for_neighbours(sets):
    with pytest.raises(DataError, match="precision needs the features of the real images"):
        feature_scores(("fid", "precision"), sets[0], FeatureStatistics.of(sets[1]), None, features="random")


def test_few_images_are_refused_at_once_and_unknown_numbers_of_real_ones_are_not():
    assert check_metrics(("fid", "kid", "psnr"), 2, 0) == {}
    for metrics, num, real in (
        (("fid",), 1, 9),
        (("fid",), 9, 1),
        (("recall",), 9, 5),
        (("is",), 9, 100),
        (("kid",), 1, 1),
    ):
        with pytest.raises(DataError, match=str(min(num, real))):
            check_metrics(metrics, num, real)


def test_round_trip(tmp_path):
    report().save(tmp_path / "a.json")
    assert EvaluationReport.load(tmp_path / "a.json") == report()
    assert report().scores["fd"].text == "3 [2, 4]"


def test_reports_of_earlier_versions_have_no_request_and_are_compared(tmp_path):
    report(scores={"fd": Score(label="FD", value=1.0)}).save(tmp_path / "a.json")
    written = read_json(tmp_path / "a.json")
    assert written.pop("request") == {}
    write_json(tmp_path / "a.json", written)
    old = EvaluationReport.load(tmp_path / "a.json")
    assert old.request == {}
    assert compare(report(), old).scores["fd"].difference == 2.0


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 2}', '{"protocol": {}, "scores": {}}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"a\.json"):
        EvaluationReport.load(tmp_path / "a.json")


def test_nan_is_no_score():
    with pytest.raises(ValueError, match="finite"):
        Score(label="FD", value=float("nan"))


def test_ways_of_sampling_are_compared():
    other = report(
        sampling={"solver": "euler"},
        first_seed=7,
        model=ModelFacts(name="x", weights="d"),
        device="cuda",
        scores={"fd": Score(label="FD", value=1.0, standard_error=0.4), "kid": Score(label="KID", value=1.0)},
    )
    found = compare(report(), other)
    assert found.differing == []
    assert list(found.scores) == ["fd"]
    assert (found.scores["fd"].difference, found.scores["fd"].standard_error) == (2.0, pytest.approx(0.5))


def test_numbers_of_neighbours_are_compared_where_neighbours_are():
    recall = {"recall": Score(label="recall", value=0.5)}
    one, other = report(neighbours=25, scores=recall), report(neighbours=28, scores=recall)
    with pytest.raises(ConfigError, match="neighbours among: all images, 25 real ones and all images, 28 real ones"):
        compare(one, other)
    assert compare(report(neighbours=30, scores=recall), report(scores=recall)).differing == []  # all of them
    assert compare(report(neighbours=10), report()).differing == []  # fd has none


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_images": 21}, "images: 20 and 21"),
        ({"image_size": 32}, "image size: 16 and 32"),
        ({"label_policy": "uniform"}, "label policy: balanced and uniform"),
        ({"features": FeatureFacts(name="random", hash="e" * 64, label="relative")}, "features: random aaa"),
        (
            {"features": FeatureFacts(name="random", hash="a" * 64, label="relative", precision="bf16")},
            "precision of features: fp32 and bf16",
        ),
        ({"task": "inpaint", "inputs": {"holes": "boxes"}}, "holes: None and boxes"),
        (
            {"reference": ReferenceFacts(data="cats", fingerprint="f", num_images=30, image_size=16, resize="other")},
            "resize: adm-center and other",
        ),
    ],
)
def test_incomparable_results_are_refused_unless_it_is_wanted(changed, said):
    with pytest.raises(ConfigError, match="not comparable") as caught:
        compare(report(), report(**changed))
    assert said in str(caught.value)
    found = compare(report(), report(**changed), anyway=True)
    assert said in "; ".join(found.differing)
    assert found.scores["fd"].difference == 0


def test_nothing_in_common():
    with pytest.raises(ConfigError, match="no score in common"):
        compare(report(), report(scores={"kid": Score(label="KID", value=1.0)}))
