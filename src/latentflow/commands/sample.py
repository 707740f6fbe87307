"""`latentflow sample`: a model and a request => PNG files."""

from __future__ import annotations

from pathlib import Path

from latentflow.locks import writes
from latentflow.model.flow_model import FlowModel
from latentflow.runtime import Runtime
from latentflow.sampling.drawing import Drawing, make_drawing
from latentflow.sampling.picture_folder import DrawnFolder, draw_folder
from latentflow.sampling.request import SampleRequest


@writes("out", launch=True)
def sample(
    model: str | Path,
    request: SampleRequest,
    out: str | Path,
    *,
    batch_size: int = 16,
    columns: int | None = None,
    runtime: Runtime | None = None,
) -> DrawnFolder:
    """Draw images into a folder; see `draw_folder`.

    Under `accelerate launch` or torchrun each process draws its share of the seeds; the pictures are the same.

    Args:
        columns: of the grid; None: one per class, where they fit, or 8.

    Raises:
        ArtifactError, ConfigError: see `draw_folder` and `make_drawing`.
    """

    def plan(flow: FlowModel) -> list[Drawing]:
        return [make_drawing(flow, request)]

    return draw_folder(
        out, model, plan, doing="sampling", batch_size=batch_size, columns=columns, captions=True, runtime=runtime
    )
