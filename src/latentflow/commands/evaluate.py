"""`latentflow evaluate`: a model, images or an autoencoder, and real images => scores with all that they depend on."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import latentflow
from latentflow.artifacts import require_apart, require_writable
from latentflow.errors import ArtifactError, DataError
from latentflow.evaluation.drawn_set import draw_set, logits_of
from latentflow.evaluation.painted import map_scores, painted, paired_images
from latentflow.evaluation.real_images import (
    RealFeatures,
    RealImages,
    image_features,
    open_reference,
    reference_features,
    reference_file,
)
from latentflow.evaluation.reconstruction import pair_scores, reconstructed
from latentflow.evaluation.shards import Columns, OnImages
from latentflow.evaluation.subject import (
    JUDGED,
    ImagePlan,
    Subject,
    check_scores,
    checked_words,
    open_extractor,
    open_subject,
    plan_images,
    usual_metrics,
)
from latentflow.locks import writes
from latentflow.metrics.evaluation_report import (
    FEATURE_METRICS,
    NEIGHBOURS,
    Comparison,
    EvaluationCounts,
    EvaluationProtocol,
    EvaluationReport,
    FeatureFacts,
    Score,
    compare,
    feature_scores,
    frechet_name,
    require_comparable,
)
from latentflow.metrics.features.extractors import FeatureExtractor
from latentflow.metrics.features.lpips import load_lpips
from latentflow.metrics.pairs import PairJudge, discriminative_scores
from latentflow.metrics.scores import require_enough, some_of, some_rows
from latentflow.progress import image_progress
from latentflow.runtime import Runtime
from latentflow.sampling.drawing import precision_for

_REPORT = "report.json"  # in the folder of an evaluation


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        report: scores and protocol.
        comparison: with the report of `against`; None without it.
        file: where the report is; None where nothing was to be written.
    """

    report: EvaluationReport
    comparison: Comparison | None = None
    file: Path | None = None


