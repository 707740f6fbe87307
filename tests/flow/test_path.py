"""Paths: coefficients, derivatives and conversions."""

import pytest
import torch
from pydantic import BaseModel, ValidationError

from latentflow.flow.path import CosinePath, LinearPath, PathConfig
from tests.exact import GaussianData

PATHS = [LinearPath(), LinearPath(sigma_min=0.1), LinearPath(sigma_min=0.0), CosinePath()]


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 2, 3, 5, generator=generator, dtype=torch.float64)


TIME = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)  # as many as the width: no silent broadcast


def along_path(path, data, noise, time):
    """x_t and its derivative in t, by autograd."""
    time = time.clone().requires_grad_()
    x = path.interpolate(data, noise, time)
    slopes = [torch.autograd.grad(x[..., c, h, w].sum(), time, retain_graph=True)[0] for c, h, w in _places(x)]
    return x.detach(), torch.stack(slopes, 1).reshape(x.shape)


def _places(x):
    return torch.cartesian_prod(*(torch.arange(n) for n in x.shape[1:])).tolist()


def test_linear_coefficients_are_those_of_the_paper():
    path = LinearPath(sigma_min=0.1)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t), torch.tensor([1.0, 0.75, 0.0], dtype=torch.float64))
    torch.testing.assert_close(path.sigma(t), torch.tensor([0.1, 0.325, 1.0], dtype=torch.float64))
    assert LinearPath().sigma_min == 1e-5


def test_cosine_path_preserves_variance():
    path, t = CosinePath(), torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))
    assert path.alpha(t)[0] == 1
    assert path.sigma(t)[0] == 0


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_derivatives_against_autograd(path, name):
    t = torch.linspace(0, 1, 7, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(getattr(path, name)(t).sum(), t)
    torch.testing.assert_close(getattr(path, f"d_{name}")(t.detach()), expected)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_target_is_the_derivative_of_the_interpolation(path, pair):
    data, noise = pair
    x, slope = along_path(path, data, noise, TIME)
    torch.testing.assert_close(path.target(data, noise, TIME), slope)
    for image in range(5):
        a, s = path.alpha(TIME[image]), path.sigma(TIME[image])
        torch.testing.assert_close(x[image], a * data[image] + s * noise[image])


def test_linear_target_is_constant_in_time(pair):
    data, noise = pair
    torch.testing.assert_close(LinearPath(sigma_min=0.1).target(data, noise, TIME), 0.9 * noise - data)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_ends_of_the_path(path, pair):
    data, noise = pair
    at = torch.zeros(5, dtype=torch.float64)
    sigma_min = getattr(path, "sigma_min", 0.0)
    torch.testing.assert_close(path.interpolate(data, noise, at), data + sigma_min * noise)
    torch.testing.assert_close(path.interpolate(data, noise, at + 1), noise, rtol=0, atol=1e-15)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_conversions_round_trip(path, pair):
    data, noise = pair
    x, v = path.interpolate(data, noise, TIME), path.target(data, noise, TIME)
    torch.testing.assert_close(path.data_from_velocity(x, v, TIME), data)
    torch.testing.assert_close(path.noise_from_velocity(x, v, TIME), noise)
    torch.testing.assert_close(path.velocity_from_data(x, data, TIME), v)
    torch.testing.assert_close(path.velocity_from_noise(x, noise, TIME), v)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_data_and_noise_are_known_at_both_ends(path, pair, end):
    data, noise = pair
    time = torch.full((5,), end, dtype=torch.float64)
    x, v = path.interpolate(data, noise, time), path.target(data, noise, time)
    torch.testing.assert_close(path.data_from_velocity(x, v, time), data)
    torch.testing.assert_close(path.noise_from_velocity(x, v, time), noise)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_score_and_expected_data_of_a_gaussian(path, pair):
    x, _ = pair
    gaussian = GaussianData(path)
    v = gaussian.velocity(x, TIME)
    torch.testing.assert_close(path.score_from_velocity(x, v, TIME), gaussian.score(x, TIME))
    torch.testing.assert_close(path.data_from_velocity(x, v, TIME), gaussian.expected_data(x, TIME))


def test_time_must_be_one_per_image(pair):
    data, noise = pair
    with pytest.raises(ValueError, match=r"shape \[5\]"):
        LinearPath().interpolate(data, noise, TIME[:, None])
    with pytest.raises(ValueError, match=r"shape \[5\]"):
        CosinePath().target(data, noise, torch.tensor(0.5))


def test_dtype_of_the_images_is_kept(pair):
    data, noise = pair.bfloat16()
    assert CosinePath().interpolate(data, noise, TIME).dtype == torch.bfloat16


class Config(BaseModel):
    path: PathConfig = LinearPath()


def test_config_round_trip_by_kind():
    for path in PATHS:
        assert Config.model_validate(Config(path=path).model_dump()).path == path
    assert Config.model_validate({"path": {"kind": "cosine"}}).path == CosinePath()


@pytest.mark.parametrize(
    "wrong", [{"kind": "linear", "sigma_max": 1.0}, {"kind": "linear", "sigma_min": -1.0}, {"kind": "straight"}]
)
def test_config_refuses(wrong):
    with pytest.raises(ValidationError):
        Config.model_validate({"path": wrong})
