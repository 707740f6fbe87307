"""The frame of an inpainting: which part of the image the model sees, at which size, and how it gets back.

Legend: H and W image height and width, h and w those the model sees, all in pixels; a mask is 1 in the hole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from latentflow.data.painting.latent_size import hide
from latentflow.data.painting.mask_rules import MaskForm
from latentflow.errors import ConfigError
from latentflow.model.flow_model import FlowModel
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.sampling.feather import feathered, hole_spans, stretch_sums
from latentflow.sampling.inputs import native_size, require_latent_pixel
from latentflow.sampling.request import Fit
from latentflow.sizes import Size

_CONTEXT = 2  # side of the window, in sides of the hole


@dataclass(frozen=True)
class Frame:
    """The part of an image that the model sees, and the size it sees it at.

    Attributes:
        box: left, top, right, bottom in pixels of the image.
        size: after resizing.
        pixel_format: of the image and of what is drawn.
    """

    box: tuple[int, int, int, int]
    size: Size
    pixel_format: PixelFormat = RGB

    def cut(self, image: np.ndarray, mask: np.ndarray, told_as: MaskForm = "share") -> tuple[np.ndarray, np.ndarray]:
        """The frame of an image [H, W, P] and of a mask [H, W] as the model sees them.

        Resizing mixes neighbouring pixels. Colours are therefore weighted by what is known, R(known * image) / R(known)
        with the bicubic resize R, so that nothing inside the hole leaks into its neighbours.

        Returns:
            [h, w, P], with the hole painted over; [h, w] uint8, 1 in every pixel that the hole touches.
        """
        hole = self._inside(mask) > 0
        seen_hole = _covered(hole, self.size)
        known = np.where(hole, np.float32(0), np.float32(1))
        weight = np.maximum(self._scaled(known), 1e-3)  # where it is small, the hole is
        channels = [self._scaled(known * channel) / weight for channel in np.moveaxis(self._inside(image), -1, 0)]
        seen = self.pixel_format.stored(np.stack(channels, -1))
        return hide(seen, seen_hole, told_as, self.pixel_format), seen_hole.astype(np.uint8)

    def cut_map(self, semantic_map: np.ndarray) -> np.ndarray:
        """The frame of a semantic map: [h, w] uint8, the class at each pixel's centre."""
        inside = Image.fromarray(self._inside(semantic_map))
        return np.asarray(inside.resize(self.size[::-1], Image.Resampling.NEAREST))

    def paste(self, picture: np.ndarray, image: np.ndarray, mask: np.ndarray, feather: int) -> np.ndarray:
        """The image with its hole filled from `picture` [h, w, P]; all other pixels are unchanged, bit for bit."""
        known, hole = self._inside(image), self._inside(mask)
        # Pillow resizes 8 bits in 8 bits, and 16 bits exactly as floating-point numbers.
        planes = np.moveaxis(picture if picture.dtype == np.uint8 else picture.astype(np.float32), -1, 0)
        images = (Image.fromarray(np.ascontiguousarray(plane)) for plane in planes)
        resized = [np.asarray(one.resize(known.shape[1::-1], Image.Resampling.BICUBIC)) for one in images]
        filled = self.pixel_format.stored(np.stack(resized, -1))
        if feather:
            filled = self.pixel_format.stored(feathered(filled, known, hole, feather))
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


def choose_frame(model: FlowModel, mask: np.ndarray, fit: Fit | None = None) -> Frame:
    """The frame of an image, given its `mask` [H, W] of 0 and 1, which has both.

    Args:
        fit: None: "window" if the hole leaves room for one, else "whole".

    Raises:
        ConfigError: the hole or the size of the image does not allow this `fit`.
        DataError: a side of the image is shorter than one latent pixel.
    """
    (height, width), pixel_format = mask.shape, model.config.pixel_format
    require_latent_pixel(model, height, width)
    trained = model.config.size_for(Size(height, width))
    window = _window(mask, trained)
    if fit == "window" and window is None:
        shape = "square" if trained.is_square else f"part of the shape {trained}"
        raise ConfigError(
            f"fit 'window': no {shape} in this image holds the hole and its surroundings; use fit 'whole'"
        )
    if window is not None and fit in (None, "window"):
        return Frame(window, trained, pixel_format)
    if fit == "native":
        return Frame((0, 0, width, height), native_size(model, height, width), pixel_format)
    multiple = model.config.pixel_multiple
    scale = max(trained.height / height, trained.width / width)
    size = Size(*(max(round(side * scale / multiple), 1) * multiple for side in (height, width)))
    return Frame((0, 0, width, height), size, pixel_format)


def _window(mask: np.ndarray, image_size: Size) -> tuple[int, int, int, int] | None:
    """A part of the shape of `image_size` with the hole and some of its surroundings; None: there is none.

    Returns:
        left, top, right, bottom.
    """
    spans = hole_spans(mask)
    extents = [int(span[-1] - span[0]) + 1 for span in spans]
    most = min(pixels / side for pixels, side in zip(mask.shape, image_size, strict=True))
    wanted = max(_CONTEXT * extent / side for extent, side in zip(extents, image_size, strict=True))
    scale = min(max(wanted, min(1, most)), most)
    sides = [min(round(scale * side), pixels) for side, pixels in zip(image_size, mask.shape, strict=True)]
    starts = []
    for span, extent, pixels, side in zip(spans, extents, mask.shape, sides, strict=True):
        start = min(max(int(span[0]) - (side - extent) // 2, 0), pixels - side)
        cut_before, cut_after = start > 0 and span[0] <= start, start + side < pixels and span[-1] + 1 >= start + side
        if extent > side or cut_before or cut_after:
            return None
        starts.append(start)
    (top, left), (height, width) = starts, sides
    return left, top, left + width, top + height


def _covered(mask: np.ndarray, size: Size) -> np.ndarray:
    """A boolean mask [H, W] at another size [h, w]: true in every pixel that it touches, however thin it is."""
    for axis, length in enumerate(size):
        edges = np.arange(length + 1) * mask.shape[axis]
        mask = stretch_sums(mask, edges[:-1] // length, -(-edges[1:] // length), axis) > 0
    return mask
