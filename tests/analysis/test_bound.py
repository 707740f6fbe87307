"""The bound where everything is known: Gaussian data, linear autoencoders, a known error of the velocity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentflow.analysis.bound import (
    VARIANTS,
    WassersteinBound,
    empirical_velocity,
    gaussian_w2,
    reconstruction_term,
    velocity_error,
)
from latentflow.analysis.lipschitz import TimeCurve, VelocityGrowth, largest_singular_value, lipschitz_along_paths
from latentflow.errors import ConfigError, DataError, NonFiniteError
from latentflow.flow.path import CosinePath, LinearPath, Path
from latentflow.flow.solvers import Tolerance, integrate
from latentflow.flow.times import sampling_times
from tests.exact import GaussianData

PATHS = [LinearPath(), LinearPath(sigma_min=0.1), CosinePath()]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread_times(draws, seed=0):
    """One time per equal part of [0, 1], shuffled."""
    generator = torch.Generator().manual_seed(seed)
    times = (torch.arange(draws) + torch.rand(draws, generator=generator, dtype=torch.float64)) / draws
    return times[torch.randperm(draws, generator=generator)]


def covariance(d, seed):
    """A random covariance with standard deviations from 0.2 to 1.5."""
    rotation = torch.linalg.qr(normal(d, d, seed=seed))[0]
    deviations = 0.2 + 1.3 * torch.rand(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rotation * deviations.square() @ rotation.T


@dataclass(frozen=True)
class Setting:
    """Latents N(mean, cov), and a model whose velocity is wrong by shift + matrix x. In the basis of cov, with
    eigenvalues l, the exact velocity is alpha' m + G (x - alpha m), G = (alpha alpha' l + sigma sigma') / S, where
    S = alpha^2 l + sigma^2 is the covariance of x_t.
    """

    path: Path
    mean: Tensor
    cov: Tensor
    shift: Tensor
    matrix: Tensor
    basis: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "basis", tuple(torch.linalg.eigh(self.cov)))

    @property
    def dimensions(self):
        return len(self.mean)

    def exact(self, x, time):
        """v: x [B, d], time [B]."""
        _, vectors = self.basis
        alpha, d_alpha = self.path.alpha(time)[:, None], self.path.d_alpha(time)[:, None]
        along = (x - alpha * self.mean) @ vectors
        return d_alpha * self.mean + (self.slopes(time) * along) @ vectors.T

    def velocity(self, x, time):
        """v_hat."""
        return self.exact(x, time) + self.shift + x @ self.matrix.T

    def slopes(self, time):
        """Eigenvalues of the Jacobian of v: [B, d]."""
        alpha, sigma = self.path.alpha(time)[:, None], self.path.sigma(time)[:, None]
        d_alpha, d_sigma = self.path.d_alpha(time)[:, None], self.path.d_sigma(time)[:, None]
        return (alpha * d_alpha * self.basis[0] + sigma * d_sigma) / (alpha**2 * self.basis[0] + sigma**2)

    def spread(self, time):
        """Covariance of x_t: [B, d, d]."""
        eye = torch.eye(self.dimensions, dtype=torch.float64)
        alpha, sigma = self.path.alpha(time)[:, None, None], self.path.sigma(time)[:, None, None]
        return alpha**2 * self.cov + sigma**2 * eye

    def error(self, time):
        """e(t) = |shift + B m_t|^2 + tr(B S_t B^T)."""
        bias = self.shift + (self.path.alpha(time)[:, None] * self.mean) @ self.matrix.T
        return bias.square().sum(1) + torch.einsum("ij,tjk,ik->t", self.matrix, self.spread(time), self.matrix)

    def conditional_variance(self, time):
        """E|u - v|^2 = (alpha' sigma - alpha sigma')^2 tr(cov / S)."""
        alpha, sigma = self.path.alpha(time)[:, None], self.path.sigma(time)[:, None]
        d_alpha, d_sigma = self.path.d_alpha(time)[:, None], self.path.d_sigma(time)[:, None]
        factor = (d_alpha * sigma - alpha * d_sigma).square()
        return (factor * self.basis[0] / (alpha**2 * self.basis[0] + sigma**2)).sum(1)

    def growth(self, bins):
        """The Lipschitz constants in closed form, at times that include both edges of each bin."""
        time = (torch.arange(bins)[:, None] + torch.linspace(0, 1 - 1e-9, 30, dtype=torch.float64)).flatten() / bins
        _, vectors = self.basis
        jacobian = (vectors * self.slopes(time)[:, None, :]) @ vectors.T + self.matrix
        two_sided = torch.linalg.svdvals(jacobian)[:, 0]
        one_sided = torch.linalg.eigvalsh(-(jacobian + jacobian.mT) / 2)[:, -1]
        return VelocityGrowth(TimeCurve.of(time, two_sided, bins), TimeCurve.of(time, one_sided, bins))

    def curves(self, bins):
        """The loss and the error in closed form."""
        time = (torch.arange(100 * bins, dtype=torch.float64) + 0.5) / (100 * bins)
        error = self.error(time)
        return TimeCurve.of(time, error + self.conditional_variance(time), bins), TimeCurve.of(time, error, bins)

    def generated(self):
        """Mean and covariance of the model's latents, from where its flow, which is affine, carries d + 1 points."""
        corners = torch.cat([torch.zeros(1, self.dimensions), torch.eye(self.dimensions)]).double()
        ends = integrate(self.velocity, corners, sampling_times(1), solver="dopri5", tolerance=Tolerance(1e-9, 1e-10)).x
        columns = (ends[1:] - ends[0]).T
        return ends[0], columns @ columns.T

    def draw(self, count, seed=0):
        """Latents, noise and times."""
        values, vectors = self.basis
        data = self.mean + (normal(count, self.dimensions, seed=seed) * values.sqrt()) @ vectors.T
        return data, normal(count, self.dimensions, seed=seed + 1), spread_times(count, seed)


