"""`latentflow vary`: a model and a seed => its picture and variations of it."""

from __future__ import annotations

from pathlib import Path

from latentflow.locks import writes
from latentflow.runtime import Runtime
from latentflow.sampling.edits import variations
from latentflow.sampling.picture_folder import DrawnFolder, draw_folder
from latentflow.sampling.request import VaryRequest


@writes("out")
def vary(
    model: str | Path,
    request: VaryRequest,
    out: str | Path,
    *,
    batch_size: int = 16,
    runtime: Runtime | None = None,
) -> DrawnFolder:
    """Draw the picture of a seed, then variations of it; see `latentflow.sampling.edits.variations` and `draw_folder`.

    Returns:
        The folder; its first file is the picture of the seed.
    """
    return draw_folder(
        out,
        model,
        lambda flow: variations(flow, request),
        doing="varying",
        batch_size=batch_size,
        columns=min(request.num + 1, 9),
        runtime=runtime,
    )
