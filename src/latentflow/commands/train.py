"""`latentflow train`: a recipe => a run folder with a model in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from latentflow.console import notice
from latentflow.errors import ConfigError
from latentflow.locks import writes
from latentflow.model.flow_model import FlowModel
from latentflow.runtime import Runtime
from latentflow.sampling.drawing import check_drawing
from latentflow.sampling.preview import preview_drawing, save_preview
from latentflow.training.config import Recipe
from latentflow.training.held_out_watch import BestWeights, read_best
from latentflow.training.interruption import Outcome
from latentflow.training.loop import micro_batches
from latentflow.training.memorisation_onset import memorisation_warning
from latentflow.training.velocity import train_velocity
from latentflow.training.velocity_run import PreparedVelocity, prepare_velocity


@dataclass(frozen=True)
class TrainResult:
    """What `train` did.

    Attributes:
        run: the run folder.
        outcome: of the loop.
        broken: names of images that could not be read.
        best: when the loss on held-out images was lowest; None: nothing was held out or measured.
    """

    run: Path
    outcome: Outcome
    broken: list[str]
    best: BestWeights | None


@writes(lambda given: given["recipe"].out, launch=True)
def train(
    recipe: Recipe,
    *,
    allow_change: Sequence[str] = (),
    on_prepared: Callable[[PreparedVelocity], None] = lambda prepared: None,
    runtime: Runtime | None = None,
) -> TrainResult:
    """Train one recipe. Repeat the call to resume exactly.

    Everything that can be wrong is found before the run folder is touched.

    Args:
        recipe: checked; `out` and `data.path` must be set.
        allow_change: keys of the recipe that may differ from the run's although they change what is computed.
        on_prepared: called once everything has been checked.
        runtime: where to train; the recipe decides the precision.

    Raises:
        ConfigError, DataError, ArtifactError: before anything is written.
        NonFiniteError: during training.
    """
    assert runtime is not None  # opened by `writes`
    prepared = prepare(recipe, runtime, allow_change=allow_change)
    on_prepared(prepared)
    recipe, runtime, images = prepared.recipe, prepared.runtime, prepared.images
    if runtime.is_main:
        prepared.begin()
    held_out = prepared.held_out
    if prepared.resident:
        images.hold(runtime.device)
        if held_out is not None:
            held_out.held = images.held  # which holds every image of the cache
    batch_size = micro_batches(recipe.training, runtime).size

    def preview(model: FlowModel, weights: Mapping[str, Tensor], step: int) -> None:
        file = prepared.run / "samples" / f"step-{step:08d}.png"
        save_preview(model, weights, images, file, runtime, batch_size)

    outcome = train_velocity(recipe, prepared.model, images, prepared.run, runtime, held_out=held_out, preview=preview)
    best = read_best(prepared.run) if held_out is not None else None
    return TrainResult(prepared.run, outcome, prepared.broken, best)


def prepare(recipe: Recipe, runtime: Runtime, *, allow_change: Sequence[str] = ()) -> PreparedVelocity:
    """Decide what a recipe leaves open and check all of it, previews included; nothing is written.

    Raises:
        ConfigError, DataError, ArtifactError: see `train`.
    """
    prepared = prepare_velocity(recipe, runtime, allow_change=allow_change)
    _check_preview(prepared.recipe, prepared.model)
    if warning := memorisation_warning(prepared.recipe.training.steps, len(prepared.images)):
        notice(warning)
    return prepared


def _check_preview(recipe: Recipe, model: FlowModel) -> None:
    """Refuse guidance, solvers and conditions with which no preview could be drawn."""
    conditioning, scale = model.config.conditioning, recipe.sampling.guidance
    if scale != 1 and recipe.sampling.guide is None and not conditioning.can_guide:
        why, other = f"{recipe.data.path} has no labels, so there is no condition to strengthen", ""
        if conditioning.kinds:
            key = next(iter(conditioning.kinds.values())).dropout_key
            why, other = (
                f"conditioning.{key} = 0: there is no unconditional branch to guide away from",
                f" or raise {key}",
            )
        raise ConfigError(f"sampling.guidance = {scale:g}, but {why}; add sampling.guidance=1{other}")
    check_drawing(model, preview_drawing(model.config, model.runtime.precision))
