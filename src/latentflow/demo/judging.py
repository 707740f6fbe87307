"""What the program that recognises shapes finds in a set of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from latentflow.data.sources.synthetic import CLASS_NAMES
from latentflow.demo.figures import Recognised
from latentflow.demo.recognition import recognise, recover_map


def judge(pixels: Tensor, labels: Sequence[int]) -> Recognised:
    """Recognise pictures ([B, 3, S, S] uint8) that should show the classes `labels`, indices of `CLASS_NAMES`."""
    found = [recognise(picture.permute(1, 2, 0).numpy()) for picture in pixels]
    wanted = [CLASS_NAMES[label].split() for label in labels]
    colour = np.array([f is not None and f.colour == name for f, (name, _) in zip(found, wanted, strict=True)])
    shape = np.array([f is not None and f.shape == name for f, (_, name) in zip(found, wanted, strict=True)])
    both, label_of = colour & shape, np.array(labels)
    return Recognised(
        num_images=len(found),
        both=both.mean(),
        shape=shape.mean(),
        colour=colour.mean(),
        nothing=sum(f is None for f in found) / len(found),
        by_class={name: both[label_of == n].mean() for n, name in enumerate(CLASS_NAMES) if (label_of == n).any()},
        wrong=np.flatnonzero(~both).tolist(),
    )


def mean_iou(maps: Sequence[np.ndarray], pictures: Tensor) -> float:
    """The mean over maps of their mean IoU with the maps recovered from pictures ([B, 3, S, S] uint8).

    The mean IoU of one map is over the classes that occur in it.
    """
    values = []
    for wanted, picture in zip(maps, pictures, strict=True):
        found = recover_map(picture.permute(1, 2, 0).numpy())
        pairs = [(wanted == index, found == index) for index in np.unique(wanted)]
        values.append(np.mean([(one & other).sum() / (one | other).sum() for one, other in pairs]))
    return float(np.mean(values))
