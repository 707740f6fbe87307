"""Translate: an image to the images that a model was trained to draw from it.

Legend: H and W height and width of what is drawn, N shrinking of the input, c channels of the input, in pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentflow.console import notice
from latentflow.data.items import stack_pixels
from latentflow.data.painting.input_pixels import derived_inputs
from latentflow.data.painting.input_rules import GRAY
from latentflow.data.pictures.raster import Raster
from latentflow.data.pictures.user_picture import cropped_picture, read_picture
from latentflow.errors import ConfigError, DataError
from latentflow.model.flow_model import FlowModel
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.inputs import ImageInput, describe_inputs
from latentflow.sampling.pipeline import Given, Prepared, draw_prepared
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
    prepared = prepare_translate(model, image, request)
    return draw_prepared(model, prepared, batch_size=batch_size, on_images=on_images)


def prepare_translate(model: FlowModel, image: ImageInput, request: TranslateRequest | None = None) -> Prepared:
    """Check what `translate` is to draw."""
    request = request or TranslateRequest()
    model.config.conditioning.require("input")
    inputs = describe_inputs(image=image)
    paired = read_paired(model, image, native=request.native)
    size = Size(*paired.shape[-2:]).times(model.config.inputs.shrinking)
    drawing = make_drawing(model, request, task="translate", conditions=["input"], inputs=inputs, image_size=size)
    return Prepared(drawing, lambda: Given(input=model.paired_input(paired.to(model.device)).cpu()))


def read_paired(model: FlowModel, image: ImageInput, *, native: bool = False) -> Tensor:
    """An image as the input of a model: [1, c, H / N, W / N], as `stack_inputs` gives it.

    Args:
        native: all of it at its own size; otherwise its middle, of the model's shape, at the size that the model needs.

    Raises:
        DataError: it is no image, or cannot be read.
        ConfigError: the model cannot draw the size that belongs to it.
    """
    if not isinstance(image, ImageInput):
        raise DataError(f"image {image!r:.60}: give a file or a Pillow image")
    config, rules = model.config, model.config.inputs
    assert rules is not None and config.input_format is not None
    # As in training, brightness is taken of colours that are cropped already.
    picture = read_picture(image, config.pixel_format if rules.origin == GRAY else config.input_format)
    if native:
        _require_native(model, picture)
        pixels = stack_pixels([picture.numbers])
    else:
        pixels = _middle(model, picture)
    stored = derived_inputs(pixels, rules) if rules.origin == GRAY else pixels
    return stored if stored.dtype == torch.uint8 else config.input_format.to_unit(stored)


def _middle(model: FlowModel, picture: Raster) -> Tensor:
    rules, (width, height) = model.config.inputs, picture.size
    size = model.config.size_for(Size(height, width))
    seen = rules.size(size)
    if rules.shrinking > 1 and width > seen.width and height > seen.height:
        notice(
            f"the image of {width} x {height} pixels is reduced to {seen.words}, from which this model draws "
            f"{size.words}; use --native to keep all of its pixels"
        )
    return cropped_picture(picture, seen)


def _require_native(model: FlowModel, picture: Raster) -> None:
    """Refuse a size that the model cannot draw from; names the nearest that it can."""
    shrinking, multiple = model.config.inputs.shrinking, model.config.pixel_multiple
    if any(side * shrinking % multiple for side in picture.size):
        step = torch.lcm(torch.tensor(shrinking), torch.tensor(multiple)).item() // shrinking
        near = " x ".join(str(max(round(side / step), 1) * step) for side in picture.size)
        width, height = picture.size
        raise ConfigError(
            f"{width} x {height} pixels cannot be translated at native size: both sides must be "
            f"multiples of {step}; resize to {near}, or leave out the native size"
        )
