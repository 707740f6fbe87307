"""Mask-to-image: paint a semantic map.

Legend: H and W map height and width, S size of the training images, K classes, h and w latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from latentflow.data.pictures.crop import crop_map
from latentflow.model.class_names import ClassList
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
from latentflow.sampling.pipeline import Given, draw_all
from latentflow.sampling.request import SampleRequest
from latentflow.sampling.samples import Samples


def mask_to_image(
    model: FlowModel,
    semantic_map: MapInput,
    *,
    num: int = 1,
    classes: ClassList | None = None,
    seed: int = 0,
    native: bool = False,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda num_images: None,
    **preset: Any,
) -> Samples:
    """Paint one semantic map, once for each of `num` seeds.

    Args:
        classes: as for `make_drawing`; None: no label.
        native: draw at the size of the map, whose sides must be multiples of what the network needs; otherwise the
            square middle of the map is scaled to the size of the training images, as in training.
        preset: fields of `SamplingPreset`.

    Raises:
        ConfigError, DataError: before anything is computed.
    """
    model.config.conditioning.require("semantic_map")
    inputs = describe_inputs(map=semantic_map)
    indices = map_indices(model, semantic_map)
    require_latent_pixel(model, *indices.shape)
    if native:
        native_size(model, *indices.shape)
    else:
        indices = crop_map(indices, model.config.image_size)
    request = make_drawing(
        model,
        SampleRequest(num=num, classes=classes, seed=seed, **preset),
        task="mask-to-image",
        told=["semantic_map"],
        inputs=inputs,
        image_size=indices.shape,
    )
    given = Given(class_fractions=map_fractions(model, indices))
    return draw_all(model, request, given, batch_size=batch_size, on_images=on_images)
