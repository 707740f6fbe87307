"""Figures of autoencoders whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from latentflow.analysis.latent_space import _cosines, equivariance_error, fine_share, measure_latent_space


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cosines_are_orthonormal_and_pure_cosines_have_one_frequency():
    matrix = _cosines(7)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(7, dtype=torch.float64))
    n = torch.arange(8, dtype=torch.float64)
    for frequency in range(1, 8):
        wave = torch.cos(math.pi * (n + 0.5) * frequency / 8).expand(2, 3, 8, 8) + 5
        for images in (wave, wave.transpose(-1, -2)):
            assert fine_share(images) == pytest.approx(float(frequency >= 4), abs=1e-12)


def test_shares_of_mixtures_of_noise_and_of_constants():
    n = torch.arange(8, dtype=torch.float64)
    slow, fast = (torch.cos(math.pi * (n + 0.5) * frequency / 8) for frequency in (2, 6))
    assert fine_share((2 * slow + fast).expand(1, 1, 8, 8)) == pytest.approx(1 / 5)
    assert fine_share(normal(4000, 1, 8, 8)) == pytest.approx(48 / 63, rel=0.01)
    assert fine_share(normal(4000, 1, 5, 5)) == pytest.approx(16 / 24, rel=0.01)
    assert fine_share(torch.full((2, 3, 4, 4), 7.0)) == 0
    assert fine_share(normal(2, 3, 1, 1)) == 0


def test_the_error_of_equal_of_constant_and_of_unrelated_latents():
    latents = normal(500, 2, 6, 6) + torch.tensor([3.0, -1.0])[:, None, None]
    mean = latents.mean((0, 2, 3), keepdim=True).expand_as(latents)
    assert equivariance_error(latents, latents) == 0
    assert equivariance_error(mean, latents) == pytest.approx(1)
    assert equivariance_error(latents.flip(0), latents) == pytest.approx(math.sqrt(2), rel=0.02)
    flat = torch.ones(2, 1, 3, 3)
    assert equivariance_error(flat, flat) == 0
    assert equivariance_error(flat + 1, flat) == math.inf


def averaged(pixels):
    """An encoder: means of squares of 4 pixels, which commute with quarter turns."""
    return F.avg_pool2d(pixels, 4)


def differences(pixels):
    """An encoder of two channels, right less left half and lower less upper half, which a quarter turn exchanges."""
    halves = F.avg_pool2d(pixels[:, :1], 2)
    a, b, c, d = halves[..., ::2, ::2], halves[..., ::2, 1::2], halves[..., 1::2, ::2], halves[..., 1::2, 1::2]
    return torch.cat([b + d - a - c, c + d - a - b], 1)


def test_an_encoder_that_commutes_and_one_that_mixes_up_directions():
    """Of white noise, both channels are independent with equal variance: anticlockwise, (h, v) becomes (v, -h)."""
    pixels = normal(200, 3, 16, 16)
    found = measure_latent_space(averaged, pixels)
    assert found.turning_error == pytest.approx(0, abs=1e-12)
    assert found.fine_share == pytest.approx(found.fine_share_of_noise, rel=0.05)
    assert found.fine_share_of_noise == pytest.approx(12 / 15)
    assert found.num == 200
    assert measure_latent_space(differences, pixels).turning_error == pytest.approx(math.sqrt(2), rel=0.05)


def test_shrinking_smooth_images_commutes_with_averaging():
    """Brightness that grows by the column: away from the edges, both ways give the middle of the same columns."""
    ramp = torch.arange(64.0).expand(1, 3, 64, 64) / 64
    found = measure_latent_space(averaged, ramp)
    assert found.shrinking_error < 0.03
    assert found.fine_share < 0.01
    unlike = measure_latent_space(lambda pixels: averaged(pixels) * pixels.shape[-1] / 64, ramp - 0.5)
    assert unlike.shrinking_error == pytest.approx(1, abs=0.05)  # latents twice as large as expected


def test_latents_of_one_pixel_cannot_shrink():
    found = measure_latent_space(averaged, normal(8, 3, 4, 4))
    assert found.shrinking_error is None
    assert (found.fine_share, found.fine_share_of_noise) == (0, 0)
