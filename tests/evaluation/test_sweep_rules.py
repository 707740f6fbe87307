"""The rules of a sweep on made-up numbers: candidates, rounds, marks, and the preset that is named."""

from __future__ import annotations

import pytest
import torch

from latentflow.errors import ConfigError
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


def test_guides_are_combined_with_guidance_alone():
    guides = ["none", "@1/8", "runs/cats@1/16", "elsewhere/cats@1/16"]
    made = combinations(solvers=["heun"], **{**GRID, "guidances": [1.0, 2.0]}, guides=guides)
    one, *guided = made
    assert one == "heun-4"
    assert "guide" not in made[one]
    assert guided[:2] == ["heun-4_g2", "heun-4_g2_by-1-8"]
    assert [name[:16] for name in guided[2:]] == ["heun-4_g2_by-16-"] * 2
    assert [made[name]["guide"]["model"] for name in guided] == guides


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
