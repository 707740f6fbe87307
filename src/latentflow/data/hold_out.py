"""Images that a run never trains on, chosen by the hashes of their names.

The choice depends on names alone, not on a seed: all runs on the same images hold out the same ones, and images that
are added later hardly change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from latentflow.errors import DataError
from latentflow.records import Record

MOST_SHARE = 0.5


def _share(given: Any) -> float | str:
    try:
        share = given if given == "auto" else float(given)
    except (TypeError, ValueError):
        share = -1.0
    if share != "auto" and not 0 <= share <= MOST_SHARE:
        raise ValueError(f"write auto, 0 for none, or a share of at most {MOST_SHARE:g}, such as 0.1")
    return share


HeldOutShare = Annotated[float | Literal["auto"], BeforeValidator(_share)]
"""The share of the images that is held out; "auto": see `count_held_out`."""

_SHARE, _LEAST, _MOST = 0.05, 64, 10_000
_MOST_OF_FEW = 0.1  # of fewer than 640 images, of which 64 would be too many
_FEWEST = 8  # fewer say nothing


class HeldOut(Record):
    """Which images are held out; it follows from the name of an image alone.

    The hash of a name is a number in [0, 1). Hashes are stored in place of names, which may be private.
    """

    num_images: int = Field(ge=1)
    below: float = Field(gt=0, le=1, description="Images whose hash is below this are held out.")
    spared: list[float] = Field(
        [], description="Hashes of images below it that are trained on: each class keeps one image at least."
    )

    def rows(self, names: Sequence[str]) -> list[int]:
        """The places of those of `names` that are held out, rising."""
        hashes = _hashes(names)
        return np.flatnonzero((hashes < self.below) & ~np.isin(hashes, self.spared)).tolist()


def count_held_out(num_images: int, share: HeldOutShare) -> int:
    """How many images are held out: with "auto" 5 %, at least 64 and at most 10,000.

    Of fewer than 640 images it is a tenth, and of fewer than 80 none. With a share above 0 it is one at least.
    """
    if share != "auto":
        return min(max(round(share * num_images), 1), num_images - 1) if share and num_images else 0
    few = int(_MOST_OF_FEW * num_images)
    return min(max(round(_SHARE * num_images), min(_LEAST, few)), _MOST) if few >= _FEWEST else 0


def hold_out(names: Sequence[str], share: HeldOutShare, labels: Sequence[int] | None = None) -> HeldOut | None:
    """Choose the images with the smallest hashes; None if there are none to hold out.

    Args:
        names: of all images that could be trained on, each once.
        labels: the class of each image; None: unlabelled. Of each class one image at least is trained on.

    Raises:
        DataError: a share is given, and each image is the only one of its class.
    """
    number = count_held_out(len(names), share)
    if not number:
        return None
    hashes = _hashes(names)
    order = np.argsort(hashes, kind="stable")
    # The image with the largest hash of a class is never held out.
    classes = np.asarray(labels) if labels is not None else np.zeros(len(names), np.int64)
    last = np.zeros(len(names), bool)
    last[list({int(classes[place]): int(place) for place in order}.values())] = True
    able = order[~last[order]][:number]
    if not len(able) and share == "auto":
        return None
    if not len(able):
        raise DataError(
            f"data.held_out = {share}, but each of the {len(names)} images is the only one of its class; "
            "set data.held_out=0"
        )
    above = np.flatnonzero(order == able[-1])[0] + 1
    below = float(hashes[order[above]]) if above < len(order) else 1.0
    spared = [float(hashes[place]) for place in order[:above] if last[place]]
    return HeldOut(num_images=len(able), below=below, spared=spared)


def _hashes(names: Iterable[str]) -> np.ndarray:
    """A number in [0, 1) for each name, the same on every machine: [N] float64."""
    digests = (hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in names)
    return np.array([int.from_bytes(digest, "big") >> 11 for digest in digests], np.float64) * 2.0**-53
