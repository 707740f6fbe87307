"""The rounds of a sweep: candidates that draw the same seeds, are scored in the same way, and are kept on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from latentflow.artifacts import read_json, read_tensors, write_json, write_tensors
from latentflow.errors import ArtifactError, NonFiniteError
from latentflow.evaluation.shards import Columns, OnImages
from latentflow.evaluation.sweep_rules import Candidate, Point, affordable
from latentflow.metrics.class_judge import ClassJudge
from latentflow.metrics.resampling import draw_counts
from latentflow.metrics.scores import resampled_frechet
from latentflow.metrics.statistics import FeatureStatistics
from latentflow.progress import image_progress
from latentflow.records import Record
from latentflow.runtime import Precision

_RESAMPLES = 100  # a standard error to 7 %


class SweepPlan(Record):
    """Everything that two sweeps must share for one to continue the other."""

    format_version: int = 2
    weights: str = Field(description="SHA-256 of the model's weights, or of all averages that are compared.")
    model: dict[str, Any] = Field(description="Its config, without its preset and its training.")
    guided: dict[str, Any] = Field(description="What the candidates inherit from its preset.")
    data: str = Field(description="Fingerprint of the reference.")
    features: str
    feature_hash: str
    device: str
    precision: Precision = Field("fp32", description="What the model's network computes in.")
    batch_size: int
    seed: int
    sizes: list[int] = Field(description="Images per candidate in each round.")
    candidates: dict[str, Candidate]
    lengths: dict[str, float] = Field({}, description="Of the weights' average, by candidate; empty: the model's own.")
    named: list[str] = Field([], description="Named conditions, which images take from the reference.")


class Measured(Record):
    """A candidate in one round."""

    num: int = Field(description="Images the figures are of.")
    distance: float = Field(description="Fréchet distance to the reference.")
    resamples: list[float] = Field(description="The same of resampled images, the same resamples for every candidate.")
    right: list[bool] = Field([], description="Whether each image is judged to show its class; empty: not judged.")
    evaluations: list[int | float] = Field(description="Network calls of each image; a guided call counts twice.")
    drawing_seconds: float = Field(description="Of all these images: solver and decoder.")
    seconds: float = Field(description="Of this round only, with features and arithmetic.")
    added: int = Field(description="Images that this round drew.")

    @property
    def mean_evaluations(self) -> float:
        return sum(self.evaluations) / self.num

    @property
    def milliseconds(self) -> float:
        """Of drawing one image."""
        return 1000 * self.drawing_seconds / self.num


class CandidateRecord(Record):
    """The measurements of a candidate; OUT/candidates/NAME.json."""

    name: str
    rounds: list[Measured] = Field([])
    failed: str = Field("", description="Why it cannot be measured.")

    @property
    def seconds_per_image(self) -> float:
        """Of its last round, for the images that it drew."""
        return self.rounds[-1].seconds / self.rounds[-1].added

    def at(self, num: int) -> Measured | None:
        """The measurement with `num` images, if there is one."""
        return next((one for one in self.rounds if one.num == num), None)


@dataclass(frozen=True)
class Round:
    """Candidates measured with equally many images.

    Attributes:
        num: images per candidate.
        measured: by name.
        missing: names of those that the budget left out; none: the round is complete.
    """

    num: int
    measured: dict[str, Measured]
    missing: list[str]

    @property
    def points(self) -> list[Point]:
        return [
            Point(name, one.mean_evaluations, one.distance, tuple(one.resamples), tuple(one.right))
            for name, one in self.measured.items()
        ]


class Candidates:
    """The candidates on disk, and how one is measured.

    Args:
        folder: of their records and features.
        draw: called with num, seed, preset and on_images; see `ImageSet.draw`.
        reference: statistics of the real images; scores are computed on its device.
        judge: of classes; None: they are not judged.
        prepare: called with the name of a candidate before its images are drawn.

    Attributes:
        kept: the record of each candidate, by name.

    Raises:
        ArtifactError: a record is damaged.
    """

    def __init__(
        self,
        folder: Path,
        plan: SweepPlan,
        draw: Callable[..., Columns],
        reference: FeatureStatistics,
        judge: ClassJudge | None = None,
        prepare: Callable[[str], None] = lambda name: None,
    ):
        self.folder, self.plan, self.draw, self.reference, self.judge = folder, plan, draw, reference, judge
        self.prepare = prepare
        self.kept = {name: self._load(name) for name in plan.candidates}
        self._warm = False

    def measure(self, name: str, num: int, on_images: OnImages) -> None:
        """Bring a candidate to `num` images; those of earlier rounds are not drawn again."""
        if not self._warm:  # the first call of anything is slow, which no candidate should pay for
            self.draw(num=2, seed=self.plan.seed, preset={"solver": "euler", "steps": 1, "guidance": 1.0})
            self._warm = True
        began, record = time.perf_counter(), self.kept[name]
        last = record.rounds[-1] if record.rounds else None
        have = last.num if last else 0
        preset = self.plan.candidates[name]
        self.prepare(name)
        try:
            drawn = self.draw(num=num - have, seed=self.plan.seed + have, preset=preset, on_images=on_images)
        except NonFiniteError as error:  # one preset may be unusable while the others are not
            self._save(record.model_copy(update={"failed": str(error)}))
            return
        features, calls = drawn["features"], drawn["evaluations"].tolist()
        drawing_seconds = float(drawn["seconds"][:, 0].sum())
        right = self.judge.right(features, drawn["labels"]).tolist() if self.judge else []
        if last:
            features = torch.cat([read_tensors(self._features(name))["features"][:have], features])
            calls, right = [*last.evaluations, *calls], [*last.right, *right]
            drawing_seconds += last.drawing_seconds
        distance, *resamples = self._distances(features)
        write_tensors(self._features(name), {"features": features})
        measured = Measured(
            num=num,
            distance=distance,
            right=right,
            resamples=resamples,
            evaluations=calls,
            drawing_seconds=drawing_seconds,
            seconds=time.perf_counter() - began,
            added=num - have,
        )
        self._save(record.model_copy(update={"rounds": [*record.rounds, measured]}))

    def _distances(self, features: Tensor) -> list[float]:
        """Of the images themselves, and of resamples that are the same for every candidate."""
        themselves = torch.ones(1, len(features), dtype=torch.float64)
        resamples = draw_counts(len(features), _RESAMPLES, torch.Generator().manual_seed(self.plan.seed))
        scores = resampled_frechet(features.to(self.reference.mean.device), self.reference)
        return scores(torch.cat([themselves, resamples])).tolist()

    def _features(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _load(self, name: str) -> CandidateRecord:
        file = self.folder / f"{name}.json"
        if not file.is_file():
            return CandidateRecord(name=name)
        try:
            return CandidateRecord.model_validate(read_json(file))
        except ValidationError as error:
            raise ArtifactError(f"{file} is damaged; delete it, and repeat the command") from error

    def _save(self, record: CandidateRecord) -> None:
        write_json(self.folder / f"{record.name}.json", record.model_dump(mode="json"))
        self.kept[record.name] = record


def measure_rounds(candidates: Candidates, budget: float | None = None) -> list[Round]:
    """Round after round until the last or until the budget is spent; with a budget the better half goes on each time.

    Args:
        budget: seconds after which no further candidate is started; None: no limit, and every candidate takes part in
            every round. What is on disk already costs nothing.
    """
    began, kept = time.perf_counter(), candidates.kept

    def seconds_left() -> float:
        return math.inf if budget is None else budget - (time.perf_counter() - began)

    def predicted_seconds(point: Point, size: int) -> float:
        record = kept[point.name]
        return record.seconds_per_image * max(size - record.rounds[-1].num, 0)

    rounds: list[Round] = []
    names = list(candidates.plan.candidates)
    for size in candidates.plan.sizes:
        if rounds and budget is not None:
            points = rounds[-1].points
            half = max((len(points) + 1) // 2, 2)
            names = [p.name for p in affordable(points, half, seconds_left(), partial(predicted_seconds, size=size))]
        todo = [name for name in names if not (kept[name].at(size) or kept[name].failed)]
        with image_progress(f"{len(names)} candidates, {size} images each:", len(todo) * size) as on_images:
            for name in todo:
                if seconds_left() <= 0:
                    break
                candidates.measure(name, size, on_images)
        found = {name: one for name in names if (one := kept[name].at(size))}
        if not found:
            break
        rounds.append(Round(size, found, [name for name in names if name not in found and not kept[name].failed]))
        if rounds[-1].missing:
            break
    return rounds
