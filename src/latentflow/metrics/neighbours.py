"""Precision, recall, density and coverage: how much two sets of features overlap.

Legend: N generated images, M real images, D features of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from latentflow.errors import ConfigError
from latentflow.metrics.scores import Resampled, require_enough
from latentflow.metrics.statistics import require_features
from latentflow.runtime import Runtime

_BLOCK = 2048  # rows and columns of a distance matrix held at a time: 16 MiB in float32
_BLOCK_ON_GPU = 8192


@dataclass(frozen=True)
class Neighbours:
    """The contribution of each image to the four scores. The radius of an image is the distance to its k-th neighbour.

    Attributes:
        precision_of: [N] 1 where a generated image lies within the radius of some real image, else 0.
        recall_of: [M] 1 where a real image lies within the radius of some generated image, else 0.
        density_of: [N] number of real images within whose radius a generated image lies, divided by k.
        coverage_of: [M] 1 where some generated image lies within a real image's radius, else 0.
    """

    precision_of: Tensor
    recall_of: Tensor
    density_of: Tensor
    coverage_of: Tensor

    @property
    def precision(self) -> float:
        """Share of generated images that look real; arXiv 1904.06991."""
        return float(self.precision_of.mean())

    @property
    def recall(self) -> float:
        """Share of real images within the range of the generator; arXiv 1904.06991."""
        return float(self.recall_of.mean())

    @property
    def density(self) -> float:
        """Like precision, but counting every real image near a generated one; may exceed 1; arXiv 2002.09797."""
        return float(self.density_of.mean())

    @property
    def coverage(self) -> float:
        """Share of real images with a generated one nearby; arXiv 2002.09797."""
        return float(self.coverage_of.mean())

    def resampled(self, score: str) -> Resampled:
        """For `bootstrap`: one of the four scores, with radii and neighbours fixed.

        Precision and density resample the N generated images, recall and coverage the M real ones.
        """
        contributions = getattr(self, f"{score}_of")
        return lambda counts: counts @ contributions / counts.sum(1)


def neighbour_scores(
    generated: Tensor,
    real: Tensor,
    *,
    k: int = 3,
    k_density: int = 5,
    device: torch.device | str | None = None,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Neighbours:
    """Precision and recall with `k` neighbours, density and coverage with `k_density`; see `Neighbours`.

    An image is not its own neighbour; "within" includes the radius itself. Distances are computed block by block in
    the features' own precision, never in less than IEEE float32, from coordinates relative to the mean of the real
    images. Memory: two copies of the features on the device, and a few dozen MiB (a few hundred on CUDA).

    Args:
        generated: [N, D].
        real: [M, D].
        device: where distances are computed; None: where `real` lies.
        on_images: called with the number of images done in each of three passes: radii of the N, radii of the M,
            scores of the N.

    Raises:
        DataError: features that are not finite or do not match, or no more images than neighbours.
        ConfigError: a number of neighbours below 1.
    """
    most = max(k, k_density)
    if min(k, k_density) < 1:
        raise ConfigError(f"k = {k} and k_density = {k_density}: at least one neighbour is needed")
    require_features(real, "real")
    require_features(generated, "generated", real.shape[1])
    for features in (real, generated):
        require_enough("precision", len(features), neighbours=most)
    real = real.to(device or real.device)
    center = real.mean(0)
    generated, real = generated.to(real) - center, real - center
    with Runtime(real.device).autocast():
        generated_radii, real_radii = squared_radii(generated, most, on_images), squared_radii(real, most, on_images)
        k_radii, density_radii = real_radii[:, k - 1], real_radii[:, k_density - 1]

        precision, recall = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (generated, real))
        density, coverage = torch.zeros_like(precision, dtype=torch.int64), torch.zeros_like(recall)
        for rows, columns, squares in _blocks(generated, real):
            within = squares <= k_radii[columns]
            precision[rows] |= within.any(1)
            recall[columns] |= (squares <= generated_radii[rows, k - 1, None]).any(0)
            within = squares <= density_radii[columns] if k_density != k else within
            density[rows] += within.sum(1)
            coverage[columns] |= within.any(0)
            on_images(len(squares) if columns.stop == len(real) else 0)
    return Neighbours(
        precision_of=precision.cpu().double(),
        recall_of=recall.cpu().double(),
        density_of=density.cpu().double() / k_density,
        coverage_of=coverage.cpu().double(),
    )


def squared_radii(x: Tensor, k: int, on_images: Callable[[int], None] = lambda num_images: None) -> Tensor:
    """Squared distances to the 1st, ... k-th neighbour: [N, D] => [N, k]. A block serves its rows and its columns."""
    best = torch.full((len(x), k), torch.inf, dtype=x.dtype, device=x.device)

    def take(rows: slice, squares: Tensor) -> None:
        nearest = squares.topk(min(k, squares.shape[1]), dim=1, largest=False).values
        best[rows] = torch.cat([best[rows], nearest], 1).topk(k, dim=1, largest=False).values.sort(1).values

    for rows, columns, squares in _blocks(x, x, upper=True):
        if rows == columns:
            squares.fill_diagonal_(torch.inf)
        else:
            take(columns, squares.T)
        take(rows, squares)
        on_images(len(squares) if columns.stop == len(x) else 0)
    return best


def _blocks(first: Tensor, second: Tensor, *, upper: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances |x|^2 + |y|^2 - 2 x.y, block by block; with `upper` only blocks on and above the diagonal."""
    first_norms, second_norms = first.square().sum(1), second.square().sum(1)
    block = _BLOCK_ON_GPU if first.device.type == "cuda" else _BLOCK
    for i in range(0, len(first), block):
        for j in range(i if upper else 0, len(second), block):
            rows, columns = slice(i, min(i + block, len(first))), slice(j, min(j + block, len(second)))
            norms = first_norms[rows, None] + second_norms[columns]
            yield rows, columns, norms.addmm_(first[rows], second[columns].T, alpha=-2).clamp_(min=0)