def setting(path=PATHS[0], d=3, seed=0, shift=0.2, slope=0.1):
    return Setting(
        path,
        normal(d, seed=seed),
        covariance(d, seed),
        shift * normal(d, seed=seed + 1),
        slope * normal(d, d, seed=seed + 2),
    )


@dataclass(frozen=True)
class Pixels:
    """Images N(mean, cov), seen through f(x) = A^+ (x - offset) and g(z) = A z + offset."""

    mean: Tensor
    cov: Tensor
    decoder: Tensor
    offset: Tensor

    @classmethod
    def random(cls, pixels, d, seed, orthonormal):
        decoder = normal(pixels, d, seed=seed + 4)
        decoder = torch.linalg.qr(decoder)[0] if orthonormal else decoder
        mean, offset = 0.3 * normal(2, pixels, seed=seed + 3)
        return cls(mean, covariance(pixels, seed + 5), decoder, offset)

    def encode(self, x):
        return (x - self.offset) @ torch.linalg.pinv(self.decoder).T

    def decode(self, z):
        return z @ self.decoder.T + self.offset

    def latents(self):
        encoder = torch.linalg.pinv(self.decoder)
        return encoder @ (self.mean - self.offset), encoder @ self.cov @ encoder.T

    def distance(self):
        """sqrt(E|x - g(f(x))|^2): what lies outside the columns of the decoder."""
        outside = torch.eye(len(self.mean), dtype=torch.float64) - self.decoder @ torch.linalg.pinv(self.decoder)
        bias = (outside @ (self.mean - self.offset)).square().sum()
        return float((bias + torch.trace(outside @ self.cov @ outside.T)).sqrt())

    def exact_w2(self, latents_mean, latents_cov):
        """The true distance of the images from decoded N(latents_mean, latents_cov)."""
        decoded = self.decoder @ latents_cov @ self.decoder.T
        return gaussian_w2(self.mean, self.cov, self.decode(latents_mean), decoded)

    def draw(self, count, seed=0):
        values, vectors = torch.linalg.eigh(self.cov)
        return self.mean + (normal(count, len(self.mean), seed=seed) * values.sqrt()) @ vectors.T


def exact_bound(latents: Setting, pixels: Pixels, bins=25):
    """The bound with every term in closed form, and the true distance."""
    distance = pixels.distance()
    reconstruction = replace(
        reconstruction_term(torch.zeros(2, 1), torch.zeros(2, 1)),
        squared=torch.full((2,), distance**2, dtype=torch.float64),
    )
    loss, error = latents.curves(bins)
    decoder = torch.linalg.svdvals(pixels.decoder)[:1]
    bound = WassersteinBound(
        latents.path, latents.dimensions, reconstruction, decoder, latents.growth(bins), loss, error
    )
    return bound, pixels.exact_w2(*latents.generated())


