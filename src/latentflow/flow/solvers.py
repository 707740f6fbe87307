"""Solvers of dx/dt = velocity(x, t), from noise (t = 1) to data (t = 0) or back.

A method is an entry of `SOLVERS`; `integrate` runs it. To add a fixed-step or an adaptive Runge-Kutta method, add its
Butcher tableau; multistep methods are in `latentflow.flow.multistep`.

Images never influence each other: in an adaptive solver every image has its own time, step size and error control, and
leaves the batch when it reaches the end. Times and step sizes are float64 on the CPU; the state keeps its dtype and
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, repeat
from typing import Any, cast

import torch
from torch import Tensor

from latentflow.errors import ConfigError, NonFiniteError, nearest
from latentflow.flow.multistep import AdamsBashforth, Ask, DataMultistep, FittedMultistep, combine
from latentflow.flow.path import Path
from latentflow.shapes import image_mean, per_image, send

Velocity = Callable[[Tensor, Tensor], Tensor]
"""dx/dt as a function of x [b, C, H, W] and t [b].

It may have `select(rows)`, which restricts it to some images, and `at(time)`, which passes the time of the next call as
the solver has it on the CPU: one number for all images, or [b] float64. That of a student also has `towards(end)`,
which is its average velocity from the time of the call to the time `end`.
"""


@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method as its Butcher tableau.

        k_i = v(x + h sum_j matrix[i][j] k_j, t + nodes[i] h)        x_new = x + h sum_i weights[i] k_i

    Attributes:
        order: global order of convergence.
        nodes: c_i, one per stage; the first is 0.
        matrix: a_ij, one row per stage; the first is empty.
        weights: b_i.
        error_weights: b_i less those of the embedded method of one order lower, for an adaptive step; such a
            tableau ends in a stage at x_new, which is the first stage of the next step.
    """

    order: int
    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error_weights: tuple[float, ...] | None = None

    def march(self, ask: Ask, x: Tensor, grid: Sequence[float], path: Path | None = None) -> Iterator[Tensor]:
        """The state after each step of `grid`, [B, ...] each, from x at grid[0]."""
        for t, t_next in pairwise(grid):
            h = t_next - t
            # (1 - c) t + c t_next and not t + c h, which may miss t_next by a rounding
            stage_times = [(1 - c) * t + c * t_next for c in self.nodes[1:]]
            x = x + h * combine(self.weights, _slopes(ask, self, x, ask(x, t), stage_times, h))
            yield x


