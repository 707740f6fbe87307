"""`latentflow evaluate`: a model, images or an autoencoder, and real images => scores with all that they depend on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from latentflow.artifacts import require_apart, require_writable
from latentflow.errors import ArtifactError, DataError
from latentflow.evaluation.real_images import reference_features, reference_file
from latentflow.evaluation.request import EvaluationRequest
from latentflow.evaluation.scoring import measured, protocol_of, score_names, scores_of
from latentflow.evaluation.shards import Work
from latentflow.evaluation.subject import open_subject
from latentflow.locks import writes
from latentflow.metrics.evaluation_report import Comparison, EvaluationReport, compare, require_comparable
from latentflow.model.config import SamplingPreset
from latentflow.progress import image_progress
from latentflow.runtime import Runtime

_REPORT = "report.json"  # in the folder of an evaluation


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        report: request, scores and protocol.
        comparison: with the report of `against`; None without it.
        file: where the report is; None if it was not written.
    """

    report: EvaluationReport
    comparison: Comparison | None = None
    file: Path | None = None


@writes(lambda given: given["request"].out, launch=True)
def evaluate(request: EvaluationRequest, runtime: Runtime | None = None) -> Evaluation | None:
    """Score images against real ones. Repeating the call with the same `out` goes on after an interruption.

    Returns:
        None in all but the first of several processes.

    Raises:
        ConfigError, DataError, ArtifactError: before anything is drawn, as far as that can be known.
    """
    assert runtime is not None  # opened by `writes`
    report_file, features_folder = _places(request.out)
    for place in filter(None, (request.out, request.reference_out)):
        require_apart(place, request.data)
    other = EvaluationReport.load(_report_of(request.against)) if request.against else None
    subject = open_subject(request, runtime)
    extractor = subject.open_extractor()
    work = Work(batch_size=request.batch_size, num_workers=request.num_workers, runtime=runtime)

    seconds: dict[str, float] = {}
    file = request.reference_out
    if file is None and request.out is not None:
        file = reference_file(subject.real, extractor, request.out)
    with _timed(seconds, "reference"), image_progress("reference", subject.real.num_images // runtime.world) as count:
        reference = reference_features(subject.real, extractor, replace(work, on_images=count), file=file)
    if reference.rows is None and (needing := [name for name in subject.metrics if name not in ("fid", "is")]):
        raise DataError(
            f"{request.data} holds only statistics, which suffice for fid: for {needing[0]} give the images"
        )
    protocol = protocol_of(subject, extractor, reference, runtime)
    if other and not request.anyway:
        common = [name for name in score_names(subject) if name in other.scores]
        require_comparable(protocol, other.protocol, common)

    with image_progress("evaluating", subject.num // runtime.world) as count:
        columns = subject.columns(extractor, reference, replace(work, folder=features_folder, on_images=count))
    if not runtime.is_main:
        return None
    with _timed(seconds, "scoring"):
        scores = scores_of(subject, columns, reference, extractor)
    report = EvaluationReport(
        request=request.model_dump(mode="json"),
        protocol=protocol.model_copy(update=measured(columns, subject.num_classes, seconds)),
        scores=scores,
        notes=list(reference.notes),
    )
    if report_file:
        report.save(report_file)
    return Evaluation(report, compare(report, other, anyway=request.anyway) if other else None, report_file)


def evaluation_rows(result: Evaluation) -> dict[str, str]:
    """The short table for people: scores, what they are of, and what they cost."""
    report, protocol = result.report, result.report.protocol
    rows = {score.label: score.text for score in report.scores.values()}
    if result.comparison is not None:
        for change in result.comparison.scores.values():
            error = "" if change.standard_error is None else f" +- {change.standard_error:.2g}"
            rows[f"{change.label}, against"] = f"{change.other:.5g}: {change.difference:+.3g}{error}"
    labels = "" if protocol.label_policy in ("none", "not known") else f", labels {protocol.label_policy}"
    rows["images"] = f"{protocol.num_images} of {protocol.image_size} pixels{labels}"
    rows["reference"] = f"{protocol.reference.data}, {protocol.reference.resize}"
    rows["features"] = f"{protocol.features.name} {protocol.features.hash[:12]}"
    if protocol.evaluations is not None:
        calls = protocol.evaluations
        rows["drawn by"] = SamplingPreset.model_validate(protocol.sampling).in_words
        rows["evaluations per image"] = f"{calls.mean:.5g} ({calls.min} to {calls.max})"
    rows["seconds"] = ", ".join(f"{what} {value:.1f}" for what, value in protocol.seconds.items())
    return {**rows, "report": str(result.file)} if result.file else rows


def _places(out: Path | None) -> tuple[Path | None, Path | None]:
    """The file of the report, and the folder of the features."""
    if out is None:
        return None, None
    if out.suffix == ".json":
        require_writable(out, suffix=".json")
        return out, out.with_suffix(".features")
    require_writable(out)
    return out / _REPORT, out / "report.features"


def _report_of(place: Path) -> Path:
    """The file of a report, given by its folder or its name."""
    file = place / _REPORT if place.is_dir() else place
    if not file.exists():
        raise ArtifactError(f"--against {place}: there is no {file}; give what `latentflow evaluate --out` wrote")
    return file


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - began
