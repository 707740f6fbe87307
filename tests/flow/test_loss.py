"""The objective, against hand computation and the exact velocity."""

import pytest
import torch

from latentflow.flow.loss import align_loss, flow_matching_loss
from latentflow.flow.path import CosinePath, LinearPath
from tests.exact import GaussianData


def test_by_hand():
    data, noise = torch.full((2, 1, 1, 2), 2.0), torch.tensor([[[[1.0, 3.0]]], [[[0.0, 4.0]]]])
    time = torch.tensor([0.5, 0.25])
    # sigma_min = 0: x_0 = (1.5, 2.5), u_0 = (-1, 1); x_1 = (1.5, 2.5), u_1 = (-2, 2); v = x - t
    # v_0 - u_0 = (2, 1), v_1 - u_1 = (3.25, 0.25)
    loss = flow_matching_loss(lambda x, t: x - t[:, None, None, None], LinearPath(sigma_min=0), data, noise, time)
    assert loss.tolist() == [(4 + 1) / 2, (3.25**2 + 0.25**2) / 2]


def test_zero_for_the_target_and_per_image():
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 4, 3, 2, 2, generator=generator)
    time = torch.tensor([0.0, 0.3, 0.6, 1.0])
    path = CosinePath()
    target = path.target(data, noise, time)
    wrong = target.clone()
    wrong[2] += 3.0
    loss = flow_matching_loss(lambda x, t: wrong, path, data, noise, time)
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0, 9.0, 0.0]))


def test_velocity_sees_the_interpolation():
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 3, 2, 2, 2, generator=generator)
    time = torch.tensor([0.2, 0.5, 0.9])
    seen = []
    flow_matching_loss(lambda x, t: seen.append((x, t)) or x, LinearPath(), data, noise, time)
    ((x, t),) = seen
    assert torch.equal(x, LinearPath().interpolate(data, noise, time))
    assert torch.equal(t, time)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_whatever_the_velocity_returns(dtype):
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 3, 2, 4, 4, generator=generator)
    time = torch.rand(3, generator=generator)
    loss = flow_matching_loss(lambda x, t: x.to(dtype), LinearPath(), data, noise, time)
    assert loss.dtype == torch.float32
    path = LinearPath()
    x, u = path.interpolate(data, noise, time), path.target(data, noise, time)
    assert torch.equal(loss, (x.to(dtype).float() - u).square().flatten(1).mean(1))


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=str)
def test_least_for_the_exact_velocity_with_its_known_value(path):
    """At x_t the velocity of a pair has variance (alpha' sigma - alpha sigma')^2 std^2 / S^2 around its mean."""
    generator = torch.Generator().manual_seed(0)
    gaussian = GaussianData(path)
    noise = torch.randn(2, 1, 300, 300, generator=generator, dtype=torch.float64)
    data = gaussian.mean + gaussian.std * torch.randn(2, 1, 300, 300, generator=generator, dtype=torch.float64)
    time = torch.tensor([0.3, 0.8], dtype=torch.float64)
    a, s, da, ds = path.alpha(time), path.sigma(time), path.d_alpha(time), path.d_sigma(time)
    expected = (da * s - a * ds) ** 2 * gaussian.std**2 / (a**2 * gaussian.std**2 + s**2)
    loss = flow_matching_loss(gaussian.velocity, path, data, noise, time)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    worse = flow_matching_loss(lambda x, t: gaussian.velocity(x, t) + 0.3, path, data, noise, time)
    torch.testing.assert_close(worse - loss, torch.full_like(loss, 0.09), rtol=0.05, atol=0)


def test_gradient_reaches_the_velocity():
    weight = torch.tensor(0.5, requires_grad=True)
    data, noise = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    # x = 0.5, u = -1: d/dw (0.5 w + 1)^2 = (0.5 w + 1)
    loss = flow_matching_loss(lambda x, t: weight * x, LinearPath(sigma_min=0), data, noise, torch.tensor([0.5]))
    loss.sum().backward()
    assert weight.grad.item() == 1.25


def test_smooth_l1_of_predicted_latents_by_hand():
    """beta = 0.05: d^2 / 0.1 below it, d - 0.025 from there on; the mean of each image."""
    data = torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1).expand(2, 1, 1, 2)
    distance = torch.tensor([[0.02, -0.05], [-3.0, 0.1]]).reshape(2, 1, 1, 2)
    expected = [(0.02**2 / 0.1 + 0.025) / 2, (2.975 + 0.075) / 2]
    assert align_loss(data + distance, data).tolist() == pytest.approx(expected, rel=1e-5)
    assert align_loss(data.bfloat16(), data.bfloat16()).dtype == torch.float32
