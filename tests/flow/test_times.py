"""Training times as quantile transforms, and sampling grids."""

import math

import pytest
import torch
from pydantic import ValidationError

from latentflow.errors import ConfigError
from latentflow.flow.times import TrainingTimes, sampling_times, shift_time, sum_by_time

LARGEST = 1 - 2**-53  # the largest float64 below 1
QUANTILES = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000


def normal_cdf(z):
    return (1 + torch.erf(z / math.sqrt(2))) / 2


def test_uniform_times_are_the_uniforms():
    assert torch.equal(TrainingTimes().draw(QUANTILES), QUANTILES.float())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.0, 2.0)])
def test_logit_normal_quantiles(mean, std):
    t = TrainingTimes(distribution="logit_normal", mean=mean, std=std).draw(QUANTILES)
    # The distribution function at t, by the definition of the logit-normal, is the quantile.
    torch.testing.assert_close(normal_cdf((torch.logit(t.double()) - mean) / std), QUANTILES, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize("stratified", [False, True])
def test_range(shift, distribution, stratified):
    uniforms = torch.tensor([0.0, 5e-324, 0.5, LARGEST], dtype=torch.float64)
    times = TrainingTimes(distribution=distribution, shift=shift, std=3.0, stratified=stratified)
    t = times.draw(uniforms, positions=torch.tensor([0, 7, 13, 20]), batch_size=7)
    assert t.dtype == torch.float32
    assert ((t >= 0) & (t <= 1)).all()
    assert t.isfinite().all()


def test_shift_by_hand_and_its_inverse():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift_time(t, 3.0), torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.float64))
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 1 / 3), t)
    assert torch.equal(TrainingTimes(shift=3.0).draw(t[:3]), torch.tensor([0.0, 0.5, 0.75]))


def test_stratified_batch_has_one_time_per_quantile():
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(3 * 16, 4 * 16)
    uniforms = torch.rand(16, generator=generator, dtype=torch.float64)
    t = TrainingTimes(stratified=True).draw(uniforms, positions, batch_size=16)
    assert (t * 16).long().tolist() == list(range(16))
    torch.testing.assert_close(t.double() * 16 - torch.arange(16), uniforms, rtol=0, atol=1e-5)


def test_stratified_time_of_an_image_does_not_depend_on_the_process():
    uniforms = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.arange(24, 36)
    times = TrainingTimes(distribution="logit_normal", stratified=True)
    whole = times.draw(uniforms, positions, batch_size=12)
    halves = [times.draw(uniforms[rank::2], positions[rank::2], batch_size=12) for rank in range(2)]
    assert torch.equal(torch.stack(halves, 1).flatten(), whole)


def test_stratified_needs_positions():
    with pytest.raises(ValueError, match="positions"):
        TrainingTimes(stratified=True).draw(QUANTILES)


@pytest.mark.parametrize("wrong", [{"std": 0.0}, {"shift": 0.0}, {"mean": float("nan")}, {"distribution": "beta"}])
def test_config_refuses(wrong):
    with pytest.raises(ValidationError):
        TrainingTimes(**wrong)


def test_sums_by_time():
    times = torch.tensor([0.0, 0.24, 0.25, 0.99, 1.0])
    bins = sum_by_time(times, torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64), bins=4)
    assert bins.sums.tolist() == [3.0, 4.0, 0.0, 24.0]
    assert bins.counts.tolist() == [2.0, 1.0, 0.0, 2.0]


def test_even_grid_is_exact():
    times = sampling_times(10)
    assert times.dtype == torch.float64
    assert times.tolist() == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert sampling_times(1).tolist() == [1.0, 0.0]


def test_shifted_grid_is_finer_near_noise():
    times = sampling_times(4, shift=3.0)
    torch.testing.assert_close(times, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("shift", [0.1, 1.0, 7.0])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (0.6, 0.0), (0.3, 0.9)])
def test_grid_ends_are_exact_and_it_is_monotone(shift, start, end):
    times = sampling_times(7, shift=shift, start=start, end=end)
    assert len(times) == 8
    assert (times[0].item(), times[-1].item()) == (start, end)
    assert (times.diff() * (end - start) > 0).all()
    even = shift_time(times, 1 / shift)
    torch.testing.assert_close(even.diff(), even.diff().mean().expand(7))


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"steps": 4, "shift": 0.0}, {"steps": 4, "end": 1.0}, {"steps": 4, "start": 1.5}]
)
def test_grid_refuses(wrong):
    with pytest.raises(ConfigError):
        sampling_times(**wrong)
