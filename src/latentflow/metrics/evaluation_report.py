"""The result of an evaluation: scores with their intervals, and all that must agree before two of them are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from latentflow.artifacts import read_json, write_json
from latentflow.errors import ArtifactError, ConfigError
from latentflow.metrics.names import NEIGHBOUR_SCORES
from latentflow.records import Record, explain
from latentflow.runtime import Precision
from latentflow.sizes import ImageSize

ENOUGH_RESAMPLES = 200  # of fewer, bounds are not called an interval


class Score(Record):
    """One number and its uncertainty."""

    label: str = Field(description="What it is called.")
    value: float
    low: float | None = Field(
        None,
        description="Bounds of the 95 % interval over the choice of the images; from fewer than 200 resamples, "
        "the lowest and highest resample.",
    )
    high: float | None = None
    standard_error: float | None = None
    resamples: int = Field(0, description="Resamples that the bounds are from; 0: from the spread over images.")
    spread: float | None = Field(None, description="Standard deviation over subsets (kid) or splits (is).")
    limit: float | None = Field(None, description="The same score of the real images themselves.")
    notes: list[str] = Field(default_factory=list, description="Warnings for the user.")

    @property
    def text(self) -> str:
        """For a table: "12.3 [11.9, 12.7]"; bounds that are not a 95 % interval are marked as a spread."""
        parts = [f"{self.value:.5g}"]
        parts += [f"[{self.low:.5g}, {self.high:.5g}]"] if self.low is not None else []
        parts += [f"(spread of {self.resamples} resamples)"] if 0 < self.resamples < ENOUGH_RESAMPLES else []
        parts += [f"+- {self.spread:.2g} over subsets"] if self.spread is not None else []
        parts += [f"(real images: {self.limit:.5g})"] if self.limit is not None else []
        return " ".join(parts)


class JudgeFacts(Record):
    """The judge whose features images were compared by: on what it was trained, and how well it recognises images."""

    data: str
    fingerprint: str
    num_images: int
    image_size: ImageSize
    class_names: list[str] = Field(description="Empty: it knows no classes.")
    method: str
    steps: int
    accuracy: float | None = Field(description="Of held-out images; null: its features do not separate the classes.")
    num_held_out: int
    hash: str = Field(description="Of its folder's tensors.")


class FeatureFacts(Record):
    """The features that images were compared by."""

    name: str
    hash: str
    label: str
    precision: Precision = Field("fp32", description="Published features are computed in fp32.")
    judge: JudgeFacts | None = Field(None, description="Of features of one's own; null for all others.")


class ReferenceFacts(Record):
    """The real images."""

    data: str
    fingerprint: str = Field(description="Of the images; of a foreign file of statistics, its SHA-256.")
    num_images: int = Field(description="0: not given in the file of statistics.")
    image_size: ImageSize = Field(description="0: not given in the file of statistics.")
    resize: str


class ModelFacts(Record):
    """The model that the images are of."""

    name: str
    weights: str = Field(description="SHA-256 over the weights; of images in files, their fingerprint.")
    training: dict[str, Any] = Field(default_factory=dict, description="As the model's config has it.")


class EvaluationCounts(Record):
    """Network calls per image; a guided call counts twice, or as much more as the guide's network costs."""

    mean: float
    min: int | float
    max: int | float


class EvaluationProtocol(Record):
    """Everything that the scores depend on, and what they cost."""

    task: Literal["sample", "images", "reconstruction", "inpaint", "mask-to-image", "translate"]
    num_images: int
    image_size: ImageSize
    first_seed: int | None = Field(None, description="Image i has this seed + i; null: nothing was drawn.")
    label_policy: str = "none"
    label_counts: list[int] = Field(default_factory=list, description="Images of each class; empty: unconditional.")
    features: FeatureFacts
    reference: ReferenceFacts
    neighbours: int = Field(
        0, description="Most images of each kind that precision, recall, density and coverage look at; 0: all."
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
        """What must be equal before two results may be compared. Sampling may differ: it is what one compares.

        Args:
            metrics: scores to compare; not every score depends on everything.
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
            "image size": self.image_size.written,
            "resize": self.reference.resize,
            **self.inputs,
        }


class EvaluationReport(Record):
    """The result of `latentflow evaluate`."""

    schema_version: Literal[1] = 1
    request: dict[str, Any] = Field(
        default_factory=dict, description="The request as it was given; empty in reports of earlier versions."
    )
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
            raise ArtifactError(f"{file} is not a report of `latentflow evaluate` ({explain(error)})") from error


@dataclass(frozen=True)
class ScoreChange:
    """A score of two reports.

    Attributes:
        value, other: of the first and of the second report.
        difference: value - other.
        standard_error: of the difference, for independent images; None if an interval is missing.
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
        differing: what makes them incomparable, one line each.
        scores: the scores that both have, by name.
    """

    differing: list[str]
    scores: dict[str, ScoreChange]


def compare(report: EvaluationReport, other: EvaluationReport, *, anyway: bool = False) -> Comparison:
    """Two reports side by side; refused if their protocols differ.

    Args:
        anyway: compare even then; what differs is in the result.

    Raises:
        ConfigError: they are not comparable, naming the first differences; or have no score in common.
    """
    both = [name for name in report.scores if name in other.scores]
    differing = protocol_differences(report.protocol, other.protocol, both)
    if not anyway:
        require_comparable(report.protocol, other.protocol, both)
    if not both:
        have, has = (", ".join(one.scores) for one in (report, other))
        raise ConfigError(f"the two results have no score in common ({have}; {has}); ask for the same --metrics")
    return Comparison(differing, {name: _change(report.scores[name], other.scores[name]) for name in both})


def protocol_differences(protocol: EvaluationProtocol, other: EvaluationProtocol, metrics: Iterable[str]) -> list[str]:
    """What makes two protocols incomparable in these metrics, one line each."""
    first, second = protocol.comparable(metrics), other.comparable(metrics)
    keys = dict.fromkeys([*first, *second])
    return [f"{key}: {first.get(key)} and {second.get(key)}" for key in keys if first.get(key) != second.get(key)]


def require_comparable(protocol: EvaluationProtocol, other: EvaluationProtocol, metrics: Iterable[str]) -> None:
    """Refuse to compare results in these metrics if their protocols differ.

    Raises:
        ConfigError: naming the first differences.
    """
    if differing := protocol_differences(protocol, other, metrics):
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ConfigError(
            f"the two results are not comparable ({'; '.join(differing[:3])}{more}); evaluate both with the same "
            "protocol, or give --anyway"
        )


def _change(one: Score, other: Score) -> ScoreChange:
    errors = (one.standard_error, other.standard_error)
    together = None if None in errors else (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    return ScoreChange(one.label, one.value, other.value, one.value - other.value, together)
