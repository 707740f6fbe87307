"""Lipschitz constants against dense Jacobians, and curves in time by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentflow.analysis.lipschitz import (
    TimeCurve,
    largest_growth_rate,
    largest_singular_value,
    lipschitz_along_paths,
)
from latentflow.errors import ConfigError, DataError, NonFiniteError
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.shapes import Condition
from tests import tiny
from tests.exact import GaussianData


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def jacobians(function, x):
    """The dense Jacobian of each row: [B, outputs, inputs]."""
    dense = [torch.func.jacrev(lambda row: function(row[None])[0])(row) for row in x]
    return torch.stack([j.reshape(-1, x[0].numel()) for j in dense]).detach()


def linear(matrices):
    """x [B, n] => [B, m], one matrix per row."""
    return lambda x: torch.einsum("bij,bj->bi", matrices, x)


def curvy(x):
    """A nonlinear function of rows of 6 whose Jacobian is not symmetric."""
    return torch.sin(3 * x) * x.roll(1, 1) + x.roll(2, 1) ** 2 - x


class Attention(nn.Module):
    """[B, N, D] => [B, N, D], by the fused kernel where torch has its way."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# ---- singular values and growth rates


@pytest.mark.parametrize("function", [curvy, lambda x: torch.tanh(x[:, :4] * x[:, 2:]).square()], ids=["6", "6 to 4"])
def test_singular_value_against_the_dense_jacobian(function):
    x = normal(5, 6)
    found = largest_singular_value(function, x, tolerance=0)
    torch.testing.assert_close(found.value, torch.linalg.svdvals(jacobians(function, x))[:, 0])
    assert found.iterations <= 6  # as many directions as a row has


def test_growth_rate_against_the_dense_jacobian():
    x = normal(5, 6)
    dense = jacobians(curvy, x)
    eigenvalues = torch.linalg.eigvalsh((dense + dense.mT) / 2)
    torch.testing.assert_close(largest_growth_rate(curvy, x, tolerance=0).value, eigenvalues[:, -1])
    opposite = largest_growth_rate(lambda x: -curvy(x), x, tolerance=0).value
    torch.testing.assert_close(opposite, -eigenvalues[:, 0])
    assert (opposite != -largest_growth_rate(curvy, x, tolerance=0).value).all()


def test_growth_rate_is_negative_where_everything_contracts():
    matrices = -2 * torch.eye(8, dtype=torch.float64) + (skew := normal(3, 8, 8)) - skew.mT
    found = largest_growth_rate(linear(matrices), normal(3, 8))
    torch.testing.assert_close(found.value, torch.full((3,), -2.0, dtype=torch.float64))
    assert (largest_singular_value(linear(matrices), normal(3, 8)).value > 3).all()


