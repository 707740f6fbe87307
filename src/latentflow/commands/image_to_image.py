"""`latentflow image-to-image`: a model and an image => the image drawn again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentflow.commands.pictures import Pictures, require_picture_file, write_pictures
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.edits import image_to_image as redraw


def image_to_image(
    model: str | Path,
    image: str | Path,
    out: str | Path,
    *,
    num: int = 1,
    runtime: Runtime | None = None,
    **request: Any,
) -> Pictures:
    """Redraw an image once per seed; the request is that of `latentflow.sampling.edits.image_to_image`.

    Args:
        out: the PNG file; several pictures are named like it, with their seeds.

    Raises:
        ArtifactError, ConfigError, DataError: before anything is written.
    """
    require_picture_file(out, image)
    flow = FlowModel.from_pretrained(model, runtime=runtime)
    with image_progress("redrawing", num) as on_images:
        return write_pictures(redraw(flow, image, num=num, on_images=on_images, **request), out, image)
