"""Scores of pairs: an image and its target, or a map and its target.

SSIM is torchmetrics'. PSNR is `latentflow.data.pictures.user_picture.psnr`, which gives equal images a finite value.

Legend: B or N images, H and W height and width in pixels, D features of an image, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentflow.data.items import UNLABELLED
from latentflow.data.pictures.shown import as_levels, as_shown
from latentflow.data.pictures.user_picture import psnr
from latentflow.errors import ConfigError, DataError
from latentflow.metrics.features.lpips import Lpips
from latentflow.metrics.scores import require_enough
from latentflow.metrics.statistics import exact_device, require_features
from latentflow.pixel_format import RGB, PixelFormat

__all__ = [
    "DiscriminativeScores",
    "MapIoU",
    "PairJudge",
    "confusion",
    "discriminative_scores",
    "iou",
    "pair_order",
    "psnr",
    "ssim",
]

_SSIM_WINDOW = 11  # pixels: a Gaussian of standard deviation 1.5
_EXTRA = "pip install 'latentflow[eval]'"


@dataclass(frozen=True)
class PairJudge:
    """The measurements of a pair: PSNR, and optionally SSIM and LPIPS.

    Attributes:
        device: where it is measured; `lpips` moves the images to its own weights.
        pixel_format: of the images. PSNR and SSIM compare stored values, of which the range is 0 to 255; LPIPS what is
            shown (see `data.pictures.shown`).
    """

    with_ssim: bool = False
    lpips: Lpips | None = None
    device: torch.device | str = "cpu"
    pixel_format: PixelFormat = RGB

    def __call__(self, images: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Values of pairs of images [B, P, H, W], on any device: [B] each, on the CPU."""
        pair = [x.to(exact_device(self.device)) for x in (images, real)]
        levels = [as_levels(x, self.pixel_format) for x in pair]
        values = {"psnr": psnr(*levels)}
        if self.with_ssim:
            values["ssim"] = ssim(*levels)
        if self.lpips is not None:
            values["lpips"] = self.lpips(*(as_shown(x, self.pixel_format) for x in pair))
        return {name: found.cpu() for name, found in values.items()}

    @property
    def key(self) -> str:
        """A text that is equal for equal judges."""
        key = f"ssim {self.with_ssim}, lpips {self.lpips.hash[:12] if self.lpips else None}"
        return key if self.pixel_format == RGB else f"{key}, {self.pixel_format.model_dump_json()}"


def pair_order(names: Sequence[str], other_names: Sequence[str]) -> list[int]:
    """For each of `names`, where the same name stands among `other_names`: pairs are made by name, never by position.

    Raises:
        DataError: a name is there twice, or in one of the two only.
    """
    for listed in (names, other_names):
        if len(set(listed)) < len(listed):
            twice = next(name for name in listed if list(listed).count(name) > 1)
            raise DataError(f"two images are called {twice}: images cannot be paired by name; rename one")
    positions = {name: position for position, name in enumerate(other_names)}
    if lonely := sorted(set(names) ^ positions.keys()):
        raise DataError(
            f"{len(lonely)} images have no partner of the same name, {lonely[0]} among them: "
            "both sets must hold the same names"
        )
    return [positions[name] for name in names]


def ssim(images: Tensor, other: Tensor) -> Tensor:
    """Structural similarity, 1 for equal images: two of [B, P, H, W], values 0 to 255 => [B] float64, where they lie.

    Window and constants are those of Wang et al. (2004): a Gaussian of standard deviation 1.5 over 11 x 11 pixels,
    K_1 = 0.01 and K_2 = 0.03, the mean over windows that lie inside the image, and over the channels.

    Raises:
        DataError: shapes differ, or a side is shorter than the window.
        ConfigError: the torchmetrics library is not installed.
    """
    if images.shape != other.shape or images.dim() != 4:
        raise DataError(
            f"images of shape {list(images.shape)} and {list(other.shape)} are not pairs; give equal shapes"
        )
    if min(images.shape[2:]) < _SSIM_WINDOW:
        raise DataError(f"SSIM needs images of {_SSIM_WINDOW} pixels or more, not of {list(images.shape[2:])}")
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ConfigError(f"SSIM needs the torchmetrics library: {_EXTRA}") from error
    first, second = images.double(), other.double()
    options = {"data_range": 255.0, "reduction": "none", "return_full_image": True}
    _, everywhere = structural_similarity_index_measure(first, second, **options)
    border = _SSIM_WINDOW // 2  # where torchmetrics mirrors the image, and the paper has no window
    return everywhere[..., border:-border, border:-border].mean((1, 2, 3))


