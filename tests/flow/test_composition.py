"""Velocities made of velocities: blends, and a known region that is led along its path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentflow.flow.composition import BlendedVelocity, KnownRegionVelocity
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.path import CosinePath, LinearPath, Path
from latentflow.flow.solvers import Tolerance, integrate
from latentflow.flow.times import sampling_times
from latentflow.shapes import Condition

GENERATOR = torch.Generator().manual_seed(0)
X, DATA, NOISE = (torch.randn(4, 2, 4, 4, generator=GENERATOR) for _ in range(3))
TIME = torch.tensor([0.1, 0.5, 0.7, 1.0])
HOLE = (torch.rand(4, 1, 4, 4, generator=GENERATOR) < 0.5).float()
LABELS, OTHERS = torch.arange(4), torch.tensor([5, 1, 7, 3])


def bending(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """A field that is far from straight, and differs between labels."""
    label = condition.labels[:, None, None, None]
    return torch.sin(3 * x + label) * (1 + time[:, None, None, None])


def of(labels: Tensor, **guidance) -> ConditionedVelocity:
    return ConditionedVelocity(bending, Condition(labels), null=Condition(torch.full((4,), 9)), **guidance)


def blend(weight: list[float], **guidance) -> BlendedVelocity:
    return BlendedVelocity(of(LABELS, **guidance), of(OTHERS, **guidance), torch.tensor(weight))


# Blends


@pytest.mark.parametrize("guidance", [{}, {"scale": 2.0}])
def test_weights_zero_and_one_are_the_parts_themselves(guidance):
    v = blend([0.0, 1.0, 0.0, 1.0], **guidance)(X, TIME)
    first, second = of(LABELS, **guidance)(X, TIME), of(OTHERS, **guidance)(X, TIME)
    assert torch.equal(v[::2], first[::2])
    assert torch.equal(v[1::2], second[1::2])
    assert not torch.equal(first[0], second[0])


def test_a_weight_mixes_the_velocities_of_its_own_image():
    weight = [0.25, 0.5, 0.75, 0.1]
    first, second = bending(X, TIME, Condition(LABELS)), bending(X, TIME, Condition(OTHERS))
    w = torch.tensor(weight)[:, None, None, None]
    torch.testing.assert_close(blend(weight)(X, TIME), (1 - w) * first + w * second, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([False, True, False, True])])
def test_a_selected_blend_is_the_same(rows):
    velocity = blend([0.25, 0.5, 0.75, 0.1], scale=2.0, interval=(0.4, 1.0))
    whole = velocity(X, TIME)
    assert velocity.evaluations.tolist() == [2, 4, 4, 4]  # of each part; twice as many where guided
    chosen = velocity.select(rows)
    torch.testing.assert_close(chosen(X[rows], TIME[rows]), whole[rows], rtol=0, atol=1e-6)
    assert velocity.evaluations.tolist() == ([4, 4, 8, 4] if rows.dtype != torch.bool else [2, 8, 4, 8])
    assert torch.equal(chosen.evaluations, velocity.evaluations)
    one = chosen.select(torch.tensor([1]))
    last = 0 if rows.dtype != torch.bool else 3
    torch.testing.assert_close(one(X[[last]], TIME[[last]]), whole[[last]], rtol=0, atol=1e-6)


# A known region


LINEAR = LinearPath()


def known(path: Path = LINEAR, velocity=None, hole: Tensor = HOLE) -> KnownRegionVelocity:
    return KnownRegionVelocity(velocity or of(LABELS), path, DATA, NOISE, hole)


@pytest.mark.parametrize("path", [LinearPath(), LinearPath(sigma_min=0.2), CosinePath()], ids=["1e-5", "0.2", "cosine"])
def test_inside_the_model_outside_the_path(path):
    v, hole = known(path)(X, TIME), (HOLE > 0).expand_as(X)
    assert torch.equal(v[hole], bending(X, TIME, Condition(LABELS))[hole])
    assert torch.equal(v[~hole], path.target(DATA, NOISE, TIME)[~hole])
    assert v.dtype == torch.float32
    assert known(path)(X.double(), TIME).dtype == torch.float64


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5"])
@pytest.mark.parametrize("sigma_min", [0.0, 1e-5, 0.25])
def test_what_is_known_arrives_at_the_data(solver, sigma_min):
    """x_0 = data + sigma_min noise on the linear path, whose velocity is constant: exact in any solver."""
    path = LinearPath(sigma_min=sigma_min)
    x = integrate(known(path), NOISE, sampling_times(3), solver=solver, tolerance=Tolerance(1e-4, 1e-4)).x
    is_known = (HOLE == 0).expand_as(x)
    torch.testing.assert_close(x[is_known], (DATA + sigma_min * NOISE)[is_known], rtol=0, atol=1e-5)
    assert (x - DATA)[~is_known].abs().max() > 0.1


def test_what_is_known_stays_on_its_path_at_every_step():
    """Begun at x_t in the middle, too."""
    times, seen = sampling_times(4, start=0.6), []
    start = LINEAR.interpolate(DATA, NOISE, torch.full((4,), 0.6))
    integrate(known(), start, times, solver="euler", callback=lambda step, time, x: seen.append((time, x)))
    assert len(seen) == 4
    for time, x in seen:
        on_path = LINEAR.interpolate(DATA, NOISE, torch.as_tensor(time, dtype=torch.float32).expand(4))
        is_known = (HOLE == 0).expand_as(x)
        torch.testing.assert_close(x[is_known], on_path[is_known], rtol=0, atol=1e-5)


def test_a_hole_of_the_whole_image_gives_the_velocity_of_the_model():
    x = integrate(known(hole=torch.ones_like(HOLE)), NOISE, sampling_times(4), solver="heun").x
    alone = integrate(of(LABELS), NOISE, sampling_times(4), solver="heun").x
    assert torch.equal(x, alone)


@pytest.mark.parametrize("of_blends", [False, True])
def test_adaptive_steps_of_an_image_do_not_depend_on_its_batch(of_blends):
    """dopri5 selects the images that are still on their way."""

    def whole() -> KnownRegionVelocity:
        return known(CosinePath(), blend([0.0, 0.5, 1.0, 0.3], scale=2.0) if of_blends else of(LABELS, scale=2.0))

    options = {"solver": "dopri5", "tolerance": Tolerance(1e-4, 1e-4)}
    together = whole()
    x = integrate(together, NOISE.double(), sampling_times(4), **options).x
    assert len(together.evaluations.unique()) > 1  # they need different numbers of steps
    for row in range(4):
        alone = whole()
        one = alone.select(torch.tensor([row]))
        solved = integrate(one, NOISE[[row]].double(), sampling_times(4), **options).x
        torch.testing.assert_close(solved[0], x[row], rtol=0, atol=1e-5)
        assert alone.evaluations[row] == together.evaluations[row]


def test_evaluations_are_those_of_the_model():
    for velocity, calls in ((of(LABELS), 1), (of(LABELS, scale=2.0), 2), (blend([0.5] * 4, scale=2.0), 4)):
        region = known(velocity=velocity)
        integrate(region, NOISE, sampling_times(3), solver="heun")
        assert region.evaluations.tolist() == [6 * calls] * 4
