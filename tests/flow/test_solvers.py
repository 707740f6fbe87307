"""Solvers against the exact flow of a Gaussian, against torchdiffeq, and image by image."""

from pathlib import Path as File

import pytest
import torch
import torchdiffeq
from safetensors.torch import load_file

from latentflow.errors import ConfigError, NonFiniteError
from latentflow.flow.composition import BlendedVelocity, KnownRegionVelocity
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.multistep import quadrature
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.flow.solvers import SOLVERS, AdamsBashforth, Tolerance, integrate, is_adaptive
from latentflow.flow.times import sampling_times
from latentflow.shapes import Condition
from tests.dispatch import watched
from tests.exact import GaussianData

# On the straight path Gaussian data lets midpoint look third order, by a cancellation; the cosine path is honest.
GAUSSIAN = GaussianData(CosinePath())
ENDS = sampling_times(1)
PATH = GAUSSIAN.path
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 2, "ab3": 3, "ab4": 4}
DATA_ORDERS = {"dpmpp2m": 2, "dpmpp3m": 3, "unipc2": 3, "unipc3": 4}
"""Between two times inside (0, 1), after accurate first steps."""
FIXED = [*ORDERS, *DATA_ORDERS]
ADAPTIVE = ["bosh3", "dopri5"]
FIXTURE = File(__file__).parent / "fixtures" / "solvers.safetensors"
"""End states of torchdiffeq (dopri5) and of the samplers of LFM (euler, midpoint, heun2) for the field `wavy`."""


def start(batch=2, dtype=torch.float64):
    return torch.randn(batch, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)


def exact_end(x, begin=1.0, end=0.0):
    begin, end = (torch.full((len(x),), t, dtype=x.dtype) for t in (begin, end))
    return GAUSSIAN.flow(x, begin, end)


def wavy(x, time):
    """A nonlinear field, elementwise; the `analytic` field of the parity fixtures."""
    t = time.to(x.dtype)[:, None, None, None]
    return -0.7 * x + torch.sin(4 * t + x) + 0.5 * x * torch.cos(2 * t)


class Waves:
    """Per image one frequency: an easy and a hard image in one batch. Records whom it was asked about, and when."""

    def __init__(self, frequency, log=None, rows=None, rounding=0.0):
        self.frequency, self.rounding = frequency, rounding
        self.rows = torch.arange(len(frequency)) if rows is None else rows
        self.log = [] if log is None else log

    def __call__(self, x, time):
        self.log.append((self.rows.tolist(), time.tolist()))
        t, frequency = (values.to(x.dtype)[:, None, None, None] for values in (time, self.frequency))
        v = frequency * torch.cos(frequency * t) * torch.sin(x + frequency * t) - 0.5 * x
        return v * (1 + self.rounding * torch.randn_like(v))

    def times_of(self, image):
        return [t for rows, times in self.log for row, t in zip(rows, times, strict=True) if row == image]


class SelectableWaves(Waves):
    def select(self, rows):
        return SelectableWaves(self.frequency[rows], self.log, self.rows[rows], self.rounding)


FREQUENCIES = torch.tensor([1.0, 12.0, 3.0, 0.2], dtype=torch.float64)


# ---- fixed steps


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver, shift):
    x = start()
    counts = torch.tensor([160, 320, 640])
    errors = []
    for steps in counts.tolist():
        solution = integrate(GAUSSIAN.velocity, x, sampling_times(steps, shift), solver=solver)
        errors.append((solution.x - exact_end(x)).square().mean().sqrt())
    slope = torch.stack(errors).log().diff() / counts.log().diff()
    assert slope.mean().item() == pytest.approx(-ORDERS[solver], abs=0.15)


@pytest.mark.parametrize(
    ("solver", "evaluations"),
    [("euler", 5), ("midpoint", 10), ("heun", 10), ("rk4", 20), ("ab2", 6), ("ab3", 7), ("ab4", 7)]
    + [(solver, 5) for solver in DATA_ORDERS],
)
def test_evaluations_of_five_steps(solver, evaluations):
    velocity = Waves(FREQUENCIES)
    solution = integrate(velocity, start(4), sampling_times(5), solver=solver, path=PATH)
    assert solution.evaluations.tolist() == [evaluations] * 4
    assert solution.evaluations.dtype == torch.int64
    assert len(velocity.log) == evaluations
    assert solution.steps.tolist() == [5] * 4
    assert solution.rejected.tolist() == [0] * 4


