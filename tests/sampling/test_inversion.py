"""Inversion, against flows that are known exactly."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.data.pictures.user_picture import psnr
from latentflow.errors import ConfigError, DataError
from latentflow.sampling.inversion import ROUND_TRIPS, compare_round_trips
from tests import tiny
from tests.exact import GaussianData
from tests.fields import GaussianField, LinearField

RATE = 0.8


@pytest.fixture(scope="module")
def model(kl) -> LatentFlow:
    return tiny.model(kl, time_scale=20.0)


@pytest.fixture(scope="module")
def linear(kl) -> LatentFlow:
    """v = RATE x."""
    return LatentFlow(tiny.model(kl).config, LinearField(RATE), kl)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    coarse = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((40, 30), Image.Resampling.BICUBIC) for one in coarse]


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def growth(solver: str, h: float) -> float:
    """What one step of size h multiplies x by, for v = RATE x: the solver's piece of the exponential series."""
    order = {"euler": 1, "heun": 2, "rk4": 4}[solver]
    return sum((RATE * h) ** power / math.factorial(power) for power in range(order + 1))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
def test_the_way_to_the_noise(linear, pictures, solver, shift):
    """On the grid from 0 to 1 with the shift of the request."""
    found = linear.invert(pictures[0], solver=solver, steps=3, shift=shift)
    even = [i / 3 for i in range(4)]
    times = [shift * t / (1 + (shift - 1) * t) for t in even]
    factor = math.prod(growth(solver, after - before) for before, after in pairwise(times))
    close(found.noise, found.latents * factor)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
def test_the_error_of_a_round_trip(linear, pictures, solver):
    trip = linear.invert(pictures[0], solver=solver, steps=4).round_trip(linear)
    expected = abs((growth(solver, 1 / 4) * growth(solver, -1 / 4)) ** 4 - 1)
    assert trip.latent_error == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_tight_tolerances_find_the_noise(kl, pictures):
    """Of Gaussian data the exact flow is known; a standardised value keeps its standard score."""
    config = tiny.model(kl).config
    data = GaussianData(config.path)
    model = LatentFlow(config, GaussianField(data), kl)
    found = model.invert(pictures[0], solver="dopri5", rtol=1e-6, atol=1e-6)
    close(found.noise, data.flow(found.latents, torch.zeros(1), torch.ones(1)), 1e-4)
    assert found.round_trip(model).latent_error < 1e-4


def test_tight_tolerances_return(model, pictures):
    for classes in (None, ["berry"]):
        trip = model.invert(pictures[0], classes=classes, solver="dopri5", rtol=1e-6, atol=1e-6).round_trip(model)
        assert trip.latent_error < 1e-4
        assert trip.samples.drawing.labels == ([] if classes is None else [1])


def test_no_velocity_no_loss(kl, pictures):
    model = LatentFlow(tiny.model(kl).config, LinearField(), kl)
    found = model.invert(pictures[0])
    trip = found.round_trip(model)
    assert torch.equal(found.noise, found.latents)
    assert trip.latent_error == 0
    assert torch.equal(trip.samples.pixels, trip.autoencoded)
    assert trip.solver_psnr == pytest.approx(10 * math.log10(255**2 * trip.autoencoded.numel()))
    assert trip.image_psnr == trip.autoencoder_psnr < 40
    assert trip.autoencoder_psnr == float(psnr(found.pixels, trip.autoencoded))


def test_noise_draws_the_image_again(model, pictures):
    found = model.invert(pictures[0], classes=["berry"], solver="heun", steps=20)
    again = model.sample(noise=found.noise, classes=["berry"], solver="heun", steps=20)
    other = model.sample(noise=found.noise, classes=["apple"], solver="heun", steps=20)
    error = (again.latents - found.latents).abs().max()
    assert error < 0.02 < 0.1 < (other.latents - found.latents).abs().max()
    assert again.drawing.inputs["noise"].startswith("sha256:")


def test_guidance_is_1_unless_it_is_given(kl, pictures):
    model = tiny.model(kl, time_scale=20.0, guidance=3.0)
    plain, guided = (model.invert(pictures[0], classes=["berry"], guidance=scale) for scale in (None, 3.0))
    assert (plain.drawing.sampling.guidance, guided.drawing.sampling.guidance) == (1.0, 3.0)
    assert (plain.evaluations, guided.evaluations) == (2, 4)
    close(plain.noise, model.invert(pictures[0], classes=["berry"], guidance=1.0).noise)
    assert (plain.noise - guided.noise).abs().max() > 0.1


def test_a_model_with_spatial_conditions(kl, pictures):
    model = tiny.model(kl, time_scale=20.0, conditioning=tiny.SPATIAL)
    assert model.invert(pictures[0], solver="heun", steps=20).round_trip(model).latent_error < 0.05
    cannot = tiny.model(kl, conditioning={**tiny.SPATIAL, "inpainting_dropout": 0.0})
    with pytest.raises(ConfigError, match="latentflow inpaint"):
        cannot.invert(pictures[0])


def test_what_cannot_be_inverted(model, pictures, tmp_path):
    with pytest.raises(ConfigError, match="2 classes"):
        model.invert(pictures[0], classes=["apple", "berry"])
    with pytest.raises(ConfigError, match="no condition is given"):
        model.invert(pictures[0], guidance=2.0)
    with pytest.raises(DataError, match="does not exist"):
        model.invert(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match="latent pixel"):
        model.invert(pictures[0].resize((1, 1)))
    with pytest.raises(ConfigError, match="no images"):
        compare_round_trips(model, [])


# The table


def test_the_table_of_an_exact_flow(linear, pictures):
    """The mean over images of what each gives by itself; Euler errs by RATE^2 / steps, Heun by RATE^4 / 4 steps^3."""
    settings = [{"solver": "euler", "steps": 4}, {"solver": "heun", "steps": 4}, {"solver": "dopri5", "rtol": 1e-4}]
    euler, heun, dopri5 = compare_round_trips(linear, pictures, settings, batch_size=2)
    assert (euler.solver, euler.steps, euler.tolerance) == ("euler", 4, None)
    assert (euler.evaluations_there, euler.evaluations_back) == (4, 4)
    assert (heun.evaluations_there, heun.evaluations_back) == (8, 8)
    assert (dopri5.steps, dopri5.tolerance) == (None, 1e-4)
    for row in (euler, heun):
        there, back = growth(row.solver, 1 / 4) ** 4, growth(row.solver, -1 / 4) ** 4
        assert row.latent_error == pytest.approx(abs(there * back - 1), rel=1e-3)
        assert row.noise_error == pytest.approx(1 - there / math.exp(RATE), rel=1e-3)
    alone = [linear.invert(picture, **settings[0]).round_trip(linear).solver_psnr for picture in pictures]
    assert euler.solver_psnr == pytest.approx(sum(alone) / 3, abs=0.01)


def test_a_round_trip_may_flatter(linear, pictures):
    """Heun's way back undoes nearly all of its error on the way there, which is why the table has both."""
    (row,) = compare_round_trips(linear, pictures[:1], [{"solver": "heun", "steps": 8}])
    assert row.latent_error < row.noise_error / 5


def test_the_usual_table_compares_like_with_like(linear, pictures):
    rows = compare_round_trips(linear, pictures[:1])
    assert len(rows) == len(ROUND_TRIPS)
    by_solver = {row.solver: [r.evaluations_there for r in rows if r.solver == row.solver] for row in rows}
    for solver in ("euler", "heun", "rk4", "ab2"):
        assert by_solver[solver] == [8, 16, 32, 64]
    assert by_solver["dopri5"] == sorted(by_solver["dopri5"])