EULER = RungeKutta(1, nodes=(0,), matrix=((),), weights=(1,))
MIDPOINT = RungeKutta(2, nodes=(0, 1 / 2), matrix=((), (1 / 2,)), weights=(0, 1))
HEUN = RungeKutta(2, nodes=(0, 1), matrix=((), (1,)), weights=(1 / 2, 1 / 2))
RK4 = RungeKutta(
    4,
    nodes=(0, 1 / 2, 1 / 2, 1),
    matrix=((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
    weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
)
# Bogacki and Shampine 1989.
BOSH3 = RungeKutta(
    3,
    nodes=(0, 1 / 2, 3 / 4, 1),
    matrix=((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    weights=(2 / 9, 1 / 3, 4 / 9, 0),
    error_weights=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
)
# Dormand and Prince 1980; the embedded weights are Shampine's 1986, as in torchdiffeq (2/3 of the common estimate).
DOPRI5 = RungeKutta(
    5,
    nodes=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    matrix=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    weights=(35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
    error_weights=(
        35 / 384 - 1951 / 21600,
        0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
)


@dataclass(frozen=True)
class Jumps:
    """One jump for each step, x_s = x_t + (s - t) u(x_t, t, s), by the average velocity of a student.

    It is exact up to what the student has not learned, in however few steps; see `latentflow.flow.flow_map`.
    """

    extra = 0

    def march(self, ask: Ask, x: Tensor, grid: Sequence[float], path: Path | None = None) -> Iterator[Tensor]:
        """The state after each step of `grid`, [B, ...] each, from x at grid[0]; `ask` takes the end of a step, too."""
        for t, t_next in pairwise(grid):
            x = x + (t_next - t) * ask(x, t, end=t_next)
            yield x


JUMPS = "jumps"
"""The name of the solver of students. It is not among `SOLVERS`, which solve for any velocity."""

Method = RungeKutta | AdamsBashforth | DataMultistep | FittedMultistep | Jumps

SOLVERS: dict[str, Method] = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "heun": HEUN,
    "rk4": RK4,
    "ab2": AdamsBashforth(2),
    "ab3": AdamsBashforth(3),
    "ab4": AdamsBashforth(4),
    "dpmpp2m": DataMultistep(2),
    "dpmpp3m": DataMultistep(3),
    "unipc2": DataMultistep(2, corrects=True),
    "unipc3": DataMultistep(3, corrects=True),
    "bosh3": BOSH3,
    "dopri5": DOPRI5,
}


@dataclass(frozen=True)
class Tolerance:
    """What errors an adaptive solver lets pass.

    Attributes:
        rtol, atol: the root mean square over an image of its estimated error in one step, divided by atol + rtol |x|,
            is kept below 1.
        rounding: the relative rounding error of the velocity, which error estimates cannot go below; None: that of x's
            dtype. Give it for networks that compute in a lower precision.

    Raises:
        ConfigError: a negative rtol, or no atol.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    rounding: float | None = None

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol > 0):
            raise ConfigError(f"rtol must be at least 0 and atol above 0; got rtol {self.rtol}, atol {self.atol}")

    def of(self, x: Tensor) -> Tensor:
        """The error that is allowed at the magnitudes x, of the same shape."""
        return self.atol + self.rtol * x


@dataclass(frozen=True)
class Solution:
    """The state at the end, and how much work it took; all counts are [B] int64 on the CPU.

    Attributes:
        x: [B, ...], the state at the last time, in the dtype of the first.
        evaluations: calls of the velocity per image, however often it calls a network.
        steps: steps taken; for an adaptive solver, those accepted.
        rejected: steps that an adaptive solver tried and rejected.
    """

    x: Tensor
    evaluations: Tensor
    steps: Tensor
    rejected: Tensor


_FITTED = "fitted-"


def fitted_evaluations(solver: str) -> int | None:
    """The number of evaluations N of a solver called fitted-N or fitted-N@HASH; None: `solver` is not called so.

    Such a solver belongs to a model, and is stored in its folder.
    """
    number = solver.removeprefix(_FITTED).partition("@")[0]
    return int(number) if solver.startswith(_FITTED) and number.isdecimal() and len(number) <= 3 else None


def is_adaptive(solver: str) -> bool:
    """Whether `solver` controls its step size by a tolerance.

    Raises:
        ConfigError: no such solver.
    """
    if fitted_evaluations(solver) is not None:
        return False
    return getattr(_method(solver), "error_weights", None) is not None


def expected_evaluations(solver: str, steps: int, tolerance: float) -> float:
    """The number of calls of the velocity: exact for fixed steps, a rough estimate for adaptive ones.

    The error of a step of order p scales as its size to the power p, so the number of steps scales as
    tolerance^(-1 / p). It also depends on the velocity: the true number may be half or twice as large.

    Raises:
        ConfigError: no such solver.
    """
    if (number := fitted_evaluations(solver)) is not None:
        return number
    method = _method(solver)
    if not isinstance(method, RungeKutta):
        return steps + min(steps, method.extra)
    if not is_adaptive(solver):
        return steps * len(method.nodes)
    return float(_TYPICAL[solver] * tolerance ** (-1 / method.order))


_TYPICAL = {"bosh3": 6.0, "dopri5": 15.0}


def integrate(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    *,
    solver: str | FittedMultistep = "heun",
    path: Path | None = None,
    tolerance: Tolerance | None = None,
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> Solution:
    """Solve dx/dt = velocity(x, t) from x at times[0] to times[-1].

    Args:
        velocity: dx/dt, called with x [b, ...] and t [b] (float64; float32 on MPS) on x's device. If it has
            `select(rows)`, it is restricted to the images that have not reached the end; otherwise it always gets the
            whole batch. If it has `at(time)`, fixed steps never wait for the device.
        x: [B, ...], the state at times[0].
        times: [steps + 1] float64, falling or rising (`times.sampling_times`). Fixed-step solvers take these steps;
            adaptive ones only use the two ends.
        solver: a name of `SOLVERS`, `JUMPS`, or a fitted solver, whose times `times` must be.
        path: of the velocity; needed by the solvers that work with the predicted data, `DataMultistep`.
        tolerance: of adaptive solvers; None: the default of `Tolerance`.
        callback: of fixed-step solvers: called as callback(step, time, x) after each step, counted from 1.

    Raises:
        ConfigError: unknown solver, a grid that does not fall or rise throughout, a negative tolerance or no
            atol, a callback for an adaptive solver, or no path where one is needed; jumps of a velocity without
            `towards`, or on a grid that rises.
        NonFiniteError: in an adaptive solver, the state or the velocity is not finite, or no step is small enough.
    """
    method = solver if isinstance(solver, FittedMultistep) else _method(solver)
    grid = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    steps = grid.diff()
    if grid.dim() != 1 or len(grid) < 2 or not ((steps > 0).all() or (steps < 0).all()):
        raise ConfigError(f"times must be at least two, falling or rising throughout; got {grid.tolist()}")
    if isinstance(method, Jumps) and not (hasattr(velocity, "towards") and steps[0] < 0):
        raise ConfigError(f"{JUMPS} are those of a student, from noise to data; use another solver, such as heun")
    if isinstance(solver, FittedMultistep) or not is_adaptive(solver):
        return _integrate_fixed(velocity, x, method, grid.tolist(), path, callback)
    if callback is not None:
        raise ConfigError(f"{solver} has no common steps to report on; use a fixed-step solver with a callback")
    assert isinstance(method, RungeKutta)
    return _integrate_adaptive(velocity, x, method, float(grid[0]), float(grid[-1]), tolerance or Tolerance())


def _integrate_fixed(
    velocity: Velocity,
    x: Tensor,
    method: Method,
    grid: list[float],
    path: Path | None,
    callback: Callable[[int, float, Tensor], None] | None,
) -> Solution:
    evaluations = 0

    def ask(x: Tensor, time: float, clock: Tensor | None = None, *, end: float | None = None) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return velocity_at(velocity if end is None else cast(Any, velocity).towards(end), x, time, clock)

    states = method.march(ask, x, grid, path)
    for step, time in enumerate(grid[1:], 1):
        x = next(states)
        if callback is not None:
            callback(step, time, x)
    counts = torch.zeros(len(x), dtype=torch.int64)
    return Solution(x, counts + evaluations, counts + len(grid) - 1, counts)


_SAFETY, _MIN_FACTOR = 0.9, 0.2  # as in torchdiffeq
_MAX_FACTOR = 4.0  # lies on the lattice below: a step that grows by it is free of the rounding of a tiny estimate
_SMALLEST_STEP = 1e-12  # relative to the whole span
# A network's matrix products round differently in batches of another shape, and so does the error estimate of an
# image. Step sizes are therefore rounded down to the lattice span / 2^(n / 8), and an estimate is never below what
# rounding can cause: the same steps are taken in any batch, unless an estimate lies within rounding of a lattice point.
# This costs 2 % more evaluations with bosh3, 1 to 7 % with dopri5 in float32.
_LATTICE = 8
_ROUNDING = 2.0  # in units of rounding h |velocity|


def _integrate_adaptive(
    velocity: Velocity, x: Tensor, tableau: RungeKutta, start: float, end: float, tolerance: Tolerance
) -> Solution:
    span, rounding = end - start, tolerance.rounding or torch.finfo(x.dtype).eps
    arrived = torch.empty_like(x)
    evaluations, steps, rejected = torch.zeros(3, len(x), dtype=torch.int64)
    if not hasattr(velocity, "select"):
        velocity = _WholeBatch(velocity, x, torch.arange(len(x)), start)

    # One entry per image that has not reached the end: its row in the batch, its time, the size of its next step (> 0).
    rows = torch.arange(len(x))
    time = torch.full((len(x),), start, dtype=torch.float64)
    slope = velocity_at(velocity, x, time)
    size = _first_step(velocity, tableau.order, x, slope, tolerance.of(x.abs()), start, span)
    evaluations += 2
    while len(rows):
        # The last step ends exactly at the end; stretching it by up to 1 % avoids a tiny extra step.
        remaining = (end - time).abs()
        last = size * 1.01 >= remaining
        size = torch.where(last, remaining, size)
        next_time = torch.where(last, end, time + math.copysign(1, span) * size)
        if (size < _SMALLEST_STEP * abs(span)).any():
            raise NonFiniteError(f"the step size fell below {_SMALLEST_STEP:g} at t = {float(time[size.argmin()]):.6g}")

        x_new, slope_new, ratio, speed = _try_step(velocity, tableau, x, slope, time, next_time, tolerance)
        accepted = ratio <= 1
        evaluations[rows] += len(tableau.nodes) - 1  # the first stage is the last one of the step before
        steps[rows] += accepted
        rejected[rows] += ~accepted
        mask = per_image(send(accepted, x.device), x).bool()
        x = torch.where(mask, x_new, x)
        slope = torch.where(mask, slope_new, slope)
        time = torch.where(accepted, next_time, time)
        ratio = torch.maximum(ratio, _ROUNDING * rounding * size * speed)
        factor = _SAFETY * ratio ** (-1 / tableau.order)
        size *= torch.where(accepted, factor.clamp(1, _MAX_FACTOR), factor.clamp(_MIN_FACTOR, 1))
        size = _snap(size, span)

        done = accepted & last
        if done.any():
            here = done.nonzero().flatten()
            arrived[send(rows[here], x.device)] = x[send(here, x.device)]
            stay = (~done).nonzero().flatten()
            rows, time, size = rows[stay], time[stay], size[stay]
            x, slope = (tensor[send(stay, x.device)] for tensor in (x, slope))
            if len(rows):
                velocity = velocity.select(stay)
    return Solution(arrived, evaluations, steps, rejected)


def _try_step(
    velocity: Velocity,
    tableau: RungeKutta,
    x: Tensor,
    slope: Tensor,
    time: Tensor,
    next_time: Tensor,
    tolerance: Tolerance,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of every image from `time` to `next_time` ([b] on the CPU), given the velocity `slope` at its start.

    Returns:
        The state and the velocity at the end of the step, [b, ...]; the norms of the error estimate and of `slope`, in
        units of the tolerance at |x|, [b] on the CPU.
    """
    # Stage times and steps go to the device together, and the error ratios come back: one synchronisation per step.
    nodes = torch.tensor(tableau.nodes[1:], dtype=torch.float64)[:, None]
    stage_times = (1 - nodes) * time + nodes * next_time
    *clocks, h = _clock(x, torch.cat([stage_times, (next_time - time)[None]]))
    h = per_image(h, x)
    slopes = _slopes(lambda *at: velocity_at(velocity, *at), tableau, x, slope, stage_times, h, clocks)
    x_new = x + h * combine(tableau.weights, slopes)
    error = h * combine(tableau.error_weights or (), slopes)
    ratio, speed = _norms([error, slope], scale=tolerance.of(torch.maximum(x.abs(), x_new.abs())))
    if not ratio.isfinite().all():
        t = float(time[~ratio.isfinite()][0])
        raise NonFiniteError(f"the velocity or the state is not finite in the step from t = {t:.6g}")
    return x_new, slopes[-1], ratio, speed


def _first_step(
    velocity: Velocity, order: int, x: Tensor, slope: Tensor, scale: Tensor, start: float, span: float
) -> Tensor:
    """The size of each image's first step, [b]: Hairer, Norsett and Wanner, Solving ODEs I, section II.4."""
    d0, d1 = _norms([x, slope], scale)
    h0 = _snap(torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=abs(span)), span)
    h = math.copysign(1, span) * h0
    probe = velocity_at(velocity, x + per_image(_clock(x, h), x) * slope, start + h)
    d2 = _norms([probe - slope], scale)[0] / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (h0 * 1e-3).clamp(min=1e-6), (0.01 / steepest) ** (1 / order))
    return _snap(torch.minimum(100 * h0, h1).clamp(max=abs(span)), span)


def _snap(size: Tensor, span: float) -> Tensor:
    """Round step sizes down to the lattice; one that lies on it, up to rounding, is kept."""
    return abs(span) * 2 ** (torch.floor(torch.log2(size / abs(span)) * _LATTICE + 1e-6) / _LATTICE)


def _slopes(
    ask: Callable[..., Tensor],
    tableau: RungeKutta,
    x: Tensor,
    first: Tensor,
    times: Iterable[float | Tensor],
    h: float | Tensor,
    clocks: Iterable[Tensor | None] = repeat(None),
) -> list[Tensor]:
    """The stages k_1 ... k_s of one step, given k_1 = `first`; `times` on the CPU, `clocks` on x's device."""
    slopes = [first]
    for row, time, clock in zip(tableau.matrix[1:], times, clocks, strict=False):
        slopes.append(ask(x + h * combine(row, slopes), time, clock))
    return slopes


def velocity_at(velocity: Velocity, x: Tensor, time: float | Tensor, clock: Tensor | None = None) -> Tensor:
    """The velocity at one time or at times [b] on the CPU; `clock`: the same on x's device, if known."""
    if hasattr(velocity, "at"):
        velocity = velocity.at(time)
    return velocity(x, _clock(x, time) if clock is None else clock).to(x.dtype)


def _norms(tensors: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Root mean square over each image of tensors / scale: [len(tensors), b] float64 on the CPU, without gradient."""
    scale = scale.detach().to(torch.promote_types(scale.dtype, torch.float32))
    return torch.stack([image_mean((x.detach() / scale).square()).sqrt() for x in tensors]).cpu().double()


def _clock(x: Tensor, time: float | Tensor) -> Tensor:
    """Times as a velocity takes them, on x's device: [b] for a number; a tensor keeps its shape."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    if isinstance(time, Tensor):
        return send(time.to(dtype), x.device)
    return torch.full((len(x),), time, dtype=dtype, device=x.device)


@dataclass(frozen=True)
class _WholeBatch:
    """A velocity without `select`: it gets the whole batch each time, and only `rows` are returned.

    The other images stay at the start.
    """

    velocity: Velocity
    x: Tensor
    rows: Tensor
    start: float

    def select(self, rows: Tensor) -> _WholeBatch:
        return replace(self, rows=self.rows[rows])

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        if len(x) == len(self.x):
            return self.velocity(x, time)
        rows = send(self.rows, x.device)
        whole_time = _clock(self.x, self.start).index_copy(0, rows, time)
        return self.velocity(self.x.index_copy(0, rows, x), whole_time)[rows]


def _method(solver: str) -> Method:
    if solver == JUMPS:
        return Jumps()
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver {solver!r}; {nearest(solver, SOLVERS)}")
    return SOLVERS[solver]
