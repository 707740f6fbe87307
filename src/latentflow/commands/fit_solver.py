"""`latentflow fit-solver`: solvers of few evaluations, fitted to a model and stored in its folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from latentflow.artifacts import require_writable
from latentflow.console import say
from latentflow.errors import ArtifactError
from latentflow.model.fitted_solvers import SOLVERS_FILE, write_solvers
from latentflow.model.flow_model import FlowModel, find_model
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.fit_solvers import SolverCheck, fit_solvers
from latentflow.sampling.request import FitSolverRequest


def fit_solver(request: FitSolverRequest, *, batch_size: int = 16, runtime: Runtime | None = None) -> list[SolverCheck]:
    """Fit solvers to a model, and store those that are better than the usual ones; see `fit_solvers`.

    Each is stored as soon as it is fitted, so that a repeated call goes on after the last one.

    Raises:
        ArtifactError, ConfigError: before anything is written.
    """
    if not Path(request.model).exists():
        raise ArtifactError(f"{request.model} is not a folder here; solvers are stored in a model folder")
    folder = find_model(request.model)
    require_writable(folder / SOLVERS_FILE, suffix=".json")
    model = FlowModel.from_pretrained(request.model, runtime=runtime)
    with image_progress("reference", request.num + request.held_out) as on_images:
        return fit_solvers(
            model,
            request,
            batch_size=batch_size,
            keep=partial(write_solvers, folder),
            on_images=on_images,
            on_round=lambda name, number, error: say(f"{name}, round {number}: distance {error:.3g}"),
        )
