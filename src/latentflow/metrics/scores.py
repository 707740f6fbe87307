"""Scores of two sets of features: Fréchet distance (FID), kernel distance (KID), Inception Score.

All arithmetic is in float64. torchmetrics is not used here: its FID, KID and Inception Score come with a network of a
library that this package does without, and draw their subsets by another rule.

Legend: N images, D features of an image, K classes, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from latentflow.errors import ConfigError, DataError, nearest
from latentflow.metrics.statistics import FeatureStatistics, gram, require_features

Resampled = Callable[[Tensor], Tensor]
"""Scores of resamples: how often each of N images was drawn, [R, N] float64 => [R] float64."""

SCORES = ("fid", "kid", "inception_score", "precision", "recall", "density", "coverage", "p_ids", "u_ids")
_BLOCK = 1024  # rows and columns of a kernel matrix held at a time


@dataclass(frozen=True)
class MeanStd:
    """A score that is a mean over subsets or splits, and the standard deviation (ddof 0) of what it is the mean of."""

    mean: float
    std: float


def require_enough(
    score: str,
    n: int,
    *,
    dim: int | None = None,
    subset_size: int = 1000,
    neighbours: int = 5,
    splits: int = 10,
) -> str | None:
    """Refuse too few images for a score, or warn of what the number does to it.

    Args:
        score: one of `SCORES`; "fid" stands for the Fréchet distance of any features.
        n: images in the smaller set.
        dim: D, for the warnings.
        subset_size: of "kid".
        neighbours: of the four from "precision" to "coverage".
        splits: of "inception_score".

    Returns:
        A warning for people, or None.

    Raises:
        DataError: the score is not defined for so few.
        ConfigError: no such score.
    """
    if score not in SCORES:
        raise ConfigError(f"there is no score {score!r}: {nearest(score, SCORES)}")
    if score == "fid":
        least, why = 2, "a covariance needs two"
    elif score == "kid":
        least, why = max(subset_size, 2), f"its subsets hold {subset_size}: take smaller ones, or more images"
    elif score == "inception_score":
        least, why = splits, f"it is a mean over {splits} splits: take fewer splits, or more images"
    elif score.endswith("_ids"):
        least, why = 2, "a classifier needs two"
    else:
        least, why = neighbours + 1, f"each needs {neighbours} neighbours: take fewer neighbours, or more images"
    if n < least:
        raise DataError(f"{score} of {n} images: {why}")
    if score == "fid" and dim is not None and n <= dim:
        return (
            f"{n} images have a singular covariance of {dim} features: the distance is far too large, "
            "and may be compared with others of exactly as many images only"
        )
    if score in ("p_ids", "u_ids") and dim is not None and 2 * n <= dim:
        return f"{n} pairs of {dim} features: a linear classifier tells any such sets apart, so the score says nothing"
    return None


def frechet_distance(statistics: FeatureStatistics, other: FeatureStatistics) -> float:
    """|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), arXiv 1706.08500; of Inception features this is FID.

    Symmetric. Of equal statistics it is zero up to 1e-12 times the traces; up to 1e-7 times the traces, and of either
    sign, where eigenvalues of a covariance vanish, as they do with fewer images than features.

    Raises:
        DataError: different numbers of features.
    """
    if statistics.dim != other.dim:
        raise DataError(f"statistics of {statistics.dim} and of {other.dim} features have no distance")
    other_mean, other_covariance = other.mean.to(statistics.mean.device), other.covariance.to(statistics.mean.device)
    covariances = sorted((statistics.covariance, other_covariance), key=lambda s: float(s.trace()))
    traces = covariances[0].trace() + covariances[1].trace()
    return float((statistics.mean - other_mean).square().sum() + traces - 2 * _trace_of_root(*covariances))


def _trace_of_root(first: Tensor, second: Tensor) -> Tensor:
    """tr (S_1 S_2)^(1/2), by the eigenvalues of the symmetric R S_2 R with R = S_1^(1/2), which are those of S_1 S_2.

    Eigenvalues that vanish come out as rounding errors of either sign. The roots of their moduli are summed as the
    published programs do it, whose figures for singular covariances are met to 1e-7 in this way only.
    """
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.abs().sqrt()) @ vectors.T
    product = root @ second @ root
    return torch.linalg.eigvalsh((product + product.T) / 2).abs().sqrt().sum()


def resampled_frechet(features: Tensor, reference: FeatureStatistics) -> Resampled:
    """For `bootstrap`: the Fréchet distance of resampled [N, D] features to a fixed reference.

    Raises:
        DataError: features that are not finite, or D is another than the reference's.
    """
    rows = require_features(features, "generated", reference.dim).double().to(reference.mean.device)
    shift = rows.mean(0)
    rows = rows - shift
    squares = rows.square().sum(1)
    # the eigenvalues of F^T S F are those of S_reference^(1/2) S S_reference^(1/2), with S_reference = F F^T
    projected = rows @ _factor(reference.covariance)
    away, reference_trace = shift - reference.mean, reference.covariance.trace()

    def distance(counts: Tensor) -> Tensor:
        n = counts.sum()
        drawn = counts > 0
        mean = counts @ rows / n
        trace = (counts @ squares - n * mean.square().sum()) / (n - 1)
        centered = (projected[drawn] - counts @ projected / n) * (counts[drawn] / (n - 1)).sqrt()[:, None]
        smaller = gram(centered if centered.shape[0] >= centered.shape[1] else centered.T.contiguous())
        root_trace = torch.linalg.eigvalsh(smaller).clamp(min=0).sqrt().sum()
        return (away + mean).square().sum() + trace + reference_trace - 2 * root_trace

    return lambda counts: torch.stack([distance(row) for row in counts.to(rows.device)]).cpu()


def _factor(covariance: Tensor) -> Tensor:
    """F with S = F F^T: [D, D] => [D, rank]. Eigenvalues that are rounding errors of the largest are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