@pytest.mark.parametrize("solver", FIXED)
def test_one_step(solver):
    solution = integrate(lambda x, t: torch.ones_like(x), start(), ENDS, solver=solver, path=LinearPath())
    torch.testing.assert_close(solution.x, start() - 1)


def test_adams_bashforth_weights_on_an_even_grid():
    assert AdamsBashforth(2).weights([0.9, 0.8, 0.7]) == pytest.approx([3 / 2, -1 / 2])
    assert AdamsBashforth(3).weights([1.0, 0.9, 0.8, 0.7]) == pytest.approx([23 / 12, -16 / 12, 5 / 12])


def test_adams_bashforth_weights_integrate_polynomials_on_any_grid():
    times = torch.tensor([0.9, 0.7, 0.65, 0.3], dtype=torch.float64)
    weights = torch.tensor(AdamsBashforth(3).weights(times.tolist()), dtype=torch.float64)
    for degree in range(3):
        integral = (times[3] ** (degree + 1) - times[2] ** (degree + 1)) / (degree + 1)
        torch.testing.assert_close((times[3] - times[2]) * (weights * times[:3].flip(0) ** degree).sum(), integral)


def test_the_second_step_of_ab4_is_simpsons_rule_on_an_even_grid():
    assert quadrature([0.8, 0.9, 1.0], 1.0, 0.8) == pytest.approx([1 / 6, 4 / 6, 1 / 6])


def errors_inside(solver, path, counts, first=0.9, last=0.1):
    """Root mean square errors of even steps between two times inside (0, 1), after three that are much shorter."""
    gaussian, x = GaussianData(path), start()
    exact = gaussian.flow(x, *(torch.full((len(x),), t, dtype=x.dtype) for t in (first, last)))
    errors = []
    for steps in counts:
        short = ((first - last) / steps) ** 2
        begun = first - short * torch.arange(3, dtype=torch.float64)
        grid = torch.cat([begun, sampling_times(steps, start=first - 3 * short, end=last)])
        solution = integrate(gaussian.velocity, x, grid, solver=solver, path=path)
        errors.append((solution.x - exact).square().mean().sqrt())
    return torch.stack(errors)


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=lambda path: path.kind)
@pytest.mark.parametrize("solver", DATA_ORDERS)
def test_order_in_the_predicted_data(solver, path):
    counts = torch.tensor([320, 640, 1280])
    slope = errors_inside(solver, path, counts.tolist()).log().diff() / counts.log().diff()
    assert slope.mean().item() == pytest.approx(-DATA_ORDERS[solver], abs=0.15)


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=lambda path: path.kind)
@pytest.mark.parametrize("solver", DATA_ORDERS)
def test_predicted_data_is_of_order_two_from_noise_to_data(solver, path):
    """Up to a logarithm: log(alpha / sigma) runs over all numbers."""
    gaussian, x, counts = GaussianData(path), start(), torch.tensor([160, 320, 640])
    ends = (torch.full((len(x),), t, dtype=x.dtype) for t in (1.0, 0.0))
    exact = gaussian.flow(x, *ends)
    solutions = [
        integrate(gaussian.velocity, x, sampling_times(steps), solver=solver, path=path) for steps in counts.tolist()
    ]
    errors = torch.stack([(solution.x - exact).square().mean().sqrt() for solution in solutions])
    slope = errors.log().diff() / counts.log().diff()
    assert -2.1 < slope.mean().item() < -1.6