@writes("out", launch=True)
def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    task: str = "sample",
    reconstruction: bool = False,
    metrics: Sequence[str] | None = None,
    num: int | None = None,
    features: str = "inception",
    weights: str | Path | None = None,
    features_precision: str = "fp32",
    labels: str | None = None,
    masks: str | None = None,
    segmenter: str | None = None,
    lpips: str | Path | None = None,
    image_size: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    num_workers: int | None = None,
    resamples: int | None = None,
    neighbours: int = NEIGHBOURS,
    reference_out: str | Path | None = None,
    out: str | Path | None = None,
    against: str | Path | None = None,
    anyway: bool = False,
    runtime: Runtime | None = None,
    **preset: Any,
) -> Evaluation | None:
    """Score images against real ones. Repeating the call with the same `out` goes on after a kill.

    Args:
        model: a model, whose images are drawn and never written; or a folder or zip of PNG images; or, with
            `reconstruction`, a model or an autoencoder.
        data: real images as for `encode`, or stored statistics of them (.safetensors, .npz).
        task: "sample", "inpaint" or "mask-to-image".
        metrics: names of `METRICS`; None: the usual ones of the task.
        num: images; None: 50,000 for drawn samples, else all there are.
        features: a name of `metrics.features.NAMES`.
        weights, features_precision: of the features; see `open_features`.
        labels: see `draw_set`; None: "balanced", and "none" for painting.
        masks, segmenter: see `plan_painting`.
        lpips: weights of LPIPS; see `load_lpips`.
        image_size: of an autoencoder on its own.
        num_workers: processes that read images; 0: threads; None: as many as pay.
        resamples, neighbours: see `feature_scores`.
        reference_out: a .safetensors file for the statistics of the reference; None: next to `out`.
        out: a folder, or the .json file of the report; features are kept beside it.
        against: another report, its file or its folder; `anyway`: although something differs that must not.
        preset: fields of `SamplingPreset`.

    Returns:
        None in all but the first of several processes.

    Raises:
        ConfigError, DataError, ArtifactError: before anything is drawn, as far as that can be known.
    """
    assert runtime is not None  # opened by `writes`
    task, wanted = checked_words(task, reconstruction, metrics, num, features, labels, resamples, neighbours)
    report_file, work = _places(out)
    for place in filter(None, (out, reference_out)):
        require_apart(place, data)
    other = EvaluationReport.load(_report_of(against)) if against else None
    subject = open_subject(str(model), task, image_size, runtime)
    real = open_reference(data, subject.image_size)
    wanted = wanted or [*usual_metrics(subject, real), *(["lpips"] if lpips else [])]
    with_ssim, network = bool({"ssim", "ssim-hole"} & {*wanted}), load_lpips(lpips, subject.device) if lpips else None
    judge = PairJudge(with_ssim, network, subject.device)
    plan = plan_images(subject, real, wanted, num, labels, masks, segmenter, judge, seed, preset)
    check_scores(wanted, plan.num, real, data, features)
    extractor = open_extractor(features, weights, subject, features_precision)

    seconds: dict[str, float] = {}
    file = Path(reference_out) if reference_out else reference_file(real, extractor, Path(out)) if out else None
    options = {"batch_size": batch_size, "runtime": runtime}
    with _timed(seconds, "reference"), image_progress("reference", real.num_images // runtime.world) as on_images:
        how = {"file": file, "num_workers": num_workers, "on_images": on_images}
        reference = reference_features(real, extractor, **how, **options)
    if reference.rows is None and (needing := [name for name in wanted if name not in ("fid", "is")]):
        raise DataError(f"{data} holds statistics alone, which are enough for fid: for {needing[0]} give the images")
    protocol = EvaluationProtocol(
        task="images" if subject.samples is not None and task == "sample" else subject.task,
        num_images=plan.num,
        image_size=subject.image_size,
        first_seed=None if subject.flow is None else seed,
        label_policy=plan.labels,
        features=FeatureFacts(
            name=extractor.name, hash=extractor.hash, label=extractor.label, precision=extractor.precision
        ),
        reference=real.facts(reference.num_images),
        neighbours=neighbours,
        inputs=plan.painting.inputs if plan.painting else {},
        model=subject.facts(),
        sampling=plan.sampling,
        device=_device_name(subject.device),
        precision=precision_for(runtime, plan.sampling["solver"]) if plan.sampling else runtime.precision,
        versions={
            "latentflow": latentflow.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **({"lpips weights": judge.lpips.hash} if judge.lpips else {}),
        },
    )
    if other and not anyway:
        require_comparable(protocol, other.protocol, [name for name in _keys(wanted, features) if name in other.scores])

    with image_progress("evaluating", plan.num // runtime.world) as on_images:
        folder = work.with_suffix(".features") if work else None
        how = {"folder": folder, "seed": seed, "preset": preset, "num_workers": num_workers, "on_images": on_images}
        given = (subject, plan, real, reference, extractor, judge)
        columns = _images(*given, **how, **options)
    if not runtime.is_main:
        return None
    with _timed(seconds, "scoring"):
        how = {"resamples": resamples, "neighbours": neighbours, "device": subject.device}
        scores = _scores(wanted, columns, reference, extractor, **how)
    report = EvaluationReport(
        protocol=protocol.model_copy(update=_measured(columns, subject, seconds)),
        scores=scores,
        notes=list(reference.notes),
    )
    if report_file:
        report.save(report_file)
    return Evaluation(report, compare(report, other, anyway=anyway) if other else None, report_file)


def _images(
    subject: Subject,
    plan: ImagePlan,
    real: RealImages,
    reference: RealFeatures,
    extractor: FeatureExtractor,
    judge: PairJudge,
    *,
    folder: Path | None,
    seed: int,
    preset: dict[str, Any],
    batch_size: int,
    num_workers: int | None,
    runtime: Runtime,
    on_images: OnImages,
) -> Columns:
    """The columns of the images to be scored, whoever made them: see `drawn_columns`, `image_features`, `painted`.

    In all but the first of several processes they are not complete.
    """
    options = {"batch_size": batch_size, "folder": folder, "runtime": runtime, "on_images": on_images}
    reading = {**options, "num_workers": num_workers}
    rows = [] if reference.rows is None else reference.rows[some_of(len(reference.rows), plan.num)].tolist()
    if subject.task == "reconstruction":
        keys = {"data": real.fingerprint, "image_size": subject.image_size, "features": extractor.hash}
        given = (subject.autoencoder, real.source, rows, extractor)
        return reconstructed(*given, judge=judge, plan=keys, **reading)
    if plan.painting is not None:
        return painted(subject.flow, plan.painting, real.source, rows, extractor, **options)
    if subject.samples is not None and subject.task == "inpaint":
        given = (subject.samples, subject.sample_rows, real.source, rows, extractor)
        return paired_images(*given, judge=judge, **reading)
    if subject.samples is not None:
        keys = {"samples": subject.samples.fingerprint(), "features": extractor.hash}
        given = (subject.samples, subject.sample_rows[: plan.num], extractor)
        columns = image_features(*given, plan=keys, for_all=("rows",), **reading)
        if len(columns["rows"]) < plan.num:
            raise DataError(f"{plan.num - len(columns['rows'])} of the generated images cannot be read; draw them anew")
        return columns
    shares = None
    if plan.labels == "data":
        num_classes = subject.flow.config.conditioning.num_classes
        shares = torch.bincount(reference.labels, minlength=num_classes).tolist()
    drawn = draw_set(
        *(subject.flow, extractor),
        num=plan.num,
        seed=seed,
        labels=plan.labels,
        label_shares=shares,
        preset=preset,
        **options,
    )
    if drawn is None:
        return {}
    spent = torch.tensor([[drawn.drawing_seconds, drawn.seconds - drawn.drawing_seconds]])
    return {"features": drawn.features, "evaluations": drawn.evaluations, "labels": drawn.labels, "seconds": spent}


def _scores(
    metrics: Sequence[str],
    columns: Columns,
    reference: RealFeatures,
    extractor: FeatureExtractor,
    **how: Any,
) -> dict[str, Score]:
    """All that is asked for; the options are `feature_scores`'."""
    generated, real = columns["features"], reference.features
    logits = logits_of(extractor, generated) if "is" in metrics else None
    of_features = [name for name in metrics if name in FEATURE_METRICS]
    given = (of_features, generated, reference.statistics, real)
    scores = feature_scores(*given, features=extractor.name, logits=logits, **how)
    if judged := [name for name in metrics if name in JUDGED]:
        found = discriminative_scores(generated, some_rows(real, len(generated)))
        warning = require_enough("p_ids", len(generated), dim=generated.shape[1])
        for name in judged:
            value, notes = getattr(found, name.replace("-", "_")), [warning] if warning else []
            scores[name] = Score(label=name.upper(), value=value, notes=notes)
    scores |= pair_scores(metrics, columns)
    return scores | (map_scores(columns) if "miou" in metrics else {})


def _keys(metrics: Sequence[str], features: str) -> list[str]:
    """Under which names a report has the scores of some metrics."""
    return [frechet_name(features)[0] if name == "fid" else name for name in metrics]


def _measured(columns: Columns, subject: Subject, seconds: dict[str, float]) -> dict[str, Any]:
    """What a protocol says of images once they are there."""
    drawing = columns["seconds"].sum(0).tolist() if "seconds" in columns else []
    spent = {**seconds, **dict(zip(("drawing", "features"), drawing, strict=False))}
    measured: dict[str, Any] = {
        "num_images": len(columns["features"]),
        "seconds": {name: round(value, 3) for name, value in spent.items()},
    }
    if subject.flow is not None:
        calls = columns["evaluations"]
        measured["evaluations"] = EvaluationCounts(
            mean=float(calls.double().mean()), min=int(calls.min()), max=int(calls.max())
        )
        told = columns["labels"]
        if (told >= 0).all():
            num_classes = subject.flow.config.conditioning.num_classes
            measured["label_counts"] = torch.bincount(told, minlength=num_classes).tolist()
    return measured


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


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
        calls, how = protocol.evaluations, protocol.sampling
        rows["drawn by"] = f"{how['solver']}, {how['steps']} steps, guidance {how['guidance']:g}"
        rows["evaluations per image"] = f"{calls.mean:.5g} ({calls.min} to {calls.max})"
    rows["seconds"] = ", ".join(f"{what} {value:.1f}" for what, value in protocol.seconds.items())
    return {**rows, "report": str(result.file)} if result.file else rows


def _places(out: str | Path | None) -> tuple[Path | None, Path | None]:
    """The file of the report, and the name beside which features are kept."""
    if out is None:
        return None, None
    out = Path(out)
    if out.suffix == ".json":
        require_writable(out, suffix=".json")
        return out, out
    require_writable(out)
    return out / _REPORT, out / "report"


def _report_of(place: str | Path) -> Path:
    """The file of a report that is given by its folder or as it is."""
    file = Path(place) / _REPORT if Path(place).is_dir() else Path(place)
    if not file.exists():
        raise ArtifactError(f"--against {place}: there is no {file}; give what `latentflow evaluate --out` wrote")
    return file


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - began
