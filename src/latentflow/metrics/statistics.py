"""Mean and covariance of features, gathered in batches of any size, in float64.

Legend: N images, B images of a batch, D features of an image.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from latentflow.errors import DataError

_CHUNK = 2048
"""Rows that are summed at once: fixed, so that a result does not depend on how the images were batched."""


def exact_device(device: torch.device | str) -> torch.device:
    """The device for float64 arithmetic: `device`, or the CPU if it has no float64 (MPS)."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def require_features(features: Tensor, what: str, dim: int | None = None) -> Tensor:
    """Return [N, D] features if they are finite and, with `dim`, D is `dim`.

    Args:
        what: the kind of images, for the message, such as "generated".

    Raises:
        DataError: no rows, another shape, NaN or infinite values, or another D than `dim`.
    """
    if features.dim() != 2 or not features.shape[0] or not features.shape[1]:
        raise DataError(f"the {what} features have shape {list(features.shape)}; a row of numbers per image is needed")
    if dim is not None and features.shape[1] != dim:
        raise DataError(
            f"the {what} images have {features.shape[1]} features and the others {dim}: "
            "take both from the same feature network"
        )
    if not features.is_floating_point():
        raise DataError(f"the {what} features are of type {features.dtype}; floating-point numbers are needed")
    if not torch.isfinite(features.sum()):  # overflows rather than miss one; the exact count follows
        bad = int((~torch.isfinite(features)).any(1).sum())
        if bad:
            raise DataError(
                f"{bad} of {len(features)} {what} images have features that are NaN or infinite; "
                "look at these images, and at the network's precision"
            )
    return features


class FeatureStatistics:
    """Number, mean and covariance of feature vectors, gathered in one pass.

    Rows are collected to chunks of a fixed size, so batches of any size give the same result to the last bit; chunks
    are joined by the update of Chan, Golub and LeVeque (1979), which subtracts means before it squares.

    Args:
        dim: D.
        device: where sums are kept; it must have float64, so not MPS. Features may come from any device.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.dim = dim
        self._n = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean)(x - mean)^T
        self._waiting: list[Tensor] = []
        self._num_waiting = 0

    @classmethod
    def of(cls, features: Tensor, device: torch.device | str | None = None) -> FeatureStatistics:
        """The statistics of [N, D] features, computed on `device`, which they need not fit; None: where they lie."""
        return cls(features.shape[-1], exact_device(device or features.device)).update(features)

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor, n: int) -> FeatureStatistics:
        """Statistics from mean [D], covariance [D, D] (divided by N - 1) and N (0: not known).

        Raises:
            DataError: shapes do not fit, a value is not finite, or the covariance is not symmetric.
        """
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
            raise DataError(
                f"a mean of shape {list(mean.shape)} and a covariance of shape {list(covariance.shape)} "
                "do not belong together"
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise DataError("the statistics hold values that are NaN or infinite; compute them again")
        covariance = covariance.double()
        if (covariance - covariance.T).abs().amax() > 1e-6 * covariance.abs().amax():
            raise DataError("the covariance is not symmetric; the statistics are damaged or of another kind")
        made = cls(len(mean), mean.device)
        made._n, made._mean = n, mean.double().clone()
        made._scatter = (covariance + covariance.T) * (0.5 * max(n - 1, 1))
        return made

    @property
    def n(self) -> int:
        """Number of images; 0: not given in the file."""
        return self._n + self._num_waiting

    @property
    def mean(self) -> Tensor:
        """[D] float64."""
        self._flush()
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """[D, D] float64, the unbiased estimate (divided by N - 1) that FID takes; zero for a single image."""
        self._flush()
        return self._scatter / max(self._n - 1, 1)

    def update(self, features: Tensor) -> FeatureStatistics:
        """Add [B, D] features of B >= 0 images; returns itself.

        Raises:
            DataError: NaN or infinite values, or another D; nothing of the batch was added.
        """
        if not len(features):
            return self
        rows = require_features(features.detach(), "given", self.dim)
        while len(rows):
            taken, rows = rows[: _CHUNK - self._num_waiting], rows[_CHUNK - self._num_waiting :]
            self._waiting.append(taken.to(self._mean.device, copy=True))  # the caller may write over its batch
            self._num_waiting += len(taken)
            if self._num_waiting == _CHUNK:
                self._flush()
        return self

    def state(self) -> dict[str, Tensor]:
        """Everything in three float64 or int64 tensors on the CPU, for a file: mean, covariance, n."""
        n = torch.tensor(self.n, dtype=torch.int64)
        return {"mean": self.mean.cpu(), "covariance": self.covariance.cpu(), "n": n}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> FeatureStatistics:
        """The inverse of `state`.

        Raises:
            DataError: something is missing or does not fit.
        """
        if missing := {"mean", "covariance", "n"} - state.keys():
            raise DataError(f"the statistics lack {', '.join(sorted(missing))}; compute them again")
        return cls.from_moments(state["mean"], state["covariance"], int(state["n"]))

    def to(self, device: torch.device | str) -> FeatureStatistics:
        """Move the sums; returns itself."""
        self._flush()
        self._mean, self._scatter = self._mean.to(device), self._scatter.to(device)
        return self

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = torch.cat(self._waiting).double()
        self._waiting, self._num_waiting = [], 0
        mean = rows.mean(0)
        rows -= mean
        shift = self._join(mean, len(rows))
        gram(rows, into=self._scatter)
        self._scatter.addr_(shift, shift)

    def _join(self, mean: Tensor, n: int) -> Tensor:
        """Add the mean of n further images; returns the vector whose outer product is to be added to the scatter.

        S = S_a + S_b + n_a n_b / (n_a + n_b) (mean_b - mean_a)(mean_b - mean_a)^T
        """
        total = self._n + n
        delta = mean - self._mean
        shift = (self._n * n / total) ** 0.5 * delta
        self._mean = self._mean + delta * (n / total)
        self._n = total
        return shift


def gram(rows: Tensor, *, into: Tensor | None = None) -> Tensor:
    """rows^T rows of float64 [n, d] rows: [d, d], added to `into` if that is given.

    On the CPU numpy computes it: it sees that the product is symmetric, and does half of the work.
    """
    if rows.device.type == "cpu":
        product = torch.from_numpy(rows.numpy().T @ rows.numpy())
        return product if into is None else into.add_(product)
    return rows.T @ rows if into is None else into.addmm_(rows.T, rows)
