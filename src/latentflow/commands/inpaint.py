"""`latentflow inpaint`: a model, an image and a mask => the image with its hole filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentflow.model.flow_model import FlowModel
from latentflow.runtime import Runtime
from latentflow.sampling.inpaint import inpaint as fill_hole
from latentflow.sampling.named_files import Pictures, draw_to
from latentflow.sampling.samples import Samples


def inpaint(
    model: str | Path,
    image: str | Path,
    mask: str | Path,
    out: str | Path,
    *,
    num: int = 1,
    runtime: Runtime | None = None,
    **request: Any,
) -> Pictures:
    """Fill the hole of an image once per seed; see `latentflow.sampling.inpaint.inpaint` and `draw_to`."""

    def draw(flow: FlowModel, on_images: Callable[[int], None]) -> Samples:
        return fill_hole(flow, image, mask, num=num, on_images=on_images, **request)

    inputs = (image, mask, request.get("semantic_map"))
    return draw_to(out, model, draw, inputs=inputs, num=num, doing="inpainting", runtime=runtime)
