"""`latentflow vary`: a model and a seed => its picture and others near it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentflow.locks import writes
from latentflow.model.class_names import ClassList
from latentflow.model.flow_model import FlowModel
from latentflow.runtime import Runtime
from latentflow.sampling.drawing import Drawing, make_drawing
from latentflow.sampling.edits import variations
from latentflow.sampling.inputs import at_most_one
from latentflow.sampling.picture_folder import DrawnFolder, draw_folder
from latentflow.sampling.request import SampleRequest


@writes("out")
def vary(
    model: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    num: int = 8,
    amount: float = 0.3,
    classes: ClassList | None = None,
    batch_size: int = 16,
    runtime: Runtime | None = None,
    **preset: Any,
) -> DrawnFolder:
    """Draw the picture of a seed, then variations of it; see `latentflow.sampling.edits.variations` and `draw_folder`.

    Returns:
        The folder; its first file is the picture of the seed.
    """

    def plan(flow: FlowModel) -> list[Drawing]:
        original = make_drawing(flow, SampleRequest(num=1, classes=at_most_one(flow, classes), seed=seed, **preset))
        return [original, variations(flow, seed=seed, num=num, amount=amount, classes=classes, **preset)]

    columns = min(num + 1, 9)
    return draw_folder(out, model, plan, doing="varying", batch_size=batch_size, columns=columns, runtime=runtime)
