"""`latentflow inpaint`: a model, an image and a mask => the image with its hole filled."""

from __future__ import annotations

from pathlib import Path

from latentflow.runtime import Runtime
from latentflow.sampling.inpaint import inpaint as fill_hole
from latentflow.sampling.named_files import Pictures, draw_to
from latentflow.sampling.request import InpaintRequest


def inpaint(
    model: str | Path,
    image: str | Path,
    mask: str | Path,
    request: InpaintRequest,
    out: str | Path,
    *,
    semantic_map: str | Path | None = None,
    batch_size: int = 4,
    runtime: Runtime | None = None,
) -> Pictures:
    """Fill the hole of an image once per seed; see `latentflow.sampling.inpaint.inpaint` and `draw_to`."""
    return draw_to(
        out,
        model,
        lambda flow, on_images: fill_hole(
            flow, image, mask, request, semantic_map=semantic_map, batch_size=batch_size, on_images=on_images
        ),
        inputs=(image, mask, semantic_map),
        num=request.num,
        doing="inpainting",
        keeps_form=True,
        runtime=runtime,
    )
