"""How fast a function stretches, measured from its derivatives: Lipschitz constants of a velocity and of a decoder.

With J the Jacobian of a function at one point there are two constants, both of that point only:

    two-sided    |J|      = largest singular value of J           |f(y) - f(x)| <= L |y - x|
    one-sided    mu(J)    = largest eigenvalue of (J + J^T) / 2   <y - x, f(y) - f(x)> <= M |y - x|^2

where L and M are the largest |J| and mu(J) on the segment from x to y. mu(J) <= |J|, and mu is negative where f
contracts. A constant of the whole function is the supremum over all points; what is measured here is the largest over
some points, and at each point what an iteration has found so far. So every number here is a LOWER estimate of its
constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentflow.errors import ConfigError, DataError, NonFiniteError


@dataclass(frozen=True)
class TimeCurve:
    """Values at many times in [0, 1], gathered in n equal bins; curves of several batches add up.

    Attributes:
        counts: [n] float64 on the CPU, number of values in each bin.
        sums: [n], their sum.
        squares: [n], the sum of their squares.
        highest: [n], the largest of them; -inf in an empty bin.
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor
    highest: Tensor

    @classmethod
    def of(cls, time: Tensor, values: Tensor, bins: int = 10) -> TimeCurve:
        """Gather `values` ([B], finite) by their `time` ([B] in [0, 1]); t = 1 belongs to the last bin.

        Raises:
            ConfigError: fewer than 1 bin, or times outside [0, 1].
            DataError: no values, or not one time per value.
            NonFiniteError: a value is not a finite number.
        """
        if bins < 1:
            raise ConfigError(f"bins is {bins}: at least 1 bin of time is needed")
        check_times(time, len(values))
        if not values.isfinite().all():
            where = float(time[~values.isfinite().to(time.device)][0])
            raise NonFiniteError(f"a value measured at t = {where:.6g} is not a finite number")
        values = values.detach().cpu().double()
        index = (time.detach().cpu().double() * bins).long().clamp(max=bins - 1)
        zeros = torch.zeros(bins, dtype=torch.float64)
        return cls(
            counts=zeros.index_add(0, index, torch.ones_like(values)),
            sums=zeros.index_add(0, index, values),
            squares=zeros.index_add(0, index, values.square()),
            highest=(zeros - torch.inf).scatter_reduce(0, index, values, "amax"),
        )

    def __add__(self, other: TimeCurve) -> TimeCurve:
        if len(self.counts) != len(other.counts):
            raise ConfigError(f"cannot add curves of {len(self.counts)} and {len(other.counts)} bins")
        return TimeCurve(
            self.counts + other.counts,
            self.sums + other.sums,
            self.squares + other.squares,
            torch.maximum(self.highest, other.highest),
        )

    @property
    def times(self) -> Tensor:
        """The middle of each bin, [n]."""
        return (torch.arange(len(self.counts), dtype=torch.float64) + 0.5) / len(self.counts)

    @property
    def mean(self) -> Tensor:
        """The mean in each bin, [n]; NaN in an empty one."""
        return self.sums / self.counts

    @property
    def standard_error(self) -> Tensor:
        """The standard error of each mean, [n]; NaN in a bin of fewer than 2 values."""
        variance = (self.squares - self.counts * self.mean.square()).clamp(min=0) / (self.counts - 1).clamp(min=0)
        return (variance / self.counts).sqrt()

    @property
    def count(self) -> int:
        """Values in all bins."""
        return int(self.counts.sum())

    def integral(self) -> float:
        """The integral over [0, 1] of the mean at time t; every bin has the same weight, however many values it has.

        Raises:
            DataError: a bin is empty.
        """
        return float(self.filled().mean.mean())

    def integral_standard_error(self) -> float:
        """The standard error of `integral`, for independent values; NaN where a bin has fewer than 2 of them."""
        return float(self.standard_error.square().sum().sqrt()) / len(self.counts)

    def filled(self) -> TimeCurve:
        """This curve, if every bin has a value.

        Raises:
            DataError: a bin is empty.
        """
        empty = int((self.counts == 0).sum())
        if empty:
            total = len(self.counts)
            raise DataError(
                f"{empty} of {total} bins of time are empty: use more or evenly spread times, or fewer bins"
            )
        return self


class Spectral(NamedTuple):
    """An extreme singular value or eigenvalue of the Jacobian at each of B points.

    Attributes:
        value: [B] float64 on the CPU; the true one is not smaller, but for rounding.
        residual: [B] likewise, in units of `value`: some singular value (eigenvalue) lies that near to `value`.
            That it is the largest is as sure as a random start is likely not to miss it.
        iterations: Lanczos steps taken; each takes one product with J and one with J^T.
    """

    value: Tensor
    residual: Tensor
    iterations: int


