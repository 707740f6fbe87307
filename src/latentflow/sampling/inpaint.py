"""Inpainting: fill the hole of an image of any size, and keep every other pixel, bit for bit.

    choose a frame  ->  paint over the hole, resize  ->  draw  ->  resize back, paste into the hole

A model trained for inpainting is conditioned on the known part and the mask. With any other model, the velocity outside
the hole is replaced by that of the path to the known image (`KnownRegionVelocity`). Neither looks inside the hole.

Legend: H and W image height and width, h and w latent height and width; a mask is 1 in the hole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from latentflow.console import notice
from latentflow.data.items import stack_pixels
from latentflow.data.painting.latent_size import hole_counts, mask_input, shares
from latentflow.data.painting.mask_reader import Mask, read_mask
from latentflow.data.painting.mask_rules import MaskForm
from latentflow.data.pictures.decode import open_image
from latentflow.data.pictures.orientation import Photo, with_turn
from latentflow.data.pictures.originals import Original, original_of
from latentflow.data.pictures.user_picture import read_upright
from latentflow.errors import DataError
from latentflow.model.conditioning import ConditionName
from latentflow.model.flow_model import FlowModel
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.frame import Frame, choose_frame
from latentflow.sampling.inputs import (
    ImageInput,
    MapInput,
    describe_inputs,
    encode_input,
    map_fractions,
    map_indices,
)
from latentflow.sampling.pipeline import Given, Prepared, draw_prepared
from latentflow.sampling.request import Fit, InpaintRequest, Method
from latentflow.sampling.samples import Samples


def inpaint(
    model: FlowModel,
    image: ImageInput | np.ndarray,
    mask: Mask,
    request: InpaintRequest | None = None,
    *,
    semantic_map: MapInput | None = None,
    batch_size: int = 4,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Samples:
    """Fill the hole of one image, once for each seed.

    Args:
        image: of any size whose sides are at least one latent pixel; an array is [H, W, P], stored values of the
            model's pixel format.
        mask: of the image's size, white where the image is to be filled; see `read_mask`.
        semantic_map: of the image's size, for a model that is conditioned on maps as well.

    Returns:
        Samples whose pixels have the size of the image. Of a model of 8-bit RGB they are sRGB on white, and saved in
        the image's own form, with every known pixel as it was stored: see `Original`.

    Raises:
        ConfigError, DataError: before anything is computed.
    """
    prepared = prepare_inpaint(model, image, mask, request, semantic_map=semantic_map)
    return draw_prepared(model, prepared, batch_size=batch_size, on_images=on_images)


def prepare_inpaint(
    model: FlowModel,
    image: ImageInput | np.ndarray,
    mask: Mask,
    request: InpaintRequest | None = None,
    *,
    semantic_map: MapInput | None = None,
) -> Prepared:
    """Check what `inpaint` is to fill."""
    request = request or InpaintRequest()
    method = request.method or ("condition" if model.config.conditioning.inpainting else "replacement")
    conditions: list[ConditionName] = ["inpainting"] if method == "condition" else []
    conditions += ["semantic_map"] if semantic_map is not None else []
    for name in conditions:
        model.config.conditioning.require(name)
    inputs = describe_inputs(image=image, mask=mask, map=semantic_map)
    canvas = _read(model, image, mask, request.fit, method)
    frame = "{} {} {} {}".format(*canvas.frame.box)
    drawing = make_drawing(
        model,
        request,
        task="inpaint",
        conditions=conditions,
        inputs={**inputs, "method": method, "frame": frame, "feather": str(request.feather)},
        image_size=canvas.frame.size,
    )
    indices = None
    if semantic_map is not None:
        indices = canvas.frame.cut_map(map_indices(model, semantic_map, canvas.photo))

    def given() -> Given:
        own = canvas.given(model, method)
        return own if indices is None else replace(own, class_fractions=map_fractions(model, indices))

    return Prepared(drawing, given, partial(canvas.filled, feather=request.feather), together=4)


@dataclass(frozen=True)
class _Canvas:
    """An image with a hole.

    Attributes:
        pixels: [H, W, P], the image in the model's pixel format.
        original: as its file holds it; None: of another format than 8-bit RGB, in which all of it is kept.
        photo: its size and orientation.
        hole: [H, W] uint8, 1 in the hole.
        frame: the part of it that the model sees.
        seen: [1, P, S1, S2], that part at the size the model sees it, with the hole painted over.
        share: [1, 1, h, w], the fraction of each latent pixel that the hole covers.
        told_as: how the mask enters the model's condition.
    """

    pixels: np.ndarray
    original: Original | None
    photo: Photo
    hole: np.ndarray
    frame: Frame
    seen: Tensor
    share: Tensor
    told_as: MaskForm

    def given(self, model: FlowModel, method: Method) -> Given:
        """What the model draws from."""
        latents = encode_input(model, self.seen)
        if method == "condition":
            return Given(masked_latents=latents, mask=mask_input(self.share, self.told_as))
        return Given(latents=latents, hole=(self.share > 0).float())

    def filled(self, samples: Samples, feather: int) -> Samples:
        """The image with its hole filled from each sample."""
        drawn = samples.pixels.permute(0, 2, 3, 1).numpy()
        pixels = stack_pixels([self.frame.paste(one, self.pixels, self.hole, feather) for one in drawn])
        finish = partial(self.original.painted, hole=self.hole) if self.original else None
        return replace(samples, pixels=pixels, finish=finish)


def _read(model: FlowModel, image: ImageInput | np.ndarray, mask: Mask, fit: Fit | None, method: Method) -> _Canvas:
    """Read image and mask, and choose the frame.

    Raises:
        ConfigError: `fit` does not suit the image.
        DataError: image or mask cannot be used, or nothing of the frame is known.
    """
    pixels, original, turn = _open(image, model.config.pixel_format)
    photo = Photo(*pixels.shape[:2], turn)
    hole = read_mask(mask, photo)
    frame = choose_frame(model, hole, fit)
    told_as = model.config.masks.told_as if method == "condition" and model.config.masks else "share"
    seen, seen_hole = frame.cut(pixels, hole, told_as)
    share = shares(hole_counts(seen_hole, model.config.autoencoder.factor, told_as), model.config.autoencoder.factor)
    if (share == 1 if method == "condition" else share > 0).all():
        height, width = frame.size
        raise DataError(
            f"at {width} x {height} pixels, the size the model sees, the mask covers the whole image; "
            "use a smaller hole or another fit"
        )
    return _Canvas(pixels, original, photo, hole, frame, stack_pixels([seen]), share[None], told_as)


def _open(image: ImageInput | np.ndarray, pixel_format: PixelFormat) -> tuple[np.ndarray, Original | None, int]:
    """An image in the model's pixel format, as its file holds it, and its EXIF orientation; see `_Canvas`."""
    if pixel_format == RGB:
        original, turn = _open_original(image)
        return original.rgb, original, turn
    if not isinstance(image, np.ndarray):
        picture, turn = read_upright(image, pixel_format)
        return picture.numbers, None, turn
    if image.dtype != pixel_format.dtype or image.ndim != 3 or image.shape[2] != pixel_format.channels:
        wanted = f"[height, width, {pixel_format.channels}] {pixel_format.dtype}"
        raise DataError(f"the image is an array {list(image.shape)} of {image.dtype}; give {wanted}")
    return image, None, 1


def _open_original(image: ImageInput | np.ndarray) -> tuple[Original, int]:
    if isinstance(image, np.ndarray):
        try:
            image = Image.fromarray(image)
        except (TypeError, ValueError) as error:
            raise DataError(f"the image cannot be used: {error}; give [height, width, 3] uint8") from error
    if not isinstance(image, str | Path | Image.Image):
        raise DataError(f"the image is of the type {type(image).__name__}; give a file, a Pillow image or an array")
    name = str(image) if isinstance(image, str | Path) else "in memory"
    with open_image(image, name) as opened:
        original, turn = with_turn(opened, partial(original_of, name=name))
    if original.lost:
        notice(f"the result does not keep all of {name}: {original.lost}")
    return original, turn
