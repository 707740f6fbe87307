"""The result of an evaluation: scores with their intervals, and all that must agree before two of them are compared.

Legend: N generated images, M real images, D features of an image, K classes of the feature network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from latentflow.artifacts import read_json, write_json
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.metrics.neighbours import SCORES as NEIGHBOUR_SCORES
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
from latentflow.records import Record, explain
from latentflow.runtime import Precision

FEATURE_METRICS = ("fid", "kid", "is", *NEIGHBOUR_SCORES)
"""Scores of features alone; "fid" is the Fréchet distance of any features."""

NEIGHBOURS = 10_000
"""The most images of each kind among which neighbours are looked for, unless the user says."""

_RESAMPLES = 200  # of fewer, bounds are not called an interval
_SUBSET = 1000  # images in a subset of the published KID


class Score(Record):
    """One number, and how far it can be trusted."""

    label: str = Field(description="What it is called.")
    value: float
    low: float | None = Field(
        None,
        description="Bounds of the 95 % interval, which is of the choice of the images; "
        "from fewer than 200 resamples, of their spread.",
    )
    high: float | None = None
    standard_error: float | None = None
    resamples: int = Field(0, description="Resamples that the bounds are from; 0: from the spread over images.")
    spread: float | None = Field(None, description="Standard deviation over subsets (kid) or splits (is).")
    limit: float | None = Field(None, description="The same score of the real images themselves.")
    notes: list[str] = Field(default_factory=list, description="Warnings for people.")

    @property
    def text(self) -> str:
        """For a table: "12.3 [11.9, 12.7]"; bounds that are no 95 % interval are called what they are."""
        parts = [f"{self.value:.5g}"]
        parts += [f"[{self.low:.5g}, {self.high:.5g}]"] if self.low is not None else []
        parts += [f"(spread of {self.resamples} resamples)"] if 0 < self.resamples < _RESAMPLES else []
        parts += [f"+- {self.spread:.2g} over subsets"] if self.spread is not None else []
        parts += [f"(real images: {self.limit:.5g})"] if self.limit is not None else []
        return " ".join(parts)


class FeatureFacts(Record):
    """What images were compared by."""

    name: str
    hash: str
    label: str
    precision: Precision = Field("fp32", description="What they were computed in; published ones are fp32.")


class ReferenceFacts(Record):
    """The real images."""

    data: str
    fingerprint: str = Field(description="Of the images; of a foreign file of statistics, its SHA-256.")
    num_images: int = Field(description="0: the file of statistics does not say.")
    image_size: int = Field(description="0: the file of statistics does not say.")
    resize: str


class ModelFacts(Record):
    """Whose images they are."""

    name: str
    weights: str = Field(description="SHA-256 over the weights; of images in files, their fingerprint.")
    training: dict[str, Any] = Field(default_factory=dict, description="As the model's config has it.")


class EvaluationCounts(Record):
    """Network calls per image; a guided call counts twice."""

    mean: float
    min: int
    max: int


class EvaluationProtocol(Record):
    """Everything that the scores depend on, and what they cost."""

    task: Literal["sample", "images", "reconstruction", "inpaint", "mask-to-image"]
    num_images: int
    image_size: int
    first_seed: int | None = Field(None, description="Image i has this seed + i; null: nothing was drawn.")
    label_policy: str = "none"
    label_counts: list[int] = Field(default_factory=list, description="Images of each class; empty: no class was told.")
    features: FeatureFacts
    reference: ReferenceFacts
    neighbours: int = Field(
        0, description="The most images of each kind that precision, recall, density and coverage look at; 0: all."
    )
    inputs: dict[str, str] = Field(default_factory=dict, description="Holes, or the segmenter, of the task.")
    model: ModelFacts
    sampling: dict[str, Any] = Field(default_factory=dict, description="Solver, steps, guidance and so on.")
    evaluations: EvaluationCounts | None = None
    seconds: dict[str, float] = Field(default_factory=dict, description="Of each part, summed over processes.")
    device: str
    precision: Precision = Field("fp32", description="What the model's network computed in.")
    versions: dict[str, str]

    def comparable(self, metrics: Iterable[str] = NEIGHBOUR_SCORES) -> dict[str, Any]:
        """What must be equal before two results may be compared. The way of sampling is what one compares.

        Args:
            metrics: what is compared: not every score depends on everything.
        """
        drawn = "sample" if self.task == "images" else self.task
        near = {*metrics} & {*NEIGHBOUR_SCORES}
        counts = (self.num_images, self.reference.num_images)
        looked_at = [self.neighbours if 0 < self.neighbours < count else "all" for count in counts]
        return {
            "task": drawn,
            "features": f"{self.features.name} {self.features.hash[:12]}",
            "precision of features": self.features.precision,
            **({"neighbours among": f"{looked_at[0]} images, {looked_at[1]} real ones"} if near else {}),
            "reference": self.reference.fingerprint[:19],
            "reference images": self.reference.num_images,
            "images": self.num_images,
            "label policy": self.label_policy,
            "image size": self.image_size,
            "resize": self.reference.resize,
            **self.inputs,
        }


class EvaluationReport(Record):
    """What `latentflow evaluate` finds."""

    schema_version: Literal[1] = 1
    protocol: EvaluationProtocol
    scores: dict[str, Score]
    notes: list[str] = Field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """All notes, those of scores with their names."""
        return [*self.notes, *(f"{score.label}: {note}" for score in self.scores.values() for note in score.notes)]

    def save(self, file: str | Path) -> None:
        """Write it as JSON, complete or not at all."""
        write_json(file, self.model_dump(mode="json"))

    @classmethod
    def load(cls, file: str | Path) -> EvaluationReport:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged or of another kind.
        """
        try:
            return cls.model_validate(read_json(file))
        except ValidationError as error:
            raise ArtifactError(f"{file} is no report of `latentflow evaluate` ({explain(error)})") from error


