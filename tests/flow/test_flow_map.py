"""The objective of a student, against closed forms, and jumps of average velocities that are known."""

import pytest
import torch
from torch import Tensor, nn

from latentflow.errors import ConfigError
from latentflow.flow.composition import BlendedVelocity, KnownRegionVelocity
from latentflow.flow.flow_map import LEAST_STEP, JumpTimes, average_loss, average_target
from latentflow.flow.guidance import AverageVelocity
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.flow.solvers import JUMPS, expected_evaluations, integrate, is_adaptive
from latentflow.flow.times import sampling_times
from latentflow.shapes import Condition, per_image
from tests.exact import GaussianData

GAUSSIAN = GaussianData(LinearPath(sigma_min=0))


def exact_average(x: Tensor, time: Tensor, end: Tensor, gaussian: GaussianData = GAUSSIAN) -> Tensor:
    """(x_s - x_t) / (s - t) of the exact flow; the velocity where s = t."""
    same = end == time
    mean = (gaussian.flow(x, time, end) - x) / per_image(torch.where(same, 1, end - time), x)
    return torch.where(per_image(same, x).bool(), gaussian.velocity(x, time), mean)


def points(number: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points x_t, times t, and ends s below them."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(2, number, generator=generator, dtype=torch.float64)
    time = 0.1 + 0.9 * uniform[0]
    data = 1.5 + 0.4 * torch.randn(number, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(number, 4, generator=generator, dtype=torch.float64)
    return GAUSSIAN.path.interpolate(data, noise, time), time, time * uniform[1]


def test_whole_share_is_flow_matching():
    x, time, end = points(8)
    velocity, predicted = GAUSSIAN.velocity(x, time), torch.randn_like(x).requires_grad_()
    target = average_target(lambda *_: torch.full_like(x, 7.0), velocity, x, time, end, torch.ones(8))
    assert torch.equal(target, velocity)
    loss, error = average_loss(predicted, target, torch.ones(8))
    square = (predicted.detach() - velocity).square().mean(1)
    torch.testing.assert_close(error, square)
    torch.testing.assert_close(loss.detach(), square / (square + 0.01))
    loss.sum().backward()  # of flow matching, apart from the weight of each image
    wanted = 2 * (predicted.detach() - velocity) / 4 / (square + 0.01)[:, None]
    torch.testing.assert_close(predicted.grad, wanted)


def test_loss_by_hand():
    # u - u* = (3, 1), a = 0.5: mean square 5, divided by a 10; e = 5 / 0.25 = 20, w = 1 / 20.01
    loss, error = average_loss(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2), torch.tensor([0.5]))
    assert error.tolist() == [20.0]
    assert loss.item() == pytest.approx(10 / 20.01)


def test_float32_whatever_the_student_returns():
    loss, error = average_loss(torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3), torch.ones(2))
    assert (loss.dtype, error.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.01])
def test_straight_trajectories_are_a_fixed_point_of_any_share(share):
    """All data at one point: the velocity (x - data) / t is constant along a trajectory, and so its own average."""
    x, time, end = points(8)

    def straight(x: Tensor, time: Tensor, end: Tensor) -> Tensor:
        return (x - 2.0) / per_image(time, x)

    velocity = straight(x, time, time)
    target = average_target(straight, velocity, x, time, end, torch.full((8,), share, dtype=torch.float64))
    torch.testing.assert_close(target, velocity, rtol=1e-12, atol=1e-12)


def test_error_of_the_exact_map_falls_with_the_square_of_the_share():
    """u* differs from u in that v at t takes the place of u over a part a of the way: by O(a) there, O(a^2) in all."""
    x, time, end = points(256)
    exact, velocity, errors = exact_average(x, time, end), GAUSSIAN.velocity(x, time), []
    for share in (0.08, 0.04, 0.02, 0.01):
        given = torch.full((256,), share, dtype=torch.float64)
        target = average_target(exact_average, velocity, x, time, end, given)
        errors.append((target - exact).square().mean().sqrt().log2())
    slopes = torch.stack(errors).diff()
    assert slopes.tolist() == pytest.approx([-2.0] * 3, abs=0.1)


