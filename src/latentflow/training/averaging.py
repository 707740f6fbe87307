"""Post-hoc averages as arithmetic: which weights of a run an average holds, and how averages combine to another one.

The power function average of EDM2 (arXiv 2312.02696, section 3.1) after t steps holds the weights theta of step tau by

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    0 < tau <= t.

Its length is the standard deviation of this profile as a share of t, so that it means the same at every step:

    length = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))).

All of it is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

from latentflow.training.request import LONGEST, SHORTEST

TOLERANCE = 0.05
"""The largest error of a profile that counts as reconstructed; see `Combination.error`."""

_GRID = np.geomspace(SHORTEST, LONGEST, 400)  # lengths that are tried, to find which are spanned
_CUTOFF = 1e-13  # of singular values: below it profiles are the same in float64


def exponent_of(length: float) -> float:
    """gamma of a length in (0, 12^-0.5]: with s = gamma + 2 it solves s^3 + s^2 - (s - 1) / length^2 = 0."""
    inverse = length**-2
    roots = np.roots([1.0, 1.0, -inverse, inverse])
    return float(roots.real.max()) - 2


def length_of(exponent: float) -> float:
    """The length of a profile with this gamma, at least 0."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


@dataclass(frozen=True)
class PowerProfile:
    """How much an average holds of the weights of every step.

    Attributes:
        length: relative; see the top of this file.
        step: the last step in it, from 1.
    """

    length: float
    step: int

    @cached_property
    def exponent(self) -> float:
        """gamma."""
        return exponent_of(self.length)


@dataclass(frozen=True)
class Combination:
    """A profile made of others.

    Attributes:
        target: the profile wanted.
        shares: of the others, in their order; their sum is 1, so that weights which no longer move are exact.
        error: L2 norm of the difference to the target, as a share of the target's norm. For weights theta(tau), it
            bounds the error of the average by error |p| |theta - c| for any c (Cauchy-Schwarz).
    """

    target: PowerProfile
    shares: tuple[float, ...]
    error: float


def combine_profiles(profiles: Sequence[PowerProfile], target: PowerProfile) -> Combination:
    """The combination of `profiles` nearest to `target` by least squares (arXiv 2312.02696, section 3.2)."""
    (found,) = _combinations(profiles, [target])
    return found


def spanned(profiles: Sequence[PowerProfile], step: int, near: float) -> tuple[float, float] | None:
    """Lengths of an average at `step` that `profiles` reconstruct within `TOLERANCE`: from the first to the last.

    They may lie apart, such as around each of two lengths that were kept; these are the ones around or nearest to the
    length `near`. Three digits each, rounded inward; None: there are none.
    """
    found = _combinations(profiles, [PowerProfile(float(length), step) for length in _GRID])
    good = [one.error <= TOLERANCE for one in found]
    parts = [
        [float(_GRID[n]) for n, _ in part] for is_good, part in groupby(enumerate(good), lambda one: one[1]) if is_good
    ]
    if not parts:
        return None
    part = min(parts, key=lambda part: max(part[0] / near, near / part[-1]))
    return _rounded_inward(part[0], part[-1])


def _rounded_inward(low: float, high: float) -> tuple[float, float]:
    """Two numbers at three digits, or at more where none of so few lies between them."""
    for digits in range(3, 8):
        units = [10.0 ** (math.floor(math.log10(number)) + 1 - digits) for number in (low, high)]
        ends = math.ceil(low / units[0]) * units[0], math.floor(high / units[1]) * units[1]
        if ends[0] <= ends[1]:
            return round(ends[0], 8), round(ends[1], 8)
    return low, high


def _combinations(profiles: Sequence[PowerProfile], targets: Sequence[PowerProfile]) -> list[Combination]:
    """Minimise |sum_i x_i p_i - p|^2 with sum_i x_i = 1, for every target p, by its normal equations:

    [A 1; 1^T 0] [x; mu] = [b; 1],    A_ij = <p_i, p_j>,    b_i = <p_i, p>.
    """
    products, wanted = _inner(profiles, profiles), _inner(profiles, targets)
    own = np.array([_inner([target], [target])[0, 0] for target in targets])
    number, scale = len(profiles), 1 / np.sqrt(np.diag(products))  # profiles of norm 1
    system = np.zeros((number + 1, number + 1))
    system[:number, :number] = scale[:, None] * products * scale
    system[number, :number] = system[:number, number] = scale / scale.max()
    right = np.vstack([scale[:, None] * wanted, np.full((1, len(targets)), 1 / scale.max())])
    shares = scale[:, None] * np.linalg.lstsq(system, right, rcond=_CUTOFF)[0][:number]
    shares /= shares.sum(axis=0)
    squares = own - 2 * (shares * wanted).sum(axis=0) + (shares * (products @ shares)).sum(axis=0)
    errors = np.sqrt(np.maximum(squares, 0) / own)
    return [
        Combination(target, tuple(map(float, column)), float(error))
        for target, column, error in zip(targets, shares.T, errors, strict=True)
    ]


def _inner(ones: Sequence[PowerProfile], others: Sequence[PowerProfile]) -> np.ndarray:
    """Integrals of the products of two profiles over tau, [ones, others].

    With s <= t the steps of a profile of gamma = a and one of gamma = b,

        <p_a, p_b> = (a + 1) (b + 1) / (a + b + 1) (s / t)^b / t.
    """
    (a, s), (b, t) = (
        np.array([(one.exponent, float(one.step)) for one in row]).T.reshape(2, -1) for row in (ones, others)
    )
    a, s, b, t = a[:, None], s[:, None], b[None, :], t[None, :]
    later = np.where(s <= t, b, a)  # gamma of the profile that reaches further
    least, most = np.minimum(s, t), np.maximum(s, t)
    return (a + 1) * (b + 1) / (a + b + 1) * (least / most) ** later / most
