"""Translate: an image to the images that a model was trained to draw from it.

Legend: H and W height and width of what is drawn, N shrinking of the input, c channels of the input, in pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentflow.console import notice
from latentflow.data.items import stack_pixels
from latentflow.data.painting.input_pixels import derived_inputs
from latentflow.data.painting.input_rules import GRAY
from latentflow.data.pictures.colour import to_rgb
from latentflow.data.pictures.crop import center_crop
from latentflow.data.pictures.user_picture import read_picture
from latentflow.errors import ConfigError, DataError
from latentflow.model.flow_model import FlowModel
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.inputs import ImageInput, describe_inputs
from latentflow.sampling.pipeline import Given, draw_all
from latentflow.sampling.request import TranslateRequest
from latentflow.sampling.samples import Samples
from latentflow.sizes import Size


def translate(
    model: FlowModel,
    image: ImageInput,
    request: TranslateRequest | None = None,
    *,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Samples:
    """Draw images of one paired image, one for each seed.

    Args:
        image: as the inputs that the model was trained on: of low resolution, gray or in colour, ...

    Raises:
        ConfigError, DataError: before anything is computed.
    """
    request = request or TranslateRequest()
    model.config.conditioning.require("input")
    inputs = describe_inputs(image=image)
    paired = read_paired(model, image, native=request.native)
    size = Size(*paired.shape[-2:]).times(model.config.inputs.shrinking)
    drawing = make_drawing(model, request, task="translate", conditions=["input"], inputs=inputs, image_size=size)
    given = Given(input=model.paired_input(paired.to(model.device)).cpu())
    return draw_all(model, drawing, given, batch_size=batch_size, on_images=on_images)


def read_paired(model: FlowModel, image: ImageInput, *, native: bool = False) -> Tensor:
    """An image as the input of a model: [1, c, H / N, W / N] uint8.

    Args:
        native: all of it at its own size; otherwise its middle, of the model's shape, at the size that the model needs.

    Raises:
        DataError: it is no image, or cannot be read.
        ConfigError: the model cannot draw the size that belongs to it.
    """
    if not isinstance(image, ImageInput):
        raise DataError(f"image {image!r:.60}: give a file or a Pillow image")
    rules = model.config.inputs
    assert rules is not None
    try:
        picture = to_rgb(image) if isinstance(image, Image.Image) else read_picture(image).planes[0]
    except ValueError as error:
        raise DataError(f"the image cannot be used: {error}") from error
    if native:
        _require_native(model, picture)
        pixels = stack_pixels([np.asarray(picture)])
    else:
        pixels = _middle(model, picture)
    return derived_inputs(pixels, rules) if rules.origin == GRAY else pixels


def _middle(model: FlowModel, picture: Image.Image) -> Tensor:
    rules, size = model.config.inputs, model.config.size_for(Size(picture.height, picture.width))
    seen = rules.size(size)
    if rules.shrinking > 1 and picture.width > seen.width and picture.height > seen.height:
        notice(
            f"the image of {picture.width} x {picture.height} pixels is reduced to {seen.words}, from which this "
            f"model draws {size.words}; use --native to keep all of its pixels"
        )
    try:
        return stack_pixels([center_crop(picture, seen)])
    except ValueError as error:
        raise DataError(f"the image cannot be used: {error}") from error


def _require_native(model: FlowModel, picture: Image.Image) -> None:
    """Refuse a size that the model cannot draw from; names the nearest that it can."""
    shrinking, multiple = model.config.inputs.shrinking, model.config.pixel_multiple
    if any(side * shrinking % multiple for side in picture.size):
        step = torch.lcm(torch.tensor(shrinking), torch.tensor(multiple)).item() // shrinking
        near = " x ".join(str(max(round(side / step), 1) * step) for side in picture.size)
        raise ConfigError(
            f"{picture.width} x {picture.height} pixels cannot be translated at native size: both sides must be "
            f"multiples of {step}; resize to {near}, or leave out the native size"
        )
