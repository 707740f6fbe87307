"""A model => a set of images as rows of features.

Image i has its seed and its label from i alone, so the set is the same on any number of processes, in any batch size,
and after any number of interruptions. No image touches the disk.

Legend: N images, D features of an image, K classes of the feature network.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentflow.artifacts import sha256_tensors
from latentflow.errors import ConfigError, nearest
from latentflow.evaluation.shards import SHARD_SIZE, Columns, OnImages, compute_in_shards, join_columns
from latentflow.metrics.features.extractors import FeatureExtractor
from latentflow.metrics.statistics import require_features
from latentflow.model.flow_model import FlowModel
from latentflow.randomness import derive_seed
from latentflow.runtime import Runtime
from latentflow.sampling.cost import compile_where_it_pays
from latentflow.sampling.drawing import Drawing, make_drawing
from latentflow.sampling.pipeline import Given, draw
from latentflow.sampling.request import SampleRequest
from latentflow.sampling.samples import Samples

LABEL_POLICIES = ("balanced", "uniform", "data", "none")


@dataclass(frozen=True)
class DrawnSet:
    """What the scores take, all of it on the CPU.

    Attributes:
        features: [N, D] float32.
        logits: [N, K] float32 for the Inception Score; None where the feature network has none.
        evaluations: [N] int64, network calls of each image; a guided call counts twice.
        labels: [N] int64, -1 where no class was told.
        seconds: of solver, decoder and features, summed over processes and interrupted runs.
        drawing_seconds: of solver and decoder alone.
        num: N.
    """

    features: Tensor
    logits: Tensor | None
    evaluations: Tensor
    labels: Tensor
    seconds: float
    drawing_seconds: float
    num: int


def draw_set(
    model: FlowModel,
    extractor: FeatureExtractor,
    *,
    num: int,
    seed: int = 0,
    labels: str = "balanced",
    label_shares: Sequence[float] | None = None,
    preset: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    folder: str | Path | None = None,
    runtime: Runtime | None = None,
    on_images: OnImages | None = None,
) -> DrawnSet | None:
    """Draw images and keep their features.

    Args:
        num: N; image i has seed `seed + i`.
        labels: which class image i is told. balanced: that of its seed, as in `sample`; uniform: any, drawn for
            each image; data: likewise, by `label_shares`; none: no class, as for a model without classes.
        label_shares: of "data": a number for each class, for example how many real images it has.
        preset: fields of `SamplingPreset` that differ from the model's; None as a value means the model's.
        batch_size: images computed together, 256 at most; it changes speed and memory, not the images.
        folder: where finished shards are kept, so that repeating the call goes on; None: in memory alone.
        runtime: whose processes share the work; None: this one does it alone.
        on_images: told the number of images just finished by this process, shards found complete included.

    Returns:
        None in all but the first of several processes.

    Raises:
        ConfigError: nothing to draw, or a request that the model was not trained for; before anything is computed.
        ArtifactError: the folder holds another set.
        NonFiniteError: an image is not made of finite numbers.
    """
    base, label_of = set_request(model, labels=labels, label_shares=label_shares, seed=seed, preset=preset)
    tell, together = on_images or (lambda number: None), min(batch_size, SHARD_SIZE)
    num_batches = math.ceil(num / together / (runtime.world if runtime else 1))
    compile_where_it_pays(model, base, batch_size=together, num_batches=num_batches)

    def compute(rows: range) -> Columns:
        told = [label for label in map(label_of, rows) if label is not None]
        request = base.model_copy(update={"seeds": [seed + i for i in rows], "labels": told})
        columns = drawn_columns(model, request, Given(), extractor, batch_size=together, on_images=tell)
        return columns | {"labels": torch.tensor(told or [-1] * len(rows))}

    plan = {**model_plan(model, base), "label_policy": labels, "features": extractor.hash}
    plan["label_shares"] = list(map(float, label_shares)) if labels == "data" and label_shares is not None else None
    columns = compute_in_shards(num, compute, plan=plan, folder=folder, runtime=runtime, on_images=tell)
    if not columns:
        return None
    features, seconds = columns["features"], columns["seconds"].sum(0).tolist()
    return DrawnSet(
        features=features,
        logits=logits_of(extractor, features),
        evaluations=columns["evaluations"],
        labels=columns["labels"],
        seconds=sum(seconds),
        drawing_seconds=seconds[0],
        num=num,
    )


def drawn_columns(
    model: FlowModel,
    request: Drawing,
    given: Given,
    extractor: FeatureExtractor,
    *,
    batch_size: int,
    on_images: OnImages,
    finish: Callable[[Samples, slice], tuple[Tensor, Columns]] | None = None,
) -> Columns:
    """Draw the images of a shard: their features [N, D], evaluations [N] and seconds [1, 2] (drawing, features).

    Args:
        finish: what is done to each batch before its features are taken, told which images of the request it holds;
            returns the uint8 images, and further tensors that are joined along their first dimension.

    Raises:
        NonFiniteError: latents of an image are not finite.
    """
    parts: list[Columns] = []
    began, drawing, start = time.perf_counter(), 0.0, 0
    for samples in draw(model, request, given, batch_size=batch_size):
        num, drawing = len(samples.pixels), drawing + samples.seconds
        pixels, more = finish(samples, slice(start, start + num)) if finish else (samples.pixels, {})
        parts.append({"features": extractor(pixels), "evaluations": samples.evaluations.cpu(), **more})
        start += num
        on_images(num)
    columns = join_columns(parts)
    # read from the device once a shard: a GPU never waits for features of one batch before it draws the next
    columns["features"] = require_features(columns["features"].float().cpu(), "generated")
    others = max(time.perf_counter() - began - drawing, 0.0)
    return columns | {"seconds": torch.tensor([[drawing, others]], dtype=torch.float64)}


def set_request(
    model: FlowModel,
    *,
    labels: str = "balanced",
    label_shares: Sequence[float] | None = None,
    seed: int = 0,
    preset: Mapping[str, Any] | None = None,
) -> tuple[Drawing, Callable[[int], int | None]]:
    """The request of a set's first image, and which class image i is told (None: no class); see `draw_set`.

    Raises:
        ConfigError: a request that the model was not trained for.
    """
    conditioning = model.config.conditioning
    for name in conditioning.required:
        if name != "label":
            raise ConfigError(
                f"this model requires the condition {name}: evaluate it with --task {conditioning.kinds[name].task}"
            )
    label_of = _label_rule(model, labels, label_shares, seed)
    told = [] if label_of(0) is None else [label_of(0)]
    return make_drawing(model, SampleRequest(num=1, seed=seed, classes=told, **preset or {})), label_of


def _label_rule(
    model: FlowModel, policy: str, shares: Sequence[float] | None, seed: int
) -> Callable[[int], int | None]:
    if policy not in LABEL_POLICIES:
        raise ConfigError(f"there is no label policy {policy!r}: {nearest(policy, LABEL_POLICIES)}")
    num_classes = model.config.conditioning.num_classes
    if not num_classes or policy == "none":
        return lambda i: None
    seen = model.config.seen_classes
    if policy == "balanced":  # as `sample` deals them out
        return lambda i: seen[(seed + i) % len(seen)]
    if policy == "data" and shares is None:
        raise ConfigError("labels 'data' follow labelled reference images; give those, or choose 'balanced'")
    weights = [float(label in seen) for label in range(num_classes)] if policy == "uniform" else [*map(float, shares)]
    if len(weights) != num_classes or min(weights) < 0 or not sum(weights) > 0:
        raise ConfigError(f"{len(weights)} shares of classes, the least {min(weights)}; give one per class, from 0")
    ends = list(accumulate(weights))

    def drawn(i: int) -> int:
        uniform = (derive_seed(seed, "label", i) >> 10) / 2**53  # [0, 1), exact in a float
        return bisect_right(ends, uniform * ends[-1])

    return drawn


def model_plan(model: FlowModel, request: Drawing) -> dict[str, Any]:
    """What must agree before images of a model go into one set: weights, config, first seed and way of sampling."""
    config = model.config.model_dump(mode="json", exclude={"sampling", "training"})
    return {
        "weights": sha256_tensors(model.network.state_dict()),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "request": request.model_dump(mode="json", exclude={"labels"}),
    }


def logits_of(extractor: FeatureExtractor, features: Tensor) -> Tensor | None:
    """What the Inception Score takes, from [N, D] features; None where the network has no classifier."""
    classify = getattr(extractor, "logits", None)
    return None if classify is None else torch.cat([classify(part).cpu() for part in features.split(1024)])
