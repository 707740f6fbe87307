"""Ways whose shape is known: straight ones, circles, and the Gaussian's, which are parts of curves in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from latentflow.analysis.trajectories import follow
from latentflow.errors import ConfigError, DataError, NonFiniteError
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.flow.times import sampling_times
from tests.exact import GaussianData


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(*shape, value):
    return torch.full(shape, value, dtype=torch.float64)


def rotation(angle):
    """A turn by `angle` radians in all, clockwise or not, of the first two elements."""
    matrix = torch.tensor([[0.0, -angle], [angle, 0.0]], dtype=torch.float64)
    return lambda x, time: x @ matrix.T


def test_a_straight_way_at_constant_speed():
    start = noise(5, 2, 3)
    goal = noise(5, 2, 3, seed=1)
    ways = follow(lambda x, time: start - goal, start, sampling_times(7))
    torch.testing.assert_close(ways.ends, goal)
    assert ways.straightness.abs().max() < 1e-28 and ways.total_turning.max() < 1e-15
    torch.testing.assert_close(ways.energy, (start - goal).square().flatten(1).sum(1))
    torch.testing.assert_close(ways.speeds, ways.energy.sqrt()[:, None].expand(-1, 8))


def test_a_straight_way_at_changing_speed_does_not_turn():
    """v = 2 t c: the chord is c, the mean of |v|^2 is 4/3 |c|^2, so a quarter of it is in excess."""
    c = noise(3, 4)
    ways = follow(lambda x, time: 2 * time[:, None] * c, noise(3, 4, seed=1), sampling_times(400))
    torch.testing.assert_close(ways.straightness, double(3, value=0.25), rtol=1e-4, atol=0)
    assert ways.total_turning.max() < 1e-12


@pytest.mark.parametrize("angle", [0.1, -math.pi / 2, math.pi, 2 * math.pi])
def test_a_circle(angle):
    """|v| = angle r all the way, the chord is 2 r sin(angle / 2)."""
    start = noise(4, 2)
    ways = follow(rotation(angle), start, sampling_times(400), solver="rk4")
    expected = 1 - (math.sin(angle / 2) / (angle / 2)) ** 2
    torch.testing.assert_close(ways.straightness, double(4, value=expected), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(ways.turning, double(4, 400, value=abs(angle)), rtol=1e-8, atol=0)
    torch.testing.assert_close(ways.total_turning, double(4, value=abs(angle)), rtol=1e-8, atol=0)
    torch.testing.assert_close(ways.speeds, (abs(angle) * start.norm(dim=1))[:, None].expand(-1, 401))


def test_the_error_of_the_means_falls_as_the_square_of_the_step():
    expected = 1 - (math.sin(1) / 1) ** 2
    errors = [
        abs(float(follow(rotation(2.0), noise(1, 2), sampling_times(steps), solver="rk4").straightness) - expected)
        for steps in (20, 40)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=str)
def test_gaussian_data_of_every_deviation(path):
    """Each element goes its own closed-form way; the excess is the mean of |v|^2 less the chord's."""
    gaussian, start = GaussianData(path), noise(6, 3)
    ways = follow(gaussian.velocity, start, sampling_times(300), solver="rk4")
    one, zero = torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    ends = gaussian.flow(start, one, zero)
    torch.testing.assert_close(ways.ends, ends, rtol=1e-7, atol=1e-7)
    fine = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    squares = torch.stack(
        [gaussian.velocity(gaussian.flow(start, one, t * one), t * one).square().sum(1) for t in fine]
    ).mean(0)
    torch.testing.assert_close(ways.energy, squares, rtol=1e-4, atol=0)
    torch.testing.assert_close(ways.excess, squares - (start - ends).square().sum(1), rtol=2e-3, atol=1e-6)


def test_batches_add_up_and_time_may_rise():
    start = noise(5, 2)
    whole = follow(rotation(1.0), start, sampling_times(10))
    parts = follow(rotation(1.0), start[:2], sampling_times(10)) + follow(rotation(1.0), start[2:], sampling_times(10))
    for name in ("ends", "excess", "energy", "speeds", "turning"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-14)
    assert whole.middles.tolist() == pytest.approx([0.95 - 0.1 * k for k in range(10)])
    back = follow(rotation(1.0), whole.ends, sampling_times(10, start=0.0, end=1.0))
    torch.testing.assert_close(back.straightness, whole.straightness, rtol=1e-3, atol=0)
    with pytest.raises(DataError, match="same times"):
        whole + back


def test_standing_still_is_straight():
    ways = follow(lambda x, time: torch.zeros_like(x), noise(2, 3), sampling_times(3))
    assert not ways.straightness.any() and not ways.turning.any()


def test_bad_input():
    with pytest.raises(DataError, match="empty"):
        follow(rotation(1.0), noise(0, 2), sampling_times(3))
    with pytest.raises(NonFiniteError, match="t = 1 is not finite"):
        follow(lambda x, time: x / 0, noise(1, 2), sampling_times(3))
    with pytest.raises(ConfigError, match="no common steps"):
        follow(rotation(1.0), noise(1, 2), sampling_times(3), solver="dopri5")
