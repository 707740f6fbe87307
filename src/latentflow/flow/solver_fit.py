"""Fitting the times and weights of a multistep solver to a velocity.

A solver of N evaluations has N - 1 free times and a few free weights per step; see `FittedMultistep`. They are chosen
so that the mean distance of its end points from those of a fine solution with the same noise is least. The velocity is
only called, never differentiated: with a few dozen numbers to find, Gauss-Newton steps with derivatives from
differences are quick, and need no more memory than drawing does.

The velocities of neighbouring steps are nearly equal, so their weights are nearly interchangeable, and steps in them
would be tiny. What is fitted instead are the coefficients of their backward differences:

    sum_j weights[j] v_{n-j} = v_n + sum_j c_j nabla^j v_n        nabla v_n = v_n - v_{n-1}

Solvers fitted to a model: bespoke solvers (arXiv 2310.19075); times and weights of a multistep one: arXiv 2505.21114.

Legend: B images of a batch, P numbers to be fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from latentflow.flow.multistep import FittedMultistep, quadrature
from latentflow.flow.solvers import Velocity, integrate, velocity_at
from latentflow.flow.times import sampling_times

MOST_PAST = 4
"""Velocities that a step uses at most."""
_FIRST_ROUNDS, _ROUNDS = 4, 20  # from each start, and from the best of what they lead to
_LITTLE = 0.005  # after two rounds in a row that lower the error by a smaller share, there is no other
_FIRST_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 1e-3, 1e-9, 1e4
_DAMPING_FACTOR = 4.0
_LEAST_SCALE = 1e-20  # of a number that changes nothing, as no weight does for a constant velocity
_SHIFT_OF_TIME = 0.1  # for its derivative, in units of the shorter step next to it; trained networks are rough in t
_SHIFT_OF_COEFFICIENT = 1e-3
_SHORTEST = 0.02  # of a step, in units of an even one


@dataclass(frozen=True)
class FitBatch:
    """Images that a solver is fitted to, or checked on.

    Attributes:
        velocity: of these images.
        noise: [B, ...], the states at t = 1.
        ends: [B, ...], where the fine solution carries them at t = 0.
    """

    velocity: Velocity
    noise: Tensor
    ends: Tensor


@dataclass(frozen=True)
class SolverFit:
    """The result of a fit.

    Attributes:
        solver: the fitted one.
        error: its `end_error` on the images of the fit.
        started: that of the multistep method that the fit started from.
        rounds: Gauss-Newton steps that were taken.
    """

    solver: FittedMultistep
    error: float
    started: float
    rounds: int


def end_error(
    batches: Sequence[FitBatch], solver: str | FittedMultistep, times: Tensor | None = None, **options
) -> float:
    """The mean over all images of |x - x_fine| at t = 0, in units of the root mean square of |x_fine|.

    Args:
        times: of a solver that is not fitted.
        options: of `integrate`.
    """
    grid = torch.tensor(solver.times, dtype=torch.float64) if isinstance(solver, FittedMultistep) else times
    distances, lengths = [], []
    for batch in batches:
        end = integrate(batch.velocity, batch.noise, grid, solver=solver, **options).x
        distances.append(_norms(end - batch.ends))
        lengths.append(_norms(batch.ends))
    return float(torch.cat(distances).mean() / torch.cat(lengths).square().mean().sqrt())


def ramped(times: Sequence[float], order: int) -> FittedMultistep:
    """Adams-Bashforth on a grid, whose first steps are of order 1, 2, ... and take one evaluation each."""
    rows = []
    for step, (t, t_next) in enumerate(pairwise(times)):
        used = times[max(step + 1 - order, 0) : step + 1]
        rows.append(tuple(quadrature(list(reversed(used)), t, t_next)))
    return FittedMultistep(tuple(times), tuple(rows))


def fit_multistep(
    batches: Sequence[FitBatch],
    evaluations: int,
    *,
    shift: float = 1.0,
    on_round: Callable[[int, float], None] = lambda number, error: None,
) -> SolverFit:
    """Fit a solver of `evaluations` evaluations, from t = 1 to t = 0, to the end points of `batches`.

    There are several minima. It starts from Adams-Bashforth of order 2, 3 and 4, goes on from what is best after a few
    rounds, and no round makes that worse on these images.

    Args:
        evaluations: N >= 2.
        shift: the time shift of the grids that it starts from; half and twice of it are tried as well.
        on_round: called after each round with its number and the least error so far.
    """
    grids = [sampling_times(evaluations, shift * factor).tolist() for factor in (0.5, 1.0, 2.0)]
    starts = [_start(batches, [ramped(grid, order) for grid in grids]) for order in (2, 3, 4)]
    started = least = min(start.error for start in starts)
    number = 0

    def rounds(fit: _Fit, most: int) -> _Fit:
        nonlocal number, least
        slow = 0
        for _ in range(most):
            before, fit = fit.error, fit.after_a_round(batches)
            number, least = number + 1, min(least, fit.error)
            on_round(number, least)
            slow = slow + 1 if before - fit.error < _LITTLE * before else 0
            if slow == 2 or fit.error == before:
                break
        return fit

    best = min((rounds(start, _FIRST_ROUNDS) for start in starts), key=lambda fit: fit.error)
    best = rounds(best, _ROUNDS)
    return SolverFit(best.numbers.solver, best.error, started, number)


@dataclass(frozen=True)
class _Fit:
    """Where a fit stands: its numbers, their error, and the damping of the last step."""

    numbers: _Numbers
    error: float
    damping: float = _FIRST_DAMPING

    def after_a_round(self, batches: Sequence[FitBatch]) -> _Fit:
        """The best of the Gauss-Newton steps with more and more damping; itself if none lowers the error.

        Far from its minimum the error is not quadratic, and steps with little damping hardly lower it. Computing an
        error costs little next to the derivatives, so the damping is raised as long as that helps.
        """
        normal, slope = _normal_equations(batches, self.numbers)
        scales = normal.diagonal().clamp(min=_LEAST_SCALE).diag()
        best, damping = self, max(self.damping / _DAMPING_FACTOR**3, _LEAST_DAMPING)
        while damping <= _MOST_DAMPING:
            # Levenberg and Marquardt: (J^T J + damping diag(J^T J)) step = -J^T r
            trial = self.numbers.moved(torch.linalg.solve(normal + damping * scales, -slope))
            error = end_error(batches, trial.solver) if trial.is_valid else math.inf
            if error < best.error:
                best = _Fit(trial, error, damping)
            elif best is not self:
                break
            damping *= _DAMPING_FACTOR
        return best


def _start(batches: Sequence[FitBatch], solvers: Sequence[FittedMultistep]) -> _Fit:
    """The best of some solvers."""
    errors = [end_error(batches, solver) for solver in solvers]
    return _Fit(_Numbers.of(solvers[errors.index(min(errors))]), min(errors))


@dataclass(frozen=True)
class _Numbers:
    """The numbers that are fitted.

    Attributes:
        times: [N - 1], t_1 to t_{N-1}.
        coefficients: for each step c_1, c_2, ... of the backward differences of its velocities.
    """

    times: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, solver: FittedMultistep) -> _Numbers:
        """Those of a solver, with room for `MOST_PAST` velocities in each step."""
        room = [min(step, MOST_PAST - 1) for step in range(len(solver.weights))]
        coefficients = [_coefficients(row) for row in solver.weights]
        padded = [(*row, *[0.0] * (wanted - len(row))) for row, wanted in zip(coefficients, room, strict=True)]
        return cls(solver.times[1:-1], tuple(padded))

    @property
    def solver(self) -> FittedMultistep:
        return FittedMultistep((1.0, *self.times, 0.0), tuple(_weights(row) for row in self.coefficients))

    @property
    def is_valid(self) -> bool:
        """Whether no step is very short, let alone backwards."""
        shortest = _SHORTEST / len(self.coefficients)
        return all(t - t_next > shortest for t, t_next in pairwise((1.0, *self.times, 0.0)))

    def moved(self, by: Tensor) -> _Numbers:
        """All numbers changed by `by`, [P]: the times first, then the coefficients step by step."""
        changes = iter(by.tolist())
        times = tuple(t + next(changes) for t in self.times)
        return _Numbers(times, tuple(tuple(c + next(changes) for c in row) for row in self.coefficients))

    def shifts(self) -> list[tuple[int, float]]:
        """For each number, the first step whose end it changes, and by how much it is changed to find a derivative."""
        lengths = [t - t_next for t, t_next in pairwise((1.0, *self.times, 0.0))]
        times = [(step, _SHIFT_OF_TIME * min(lengths[step : step + 2])) for step in range(len(self.times))]
        return times + [(step, _SHIFT_OF_COEFFICIENT) for step, row in enumerate(self.coefficients) for _ in row]


def _weights(coefficients: Sequence[float]) -> tuple[float, ...]:
    """Of v_n, v_{n-1}, ..., from those of the backward differences: nabla^j v_n = sum_i (-1)^i (j over i) v_{n-i}."""
    weights = [1.0] + [0.0] * len(coefficients)
    for j, coefficient in enumerate(coefficients, 1):
        for i in range(j + 1):
            weights[i] += coefficient * (-1) ** i * math.comb(j, i)
    return tuple(weights)


def _coefficients(weights: Sequence[float]) -> tuple[float, ...]:
    """The inverse of `_weights`: v_{n-j} = sum_i (-1)^i (j over i) nabla^i v_n."""
    powers = range(1, len(weights))
    return tuple((-1) ** i * sum(math.comb(j, i) * weights[j] for j in range(i, len(weights))) for i in powers)


def _normal_equations(batches: Sequence[FitBatch], numbers: _Numbers) -> tuple[Tensor, Tensor]:
    """J^T J [P, P] and J^T r [P], float64 on the CPU: J the derivatives of the end points, r their errors."""
    shifts = numbers.shifts()
    normal, slope = torch.zeros(len(shifts), len(shifts), dtype=torch.float64), torch.zeros(len(shifts)).double()
    units = torch.diag(torch.tensor([by for _, by in shifts], dtype=torch.float64))
    for batch in batches:
        states, velocities = [batch.noise], []
        _march_on(batch.velocity, numbers.solver, states, velocities)
        end = states[-1]
        columns = []
        for (step, by), unit in zip(shifts, units, strict=True):
            # up to this step nothing changes, and nothing is computed again
            branch = states[: step + 1]
            _march_on(batch.velocity, numbers.moved(unit).solver, branch, velocities[: step + 1])
            columns.append(((branch[-1] - end) / by).flatten(1).cpu().double())
        residual = (end - batch.ends).flatten(1).cpu().double()
        # the mean distance, not its square: d|r| = r dr / |r|, so that a few images far off do not decide
        weights = 1 / residual.norm(dim=1).clamp(min=1e-12)
        jacobian = torch.stack(columns)  # [P, B, elements]
        weighted = (jacobian * weights[:, None]).flatten(1)
        normal += weighted @ jacobian.flatten(1).T
        slope += weighted @ residual.flatten()
    return normal, slope


def _march_on(velocity: Velocity, solver: FittedMultistep, states: list[Tensor], velocities: list[Tensor]) -> None:
    """Take the steps that are left after `states` and the velocities at them; both lists grow to the end."""
    for step in range(len(states) - 1, len(solver.weights)):
        if len(velocities) == step:
            velocities.append(velocity_at(velocity, states[-1], solver.times[step]))
        states.append(solver.after(step, states[-1], velocities))


def _norms(x: Tensor) -> Tensor:
    """|x| of each image: [B, ...] => [B] float64 on the CPU."""
    return x.flatten(1).cpu().double().norm(dim=1)
