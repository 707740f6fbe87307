"""`latentflow mask-to-image`: a model and a semantic map => pictures of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentflow.commands.pictures import Pictures, require_picture_file, write_pictures
from latentflow.model.flow_model import FlowModel
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.mask_to_image import mask_to_image as paint_map


def mask_to_image(
    model: str | Path,
    semantic_map: str | Path,
    out: str | Path,
    *,
    num: int = 1,
    runtime: Runtime | None = None,
    **request: Any,
) -> Pictures:
    """Paint a semantic map once per seed; the request is that of `latentflow.sampling.mask_to_image.mask_to_image`.

    Args:
        out: the PNG file; several pictures are named like it, with their seeds.

    Raises:
        ArtifactError, ConfigError, DataError: before anything is written.
    """
    require_picture_file(out, semantic_map)
    flow = FlowModel.from_pretrained(model, runtime=runtime)
    with image_progress("painting", num) as on_images:
        return write_pictures(paint_map(flow, semantic_map, num=num, on_images=on_images, **request), out, semantic_map)
