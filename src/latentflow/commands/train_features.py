"""`latentflow train-features`: images => the folder of a judge, whose features and classes images are compared by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latentflow.evaluation.judge_making import make_judge
from latentflow.locks import writes
from latentflow.metrics.features.judge_folder import JudgeRecord, read_judge
from latentflow.metrics.names import is_judge
from latentflow.runtime import Runtime
from latentflow.training.feature_run import PreparedFeatures, prepare_features, train_feature_network
from latentflow.training.interruption import Outcome
from latentflow.training.request import TrainFeaturesRequest


@dataclass(frozen=True)
class FeaturesResult:
    """What `train_features` did.

    Attributes:
        folder: of the judge.
        outcome: of the loop.
        record: of the judge; None where a signal ended the run early, and in all but the first of several processes.
    """

    folder: Path
    outcome: Outcome
    broken: list[str]
    record: JudgeRecord | None


@writes(lambda given: given["request"].out, launch=True)
def train_features(
    request: TrainFeaturesRequest,
    *,
    on_prepared: Callable[[PreparedFeatures], None] = lambda prepared: None,
    runtime: Runtime | None = None,
) -> FeaturesResult:
    """Train a judge on images. Repeat the call to resume exactly; a finished judge stays as it is.

    Args:
        on_prepared: called once everything has been checked.

    Raises:
        ArtifactError, ConfigError, DataError: before anything is written.
        NonFiniteError: during training.
    """
    assert runtime is not None  # opened by `writes`
    prepared = prepare_features(request, runtime)
    on_prepared(prepared)
    folder = Path(request.out)
    if is_judge(str(folder)):
        steps = prepared.plan.steps
        return FeaturesResult(folder, Outcome(steps, finished=True), prepared.broken, read_judge(folder))
    if runtime.is_main:
        prepared.begin()
    outcome, record = train_feature_network(prepared), None
    if outcome.finished:
        if runtime.is_main:
            record = make_judge(prepared)
        runtime.barrier()  # the judge is there when any process returns
    return FeaturesResult(folder, outcome, prepared.broken, record)
