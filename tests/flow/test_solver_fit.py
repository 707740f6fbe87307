"""Fitted solvers on data whose flow is known."""

import pytest
import torch

from latentflow.errors import ConfigError
from latentflow.flow.multistep import AdamsBashforth, FittedMultistep
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.flow.solver_fit import MOST_PAST, FitBatch, end_error, fit_multistep, ramped
from latentflow.flow.solvers import expected_evaluations, fitted_evaluations, integrate, is_adaptive
from latentflow.flow.times import sampling_times
from latentflow.shapes import per_image
from tests.exact import GaussianData


def noise(seed, num=32):
    return torch.randn(num, 2, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_batch(path, seed):
    """The end points are exact."""
    gaussian, x = GaussianData(path), noise(seed)
    ends = (torch.full((len(x),), t, dtype=x.dtype) for t in (1.0, 0.0))
    return FitBatch(gaussian.velocity, x, gaussian.flow(x, *ends))


def two_clusters(x, time):
    """The velocity of data at -1 or 1, spread by 0.3, in each element: the flow bends between the two."""
    parts = [GaussianData(LinearPath(), mean, 0.3) for mean in (-1.0, 1.0)]
    variance = per_image((1 - time) ** 2 * 0.3**2 + parts[0].path.sigma(time) ** 2, x)
    distances = [(x - per_image((1 - time) * part.mean, x)) ** 2 / (2 * variance) for part in parts]
    shares = torch.softmax(-torch.stack(distances), 0)
    return (shares * torch.stack([part.velocity(x, time) for part in parts])).sum(0)


def clusters_batch(seed):
    x = noise(seed)
    return FitBatch(two_clusters, x, integrate(two_clusters, x, sampling_times(100), solver="ab4").x)


def rivals(batches, evaluations):
    """The errors of Adams-Bashforth with as many evaluations."""
    pairs = [(f"ab{order}", evaluations - AdamsBashforth(order).extra) for order in (2, 3, 4)]
    assert all(expected_evaluations(name, steps, 1.0) == evaluations for name, steps in pairs)
    return [end_error(batches, name, sampling_times(steps)) for name, steps in pairs]


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=lambda path: path.kind)
@pytest.mark.parametrize("evaluations", [4, 6])
def test_on_a_gaussian_the_fit_is_exact(path, evaluations):
    """Its flow is affine in x, and two numbers fit that; Adams-Bashforth with as many evaluations is far off."""
    fit = fit_multistep([gaussian_batch(path, 0)], evaluations)
    held_out = [gaussian_batch(path, 1)]
    assert end_error(held_out, fit.solver) < 1e-8 < 1e-4 < min(rivals(held_out, evaluations))


@pytest.mark.parametrize("evaluations", [4, 6, 8])
def test_beats_adams_bashforth_where_the_flow_bends(evaluations):
    fit = fit_multistep([clusters_batch(0)], evaluations)
    held_out = [clusters_batch(1)]
    assert fit.error < fit.started / 2
    assert end_error(held_out, fit.solver) < min(rivals(held_out, evaluations)) / 2


def test_more_evaluations_end_nearer():
    errors = [end_error([clusters_batch(1)], fit_multistep([clusters_batch(0)], n).solver) for n in (4, 10)]
    assert errors[1] < errors[0] / 4


def test_what_is_fitted_is_a_consistent_method():
    """Its times fall from 1 to 0, each step's weights have the sum 1, and a constant velocity is integrated exactly."""
    solver = fit_multistep([clusters_batch(0)], 6).solver
    times = torch.tensor(solver.times, dtype=torch.float64)
    assert (times[0], times[-1]) == (1, 0) and (times.diff() < 0).all()
    assert [len(row) for row in solver.weights] == [min(step + 1, MOST_PAST) for step in range(6)]
    assert [sum(row) for row in solver.weights] == pytest.approx([1.0] * 6)
    end = integrate(lambda x, t: torch.full_like(x, 0.3), noise(2), times, solver=solver)
    torch.testing.assert_close(end.x, noise(2) - 0.3, rtol=0, atol=1e-12)
    assert end.evaluations.tolist() == [6] * 32


def test_batches_are_joined():
    whole, halves = clusters_batch(0), []
    for rows in (slice(0, 16), slice(16, 32)):
        halves.append(FitBatch(two_clusters, whole.noise[rows], whole.ends[rows]))
    one, two = fit_multistep([whole], 3), fit_multistep(halves, 3)
    assert one.error == pytest.approx(two.error, rel=1e-6)
    assert one.solver.times == pytest.approx(two.solver.times, rel=1e-4)


def test_rounds_never_raise_the_error():
    seen = []
    fit = fit_multistep([clusters_batch(0)], 4, on_round=lambda number, error: seen.append((number, error)))
    assert [number for number, _ in seen] == list(range(1, fit.rounds + 1))
    errors = [fit.started, *(error for _, error in seen)]
    assert errors == sorted(errors, reverse=True) and errors[-1] == fit.error


def test_a_constant_velocity_leaves_nothing_to_fit():
    """No weight changes anything; a network whose last layer is zero has such a velocity."""
    batch = FitBatch(lambda x, time: torch.zeros_like(x), noise(0), noise(0))
    fit = fit_multistep([batch], 4)
    assert fit.error == fit.started == 0
    for row, start in zip(fit.solver.weights, ramped(fit.solver.times, 2).weights, strict=True):
        assert row == pytest.approx((*start, *[0.0] * (len(row) - len(start))))


def test_ramped_is_adams_bashforth_after_its_first_steps():
    times = sampling_times(5, 2.0).tolist()
    solver = ramped(times, 3)
    assert solver.weights[0] == pytest.approx([1.0])
    assert solver.weights[1] == pytest.approx(AdamsBashforth(2).weights(times[:3]))
    assert solver.weights[4] == pytest.approx(AdamsBashforth(3).weights(times[2:]))


def test_other_times_are_refused():
    solver = FittedMultistep((1.0, 0.4, 0.0), ((1.0,), (1.5, -0.5)))
    with pytest.raises(ConfigError, match="its own times"):
        integrate(two_clusters, noise(0), sampling_times(2), solver=solver)


@pytest.mark.parametrize(
    ("name", "evaluations"), [("fitted-8", 8), ("fitted-12@0123abcd", 12), ("fitted-", None), ("heun", None)]
)
def test_names(name, evaluations):
    assert fitted_evaluations(name) == evaluations


def test_a_fitted_solver_takes_its_own_number_of_evaluations():
    assert expected_evaluations("fitted-8@0123abcd", 25, 1e-5) == 8
    assert not is_adaptive("fitted-8")
