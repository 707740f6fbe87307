"""Mask-to-image: paint a semantic map.

Legend: H and W map height and width, K classes, h and w latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable

from latentflow.data.pictures.crop import crop_map
from latentflow.model.flow_model import FlowModel
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.inputs import (
    MapInput,
    describe_inputs,
    map_fractions,
    map_indices,
    native_size,
    require_latent_pixel,
)
from latentflow.sampling.pipeline import Given, Prepared, draw_prepared
from latentflow.sampling.request import MaskToImageRequest
from latentflow.sampling.samples import Samples
from latentflow.sizes import Size


def mask_to_image(
    model: FlowModel,
    semantic_map: MapInput,
    request: MaskToImageRequest | None = None,
    *,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Samples:
    """Draw images of one semantic map, one for each seed.

    Raises:
        ConfigError, DataError: before anything is computed.
    """
    prepared = prepare_mask_to_image(model, semantic_map, request)
    return draw_prepared(model, prepared, batch_size=batch_size, on_images=on_images)


def prepare_mask_to_image(
    model: FlowModel, semantic_map: MapInput, request: MaskToImageRequest | None = None
) -> Prepared:
    """Check what `mask_to_image` is to draw."""
    request = request or MaskToImageRequest()
    model.config.conditioning.require("semantic_map")
    inputs = describe_inputs(map=semantic_map)
    indices = map_indices(model, semantic_map)
    require_latent_pixel(model, *indices.shape)
    if request.native:
        native_size(model, *indices.shape)
    else:
        indices = crop_map(indices, model.config.size_for(Size(*indices.shape)))
    drawing = make_drawing(
        model,
        request,
        task="mask-to-image",
        conditions=["semantic_map"],
        inputs=inputs,
        image_size=Size(*indices.shape),
    )
    return Prepared(drawing, lambda: Given(class_fractions=map_fractions(model, indices)))
