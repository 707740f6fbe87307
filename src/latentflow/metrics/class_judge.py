"""Do generated images show their class? A classifier fitted to the features of real, labelled images.

Linear discriminant analysis: classes are Gaussians with a shared covariance, shrunk by the rule of Ledoit and Wolf. An
image is right if its own class is the most likely one and if it lies as near to that class as real images do: even a
picture of nothing is nearest to some class.

Legend: N images, D features of an image, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentflow.errors import DataError

_HELD_OUT = 5  # one in so many real images is held out, to measure the accuracy of the judge
_LEAST_HELD_OUT = 50
_AS_NEAR = 0.95  # the share of held-out real images that count as near enough to their class


class ClassJudge:
    """Fitted to real images: features [N, D] and labels [N].

    Attributes:
        accuracy: the share of held-out real images that are judged right; no generator can be expected to exceed it.
        num_held_out: number of held-out images.

    Raises:
        DataError: there are too few images, or the features do not separate these classes.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, seed: int = 0):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        held_out, fitted = order[::_HELD_OUT], order[torch.arange(len(order)) % _HELD_OUT != 0]
        counts = torch.bincount(labels[fitted], minlength=num_classes)
        if counts.min() < 2 or len(held_out) < _LEAST_HELD_OUT:
            raise DataError(
                f"{len(features)} real images of {num_classes} classes are too few to judge classes by: "
                f"{_HELD_OUT * _LEAST_HELD_OUT} are needed, and several of each class"
            )
        x, y = features[fitted].double(), labels[fitted]
        self._center, self._scale = x.mean(0), x.std(0).clamp(min=1e-12)
        x = (x - self._center) / self._scale
        self._means = torch.zeros(num_classes, x.shape[1], dtype=x.dtype).index_add_(0, y, x) / counts[:, None]
        factor = torch.linalg.cholesky(_shrunk_covariance(x - self._means[y]))
        self._whiten = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=x.dtype), upper=False).T
        self._means = self._means @ self._whiten
        self._radius = torch.inf
        squares = self._squares(features[held_out])
        self._radius = torch.quantile(squares.gather(1, labels[held_out, None])[:, 0], _AS_NEAR)
        right = self.right(features[held_out], labels[held_out])
        self.accuracy, self.num_held_out = float(right.double().mean()), len(held_out)
        chance = float(counts.max() / counts.sum())
        if self.accuracy - chance < 3 * (chance * (1 - chance) / len(held_out)) ** 0.5:
            raise DataError(
                f"these features do not separate the classes: {100 * self.accuracy:.0f} % of real images are judged "
                f"right, and chance gives {100 * chance:.0f} %"
            )

    def right(self, features: Tensor, labels: Tensor) -> Tensor:
        """Whether each image shows its class: [N, D] and [N] => [N] bool."""
        squares = self._squares(features)
        own = squares.gather(1, labels[:, None])[:, 0]
        return (squares.argmin(1) == labels) & (own <= self._radius)

    def _squares(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distances to every class, [N, K]."""
        x = ((features.double().cpu() - self._center) / self._scale) @ self._whiten
        return torch.cdist(x, self._means).square()


def _shrunk_covariance(residuals: Tensor) -> Tensor:
    """The well-conditioned estimate of Ledoit and Wolf (2004): [N, D] of mean 0 => [D, D]."""
    n, dim = residuals.shape
    sample = residuals.T @ residuals / n
    scale = sample.trace() / dim
    target = scale * torch.eye(dim, dtype=residuals.dtype)
    spread = (sample - target).square().sum()
    noise = (residuals.square().sum(1).square().mean() - sample.square().sum()) / n
    share = float((noise / spread).clamp(0, 1)) if spread > 0 else 1.0
    return (1 - share) * sample + share * target + 1e-9 * torch.eye(dim, dtype=residuals.dtype)