def largest_singular_value(
    function: Callable[[Tensor], Tensor], x: Tensor, *, iterations: int = 20, tolerance: float = 1e-3, seed: int = 0
) -> Spectral:
    """The largest singular value of the Jacobian of `function` at each row of x: how far it can stretch there.

    Lanczos iteration on J^T J. It needs only products, and finds at least what as many power iterations find.
    A lower estimate of |J| at x, and so of the Lipschitz constant of `function`.

    Args:
        function: x [B, ...] => [B, ...] of any shape, each row of which depends only on the same row of x. It must not
            stop derivatives (`torch.no_grad`, `detach`). It is differentiated twice: attention runs in its plain
            form here, and a compiled network must be passed uncompiled.
        x: [B, ...], float32 or float64.
        iterations: at most so many Lanczos steps (and no more than the elements of a row).
        tolerance: stop when every row's residual is below this part of the value.
        seed: of the random first direction, the same for every row.

    Raises:
        ConfigError: no iterations, or a tolerance below 0.
        DataError: x is empty.
        NonFiniteError: x, the function or a derivative is not finite.
        ValueError: x is in half precision, or the derivative does not reach x.
    """
    jacobian = _Jacobian(function, x)
    square, residual, taken = _lanczos(lambda v: jacobian.pull(jacobian.push(v)), x, iterations, tolerance, seed)
    value = square.clamp(min=0).sqrt()
    # |s^2 - value^2| <= r gives |s - value| <= r / (s + value) <= r / value
    return Spectral(value, torch.where(value > 0, residual / value, 0), taken)


def largest_growth_rate(
    function: Callable[[Tensor], Tensor], x: Tensor, *, iterations: int = 20, tolerance: float = 1e-3, seed: int = 0
) -> Spectral:
    """The largest eigenvalue of (J + J^T) / 2 at each row of x: the rate at which dx/ds = function(x) parts neighbours.

    Lanczos iteration on the symmetric part; no shift is needed, and the value may have either sign. A lower estimate
    of the logarithmic norm mu(J) at x, and so of the one-sided Lipschitz constant of `function`. Arguments and errors
    are those of `largest_singular_value`, with the result of `function` in the shape of x and `tolerance` a part of the
    largest eigenvalue in size, as the value itself may be 0.
    """
    jacobian = _Jacobian(function, x)
    return Spectral(*_lanczos(lambda v: (jacobian.push(v) + jacobian.pull(v)) / 2, x, iterations, tolerance, seed))


@dataclass(frozen=True)
class VelocityGrowth:
    """How strongly a velocity stretches along its trajectories, as curves in time; growths of several batches add up.

    Attributes:
        two_sided: |J| of the velocity in x.
        one_sided: mu(-J): with time running from 1 (noise) to 0 (data) the state moves along -velocity, so this is
            the rate at which neighbouring trajectories diverge; negative where they converge.
    """

    two_sided: TimeCurve
    one_sided: TimeCurve

    def __add__(self, other: VelocityGrowth) -> VelocityGrowth:
        return VelocityGrowth(self.two_sided + other.two_sided, self.one_sided + other.one_sided)