# ---- the bound


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    path=st.sampled_from(PATHS),
    d=st.integers(1, 4),
    seed=st.integers(0, 1000),
    shift=st.floats(0, 2),
    slope=st.floats(0, 1),
    orthonormal=st.booleans(),
)
def test_above_the_exact_distance_in_every_variant(path, d, seed, shift, slope, orthonormal):
    pixels = Pixels.random(d + 2, d, seed, orthonormal)
    wrong = setting(path, d, seed, shift, slope)
    bound, exact = exact_bound(replace(wrong, mean=pixels.latents()[0], cov=pixels.latents()[1]), pixels)
    totals = {(v, e): bound.total(v, e).value for e in ("loss", "velocity") for v in VARIANTS}
    print("  ".join(f"{variant}/{error} {value / exact:.3g}" for (variant, error), value in totals.items()))
    assert min(totals.values()) >= exact * (1 - 1e-6)
    for variant in VARIANTS:
        assert totals[variant, "loss"] >= totals[variant, "velocity"]
    for error in ("loss", "velocity"):
        flows = [bound.flow_distance(variant, error).value for variant in VARIANTS]
        assert flows[1] <= flows[0] / math.sqrt(math.e) * (1 + 1e-12)
        assert flows[2] <= flows[1] * (1 + 1e-12)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("std", [0.3, 1.0, 1.7])
def test_one_sided_is_attained(path, std):
    """Isotropic data, a constant error and a lossless decoder: neighbours part as fast as M says, all alike."""
    d = 3
    cov, shift = std**2 * torch.eye(d, dtype=torch.float64), torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    latents = Setting(path, torch.ones(d, dtype=torch.float64), cov, shift, torch.zeros(d, d, dtype=torch.float64))
    bound, _ = exact_bound(latents, Pixels.random(d, d, 0, orthonormal=True), bins=200)
    mean, generated = latents.generated()
    flow = float((mean - latents.mean).norm())  # W2 of p_0 and q_hat: the covariances agree
    torch.testing.assert_close(generated, latents.spread(torch.zeros(1, dtype=torch.float64))[0], rtol=1e-6, atol=1e-8)
    assert flow <= bound.flow_distance("one_sided", "velocity").value <= 1.03 * flow


def test_exact_values_for_constants_that_do_not_change():
    """L = 1/2, M = -2, e = 9 in all of time: sup sqrt(e^2 9), integrated 3 (e^L - 1) / L, one-sided 3 (e^M - 1) / M."""
    time = torch.linspace(0, 1, 21, dtype=torch.float64)
    flat = {value: TimeCurve.of(time, torch.full((21,), value, dtype=torch.float64), 4) for value in (0.5, -2.0, 9.0)}
    reconstruction = reconstruction_term(torch.zeros(2, 3, 1, 1), torch.ones(2, 3, 1, 1))
    growth = VelocityGrowth(flat[0.5], flat[-2.0])
    bound = WassersteinBound(
        LinearPath(sigma_min=0.25), 16, reconstruction, torch.tensor([2.0, 1.0]), growth, flat[9.0]
    )
    # Within a bin Cauchy and Schwarz lose a little: 4 bins of sqrt(mean of exp(2 M t)) against the mean of exp(M t).
    for variant, constant in (("integrated", 0.5), ("one_sided", -2.0)):
        edges = torch.linspace(0, 1, 5, dtype=torch.float64)
        squares = (torch.exp(2 * constant * edges)).diff() / (2 * constant)
        expected = 3 * float((squares * 0.25).sqrt().sum())
        assert bound.flow_distance(variant).value == pytest.approx(expected, rel=1e-12)
        assert expected == pytest.approx(3 * math.expm1(constant) / constant, rel=0.02)
    assert bound.flow_distance("sup").value == pytest.approx(3 * math.e)
    # sqrt(3) for 3 pixels wrong by 1, and sigma(0) sqrt(d) = 0.25 * 4.
    assert bound.total().value == pytest.approx(math.sqrt(3) + 2 * (1 + 3 * math.e))
    assert bound.total().standard_error == 0
    assert [term.name for term in bound.terms()][:3] == ["reconstruction", "Lip(decoder)", "noise left by the path"]
    assert [term.value for term in bound.terms()] == pytest.approx([math.sqrt(3), 2, 1, 0.5, 0.5, -2, 9])
    assert [total.name for total in bound.totals()] == [f"bound ({variant}, loss)" for variant in VARIANTS]
    assert {term.bias for term in bound.terms()} == {"none", "low", "exact", "high"}
    with pytest.raises(ConfigError, match="use error 'loss'"):
        bound.total("sup", "velocity")
    with pytest.raises(ConfigError, match="did you mean 'one_sided'"):
        bound.total("onesided")
    with pytest.raises(ConfigError, match="unknown error 'los'"):
        bound.total("sup", "los")


