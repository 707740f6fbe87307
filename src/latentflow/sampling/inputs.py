"""Images and semantic maps that a user hands over, read and encoded the way the model sees them.

Legend: B images, C latent channels, h and w latent height and width, K classes of the semantic map,
H and W height and width of the model's images in pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from latentflow.data.painting.latent_size import class_counts, shares
from latentflow.data.painting.map_reader import read_map
from latentflow.data.painting.semantic_maps import MapClasses, check_map
from latentflow.data.pictures.orientation import Photo, upright_as
from latentflow.data.pictures.user_picture import cropped_picture, describe_file, read_picture
from latentflow.errors import ConfigError, DataError
from latentflow.model.class_names import ClassList
from latentflow.model.flow_model import FlowModel
from latentflow.sizes import Size

ImageInput = str | Path | Image.Image
"""A file, or a Pillow image."""
MapInput = str | Path | Image.Image | np.ndarray
"""A file or a Pillow image as `read_map` takes it, or an array [H, W] of class indices."""


def read_input(model: FlowModel, image: ImageInput, size: Size | None = None) -> tuple[Tensor, dict[str, str]]:
    """The image as the model sees it, [1, P, H, W] in its pixel format, and its entry in the inputs of a request.

    Args:
        size: to which it is cropped; None: that of the model's sizes whose shape is nearest.

    Raises:
        DataError: it is no image, cannot be read, or is smaller than one latent pixel.
    """
    if not isinstance(image, ImageInput):
        raise DataError(f"image {image!r:.60}: give a file or a Pillow image")
    picture = read_picture(image, model.config.pixel_format)
    width, height = picture.size
    require_latent_pixel(model, height, width)
    pixels = cropped_picture(picture, size or model.config.size_for(Size(height, width)))
    return pixels, describe_inputs(image=image)


def describe_inputs(**inputs: object) -> dict[str, str]:
    """The files among the inputs, each with its name and hash, as a request records them.

    Raises:
        DataError: one of them is missing or cannot be read.
    """
    return {name: describe_file(file) for name, file in inputs.items() if isinstance(file, str | Path)}


def other_size(model: FlowModel, pixels: Tensor) -> Size | None:
    """The size of pixels [B, 3, H, W], or None if it is the model's usual one: the `image_size` of a drawing."""
    size = Size(*pixels.shape[2:])
    return None if size == model.config.image_size else size


def encode_input(model: FlowModel, pixels: Tensor) -> Tensor:
    """Stored values [B, P, H, W] => latents [B, C, h, w], the posterior's mode, on the CPU."""
    return model.latents(model.moments(pixels.to(model.device))).cpu()


def at_most_one(model: FlowModel, classes: ClassList | None) -> list[int] | None:
    """The class of a single picture, as a list of one index; [] for no label, None where it is left open.

    Raises:
        ConfigError: there are several.
    """
    chosen = None if classes is None else model.config.conditioning.class_indices(classes)
    if chosen is not None and len(chosen) > 1:
        raise ConfigError(f"{len(chosen)} classes for one picture; give one, or none")
    return chosen


def map_indices(model: FlowModel, semantic_map: MapInput, photo: Photo | None = None) -> np.ndarray:
    """A semantic map of the model's classes: [H, W] uint8.

    Args:
        photo: the photograph that it belongs to; None: any.

    Raises:
        DataError: it cannot be read, holds a class or colour that the model does not know, or does not fit `photo`.
    """
    conditioning = model.config.conditioning
    classes = MapClasses(tuple(conditioning.map_class_names), tuple(conditioning.map_palette))
    if not isinstance(semantic_map, np.ndarray):
        return read_map(semantic_map, classes, photo=photo)
    check_map(semantic_map, classes, "the semantic map")
    indices = semantic_map.astype(np.uint8)
    return indices if photo is None else upright_as(indices, None, photo, "the semantic map", "map")


def map_fractions(model: FlowModel, indices: np.ndarray) -> Tensor:
    """The fraction of each map class in each latent pixel: [H, W] uint8 => [1, K, h, w] float32."""
    factor = model.config.autoencoder.factor
    return shares(class_counts(indices, model.config.conditioning.num_map_classes, factor), factor)[None]


def native_size(model: FlowModel, height: int, width: int) -> Size:
    """The same height and width, if the network can process them without resizing.

    Raises:
        ConfigError: they are not multiples of latent and patch size; names the nearest size that is.
    """
    multiple = model.config.pixel_multiple
    if height % multiple or width % multiple:
        near = " x ".join(str(max(round(side / multiple), 1) * multiple) for side in (width, height))
        raise ConfigError(
            f"{width} x {height} pixels cannot be drawn at native size: both sides must be multiples of {multiple}; "
            f"resize to {near}, or leave out the native size"
        )
    return Size(height, width)


def require_latent_pixel(model: FlowModel, height: int, width: int) -> None:
    """Refuse an image or map smaller than one latent pixel.

    Raises:
        DataError: with both sizes.
    """
    factor = model.config.autoencoder.factor
    if min(height, width) < factor:
        raise DataError(
            f"{width} x {height} pixels are smaller than one latent pixel, which is {factor} x {factor}; "
            "give a larger image"
        )