@dataclass(frozen=True)
class ScoreChange:
    """A score of two reports.

    Attributes:
        value, other: of the first and of the second report.
        difference: value - other.
        standard_error: of the difference, as of independent images; None where an interval is missing.
    """

    label: str
    value: float
    other: float
    difference: float
    standard_error: float | None


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side.

    Attributes:
        differing: what makes them incomparable, one line each; empty if nothing does.
        scores: those that both have, by name.
    """

    differing: list[str]
    scores: dict[str, ScoreChange]


def compare(report: EvaluationReport, other: EvaluationReport, *, anyway: bool = False) -> Comparison:
    """Two reports side by side; refused where something differs that the scores depend on besides the images.

    Args:
        anyway: compare all the same; what differs is in the result.

    Raises:
        ConfigError: they are not comparable, naming the first differences; or have no score in common.
    """
    both = [name for name in report.scores if name in other.scores]
    differing = differences(report.protocol, other.protocol, both)
    if not anyway:
        require_comparable(report.protocol, other.protocol, both)
    if not both:
        have, has = (", ".join(one.scores) for one in (report, other))
        raise ConfigError(f"the two results have no score in common ({have}; {has}); ask for the same --metrics")
    return Comparison(differing, {name: _change(report.scores[name], other.scores[name]) for name in both})


def differences(protocol: EvaluationProtocol, other: EvaluationProtocol, metrics: Iterable[str]) -> list[str]:
    """What makes two protocols incomparable in these metrics, one line each."""
    first, second = protocol.comparable(metrics), other.comparable(metrics)
    keys = dict.fromkeys([*first, *second])
    return [f"{key}: {first.get(key)} and {second.get(key)}" for key in keys if first.get(key) != second.get(key)]


def require_comparable(protocol: EvaluationProtocol, other: EvaluationProtocol, metrics: Iterable[str]) -> None:
    """Refuse to compare results in these metrics that were not found alike.

    Raises:
        ConfigError: naming the first differences.
    """
    if differing := differences(protocol, other, metrics):
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ConfigError(
            f"the two results are not comparable ({'; '.join(differing[:3])}{more}); evaluate both alike, "
            "or say --anyway"
        )


def _change(one: Score, other: Score) -> ScoreChange:
    errors = (one.standard_error, other.standard_error)
    together = None if None in errors else (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    return ScoreChange(one.label, one.value, other.value, one.value - other.value, together)


def frechet_name(features: str) -> tuple[str, str]:
    """The key and the label of the Fréchet distance of some features."""
    if features == "inception":
        return "fid", "FID"
    return "fd", "FD-DINOv2" if features == "dinov2" else f"FD ({features} features), a relative measure"


def check_metrics(metrics: Sequence[str], num_images: int, num_real: int, dim: int | None = None) -> dict[str, str]:
    """Refuse too few images for scores of features, before anything is computed; "kid" takes any number from 2.

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


