"""Do generated images show their class? A classifier fitted to the features of real, labelled images.

Linear discriminant analysis: classes are Gaussians with a shared covariance, shrunk by the rule of Ledoit and Wolf. An
image is right if its own class is the most likely one and if it lies as near to that class as real images do: even a
picture of nothing is nearest to some class.

Legend: N images, D features of an image, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from latentflow.errors import DataError

_HELD_OUT = 5  # one in so many real images is held out, to measure the accuracy of the judge
LEAST_HELD_OUT = 50
_AS_NEAR = 0.95  # the share of held-out real images that count as near enough to their class
_SHUFFLES = 999  # of the labels, none of which may agree as well with what is recognised: p = 0.001


class NotSeparatedError(DataError):
    """The features do not separate the classes of real images."""


@dataclass(frozen=True)
class ClassJudge:
    """Gaussians of K classes in features, from real images. All tensors are float64 on the CPU.

    Attributes:
        center, scale: [D], which features are standardised by.
        whiten: [D, D'], under which the shared covariance is the unit matrix.
        means: [K, D'], of the classes.
        radius: [], the largest squared distance at which an image counts as near to its class.
        by_class: [K], the share of held-out real images of each class that are judged right; NaN: there were none.
        accuracy: of all of them; no generator can be expected to exceed it.
        recognised: the share of held-out real images whose own class is the most likely one, however near.
        num_held_out: number of held-out images.
    """

    center: Tensor
    scale: Tensor
    whiten: Tensor
    means: Tensor
    radius: Tensor
    by_class: Tensor
    accuracy: float
    recognised: float
    num_held_out: int

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int, seed: int = 0) -> ClassJudge:
        """Fitted to four fifths of real images, features [N, D] and labels [N], and measured on the rest.

        Raises:
            DataError: there are too few images.
            NotSeparatedError: the features do not separate these classes.
        """
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        held_out, fitted = order[::_HELD_OUT], order[torch.arange(len(order)) % _HELD_OUT != 0]
        counts = torch.bincount(labels[fitted], minlength=num_classes)
        if counts.min() < 2 or len(held_out) < LEAST_HELD_OUT:
            raise DataError(
                f"{len(features)} real images of {num_classes} classes are too few to judge classes by: "
                f"{_HELD_OUT * LEAST_HELD_OUT} are needed, and several of each class"
            )
        parts = [(features[rows], labels[rows]) for rows in (fitted, held_out)]
        return cls.fitted(*parts[0], *parts[1], num_classes)

    @classmethod
    def fitted(
        cls, features: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor, num_classes: int
    ) -> ClassJudge:
        """Fitted to real images, [N, D] and [N], and measured on others, [M, D] and [M].

        Raises:
            NotSeparatedError: the features do not separate these classes.
        """
        counts = torch.bincount(labels, minlength=num_classes)
        x = features.double()
        center, scale = x.mean(0), x.std(0).clamp(min=1e-12)
        x = (x - center) / scale
        means = torch.zeros(num_classes, x.shape[1], dtype=x.dtype).index_add_(0, labels, x) / counts[:, None]
        factor = torch.linalg.cholesky(_shrunk_covariance(x - means[labels]))
        whiten = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=x.dtype), upper=False).T
        none = torch.full((num_classes,), torch.nan, dtype=x.dtype)
        judge = cls(center, scale, whiten, means @ whiten, torch.tensor(torch.inf), none, 0.0, 0.0, len(held_out))
        squares = judge._squares(held_out)
        own = squares.gather(1, held_out_labels[:, None])[:, 0]
        judge = replace(judge, radius=torch.quantile(own, _AS_NEAR))
        right = judge.right(held_out, held_out_labels).double()
        nearest = squares.argmin(1)
        _require_separated(nearest, held_out_labels, num_classes)
        return replace(
            judge,
            by_class=_by_class(right, held_out_labels, num_classes),
            accuracy=float(right.mean()),
            recognised=float((nearest == held_out_labels).double().mean()),
        )

    def right(self, features: Tensor, labels: Tensor) -> Tensor:
        """Whether each image shows its class: [N, D] and [N] => [N] bool."""
        squares = self._squares(features)
        own = squares.gather(1, labels[:, None])[:, 0]
        return (squares.argmin(1) == labels) & (own <= self.radius)

    def ceiling(self, labels: Tensor) -> float:
        """The accuracy of held-out real images of these classes, each as often as in labels [N]."""
        known = self.by_class[labels]
        return self.accuracy if known.isnan().any() else float(known.mean())

    def for_classes(self, own: Sequence[str], known: Sequence[str]) -> ClassJudge:
        """The same judge with labels that are indices of `known`; its further classes stand behind these.

        Args:
            own: the names of its classes; all of `known` are among them.
        """
        order = [list(own).index(name) for name in known]
        order += [index for index in range(len(own)) if index not in order]
        return replace(self, means=self.means[order], by_class=self.by_class[order])

    def tensors(self) -> dict[str, Tensor]:
        """Everything but its three numbers, to be stored."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _squares(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distances to every class, [N, K]."""
        x = ((features.double().cpu() - self.center) / self.scale) @ self.whiten
        return torch.cdist(x, self.means).square()


def _by_class(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean of the values [N] of each class, [K]; NaN: the class has none."""
    sums = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, values.double())
    return sums / torch.bincount(labels, minlength=num_classes)


def _require_separated(nearest: Tensor, labels: Tensor, num_classes: int) -> None:
    """Refuse classes that are recognised no better than by chance, as a permutation test has it.

    Every class counts the same: where one has nearly all images, always naming it is right nearly always.

    Args:
        nearest: [N], the class that each image is nearest to.
        labels: [N], that it has.
    """

    def recognised(labels: Tensor) -> float:
        return float(_by_class(nearest == labels, labels, num_classes).nanmean())

    generator = torch.Generator().manual_seed(0)
    by_chance = [recognised(labels[torch.randperm(len(labels), generator=generator)]) for _ in range(_SHUFFLES)]
    if (found := recognised(labels)) <= max(by_chance):
        raise NotSeparatedError(
            f"these features are not shown to separate the classes: {100 * found:.0f} % of {len(labels):,} real images "
            f"are recognised, as the mean over classes, and shuffled labels give up to {100 * max(by_chance):.0f} %"
        )


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