@pytest.mark.parametrize(("stretched", "wrong"), [(0, 2), (1, 2), (2, 2), (3, 2)])
def test_an_error_is_stretched_on_its_way_to_the_data(stretched, wrong):
    """e = 9 in bin `wrong` only and M = 4 in bin `stretched` only, of 4: only what lies nearer to data matters."""
    time = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    growth = TimeCurve.of(time, 4.0 * (torch.arange(4) == stretched), 4)
    error = TimeCurve.of(time, 9.0 * (torch.arange(4) == wrong), 4)
    reconstruction = reconstruction_term(torch.zeros(1, 1), torch.zeros(1, 1))
    bound = WassersteinBound(CosinePath(), 1, reconstruction, torch.ones(1), VelocityGrowth(growth, growth), error)
    inside = math.sqrt(math.expm1(2) / 2)  # root of the mean of exp(2 * 4 s) over s in [0, 1/4]
    factor = math.e if stretched < wrong else inside if stretched == wrong else 1
    assert bound.flow_distance("one_sided").value == pytest.approx(factor * 3 / 4)
    assert bound.flow_distance("integrated").value == pytest.approx(factor * 3 / 4)
    assert bound.flow_distance("sup").value == pytest.approx(math.exp(0.5 + 4) * math.sqrt(9 / 4))


@pytest.mark.parametrize("constant", [0.0, 1e-6, -1e-6, 1000.0, -1000.0, 1e6])
def test_extreme_constants(constant):
    time = torch.linspace(0, 1, 20, dtype=torch.float64)
    curve = TimeCurve.of(time, torch.full((20,), constant, dtype=torch.float64), 2)
    ones = TimeCurve.of(time, torch.ones(20), 2)
    growth = VelocityGrowth(TimeCurve.of(time, torch.full((20,), abs(constant)), 2), curve)
    reconstruction = reconstruction_term(torch.zeros(1, 1), torch.zeros(1, 1))
    bound = WassersteinBound(CosinePath(), 1, reconstruction, torch.ones(1), growth, ones)
    value = bound.flow_distance("one_sided").value
    if abs(constant) < 1:
        assert value == pytest.approx(1, abs=1e-6)
    elif constant < 0:  # one bin: sqrt(0.5 / 2000), and nothing from the other
        assert value == pytest.approx(math.sqrt(0.5 / 2000))
    else:
        assert value == bound.flow_distance("sup").value == math.inf


def test_measured_from_draws():
    """The whole way with measured terms: each near its closed form, the total within its standard error of it."""
    pixels = Pixels.random(6, 3, 1, orthonormal=False)
    latents = replace(setting(seed=1), mean=pixels.latents()[0], cov=pixels.latents()[1])
    truth, exact = exact_bound(latents, pixels, bins=10)
    data, noise, time = latents.draw(40000)
    images = pixels.draw(4000)
    few = slice(0, 2000)
    edges = torch.cat([torch.arange(10) / 10, (torch.arange(10) + 1 - 1e-9) / 10]).double()
    x_t = latents.path.interpolate(data[few], noise[few], time[few])
    bound = WassersteinBound(
        latents.path,
        3,
        reconstruction_term(images, pixels.decode(pixels.encode(images))),
        largest_singular_value(pixels.decode, data[:4]).value,
        lipschitz_along_paths(latents.velocity, x_t, time[few])
        + lipschitz_along_paths(latents.velocity, torch.zeros(20, 3, dtype=torch.float64), edges),
        velocity_error(latents.velocity, latents.path, data, noise, time),
        velocity_error(latents.velocity, latents.path, data, noise, time, marginal=latents.exact),
    )
    for measured, known in zip(bound.terms(), truth.terms(), strict=True):
        slack = 4 * (measured.standard_error or 0) + 1e-3 * abs(known.value) + 1e-12
        assert abs(measured.value - known.value) <= slack, measured.name
    for measured, known in zip(bound.totals(), truth.totals(), strict=True):
        assert 0 < measured.standard_error < 0.05 * measured.value
        assert abs(measured.value - known.value) <= 4 * measured.standard_error + 2e-3 * known.value, measured.name
        assert measured.value > exact


