"""`latentflow mask-to-image`: a model and a semantic map => images of it."""

from __future__ import annotations

from pathlib import Path

from latentflow.runtime import Runtime
from latentflow.sampling.mask_to_image import mask_to_image as paint_map
from latentflow.sampling.named_files import Pictures, draw_to
from latentflow.sampling.request import MaskToImageRequest


def mask_to_image(
    model: str | Path,
    semantic_map: str | Path,
    request: MaskToImageRequest,
    out: str | Path,
    *,
    batch_size: int = 16,
    runtime: Runtime | None = None,
) -> Pictures:
    """Draw a semantic map once per seed; see `latentflow.sampling.mask_to_image.mask_to_image` and `draw_to`."""
    return draw_to(
        out,
        model,
        lambda flow, on_images: paint_map(flow, semantic_map, request, batch_size=batch_size, on_images=on_images),
        inputs=(semantic_map,),
        num=request.num,
        doing="painting",
        runtime=runtime,
    )
