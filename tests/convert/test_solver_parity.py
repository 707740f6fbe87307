"""Our solvers against the end states of torchdiffeq and LFM's samplers, with the same network and initial noise.

Fixed-step methods agree to the tolerance that the fixtures suggest. Where the other program differs by design, the
test says how, and shows that ours is closer to the solution.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow.convert.families.registry import architecture
from latentflow.flow.solvers import Solution, Tolerance, integrate
from latentflow.flow.times import sampling_times
from latentflow.shapes import Condition, per_image
from tests.convert.parity import find, needs_parity, tensors, weights

pytestmark = needs_parity

FIELDS = ("net", "net_gain2", "analytic")
PRECISIONS = {"f32": torch.float32, "f64": torch.float64}
OURS = {"euler": "euler", "midpoint": "midpoint", "heun2": "heun", "karras_euler": "euler", "karras_heun": "heun"}
"""Their name => ours."""

everywhere = pytest.mark.parametrize(("field", "precision"), [(f, p) for f in FIELDS for p in PRECISIONS])


@cache
def given() -> dict[str, Tensor]:
    return tensors(find("solvers"))


def case(field: str, precision: str, solver: str) -> dict[str, Any]:
    name = f"{field}/{precision}/{solver}"
    return next(case for case in find("solvers")["cases"] if case["name"] == name)


def theirs(field: str, precision: str, solver: str) -> Tensor:
    return given()[f"outputs/{field}/{precision}/{solver}"]


@cache
def network(gain: float, dtype: torch.dtype) -> torch.nn.Module:
    """The published network of one class, converted."""
    fixture = find("lfm_dit_uncond")
    return architecture("lfm", fixture["constructor"]).load(weights(fixture, gain)).to(dtype)


def velocity(field: str, dtype: torch.dtype):
    if field == "analytic":
        return analytic
    converted = network(2.0 if field == "net_gain2" else 1.0, dtype)
    return lambda x, t: converted(x, t.to(dtype), Condition())


def analytic(x: Tensor, time: Tensor) -> Tensor:
    t = per_image(time, x).to(x.dtype)
    return -0.7 * x + torch.sin(4 * t + x) + 0.5 * x * torch.cos(2 * t)


@torch.no_grad()
def solve(field: str, precision: str, times: Tensor, **how: Any) -> Solution:
    dtype = PRECISIONS[precision]
    return integrate(velocity(field, dtype), given()["inputs/x1"].to(dtype), times, **how)


@cache
def reference(field: str) -> Tensor:
    """The solution, to about 1e-12: 400 classical Runge-Kutta steps in double precision."""
    return solve(field, "f64", sampling_times(400), solver="rk4").x


def difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


@everywhere
@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun2"])
def test_fixed_steps(field, precision, solver):
    expected = case(field, precision, solver)
    found = solve(field, precision, sampling_times(expected["steps"]), solver=OURS[solver])
    error = difference(found.x, theirs(field, precision, solver))
    print(f"parity {expected['name']}: largest error {error:.1e}, suggested {expected['suggested_atol']:.0e}")
    assert found.x.dtype == PRECISIONS[precision]
    assert found.evaluations.tolist() == [expected["nfe"]] * 2
    assert error <= expected["suggested_atol"]


def rounding(field: str) -> float:
    """What the two programs differ by where no step is too large: the float32 sinusoids in a float64 network."""
    return difference(reference(field), theirs(field, "f64", "exact" if field == "analytic" else "rk4_fine"))


@pytest.mark.parametrize("field", FIELDS)
def test_the_reference_is_the_solution(field):
    """Against their own fine solutions, and against half as many steps of ours."""
    print(f"parity {field}/f64: solutions differ by {rounding(field):.1e}")
    assert rounding(field) <= 2e-7
    halved = solve(field, "f64", sampling_times(200), solver="rk4").x
    assert difference(reference(field), halved) < 1e-8


@pytest.mark.parametrize("field", FIELDS)
def test_runge_kutta_of_fourth_order(field):
    """Theirs is Kutta's 3/8 rule and ours the classical one: halved steps estimate the error of each.

    Halving the steps of a method of order p leaves 1 / 2^p of its error, so the error is the difference between the
    two solutions times 2^p / (2^p - 1). The 3/8 rule has an error alike, so two methods may differ by twice that.
    """
    grids = [sampling_times(steps) for steps in (10, 20)]
    ours, halved = (solve(field, "f64", grid, solver="rk4").x for grid in grids)
    estimate = difference(ours, halved) * 16 / 15
    expected = theirs(field, "f64", "rk4")
    print(
        f"parity {field}/f64/rk4: rules differ by {difference(ours, expected):.1e}, estimated error {estimate:.1e}, "
        f"ours {difference(ours, reference(field)):.1e}, theirs {difference(expected, reference(field)):.1e}"
    )
    assert 0 < difference(ours, expected) <= 2 * estimate + 2 * rounding(field)
    assert difference(ours, reference(field)) <= 1.1 * estimate
    assert difference(expected, reference(field)) <= 1.5 * estimate + 2 * rounding(field)


@everywhere
def test_adaptive_steps(field, precision):
    """Theirs steps beyond t = 0, evaluates the velocity there, and interpolates; ours ends at 0."""
    found = solve(field, precision, torch.tensor([1.0, 0.0]), solver="dopri5", tolerance=Tolerance(1e-5, 1e-5))
    expected = theirs(field, precision, "dopri5")
    ours, other = (difference(x, reference(field)) for x in (found.x, expected))
    print(
        f"parity {field}/{precision}/dopri5: differ by {difference(found.x, expected):.1e}; from the solution ours "
        f"{ours:.1e}, theirs {other:.1e}; evaluations ours {found.evaluations.tolist()}, theirs "
        f"{case(field, precision, 'dopri5')['nfe']}"
    )
    assert given()[f"outputs/{field}/{precision}/dopri5/t_evals"].min() < 0
    assert difference(found.x, expected) <= 5e-4
    assert ours < other
    assert ours < 1e-4


def test_adaptive_steps_stay_between_noise_and_data():
    seen = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return analytic(x, t)

    integrate(watched, given()["inputs/x1"], torch.tensor([1.0, 0.0]), solver="dopri5")
    assert min(seen) == 0
    assert max(seen) == 1


@everywhere
@pytest.mark.parametrize("solver", ["karras_euler", "karras_heun"])
def test_samplers_of_lfm(field, precision, solver):
    """LFM's own samplers are Euler and Heun on their grid, which is asked for here by its times.

    What ours does not repeat: theirs end at t = 1e-5 and not on the data; their `steps` counts the points of the grid,
    so 11 are 10 steps; their Heun corrects only the first 39 steps, as a default of 40 is never replaced; they draw
    random numbers that are then multiplied by 0; and their step sizes are rounded to float32 in any precision.
    """
    grid = torch.linspace(1, 1e-5, 11)  # float32, whatever the state
    found = solve(field, precision, grid, solver=OURS[solver])
    expected = case(field, precision, solver)
    error = difference(found.x, theirs(field, precision, solver))
    print(f"parity {expected['name']}: largest error {error:.1e}, suggested {expected['suggested_atol']:.0e}")
    assert found.evaluations.tolist() == [expected["nfe"]] * 2
    rounded = (grid.diff().double() - grid.double().diff()).abs().sum().item()
    assert error <= expected["suggested_atol"] + 10 * rounded
    to_data = solve(field, precision, sampling_times(10), solver=OURS[solver])
    assert 1e-6 < difference(to_data.x, found.x) < 1e-3  # the end that they leave out
