"""`latentflow sample`: a model and a request => PNG files."""

from __future__ import annotations

from pathlib import Path

from latentflow.locks import writes
from latentflow.runtime import Runtime
from latentflow.sampling.drawing import make_drawing
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
        columns: of the contact sheet; None: one per class, if they fit, else 8.

    Raises:
        ArtifactError, ConfigError: see `draw_folder` and `make_drawing`.
    """
    return draw_folder(
        out,
        model,
        lambda flow: [make_drawing(flow, request)],
        doing="sampling",
        batch_size=batch_size,
        columns=columns,
        captions=True,
        runtime=runtime,
    )
