"""`latentflow sweep`: its rules on made-up numbers, its rounds with a made-up clock, and the command on tiny models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentflow.api import LatentFlow
from latentflow.artifacts import read_json, write_json
from latentflow.commands.sweep import sweep
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, ConfigError, DataError, NonFiniteError
from latentflow.evaluation import sweep_rounds
from latentflow.evaluation.drawn_set import ImageSet
from latentflow.evaluation.request import SweepRequest
from latentflow.evaluation.sweep_rounds import Candidates, SweepPlan, measure_rounds
from latentflow.evaluation.sweep_rules import (
    Ceiling,
    Point,
    affordable,
    cheapest_as_good,
    combinations,
    images_needed,
    marks,
    round_sizes,
    with_more,
    worth_keeping,
)
from latentflow.metrics.features.extractors import RandomFeatures
from latentflow.metrics.scores import frechet_distance
from latentflow.metrics.statistics import FeatureStatistics
from latentflow.metrics.stored_statistics import Provenance, Reference
from latentflow.model.config import SamplingPreset
from latentflow.model.flow_model import read_config
from latentflow.pages.sweep import verdict
from tests import tiny
from tests.processes import Result, run_here

GRID = {"tolerances": [0.01], "guidances": [1.0], "intervals": [(0.0, 1.0)], "shifts": [1.0], "steps": [4]}


def points(*pairs: tuple[float, float], noise: float = 0.0) -> list[Point]:
    """Candidates a, b, c, ... of (evaluations, distance), each with its own noise in two resamples."""
    made = []
    for n, (evaluations, distance) in enumerate(pairs):
        resamples = tuple(distance + noise * sign for sign in ((1, -1), (-1, 1))[n % 2])
        made.append(Point("abcdefgh"[n], evaluations, distance, resamples))
    return made


def names(chosen: list[Point]) -> str:
    return "".join(point.name for point in chosen)


# Candidates


def test_combinations_leave_out_what_makes_no_difference():
    made = combinations(
        solvers=["heun", "dopri5"],
        steps=[1, 4],
        tolerances=[0.01, 0.001],
        guidances=[1.0, 2.0],
        intervals=[(0.0, 1.0), (0.1, 0.8)],
        shifts=[1.0, 2.0],
    )
    heun = {f"heun-{rest}" for rest in ("1", "4", "4_s2")} | {
        f"heun-{steps}_g2{interval}{shift}"
        for steps, shift in (("1", ""), ("4", ""), ("4", "_s2"))
        for interval in ("", "_i0.1-0.8")
    }
    dopri5 = {f"dopri5-{tol}{rest}" for tol in ("0.01", "0.001") for rest in ("", "_g2", "_g2_i0.1-0.8")}
    assert set(made) == heun | dopri5
    assert made["heun-4_g2_i0.1-0.8_s2"] == {
        "solver": "heun",
        "guidance": 2.0,
        "guidance_interval": (0.1, 0.8),
        "steps": 4,
        "shift": 2.0,
    }
    assert made["dopri5-0.01"]["rtol"] == made["dopri5-0.01"]["atol"] == 0.01
    assert "steps" not in made["dopri5-0.01"]


def test_cheap_candidates_come_first():
    made = combinations(solvers=["rk4", "heun", "ab2"], **{**GRID, "steps": [8, 2], "guidances": [2.0, 1.0]})
    assert list(made) == [
        *("ab2-2", "heun-2", "ab2-2_g2", "rk4-2", "heun-2_g2", "ab2-8"),
        *("rk4-2_g2", "heun-8", "ab2-8_g2", "rk4-8", "heun-8_g2", "rk4-8_g2"),
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"solvers": ["huen"]}, "did you mean 'heun'"),
        ({"solvers": []}, "no candidates"),
        ({"solvers": ["heun"], "steps": []}, "no candidates"),
        ({"solvers": ["dopri5"], "tolerances": []}, "no candidates"),
        ({"solvers": ["heun"], "steps": [0]}, "steps 0 must be above 0"),
        ({"solvers": ["dopri5"], "tolerances": [-1e-3]}, "tolerance -0.001"),
        ({"solvers": ["heun"], "shifts": [0.0]}, "shift 0"),
    ],
)
def test_combinations_refuse_bad_input(changed, message):
    with pytest.raises(ConfigError, match=message):
        combinations(**{**GRID, **changed})


# Rounds


def test_rounds_double_and_end_at_num():
    assert round_sizes(1000, 56) == [125, 250, 500, 1000]
    assert round_sizes(1000, 7) == [1000]
    assert round_sizes(1000, 8) == [500, 1000]
    assert round_sizes(101, 1000) == [51, 101]  # no round below 32
    assert round_sizes(8, 1000) == [8]


def test_what_is_missed_least_is_dropped():
    rising = points((4, 100), (8, 50), (16, 30), (32, 29), (64, 28.5))
    assert names(worth_keeping(rising, 5)) == "abcde"
    assert names(worth_keeping(rising, 4)) == "abce"  # d improves least on what costs no more
    assert names(worth_keeping(rising, 2)) == "ae"
    assert names(worth_keeping(rising, 1)) == "e"


def test_dominated_candidates_go_first_and_the_best_and_the_cheapest_stay():
    mixed = points((64, 10), (8, 50), (16, 60), (8, 90), (4, 100), (64, 11))
    # e 4:100, b 8:50, d 8:90, c 16:60, a 64:10, f 64:11; compared with the best before: d -0.44, c -0.17, f -0.09
    assert names(worth_keeping(mixed, 5)) == "ebcaf"
    assert names(worth_keeping(mixed, 4)) == "ebaf"
    assert names(worth_keeping(mixed, 3)) == "eba"
    assert names(worth_keeping(mixed, 2)) == "ea"


def test_small_gains_that_add_up_survive():
    """None of them gains much on its neighbour; together they gain a third."""
    slow = points((1, 100), (2, 95), (3, 90), (4, 85), (5, 80), (6, 75))
    kept = worth_keeping(slow, 3)
    assert names(kept)[0] == "a"
    assert names(kept)[-1] == "f"


def test_as_many_are_kept_as_can_be_paid_for():
    rising = points((4, 100), (8, 50), (16, 30), (32, 29), (64, 28.5))

    def price(point: Point) -> float:
        return point.evaluations

    assert names(affordable(rising, 5, 124, price)) == "abcde"
    assert names(affordable(rising, 4, 92, price)) == "abce"
    assert names(affordable(rising, 4, 91, price)) == "abe"
    assert names(affordable(rising, 4, 75, price)) == "ae"
    assert affordable(rising, 4, 67, price) == []
    assert names(affordable(rising[:1], 2, 4, price)) == "a"


# Marks, and what is named


def test_front_without_noise_is_that_of_pareto():
    found = marks(points((4, 10), (8, 5), (8, 6), (16, 5.5), (32, 4)))
    assert found == {"a": "front", "b": "front", "c": "beaten", "d": "beaten", "e": "front"}


def test_noise_puts_nothing_on_the_front_and_throws_nothing_off_it():
    # resamples of a and b move against each other, so their difference is by sqrt(2) uncertain; a and c move together
    found = marks(points((4, 10), (8, 9), (16, 11), (32, 12), (64, 2), noise=0.5))
    assert found == {"a": "front", "b": "undecided", "c": "beaten", "d": "beaten", "e": "front"}
    assert marks(points((4, 10), (8, 9), (16, 11), (32, 12), noise=2.0))["d"] == "beaten"  # by b, which moves like it


def test_what_two_candidates_have_in_common_is_no_noise():
    shared = [9.0, 11.0, 10.0]
    cheap = Point("cheap", 4, 10.0, tuple(shared))
    good = Point("good", 8, 9.9, tuple(x - 0.1 for x in shared))
    assert cheap.standard_error == 1.0
    gap = cheap.worse_by(good)
    assert (round(gap.estimate, 12), round(gap.standard_error, 12)) == (0.1, 0.0)
    assert marks([cheap, good]) == {"cheap": "front", "good": "front"}


def drawn(
    name: str, evaluations: float, distance: float, own_noise: float, wrong: int = 0, num: int = 1000, seed: int = 0
) -> Point:
    """A candidate whose distance has own noise and noise common to all; its first images are wrong."""
    shared = torch.randn(100, generator=torch.Generator().manual_seed(99))
    own = torch.randn(100, generator=torch.Generator().manual_seed(seed))
    resamples = tuple((distance + 0.1 * shared + own_noise * own).tolist())
    return Point(name, evaluations, distance, resamples, (False,) * wrong + (True,) * (num - wrong))


def best_of(points: list[Point], num: int = 1000, margin: float = 0.1, ceiling: Ceiling | None = None) -> str | None:
    return cheapest_as_good(points, num, images_needed(points, num, margin, ceiling))


def test_the_cheapest_that_is_shown_to_be_as_good_is_named():
    falling = [drawn("a", 4, 2.0, 1e-3), drawn("b", 8, 1.03, 1e-3, seed=1), drawn("c", 16, 1.0, 1e-3, seed=2)]
    assert best_of(falling) == "b"  # 3 % are within the margin, and the noise in common does not count
    assert best_of(falling, margin=0.01) == "c"


def test_what_is_only_not_shown_to_be_worse_is_not_called_as_good():
    """The cheap one measures better, by a chance that the expensive ones share in part only."""
    vague = [drawn("a", 4, 0.98, 0.2), drawn("b", 8, 1.0, 0.2, seed=1), drawn("c", 16, 1.02, 0.2, seed=2)]
    assert best_of(vague) is None
    needed = images_needed(vague, 1000, 0.1)
    assert 10_000 < min(needed.values()) < 100_000  # (3 x 0.28 / 0.12)^2 of 1000


def test_images_needed_are_those_that_decide():
    """Standard errors fall with the root of the number of images."""
    few = [drawn("a", 4, 1.0, 0.1), drawn("b", 8, 1.01, 0.1, seed=1)]
    needed = images_needed(few, 400, 0.1)["a"]
    assert needed > 400
    for factor, named in ((1.05, True), (0.95, False)):
        noise = 0.1 * (400 / (factor * needed)) ** 0.5
        more = [drawn("a", 4, 1.0, noise), drawn("b", 8, 1.01, noise, seed=1)]
        assert (best_of(more, num=int(factor * needed)) == "a") is named


def test_pictures_of_something_else_are_not_made_good_by_their_distance():
    ceiling = Ceiling(0.95, 2000)
    mush = drawn("mush", 4, 0.5, 1e-3, wrong=300)
    right = drawn("right", 16, 1.0, 1e-3, wrong=50, seed=1)
    assert best_of([mush, right]) == "mush"
    assert best_of([mush, right], ceiling=ceiling) == "right"


def test_some_number_of_images_decides_though_accuracy_and_distance_disagree():
    """Each step to a lower distance costs less accuracy than the margin, and all of them together more."""
    made = [drawn("abcdef"[n], 4 + n, 1.0 - 0.15 * n, 1e-3, wrong=15 * n, num=4000, seed=n) for n in range(6)]
    wide = [drawn("abcdef"[n], 4 + n, 1.0 - 0.15 * n, 1e-3, wrong=50 * n, num=4000, seed=n) for n in range(6)]
    assert best_of(made, num=4000, ceiling=Ceiling(0.99, 9000)) == "f"
    needed = images_needed(wide, 4000, 0.1, Ceiling(0.99, 9000))
    assert min(needed.values()) < 1e6
    assert min(needed, key=needed.get) == "c"


def test_more_accuracy_than_real_images_have_is_no_merit():
    ceiling = Ceiling(0.90, 5000)
    plain = drawn("plain", 16, 2.0, 1e-3, wrong=0)
    like_real = drawn("like real", 16, 1.0, 1e-3, wrong=80, seed=1)
    assert best_of([plain, like_real], ceiling=ceiling) == "like real"
    assert best_of([plain, like_real], ceiling=Ceiling(1.0, 5000)) == "plain"


def test_few_images_decide_nothing():
    same = [drawn("a", 4, 1.0, 0.0, num=60), drawn("b", 8, 1.0, 0.0, num=60)]
    assert best_of(same, num=60) is None
    agreeing = [drawn("a", 4, 1.0, 0.0, wrong=30, num=110), drawn("b", 8, 1.0, 0.0, wrong=30, num=110)]
    assert best_of(agreeing, num=110) == "a"
    assert best_of(agreeing, num=110, ceiling=Ceiling(0.9, 50)) is None  # 2 points may well lie between them
    assert best_of([drawn("only", 4, 1.0, 0.5)]) == "only"


def test_of_equal_presets_a_worse_one_is_seldom_named():
    """Twenty sweeps of four presets, of which the cheapest is worse by just more than the margin."""
    wrongly = 0
    for run in range(20):
        generator = torch.Generator().manual_seed(run)
        made = []
        for place, truth in enumerate((1.12, 1.0, 1.0, 1.0)):
            estimate = truth + 0.02 * torch.randn((), generator=generator).item()
            made.append(drawn("abcd"[place], 4 + place, estimate, 0.02, seed=100 * run + place))
        wrongly += best_of(made) == "a"
    assert wrongly <= 1


def test_more_rounds_double():
    assert with_more([125, 250], 1000) == [125, 250, 500, 1000]
    assert with_more([1000], 1500) == [1000, 1500]
    assert with_more([1000], 1000) == [1000]


def test_the_most_accurate_is_kept_as_long_as_there_is_room():
    made = [drawn("a", 4, 3.0, 0, 90), drawn("b", 8, 1.0, 0, 80), drawn("c", 16, 2.0, 0, 5), drawn("d", 32, 1.5, 0, 70)]
    assert names(worth_keeping(made, 3)) == "abc"
    assert names(worth_keeping(made, 2)) == "bc"


# Measuring


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


# The command


@pytest.fixture(scope="module")
def models(tmp_path_factory, deterministic) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tiny.model(deterministic).save_pretrained(folder / "classes")
    tiny.model(deterministic, class_names=()).save_pretrained(folder / "nothing")
    return {name: folder / name for name in ("classes", "nothing")}


@pytest.fixture(scope="module")
def small(models, images, tmp_path_factory) -> Callable[..., object]:
    """A sweep of two candidates with a few images."""

    def run(model: str = "classes", data: object = images, **given: object):
        out = given.pop("out", None) or tmp_path_factory.mktemp("sweeps") / "out"
        options = {"num": 8, "solvers": ["euler"], "steps": [1, 2], "guidance": [1.0], **given}
        return sweep(SweepRequest(model=models.get(model, model), data=data, out=out, **options), tiny.CPU)

    return run


@pytest.fixture
def command(capsys, monkeypatch, models, images, tmp_path) -> Callable[..., Result]:
    """Run `latentflow sweep` on a model with a few images of few candidates, by default."""

    def run(model: str = "classes", *args: object) -> Result:
        given = {"--data": images, "--num": 8, "--solvers": "euler", "--steps": "1,2", "--guidance": "1"}
        given |= {"--out": tmp_path / "out", "--device": "cpu"}
        own = {name: value for name, value in given.items() if name not in args}
        return run_here(
            ["sweep", models.get(model, model), *(x for pair in own.items() for x in pair), *args], capsys, monkeypatch
        )

    return run


def test_distances_are_those_of_the_images(small, models, images):
    result = small(num=12)
    extractor, source = RandomFeatures(), open_images(images, tiny.IMAGE_SIZE)
    real = torch.stack([torch.from_numpy(source[i].pixels.copy()).permute(2, 0, 1) for i in range(len(source))])
    flow = LatentFlow.from_pretrained(models["classes"], runtime=tiny.CPU)
    drawn = flow.sample(num=12, solver="euler", steps=2, guidance=1.0)
    exact = frechet_distance(FeatureStatistics.of(extractor(drawn.pixels)), FeatureStatistics.of(extractor(real)))
    assert result.final.measured["euler-2"].distance == pytest.approx(exact, rel=1e-4)
    assert result.final.measured["euler-2"].evaluations == [2] * 12


def test_a_sweep_writes_json_picture_and_a_page_without_links(command, tmp_path):
    result = command("classes", "--guidance", "1,2", "--intervals", "0:1,0.1:0.6")
    assert result.code == 0, result.err
    assert "biased upward at this sample size" in result.err
    out = tmp_path / "out"
    found = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert SweepRequest(**found["request"]).guidance == [1.0, 2.0]
    assert [c["name"] for c in found["candidates"][:1]] == ["euler-1"]
    assert {c["name"] for c in found["candidates"]} == {
        *("euler-1", "euler-2", "euler-1_g2", "euler-2_g2", "euler-1_g2_i0.1-0.6", "euler-2_g2_i0.1-0.6")
    }
    costs = {c["name"]: c["evaluations"] for c in found["candidates"]}
    assert (costs["euler-2"], costs["euler-2_g2"], costs["euler-2_g2_i0.1-0.6"]) == (2, 4, 3)
    assert list(costs.values()) == sorted(costs.values())
    page = (out / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|src=", page)
    assert all(name in page for name in costs)
    picture = (out / "sweep.svg").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"]*", picture) == ["http://www.w3.org/2000/svg"]
    assert "Pareto front" in picture


def test_repeating_draws_nothing_and_ends_the_same(small, monkeypatch, tmp_path):
    first = small(out=tmp_path / "out")
    monkeypatch.setattr(ImageSet, "draw", lambda *args, **given: pytest.fail("drawn again"))
    monkeypatch.setattr(RandomFeatures, "__call__", lambda *args: pytest.fail("computed again"))
    again = small(out=tmp_path / "out")
    assert again.final == first.final
    assert (again.best, again.marks, again.new) == (first.best, first.marks, first.new)


def test_halving_under_a_budget(small, tmp_path):
    """Eight candidates of 32 images, then four of 64."""
    result = small(num=64, steps=[1, 2, 3, 4, 5, 6, 7, 8], budget=1e6, out=tmp_path / "out")
    assert [one.num for one in result.rounds] == [32, 64]
    assert [len(one.measured) for one in result.rounds] == [8, 4]
    assert result.final is result.rounds[1]
    assert result.best is None  # 64 images
    page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert "32 images each, 8 presets" in page


def test_a_spent_budget_is_an_error_and_nothing_is_written_to_the_model(command, models, tmp_path):
    before = read_config(models["nothing"])
    result = command("nothing", "--budget", "1e-9")
    assert result.code == 2
    assert "was spent before a candidate was measured" in result.err
    assert read_config(models["nothing"]) == before


def test_other_settings_do_not_mix(command, tmp_path):
    assert command().code == 0
    result = command("classes", "--num", "7")
    assert result.code == 2
    assert "holds a sweep with other settings (sizes: [8], now [7])" in result.err
    result = command("classes", "--num", "8", "--seed", "3", "--batch-size", "2", "--steps", "1,2,3")
    assert "batch_size: 32, now 2" in result.err
    assert "more); choose another --out" in result.err
    assert command("nothing").code == 2


def test_an_undecided_sweep_writes_nothing_and_reports_it_everywhere(command, deterministic, tmp_path):
    folder = tmp_path / "model"
    tiny.model(deterministic).save_pretrained(folder)
    before = tiny.tree(folder)
    for args, said in ((("--write",), True), ((), False)):
        result = command(folder, *args)
        assert result.code == 0, result.err
        out = " ".join(result.out.split())
        assert "best preset undecided" in out
        assert "BEST" not in out
        assert ("Nothing was written" in out) is said
        found = json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))
        assert (found["decided"], found["best"], found["new_preset"], found["written"]) == (False, None, None, False)
        assert ("Nothing was written: the model keeps its preset." in found["verdict"]) is said
        page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
        assert ("Nothing was written" in page) is said
        assert "No best preset yet" in page
        assert "--write" not in page
    assert tiny.tree(folder) == before


def test_what_is_advised_decides(command, models, tmp_path):
    """Eight images decide nothing; the number that is advised, in the same folder, does."""
    out = command("classes", "--budget", "1000").out
    advised = re.search(r"repeat the command with (--num \d+) (--budget \d+) to go on", " ".join(out.split()))
    assert advised, out
    before = [file.read_bytes() for file in sorted((tmp_path / "out" / "candidates").glob("*.safetensors"))]
    result = command("classes", *advised[1].split(), *advised[2].split())
    assert result.code == 0, result.err
    assert "is the cheapest preset that is as good as any other" in " ".join(result.out.split())
    found = json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))
    assert found["decided"]
    assert found["best"] in {candidate["name"] for candidate in found["candidates"]}
    assert found["num"] > 8
    assert len(before) == 2
    page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert "repeat the command with --write" in page


def test_write_changes_the_preset_and_nothing_else(command, deterministic, tmp_path):
    folder = tmp_path / "model"
    tiny.model(deterministic, solver="rk4", steps=7, rtol=0.25, guided_channels=2).save_pretrained(folder)
    others, before = tiny.tree(folder), read_json(folder / "config.json")
    result = command(folder, "--write", "--steps", "3", "--guidance", "2", "--intervals", "0.1:0.5")
    assert result.code == 0, result.err
    assert "rk4, 7 steps, guidance 1" in result.out
    assert "euler, 3 steps, guidance 2, between 0.1 and 0.5" in result.out
    after = read_json(folder / "config.json")
    assert {**after, "sampling": None} == {**before, "sampling": None}
    assert read_config(folder).sampling == SamplingPreset(
        solver="euler", steps=3, guidance=2.0, guidance_interval=(0.1, 0.5), rtol=0.25, guided_channels=2
    )
    changed = {name for name, digest in tiny.tree(folder).items() if others[name] != digest}
    assert changed == {"config.json", "README.md"}
    assert "| sampling preset | euler, 3 steps, guidance 2 |" in (folder / "README.md").read_text(encoding="utf-8")
    # the preset is no part of the plan: the same command goes on
    assert command(folder, "--write", "--steps", "3", "--guidance", "2", "--intervals", "0.1:0.5").code == 0


def test_write_to_a_hub_id_is_refused_before_anything(command, tmp_path):
    result = command("someone/streets", "--write")
    assert result.code == 2
    assert "someone/streets is not a folder here" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        ("classes", ["--solvers", "huen"], "did you mean 'heun'"),
        ("nothing", ["--guidance", "1,2"], "the model is unconditional"),
        ("classes", ["--budget", "0"], "--budget 0 s: give more than 0"),
        ("classes", ["--steps", ""], "no candidates"),
        ("classes", ["--steps", "four"], "--steps 'four' is not a list of numbers"),
        ("classes", ["--intervals", "0.5"], "--intervals '0.5' is not a list of intervals like 0:1,0.1:0.8"),
        ("classes", ["--guidance", "2", "--intervals", "0.8:0.1"], "guidance interval is 0.8..0.1"),
        ("classes", ["--features", "rnadom"], "did you mean 'random'"),
        ("classes", ["--num", "1"], "--num 1: give a whole number of at least 2"),
        ("classes", ["--margin", "1"], "margin 1"),
        ("classes", ["--data", "nowhere"], "nowhere"),
        ("nowhere", [], "nowhere"),
    ],
)
def test_bad_input_costs_one_line_and_leaves_nothing(command, tmp_path, model, args, message):
    result = command(model, *args)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_reference_of_another_size_or_kind_is_refused(small, cache, tmp_path):
    extractor = RandomFeatures()
    made = Provenance(
        data="some",
        fingerprint="",
        image_size=32,
        resize="",
        feature_name="random",
        feature_hash=extractor.hash,
    )
    statistics = FeatureStatistics.of(torch.randn(8, extractor.dim, generator=torch.Generator().manual_seed(0)))
    file = tmp_path / "reference.safetensors"
    Reference(statistics, made).save(file)
    with pytest.raises(DataError, match="of images of 32 pixels, and the images to score have 16"):
        small(data=file)
    Reference(statistics, made.model_copy(update={"image_size": 16, "feature_hash": "other"})).save(file)
    with pytest.raises(DataError, match="scores would be meaningless"):
        small(data=file)
    Reference(statistics, made.model_copy(update={"image_size": 16})).save(file)
    assert small(data=file, steps=[1]).best == "euler-1"
    with pytest.raises(DataError, match="is a latent cache"):
        small(data=cache)


def test_a_folder_with_something_else_is_not_touched(small, tmp_path):
    (tmp_path / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"is not empty \(letter\.txt, .*does not hold a sweep"):
        small(out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_a_single_preset_is_not_said_to_be_compared(small):
    found = verdict(small(steps=[1]))
    assert found[0] == "euler-1 is the only preset that was measured; there is nothing to compare it with."
