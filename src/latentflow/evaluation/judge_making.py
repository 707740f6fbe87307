"""The end of `latentflow train-features`: a trained feature network becomes a judge, measured on held-out images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from latentflow.console import notice
from latentflow.data.batches import Batch, epoch_order
from latentflow.evaluation.real_images import image_features
from latentflow.evaluation.shards import Columns, Work
from latentflow.metrics.class_judge import ClassJudge, NotSeparatedError
from latentflow.metrics.features.extractors import JudgeFeatures
from latentflow.metrics.features.judge_folder import MOST_PAIRS, Judge, JudgeRecord
from latentflow.progress import image_progress
from latentflow.randomness import derive_seed
from latentflow.training.feature_run import PreparedFeatures
from latentflow.training.feature_step import feature_step

_FITTED = 10_000  # images that the scale of features and the judge of classes are fitted to, about
_LEAST_SCALE = 0.1  # of the median deviation of a feature


def make_judge(prepared: PreparedFeatures) -> JudgeRecord:
    """Standardise the features of the trained network, fit the judge of classes, measure both, and write the folder.

    Where the features do not separate the classes, a notice says so, and the judge knows none.
    """
    plan, source, runtime = prepared.plan, prepared.images.source, prepared.runtime
    network = prepared.learner.network
    zero, one = torch.zeros(network.config.dim), torch.ones(network.config.dim)
    record = JudgeRecord(
        data=source.description,
        fingerprint=plan.data,
        num_images=len(prepared.images),
        image_size=plan.image_size,
        class_names=plan.class_names,
        method=plan.method,
        network=plan.network,
        steps=plan.steps,
        accuracy=0.0,
        num_held_out=len(prepared.held_out),
        hash="",
    )
    raw = JudgeFeatures(record, Judge(network, zero, one, None), runtime.device)
    rows = _fitted_rows(prepared)
    with image_progress("measuring", len(rows) + len(prepared.held_out)) as on_images:
        work = Work(batch_size=plan.batch_size, num_workers=prepared.request.num_workers, on_images=on_images)
        fitted, held_out = (_features(prepared, some, raw, work) for some in (rows, prepared.held_out))
    mean, std = _scaling(fitted["features"])
    judge = Judge(network, mean, std, None)
    if plan.class_names:
        x, unseen = ((columns["features"] - mean) / std for columns in (fitted, held_out))
        try:
            classes = ClassJudge.fitted(x, fitted["labels"], unseen, held_out["labels"], len(plan.class_names))
        except NotSeparatedError as error:
            notice(f"{error}; the judge knows no classes, and its features compare images all the same")
        else:
            figures = {"accuracy": classes.recognised, "ceiling": classes.accuracy}
            return replace(judge, classes=classes).save(prepared.request.out, record.model_copy(update=figures))
    accuracy = _told_apart(prepared) if plan.method == "contrastive" else None
    return judge.save(prepared.request.out, record.model_copy(update={"accuracy": accuracy, "class_names": []}))


def _scaling(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of features [N, D], each [D]; no feature is divided by less than a tenth of the median.

    A feature that is nearly constant on training images would otherwise outweigh all others wherever it is not.
    """
    std = features.std(0)
    return features.mean(0), std.clamp(min=max(_LEAST_SCALE * float(std.median()), 1e-6))


def _features(prepared: PreparedFeatures, rows: Sequence[int], extractor: JudgeFeatures, work: Work) -> Columns:
    """Features [N, D] and labels [N] of some images."""
    return image_features(prepared.images.source, rows, extractor, plan={}, work=work)


def _fitted_rows(prepared: PreparedFeatures) -> list[int]:
    """Training images that the judge is fitted to: all, or equally many of each class, at random."""
    images, classes = prepared.images, prepared.plan.class_names
    order = images.kept[epoch_order(images.seed, len(images), epoch=0)].tolist()
    if not classes:
        return sorted(order[:_FITTED])
    most = max(math.ceil(_FITTED / len(classes)), 2)
    taken, rows = [0] * len(classes), []
    for row in order:
        label = images.source.label(row)
        if taken[label] < most:
            taken[label] += 1
            rows.append(row)
    return sorted(rows)


def _told_apart(prepared: PreparedFeatures) -> float:
    """The share of views of held-out images whose nearest view is the other view of the same image."""
    source, rows = prepared.images.source, prepared.held_out[:MOST_PAIRS]
    pixels = torch.from_numpy(np.stack([source[row].pixels for row in rows])).permute(0, 3, 1, 2)
    batch = Batch(positions=torch.arange(len(rows)), indices=torch.tensor(rows), pixels=pixels)
    learner, runtime = prepared.learner, replace(prepared.runtime, precision="fp32")
    with torch.no_grad():
        found = feature_step(
            learner,
            batch,
            prepare=learner.network.prepare,
            method="contrastive",
            seed=derive_seed(prepared.plan.seed, "held out"),
            runtime=runtime,
        )
    return float(found.accuracy.mean())