def test_standard_error_of_the_bound_is_the_spread_of_repetitions():
    latents = setting()
    growth, reconstruction = latents.growth(5), reconstruction_term(torch.zeros(2, 1), torch.zeros(2, 1))
    found = {variant: [] for variant in VARIANTS}
    for seed in range(60):
        loss = velocity_error(latents.velocity, latents.path, *latents.draw(500, seed=10 * seed), bins=5)
        bound = WassersteinBound(latents.path, 3, reconstruction, torch.ones(1), growth, loss)
        for variant in VARIANTS:
            found[variant].append(bound.total(variant))
    for estimates in found.values():
        spread = torch.tensor([one.value for one in estimates]).std().item()
        claimed = torch.tensor([one.standard_error for one in estimates]).mean().item()
        assert claimed == pytest.approx(spread, rel=0.3)


def test_parts_that_do_not_fit_are_refused():
    latents, reconstruction = setting(), reconstruction_term(torch.zeros(2, 1), torch.zeros(2, 1))
    loss, error = latents.curves(5)
    make = partial(WassersteinBound, latents.path, 3, reconstruction)
    with pytest.raises(ConfigError, match=r"not \[5, 5, 5, 4\]"):
        make(torch.ones(1), latents.growth(5), loss, latents.curves(4)[1])
    with pytest.raises(DataError, match="no singular value"):
        make(torch.ones(0), latents.growth(5), loss, error)
    with pytest.raises(NonFiniteError, match="decoder"):
        make(torch.tensor([1, math.nan]), latents.growth(5), loss, error)
    gap = TimeCurve.of(torch.tensor([0.1]), torch.ones(1), 5)
    with pytest.raises(DataError, match="4 of 5 bins"):
        make(torch.ones(1), latents.growth(5), gap)


# ---- the error of the velocity


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_loss_is_error_plus_conditional_variance(path):
    latents = setting(path)
    data, noise, time = latents.draw(100000)
    loss = velocity_error(latents.velocity, path, data, noise, time)
    error = velocity_error(latents.velocity, path, data, noise, time, marginal=latents.exact)
    known_loss, known_error = latents.curves(10)
    for measured, known in ((loss, known_loss), (error, known_error)):
        assert ((measured.mean - known.mean).abs() <= 4.5 * measured.standard_error).all()
        assert (measured.standard_error < 0.05 * measured.mean).all()
    variance = loss.integral() - error.integral()
    assert variance == pytest.approx(known_loss.integral() - known_error.integral(), rel=0.02)


def test_a_constant_error_is_exact_and_summed_over_the_image():
    gaussian, path = GaussianData(LinearPath()), LinearPath()
    data, noise, time = normal(8, 2, 3, 3), normal(8, 2, 3, 3, seed=1), spread_times(8)
    shifted = velocity_error(
        lambda x, t: gaussian.velocity(x, t) + 0.5, path, data, noise, time, marginal=gaussian.velocity, bins=4
    )
    torch.testing.assert_close(shifted.mean, torch.full((4,), 0.25 * 18, dtype=torch.float64))
    assert shifted.integral_standard_error() < 1e-12
    target = velocity_error(lambda x, t: path.target(data, noise, t) + 0.5, path, data, noise, time, bins=4)
    torch.testing.assert_close(target.mean, shifted.mean)


def test_bad_draws():
    data, noise, time = normal(4, 2), normal(4, 2, seed=1), spread_times(4)
    measure = partial(velocity_error, lambda x, t: x, LinearPath())
    with pytest.raises(DataError, match="empty"):
        measure(data[:0], noise[:0], time[:0])
    with pytest.raises(ConfigError, match=r"time 2\.0 lies outside"):
        measure(data, noise, time * 0 + 2)
    with pytest.raises(NonFiniteError, match="a value measured at t"):
        measure(data * math.nan, noise, time)
    with pytest.raises(NonFiniteError, match="a value measured at t"):
        measure(data, noise, time, marginal=lambda x, t: x / 0)