@pytest.mark.parametrize(
    ("measure", "truth"),
    [
        (largest_singular_value, lambda a: torch.linalg.svdvals(a)),
        (largest_growth_rate, lambda a: torch.linalg.eigvalsh((a + a.mT) / 2).flip(1)),
    ],
)
def test_estimates_rise_to_the_truth_and_the_residual_bounds_the_error(measure, truth):
    matrices, x = normal(6, 40, 40), normal(6, 40, seed=1)
    spectrum = truth(matrices)
    before = torch.full((6,), -torch.inf, dtype=torch.float64)
    for iterations in (1, 2, 5, 10, 20, 30):
        found = measure(linear(matrices), x, iterations=iterations, tolerance=0)
        assert found.iterations == iterations
        assert (found.value >= before - 1e-12).all()
        assert (found.value <= spectrum[:, 0] + 1e-12).all()
        nearest = (spectrum - found.value[:, None]).abs().amin(1)
        assert (nearest <= found.residual + 1e-12).all()
        before = found.value
    torch.testing.assert_close(before, spectrum[:, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("products", [2, 6, 12])
def test_never_below_power_iteration_with_as_many_products(products):
    matrices, seed = normal(4, 40, 40), 5
    v = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).expand(4, 40)
    for _ in range(products - 1):
        v = torch.einsum("bji,bjk,bk->bi", matrices, matrices, v)
        v = v / v.norm(dim=1, keepdim=True)
    powers = torch.einsum("bij,bj->bi", matrices, v).norm(dim=1)
    found = largest_singular_value(linear(matrices), normal(4, 40), iterations=products, tolerance=0, seed=seed)
    assert (found.value > powers).all()


def test_stops_at_the_tolerance():
    decaying = torch.diag(0.5 ** torch.arange(30, dtype=torch.float64)).expand(2, 30, 30)
    rough = largest_singular_value(linear(decaying), normal(2, 30), tolerance=1e-1)
    fine = largest_singular_value(linear(decaying), normal(2, 30), tolerance=1e-8)
    assert rough.iterations < fine.iterations < 20
    torch.testing.assert_close(fine.value, torch.ones(2, dtype=torch.float64))


def test_few_distinct_eigenvalues_end_the_iteration():
    x = normal(3, 7)
    assert largest_growth_rate(lambda x: -3 * x, x)[::2] == (pytest.approx([-3.0] * 3), 1)
    assert largest_singular_value(lambda x: -3 * x, x)[::2] == (pytest.approx([3.0] * 3), 1)
    assert largest_singular_value(lambda x: 0 * x, x).value.tolist() == [0, 0, 0]
    # A row that has ended among others that go on: a multiple of the identity, a rank of 1, and no structure.
    one = -3 * torch.eye(7, dtype=torch.float64)
    two = one - 2 * torch.ones(7, 7, dtype=torch.float64)
    three = normal(7, 7)
    rate = largest_growth_rate(linear(torch.stack([one, two, three])), x, tolerance=0)
    truth = [-3.0, -3.0, float(torch.linalg.eigvalsh((three + three.T) / 2)[-1])]
    assert rate.value.tolist() == pytest.approx(truth)


def test_a_row_has_the_same_value_in_any_batch():
    x = normal(4, 6)
    together = largest_singular_value(curvy, x, iterations=3, tolerance=0).value
    single = largest_singular_value(curvy, x[2:3], iterations=3, tolerance=0).value
    torch.testing.assert_close(together[2:3], single, rtol=1e-12, atol=0)
    other = largest_singular_value(curvy, x, iterations=3, tolerance=0, seed=1).value
    assert (together != other).all()


@pytest.mark.parametrize("measure", [largest_singular_value, largest_growth_rate])
def test_value_and_residual_have_the_units_of_the_function(measure):
    x = normal(3, 6)
    one, small = (measure(lambda x, k=k: k * curvy(x), x, iterations=3, tolerance=0) for k in (1, 0.01))
    torch.testing.assert_close(small.value, 0.01 * one.value)
    torch.testing.assert_close(small.residual, 0.01 * one.residual)
    assert (one.residual > 0).all()


def test_float32():
    matrices = normal(3, 60, 60)
    found = largest_singular_value(linear(matrices.float()), normal(3, 60).float(), iterations=60)
    torch.testing.assert_close(found.value, torch.linalg.svdvals(matrices)[:, 0], rtol=1e-5, atol=0)


# ---- networks


def networks():
    torch.manual_seed(0)
    return {
        "convolution": (
            nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 3, stride=2)),
            (2, 5, 5),
        ),
        "upsampling": (nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2, 3, 3), nn.GELU()), (2, 3, 3)),
        "attention": (nn.Sequential(Attention(8), nn.RMSNorm(8)), (4, 8)),
        # Attention hands images on that are not contiguous, where forward-mode derivatives of GroupNorm fail.
        "decoder": (tiny.kl(mid_block_add_attention=True).decoder, (4, 2, 2)),
    }


@pytest.mark.parametrize("name", ["convolution", "upsampling", "attention", "decoder"])
def test_networks_against_their_dense_jacobians(name):
    network, shape = networks()[name]
    network.double()
    x = normal(3, *shape)
    found = largest_singular_value(network, x, iterations=40, tolerance=1e-9)
    with sdpa_kernel(SDPBackend.MATH):
        dense = jacobians(network, x)
    torch.testing.assert_close(found.value, torch.linalg.svdvals(dense)[:, 0], rtol=1e-7, atol=0)
    assert not found.value.requires_grad
    assert all(p.grad is None for p in network.parameters())


def test_a_guided_network():
    matrices = normal(2, 2, 2)  # of the null condition and of class 1

    def network(x, time, condition):
        return torch.einsum("bij,bjhw->bihw", matrices[condition.labels], x)

    null, given = Condition(torch.tensor([0, 0, 0])), Condition(torch.tensor([1, 1, 1]))
    guided = ConditionedVelocity(network, given, null, scale=2.5, interval=(0.0, 0.5))
    time = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    growth = lipschitz_along_paths(guided, normal(3, 2, 2, 2), time, bins=10)
    strong = torch.linalg.svdvals(matrices[0] + 2.5 * (matrices[1] - matrices[0]))[0]
    plain = torch.linalg.svdvals(matrices[1])[0]
    torch.testing.assert_close(growth.two_sided.highest[[2, 5, 9]], torch.stack([strong, strong, plain]))


def test_a_function_that_stops_derivatives_is_refused(kl):
    with pytest.raises(ValueError, match="no derivative reaches x"):
        largest_singular_value(torch.no_grad()(curvy), normal(2, 6))
    bias = normal(2, 6).requires_grad_()
    with pytest.raises(ValueError, match="no derivative reaches x"):
        largest_singular_value(lambda x: x.detach() + bias, normal(2, 6))
    with pytest.raises(ValueError, match="no derivative reaches x"):
        largest_singular_value(kl.decode, normal(1, 4, 2, 2).float())


