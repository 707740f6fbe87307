"""A set of images that a model draws, as rows of features.

Seed and label of image i depend on i only, so the set is the same on any number of processes, in any batch size, and
after any number of interruptions. No image is written to disk.

Legend: N images, D features of an image, K classes of the feature network.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from latentflow.errors import ConfigError, nearest
from latentflow.evaluation.request import LABEL_POLICIES
from latentflow.evaluation.shards import SHARD_SIZE, Columns, Work, compute_in_shards, join_columns
from latentflow.metrics.features.extractors import FeatureExtractor
from latentflow.metrics.statistics import require_features
from latentflow.model.conditioning import ConditionName
from latentflow.model.flow_model import FlowModel
from latentflow.randomness import derive_seed
from latentflow.sampling.captured_calls import Calls, calls_for
from latentflow.sampling.cost import compile_where_it_pays
from latentflow.sampling.drawing import Drawing, make_drawing
from latentflow.sampling.pipeline import Given, draw
from latentflow.sampling.request import SampleRequest
from latentflow.sampling.row_conditions import RowConditions
from latentflow.sampling.samples import Samples
from latentflow.sizes import Size


@dataclass(frozen=True)
class ImageSet:
    """Images that a model is to draw: image i has seed i of the set, and a label that follows from i.

    Attributes:
        drawing: of the first image; image i has its seed plus i.
        policy: how labels are chosen, one of `LABEL_POLICIES`; "none" if the images are unconditional.
        shares: of the policy "data": a number for each class.
        rows: of the policy "rows": the conditions of real images.
    """

    model: FlowModel
    drawing: Drawing
    policy: str
    shares: tuple[float, ...] | None = None
    rows: RowConditions | None = None

    @property
    def label_of(self) -> Callable[[int], int | None]:
        """The label of image i; None: unconditional."""
        return _label_rule(self.model, self.policy, self.shares, self.drawing.seeds[0])

    def with_shares(self, shares: Sequence[float]) -> ImageSet:
        """The set with the true frequencies of its classes."""
        return replace(self, shares=tuple(map(float, shares)))

    def with_rows(self, rows: RowConditions) -> ImageSet:
        """The set with the conditions of real images."""
        return replace(self, rows=rows, drawing=self.drawing.model_copy(update={"told": rows.told}))

    def _conditions(self, images: range) -> tuple[list[int], Given]:
        """The labels of some images, or none, and their named conditions."""
        if self.rows is None:
            return [label for label in map(self.label_of, images) if label is not None], Given()
        return self.rows.of(images)

    def draw(self, extractor: FeatureExtractor, num: int, work: Work) -> Columns:
        """Draw the first `num` images and keep their features.

        Returns:
            The columns of `drawn_columns`, and labels [N] int64, -1 for unconditional images; on the CPU. Nothing in
            all but the first of several processes.

        Raises:
            ArtifactError: the folder holds another set.
            NonFiniteError: an image is not made of finite numbers.
        """
        seed = self.drawing.seeds[0]
        work = replace(work, batch_size=min(work.batch_size, SHARD_SIZE))
        num_batches = math.ceil(num / work.batch_size / work.runtime.world)
        compile_where_it_pays(self.model, self.drawing, batch_size=work.batch_size, num_batches=num_batches)
        calls = calls_for(self.model.device, self.drawing)

        def compute(rows: range) -> Columns:
            labels, given = self._conditions(rows)
            drawing = self.drawing.model_copy(update={"seeds": [seed + i for i in rows], "labels": labels})
            columns = drawn_columns(self.model, drawing, given, extractor, work, calls)
            return columns | {"labels": torch.tensor(labels or [-1] * len(rows))}

        plan = {**model_plan(self.model, self.drawing), "label_policy": self.policy, "features": extractor.hash}
        plan["label_shares"] = None if self.shares is None else list(self.shares)
        if self.rows is not None:
            plan["rows"] = self.rows.digest
        return compute_in_shards(num, compute, plan=plan, work=work)


def plan_set(
    model: FlowModel,
    *,
    seed: int = 0,
    labels: str = "balanced",
    label_shares: Sequence[float] | None = None,
    preset: Mapping[str, Any] | None = None,
    image_size: Size | None = None,
    named: Sequence[ConditionName] | None = None,
) -> ImageSet:
    """A set of images of a model, checked before anything is computed.

    Args:
        seed: of image 0.
        labels: how the label of image i is chosen. balanced: cycled over the seeds, as in `sample`; uniform: drawn for
            each image; data: drawn with the frequencies `label_shares`; rows: that of a real image, together with its
            named conditions, which `ImageSet.with_rows` gives; none: unconditional, as is every image of a model
            without classes.
        label_shares: of "data": a number for each class, for example how many real images it has.
        preset: fields of `SamplingPreset` that differ from the model's.
        image_size: of the images, one that the model was trained on; None: its usual one.
        named: the columns that "rows" give; None: all of the model.

    Raises:
        ConfigError: a request that the model was not trained for.
    """
    conditioning = model.config.conditioning
    for name in conditioning.required:
        if any(name == one.name for one in conditioning.columns):
            if labels != "rows":
                raise ConfigError(
                    f"this model requires the condition {name}, which only labels 'rows' give: those of real images"
                )
        elif name != "label":
            raise ConfigError(
                f"this model requires the condition {name}: evaluate it with --task {conditioning.kinds[name].task}"
            )
    first = _label_rule(model, labels, label_shares, seed)(0)
    policy = "none" if first is None and labels != "rows" else labels
    classes = [] if first is None else [first]
    columns = [one.name for one in conditioning.columns] if named is None else named
    conditions = columns if labels == "rows" else []
    request = SampleRequest(num=1, seed=seed, classes=classes, image_size=image_size, **preset or {})
    drawing = make_drawing(model, request, conditions=conditions)
    shares = tuple(map(float, label_shares)) if policy == "data" else None
    return ImageSet(model, drawing, policy, shares)


def drawn_columns(
    model: FlowModel,
    drawing: Drawing,
    given: Given,
    extractor: FeatureExtractor,
    work: Work,
    calls: Calls,
    finish: Callable[[Samples, slice], tuple[Tensor, Columns]] | None = None,
) -> Columns:
    """Draw the images of a shard.

    Returns:
        features [N, D] float32; evaluations [N], network calls of each image (NFE) as in `Samples.evaluations`;
        seconds [1, 2] float64, of solver and decoder, and of the features.

    Args:
        calls: how the network is called, in all shards.
        finish: applied to each batch before its features are computed, with the places of its images in `drawing`;
            returns the uint8 images, and further tensors that are joined along their first dimension.

    Raises:
        NonFiniteError: latents of an image are not finite.
    """
    parts: list[Columns] = []
    began, seconds, start = time.perf_counter(), 0.0, 0
    for samples in draw(model, drawing, given, batch_size=work.batch_size, calls=calls):
        num, seconds = len(samples.pixels), seconds + samples.seconds
        pixels, more = finish(samples, slice(start, start + num)) if finish else (samples.pixels, {})
        parts.append({"features": extractor(pixels), "evaluations": samples.evaluations.cpu(), **more})
        start += num
        work.on_images(num)
    columns = join_columns(parts)
    # read from the device once per shard: a GPU never waits for the features of one batch before it draws the next
    columns["features"] = require_features(columns["features"].float().cpu(), "generated")
    others = max(time.perf_counter() - began - seconds, 0.0)
    return columns | {"seconds": torch.tensor([[seconds, others]], dtype=torch.float64)}


def _label_rule(
    model: FlowModel, policy: str, shares: Sequence[float] | None, seed: int
) -> Callable[[int], int | None]:
    if policy not in LABEL_POLICIES:
        raise ConfigError(f"unknown label policy {policy!r}; {nearest(policy, LABEL_POLICIES)}")
    num_classes = model.config.conditioning.num_classes
    if not num_classes or policy == "none":
        return lambda i: None
    seen = model.config.seen_classes
    if policy in ("balanced", "rows"):  # as in `sample`
        return lambda i: seen[(seed + i) % len(seen)]
    if policy == "data" and shares is None:
        raise ConfigError("labels 'data' need labelled reference images; give those, or choose 'balanced'")
    weights = [float(label in seen) for label in range(num_classes)] if policy == "uniform" else [*map(float, shares)]
    if len(weights) != num_classes or min(weights) < 0 or not sum(weights) > 0:
        raise ConfigError(
            f"{len(weights)} shares of classes, the smallest {min(weights)}; give one per class, each at least 0"
        )
    ends = list(accumulate(weights))

    def drawn(i: int) -> int:
        uniform = (derive_seed(seed, "label", i) >> 10) / 2**53  # [0, 1), exact in a float
        return bisect_right(ends, uniform * ends[-1])

    return drawn


def model_plan(model: FlowModel, drawing: Drawing) -> dict[str, Any]:
    """What all images of one set share: weights, config, first seed and sampling preset."""
    config = model.config.model_dump(mode="json", exclude={"sampling", "training"})
    return {
        "weights": model.weights_hash,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "request": drawing.model_dump(mode="json", exclude={"labels"}),
    }


def logits_of(extractor: FeatureExtractor, features: Tensor) -> Tensor | None:
    """Logits [N, K] for the Inception Score, from [N, D] features; None if the network has no classifier."""
    classify = getattr(extractor, "logits", None)
    return None if classify is None else torch.cat([classify(part).cpu() for part in features.split(1024)])
