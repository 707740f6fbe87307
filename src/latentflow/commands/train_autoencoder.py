"""`latentflow train-autoencoder`: a recipe => a run folder with a first stage in it, in diffusers' own layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentflow.locks import writes
from latentflow.metrics.features.judge_folder import load_judge
from latentflow.runtime import Runtime, open_runtime
from latentflow.sampling.contact_sheet import save_grid
from latentflow.training.first_stage import AutoencoderRecipe, train_first_stage
from latentflow.training.first_stage_run import (
    AutoencoderReport,
    OpenedJudge,
    PreparedFirstStage,
    finish,
    prepare_first_stage,
)
from latentflow.training.interruption import Outcome

_PICTURED = 8


@dataclass(frozen=True)
class AutoencoderResult:
    """What `train_autoencoder` did.

    Attributes:
        run: the run folder.
        outcome: of the loop.
        broken: names of images that could not be read.
        report: None where a signal ended the run early.
    """

    run: Path
    outcome: Outcome
    broken: list[str]
    report: AutoencoderReport | None


def prepare_autoencoder(
    recipe: AutoencoderRecipe, runtime: Runtime, *, allow_change: Sequence[str] = ()
) -> PreparedFirstStage:
    """Check a recipe, the judge and the data that it names; nothing is written. See `prepare_first_stage`."""
    judge = None
    if recipe.loss.perceptual_weight:
        record, opened = load_judge(recipe.loss.judge)
        judge = OpenedJudge(opened.network, record.hash)
    return prepare_first_stage(recipe, runtime, judge=judge, allow_change=allow_change)


@writes(lambda given: given["recipe"].out)
def train_autoencoder(
    recipe: AutoencoderRecipe,
    *,
    allow_change: Sequence[str] = (),
    on_prepared: Callable[[PreparedFirstStage], None] = lambda prepared: None,
    runtime: Runtime | None = None,
) -> AutoencoderResult:
    """Train an autoencoder, scale its latents to unit variance, measure and save it. Repeat the call to resume exactly.

    Everything that can be wrong is found before the run folder is touched. In the end the run folder also holds
    `reconstructions.png`, held-out images above their reconstructions.

    Args:
        recipe: checked; `out` and `data.path` must be set.
        allow_change: keys of the recipe that may differ from the run's although they change what is computed.
        on_prepared: called once everything has been checked.
        runtime: where to train; the recipe decides the precision. None: see `open_runtime`.

    Raises:
        ConfigError, DataError, ArtifactError: before anything is written.
        NonFiniteError: during training.
    """
    prepared = prepare_autoencoder(recipe, runtime or open_runtime(alone=True), allow_change=allow_change)
    on_prepared(prepared)
    prepared.begin()
    recipe, run = prepared.recipe, prepared.run
    judge = prepared.judge and prepared.judge.network
    outcome = train_first_stage(recipe, prepared.network, prepared.images, run, prepared.runtime, judge)
    report = None
    if outcome.finished:
        report, pictures = finish(prepared, outcome.step)
        shown = pictures[:, :_PICTURED]
        save_grid(run / "reconstructions.png", shown.flatten(0, 1), columns=shown.shape[1])
    return AutoencoderResult(run, outcome, prepared.broken, report)