class Linear(nn.Module):
    """u(x, t, s) = A(t, s) + B(t, s) x, of which the exact map is one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(2, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2)
        self.coefficients = nn.Sequential(*layers)

    def forward(self, x: Tensor, time: Tensor, end: Tensor) -> Tensor:
        shift, slope = self.coefficients(torch.stack([time, time - end], 1)).chunk(2, 1)
        return shift + slope * x


def learnt(share: float, steps: int = 600) -> float:
    """The mean error of one jump from noise to data, relative to the spread of the data, learnt with one share."""
    student, generator = Linear(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(student.parameters(), lr=4e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        uniform = torch.rand(3, 256, generator=generator)
        time = uniform[0].clamp(min=0.01)
        end = torch.where(uniform[2] < 0.5, time, time * uniform[1])
        data, noise = 1.5 + 0.4 * torch.randn(256, 4, generator=generator), torch.randn(256, 4, generator=generator)
        x = GAUSSIAN.path.interpolate(data, noise, time)
        shares = torch.where(end < time, share, 1.0)
        target = average_target(student, GAUSSIAN.velocity(x, time), x, time, end, shares)
        loss, _ = average_loss(student(x, time, end), target, shares)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        falling.step()
    noise, whole = torch.randn(1000, 4, generator=generator), torch.ones(1000)
    with torch.no_grad():
        drawn = noise - student(noise, whole, 0 * whole)
    return ((drawn - GAUSSIAN.flow(noise, whole, 0 * whole)).square().mean().sqrt() / GAUSSIAN.std).item()


def test_the_map_of_gaussian_data_is_learnt_the_better_the_smaller_the_share():
    coarse, fine = learnt(0.8), learnt(0.2)
    assert coarse > 2 * fine
    assert fine < 0.2


def test_times_of_jumps():
    uniform = torch.rand(2, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jumps = torch.arange(4000) % 4 == 3
    time, end = JumpTimes().draw(*uniform, jumps)
    assert time.dtype == end.dtype == torch.float32
    assert torch.equal(time[~jumps], end[~jumps])
    assert (end >= 0).all() and (time <= 1).all()
    assert ((time - end)[jumps] >= 0.9 * LEAST_STEP).all()
    assert time[~jumps].logit().mean().item() == pytest.approx(-0.2, abs=0.06)
    # all pairs of times are equally likely, so that jumps from noise to data are learned, too
    shares = torch.tensor([0.1, 0.5, 0.9])
    assert time[jumps].square().quantile(shares).tolist() == pytest.approx(shares.tolist(), abs=0.05)
    assert (end / time)[jumps].quantile(shares).tolist() == pytest.approx(shares.tolist(), abs=0.05)
    assert ((time > 0.9) & (end < 0.1))[jumps].float().mean().item() == pytest.approx(0.02, abs=0.01)


def test_share_falls_exponentially():
    times = JumpTimes()
    found = times.share_at(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.1, (0.1 * 0.02) ** 0.5, 0.02])
    time, end = torch.tensor([0.5, 0.5, 0.001]), torch.tensor([0.5, 0.1, 0.0])
    shares = times.shares(torch.ones(3, dtype=torch.float64), time, end)
    assert shares.tolist() == pytest.approx([1.0, 0.02, 0.1])  # of the third, 1e-4 of 1e-3


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"first_share": 0.01, "last_share": 0.02}, "last_share = 0.02"),
        ({"end": {"stratified": True}}, "end.stratified"),
    ],
)
def test_refused(values, named):
    with pytest.raises(ConfigError, match=named):
        JumpTimes(**values)


def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """The exact average velocity, as a network of float32 times; the label shifts the mean of the data."""
    gaussian = GaussianData(GAUSSIAN.path, mean=1.5 + float(condition.labels[0]))
    return exact_average(x, time.double(), (time - condition.span).double(), gaussian)


def average(label: int, number: int = 3) -> AverageVelocity:
    return AverageVelocity(network, Condition(labels=torch.full((number,), label)))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_jumps_are_exact_in_any_number(steps):
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    velocity, ones = average(0), torch.ones(3)
    solution = integrate(velocity, x, sampling_times(steps, shift=1.7), solver=JUMPS)
    torch.testing.assert_close(solution.x, GAUSSIAN.flow(x, ones, 0 * ones), rtol=1e-5, atol=1e-5)
    assert velocity.evaluations.tolist() == solution.evaluations.tolist() == [steps] * 3
    assert (is_adaptive(JUMPS), expected_evaluations(JUMPS, steps, 1e-5)) == (False, steps)


def test_other_solvers_ask_for_the_velocity_itself():
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for solver in ("heun", "dopri5"):
        times, plain = sampling_times(6), lambda x, t: GAUSSIAN.velocity(x, t.float().double())
        found, wanted = (integrate(v, x, times, solver=solver).x for v in (average(0), plain))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=str)
def test_jumps_keep_the_known_region_on_its_path(path):
    data, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hole = torch.zeros(3, 1, 4, 4)
    hole[..., :2] = 1
    seen = []
    velocity = KnownRegionVelocity(average(0), path, data, noise, hole)
    x = path.interpolate(data, noise, torch.ones(3, dtype=torch.float64))
    integrate(velocity, x, sampling_times(3), solver=JUMPS, callback=lambda step, t, x: seen.append((t, x)))
    for t, state in seen:
        wanted = path.interpolate(data, noise, torch.full((3,), t, dtype=torch.float64))
        torch.testing.assert_close(state[..., 2:], wanted[..., 2:], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(state[..., :2], wanted[..., :2])


def test_blends_of_average_velocities():
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blended = BlendedVelocity(average(0), average(1), torch.tensor([0.0, 0.5, 1.0]))
    drawn = integrate(blended, x, sampling_times(1), solver=JUMPS).x
    ends = [integrate(average(label), x, sampling_times(1), solver=JUMPS).x for label in (0, 1)]
    weight = per_image(torch.tensor([0.0, 0.5, 1.0]), x)
    torch.testing.assert_close(drawn, torch.lerp(*ends, weight))
    assert blended.evaluations.tolist() == [2, 2, 2]


def test_refused_where_nothing_jumps():
    x = torch.zeros(3, 2, 4, 4)
    with pytest.raises(ConfigError, match="those of a student"):
        integrate(GAUSSIAN.velocity, x, sampling_times(2), solver=JUMPS)
    with pytest.raises(ConfigError, match="from noise to data"):
        integrate(average(0), x, sampling_times(2, start=0.0, end=1.0), solver=JUMPS)
