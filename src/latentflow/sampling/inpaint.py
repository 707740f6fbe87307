"""Inpainting: fill the hole of an image of any size, keep the rest to the bit.

    choose a frame  ->  hide the hole, scale to what the model sees  ->  draw  ->  scale back, paste into the hole

A model trained for it is told the known part and the mask. Any other model can do it too: outside the hole, its
velocity is replaced by the path to the known image (`KnownRegionVelocity`). Either way, nothing of what the hole
covers is looked at.

Legend: H and W image height and width, h and w latent height and width; a mask is 1 where the image is painted anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from latentflow.autoencoder import to_unit_range
from latentflow.console import notice
from latentflow.data.painting.latent_size import ToldAs, class_counts, hide, hole_counts, shares, told_mask
from latentflow.data.painting.map_reader import read_map
from latentflow.data.painting.mask_reader import Mask, read_mask
from latentflow.data.painting.semantic_maps import MapClasses, check_map
from latentflow.data.pictures.decode import open_image
from latentflow.data.pictures.orientation import Photo, upright_as, with_turn
from latentflow.data.pictures.originals import Original, original_of
from latentflow.data.pictures.single import describe_file
from latentflow.errors import ConfigError, DataError, nearest
from latentflow.model.conditioning import ClassList
from latentflow.model.flow_model import FlowModel
from latentflow.sampling.pipeline import Given, draw_all
from latentflow.sampling.request import make_request
from latentflow.sampling.samples import Samples

Fit = Literal["window", "whole", "native"]
Method = Literal["condition", "replacement"]
FITS: dict[str, str] = {
    "window": "a square around the hole with as much again beside it, scaled to the size of the training images",
    "whole": "the whole image, its shorter side scaled to the size of the training images",
    "native": "the whole image as it is; its sides must be multiples of what the network can take",
}
METHODS: dict[str, str] = {
    "condition": "the model is told the known part; it was trained for that",
    "replacement": "what the model paints outside the hole is replaced by the known part, at every step",
}
_CONTEXT = 2  # side of the window, in sides of the hole


@dataclass(frozen=True)
class Frame:
    """The part of an image that the model sees, and at which size.

    Attributes:
        box: left, top, right, bottom in pixels of the image.
        size: height and width the model sees it at, in pixels.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]

    def cut(self, image: np.ndarray, mask: np.ndarray, told_as: ToldAs = "share") -> tuple[np.ndarray, np.ndarray]:
        """The frame of an image [H, W, 3] uint8 and of a mask [H, W] as the model sees them.

        Scaling mixes neighbours. So colours are weighted by what is known, R(known * image) / R(known) with the
        bicubic resize R: nothing that the hole covers gets into its neighbours.

        Returns:
            [h, w, 3] uint8, painted over in the hole; [h, w] uint8, 1 wherever any of the hole is.
        """
        hole = self._inside(mask) > 0
        seen_hole = _covered(hole, self.size)
        known = np.where(hole, np.float32(0), np.float32(1))
        weight = np.maximum(self._scaled(known), 1e-3)  # where it is small, the hole is
        channels = [self._scaled(known * channel) / weight for channel in np.moveaxis(self._inside(image), -1, 0)]
        seen = np.rint(np.clip(np.stack(channels, -1), 0, 255)).astype(np.uint8)
        return hide(seen, seen_hole, told_as), seen_hole.astype(np.uint8)

    def cut_map(self, semantic_map: np.ndarray) -> np.ndarray:
        """The frame of a semantic map: [h, w] uint8, the class at each pixel's centre."""
        inside = Image.fromarray(self._inside(semantic_map))
        return np.asarray(inside.resize(self.size[::-1], Image.Resampling.NEAREST))

    def paste(self, picture: np.ndarray, image: np.ndarray, mask: np.ndarray, feather: int) -> np.ndarray:
        """The image with the hole filled from `picture` [h, w, 3]; known pixels are those of the image, to the bit."""
        known, hole = self._inside(image), self._inside(mask)
        filled = np.asarray(Image.fromarray(picture).resize(known.shape[1::-1], Image.Resampling.BICUBIC))
        if feather:
            filled = _feathered(filled, known, hole, feather)
        pasted = image.copy()
        self._inside(pasted)[:] = np.where(hole[..., None] > 0, filled, known)
        return pasted

    def _inside(self, array: np.ndarray) -> np.ndarray:
        """A view of the frame of an array [H, W, ...]."""
        left, top, right, bottom = self.box
        return array[top:bottom, left:right]

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        """Float32 values of the frame at the size the model sees: [h, w]."""
        return np.asarray(Image.fromarray(values).resize(self.size[::-1], Image.Resampling.BICUBIC))


