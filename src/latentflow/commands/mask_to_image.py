"""`latentflow mask-to-image`: a model and a semantic map => pictures of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentflow.model.flow_model import FlowModel
from latentflow.runtime import Runtime
from latentflow.sampling.mask_to_image import mask_to_image as paint_map
from latentflow.sampling.named_files import Pictures, draw_to
from latentflow.sampling.samples import Samples


def mask_to_image(
    model: str | Path,
    semantic_map: str | Path,
    out: str | Path,
    *,
    num: int = 1,
    runtime: Runtime | None = None,
    **request: Any,
) -> Pictures:
    """Paint a semantic map once per seed; see `latentflow.sampling.mask_to_image.mask_to_image` and `draw_to`."""

    def draw(flow: FlowModel, on_images: Callable[[int], None]) -> Samples:
        return paint_map(flow, semantic_map, num=num, on_images=on_images, **request)

    return draw_to(out, model, draw, inputs=(semantic_map,), num=num, doing="painting", runtime=runtime)
