"""Inpainting: fill the hole of an image of any size, keep the rest to the bit.

    choose a frame  ->  scale it to what the model sees  ->  draw  ->  scale back  ->  paste into the hole

A model trained for it is told the known part and the mask. Any other model can do it too: outside the hole, its
velocity is replaced by the path to the known image (`KnownRegionVelocity`).

Legend: H and W image height and width, h and w latent height and width; a mask is 1 where the image is painted anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from latentflow.autoencoder import to_unit_range
from latentflow.data.images import to_rgb
from latentflow.data.latent_size import class_counts, hide, hole_counts, shares
from latentflow.data.masks import read_mask
from latentflow.data.pictures import describe_file, read_picture
from latentflow.data.semantic_maps import MapClasses, read_map
from latentflow.errors import ConfigError, DataError, nearest
from latentflow.latent_flow import LatentFlow
from latentflow.sampling.pipeline import Given, Samples, draw_all, make_request

Fit = Literal["window", "whole", "native"]
Method = Literal["condition", "replacement"]
FITS: dict[str, str] = {
    "window": "a square around the hole with as much again beside it, scaled to the size of the training images",
    "whole": "the whole image, its shorter side scaled to the size of the training images",
    "native": "the whole image as it is; its sides must be multiples of what the network can take",
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

    def cut(self, image: Image.Image) -> np.ndarray:
        """The frame of an image as the model sees it: [h, w, 3] uint8."""
        return np.array(image.resize(self.size[::-1], Image.Resampling.BICUBIC, box=self.box))

    def cut_mask(self, mask: np.ndarray) -> np.ndarray:
        """The frame of a mask: [h, w] uint8, 1 wherever any of the hole is."""
        scaled = Image.fromarray(mask.astype(np.float32)).resize(self.size[::-1], Image.Resampling.BOX, box=self.box)
        return (np.asarray(scaled) > 1e-6).astype(np.uint8)

    def cut_map(self, semantic_map: np.ndarray) -> np.ndarray:
        """The frame of a semantic map: [h, w] uint8, the class at each pixel's centre."""
        scaled = Image.fromarray(semantic_map).resize(self.size[::-1], Image.Resampling.NEAREST, box=self.box)
        return np.asarray(scaled)

    def paste(self, picture: np.ndarray, image: np.ndarray, mask: np.ndarray, feather: int) -> np.ndarray:
        """The image with the hole filled from `picture` [h, w, 3]; known pixels are those of the image, to the bit."""
        left, top, right, bottom = self.box
        filled = Image.fromarray(picture).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        generated = image.copy()
        generated[top:bottom, left:right] = np.asarray(filled)
        if feather:
            generated = _feathered(generated, image, mask, feather)
        return np.where(mask[..., None] > 0, generated, image)