def inpaint(
    model: FlowModel,
    image: str | Path | Image.Image | np.ndarray,
    mask: Mask,
    *,
    num: int = 1,
    classes: ClassList | None = None,
    semantic_map: str | Path | Image.Image | np.ndarray | None = None,
    seed: int = 0,
    fit: Fit | None = None,
    feather: int = 0,
    method: Method | None = None,
    batch_size: int = 4,
    on_images: Callable[[int], None] = lambda num_images: None,
    **preset: Any,
) -> Samples:
    """Fill the hole of one image, once for each of `num` seeds.

    Args:
        image: of any size whose sides are at least one latent pixel; an array is [H, W, 3] uint8.
        mask: of the image's size, white where it is painted anew; see `read_mask`.
        classes: as for `make_request`; None: no class is told.
        semantic_map: of the image's size, for a model that is told maps as well; an array holds class indices.
        fit: which part of the image the model sees, one of `FITS`; None: "window" where there is one, else "whole".
        feather: width in pixels of the band inside the hole in which its colours are drawn towards the known border.
        method: one of `METHODS`; "condition" needs a model trained for inpainting, "replacement" works with any; None:
            the best there is.
        preset: fields of `SamplingPreset`.

    Returns:
        Samples whose pixels, 8-bit sRGB on white, have the size of the image. They are saved in the form of the image,
        with what is known as it is stored: see `Original`.

    Raises:
        ConfigError, DataError: before anything is computed.
    """
    conditioning, factor = model.config.conditioning, model.config.autoencoder.factor
    method = method or ("condition" if conditioning.inpainting else "replacement")
    if method not in METHODS:
        raise ConfigError(f"method {method!r}: there is no such method; {nearest(method, METHODS)}")
    told = ["inpainting"] if method == "condition" else []
    told += ["semantic_map"] if semantic_map is not None else []
    for name in told:
        conditioning.require(name)
    if feather < 0:
        raise ConfigError(f"feather {feather} is below zero; 0 switches it off, 8 pixels are usual")

    files = {"image": image, "mask": mask, "map": semantic_map}
    inputs = {name: describe_file(file) for name, file in files.items() if isinstance(file, str | Path)}
    original, turn = _opened(image)
    photo = Photo(*original.rgb.shape[:2], turn)
    hole = read_mask(mask, photo)
    frame = choose_frame(model, hole, fit)
    told_as = model.config.masks.told_as if method == "condition" and model.config.masks else "share"
    seen, seen_hole = frame.cut(original.rgb, hole, told_as)
    hole_share = shares(hole_counts(seen_hole, factor, told_as), factor)[None]
    if (hole_share == 1 if method == "condition" else hole_share > 0).all():
        height, width = frame.size
        raise DataError(
            f"at {width} x {height} pixels, as the model sees the image, the hole leaves nothing of it; "
            "use a smaller hole or another fit"
        )
    request = make_request(
        model,
        num=num,
        classes=classes,
        seed=seed,
        task="inpaint",
        told=told,
        inputs={**inputs, "method": method, "frame": "{} {} {} {}".format(*frame.box), "feather": str(feather)},
        image_size=frame.size,
        **preset,
    )
    fractions = None
    if semantic_map is not None:
        indices = map_indices(model, semantic_map, photo)
        fractions = shares(class_counts(frame.cut_map(indices), conditioning.num_map_classes, factor), factor)[None]

    pixels = torch.from_numpy(seen).permute(2, 0, 1)[None].to(model.device)
    latents = model.encode(to_unit_range(pixels)).cpu()
    if method == "condition":
        given = Given(masked_latents=latents, mask=told_mask(hole_share, told_as), class_fractions=fractions)
    else:
        given = Given(latents=latents, hole=(hole_share > 0).float(), class_fractions=fractions)
    samples = draw_all(model, request, given, batch_size=batch_size, on_images=on_images)
    drawn = samples.pixels.permute(0, 2, 3, 1).numpy()
    finished = np.stack([frame.paste(one, original.rgb, hole, feather) for one in drawn])
    pixels = torch.from_numpy(finished).permute(0, 3, 1, 2)
    return replace(samples, pixels=pixels, finish=partial(original.painted, hole=hole))


def choose_frame(model: FlowModel, mask: np.ndarray, fit: Fit | None = None) -> Frame:
    """The part of an image that the model sees, for a hole `mask` [H, W] that is neither empty nor everything.

    Raises:
        ConfigError: an unknown `fit`, or one that the hole or the image's size does not allow.
        DataError: a side of the image is shorter than one latent pixel.
    """
    if fit is not None and fit not in FITS:
        raise ConfigError(f"fit {fit!r}: there is no such fit; {nearest(fit, FITS)}")
    height, width = mask.shape
    require_latent_pixel(model, height, width)
    window = _window(mask, model.config.image_size)
    if fit == "window" and window is None:
        raise ConfigError("fit 'window': no square of this image holds the hole and what adjoins it; use fit 'whole'")
    if window is not None and fit in (None, "window"):
        return Frame(window, (model.config.image_size,) * 2)
    if fit == "native":
        return Frame((0, 0, width, height), native_size(model, height, width))
    multiple = model.config.pixel_multiple
    scale = model.config.image_size / min(height, width)
    size = tuple(max(round(side * scale / multiple), 1) * multiple for side in (height, width))
    return Frame((0, 0, width, height), size)