@dataclass(frozen=True)
class DiscriminativeScores:
    """How well a linear classifier separates generated images from real ones; arXiv 2103.10428.

    Attributes:
        p_ids: share of pairs whose generated image is classified as more real than its real one; 0 is worst, 0.5 best.
        u_ids: share of all images that are misclassified; 0 is worst, 0.5 best.
    """

    p_ids: float
    u_ids: float


def discriminative_scores(generated: Tensor, real: Tensor) -> DiscriminativeScores:
    """P-IDS and U-IDS: a linear support vector machine is fitted to both sets, and classifies the same images.

    Args:
        generated: [N, D] features; row i belongs to row i of `real`, see `pair_order`.
        real: [N, D].

    Raises:
        DataError: features that are not finite, do not match, or are not pairs.
        ConfigError: the scikit-learn library is not installed.
    """
    require_features(real, "real")
    require_features(generated, "generated", real.shape[1])
    if len(generated) != len(real):
        raise DataError(f"{len(generated)} generated and {len(real)} real images are not pairs; give as many of each")
    require_enough("p_ids", len(real))
    try:
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise ConfigError(f"P-IDS and U-IDS need the scikit-learn library: {_EXTRA}") from error
    rows = torch.cat([real, generated]).detach().cpu().double().numpy()
    is_real = np.repeat([1, 0], len(real))
    judge = LinearSVC(dual=False).fit(rows, is_real)  # squared hinge loss, C = 1, deterministic
    realness = judge.decision_function(rows)
    p_ids = np.mean(realness[len(real) :] > realness[: len(real)])
    return DiscriminativeScores(float(p_ids), float(np.mean((realness > 0) != is_real)))


def confusion(predicted: Tensor, true: Tensor, num_classes: int, *, ignore: int = UNLABELLED) -> Tensor:
    """How often class i was predicted as class j: [K, K] int64, true classes as rows; several images add up.

    Args:
        predicted: integers in [0, K), of any shape.
        true: integers in [0, K), or `ignore` for unlabelled pixels, which do not count.

    Raises:
        DataError: shapes differ, or a class is outside [0, K).
    """
    if predicted.shape != true.shape:
        raise DataError(f"maps of shape {list(predicted.shape)} and {list(true.shape)} are not pairs")
    known = true != ignore
    predicted, true = predicted[known].long(), true[known].long()
    for what, classes in (("predicted", predicted), ("true", true)):
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            wrong = int(classes.max()) if int(classes.max()) >= num_classes else int(classes.min())
            raise DataError(f"a {what} map has class {wrong}; there are {num_classes}, counted from 0")
    return torch.bincount(true * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True)
class MapIoU:
    """Intersection over union of predicted and true maps.

    Attributes:
        mean: over the classes that are in either kind of map.
        per_class: K numbers; None for a class that is nowhere.
    """

    mean: float
    per_class: tuple[float | None, ...]


def iou(counts: Tensor) -> MapIoU:
    """Intersection over union by class, and its mean, from the [K, K] counts of `confusion`.

    Raises:
        DataError: there is no labelled pixel.
    """
    both = counts.diagonal().double()
    either = counts.sum(0) + counts.sum(1) - counts.diagonal()
    if not either.any():
        raise DataError("the true maps have no labelled pixel, so there is no intersection over union")
    values = (both / either)[either > 0]
    per_class = tuple(float(b / e) if e else None for b, e in zip(both.tolist(), either.tolist(), strict=True))
    return MapIoU(float(values.mean()), per_class)
