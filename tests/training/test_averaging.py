"""Power function averages: profiles in closed form, and combinations of them against the average itself."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from latentflow.training.averaging import TOLERANCE, PowerProfile, combine_profiles, exponent_of, length_of, spanned
from latentflow.training.ema import EMA, PowerAverage

LENGTHS = (0.05, 0.1)


def profiles(number: int, steps: int, lengths: tuple[float, ...] = LENGTHS) -> list[PowerProfile]:
    """Those of `number` even snapshots."""
    return [PowerProfile(length, steps * k // number) for k in range(1, number + 1) for length in lengths]


def held(profile: PowerProfile, steps: int) -> np.ndarray:
    """What an average holds of the weights of each step by definition: the integral of its profile over the step."""
    edges = np.minimum(np.arange(steps + 1) / profile.step, 1.0)
    return np.diff(edges ** (profile.exponent + 1))


class Line(nn.Module):
    """A weight that is set to a point of a line at every step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("length", [0.001, 0.015, 0.05, 0.1, 0.25, 0.28])
def test_the_length_is_the_standard_deviation_of_the_profile(length):
    gamma = exponent_of(length)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(length, rel=1e-6)
    assert length_of(gamma) == pytest.approx(length, rel=1e-9)


def test_lengths_of_the_paper():
    """gamma of 0.05 and 0.10, which it keeps: 16.97 and 6.94."""
    assert (exponent_of(0.05), exponent_of(0.1)) == (pytest.approx(16.97, abs=0.005), pytest.approx(6.94, abs=0.005))


@pytest.mark.parametrize("length", [0.03, 0.1, 0.25])
@pytest.mark.parametrize("steps", [1, 2, 37])
def test_an_average_of_a_line_in_closed_form(length, steps):
    """Of theta_i = i: t - sum_{i < t} (i / t)^(gamma + 1). The weight before the first step leaves no trace."""
    network = Line()
    average = PowerAverage(network, length)
    average.average["weight"].fill_(1e6)
    for step in range(steps):
        with torch.no_grad():
            network.weight.fill_(step + 1)
        average.update(step)
    exact = steps - sum((i / steps) ** (exponent_of(length) + 1) for i in range(1, steps))
    assert average.average["weight"].item() == pytest.approx(exact, rel=1e-12)


def test_it_holds_of_each_step_what_its_profile_says():
    network, steps = Line(), 50
    averages = [PowerAverage(network, length) for length in LENGTHS]
    for step in range(steps):
        with torch.no_grad():
            network.weight.fill_(float(step == 20))
        for average in averages:
            average.update(step)
    for average in averages:
        share = held(PowerProfile(average.length, steps), steps)
        assert average.average["weight"].item() == pytest.approx(share[20], rel=1e-9)
        assert share.sum() == pytest.approx(1.0, rel=1e-12)


def test_an_average_beside_the_exponential_one_changes_nothing():
    networks = [nn.Linear(2, 1), nn.Linear(2, 1)]
    networks[1].load_state_dict(networks[0].state_dict())
    alone, beside = EMA(networks[0], 0.9), EMA(networks[1], 0.9, LENGTHS)
    for step in range(20):
        for network in networks:
            with torch.no_grad():
                network.weight.mul_(1.1)
        alone.update(step)
        beside.update(step)
    assert torch.equal(alone.average["weight"], beside.average["weight"])
    assert set(beside.powers) == set(LENGTHS)
    assert alone.powers == {}