def native_size(model: FlowModel, height: int, width: int) -> tuple[int, int]:
    """The same height and width, if the network can take them as they are.

    Raises:
        ConfigError: they are not multiples of latent and patch size; the nearest that are, are named.
    """
    multiple = model.config.pixel_multiple
    if height % multiple or width % multiple:
        near = " x ".join(str(max(round(side / multiple), 1) * multiple) for side in (width, height))
        raise ConfigError(
            f"{width} x {height} pixels cannot be taken as they are: both sides must be multiples of {multiple}; "
            f"resize to {near}, or let it be scaled by not asking for the native size"
        )
    return height, width


def map_indices(
    model: FlowModel, semantic_map: str | Path | Image.Image | np.ndarray, photo: Photo | None = None
) -> np.ndarray:
    """A semantic map of the model's classes: [H, W] uint8.

    Args:
        semantic_map: a picture as `read_map` takes it, or an array of class indices.
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


def require_latent_pixel(model: FlowModel, height: int, width: int) -> None:
    """Refuse an image or map smaller than one latent pixel.

    Raises:
        DataError: with both sizes.
    """
    factor = model.config.autoencoder.factor
    if min(height, width) < factor:
        raise DataError(
            f"{width} x {height} pixels are less than one latent pixel, which is {factor} x {factor}; give a larger one"
        )


def _window(mask: np.ndarray, image_size: int) -> tuple[int, int, int, int] | None:
    """A square that holds the hole and what adjoins it: left, top, right, bottom; None if there is none."""
    spans = _spans(mask)
    extents = [int(span[-1] - span[0]) + 1 for span in spans]
    shorter = min(mask.shape)
    side = min(max(_CONTEXT * max(extents), min(image_size, shorter)), shorter)
    starts = []
    for span, extent, pixels in zip(spans, extents, mask.shape, strict=True):
        start = min(max(int(span[0]) - (side - extent) // 2, 0), pixels - side)
        cut_before, cut_after = start > 0 and span[0] <= start, start + side < pixels and span[-1] + 1 >= start + side
        if extent > side or cut_before or cut_after:
            return None
        starts.append(start)
    top, left = starts
    return left, top, left + side, top + side


def _covered(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask [H, W] of bool at another size [h, w]: true wherever any of it is, however thin."""
    for axis, length in enumerate(size):
        edges = np.arange(length + 1) * mask.shape[axis]
        mask = _sums(mask, edges[:-1] // length, -(-edges[1:] // length), axis) > 0
    return mask


def _opened(image: str | Path | Image.Image | np.ndarray) -> tuple[Original, int]:
    """An image, and the EXIF orientation that its pixels were stored in."""
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


def _feathered(filled: np.ndarray, image: np.ndarray, mask: np.ndarray, feather: int) -> np.ndarray:
    """Draw the colours of the hole towards those of its border, within `feather` pixels: [h, w, 3] uint8.

    What the model paints differs a little from the known pixels at the border. That difference is carried into the
    hole (normalised convolution: blurred where it is known, over how much is known) and fades out. Nothing of what
    the hole covered is used.
    """
    near = tuple(slice(max(int(span[0]) - feather, 0), int(span[-1]) + feather + 1) for span in _spans(mask))
    known = (mask[near] == 0).astype(np.float64)
    weight = _blur(known, feather)
    fading = np.minimum(2 * weight, 1)  # 1 at a straight border, where half of the neighbourhood is known
    strength = fading / np.maximum(weight, 1e-6)
    blended = filled.copy()
    for channel in range(3):
        painted = filled[near][..., channel].astype(np.float64)
        carried = _blur((image[near][..., channel] - painted) * known, feather) * strength
        blended[near][..., channel] = np.rint(np.clip(painted + carried, 0, 255))
    return blended


def _blur(x: np.ndarray, reach: int) -> np.ndarray:
    """Three box filters, which together make a bell of half width `reach`; at the edges they are cut off: [h, w]."""
    for part in range(3):
        radius = (reach + part) // 3
        for axis in (0, 1):
            places = np.arange(x.shape[axis])
            first, behind = np.maximum(places - radius, 0), np.minimum(places + radius + 1, len(places))
            x = _sums(x, first, behind, axis) / np.expand_dims(behind - first, 1 - axis)
    return x


def _sums(x: np.ndarray, first: np.ndarray, behind: np.ndarray, axis: int) -> np.ndarray:
    """The sum of each stretch x[first:behind] along an axis of x [h, w]."""
    sums = np.insert(np.cumsum(x, axis), 0, 0, axis)
    return np.take(sums, behind, axis) - np.take(sums, first, axis)


def _spans(mask: np.ndarray) -> list[np.ndarray]:
    """The rows and the columns, in order, in which a mask has a hole."""
    return [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
