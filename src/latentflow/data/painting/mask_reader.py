"""A user's mask: from a file, a Pillow image, an array or a tensor, by one rule for all of them.

A pixel of at least half white is repainted; a darker one is known and preserved. White is 1, 255 or 65535, the smallest
of them that is not below the brightest pixel. So a soft mask means the same as 0 to 1 and as 0 to 255, and the ringing
of a JPEG does no harm. Colours and transparency may mean either, so they are refused with a remedy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from latentflow.console import notice
from latentflow.data.pictures.decode import BrokenImage, open_image
from latentflow.data.pictures.orientation import Photo, own_turn, turned, upright_as
from latentflow.errors import DataError

Mask = str | Path | Image.Image | np.ndarray | Tensor

_WHITES = (1, 255, 65535)
_FEW_COLOURS = 256  # of a drawing; photographs and JPEGs have more


def read_mask(mask: Mask, photo: Photo | None = None) -> np.ndarray:
    """Read a mask: black is known, white is repainted.

    Any gray image is accepted: 1 to 32 bits or floating point, gray, palette or RGB. The EXIF rotation is applied.

    Args:
        mask: a path, an image in memory, or an array or tensor [H, W], of any numbers or bool; also with a channel
            dimension of 1, or as [H, W, 3] uint8 with equal channels.
        photo: the photograph that it must fit; None: any.

    Returns:
        [H, W] uint8: 1 is repainted, 0 is known.

    Raises:
        DataError: it cannot be read, does not fit the photograph, has transparent, coloured or non-finite pixels, or
            would repaint nothing or everything.
    """
    if isinstance(mask, str | Path | Image.Image):
        name, (channels, turn) = _from_image(mask)
        snippet = "numpy.asarray(mask)" if channels.shape[2] == 1 else 'numpy.asarray(mask.convert("RGB"))'
    else:
        name, channels, turn = "the mask", _from_array(mask), None
        snippet = "mask" if channels.shape[2] == 1 else "numpy.asarray(mask)"
    if photo is not None:
        channels = upright_as(channels, turn, photo, name, "mask")
    elif turn:
        channels = turned(channels, turn)
    values = channels[..., 0]
    if not np.isfinite(values).all():
        raise DataError(f"{name} has {(~np.isfinite(values)).sum()} non-finite pixels; give 0 to 1")
    _refuse_colours(channels, name, snippet)
    return _thresholded(values, name, snippet if channels.shape[2] == 1 else f"{snippet}[..., 0]")


def _thresholded(values: np.ndarray, name: str, snippet: str) -> np.ndarray:
    """[H, W] of any numbers => [H, W] uint8 of 0 and 1."""
    darkest, brightest = values.min(), values.max()
    white = next((white for white in _WHITES if brightest <= white), 0)
    if darkest < 0 or not white:
        strange = darkest if darkest < 0 else brightest
        raise DataError(f"{name} has the value {strange:g}; a mask is 0 to 1, 0 to 255 or 0 to 65535")
    hole = values >= white / 2
    if brightest == 0:
        raise DataError(f"{name} is all black, so nothing would be repainted; make white what is to be repainted")
    if darkest == white:
        raise DataError(
            f"{name} is all white, so nothing of the image would be kept; make black what is to be preserved, or "
            "draw a whole new image with latentflow sample"
        )
    if not hole.any() or hole.all():
        what = "is darker" if not hole.any() else "is brighter"
        advice = f"to repaint all but the darkest, in Pillow Image.fromarray({snippet} > {darkest:g})"
        raise DataError(
            f"every pixel of {name} {what} than half white, {darkest:g} to {brightest:g} of {white}, and white is "
            f"repainted; {advice if darkest < brightest else 'make it black and white'}"
        )
    if ((values != 0) & (values != white)).any():
        notice(
            f"{name} has gray pixels, as soft brushes and JPEG leave them: those of at least half white are "
            "repainted, the others preserved; the same goes for all masks",
            kind="gray mask",
        )
    return hole.astype(np.uint8)


def _refuse_colours(channels: np.ndarray, name: str, snippet: str) -> None:
    """Refuse coloured pixels in [H, W, 1 or 3], and say how to make a mask of such a picture.

    On a plain background the mask is all that differs from it; on a photograph it is all that has the pen's colour.
    """
    coloured = (channels != channels[..., :1]).any(-1)
    if not coloured.any():
        return
    colours, counts = np.unique(channels.astype(np.int64) @ (1 << 32, 1 << 16, 1), return_counts=True)
    colours = np.stack([colours >> 32, colours >> 16 & 0xFFFF, colours & 0xFFFF], 1)
    has_black, few = not colours[0].any(), len(colours) <= _FEW_COLOURS  # sorted: black comes first
    commonest = int(counts.argmax())
    chosen = 0 if has_black and (few or 4 * counts[0] >= counts.sum()) else commonest
    colour, example = tuple(colours[chosen].tolist()), tuple(channels[coloured][0].tolist())
    refusal = (
        f"{name} has {coloured.sum()} coloured pixels, such as RGB {example}, but a mask is black (known) and white "
        "(repainted); "
    )
    if few or 4 * counts[chosen] >= counts.sum():
        away = np.abs(colours - colour).max(1)
        threshold = 0 if 4 * away[away > 0].min() >= away.max() else away.max() // 2  # of soft edges and JPEG: half
        distance = f"abs({snippet}.astype(int) - {colour})" if any(colour) else snippet
        remedy = f"to repaint all that is not {colour}, in Pillow Image.fromarray({distance}.max(2) > "
        raise DataError(f"{refusal}{remedy}{threshold})")
    pen = int((counts * (np.ptp(colours, axis=1) > 0)).argmax())  # no shadow and no light, which are gray
    if 200 * counts[pen] >= counts.sum():
        colour = tuple(colours[pen].tolist())
        remedy = f"to repaint where it is {colour}, in Pillow Image.fromarray(({snippet} == {colour})"
        raise DataError(f"{refusal}{remedy}.all(2))")
    raise DataError(f"{refusal}it looks like a photograph; give the image first and the mask second")


def _from_image(mask: str | Path | Image.Image) -> tuple[str, tuple[np.ndarray, int | None]]:
    """The name of a mask for messages, its pixels [H, W, 1 or 3] as stored, and its own EXIF orientation."""
    in_memory = isinstance(mask, Image.Image)
    name = str((getattr(mask, "filename", "") or "in memory") if in_memory else mask)
    try:
        with open_image(mask, name) as image:
            if 0 in image.size:
                raise ValueError("it has no pixels")
            turn = own_turn(image)
            image.load()
            return f"the mask {name}", (_channels(image, f"the mask {name}"), turn)
    except BrokenImage as error:
        raise DataError(f"cannot read the mask {name}: {error.reason}; give a whole PNG file") from error


def _channels(image: Image.Image, name: str) -> np.ndarray:
    """The pixels as numbers, [H, W, 1 or 3]."""
    if image.has_transparency_data or "transparency" in image.info:
        _refuse_clear(image, name)
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)[..., None]
    if image.mode in ("1", "L", "LA"):
        return np.asarray(image.convert("L") if image.mode == "LA" else image, np.uint8)[..., None]
    return np.asarray(image.convert("RGB"))


def _refuse_clear(image: Image.Image, name: str) -> None:
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"{name} has a transparent gray, which may mean known or repainted; save it without transparency, in "
            "Pillow Image.fromarray(numpy.asarray(mask))"
        )
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    if (alpha == 255).all():
        return
    opaque = 'mask.convert("RGBA").getchannel("A")'
    colours = np.asarray(image.convert("RGBA"))[..., :3]
    varied = (
        ', or mask.convert("RGBA").convert("RGB") if its colours count and not its alpha' if np.ptp(colours) else ""
    )
    raise DataError(
        f"{name} has {(alpha < 255).sum()} transparent pixels, which may mean known or repainted; save, in Pillow, "
        f"{opaque} if what is opaque is repainted, {opaque}.point(lambda v: 255 - v) if what is transparent is"
        f"{varied}"
    )


def _from_array(mask: object) -> np.ndarray:
    """An array or tensor as [H, W, 1 or 3]."""
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu()
        mask = (mask.float() if mask.is_floating_point() else mask).numpy()
    if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "buif":
        kind = f"an array of {mask.dtype}" if isinstance(mask, np.ndarray) else f"of the type {type(mask).__name__}"
        raise DataError(f"the mask is {kind}; give a file, a Pillow image, or an array of numbers")
    found = list(mask.shape)
    while mask.ndim > 2 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.ndim == 2:
        mask = mask[..., None]
    channels = (1, 3) if mask.dtype == np.uint8 else (1,)
    if mask.ndim != 3 or mask.shape[2] not in channels or 0 in mask.shape:
        raise DataError(f"the mask is an array of shape {found}; give [height, width]")
    return mask
