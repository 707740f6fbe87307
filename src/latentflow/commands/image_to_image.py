"""`latentflow image-to-image`: a model and an image => the image drawn again."""

from __future__ import annotations

from pathlib import Path

from latentflow.runtime import Runtime
from latentflow.sampling.edits import image_to_image as redraw
from latentflow.sampling.named_files import Pictures, draw_to
from latentflow.sampling.request import ImageToImageRequest


def image_to_image(
    model: str | Path,
    image: str | Path,
    request: ImageToImageRequest,
    out: str | Path,
    *,
    batch_size: int = 16,
    runtime: Runtime | None = None,
) -> Pictures:
    """Redraw an image once per seed; see `latentflow.sampling.edits.image_to_image` and `draw_to`."""
    return draw_to(
        out,
        model,
        lambda flow, on_images: redraw(flow, image, request, batch_size=batch_size, on_images=on_images),
        inputs=(image,),
        num=request.num,
        doing="redrawing",
        runtime=runtime,
    )