# ---- the velocity of a finite data set


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_empirical_velocity_by_brute_force(path, chunk):
    data_set, x = normal(7, 2, 2), normal(4, 2, 2, seed=1)
    time = torch.tensor([0.15, 0.4, 0.8, 1.0], dtype=torch.float64)
    found = empirical_velocity(path, data_set, x, time, chunk)
    for row in range(4):
        a, s, t = path.alpha(time[row]), path.sigma(time[row]), time[row : row + 1]
        noises = (x[row] - a * data_set) / s
        weights = torch.softmax(-noises.square().sum((1, 2)) / 2, 0)
        velocities = path.target(data_set, noises, t.expand(7))
        torch.testing.assert_close(found[row], (weights[:, None, None] * velocities).sum(0))


@pytest.mark.parametrize("time", [1e-6, 1e-4])
def test_empirical_velocity_next_to_the_data_is_that_of_the_nearest(time):
    path, t = LinearPath(), torch.full((5,), time, dtype=torch.float64)
    data_set, noise = 10 + normal(20, 50), normal(5, 50, seed=1)
    x_t = path.interpolate(data_set[:5], noise, t)
    found = empirical_velocity(path, data_set, x_t, t)
    torch.testing.assert_close(found, path.target(data_set[:5], noise, t), rtol=1e-7, atol=1e-7)
    single = empirical_velocity(path, data_set.float(), x_t.float(), t)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=0, atol=10 * 2 * 6e-8 / (time + 1e-5) * 4)


def test_empirical_velocity_approaches_that_of_the_distribution():
    gaussian, path = GaussianData(LinearPath()), LinearPath()
    time = torch.linspace(0.3, 1, 50, dtype=torch.float64)
    x = path.interpolate(gaussian.mean + gaussian.std * normal(50, 2), normal(50, 2, seed=1), time)
    errors = []
    for members in (300, 30000):
        data_set = gaussian.mean + gaussian.std * normal(members, 2, seed=3)
        difference = empirical_velocity(path, data_set, x, time) - gaussian.velocity(x, time)
        errors.append(difference.square().mean().sqrt().item())
    assert errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.5)  # 1 / sqrt(N)


def test_flow_of_the_empirical_velocity_ends_in_the_data_set():
    data_set = normal(5, 3)
    velocity = partial(empirical_velocity, LinearPath(), data_set)
    times = sampling_times(60, shift=0.2)
    ends = integrate(velocity, normal(20, 3, seed=1), times, solver="heun").x
    assert torch.cdist(ends, data_set).amin(1).max() < 1e-3


def test_the_error_against_the_empirical_velocity():
    """It is the loss less the conditional variance given the members of the set, measured by the same draws."""
    data_set, path, count = normal(6, 2), LinearPath(), 60000
    data = data_set[torch.randint(6, (count,), generator=torch.Generator().manual_seed(0))]
    noise, time = normal(count, 2, seed=1), spread_times(count)
    exact = partial(empirical_velocity, path, data_set)
    wrong = lambda x, t: exact(x, t) + torch.tensor([0.3, 0.4])  # noqa: E731
    measure = partial(velocity_error, path=path, data=data[:6000], noise=noise[:6000], time=time[:6000], bins=4)
    torch.testing.assert_close(measure(wrong, marginal=exact).mean, torch.full((4,), 0.25, dtype=torch.float64))
    difference = measure(wrong).integral() - measure(exact).integral()
    assert difference == pytest.approx(0.25, abs=0.06)


def test_bad_data_sets():
    data_set, x, time = normal(5, 2), normal(3, 2, seed=1), torch.tensor([0.0, 0.5, 1.0])
    assert empirical_velocity(LinearPath(), data_set, x, time).isfinite().all()
    with pytest.raises(ConfigError, match=r"not defined at t = 0\.0"):
        empirical_velocity(LinearPath(sigma_min=0), data_set, x, time)
    with pytest.raises(ConfigError, match=r"not defined at t = 0\.0"):
        empirical_velocity(CosinePath(), data_set, x, time)
    with pytest.raises(ConfigError, match="outside"):
        empirical_velocity(LinearPath(), data_set, x, time + 0.5)
    with pytest.raises(DataError, match=r"\[0, 2\] does not match"):
        empirical_velocity(LinearPath(), data_set[:0], x, time)
    with pytest.raises(DataError, match=r"\[3, 1\]"):
        empirical_velocity(LinearPath(), data_set, x[:, :1], time)
    with pytest.raises(DataError, match="empty"):
        empirical_velocity(LinearPath(), data_set, x[:0], time[:0])
    for bad in ((data_set * math.nan, x), (data_set, x * math.inf)):
        with pytest.raises(NonFiniteError, match="not finite"):
            empirical_velocity(LinearPath(), *bad, time)


