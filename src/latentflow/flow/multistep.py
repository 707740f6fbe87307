"""Multistep methods: one evaluation per step, and the results of the steps before.

A method has `march`, which yields the state after each step of a grid, and `extra`, the number of first steps that take
a second evaluation. `latentflow.flow.solvers` runs them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from latentflow.errors import ConfigError
from latentflow.flow.path import Path

Ask = Callable[..., Tensor]
"""Called as ask(x, time): the velocity of the whole batch x [B, ...] at one time, [B, ...]."""


def combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """sum_i weights[i] slopes[i]"""
    return cast(Tensor, sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight != 0))


def quadrature(nodes: Sequence[float], begin: float, end: float) -> list[float]:
    """The weights b_j with which values at `nodes` give the mean of their polynomial over [begin, end].

    With s_j = (t_j - begin) / (end - begin), sum_j b_j s_j^m = integral of s^m over [0, 1] = 1 / (m + 1).
    """
    s = (torch.tensor(nodes, dtype=torch.float64) - begin) / (end - begin)
    m = torch.arange(len(s), dtype=torch.float64)
    return cast(list[float], torch.linalg.solve(s ** m[:, None], 1 / (m + 1)).tolist())


@dataclass(frozen=True)
class AdamsBashforth:
    """The explicit multistep method that integrates the polynomial through the last `order` velocities.

    The first steps, for which there are too few velocities, take a second evaluation at their end. Up to order 3, each
    of the first `order` - 1 steps is one of Heun's method, whose local error is small enough. Order 4 takes one such
    step; its second step starts from the beginning again, with the polynomial through the velocities at all three times
    (Simpson's rule on an even grid), and its third is of order 3: after these the error is of order 4.
    """

    order: int

    @property
    def extra(self) -> int:
        return min(self.order - 1, 2)

    def weights(self, times: Sequence[float]) -> list[float]:
        """The weights of the newest to the oldest velocity, for any spacing of the grid.

        `times` are the `order` times of the velocities, oldest first, and the end of the step.
        """
        *past, now, end = times
        return quadrature([now, *reversed(past)], now, end)

    def march(self, ask: Ask, x: Tensor, grid: Sequence[float], path: Path | None = None) -> Iterator[Tensor]:
        """The state after each step of `grid`, [B, ...] each, from x at grid[0]."""
        first = x
        past: deque[Tensor] = deque(maxlen=self.order)  # velocities, newest first
        for step, (t, t_next) in enumerate(pairwise(grid)):
            h = t_next - t
            past.appendleft(ask(x, t))
            known = self.weights(grid[step + 1 - len(past) : step + 2])
            if step >= self.extra:
                x = x + h * combine(known, past)
            elif step and self.order > 3:
                end = ask(x + h * combine(known, past), t_next)
                whole = quadrature([t_next, t, grid[0]], grid[0], t_next)
                x = first + (t_next - grid[0]) * combine(whole, [end, *past])
            else:
                x = x + h * combine((1 / 2, 1 / 2), [past[0], ask(x + h * past[0], t_next)])
            yield x


@dataclass(frozen=True)
class FittedMultistep:
    """A multistep method with times and weights of its own, as `latentflow.flow.solver_fit` finds them.

        x_{n+1} = x_n + (t_{n+1} - t_n) sum_j weights[n][j] v_{n-j}        sum_j weights[n][j] = 1

    Attributes:
        times: t_0 to t_N, falling from 1 to 0.
        weights: one row per step, for the newest to the oldest velocity that it uses.
    """

    times: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    extra = 0

    def march(self, ask: Ask, x: Tensor, grid: Sequence[float], path: Path | None = None) -> Iterator[Tensor]:
        """The state after each step, [B, ...] each, from x at times[0].

        Raises:
            ConfigError: `grid` is not `times`.
        """
        if tuple(grid) != self.times:
            raise ConfigError("a fitted solver takes its own times and no others")
        velocities: list[Tensor] = []  # oldest first
        for step, t in enumerate(grid[:-1]):
            velocities.append(ask(x, t))
            x = self.after(step, x, velocities)
            yield x

    def after(self, step: int, x: Tensor, velocities: Sequence[Tensor]) -> Tensor:
        """The state after a step from x, given the velocities up to its start, the oldest first."""
        weights = self.weights[step]
        newest_first = velocities[: -len(weights) - 1 : -1]
        return x + (self.times[step + 1] - self.times[step]) * combine(weights, newest_first)


@dataclass(frozen=True)
class DataMultistep:
    """Multistep methods for the predicted data: DPM-Solver++ and UniPC, with the data taken from the velocity.

    With lambda = log(alpha / sigma) and the predicted data D, the flow from t to s is (arXiv 2211.01095, Eq. 8)

        x_s = sigma_s / sigma_t x_t + sigma_s  integral of e^lambda D  over lambda from lambda_t to lambda_s
            = alpha_s D_t + sigma_s N_t + (alpha_s - sigma_s alpha_t / sigma_t) sum_j w_j (D_j - D_t)

    where N is the predicted noise, and the last line replaces D by the polynomial in lambda through the last `order`
    predictions. `order` 2 is DPM-Solver++(2M), its Algorithm 2, and 3 is DPM-Solver++(3M). With `corrects`, the
    prediction at the end of a step is added to the polynomial, and the step is repeated before the next one, without
    another evaluation: UniPC for data prediction with B(h) = e^h - 1 (arXiv 2302.04867), whose order is one higher.

    The first step is of order 1, and the second of order 2 at most. At the ends of the path lambda is infinite: steps
    to t = 0 or 1 are of order 1, and the prediction at an end is not used after its own step. Since [0, 1] is
    infinitely long in lambda, the order from noise to data is 2; those above hold between two times inside.
    """

    order: int
    corrects: bool = False
    extra = 0

    def march(self, ask: Ask, x: Tensor, grid: Sequence[float], path: Path | None = None) -> Iterator[Tensor]:
        """The state after each step of `grid`, [B, ...] each, from x at grid[0].

        Raises:
            ConfigError: no path.
        """
        if path is None:
            raise ConfigError("this solver works with the data that a velocity predicts; give the path as well")
        known: deque[_Prediction] = deque(maxlen=self.order)  # newest first
        for t, t_next in pairwise(grid):
            here = _Prediction.of(path, t, x, ask(x, t))
            if self.corrects and known and known[0].time != 0:  # from there, 1 / sigma would magnify what is corrected
                here = here.moved_by(known[0].carried_to(here.point, [here, *list(known)[1:]]) - x)
            known.appendleft(here)
            end = _Point.at(path, t_next)
            x = here.carried_to(end, list(known)[1:] if math.isfinite(end.log_ratio) else [])
            yield x


@dataclass(frozen=True)
class _Point:
    """A time of a path: alpha, sigma, their derivatives, and lambda = log(alpha / sigma), infinite at both ends."""

    time: float
    alpha: float
    sigma: float
    d_alpha: float
    d_sigma: float

    @classmethod
    def at(cls, path: Path, time: float) -> _Point:
        t = torch.tensor(time, dtype=torch.float64)
        return cls(time, *(float(function(t)) for function in (path.alpha, path.sigma, path.d_alpha, path.d_sigma)))

    @property
    def log_ratio(self) -> float:
        if self.time in (0, 1):  # also where sigma_min is left at t = 0: such a small rest is none
            return math.inf if self.time == 0 else -math.inf
        return math.log(self.alpha / self.sigma)


@dataclass(frozen=True)
class _Prediction:
    """The data and the noise that a velocity predicts at a point of the path; D and N, [B, ...] each."""

    point: _Point
    data: Tensor
    noise: Tensor

    @classmethod
    def of(cls, path: Path, time: float, x: Tensor, velocity: Tensor) -> _Prediction:
        at = _Point.at(path, time)
        determinant = at.alpha * at.d_sigma - at.d_alpha * at.sigma
        data = (at.d_sigma / determinant) * x - (at.sigma / determinant) * velocity
        noise = (at.alpha / determinant) * velocity - (at.d_alpha / determinant) * x
        return cls(at, data, noise)

    @property
    def time(self) -> float:
        return self.point.time

    def moved_by(self, shift: Tensor) -> _Prediction:
        """The same prediction of the data, for another state x = alpha D + sigma N."""
        return replace(self, noise=self.noise + shift / self.point.sigma)

    def carried_to(self, end: _Point, others: Sequence[_Prediction]) -> Tensor:
        """x_s at another point; `others` are the D_j but D_t, of which those at the ends of the path are not used."""
        x = end.alpha * self.data + end.sigma * self.noise
        others = [other for other in others if math.isfinite(other.point.log_ratio)]
        if not others:
            return x
        start, h = self.point.log_ratio, end.log_ratio - self.point.log_ratio
        places = [1.0 if other.point is end else (other.point.log_ratio - start) / h for other in others]
        gain = end.alpha - end.sigma * self.point.alpha / self.point.sigma
        for weight, other in zip(_difference_weights(places, h), others, strict=True):
            x = x + gain * weight * (other.data - self.data)
        return x


def _difference_weights(places: Sequence[float], h: float) -> list[float]:
    """The weights w_j of the differences D_j - D_t, for lambda_j = lambda_t + places[j] h, after a step of h in lambda.

    They are exact for polynomials: sum_j w_j s_j^m = mu_m for m = 1, 2, ..., the mean of s^m over [0, 1] with the
    weight e^{h s}. With a single difference mu_1 is 1/2, its limit for small h, as both papers have it.
    """
    if len(places) == 1:
        return [1 / (2 * places[0])]
    s, m = torch.tensor(places, dtype=torch.float64), torch.arange(1, len(places) + 1)
    moments = torch.tensor([_moment(power, h) for power in m.tolist()], dtype=torch.float64)
    return cast(list[float], torch.linalg.solve(s ** m[:, None], moments).tolist())


def _moment(power: int, h: float) -> float:
    """mu_m = integral of e^{h s} s^m over [0, 1], divided by that of e^{h s}."""
    if abs(h) < 1:  # a series, since the recursion cancels: integral = sum_k h^k / (k! (k + m + 1))
        terms = [h**k / math.factorial(k) for k in range(20)]
        return sum(term / (k + power + 1) for k, term in enumerate(terms)) / sum(
            t / (k + 1) for k, t in enumerate(terms)
        )
    # by parts, mu_m = 1 / (1 - e^{-h}) - m / h mu_{m - 1}
    return 1.0 if power == 0 else -1 / math.expm1(-h) - power / h * _moment(power - 1, h)
