"""Scores of two sets of features, each with its interval.

Legend: N generated images, M real images, D features of an image, K classes of the feature network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentflow.errors import DataError
from latentflow.metrics.evaluation_report import Score
from latentflow.metrics.names import FEATURE_METRICS, NEIGHBOUR_SCORES
from latentflow.metrics.neighbours import Neighbours, neighbour_scores
from latentflow.metrics.resampling import Interval, bootstrap, interval_over_images
from latentflow.metrics.scores import (
    Resampled,
    frechet_contributions,
    frechet_distance,
    inception_contributions,
    inception_score,
    kernel_contributions,
    kernel_distance,
    kernel_distance_of_all,
    require_enough,
    resampled_frechet,
    resampled_inception_score,
    resampled_kernel,
    some_rows,
)
from latentflow.metrics.statistics import FeatureStatistics, exact_device
from latentflow.progress import image_progress

_SUBSET = 1000  # images in a subset of the published KID


def frechet_name(features: str) -> tuple[str, str]:
    """The key and the label of the Fréchet distance of some features."""
    if features == "inception":
        return "fid", "FID"
    return "fd", "FD-DINOv2" if features == "dinov2" else f"FD ({features} features), a relative measure"


def check_metrics(metrics: Sequence[str], num_images: int, num_real: int, dim: int | None = None) -> dict[str, str]:
    """Refuse too few images for scores of features, before anything is computed; "kid" needs only two.

    Args:
        num_real: M; 0: not known.

    Returns:
        Warnings by metric.

    Raises:
        DataError: a score is not defined for so few images.
    """
    fewest = min(num_images, num_real or num_images)
    warnings = {}
    for metric in metrics:
        if metric in FEATURE_METRICS:
            score = "inception_score" if metric == "is" else metric
            n = num_images if metric == "is" else fewest
            warnings[metric] = require_enough(score, n, dim=dim, subset_size=min(_SUBSET, max(fewest, 2)))
    return {metric: text for metric, text in warnings.items() if text}


@dataclass(frozen=True)
class Scoring:
    """How scores of features are computed.

    Attributes:
        resamples: bootstrap resamples for each interval, 0: no interval; None: from the spread over images.
        neighbours: most images of each kind that precision, recall, density and coverage look at; 0: all.
        device: None: where the generated features lie. Features may lie anywhere: large sets are moved in parts.
    """

    resamples: int | None = None
    neighbours: int = 0
    device: torch.device | str | None = None


def feature_scores(
    metrics: Sequence[str],
    generated: Tensor,
    reference: FeatureStatistics,
    real: Tensor | None,
    *,
    features: str,
    logits: Tensor | None = None,
    how: Scoring = Scoring(),
) -> dict[str, Score]:
    """Scores of features, each with its interval.

    Args:
        metrics: some of `FEATURE_METRICS`.
        generated: [N, D].
        real: [M, D], for every score but the Fréchet distance and the Inception Score.
        features: name of the feature network.
        logits: [N, K], for the Inception Score.
        how: intervals, neighbours and device.

    Raises:
        DataError: too few images, features that are not finite, or real features missing.
    """
    warnings = check_metrics(metrics, len(generated), reference.n, generated.shape[1])
    near = [name for name in metrics if name in NEIGHBOUR_SCORES]
    others = [name for name in metrics if name not in near]
    if real is None and (needing := [*near, *({"kid"} & {*others})]):
        raise DataError(f"{needing[0]} needs the features of the real images themselves, not only their statistics")
    of = "" if features == "inception" else f" ({features} features)"
    place = torch.device(how.device or generated.device)
    exact = exact_device(place)
    find = {
        "fid": lambda: _frechet(generated, reference, features, exact),
        "kid": lambda: _kernel(generated, real, f"KID{of}", exact),
        "is": lambda: _inception(logits.to(exact)),
    }
    sets = [some_rows(rows, how.neighbours) for rows in (generated, real)] if near else []
    passes = 2 * len(sets[0]) + len(sets[1]) if near else 0
    scores: dict[str, Score] = {}
    with image_progress("scoring", (1 + (how.resamples or 1)) * len(generated) * len(others) + passes) as on_images:
        for metric in others:
            found = find[metric]()
            on_images(len(generated))
            name = frechet_name(features)[0] if metric == "fid" else metric
            scores[name] = found.score(how.resamples, filter(None, [warnings.get(metric)]), on_images)
        among = neighbour_scores(*sets, device=place, on_images=on_images) if near else None
    for name in near:
        notes = () if sets[0] is generated and sets[1] is real else (_looked_at(sets, generated, real),)
        scores[name] = _near(name, f"{name}{of}", among, notes).score(how.resamples)
    return scores


@dataclass(frozen=True)
class _Found:
    """A score, and the source of its interval.

    Attributes:
        contributions: of each image, for `interval_over_images`.
        resampled: for `bootstrap`.
        range: lowest and highest possible score.
    """

    label: str
    value: float
    contributions: Callable[[], Tensor]
    resampled: Callable[[], Resampled]
    num_images: int
    range: tuple[float, float] = (-math.inf, math.inf)
    spread: float | None = None
    notes: tuple[str, ...] = ()

    def score(
        self,
        resamples: int | None,
        warnings: Iterable[str] = (),
        on_images: Callable[[int], None] = lambda num_images: None,
    ) -> Score:
        """The record; without an interval if `resamples` is 0."""
        bounds = {}
        if resamples != 0:
            found = self._interval(resamples, on_images)
            low, high = max(found.low, self.range[0]), min(found.high, self.range[1])
            bounds = {
                "low": low,
                "high": high,
                "standard_error": found.standard_error,
                "resamples": found.num_resamples,
            }
        notes = [*warnings, *self.notes]
        return Score(label=self.label, value=self.value, spread=self.spread, notes=notes, **bounds)

    def _interval(self, resamples: int | None, on_images: Callable[[int], None]) -> Interval:
        if resamples is not None:
            options = {"estimate": self.value, "num": resamples, "on_images": on_images}
            return bootstrap(self.resampled(), self.num_images, **options)
        contributions = self.contributions()
        on_images(self.num_images)
        return interval_over_images(contributions, self.value)


def _frechet(generated: Tensor, reference: FeatureStatistics, features: str, device: torch.device) -> _Found:
    statistics = FeatureStatistics.of(generated, device)
    return _Found(
        frechet_name(features)[1],
        frechet_distance(statistics, reference),
        lambda: frechet_contributions(generated, statistics, reference),
        lambda: resampled_frechet(generated, reference, device=device),
        len(generated),
    )


def _kernel(generated: Tensor, real: Tensor, label: str, device: torch.device) -> _Found:
    rows = (
        lambda: kernel_contributions(generated, real, device=device),
        lambda: resampled_kernel(generated, real, device=device),
        len(generated),
    )
    if min(len(generated), len(real)) >= _SUBSET:
        found = kernel_distance(generated, real, subset_size=_SUBSET, device=device)
        return _Found(label, found.mean, *rows, spread=found.std)
    note = f"over all images at once: the published subsets of {_SUBSET} need as many images"
    return _Found(label, kernel_distance_of_all(generated, real, device=device), *rows, notes=(note,))


def _inception(logits: Tensor) -> _Found:
    found = inception_score(logits)
    rows = (lambda: inception_contributions(logits), lambda: resampled_inception_score(logits), len(logits))
    return _Found("Inception Score", found.mean, *rows, spread=found.std)


def _near(name: str, label: str, among: Neighbours, notes: tuple[str, ...]) -> _Found:
    values = getattr(among, f"{name}_of")
    rows = (lambda: values, lambda: among.resampled(name), len(values))
    return _Found(label, getattr(among, name), *rows, range=(0, math.inf if name == "density" else 1), notes=notes)


def _looked_at(sets: Sequence[Tensor], generated: Tensor, real: Tensor) -> str:
    (n, m), (of_n, of_m) = map(len, sets), map(len, (generated, real))
    return f"computed on {n} of {of_n} images and {m} of {of_m} real ones, chosen at random (--neighbours)"
