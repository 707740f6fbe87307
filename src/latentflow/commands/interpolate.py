"""`latentflow interpolate`: a model, two seeds and perhaps two classes => the frames between them."""

from __future__ import annotations

from pathlib import Path

from latentflow.locks import writes
from latentflow.runtime import Runtime
from latentflow.sampling.edits import interpolation
from latentflow.sampling.picture_folder import GRID_IMAGES, DrawnFolder, draw_folder
from latentflow.sampling.request import InterpolateRequest


@writes("out")
def interpolate(
    model: str | Path,
    request: InterpolateRequest,
    out: str | Path,
    *,
    batch_size: int = 16,
    runtime: Runtime | None = None,
) -> DrawnFolder:
    """Draw the frames of an interpolation; see `latentflow.sampling.edits.interpolation` and `draw_folder`."""
    return draw_folder(
        out,
        model,
        lambda flow: [interpolation(flow, request)],
        doing="interpolating",
        batch_size=batch_size,
        columns=min(request.num, GRID_IMAGES),
        runtime=runtime,
    )