@dataclass(frozen=True)
class FrechetBySize:
    """How the Fréchet distance falls with the number of images.

    Attributes:
        sizes: numbers of images.
        distances: the mean distance of subsets of each size.
        infinite: where a line in 1/N through them meets 1/N = 0 (FID_infinity of arXiv 1911.07023).
    """

    sizes: tuple[int, ...]
    distances: tuple[float, ...]
    infinite: float


def frechet_by_size(
    features: Tensor,
    reference: FeatureStatistics,
    *,
    sizes: Sequence[int] | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> FrechetBySize:
    """The Fréchet distance at several numbers of images, and its limit for infinitely many (of `features` only).

    The distance of N images is too large by about a constant times 1/N, another one for each model: two models are
    compared fairly at the same N, or at the limit.

    Args:
        features: [N, D].
        sizes: numbers of images, at least two; None: 8 of them, evenly spaced from max(N // 8, 2) to N.
        repeats: random subsets averaged at each size.

    Raises:
        DataError: features that are not finite, or sizes outside [2, N].
    """
    total = len(require_features(features, "generated", reference.dim))
    chosen = sorted(set(sizes or np.linspace(max(total // 8, 2), total, 8).astype(int).tolist()))
    if len(chosen) < 2 or not 2 <= chosen[0] <= chosen[-1] <= total:
        raise DataError(f"sizes {chosen} of {total} images; give two or more different ones from 2 to {total}")
    generator = torch.Generator().manual_seed(seed)

    def distance(size: int) -> float:
        rows = torch.randperm(total, generator=generator)[:size].to(features.device)
        return frechet_distance(FeatureStatistics.of(features[rows]), reference)

    distances = [math.fsum(distance(size) for _ in range(repeats)) / repeats for size in chosen]
    _, infinite = np.polyfit(1 / np.array(chosen), distances, 1)
    return FrechetBySize(tuple(chosen), tuple(distances), float(infinite))


def kernel_distance(
    generated: Tensor, real: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> MeanStd:
    """KID (arXiv 1801.01401): the unbiased squared maximum mean discrepancy of the kernel (x.y / D + 1)^3.

    Subsets are drawn as torch-fidelity draws them: `numpy.random.RandomState(seed)`, without replacement, first of
    `generated` and then of `real`, in each subset.

    Args:
        generated: [N, D].
        real: [M, D].

    Raises:
        DataError: features that are not finite or do not match, or fewer than `subset_size`.
    """
    first, second = _both(generated, real)
    require_enough("kid", min(len(first), len(second)), subset_size=subset_size)
    random = np.random.RandomState(seed)

    def subset(features: Tensor) -> Tensor:
        rows = random.choice(len(features), subset_size, replace=False)
        return features[torch.from_numpy(rows).to(features.device)]

    values = [_discrepancy(subset(first), subset(second)) for _ in range(num_subsets)]
    return MeanStd(float(np.mean(values)), float(np.std(values)))


def kernel_distance_of_all(generated: Tensor, real: Tensor) -> float:
    """KID of all images at once, without subsets and so without chance: [N, D] and [M, D]; O(N^2) in time only.

    Raises:
        DataError: features that are not finite or do not match, or fewer than two.
    """
    first, second = _both(generated, real)
    require_enough("kid", min(len(first), len(second)), subset_size=2)
    return _discrepancy(first, second)


def resampled_kernel(generated: Tensor, real: Tensor) -> Resampled:
    """For `bootstrap`: `kernel_distance_of_all` of resampled `generated` to fixed `real`.

    Pairs of an image with itself, which resampling makes, are left out as they are in the estimate.

    Raises:
        DataError: features that are not finite or do not match.
    """
    first, second = _both(generated, real)
    n, m = len(first), len(second)
    real_part = _sum_of_distinct_pairs(second) / (m * (m - 1))
    to_real = torch.zeros(n, dtype=torch.float64, device=first.device)
    for rows, _, block in _kernel_blocks(first, second):
        to_real[rows] += block.sum(1) / m

    def scores(counts: Tensor) -> Tensor:
        counts = counts.to(first.device)
        pairs = torch.zeros(len(counts), dtype=torch.float64, device=first.device)
        for rows, columns, block in _kernel_blocks(first, first):
            if rows == columns:
                block.fill_diagonal_(0)
            pairs += ((counts[:, rows] @ block) * counts[:, columns]).sum(1)
        total = counts.sum(1)
        distinct = total.square() - counts.square().sum(1)
        return (pairs / distinct + real_part - 2 * (counts @ to_real) / total).cpu()

    return scores


def _both(generated: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    require_features(real, "real")
    require_features(generated, "generated", real.shape[1])
    return _float64(generated), _float64(real)


def _float64(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()


def _kernel_blocks(first: Tensor, second: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    for i in range(0, len(first), _BLOCK):
        for j in range(0, len(second), _BLOCK):
            rows, columns = slice(i, min(i + _BLOCK, len(first))), slice(j, min(j + _BLOCK, len(second)))
            yield rows, columns, (first[rows] @ second[columns].T).div_(first.shape[1]).add_(1).pow_(3)


def _sum_of_distinct_pairs(x: Tensor) -> Tensor:
    """Sum of k(x_i, x_j) over i != j."""
    diagonal = x.square().sum(1).div_(x.shape[1]).add_(1).pow_(3)
    return sum(block.sum() for _, _, block in _kernel_blocks(x, x)) - diagonal.sum()


def _discrepancy(first: Tensor, second: Tensor) -> float:
    """sum_{i != j} k(x_i, x_j) / n(n-1) + sum_{i != j} k(y_i, y_j) / m(m-1) - 2 sum_{ij} k(x_i, y_j) / nm."""
    n, m = len(first), len(second)
    across = sum(block.sum() for _, _, block in _kernel_blocks(first, second))
    within = _sum_of_distinct_pairs(first) / (n * (n - 1)) + _sum_of_distinct_pairs(second) / (m * (m - 1))
    return float(within - 2 * across / (n * m))


def inception_score(logits: Tensor, *, splits: int = 10, shuffle_seed: int | None = 2020) -> MeanStd:
    """exp of the mean over images of KL(p(class | image) || p(class)), arXiv 1606.03498; mean and std over splits.

    Args:
        logits: [N, K] of generated images.
        splits: parts with a p(class) of their own; published figures take 10.
        shuffle_seed: shuffle by `numpy.random.RandomState` first, as torch-fidelity does; None: keep the order.

    Raises:
        DataError: logits that are not finite, or fewer images than splits.
    """
    n = len(require_features(logits, "generated"))
    require_enough("inception_score", n, splits=splits)
    logits = _float64(logits)
    if shuffle_seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(shuffle_seed).permutation(n)).to(logits.device)]
    bounds = [index * n // splits for index in range(splits + 1)]
    parts = [logits[start:end] for start, end in pairwise(bounds)]
    values = [float(resampled_inception_score(part)(torch.ones(1, len(part)).double())) for part in parts]
    return MeanStd(float(np.mean(values)), float(np.std(values)))


def resampled_inception_score(logits: Tensor) -> Resampled:
    """For `bootstrap`: the Inception Score of resampled [N, K] logits, without splits."""
    log_p = torch.log_softmax(_float64(logits), 1)
    p = log_p.exp()
    negative_entropy = (p * log_p).sum(1)

    def scores(counts: Tensor) -> Tensor:
        counts = counts.to(p.device)
        total = counts.sum(1)
        mean = counts @ p / total[:, None]
        # mean KL = mean of sum_k p log p, minus sum_k p(k) log p(k)
        return (counts @ negative_entropy / total - torch.xlogy(mean, mean).sum(1)).exp().cpu()

    return scores
