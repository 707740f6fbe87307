"""Solvers fitted to a model: a few evaluations that end where a fine solution ends, checked on held-out seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from latentflow.flow.solver_fit import FitBatch, end_error, fit_multistep
from latentflow.flow.solvers import expected_evaluations, integrate
from latentflow.flow.times import sampling_times
from latentflow.model.fitted_solvers import FittedSolver, FittedSolvers
from latentflow.model.flow_model import FlowModel
from latentflow.sampling.captured_calls import calls_for
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.pipeline import Given, conditioned_velocity, initial_noise
from latentflow.sampling.request import FitSolverRequest, SampleRequest
from latentflow.sampling.row_conditions import RowConditions, drawing_of_rows

REFERENCE_SOLVER = "ab4"
RIVALS = ("euler", "ab2", "ab3", "ab4")
"""Solvers that a fitted one has to beat with as many evaluations."""


@dataclass(frozen=True)
class SolverCheck:
    """A fitted solver on held-out seeds.

    Attributes:
        name: fitted-N.
        error: its mean distance from the end points of the reference, in units of their root mean square.
        others: the same of `RIVALS` with as many evaluations, by name.
        is_kept: whether it is better than all of them, and therefore stored.
        rounds: of the fit; 0: it was there already.
        seconds: of the fit.
    """

    name: str
    error: float
    others: dict[str, float]
    is_kept: bool
    rounds: int
    seconds: float

    @property
    def best_other(self) -> str:
        return min(self.others, key=self.others.__getitem__)


@torch.inference_mode()
def fit_solvers(
    model: FlowModel,
    request: FitSolverRequest,
    *,
    rows: RowConditions | None = None,
    batch_size: int = 16,
    keep: Callable[[FittedSolvers], None] = lambda solvers: None,
    on_images: Callable[[int], None] = lambda num_images: None,
    on_round: Callable[[str, int, float], None] = lambda name, number, error: None,
) -> list[SolverCheck]:
    """Fit a solver for each number of evaluations, with the classes and the guidance that the model is sampled with.

    Those that beat every one of `RIVALS` on held-out seeds are added to `model.fitted_solvers`. A solver that was
    fitted to the same weights in the same way is not fitted again.

    Args:
        rows: the conditions of the images; None: classes in turn, and no named conditions.
        batch_size: images computed together.
        keep: called with all solvers of the model whenever one is added.
        on_images: called with the number of images whose reference was just computed.
        on_round: called after each round of a fit with the name of the solver, the number and the error so far.

    Raises:
        ConfigError: the model cannot be sampled from seeds, or cannot be guided.
    """
    drawing, given = _drawing(model, request, rows)
    fitted_with = _fitted_with(drawing, request) | ({} if rows is None else {"rows": rows.digest})
    if model.fitted_solvers.weights != model.weights_hash:
        model.fitted_solvers = FittedSolvers(weights=model.weights_hash)
    batches: tuple[list[FitBatch], list[FitBatch]] | None = None
    checks = []
    for number in request.evaluations:
        name = f"fitted-{number}"
        there = model.fitted_solvers.solvers.get(name)
        if there is not None and there.fitted_with == fitted_with:
            checks.append(SolverCheck(name, there.error, there.others, True, 0, 0.0))
            continue
        if batches is None:
            every = _batches(model, drawing, given, request, batch_size, on_images)
            batches = [next(every) for _ in range(-(-request.num // batch_size))], list(every)
        began, shift = time.perf_counter(), drawing.sampling.shift
        fit = fit_multistep(batches[0], number, shift=shift, on_round=partial(on_round, name))
        found = FittedSolver(
            times=list(fit.solver.times),
            weights=[list(row) for row in fit.solver.weights],
            fitted_with=fitted_with,
            error=end_error(batches[1], fit.solver),
            others=_errors_of_others(model, batches[1], number, shift),
        )
        is_kept = found.error < min(found.others.values())
        seconds = time.perf_counter() - began
        checks.append(SolverCheck(name, found.error, found.others, is_kept, fit.rounds, seconds))
        if is_kept:
            solvers = {**model.fitted_solvers.solvers, name: found}
            model.fitted_solvers = model.fitted_solvers.model_copy(update={"solvers": solvers})
            keep(model.fitted_solvers)
    return checks


def _drawing(model: FlowModel, request: FitSolverRequest, rows: RowConditions | None) -> tuple[Drawing, Given]:
    """All images, those of the fit first; in float32, since differences of small changes are taken."""
    every = SampleRequest(
        num=request.num + request.held_out,
        seed=request.seed,
        guidance=request.guidance,
        guide=request.guide,
        solver=REFERENCE_SOLVER,
        steps=request.reference_steps,
    )
    drawing, given = drawing_of_rows(model, every, rows)
    return drawing.model_copy(update={"precision": "fp32"}), given


def _fitted_with(drawing: Drawing, request: FitSolverRequest) -> dict[str, Any]:
    names = ("guidance", "guidance_interval", "guided_by", "guided_channels", "guide", "shift")
    own = ("num", "held_out", "seed", "reference_steps")
    return drawing.sampling.model_dump(mode="json", include=set(names)) | request.model_dump(include=set(own))


def _batches(
    model: FlowModel,
    drawing: Drawing,
    given: Given,
    request: FitSolverRequest,
    batch_size: int,
    on_images: Callable[[int], None],
) -> Iterator[FitBatch]:
    """The images of the fit, and then the held-out ones, with the end points of the reference."""
    times = sampling_times(request.reference_steps, drawing.sampling.shift)
    total = request.num + request.held_out
    starts = [*range(0, request.num, batch_size), *range(request.num, total, batch_size)]
    calls = calls_for(model.device, drawing)
    for start, stop in zip(starts, [*starts[1:], total], strict=True):
        some = slice(start, stop)
        part = drawing.at(some)
        noise = initial_noise(model, part)
        velocity = conditioned_velocity(model, part, given.at(some).on(model.device, len(noise)), noise.shape, calls)
        ends = integrate(velocity, noise, times, solver=REFERENCE_SOLVER).x
        on_images(stop - start)
        yield FitBatch(velocity, noise, ends)


def _errors_of_others(model: FlowModel, batches: list[FitBatch], evaluations: int, shift: float) -> dict[str, float]:
    """The errors of the usual solvers with as many evaluations, where they can have as many."""
    errors = {}
    for solver in RIVALS:
        extra = int(expected_evaluations(solver, evaluations, 1.0)) - evaluations
        steps = evaluations - extra
        if steps >= 1 and expected_evaluations(solver, steps, 1.0) == evaluations:
            errors[solver] = end_error(batches, solver, sampling_times(steps, shift), path=model.config.path)
    return errors