@pytest.mark.parametrize("measure", [largest_singular_value, largest_growth_rate])
def test_bad_input(measure):
    x = normal(2, 6)
    with pytest.raises(DataError, match=r"\[0, 6\]"):
        measure(curvy, x[:0])
    with pytest.raises(ConfigError, match="got 0 and"):
        measure(curvy, x, iterations=0)
    with pytest.raises(ConfigError, match="and nan"):
        measure(curvy, x, tolerance=math.nan)
    with pytest.raises(ValueError, match="bfloat16"):
        measure(curvy, x.bfloat16())
    with pytest.raises(NonFiniteError, match="x, where"):
        measure(curvy, x.index_fill(1, torch.tensor(3), math.nan))
    with pytest.raises(NonFiniteError, match="function whose derivative"):
        measure(lambda x: x / 0, x)
    with pytest.raises(NonFiniteError, match="derivative of the function"):
        measure(lambda x: (x - x.detach()).abs().sqrt(), x)


# ---- along paths


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=str)
def test_constants_of_the_exact_velocity(path):
    """v has the slope S'/S in x, so that L = |S'/S| and, with time falling, M = -S'/S."""
    gaussian = GaussianData(path, mean=1.5, std=0.4)
    time = torch.tensor([0.02, 0.04, 0.3, 0.55, 0.98], dtype=torch.float64)
    growth = lipschitz_along_paths(gaussian.velocity, normal(5, 2, 3, 3), time, bins=5)
    a, s, da, ds = path.alpha(time), path.sigma(time), path.d_alpha(time), path.d_sigma(time)
    slope = (a * da * 0.4**2 + s * ds) / (a**2 * 0.4**2 + s**2)
    for values, curve in ((slope.abs(), growth.two_sided), (-slope, growth.one_sided)):
        expected = torch.stack([values[:2].max(), values[2], values[3], torch.tensor(-torch.inf), values[4]])
        torch.testing.assert_close(curve.highest, expected.double())
        torch.testing.assert_close(curve.mean[[0, 1]], torch.stack([values[:2].mean(), values[2]]))
    assert growth.one_sided.highest[4] < 0 < growth.two_sided.highest[4]


def test_growths_add_up():
    gaussian, x, time = GaussianData(LinearPath()), normal(6, 4), torch.linspace(0, 1, 6, dtype=torch.float64)
    whole = lipschitz_along_paths(gaussian.velocity, x, time, bins=3)
    parts = [lipschitz_along_paths(gaussian.velocity, x[rows], time[rows], bins=3) for rows in ([0, 3], [1, 2, 4, 5])]
    added = parts[0] + parts[1]
    for name in ("two_sided", "one_sided"):
        one, other = getattr(whole, name), getattr(added, name)
        torch.testing.assert_close(one.highest, other.highest)
        torch.testing.assert_close(one.mean, other.mean)
        assert one.counts.tolist() == other.counts.tolist() == [2, 2, 2]


@pytest.mark.parametrize("time", [-0.1, 1.1, math.nan])
def test_times_outside_are_refused(time):
    with pytest.raises(ConfigError, match=rf"time {time}\d* lies outside"):
        lipschitz_along_paths(lambda x, t: x, normal(2, 4), torch.tensor([0.5, time], dtype=torch.float64))


# ---- curves


def test_curve_by_hand():
    curve = TimeCurve.of(torch.tensor([0.0, 0.1, 0.5, 0.7, 1.0]), torch.tensor([1.0, 3.0, 2.0, 4.0, 9.0]), bins=2)
    assert curve.counts.tolist() == [2, 3]
    assert curve.mean.tolist() == [2, 5]
    assert curve.highest.tolist() == [3, 9]
    assert curve.times.tolist() == [0.25, 0.75]
    # Of 1, 3 the variance is 2; of 2, 4, 9 it is (9 + 1 + 16) / 2 = 13.
    torch.testing.assert_close(curve.standard_error, torch.tensor([2 / 2, 13 / 3], dtype=torch.float64).sqrt())
    assert curve.integral() == 3.5
    assert curve.integral_standard_error() == pytest.approx(math.sqrt(1 + 13 / 3) / 2)
    assert curve.count == 5


def test_curves_add_up():
    time, values = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    whole = TimeCurve.of(time, values, bins=4)
    added = TimeCurve.of(time[:20], values[:20], bins=4) + TimeCurve.of(time[20:], values[20:], bins=4)
    for name in ("counts", "mean", "standard_error", "highest"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name))


def test_a_curve_with_empty_bins_has_no_integral():
    curve = TimeCurve.of(torch.tensor([0.1, 0.95]), torch.tensor([1.0, 2.0]), bins=4)
    with pytest.raises(DataError, match="2 of 4 bins of time are empty"):
        curve.integral()
    assert math.isnan(curve.standard_error[0])


def test_bad_curves():
    time, values = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 2.0])
    with pytest.raises(ConfigError, match="bins is 0"):
        TimeCurve.of(time, values, bins=0)
    with pytest.raises(DataError, match="empty"):
        TimeCurve.of(time[:0], values[:0])
    with pytest.raises(DataError, match=r"shape \[2\], got \[1\]"):
        TimeCurve.of(time[:1], values)
    with pytest.raises(NonFiniteError, match=r"t = 0\.2 "):
        TimeCurve.of(time, values / torch.tensor([1.0, 0.0]))
    with pytest.raises(ConfigError, match="2 and 3 bins"):
        TimeCurve.of(time, values, bins=2) + TimeCurve.of(time, values, bins=3)
