"""From the numbers of images to scores, and the protocol that the scores depend on."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import latentflow
from latentflow.evaluation.class_accuracy import class_accuracy, class_judge
from latentflow.evaluation.drawn_set import logits_of
from latentflow.evaluation.painted import map_scores
from latentflow.evaluation.real_images import RealFeatures
from latentflow.evaluation.shards import Columns
from latentflow.evaluation.subject import Subject
from latentflow.metrics.evaluation_report import EvaluationCounts, EvaluationProtocol, FeatureFacts, JudgeFacts, Score
from latentflow.metrics.feature_scores import Scoring, feature_scores, frechet_name
from latentflow.metrics.features.extractors import FeatureExtractor, JudgeFeatures
from latentflow.metrics.names import CLASS_ACCURACY, DISCRIMINATIVE_SCORES, FEATURE_METRICS, features_name
from latentflow.metrics.pairs import discriminative_scores
from latentflow.metrics.resampling import interval_over_images
from latentflow.metrics.scores import require_enough, some_rows
from latentflow.runtime import Runtime
from latentflow.sampling.call_cost import call_count
from latentflow.sampling.drawing import precision_for

_PAIR_LABELS = {
    "psnr": "PSNR in dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "psnr-hole": "PSNR in dB in the hole",
    "ssim-hole": "SSIM of windows that touch the hole",
    "psnr-input": "PSNR in dB of the input, enlarged",
    "ssim-input": "SSIM of the input, enlarged",
}


def protocol_of(
    subject: Subject, extractor: FeatureExtractor, reference: RealFeatures, runtime: Runtime
) -> EvaluationProtocol:
    """Everything that the scores depend on and that is known before the images are."""
    request, solver = subject.request, subject.sampling.get("solver")
    versions = {"latentflow": latentflow.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if subject.judge.lpips:
        versions["lpips weights"] = subject.judge.lpips.hash
    return EvaluationProtocol(
        task=subject.task,
        num_images=subject.num,
        image_size=subject.image_size,
        first_seed=request.seed if subject.sampling else None,
        label_policy=subject.labels,
        features=_feature_facts(extractor),
        reference=subject.real.facts(reference.num_images),
        neighbours=request.neighbours,
        inputs=subject.inputs,
        model=subject.facts(),
        sampling=subject.sampling,
        device=_device_name(subject.device),
        precision=precision_for(runtime, solver) if solver else runtime.precision,
        versions=versions,
    )


def _feature_facts(extractor: FeatureExtractor) -> FeatureFacts:
    judge = None
    if isinstance(extractor, JudgeFeatures):
        judge = JudgeFacts(**{name: getattr(extractor.record, name) for name in JudgeFacts.model_fields})
    return FeatureFacts(
        name=extractor.name, hash=extractor.hash, label=extractor.label, precision=extractor.precision, judge=judge
    )


def score_names(subject: Subject) -> list[str]:
    """The keys of the subject's metrics in a report."""
    frechet, _ = frechet_name(features_name(subject.request.features))
    return [frechet if name == "fid" else name for name in subject.metrics]


def scores_of(
    subject: Subject, columns: Columns, reference: RealFeatures, extractor: FeatureExtractor
) -> dict[str, Score]:
    """Every metric of the subject."""
    request, metrics, generated = subject.request, subject.metrics, columns["features"]
    scores = feature_scores(
        [name for name in metrics if name in FEATURE_METRICS],
        generated,
        reference.statistics,
        reference.features,
        features=extractor.name,
        logits=logits_of(extractor, generated) if "is" in metrics else None,
        how=Scoring(request.resamples, request.neighbours, subject.device),
    )
    if judged := [name for name in metrics if name in DISCRIMINATIVE_SCORES]:
        scores |= _discriminative(judged, generated, some_rows(reference.features, len(generated)))
    if CLASS_ACCURACY in metrics:
        judge = class_judge(extractor, subject.class_names, subject.real, reference)
        scores[CLASS_ACCURACY] = class_accuracy(judge, generated, columns["labels"])
    scores |= {name: _pair_score(name, columns) for name in metrics if name in _PAIR_LABELS}
    return scores | (map_scores(columns) if "miou" in metrics else {})


def measured(columns: Columns, num_classes: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The fields of a protocol that are known once the images are there."""
    drawing = columns["seconds"].sum(0).tolist() if "seconds" in columns else []
    spent = {**seconds, **dict(zip(("drawing", "features"), drawing, strict=False))}
    found: dict[str, Any] = {
        "num_images": len(columns["features"]),
        "seconds": {name: round(value, 3) for name, value in spent.items()},
    }
    if "evaluations" in columns:
        calls, labels = columns["evaluations"], columns["labels"]
        found["evaluations"] = EvaluationCounts(
            mean=float(calls.double().mean()), min=call_count(calls.min()), max=call_count(calls.max())
        )
        if (labels >= 0).all():
            found["label_counts"] = torch.bincount(labels, minlength=num_classes).tolist()
    return found


def mean_score(label: str, values: Tensor) -> Score:
    """The mean over images with its confidence interval: [N] => a score."""
    found = interval_over_images(values, float(values.double().mean()))
    bounds = {"low": found.low, "high": found.high, "standard_error": found.standard_error}
    return Score(label=label, value=found.estimate, **bounds)


def _pair_score(name: str, columns: Columns) -> Score:
    """The mean over pairs, with that of the autoencoder's reconstructions as its limit where it was measured."""
    score, limits = mean_score(_PAIR_LABELS[name], columns[name]), columns.get(f"{name}-limit")
    return score if limits is None else score.model_copy(update={"limit": float(limits.double().mean())})


def _discriminative(names: Sequence[str], generated: Tensor, real: Tensor) -> dict[str, Score]:
    found = discriminative_scores(generated, real)
    warning = require_enough("p_ids", len(generated), dim=generated.shape[1])
    notes = [warning] if warning else []
    values = {"p-ids": found.p_ids, "u-ids": found.u_ids}
    return {name: Score(label=name.upper(), value=values[name], notes=notes) for name in names}


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
