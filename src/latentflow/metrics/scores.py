"""Scores of two sets of features: Fréchet distance (FID), kernel distance (KID), Inception Score.

All arithmetic is in float64, on the given device or that of the features; features that lie elsewhere are moved there
in parts. torchmetrics is not used here: its FID, KID and Inception Score depend on the network of a library that this
package does not require, and draw their subsets by another rule.

The contribution of an image to a score is the derivative of the score with respect to the weight of that image, times
N. The standard deviation of the contributions gives the standard error of the score to first order (the delta method).

Legend: N images, D features of an image, K classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from latentflow.errors import ConfigError, DataError, nearest
from latentflow.metrics.statistics import FeatureStatistics, exact_device, gram, require_features

Resampled = Callable[[Tensor], Tensor]
"""Scores of resamples: how often each of N images was drawn, [R, N] float64 => [R] float64."""

SCORES = ("fid", "kid", "inception_score", "precision", "recall", "density", "coverage", "p_ids", "u_ids")
_BLOCK = 1024  # rows and columns of a kernel matrix held at a time
_CHUNK = 2048  # rows moved and converted to float64 at a time
_PARTNERS = 5000  # images that each image is compared with for its contribution to KID


@dataclass(frozen=True)
class MeanStd:
    """A score that is a mean over subsets or splits, and the standard deviation (ddof 0) over them."""

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
    """Refuse too few images for a score, or warn of its bias at this number.

    Args:
        score: one of `SCORES`; "fid" stands for the Fréchet distance of any features.
        n: images in the smaller set.
        dim: D, for the warnings.
        subset_size: of "kid".
        neighbours: of the four from "precision" to "coverage".
        splits: of "inception_score".

    Returns:
        A warning for the user, or None.

    Raises:
        DataError: the score is not defined for so few.
        ConfigError: no such score.
    """
    if score not in SCORES:
        raise ConfigError(f"unknown score {score!r}; {nearest(score, SCORES)}")
    if score == "fid":
        least, why = 2, "for a covariance"
    elif score == "kid":
        least, why = max(subset_size, 2), f"for subsets of {subset_size}"
    elif score == "inception_score":
        least, why = splits, f"for {splits} splits"
    elif score.endswith("_ids"):
        least, why = 2, "for a classifier"
    else:
        least, why = neighbours + 1, f"for {neighbours} neighbours of each"
    if n < least:
        raise DataError(f"{score} needs at least {least} images per set, {why}; got {n}")
    if score == "fid" and dim is not None and n <= dim:
        return (
            f"the distance is strongly biased upward at this sample size ({n} images, whose covariance of {dim} "
            f"features is singular); compare only with distances of exactly {n} images"
        )
    if score in ("p_ids", "u_ids") and dim is not None and 2 * n <= dim:
        return f"{n} pairs of {dim} features: a linear classifier separates any such sets, so the score is meaningless"
    return None


def frechet_distance(statistics: FeatureStatistics, other: FeatureStatistics) -> float:
    """|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), arXiv 1706.08500; of Inception features this is FID.

    Symmetric. Of equal statistics it is zero up to 1e-12 times the traces; up to 1e-7 times the traces, and of either
    sign, where eigenvalues of a covariance vanish, as they do with fewer images than features.

    Raises:
        DataError: different numbers of features.
    """
    if statistics.dim != other.dim:
        raise DataError(
            f"statistics of {statistics.dim} and of {other.dim} features have no distance; compute both with the same "
            "feature network"
        )
    other_mean, other_covariance = other.mean.to(statistics.mean.device), other.covariance.to(statistics.mean.device)
    covariances = sorted((statistics.covariance, other_covariance), key=lambda s: float(s.trace()))
    traces = covariances[0].trace() + covariances[1].trace()
    return float((statistics.mean - other_mean).square().sum() + traces - 2 * _trace_of_root(*covariances))


def _trace_of_root(first: Tensor, second: Tensor) -> Tensor:
    """tr (S_1 S_2)^(1/2), by the eigenvalues of the symmetric R S_2 R with R = S_1^(1/2), which are those of S_1 S_2.

    Eigenvalues that vanish come out as rounding errors of either sign. The roots of their moduli are summed as the
    published programs do it, whose figures for singular covariances are met to 1e-7 in this way only.
    """
    values, vectors = _eigh(first)
    root = (vectors * values.abs().sqrt()) @ vectors.T
    product = root @ second @ root
    return _eigvalsh((product + product.T) / 2).abs().sqrt().sum()


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and vectors; by LAPACK if a GPU's solver fails on a singular matrix."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, vectors = (x.to(matrix.device) for x in torch.linalg.eigh(matrix.cpu()))
    return values, vectors


def _eigvalsh(matrix: Tensor) -> Tensor:
    try:
        return torch.linalg.eigvalsh(matrix)
    except torch.linalg.LinAlgError:
        return torch.linalg.eigvalsh(matrix.cpu()).to(matrix.device)


def frechet_contributions(features: Tensor, statistics: FeatureStatistics, reference: FeatureStatistics) -> Tensor:
    """The contribution of each image to the Fréchet distance to a fixed reference: [N, D] => [N] float64, of mean zero.

    With R = S_r^(1/2) and T = R (R S R)^(-1/2) R, the linear map that carries the one normal distribution to the other,
    the derivatives of |m - m_r|^2, tr S and 2 tr (R S R)^(1/2) in the direction of an image at x = m + c are
    2 (m - m_r).c, |c|^2 and c.T c, each less its mean.

    Args:
        statistics: of `features`; everything is computed on its device.
    """
    mean, covariance = statistics.mean, statistics.covariance
    away = mean - reference.mean.to(mean.device)
    factor = _factor(reference.covariance.to(mean.device))
    inner = factor.T @ covariance @ factor
    values, vectors = _eigh((inner + inner.T) / 2)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root = factor @ (vectors[:, kept] * values[kept] ** -0.25)  # T = root root^T

    def part(rows: Tensor) -> Tensor:
        centered = rows.to(mean.device).double() - mean
        of_covariance = centered.square().sum(1) - (centered @ root).square().sum(1)
        return 2 * centered @ away + of_covariance * (len(features) / (len(features) - 1))

    found = torch.cat([part(rows) for rows in features.split(_CHUNK)]).cpu()
    return found - found.mean()


def resampled_frechet(
    features: Tensor, reference: FeatureStatistics, *, device: torch.device | str | None = None
) -> Resampled:
    """For `bootstrap`: the Fréchet distance of resampled [N, D] features to a fixed reference.

    A resample of more images than features takes a product of N x D^2 and the eigenvalues of a matrix of D x D. All of
    them together take N x D numbers of memory.

    Args:
        device: where it is computed; None: where the reference is.

    Raises:
        DataError: features that are not finite, or D is another than the reference's.
    """
    require_features(features, "generated", reference.dim)
    device, n = exact_device(device or reference.mean.device), len(features)
    reference_mean, covariance = reference.mean.to(device), reference.covariance.to(device)
    shift = torch.stack([part.to(device).double().sum(0) for part in features.split(_CHUNK)]).sum(0) / n
    away, reference_trace = shift - reference_mean, covariance.trace()
    # the eigenvalues of F^T S F are those of S_reference^(1/2) S S_reference^(1/2), with S_reference = F F^T
    factor = _factor(covariance)

    def parts() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, n, _CHUNK):
            yield slice(start, start + _CHUNK), features[start : start + _CHUNK].to(device).double() - shift

    projected = torch.empty(n, factor.shape[1], dtype=torch.float64, device=device)
    squares = torch.empty(n, dtype=torch.float64, device=device)
    for rows, centered in parts():
        projected[rows], squares[rows] = centered @ factor, centered.square().sum(1)

    def root_trace(counts: Tensor) -> Tensor:
        total, mean = counts.sum(), counts @ projected / counts.sum()
        drawn = counts.nonzero()[:, 0]
        weights = (counts[drawn] / (total - 1)).sqrt()[:, None]
        if len(drawn) >= projected.shape[1]:
            product = torch.zeros(projected.shape[1], projected.shape[1], dtype=torch.float64, device=device)
            for chosen, weight in zip(drawn.split(_CHUNK), weights.split(_CHUNK), strict=True):
                gram((projected[chosen] - mean) * weight, into=product)
        else:
            product = gram(((projected[drawn] - mean) * weights).T.contiguous())
        return _eigvalsh(product).clamp(min=0).sqrt().sum()

    def distances(counts: Tensor) -> Tensor:
        counts = counts.to(device)
        total = counts.sum(1)
        means = sum(counts[:, rows] @ centered for rows, centered in parts()) / total[:, None]
        traces = (counts @ squares - total * means.square().sum(1)) / (total - 1)
        roots = torch.stack([root_trace(row) for row in counts])
        return ((away + means).square().sum(1) + traces + reference_trace - 2 * roots).cpu()

    return distances


def _factor(covariance: Tensor) -> Tensor:
    """F with S = F F^T: [D, D] => [D, rank]. Eigenvalues that are rounding errors of the largest are left out."""
    values, vectors = _eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def kernel_distance(
    generated: Tensor,
    real: Tensor,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    device: torch.device | str | None = None,
) -> MeanStd:
    """KID (arXiv 1801.01401): the unbiased squared maximum mean discrepancy of the kernel (x.y / D + 1)^3.

    Subsets are drawn as torch-fidelity draws them: `numpy.random.RandomState(seed)`, without replacement, first of
    `generated` and then of `real`, in each subset.

    Args:
        generated: [N, D].
        real: [M, D].
        device: where it is computed; None: where `generated` lies.

    Raises:
        DataError: features that are not finite or do not match, or fewer than `subset_size`.
    """
    device = _both(generated, real, device)
    require_enough("kid", min(len(generated), len(real)), subset_size=subset_size)
    random = np.random.RandomState(seed)

    def subset(features: Tensor) -> Tensor:
        rows = torch.from_numpy(random.choice(len(features), subset_size, replace=False))
        return features[rows.to(features.device)].to(device)

    values = torch.stack([_discrepancy(subset(generated), subset(real), device) for _ in range(num_subsets)]).cpu()
    return MeanStd(float(np.mean(values.numpy())), float(np.std(values.numpy())))


def kernel_distance_of_all(generated: Tensor, real: Tensor, *, device: torch.device | str | None = None) -> float:
    """KID of all images at once, without subsets and so without chance: [N, D] and [M, D]; O(N^2) in time only.

    Raises:
        DataError: features that are not finite or do not match, or fewer than two.
    """
    device = _both(generated, real, device)
    require_enough("kid", min(len(generated), len(real)), subset_size=2)
    return float(_discrepancy(generated, real, device))


def resampled_kernel(generated: Tensor, real: Tensor, *, device: torch.device | str | None = None) -> Resampled:
    """For `bootstrap`: `kernel_distance_of_all` of resampled `generated` to fixed `real`.

    Pairs of an image with itself, which resampling makes, are left out as they are in the estimate.

    Raises:
        DataError: features that are not finite or do not match.
    """
    device = _both(generated, real, device)
    n, m = len(generated), len(real)
    real_part = _sum_of_distinct_pairs(real, device) / (m * (m - 1))
    to_real = torch.zeros(n, dtype=torch.float64, device=device)
    for rows, _, block in _kernel_blocks(generated, real, device):
        to_real[rows] += block.sum(1) / m

    def scores(counts: Tensor) -> Tensor:
        counts = counts.to(device)
        pairs = torch.zeros(len(counts), dtype=torch.float64, device=device)
        for rows, columns, block in _kernel_blocks(generated, generated, device):
            if rows == columns:
                block.fill_diagonal_(0)
            pairs += ((counts[:, rows] @ block) * counts[:, columns]).sum(1)
        total = counts.sum(1)
        distinct = total.square() - counts.square().sum(1)
        return (pairs / distinct + real_part - 2 * (counts @ to_real) / total).cpu()

    return scores


def kernel_contributions(
    generated: Tensor, real: Tensor, *, most: int = _PARTNERS, device: torch.device | str | None = None
) -> Tensor:
    """The contribution of each generated image to KID: [N, D] and [M, D] => [N] float64, of mean zero.

    It is twice the mean of k(x, x') over other generated images, less twice that of k(x, y) over real ones.

    Args:
        most: images of each kind that the means are over, drawn from all, if there are more.

    Raises:
        DataError: features that are not finite or do not match, or fewer than two.
    """
    device = _both(generated, real, device)
    require_enough("kid", min(len(generated), len(real)), subset_size=2)
    own = some_of(len(generated), most)
    others, reals = some_rows(generated, most), some_rows(real, most)
    is_own = torch.zeros(len(generated), dtype=torch.float64, device=device)
    is_own[own.to(device)] = 1
    alike, to_real = torch.zeros_like(is_own), torch.zeros_like(is_own)
    for rows, _, block in _kernel_blocks(generated, others, device):
        alike[rows] += block.sum(1)
    for rows, _, block in _kernel_blocks(generated, reals, device):
        to_real[rows] += block.sum(1)
    alike -= is_own * _kernel_of_itself(generated, device)
    found = 2 * (alike / (len(others) - is_own) - to_real / len(reals))
    return (found - found.mean()).cpu()


def some_of(available: int, most: int) -> Tensor:
    """A fixed random choice of `most` of `available` images, sorted; random, since folders are sorted by class."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(0))[:most].sort().values


def some_rows(features: Tensor, most: int) -> Tensor:
    """All features, [N, D], or `some_of` them if there are more than `most`; 0: all."""
    if not 0 < most < len(features):
        return features
    return features[some_of(len(features), most).to(features.device)]


def _both(generated: Tensor, real: Tensor, device: torch.device | str | None) -> torch.device:
    """The device on which the kernel of two sets of features is computed.

    Raises:
        DataError: they are not finite, or do not match.
    """
    require_features(real, "real")
    require_features(generated, "generated", real.shape[1])
    return exact_device(device or generated.device)


def _float64(x: Tensor) -> Tensor:
    return x.to(exact_device(x.device)).double()


def _kernel_blocks(first: Tensor, second: Tensor, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    for i in range(0, len(first), _BLOCK):
        rows = slice(i, min(i + _BLOCK, len(first)))
        x = first[rows].to(device).double()
        for j in range(0, len(second), _BLOCK):
            columns = slice(j, min(j + _BLOCK, len(second)))
            y = second[columns].to(device).double()
            yield rows, columns, (x @ y.T).div_(first.shape[1]).add_(1).pow_(3)


def _sum_of_distinct_pairs(x: Tensor, device: torch.device) -> Tensor:
    """Sum of k(x_i, x_j) over i != j."""
    return sum(block.sum() for _, _, block in _kernel_blocks(x, x, device)) - _kernel_of_itself(x, device).sum()


def _kernel_of_itself(x: Tensor, device: torch.device) -> Tensor:
    """k(x_i, x_i): [N, D] => [N] float64."""
    norms = torch.cat([part.to(device).double().square().sum(1) for part in x.split(_CHUNK)])
    return norms.div_(x.shape[1]).add_(1).pow_(3)


def _discrepancy(first: Tensor, second: Tensor, device: torch.device) -> Tensor:
    """sum_{i != j} k(x_i, x_j) / n(n-1) + sum_{i != j} k(y_i, y_j) / m(m-1) - 2 sum_{ij} k(x_i, y_j) / nm."""
    (n, m), within = (len(first), len(second)), _sum_of_distinct_pairs
    across = sum(block.sum() for _, _, block in _kernel_blocks(first, second, device))
    return within(first, device) / (n * (n - 1)) + within(second, device) / (m * (m - 1)) - 2 * across / (n * m)


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


def inception_contributions(logits: Tensor) -> Tensor:
    """The contribution of each image to the Inception Score without splits: [N, K] logits => [N] float64, mean zero."""
    log_p = torch.log_softmax(_float64(logits), 1)
    p = log_p.exp()
    log_mean = p.mean(0).clamp(min=torch.finfo(p.dtype).tiny).log()
    divergence = (p * log_p).sum(1) - p @ log_mean
    mean = divergence.mean()
    return (mean.exp() * (divergence - mean)).cpu()