def lipschitz_along_paths(
    velocity: Callable[[Tensor, Tensor], Tensor],
    states: Tensor,
    time: Tensor,
    *,
    bins: int = 10,
    iterations: int = 20,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> VelocityGrowth:
    """The Lipschitz constants in x of a velocity at `states`, by time: largest and mean of each bin.

    For the bound they should be the largest on every segment between a point x_t of the path (`Path.interpolate`)
    and a point of the model's own trajectory (the callback of `solvers.integrate`): states of both kinds are useful.

    Args:
        velocity: a function of x [B, ...] and t [B].
        states: [B, ...], float32 or float64; all in one batch.
        time: [B] in [0, 1], the time of each state.
        bins: equal bins of time.
        iterations, tolerance, seed: see `largest_singular_value`.

    Raises:
        ConfigError: times outside [0, 1], no bins, and as in `largest_singular_value`.
        DataError, NonFiniteError, ValueError: as in `largest_singular_value`.
    """
    check_times(time, len(states))
    options = {"iterations": iterations, "tolerance": tolerance, "seed": seed}
    two_sided = largest_singular_value(lambda x: velocity(x, time), states, **options).value
    one_sided = largest_growth_rate(lambda x: -velocity(x, time), states, **options).value
    return VelocityGrowth(TimeCurve.of(time, two_sided, bins), TimeCurve.of(time, one_sided, bins))


def check_times(time: Tensor, count: int) -> None:
    """Refuse times that are not `count` (at least 1) numbers in [0, 1].

    Raises:
        ConfigError: a time outside [0, 1], or NaN.
        DataError: nothing to look at, or not one time for each.
    """
    if count == 0:
        raise DataError("there is nothing to measure: the batch is empty")
    if time.shape != (count,):
        raise DataError(f"expected one time per image, shape [{count}], got {list(time.shape)}")
    outside = time[~((time >= 0) & (time <= 1))]
    if len(outside):
        raise ConfigError(f"time {float(outside[0])} lies outside [0, 1]: 0 is data, 1 is noise")


class _Jacobian:
    """Products with the Jacobian J of a function at x and with its transpose, for all rows at once.

    J^T u is a reverse-mode derivative. It is linear in u, and its reverse-mode derivative in u is J v: so one forward
    pass serves all products. (Torch's forward mode has no fused attention, and fails in the GroupNorm of diffusers'
    decoders, whose attention hands on images that are not contiguous.)
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor):
        if not x.numel():
            raise DataError(f"there is nothing to measure: x has shape {list(x.shape)}")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"derivatives are measured in float32 or float64, x is {x.dtype}")
        if not x.isfinite().all():
            raise NonFiniteError("x, where the derivative is to be measured, is not finite")
        self._x = x.detach().clone().requires_grad_()
        # The fused kernels of attention have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._value = function(self._x).to(x.dtype)
            self._u = torch.zeros_like(self._value, requires_grad=True)
            pulled = None
            if self._value.requires_grad:
                (pulled,) = torch.autograd.grad(self._value, self._x, self._u, create_graph=True, allow_unused=True)
        if pulled is None:  # J would silently be 0
            raise ValueError("no derivative reaches x: the function is constant, or runs under torch.no_grad or detach")
        if not self._value.isfinite().all():
            raise NonFiniteError("the function whose derivative is to be measured is not finite at x")
        self._pulled = pulled

    def push(self, v: Tensor) -> Tensor:
        """J v, in the shape of the result of the function."""
        return torch.autograd.grad(self._pulled, self._u, v, retain_graph=True)[0]

    def pull(self, u: Tensor) -> Tensor:
        """J^T u, in the shape of x."""
        return torch.autograd.grad(self._value, self._x, u, retain_graph=True)[0]


def _lanczos(
    operator: Callable[[Tensor], Tensor], x: Tensor, iterations: int, tolerance: float, seed: int
) -> tuple[Tensor, Tensor, int]:
    """The largest eigenvalue of a symmetric `operator` on each row of x's shape, its residual, and the steps taken.

    The values are [B] float64 on the CPU. Each row has its own basis, kept orthogonal in full (Golub and Van Loan,
    Matrix Computations, section 10.3.1): with n directions the operator is the tridiagonal matrix of `diagonal` and
    `off_diagonal`, whose largest eigenvalue is the largest Rayleigh quotient of all vectors they span.
    """
    if iterations < 1 or not tolerance >= 0:
        raise ConfigError(f"iterations must be at least 1 and tolerance at least 0; got {iterations} and {tolerance}")
    batch, size = len(x), x[0].numel()
    # Drawn on the CPU and equal for all rows: the value at a point depends neither on the device nor on other points.
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    direction = (start / start.norm()).to(x.dtype).to(x.device).expand(batch, size)
    basis = []
    diagonal, off_diagonal = torch.zeros(2, batch, min(iterations, size), dtype=torch.float64)
    going = torch.ones(batch, dtype=torch.bool)  # rows whose directions do not yet span an invariant space
    for step in range(min(iterations, size)):
        basis.append(direction)
        image = operator(direction.reshape(x.shape)).flatten(1)
        quotient = (image * direction).sum(1).cpu().double()
        if not quotient.isfinite().all():
            raise NonFiniteError("the derivative of the function is not finite at x")
        # A row that has ended repeats its first quotient, which never is above its largest eigenvalue.
        diagonal[:, step] = torch.where(going, quotient, diagonal[:, 0])
        spanned = torch.stack(basis, 2)  # [B, size, step + 1]
        for _ in range(2):  # once leaves rounding errors that grow
            image = image - (spanned @ (spanned.mT @ image[:, :, None])).squeeze(2)
        length = image.norm(dim=1).cpu().double()

        filled = step + 1
        inner = off_diagonal[:, : filled - 1]
        matrix = torch.diag_embed(diagonal[:, :filled]) + torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)
        values, vectors = torch.linalg.eigh(matrix)
        largest, size_of_operator = values[:, -1], values.abs().amax(1)
        going &= length > 10 * torch.finfo(x.dtype).eps * size_of_operator
        length = torch.where(going, length, 0)
        residual = length * vectors[:, -1, -1].abs()
        if (residual <= tolerance * size_of_operator).all():
            break
        off_diagonal[:, step] = length
        scale = torch.where(going, 1 / length, 0).to(x.dtype).to(x.device)  # MPS has no float64
        direction = image * scale[:, None]
    return largest, residual, filled