def test_dpm_solver_2m_step_by_hand():
    """arXiv 2211.01095, Algorithm 2: D = (1 + 1 / 2r) D_1 - 1 / 2r D_0, x_2 = s_2 / s_1 x_1 - a_2 (e^{-h} - 1) D."""
    x, grid = start(), torch.tensor([0.8, 0.6, 0.3], dtype=torch.float64)
    alpha, sigma = PATH.alpha(grid), PATH.sigma(grid)
    lam = (alpha / sigma).log()
    times = [torch.full((len(x),), t, dtype=x.dtype) for t in grid.tolist()]
    d0 = GAUSSIAN.expected_data(x, times[0])
    x1 = sigma[1] / sigma[0] * x - alpha[1] * torch.expm1(lam[0] - lam[1]) * d0
    d1 = GAUSSIAN.expected_data(x1, times[1])
    r = (lam[1] - lam[0]) / (lam[2] - lam[1])
    d = (1 + 1 / (2 * r)) * d1 - 1 / (2 * r) * d0
    x2 = sigma[2] / sigma[1] * x1 - alpha[2] * torch.expm1(lam[1] - lam[2]) * d
    solution = integrate(GAUSSIAN.velocity, x, grid, solver="dpmpp2m", path=PATH)
    torch.testing.assert_close(solution.x, x2, rtol=0, atol=1e-13)


def test_unipc_corrects_with_the_next_call():
    """arXiv 2302.04867: the second step starts from x_1 corrected by UniC-1, D_1 stays that of the predicted x_1."""
    x, grid = start(), torch.tensor([0.8, 0.6, 0.3], dtype=torch.float64)
    alpha, sigma = PATH.alpha(grid), PATH.sigma(grid)
    lam = (alpha / sigma).log()
    times = [torch.full((len(x),), t, dtype=x.dtype) for t in grid.tolist()]
    d0 = GAUSSIAN.expected_data(x, times[0])
    gain = -alpha[1] * torch.expm1(lam[0] - lam[1])
    d1 = GAUSSIAN.expected_data(sigma[1] / sigma[0] * x + gain * d0, times[1])
    x1 = sigma[1] / sigma[0] * x + gain * (d0 + (d1 - d0) / 2)
    r = (lam[1] - lam[0]) / (lam[2] - lam[1])
    d = (1 + 1 / (2 * r)) * d1 - 1 / (2 * r) * d0
    x2 = sigma[2] / sigma[1] * x1 - alpha[2] * torch.expm1(lam[1] - lam[2]) * d
    solution = integrate(GAUSSIAN.velocity, x, grid, solver="unipc2", path=PATH)
    torch.testing.assert_close(solution.x, x2, rtol=0, atol=1e-13)


