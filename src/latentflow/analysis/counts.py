"""Exact tests of counts: confidence bounds of a share, and whether one set of values is smaller than another."""

from __future__ import annotations

import math
from collections.abc import Callable


def share_bounds(count: int, num: int, confidence: float = 0.95) -> tuple[float, float]:
    """One-sided lower and upper confidence bounds of a share, for `count` of `num`; Clopper and Pearson."""
    chance = 1 - confidence
    low = 0.0 if count == 0 else _solve(lambda p: 1 - _at_most(count - 1, num, p), chance)
    high = 1.0 if count == num else _solve(lambda p: -_at_most(count, num, p), -chance)
    return low, high


def chance_of_before(count: int, num: int, rank: int, num_others: int) -> float:
    """The probability that `count` or more of `num` values lie below the `rank`-th smallest of `num_others` others.

    Under the null hypothesis all values come from one distribution, so that every order of them is equally likely. This
    is the permutation test of the count, exact for any numbers.
    """
    first = count + rank - 1  # at most rank - 1 of the others may be among the first values
    if count > num or first > num + num_others:
        return 0.0
    orders = math.comb(num + num_others, first)
    ways = sum(math.comb(num_others, i) * math.comb(num, first - i) for i in range(min(rank, num_others + 1)))
    return ways / orders


def _at_most(count: int, num: int, share: float) -> float:
    """The probability of `count` or fewer of `num`, each with probability `share`."""
    if share >= 1:
        return float(count >= num)
    if share <= 0:
        return 1.0
    logs = (
        math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1)
        + k * math.log(share) + (num - k) * math.log1p(-share)
        for k in range(count + 1)
    )  # fmt: skip
    return min(math.fsum(map(math.exp, logs)), 1.0)


def _solve(rising: Callable[[float], float], value: float) -> float:
    """The share at which a rising function takes a value, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2
