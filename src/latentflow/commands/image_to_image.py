"""`latentflow image-to-image`: a model and an image => the image drawn again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentflow.model.flow_model import FlowModel
from latentflow.runtime import Runtime
from latentflow.sampling.edits import image_to_image as redraw
from latentflow.sampling.named_files import Pictures, draw_to
from latentflow.sampling.samples import Samples


def image_to_image(
    model: str | Path,
    image: str | Path,
    out: str | Path,
    *,
    num: int = 1,
    runtime: Runtime | None = None,
    **request: Any,
) -> Pictures:
    """Redraw an image once per seed; see `latentflow.sampling.edits.image_to_image` and `draw_to`."""

    def draw(flow: FlowModel, on_images: Callable[[int], None]) -> Samples:
        return redraw(flow, image, num=num, on_images=on_images, **request)

    return draw_to(out, model, draw, inputs=(image,), num=num, doing="redrawing", runtime=runtime)
