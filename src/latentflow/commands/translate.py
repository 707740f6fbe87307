"""`latentflow translate`: a model and an image => what the model draws from it."""

from __future__ import annotations

from pathlib import Path

from latentflow.runtime import Runtime
from latentflow.sampling.named_files import Pictures, draw_to
from latentflow.sampling.request import TranslateRequest
from latentflow.sampling.translate import translate as draw_from


def translate(
    model: str | Path,
    image: str | Path,
    request: TranslateRequest,
    out: str | Path,
    *,
    batch_size: int = 16,
    runtime: Runtime | None = None,
) -> Pictures:
    """Translate an image once per seed; see `latentflow.sampling.translate.translate` and `draw_to`."""
    return draw_to(
        out,
        model,
        lambda flow, on_images: draw_from(flow, image, request, batch_size=batch_size, on_images=on_images),
        inputs=(image,),
        num=request.num,
        doing="translating",
        runtime=runtime,
    )
