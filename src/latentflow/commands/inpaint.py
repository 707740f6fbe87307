"""`latentflow inpaint`: a model, an image and a mask => the image with its hole filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentflow.commands.pictures import Pictures, require_picture_file, write_pictures
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.inpaint import inpaint as fill_hole


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
    """Fill the hole of an image once per seed; the request is that of `latentflow.sampling.inpaint.inpaint`.

    Args:
        out: the PNG file; several pictures are named like it, with their seeds.

    Raises:
        ArtifactError, ConfigError, DataError: before anything is written.
    """
    inputs = [file for file in (image, mask, request.get("semantic_map")) if file is not None]
    require_picture_file(out, *inputs)
    flow = FlowModel.from_pretrained(model, runtime=runtime)
    with image_progress("inpainting", num) as on_images:
        return write_pictures(fill_hole(flow, image, mask, num=num, on_images=on_images, **request), out, *inputs)
