"""The result of an evaluation: scores with their intervals, and all that must agree before two of them are compared.

Legend: N generated images, M real images, D features of an image, K classes of the feature network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from latentflow.artifacts import read_json, write_json
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.metrics.neighbours import SCORES as NEIGHBOUR_SCORES
from latentflow.metrics.neighbours import neighbour_scores
from latentflow.metrics.resampling import bootstrap
from latentflow.metrics.scores import (
    Resampled,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_of_all,
    require_enough,
    resampled_frechet,
    resampled_inception_score,
    resampled_kernel,
)
from latentflow.metrics.statistics import FeatureStatistics

FEATURE_METRICS = ("fid", "kid", "is", *NEIGHBOUR_SCORES)
"""Scores of features alone; "fid" is the Fréchet distance of any features."""

_RESAMPLES = 200
_SUBSET = 1000  # images in a subset of the published KID
_MOST_KERNEL_IMAGES = 5000  # beyond, resampling KID takes minutes
_BUDGET = 3e12  # operations in float64 for one score's resamples: about a minute on two cores


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Score(_Record):
    """One number, and how far it can be trusted."""

    label: str = Field(description="What it is called.")
    value: float
    low: float | None = Field(None, description="Bounds of the 95 % interval, which is of the choice of the images.")
    high: float | None = None
    standard_error: float | None = None
    resamples: int = Field(0, description="Resamples that the interval is from; 0: from the spread over images.")
    spread: float | None = Field(None, description="Standard deviation over subsets (kid) or splits (is).")
    limit: float | None = Field(None, description="The same score of the real images themselves.")
    notes: list[str] = Field(default_factory=list, description="Warnings for people.")

    @property
    def text(self) -> str:
        """For a table: "12.3 [11.9, 12.7]"."""
        parts = [f"{self.value:.5g}"]
        parts += [f"[{self.low:.5g}, {self.high:.5g}]"] if self.low is not None else []
        parts += [f"from {self.resamples} resamples"] if 0 < self.resamples < _RESAMPLES else []
        parts += [f"+- {self.spread:.2g} over subsets"] if self.spread is not None else []
        parts += [f"(real images: {self.limit:.5g})"] if self.limit is not None else []
        return " ".join(parts)


class FeatureFacts(_Record):
    """What images were compared by."""

    name: str
    hash: str
    label: str


class ReferenceFacts(_Record):
    """The real images."""

    data: str
    fingerprint: str = Field(description="Of the images; of a foreign file of statistics, its SHA-256.")
    num_images: int = Field(description="0: the file of statistics does not say.")
    image_size: int = Field(description="0: the file of statistics does not say.")
    resize: str


class ModelFacts(_Record):
    """Whose images they are."""

    name: str
    weights: str = Field(description="SHA-256 over the weights; of images in files, their fingerprint.")
    training: dict[str, Any] = Field(default_factory=dict, description="As the model's config has it.")


class EvaluationCounts(_Record):
    """Network calls per image; a guided call counts twice."""

    mean: float
    min: int
    max: int


class EvaluationProtocol(_Record):
    """Everything that the scores depend on, and what they cost."""

    task: Literal["sample", "images", "reconstruction", "inpaint", "mask-to-image"]
    num_images: int
    image_size: int
    first_seed: int | None = Field(None, description="Image i has this seed + i; null: nothing was drawn.")
    label_policy: str = "none"
    label_counts: list[int] = Field(default_factory=list, description="Images of each class; empty: no class was told.")
    features: FeatureFacts
    reference: ReferenceFacts
    inputs: dict[str, str] = Field(default_factory=dict, description="Holes, or the segmenter, of the task.")
    model: ModelFacts
    sampling: dict[str, Any] = Field(default_factory=dict, description="Solver, steps, guidance and so on.")
    evaluations: EvaluationCounts | None = None
    seconds: dict[str, float] = Field(default_factory=dict, description="Of each part, summed over processes.")
    device: str
    versions: dict[str, str]

    def comparable(self) -> dict[str, Any]:
        """What must be equal before two results may be compared. The way of sampling is what one compares."""
        drawn = "sample" if self.task == "images" else self.task
        return {
            "task": drawn,
            "features": f"{self.features.name} {self.features.hash[:12]}",
            "reference": self.reference.fingerprint[:19],
            "reference images": self.reference.num_images,
            "images": self.num_images,
            "label policy": self.label_policy,
            "image size": self.image_size,
            "resize": self.reference.resize,
            **self.inputs,
        }


class EvaluationReport(_Record):
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
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise ArtifactError(f"{file} is no report of `latentflow evaluate` ({where}: {first['msg']})") from error


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
    differing = differences(report.protocol, other.protocol)
    if not anyway:
        require_comparable(report.protocol, other.protocol)
    both = [name for name in report.scores if name in other.scores]
    if not both:
        have, has = (", ".join(one.scores) for one in (report, other))
        raise ConfigError(f"the two results have no score in common ({have}; {has}); ask for the same --metrics")
    return Comparison(differing, {name: _change(report.scores[name], other.scores[name]) for name in both})


def differences(protocol: EvaluationProtocol, other: EvaluationProtocol) -> list[str]:
    """What makes two protocols incomparable, one line each."""
    first, second = protocol.comparable(), other.comparable()
    keys = dict.fromkeys([*first, *second])
    return [f"{key}: {first.get(key)} and {second.get(key)}" for key in keys if first.get(key) != second.get(key)]


def require_comparable(protocol: EvaluationProtocol, other: EvaluationProtocol) -> None:
    """Refuse to compare results that were not found alike.

    Raises:
        ConfigError: naming the first differences.
    """
    if differing := differences(protocol, other):
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
) -> dict[str, Score]:
    """Scores of features, each with its interval.

    Args:
        metrics: some of `FEATURE_METRICS`.
        generated: [N, D].
        real: [M, D], for every score but the Fréchet distance and the Inception Score.
        features: name of the feature network.
        logits: [N, K], for the Inception Score.
        resamples: of each interval, 0: none; None: 200, or as many as take about a minute.

    Raises:
        DataError: too few images, features that are not finite, or real features missing.
    """
    warnings = check_metrics(metrics, len(generated), reference.n, generated.shape[1])
    needing = [name for name in metrics if name not in ("fid", "is")]
    if needing and real is None:
        raise DataError(f"{needing[0]} needs the features of the real images themselves, not their statistics alone")
    of = "" if features == "inception" else f" ({features} features)"
    scores: dict[str, Score] = {}

    def put(name: str, label: str, value: float, rows: Resampled | None, n: int, num: int, **more: Any) -> None:
        counted = min(num, _RESAMPLES) if resamples is None else resamples
        if rows is not None and counted:
            found = bootstrap(rows, n, estimate=value, num=counted)
            more |= {"low": found.low, "high": found.high, "standard_error": found.standard_error, "resamples": counted}
        notes = [warnings[metric]] if (metric := "fid" if name == "fd" else name) in warnings else []
        scores[name] = Score(label=label, value=value, notes=notes + more.pop("notes", []), **more)

    for metric in metrics:
        if metric == "fid":
            name, label = frechet_name(features)
            value, n = frechet_distance(FeatureStatistics.of(generated), reference), len(generated)
            put(name, label, value, resampled_frechet(generated, reference), n, _affordable(*generated.shape))
        elif metric == "kid":
            fewest = min(len(generated), len(real))
            few = fewest <= _MOST_KERNEL_IMAGES or resamples
            rows = resampled_kernel(generated, real) if few and resamples != 0 else None
            if fewest >= _SUBSET:
                found = kernel_distance(generated, real, subset_size=_SUBSET)
                put("kid", f"KID{of}", found.mean, rows, len(generated), _RESAMPLES, spread=found.std)
            else:
                value = kernel_distance_of_all(generated, real)
                note = [f"of all images at once: subsets of {_SUBSET}, as published, need as many images"]
                put("kid", f"KID{of}", value, rows, len(generated), _RESAMPLES, notes=note)
        elif metric == "is":
            found = inception_score(logits)
            rows = resampled_inception_score(logits)
            put("is", "Inception Score", found.mean, rows, len(logits), _RESAMPLES, spread=found.std)
    asked = [metric for metric in metrics if metric in NEIGHBOUR_SCORES]
    if asked:
        near = neighbour_scores(generated, real)
        for metric in asked:
            n = len(generated if metric in ("precision", "density") else real)
            put(metric, f"{metric}{of}", getattr(near, metric), near.resampled(metric), n, _RESAMPLES)
    return scores


def _affordable(n: int, dim: int) -> int:
    """Resamples of a Fréchet distance within the budget: a product of N x D^2 and eigenvalues each."""
    operations = n * dim * min(n, dim) + 10 * min(n, dim) ** 3
    return max(int(_BUDGET / operations), 10)