def feature_scores(
    metrics: Sequence[str],
    generated: Tensor,
    reference: FeatureStatistics,
    real: Tensor | None,
    *,
    features: str,
    logits: Tensor | None = None,
    resamples: int | None = None,
    neighbours: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, Score]:
    """Scores of features, each with its interval.

    Args:
        metrics: some of `FEATURE_METRICS`.
        generated: [N, D].
        real: [M, D], for every score but the Fréchet distance and the Inception Score.
        features: name of the feature network.
        logits: [N, K], for the Inception Score.
        resamples: that each interval is from, 0: none; None: the interval is from the spread over images.
        neighbours: the most images of each kind that precision, recall, density and coverage look at; 0: all.
        device: where scores are computed; None: where `generated` lies. Features may lie anywhere: of those that are
            many only parts are moved.

    Raises:
        DataError: too few images, features that are not finite, or real features missing.
    """
    warnings = check_metrics(metrics, len(generated), reference.n, generated.shape[1])
    near = [name for name in metrics if name in NEIGHBOUR_SCORES]
    alone = [name for name in metrics if name not in near]
    if real is None and (needing := [*near, *({"kid"} & {*alone})]):
        raise DataError(f"{needing[0]} needs the features of the real images themselves, not their statistics alone")
    place, of = torch.device(device or generated.device), "" if features == "inception" else f" ({features} features)"
    exact = exact_device(place)
    find = {
        "fid": lambda: _frechet(generated, reference, features, exact),
        "kid": lambda: _kernel(generated, real, f"KID{of}", exact),
        "is": lambda: _inception(logits.to(exact)),
    }
    sets = [some_rows(rows, neighbours) for rows in (generated, real)] if near else []
    passes = 2 * len(sets[0]) + len(sets[1]) if near else 0
    scores: dict[str, Score] = {}
    with image_progress("scoring", (1 + (resamples or 1)) * len(generated) * len(alone) + passes) as on_images:
        for metric in alone:
            found = find[metric]()
            on_images(len(generated))
            name = frechet_name(features)[0] if metric == "fid" else metric
            scores[name] = found.score(resamples, filter(None, [warnings.get(metric)]), on_images)
        among = neighbour_scores(*sets, device=place, on_images=on_images) if near else None
    for name in near:
        notes = () if sets[0] is generated and sets[1] is real else (_looked_at(sets, generated, real),)
        scores[name] = _near(name, f"{name}{of}", among, notes).score(resamples)
    return scores


@dataclass(frozen=True)
class _Found:
    """A score, and what its interval is computed from.

    Attributes:
        contributions: of each image, for `interval_over_images`.
        resampled: for `bootstrap`.
        range: beyond which no such score lies.
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
        """The record; without an interval where `resamples` is 0."""
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
    note = f"of all images at once: subsets of {_SUBSET}, as published, need as many images"
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
    return f"looks at {n} of {of_n} images and {m} of {of_m} real ones, drawn from all (--neighbours)"
