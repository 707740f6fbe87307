"""`latentflow fit-solver`: solvers of few evaluations, fitted to a model and stored in its folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from latentflow.artifacts import require_writable
from latentflow.console import say
from latentflow.errors import ArtifactError
from latentflow.evaluation.encoded_images import open_images_for
from latentflow.locks import writes
from latentflow.model.fitted_solvers import SOLVERS_FILE, write_solvers
from latentflow.model.flow_model import FlowModel, find_model
from latentflow.model.snapshots import run_of
from latentflow.progress import image_progress
from latentflow.requests import RequestError
from latentflow.runtime import Runtime
from latentflow.sampling.fit_solvers import SolverCheck, fit_solvers
from latentflow.sampling.request import FitSolverRequest
from latentflow.sampling.row_conditions import RowConditions, row_conditions


@writes(lambda given: run_of(given["request"].model) if Path(given["request"].model).exists() else None)
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
    rows = _rows(model, request)
    with image_progress("reference", request.num + request.held_out) as on_images:
        return fit_solvers(
            model,
            request,
            rows=rows,
            batch_size=batch_size,
            keep=partial(write_solvers, folder),
            on_images=on_images,
            on_round=lambda name, number, error: say(f"{name}, round {number}: distance {error:.3g}"),
        )


def _rows(model: FlowModel, request: FitSolverRequest) -> RowConditions | None:
    """The conditions of the images that the request names, in a random order; None: it names none."""
    conditioning = model.config.conditioning
    if request.data is None:
        for one in conditioning.columns:
            if one.name in conditioning.required:
                raise RequestError(
                    "data", f": this model requires the condition {one.name}; give images whose conditions are drawn"
                )
        return None
    if not conditioning.num_classes and not conditioning.columns:
        reason = f" {request.data} has no effect: the model knows no classes and no named columns; remove it"
        raise RequestError("data", reason)
    source = open_images_for(model, request.data)
    every, labels = range(len(source)), None
    if conditioning.num_classes and source.class_names:
        labels = torch.tensor([source.label(row) for row in every])
    rows = row_conditions(conditioning, source, every, labels, request.seed)
    if not rows.told:
        raise RequestError("data", f" {request.data}: these images have no labels and no named columns; give others")
    return rows
