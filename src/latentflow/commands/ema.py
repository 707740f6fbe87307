"""`latentflow ema`: a run that has kept averages => a model with an average of another length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentflow.artifacts import require_new
from latentflow.locks import writes
from latentflow.model.flow_model import FlowModel
from latentflow.requests import RequestError
from latentflow.training.averaging import Combination
from latentflow.training.kept_averages import open_averages
from latentflow.training.request import EmaRequest


@dataclass(frozen=True)
class EmaResult:
    """What `ema` wrote.

    Attributes:
        model: the model folder.
        combination: of the averages that the run had kept.
        spanned: the shortest and the longest length around this one that they make at this step.
    """

    model: Path
    combination: Combination
    spanned: tuple[float, float]


@writes(lambda given: given["request"].out or given["request"].run)
def ema(request: EmaRequest) -> EmaResult:
    """Write a model whose weights are the average of a length, made of what the run has kept.

    Raises:
        ArtifactError: no such run, it has kept no averages, a file is damaged, or the folder is not empty.
        RequestError: a length or a step that what it has kept does not span. Nothing is written.
    """
    return write_average(request)


def write_average(request: EmaRequest) -> EmaResult:
    """`ema` for a caller that holds the lock."""
    run = Path(request.run)
    kept = open_averages(run)
    if request.out is not None:
        require_new(request.out)
    if request.step is not None and request.step not in kept.steps:
        nearest = min(kept.steps, key=lambda step: abs(step - request.step))
        raise RequestError("step", f" {request.step}: {run} has kept no average of it; the nearest is {nearest}")
    if reason := kept.why_not(request.length, request.step):
        raise RequestError("length", reason)
    made, flow = kept.reconstruct(request.length, request.step), FlowModel.from_pretrained(run, device="cpu")
    flow.config = flow.config.model_copy(update={"training": made.record(flow.config.training)})
    folder = request.out or run / "model"
    flow.save_pretrained(folder, weights=made.weights(flow.config))
    return EmaResult(folder, made.combination, made.spanned)
