"""The arithmetic of a diagnosis: moments, spectra, the baseline of the loss, and nearest neighbours."""

from __future__ import annotations

import math

import pytest
import torch

from latentflow.analysis.diagnosis import (
    ChannelMoments,
    baseline_loss,
    channel_moments,
    largest_shift,
    nearest_members,
    nearness,
    radial_spectrum,
)
from latentflow.flow.path import CosinePath, LinearPath


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moments_of_known_distributions():
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5).reshape(1000, 1, 10, 10) / 100_000
    exponential = -torch.log1p(-uniform)
    constant = torch.full_like(uniform, 3.0)
    found = channel_moments(torch.cat([uniform, 2 * exponential + 1, constant], 1))
    assert found.mean == pytest.approx([0.5, 3, 3], rel=1e-3)
    assert found.std == pytest.approx([1 / math.sqrt(12), 2, 0], rel=1e-3)
    assert found.skew == pytest.approx([0, 2, 0], rel=1e-2, abs=1e-9)
    assert found.kurtosis == pytest.approx([-1.2, 6, 0], rel=2e-2, abs=1e-9)


def test_spectrum_of_waves_and_of_white_noise():
    x = torch.arange(8, dtype=torch.float64)
    wave = torch.cos(2 * math.pi * 2 * x / 8).expand(1, 1, 8, 8)
    frequencies, power = radial_spectrum(wave)
    assert frequencies == [1, 2, 3, 4]
    assert power[1] > 1 and max(power[0], *power[2:]) < 1e-20
    radius = (torch.tensor([0.0, 1, 2, 3, -4, -3, -2, -1])[:, None] ** 2).add(
        torch.tensor([0.0, 1, 2, 3, -4, -3, -2, -1]) ** 2
    )
    places = int((radius.sqrt().round() == 2).sum())
    # a cosine of amplitude 1 has the sum of squares h w / 2, all of it at two of the places of this radius
    assert power[1] == pytest.approx(64 / 2 / places)
    _, white = radial_spectrum(1.5 * normal(2000, 2, 8, 8))
    assert white == pytest.approx([2.25] * 4, rel=0.03)
    assert radial_spectrum(normal(3, 1, 1, 1)) == ([], [])


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=str)
def test_the_baseline_is_the_loss_of_the_best_gaussian_velocity(path):
    """Measured: u given x_t of independent Gaussians, by linear regression."""
    latents = torch.cat([0.5 * normal(4000, 1, 4, 4), 2 + 1.5 * normal(4000, 1, 4, 4, seed=1)], 1)
    noise = normal(4000, 2, 4, 4, seed=2)
    for time in (0.1, 0.5, 0.9):
        t = torch.full((4000,), time, dtype=torch.float64)
        x, u = path.interpolate(latents, noise, t), path.target(latents, noise, t)
        left = 0.0
        for channel in range(2):
            a, b = x[:, channel].flatten(), u[:, channel].flatten()
            a, b = a - a.mean(), b - b.mean()
            left += float((b - (a @ b) / (a @ a) * a).square().mean()) / 2
        assert baseline_loss(path, latents, torch.tensor([time])) == pytest.approx([left], rel=0.02)


def test_nearest_by_brute_force_and_copies_at_distance_zero():
    members, queries = 100 + normal(40, 7), 100 + normal(9, 7, seed=1)
    queries[4] = members[13]
    distance, index, second, ratio, relative = nearest_members(queries, members)
    brute = (queries[:, None] - members).norm(dim=2).min(1)
    torch.testing.assert_close(distance, brute.values, rtol=1e-4, atol=1e-4)
    assert index.tolist() == brute.indices.tolist()
    assert index[4] == 13 and distance[4] < 1e-4
    ordered = (queries[:, None] - members).norm(dim=2).sort(1)
    assert second.tolist() == ordered.indices[:, 1].tolist()
    torch.testing.assert_close(ratio, brute.values / ordered.values[:, 1], rtol=1e-4, atol=1e-4)
    tenth = (queries[:, None] - members).norm(dim=2).sort(1).values[:, 9]
    torch.testing.assert_close(relative, brute.values / tenth, rtol=1e-4, atol=1e-4)


def test_memorisation_is_found_out():
    training, held_out, fresh = normal(300, 2, 3, 3), normal(200, 2, 3, 3, seed=1), normal(200, 2, 3, 3, seed=2)
    copies = training[:200] + 1e-3 * normal(200, 2, 3, 3, seed=3)
    honest, cheat = nearness("x", fresh, held_out, training), nearness("x", copies, held_out, training)
    assert 0.4 < honest.nearer < 0.6 and honest.copies <= 8
    assert cheat.nearer == 1 and cheat.copies == 200
    assert cheat.nearest_of_samples == list(range(200))
    mixed = nearness("x", torch.cat([copies[:60], fresh[:140]]), held_out, training)
    assert 60 <= mixed.copies <= 65
    alike = nearness("x", held_out, held_out, training)
    assert alike.nearer == 0.5 and alike.near == alike.rank - 1 == 1
    plain = nearness("x", 0.3 * fresh, held_out, training)
    assert plain.near > 150 and plain.copies <= 2  # nearer to all of them, not to one
    doubled = nearness("x", copies, held_out, training.repeat(3, 1, 1, 1))
    assert doubled.copies == 200  # though each training image is there three times


def test_the_memorised_fraction_by_hand():
    """Training images at 0, 12 and 100 on a line: below 3 from 0, three times as far from 12, a sample is memorised."""
    training, samples = torch.tensor([[0.0], [12.0], [100.0]]), torch.tensor([[2.9], [3.1], [-5.0], [-7.0], [11.0]])
    found = nearness("x", samples, torch.tensor([[6.1], [0.0]]), training)
    assert found.samples_ratio == pytest.approx([2.9 / 9.1, 3.1 / 8.9, 5 / 17, 7 / 19, 1 / 11])
    assert found.memorised == 3 and found.memorised_held_out == 1
    assert found.nearest_of_samples == [0, 0, 0, 0, 1] and found.second_of_samples == [1, 1, 1, 1, 0]


def test_training_images_that_are_there_twice_are_one():
    training = torch.tensor([[100.0], [112.0], [100.0], [100.0]])
    found = nearest_members(torch.tensor([[101.0], [100.0]]), training)
    assert found.ratio.tolist() == pytest.approx([1 / 11, 0])
    assert found.second.tolist() == [1, 1]


@pytest.mark.parametrize("members", [1, 3])
def test_without_a_second_picture_nothing_is_memorised(members):
    found = nearest_members(torch.tensor([[5.0], [6.0]]), torch.full((members, 1), 5.0))
    assert found.ratio.tolist() == [1, 1]


def test_the_largest_shift():
    data = ChannelMoments(mean=[0, 1], std=[1, 2], skew=[0, 0], kurtosis=[0, 0])
    found = largest_shift(ChannelMoments(mean=[0.1, 0.6], std=[1.1, 1.6], skew=[0, 0], kurtosis=[0, 0]), data)
    assert found == pytest.approx((0.2, 0.8))