def inpaint(
    model: LatentFlow,
    image: str | Path | Image.Image,
    mask: str | Path | Image.Image | np.ndarray,
    *,
    num: int = 1,
    classes: Sequence[int | str] | None = None,
    semantic_map: str | Path | Image.Image | None = None,
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
        image: of any size whose sides are at least one latent pixel.
        mask: of the image's size, white (1 in an array) where it is painted anew.
        classes: as for `make_request`; None: no class is told.
        semantic_map: of the image's size, for a model that is told maps as well.
        fit: which part of the image the model sees, one of `FITS`; None: "window" where the hole fits into a square
            with something known beside it, else "whole".
        feather: width in pixels of the band inside the hole in which its colours are drawn towards the known border.
        method: "condition" needs a model trained for inpainting; "replacement" works with any; None: the best there is.
        preset: fields of `SamplingPreset`.

    Returns:
        Samples whose pixels have the size of the image.

    Raises:
        ConfigError, DataError: before anything is computed.
    """
    conditioning = model.config.conditioning
    method = method or ("condition" if conditioning.inpainting else "replacement")
    if method == "condition":
        conditioning.require("inpainting")
    if semantic_map is not None:
        conditioning.require("semantic_map")
    if feather < 0:
        raise ConfigError(f"feather {feather} is below zero; 0 switches it off, 8 pixels are usual")
    files = {"image": image, "mask": mask, "map": semantic_map}
    inputs = {name: describe_file(file) for name, file in files.items() if isinstance(file, str | Path)}
    picture = to_rgb(image) if isinstance(image, Image.Image) else read_picture(image)
    mask = Image.fromarray(np.where(mask > 0, np.uint8(255), np.uint8(0))) if isinstance(mask, np.ndarray) else mask
    hole = read_mask(mask, (picture.height, picture.width))
    frame = choose_frame(model, hole, fit)
    seen, seen_hole = frame.cut(picture), frame.cut_mask(hole)
    if seen_hole.all():
        raise DataError("at the size the model sees, nothing of the image is kept; use a smaller hole or another fit")

    given = _known_part(model, seen, seen_hole, method)
    if semantic_map is not None:
        given = replace(given, class_fractions=_fractions(model, semantic_map, hole.shape, frame))
    told = ["inpainting"] if method == "condition" else []
    request = make_request(
        model,
        num=num,
        classes=classes,
        seed=seed,
        task="inpaint",
        told=told + (["semantic_map"] if semantic_map is not None else []),
        inputs={**inputs, "method": method, "frame": "{} {} {} {}".format(*frame.box), "feather": str(feather)},
        image_size=frame.size,
        **preset,
    )
    samples = draw_all(model, request, given, batch_size=batch_size, on_images=on_images)
    original = np.asarray(picture)
    drawn = samples.pixels.permute(0, 2, 3, 1).numpy()
    finished = np.stack([frame.paste(one, original, hole, feather) for one in drawn])
    return replace(samples, pixels=torch.from_numpy(finished).permute(0, 3, 1, 2))


def choose_frame(model: LatentFlow, mask: np.ndarray, fit: Fit | None = None) -> Frame:
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
        raise ConfigError("fit 'window': no square of this image holds the hole and something known; use fit 'whole'")
    if window is not None and fit in (None, "window"):
        return Frame(window, (model.config.image_size,) * 2)
    if fit == "native":
        return Frame((0, 0, width, height), native_size(model, height, width))
    multiple = model.config.pixel_multiple
    scale = model.config.image_size / min(height, width)
    size = tuple(max(round(side * scale / multiple), 1) * multiple for side in (height, width))
    return Frame((0, 0, width, height), size)


def native_size(model: LatentFlow, height: int, width: int) -> tuple[int, int]:
    """The same height and width, if the network can take them as they are.

    Raises:
        ConfigError: they are not multiples of latent and patch size; the nearest that are, are named.
    """
    multiple = model.config.pixel_multiple
    if height % multiple or width % multiple:
        near = " x ".join(str(max(round(side / multiple), 1) * multiple) for side in (width, height))
        raise ConfigError(
            f"{width} x {height} pixels cannot be taken as they are: both sides must be multiples of {multiple}; "
            f"resize to {near}, or leave the fit to the program"
        )
    return height, width


def require_latent_pixel(model: LatentFlow, height: int, width: int) -> None:
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
    """A square that holds the hole and something known: left, top, right, bottom; None if there is none."""
    spans = [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]  # rows, columns
    extents = [int(span[-1] - span[0]) + 1 for span in spans]
    shorter = min(mask.shape)
    if max(extents) > shorter:
        return None
    side = min(max(_CONTEXT * max(extents), min(image_size, shorter)), shorter)
    top, left = (
        min(max((int(span[0] + span[-1]) + 1 - side) // 2, 0), pixels - side)
        for span, pixels in zip(spans, mask.shape, strict=True)
    )
    return None if mask[top : top + side, left : left + side].all() else (left, top, left + side, top + side)


def _known_part(model: LatentFlow, seen: np.ndarray, hole: np.ndarray, method: Method) -> Given:
    """What is known of the image [h, w, 3], as the method needs it."""
    mask = shares(hole_counts(hole, model.config.autoencoder.factor), model.config.autoencoder.factor)[None]
    shown = hide(seen, hole) if method == "condition" else seen
    pixels = torch.from_numpy(shown).permute(2, 0, 1)[None].to(model.device)
    latents = model.encode(to_unit_range(pixels)).cpu()
    if method == "condition":
        return Given(masked_latents=latents, mask=mask)
    return Given(latents=latents, hole=(mask > 0).float())


def _fractions(model: LatentFlow, semantic_map: Any, size: tuple[int, int], frame: Frame) -> Tensor:
    conditioning, factor = model.config.conditioning, model.config.autoencoder.factor
    classes = MapClasses(tuple(conditioning.map_class_names), tuple(conditioning.map_palette))
    indices = read_map(semantic_map, classes)
    if indices.shape != size:
        found, wanted = (f"{shape[1]} x {shape[0]}" for shape in (indices.shape, size))
        raise DataError(f"the semantic map has {found} pixels and the image {wanted}; they must be of one size")
    return shares(class_counts(frame.cut_map(indices), len(classes), factor), factor)[None]


def _feathered(generated: np.ndarray, image: np.ndarray, mask: np.ndarray, feather: int) -> np.ndarray:
    """Draw the colours of the hole towards those of its border, within `feather` pixels.

    What the model paints differs a little from the known pixels at the border. That difference is carried into the
    hole (normalised convolution: blurred where it is known, over how much is known) and fades out. Nothing of what
    the hole covered is used.
    """
    known = torch.from_numpy((mask == 0).astype(np.float32))[None, None]
    difference = torch.from_numpy(image.astype(np.float32) - generated).permute(2, 0, 1)[None]
    weight = _blur(known, feather)
    carried = _blur(difference * known, feather) / weight.clamp(min=1e-6)
    fading = (2 * weight).clamp(max=1)  # 1 at a straight border, where half of the neighbourhood is known
    filled = generated + (fading * carried)[0].permute(1, 2, 0).numpy()
    return np.rint(np.clip(filled, 0, 255)).astype(np.uint8)


def _blur(x: Tensor, reach: int) -> Tensor:
    """Three box filters, which make a bell of half width `reach`: [B, C, H, W]."""
    radius = max(1, round(reach / 3))
    for _ in range(3):
        x = avg_pool2d(x, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
    return x
