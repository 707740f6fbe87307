"""`latentflow interpolate`: a model, two seeds and perhaps two classes => the frames between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentflow.locks import writes
from latentflow.model.flow_model import FlowModel
from latentflow.runtime import Runtime
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.edits import interpolation
from latentflow.sampling.picture_folder import GRID_IMAGES, DrawnFolder, draw_folder


@writes("out")
def interpolate(
    model: str | Path,
    out: str | Path,
    *,
    num: int = 9,
    batch_size: int = 16,
    runtime: Runtime | None = None,
    **request: Any,
) -> DrawnFolder:
    """Draw the frames of an interpolation; see `latentflow.sampling.edits.interpolation` and `draw_folder`."""

    def plan(flow: FlowModel) -> list[Drawing]:
        return [interpolation(flow, num=num, **request)]

    columns = min(num, GRID_IMAGES)
    return draw_folder(out, model, plan, doing="interpolating", batch_size=batch_size, columns=columns, runtime=runtime)