@pytest.mark.parametrize("solver", DATA_ORDERS)
def test_data_that_does_not_change_is_reached_in_any_steps(solver):
    """One image as the whole data set: D is that image everywhere, so every step is exact."""
    point = GaussianData(LinearPath(sigma_min=0), mean=0.7, std=0)
    solution = integrate(point.velocity, start(), sampling_times(4), solver=solver, path=point.path)
    torch.testing.assert_close(solution.x, torch.full_like(solution.x, 0.7), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("solver", "method"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2")])
def test_fixed_steps_as_in_torchdiffeq(solver, method):
    x, times = start(), sampling_times(10, shift=2.0)
    reference = torchdiffeq.odeint(lambda t, x: wavy(x, t.expand(len(x))), x, times, method=method)[-1]
    torch.testing.assert_close(integrate(wavy, x, times, solver=solver).x, reference, rtol=0, atol=1e-13)


def test_rk4_is_the_classic_one():
    """By hand on dx/dt = -x: one step multiplies by 1 - h + h^2/2 - h^3/6 + h^4/24; at t^4 it is Simpson's rule."""
    x, times = start(), torch.tensor([0.0, 0.5], dtype=torch.float64)
    gain = 1 - 0.5 + 0.5**2 / 2 - 0.5**3 / 6 + 0.5**4 / 24
    torch.testing.assert_close(integrate(lambda x, t: -x, x, times, solver="rk4").x, gain * x)
    simpson = 0.5 * (4 * 0.25**4 + 0.5**4) / 6
    power = integrate(lambda x, t: (t**4)[:, None, None, None].expand_as(x), x, times, solver="rk4")
    torch.testing.assert_close(power.x, x + simpson)


def test_callback_after_each_fixed_step():
    seen = []
    integrate(lambda x, t: torch.ones_like(x), start(), sampling_times(2), callback=lambda *step: seen.append(step))
    assert [(step, time) for step, time, _ in seen] == [(1, 0.5), (2, 0.0)]
    torch.testing.assert_close(seen[0][2], start() - 0.5)


@pytest.mark.parametrize(("solver", "name"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2")])
@pytest.mark.parametrize(("dtype", "atol"), [("f32", 2e-6), ("f64", 1e-12)])
def test_fixed_steps_of_the_parity_fixtures(solver, name, dtype, atol):
    fixture = load_file(FIXTURE)
    expected = fixture[f"outputs/analytic/{dtype}/{name}"]
    solution = integrate(wavy, fixture["inputs/x1"].to(expected.dtype), sampling_times(10), solver=solver)
    torch.testing.assert_close(solution.x, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("composed", ["guided", "blended", "known region"])
@pytest.mark.parametrize("guidance", [(1.0, (0.0, 1.0)), (2.0, (0.0, 1.0)), (2.0, (0.2, 0.6)), (0.0, (0.2, 0.6))])
@pytest.mark.parametrize("solver", FIXED)
def test_fixed_steps_never_wait_for_the_device(solver, guidance, composed):
    """On a device from which no number can be read, and to which none is sent but as an argument."""

    def network(latents, time, condition):
        return latents * condition.labels[:, None, None, None] + time[:, None, None, None]

    x = torch.empty(3, 4, 2, 2, device="meta")
    conditions, null = (Condition(labels=torch.empty(3, dtype=torch.int64, device="meta")) for _ in range(2))
    velocity = ConditionedVelocity(network, conditions, null, *guidance)
    if composed == "blended":
        velocity = BlendedVelocity(velocity, ConditionedVelocity(network, conditions), x[:, 0, 0, 0])
    if composed == "known region":
        velocity = KnownRegionVelocity(velocity, CosinePath(), x, x, x[:, :1])
    with watched() as waits:
        solution = integrate(velocity, x, sampling_times(5), solver=solver, path=PATH)
    assert waits == []
    assert solution.x.shape == x.shape
    assert velocity.evaluations.min() >= solution.evaluations.min() > 0


# ---- adaptive steps


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_an_adaptive_step_waits_once(solver, monkeypatch):
    """For its error, whatever the guidance: all that is asked of the device comes back in one piece."""
    reads, fetch = [], torch.Tensor.cpu
    null = Condition(labels=torch.zeros(4, dtype=torch.int64))
    velocity = ConditionedVelocity(lambda x, t, conditions: wavy(x, t), null, null, 2.0, (0.2, 0.6))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: reads.append(tensor.dim()) or fetch(tensor))
    solution = integrate(velocity, start(4, torch.float32), ENDS, solver=solver, tolerance=Tolerance(1e-3, 1e-3))
    assert reads.count(2) == 2 + (solution.steps + solution.rejected).max()  # two for the size of the first step
    assert reads.count(1) == len((solution.steps + solution.rejected).unique()) - 1  # rows that stay as others arrive


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_error_falls_with_the_tolerance(solver):
    x = start()
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        solution = integrate(GAUSSIAN.velocity, x, ENDS, solver=solver, tolerance=Tolerance(tolerance, tolerance))
        assert (solution.x - exact_end(x)).abs().max() < 10 * tolerance


@pytest.mark.parametrize(("solver", "stages"), [("bosh3", 3), ("dopri5", 6)])
def test_counts_and_exact_times_of_adaptive_steps(solver, stages):
    velocity = SelectableWaves(FREQUENCIES)
    solution = integrate(velocity, start(4), ENDS, solver=solver)
    for image in range(4):
        times = velocity.times_of(image)
        assert len(times) == solution.evaluations[image]
        assert times[-1] == 0.0  # the last stage stands exactly at the end, and none beyond
        assert min(times) == 0.0
        assert max(times) == 1.0
    assert torch.equal(solution.evaluations, 2 + stages * (solution.steps + solution.rejected))
    assert solution.rejected.sum() > 0


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_adaptive_as_in_torchdiffeq(solver, tolerance):
    """One image, float64, the same controller. Two differences: torchdiffeq steps past the end and interpolates
    back, with an error that may exceed the tolerance; and our steps lie on a lattice, each up to 9 % smaller."""
    calls = []

    def counted(t, x):
        calls.append(t)
        return wavy(x, t.expand(len(x)))

    x = start(1)
    times = torch.tensor([1.0, 0.0], dtype=torch.float64)
    reference = torchdiffeq.odeint(counted, x, times, method=solver, rtol=tolerance, atol=tolerance)[-1]
    exact = torchdiffeq.odeint(counted, x, times, method="dopri8", rtol=1e-12, atol=1e-12)[-1]
    nfe = next(i for i, t in enumerate(calls) if i > 0 and t == 1.0)  # where the second solve begins
    solution = integrate(wavy, x, times, solver=solver, tolerance=Tolerance(tolerance, tolerance))
    assert (solution.x - exact).abs().max() < 10 * tolerance
    assert (solution.x - exact).abs().max() < (reference - exact).abs().max()
    assert nfe <= solution.evaluations.item() <= 1.15 * nfe + 6


def test_dopri5_on_the_parity_fixture():
    fixture = load_file(FIXTURE)
    x, exact = fixture["inputs/x1"].double(), fixture["outputs/analytic/f64/exact"]
    solution = integrate(wavy, x, ENDS, solver="dopri5")
    assert (solution.x - exact).abs().max() < 5e-5
    torch.testing.assert_close(solution.x, fixture["outputs/analytic/f64/dopri5"], rtol=0, atol=5e-4)
    reference = len(fixture["outputs/analytic/f64/dopri5/t_evals"])
    assert all(reference <= count <= reference + 6 for count in solution.evaluations.tolist())


@pytest.mark.parametrize("kind", [Waves, SelectableWaves])
@pytest.mark.parametrize("solver", [*FIXED, *ADAPTIVE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_is_the_same_in_any_batch(solver, kind, dtype):
    x = start(4, dtype)
    together = integrate(kind(FREQUENCIES), x, sampling_times(8), solver=solver, path=PATH)
    assert together.x.dtype == dtype
    for rows in ([0], [1], [2], [3], [1, 3], [2, 0, 1]):
        alone = integrate(kind(FREQUENCIES[rows]), x[rows], sampling_times(8), solver=solver, path=PATH)
        assert torch.equal(alone.x, together.x[rows])
        assert torch.equal(alone.evaluations, together.evaluations[rows])
        assert torch.equal(alone.steps, together.steps[rows])
    if is_adaptive(solver):
        assert len(set(together.steps.tolist())) > 1


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_rounding_noise_does_not_change_the_steps(solver):
    """A network's matrix products differ by rounding from one batch shape to the next."""
    torch.manual_seed(0)
    frequencies = torch.linspace(0.5, 6, 32, dtype=torch.float64)
    runs = [SelectableWaves(frequencies, rounding=1e-7) for _ in range(2)]
    ends = [integrate(run, start(32, torch.float32), ENDS, solver=solver).x for run in runs]
    assert not torch.equal(*ends)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)
    for image in range(32):
        assert runs[0].times_of(image) == runs[1].times_of(image)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_coarse_rounding_that_is_known_changes_few_steps(solver):
    """As of a network in bf16. Most images keep their steps, which are smaller for it; of all that cannot be said."""
    torch.manual_seed(0)
    frequencies = torch.linspace(0.5, 6, 32, dtype=torch.float64)
    same, calls = {}, {}
    for rounding in (2**-7, None):
        runs = [SelectableWaves(frequencies, rounding=2**-9) for _ in range(2)]
        options = {"solver": solver, "tolerance": Tolerance(1e-3, 1e-3, rounding)}
        ends = [integrate(run, start(32, torch.float32), ENDS, **options) for run in runs]
        same[rounding] = sum(runs[0].times_of(image) == runs[1].times_of(image) for image in range(32))
        calls[rounding] = ends[0].evaluations.sum()
    assert same[2**-7] >= 24 > same[None]
    assert calls[None] < calls[2**-7] < 4 * calls[None]


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_arrived_images_leave_a_velocity_that_can_be_narrowed(solver):
    velocity = SelectableWaves(FREQUENCIES)
    solution = integrate(velocity, start(4), ENDS, solver=solver)
    asked = torch.zeros(4, dtype=torch.int64)
    for rows, _ in velocity.log:
        asked[rows] += 1
    assert torch.equal(asked, solution.evaluations)
    assert velocity.log[-1][0] == [solution.evaluations.argmax().item()]


def test_velocity_without_select_always_gets_its_whole_batch():
    velocity = Waves(FREQUENCIES)
    solution = integrate(velocity, start(4), ENDS, solver="dopri5")
    assert all(rows == [0, 1, 2, 3] for rows, _ in velocity.log)
    assert len(velocity.log) == solution.evaluations.max()


def test_guided_velocity_counts_network_calls_of_each_image():
    labels = torch.tensor([1, 6, 2])

    def network(latents, time, condition):
        label = condition.labels[:, None, None, None]
        return torch.cos(label * (latents + time[:, None, None, None]))

    null = Condition(labels=torch.zeros_like(labels))
    velocity = ConditionedVelocity(network, Condition(labels=labels), null, scale=2.0)
    solution = integrate(velocity, start(3), ENDS, solver="bosh3")
    assert len(set(solution.evaluations.tolist())) > 1
    assert torch.equal(velocity.evaluations, 2 * solution.evaluations)


# ---- both


@pytest.mark.parametrize("solver", SOLVERS)
def test_there_and_back(solver):
    x, atol = start(), {"euler": 1e-2, "dpmpp3m": 3e-4}.get(solver, 2e-4)
    options = {"tolerance": Tolerance(1e-8, 1e-8), "path": PATH}
    data = integrate(GAUSSIAN.velocity, x, sampling_times(500), solver=solver, **options)
    torch.testing.assert_close(data.x, exact_end(x), rtol=0, atol=atol)
    noise = integrate(GAUSSIAN.velocity, data.x, sampling_times(500, start=0, end=1), solver=solver, **options)
    torch.testing.assert_close(noise.x, x, rtol=0, atol=2 * atol)


@pytest.mark.parametrize("solver", SOLVERS)
def test_part_of_the_way(solver):
    x = start()
    solution = integrate(GAUSSIAN.velocity, x, sampling_times(400, start=0.7, end=0.2), solver=solver, path=PATH)
    torch.testing.assert_close(solution.x, exact_end(x, 0.7, 0.2), rtol=0, atol=5e-3 if solver == "euler" else 2e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_velocity_gets_float64_times_and_may_answer_in_bfloat16(solver):
    dtypes = set()

    def velocity(x, time):
        dtypes.add((x.dtype, time.dtype, time.shape))
        return torch.ones_like(x, dtype=torch.bfloat16)

    solution = integrate(velocity, start(dtype=torch.float32), sampling_times(4), solver=solver, path=LinearPath())
    assert dtypes == {(torch.float32, torch.float64, torch.Size([2]))}
    torch.testing.assert_close(solution.x, start(dtype=torch.float32) - 1)


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_gradient_flows_through_the_solution(solver):
    """The exact flow is affine in its start, with slope S(0) / S(1) = std."""
    x = start().requires_grad_()
    integrate(GAUSSIAN.velocity, x, sampling_times(100), solver=solver).x.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, GAUSSIAN.std), rtol=0, atol=1e-4)


# ---- refusals


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_non_finite_velocity_is_an_error_with_its_time(solver):
    def velocity(x, time):
        return torch.where(time < 0.5, float("nan"), 1.0).to(x)[:, None, None, None].expand_as(x)

    with pytest.raises(NonFiniteError, match=r"t = 0\.[5-9]"):
        integrate(velocity, start(), ENDS, solver=solver)
    with pytest.raises(NonFiniteError, match="t = 1"):
        integrate(lambda x, t: x * float("nan"), start(), ENDS, solver=solver)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_singularity_is_an_error_with_its_time(solver):
    """dx/dt = -x^2 downwards from x(1) = 2: x = 1 / (t - 0.5), infinite at t = 0.5."""
    x = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"t = 0\.(5|4999)"):
        integrate(lambda x, t: -(x**2), x, ENDS, solver=solver)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "huen"}, "did you mean 'heun'"),
        ({"times": torch.tensor([1.0])}, "at least two"),
        ({"times": torch.tensor([1.0, 0.5, 0.7])}, "falling or rising"),
        ({"times": torch.tensor([1.0, float("nan")])}, "falling or rising"),
        ({"solver": "bosh3", "callback": print}, "fixed-step"),
        ({"solver": "unipc2"}, "give the path"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        integrate(wavy, start(), **({"times": ENDS} | options))


@pytest.mark.parametrize(("values", "message"), [({"atol": 0.0}, "atol 0.0"), ({"rtol": -1.0}, "rtol -1.0")])
def test_tolerances_that_no_step_could_meet(values, message):
    with pytest.raises(ConfigError, match=message):
        Tolerance(**values)