@pytest.mark.parametrize("length", [0.04, 0.07, 0.15])
def test_a_reconstructed_average_of_a_line_is_the_average(length):
    """16 snapshots of two averages, combined, against the average kept directly and against its closed form."""
    network, steps, number = Line(), 1600, 16
    ema, direct = EMA(network, 0.9, LENGTHS), PowerAverage(network, length)
    snapshots = []
    for step in range(steps):
        with torch.no_grad():
            network.weight.fill_((step + 1) / steps)
        ema.update(step)
        direct.update(step)
        if (step + 1) % (steps // number) == 0:
            snapshots += [ema.powers[one].average["weight"].item() for one in LENGTHS]
    made = combine_profiles(profiles(number, steps), PowerProfile(length, steps))
    found, kept = float(np.dot(made.shares, snapshots)), direct.average["weight"].item()
    gamma = exponent_of(length)
    closed = (gamma + 1) / (gamma + 2) + 0.5 / steps  # the mean of the profile, and half of a step
    assert kept == pytest.approx(closed, abs=1e-5)
    assert abs(found - kept) < 2e-4
    assert found == pytest.approx(closed, abs=2e-4)


def test_what_is_kept_is_its_own_reconstruction():
    made = combine_profiles(profiles(4, 400), PowerProfile(0.1, 300))
    assert made.shares[5] == pytest.approx(1.0, abs=1e-9)
    assert made.error < 1e-6


@pytest.mark.parametrize("length", [0.01, 0.05, 0.08, 0.28])
@pytest.mark.parametrize("number", [1, 8, 256])
def test_shares_add_up_to_one(length, number):
    made = combine_profiles(profiles(number, 1000), PowerProfile(length, 1000))
    assert sum(made.shares) == pytest.approx(1.0, abs=1e-9)


def test_the_error_is_that_of_the_profiles():
    """Against sums over very fine steps."""
    kept, target, fine = profiles(8, 20_000), PowerProfile(0.15, 20_000), 20_000
    made = combine_profiles(kept, target)
    mixed = sum(share * held(one, fine) for share, one in zip(made.shares, kept, strict=True))
    wanted = held(target, fine)
    assert made.error == pytest.approx(np.linalg.norm(mixed - wanted) / np.linalg.norm(wanted), rel=1e-3)


def test_no_other_combination_is_nearer():
    """Least squares over the steps themselves, with the sum as an equation of great weight."""
    kept, target, fine = profiles(3, 3000), PowerProfile(0.08, 3000), 3000
    columns = np.stack([held(one, fine) for one in kept], axis=1)
    system = np.vstack([columns, np.full((1, len(kept)), 1e3)])
    best = np.linalg.lstsq(system, np.append(held(target, fine), 1e3), rcond=None)[0]
    np.testing.assert_allclose(combine_profiles(kept, target).shares, best, atol=2e-3)


def test_more_snapshots_span_more_lengths():
    kept = [profiles(number, 1000) for number in (1, 8, 32)]
    few, some, many = ((spanned(one, 1000, near=0.05)[0], spanned(one, 1000, near=0.1)[1]) for one in kept)
    assert many[0] < some[0] < few[0] < 0.05 < 0.1 < few[1] < some[1] < many[1]
    for one, ends in zip(kept, (few, some, many), strict=True):
        for length in ends:
            assert combine_profiles(one, PowerProfile(length, 1000)).error <= TOLERANCE * 1.05


@pytest.mark.parametrize(
    ("lengths", "snapshots", "wanted"),
    [((0.01, 0.25), 16, 0.05), ((0.05, 0.28), 4, 0.12), ((0.05, 0.1), 1, 0.0707), ((0.01, 0.1, 0.28), 2, 0.03)],
)
def test_lengths_between_those_that_lie_far_apart_are_not_spanned(lengths, snapshots, wanted):
    """What is spanned lies on one side of the length that is not, and all of it can be had."""
    steps = [1000 * (n + 1) // snapshots for n in range(snapshots)]
    kept = [PowerProfile(length, step) for step in steps for length in lengths]
    assert combine_profiles(kept, PowerProfile(wanted, 1000)).error > TOLERANCE
    low, high = spanned(kept, 1000, near=wanted)
    assert not low <= wanted <= high
    assert any(low <= length <= high for length in lengths)
    for length in np.linspace(low, high, 50):
        assert combine_profiles(kept, PowerProfile(float(length), 1000)).error <= TOLERANCE
    assert spanned(kept, 1000, near=low) == (low, high)


def test_profiles_of_another_step_span_nothing():
    assert spanned(profiles(2, 100), 1000, near=0.07) is None


def test_the_table_of_the_page_is_what_is_computed():
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "average.md").read_text(encoding="utf-8")
    rows = [
        [float(cell.strip(" %")) for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[2:3].isdigit()
    ]
    assert [row[0] for row in rows] == [4, 8, 16, 32]
    for number, low, high, *errors in rows:
        steps = 1000 * int(number)
        kept = profiles(int(number), steps)
        assert spanned(kept, steps, near=0.07) == (low, high)
        for length, error in zip((0.03, 0.07, 0.15), errors, strict=True):
            assert 100 * combine_profiles(kept, PowerProfile(length, steps)).error == pytest.approx(error, rel=0.06)


def test_the_ages_of_the_page():
    """The mean of the profile is (gamma + 1) / (gamma + 2) of the run."""
    ages = [round(50_000 / (exponent_of(length) + 2), -2) for length in (0.1, 0.05)]
    assert ages == [5600, 2600]
