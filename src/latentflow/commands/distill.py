"""`latentflow distill`: a model and images => a run folder with its student in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from latentflow.locks import writes
from latentflow.model.flow_model import FlowModel
from latentflow.runtime import Runtime
from latentflow.sampling.drawing import check_drawing
from latentflow.sampling.preview import preview_drawing, save_preview
from latentflow.training.interruption import Outcome
from latentflow.training.loop import micro_batches
from latentflow.training.student_recipe import StudentRecipe
from latentflow.training.student_run import PreparedStudent, prepare_student, train_student


@dataclass(frozen=True)
class DistillResult:
    """What `distill` did.

    Attributes:
        run: the run folder.
        outcome: of the loop.
        broken: names of images that could not be read.
    """

    run: Path
    outcome: Outcome
    broken: list[str]


@writes(lambda given: given["recipe"].out, launch=True)
def distill(
    recipe: StudentRecipe,
    *,
    allow_change: Sequence[str] = (),
    on_prepared: Callable[[PreparedStudent], None] = lambda prepared: None,
    runtime: Runtime | None = None,
) -> DistillResult:
    """Train a student of a model. Repeat the call to resume exactly.

    Everything that can be wrong is found before the run folder is touched.

    Args:
        recipe: checked; `teacher`, `out` and `data.path` must be set.
        allow_change: keys of the recipe that may differ from the run's although they change what is computed.
        on_prepared: called once everything has been checked.
        runtime: where to train; the recipe decides the precision.

    Raises:
        ConfigError, DataError, ArtifactError: before anything is written.
        NonFiniteError: during training.
    """
    assert runtime is not None  # opened by `writes`
    prepared = prepare_distillation(recipe, runtime, allow_change=allow_change)
    on_prepared(prepared)
    runtime, images = prepared.runtime, prepared.images
    if runtime.is_main:
        prepared.begin()
    if prepared.resident:
        images.hold(runtime.device)
    batch_size = micro_batches(prepared.recipe.training, runtime).size

    def preview(model: FlowModel, weights: Mapping[str, Tensor], step: int) -> None:
        file = prepared.run / "samples" / f"step-{step:08d}.png"
        save_preview(model, weights, images, file, runtime, batch_size)

    outcome = train_student(prepared, preview=preview)
    return DistillResult(prepared.run, outcome, prepared.broken)


def prepare_distillation(
    recipe: StudentRecipe, runtime: Runtime, *, allow_change: Sequence[str] = ()
) -> PreparedStudent:
    """Decide what a recipe leaves open and check all of it, previews included; nothing is written.

    Raises:
        ConfigError, DataError, ArtifactError: see `distill`.
    """
    prepared = prepare_student(recipe, runtime, allow_change=allow_change)
    check_drawing(prepared.model, preview_drawing(prepared.model.config, prepared.runtime.precision))
    return prepared