# ---- reconstruction


def test_reconstruction_by_hand():
    x = torch.zeros(2, 3, 2, 2)
    other = torch.stack([torch.full((3, 2, 2), 0.5), torch.full((3, 2, 2), -1.0)])
    term = reconstruction_term(x, other)
    assert term.squared.tolist() == [3, 12]
    assert term.distance.value == pytest.approx(math.sqrt(7.5))
    # Variance of 3, 12 is 40.5; the error of the mean sqrt(40.5 / 2), and of its root that over 2 sqrt(7.5).
    assert term.distance.standard_error == pytest.approx(math.sqrt(40.5 / 2) / (2 * math.sqrt(7.5)))
    assert term.pixel_rms == pytest.approx(math.sqrt(7.5 / 12))
    added = reconstruction_term(x[:1], other[:1]) + reconstruction_term(x[1:], other[1:])
    assert added.distance == term.distance
    assert math.isnan(reconstruction_term(x[:1], other[:1]).distance.standard_error)


def test_reconstruction_of_a_linear_autoencoder():
    pixels = Pixels.random(6, 3, 0, orthonormal=True)
    x = pixels.draw(20000)
    measured = reconstruction_term(x, pixels.decode(pixels.encode(x))).distance
    assert abs(measured.value - pixels.distance()) < 4 * measured.standard_error < 0.1 * measured.value


def test_bad_images():
    x = torch.zeros(2, 3, 2, 2)
    with pytest.raises(DataError, match="must match"):
        reconstruction_term(x, x[:1])
    with pytest.raises(DataError, match="must match"):
        reconstruction_term(x[:0], x[:0])
    with pytest.raises(NonFiniteError, match="image 1 or"):
        reconstruction_term(x, torch.stack([x[0], x[0] * math.nan]))
    with pytest.raises(DataError, match="12 and of 3 values"):
        reconstruction_term(x, x) + reconstruction_term(x[:, :, 0, :1], x[:, :, 0, :1])


# ---- Gaussians


def test_w2_of_gaussians():
    mean, cov = normal(3), covariance(3, 1)
    diagonal = [torch.diag(torch.tensor(values, dtype=torch.float64)) for values in ([4.0, 9.0, 0.0], [1.0, 16.0, 4.0])]
    assert gaussian_w2(mean, diagonal[0], mean, diagonal[1]) == pytest.approx(math.sqrt(1 + 1 + 4))
    assert gaussian_w2(mean, cov, mean + 2, cov) == pytest.approx(2 * math.sqrt(3), rel=1e-12)
    assert gaussian_w2(mean, cov, mean, cov) < 1e-13
    assert gaussian_w2(mean, cov, mean, (1 + 1e-9) ** 2 * cov) == pytest.approx(
        1e-9 * float(cov.trace().sqrt()), rel=1e-4
    )


@pytest.mark.parametrize("seed", range(4))
def test_w2_of_gaussians_is_that_of_the_usual_formula_and_of_the_optimal_map(seed):
    one, two, mean = covariance(4, seed), covariance(4, seed + 10), normal(4, seed=seed)
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.sqrt()) @ vectors.T
    inner_values, inner_vectors = torch.linalg.eigh(root @ two @ root)
    inner = (inner_vectors * inner_values.sqrt()) @ inner_vectors.T
    squared = mean.square().sum() + (one + two - 2 * inner).trace()
    assert gaussian_w2(0 * mean, one, mean, two) == pytest.approx(float(squared.sqrt()), rel=1e-10)
    assert gaussian_w2(mean, two, 0 * mean, one) == pytest.approx(float(squared.sqrt()), rel=1e-10)


def test_bad_covariances():
    mean, eye = torch.zeros(2), torch.eye(2)
    with pytest.raises(DataError, match="symmetric"):
        gaussian_w2(mean, eye + torch.tensor([[0, 1], [0, 0]]), mean, eye)
    with pytest.raises(DataError, match="negative eigenvalue -1"):
        gaussian_w2(mean, eye, mean, torch.diag(torch.tensor([1.0, -1.0])))
