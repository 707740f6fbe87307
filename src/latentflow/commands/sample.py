"""`latentflow sample`: a model and a request => PNG files."""

from __future__ import annotations

from pathlib import Path

from latentflow.locks import writes
from latentflow.model.class_names import ClassList
from latentflow.model.flow_model import FlowModel
from latentflow.runtime import Runtime
from latentflow.sampling.picture_folder import DrawnFolder, draw_folder
from latentflow.sampling.request import SampleRequest, make_request


@writes("out", launch=True)
def sample(
    model: str | Path,
    out: str | Path,
    *,
    num: int = 16,
    classes: ClassList | None = None,
    seed: int = 0,
    batch_size: int = 16,
    columns: int | None = None,
    runtime: Runtime | None = None,
    **preset: object,
) -> DrawnFolder:
    """Draw images into a folder; see `draw_folder`.

    Under `accelerate launch` or torchrun each process draws its share of the seeds; the pictures are the same.

    Args:
        preset: what differs from the model's sampling preset: solver, steps, guidance, guidance_interval, ...
        columns: of the grid; None: one per class, where they fit, or 8.

    Raises:
        ArtifactError, ConfigError: see `draw_folder` and `make_request`.
    """

    def plan(flow: FlowModel) -> list[SampleRequest]:
        return [make_request(flow, num=num, classes=classes, seed=seed, **preset)]

    return draw_folder(
        out, model, plan, doing="sampling", batch_size=batch_size, columns=columns, captions=True, runtime=runtime
    )
