"""The rounds of a sweep with a made-up clock: what is drawn, what a budget leaves out, and what is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from latentflow.artifacts import write_json
from latentflow.errors import ArtifactError, NonFiniteError
from latentflow.evaluation import sweep_rounds
from latentflow.evaluation.sweep_rounds import Candidates, SweepPlan, measure_rounds
from latentflow.evaluation.sweep_rules import (
    combinations,
)
from latentflow.metrics.scores import frechet_distance
from latentflow.metrics.statistics import FeatureStatistics

GRID = {"tolerances": [0.01], "guidances": [1.0], "intervals": [(0.0, 1.0)], "shifts": [1.0], "steps": [4]}


class Clock:
    """Time that passes only when something is drawn."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class FakeDraw:
    """Images whose features come nearer to a standard normal cloud with the steps; one second per step and image."""

    def __init__(self, clock: Clock):
        self.clock, self.calls = clock, []

    def __call__(self, *, num: int, seed: int, preset: dict, on_images: Callable[[int], None] = lambda n: None):
        steps = preset["steps"]
        if preset["solver"] == "rk4":
            raise NonFiniteError("the state is not finite")
        if steps > 1:  # not the one that warms up
            self.calls.append((f"{preset['solver']}-{steps}", seed, num))
            self.clock.now += steps * num
        rows = [torch.randn(3, generator=torch.Generator().manual_seed(seed + i)) for i in range(num)]
        features = torch.stack(rows) + 10 / steps
        seconds = torch.tensor([[float(steps * num), 0.0]], dtype=torch.float64)
        return {"features": features, "evaluations": torch.full((num,), steps), "seconds": seconds}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Candidates of 2, 4, 8, ... steps in `tmp_path`, what was drawn of them, and how to measure them."""
    clock = Clock()
    monkeypatch.setattr(sweep_rounds, "time", clock)
    reference = FeatureStatistics.from_moments(torch.zeros(3).double(), torch.eye(3).double(), 1000)

    def run(steps: list[int], sizes: list[int], budget: float | None = None, solvers=("euler",)):
        plan = SweepPlan(
            weights="",
            model={},
            guided={},
            data="",
            features="fake",
            feature_hash="",
            device="cpu",
            batch_size=1,
            seed=5,
            sizes=sizes,
            candidates=combinations(solvers=solvers, **{**GRID, "steps": steps}),
        )
        draw = FakeDraw(clock)
        candidates = Candidates(tmp_path / "candidates", plan, draw, reference)
        return measure_rounds(candidates, budget), draw.calls, candidates

    return run


def test_without_a_budget_all_are_measured_once(fake):
    (only,), calls, _ = fake([2, 4, 8], [6])
    assert calls == [("euler-2", 5, 6), ("euler-4", 5, 6), ("euler-8", 5, 6)]
    assert [(p.name, p.evaluations) for p in only.points] == [("euler-2", 2), ("euler-4", 4), ("euler-8", 8)]
    assert only.missing == []
    assert [p.distance for p in only.points] == sorted((p.distance for p in only.points), reverse=True)


def test_later_rounds_draw_only_what_is_new_and_score_all(fake, tmp_path):
    rounds, calls, candidates = fake([2, 4, 8, 16], [4, 8], budget=1e6)
    assert [sorted(one.measured) for one in rounds] == [
        ["euler-16", "euler-2", "euler-4", "euler-8"],
        ["euler-16", "euler-2"],
    ]
    assert calls[4:] == [("euler-2", 9, 4), ("euler-16", 9, 4)]
    whole = FakeDraw(Clock())(num=8, seed=5, preset={"solver": "euler", "steps": 16})
    exact = frechet_distance(FeatureStatistics.of(whole["features"]), candidates.reference)
    assert rounds[1].measured["euler-16"].distance == pytest.approx(exact, rel=1e-9)
    assert rounds[1].measured["euler-16"].evaluations == [16] * 8
    assert rounds[1].measured["euler-16"].drawing_seconds == 8 * 16


def test_resamples_are_the_same_for_every_candidate(fake):
    """Shifted clouds of equal noise: the covariance part of each resampled distance is equal."""
    (only,), _, _ = fake([2, 4], [16])
    first, second = (torch.tensor(only.measured[name].resamples) for name in ("euler-2", "euler-4"))
    assert first.std() > 0
    # |m + a|^2 - |m + b|^2 is linear in the resampled mean m of the noise; nothing else differs
    slope = 2 * (10 / 2 - 10 / 4)
    assert (first - second).std() < slope * 3
    assert torch.corrcoef(torch.stack([first, second]))[0, 1] > 0.9


def test_a_budget_ends_the_first_round_and_repeating_goes_on(fake):
    (first,), calls, _ = fake([2, 4, 8], [10], budget=60)  # 20 s, 40 s, and then it is spent
    assert [name for name, _, _ in calls] == ["euler-2", "euler-4"]
    assert first.missing == ["euler-8"]
    (second,), calls, _ = fake([2, 4, 8], [10], budget=60)
    assert [name for name, _, _ in calls] == ["euler-8"]
    assert second.missing == []
    (_,), calls, _ = fake([2, 4, 8], [10], budget=60)
    assert calls == []


def test_a_budget_takes_fewer_into_the_next_round_or_none(fake):
    """Round one takes 10 * (2 + 4 + 8 + 16 + 32 + 64) = 1260 s; the next takes as long for those it keeps."""
    steps = [2, 4, 8, 16, 32, 64]
    rounds, _, _ = fake(steps, [10, 20], budget=1260 + 100)
    assert len(rounds) == 1
    rounds, calls, _ = fake(steps, [10, 20], budget=10 * (2 + 64))
    assert [sorted(one.measured) for one in rounds][1] == ["euler-2", "euler-64"]
    assert len(calls) == 2
    rounds, calls, _ = fake(steps, [10, 20])  # and without one all take part
    assert len(rounds[1].measured) == 6
    assert len(calls) == 4


def test_a_candidate_that_fails_is_left_out_and_not_tried_again(fake):
    (only,), _, candidates = fake([4, 8], [6], solvers=("euler", "rk4"))
    assert sorted(only.measured) == ["euler-4", "euler-8"]
    assert candidates.kept["rk4-4"].failed == "the state is not finite"
    assert only.missing == []
    _, calls, again = fake([4, 8], [6], solvers=("euler", "rk4"))
    assert calls == []
    assert again.kept["rk4-8"].failed


def test_a_damaged_record_is_named(fake, tmp_path):
    fake([4], [6])
    write_json(tmp_path / "candidates" / "euler-4.json", {"name": 3})
    with pytest.raises(ArtifactError, match=r"euler-4.json is damaged"):
        fake([4], [6])
