"""A model => a set of images as rows of features, in shards that a kill does not take away.

Shard k holds the images 256 k to 256 k + 255. Image i has its seed and its label from i alone, so the set is the same
on any number of processes, in any batch size, and after any number of interruptions. No image touches the disk.

Legend: N images, D features of an image, K classes of the feature network.
"""

from __future__ import annotations

import hashlib
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentflow.artifacts import (
    checked_tensors,
    contents,
    make_folder,
    open_tensors,
    read_json,
    sha256_tensors,
    write_json,
    write_tensors,
)
from latentflow.errors import ArtifactError, ConfigError, NonFiniteError, nearest
from latentflow.latent_flow import LatentFlow
from latentflow.locks import holder, only_writer
from latentflow.metrics.features import FeatureExtractor
from latentflow.metrics.statistics import require_features
from latentflow.randomness import derive_seed
from latentflow.runtime import Runtime
from latentflow.sampling.pipeline import Given, draw
from latentflow.sampling.request import SampleRequest, make_request
from latentflow.sampling.samples import Samples

LABEL_POLICIES = ("balanced", "uniform", "data", "none")
SHARD_SIZE = 256  # images; the most that a kill loses
_PLAN = "plan.json"
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 40  # for another process that is not there, or not yet
_PATIENCE_WITHOUT_LOCKS_SECONDS = 3600  # where nobody can see whether it is

OnImages = Callable[[int], None]


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
    model: LatentFlow,
    extractor: FeatureExtractor,
    *,
    num: int,
    seed: int = 0,
    labels: str = "balanced",
    label_shares: Sequence[float] | None = None,
    preset: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    folder: str | Path | None = None,
    process: tuple[int, int] = (0, 1),
    on_images: OnImages | None = None,
) -> DrawnSet:
    """Draw images and keep their features.

    Args:
        num: N; image i has seed `seed + i`.
        labels: which class image i is told. balanced: that of its seed, as in `sample`; uniform: any, drawn for
            each image; data: likewise, by `label_shares`; none: no class, as for a model without classes.
        label_shares: of "data": a number for each class, for example how many real images it has.
        preset: fields of `SamplingPreset` that differ from the model's; None as a value means the model's.
        batch_size: images computed together, 256 at most; it changes speed and memory, not the images.
        folder: where finished shards are kept, so that repeating the call goes on; None: in memory alone.
        process: (rank, number of processes). Process r computes shards r, r + n, ..., and waits for the others.
        on_images: told the number of images just finished by this process, shards found complete included.

    Raises:
        ConfigError: nothing to draw, or a request that the model was not trained for; before anything is computed.
        ArtifactError: the folder holds another set.
        NonFiniteError: an image is not made of finite numbers.
    """
    base, label_of = set_request(model, labels=labels, label_shares=label_shares, seed=seed, preset=preset)
    tell = on_images or (lambda number: None)

    def compute(rows: range) -> dict[str, Tensor]:
        told = [label for label in map(label_of, rows) if label is not None]
        request = base.model_copy(update={"seeds": [seed + i for i in rows], "labels": told})
        columns = drawn_columns(model, request, Given(), extractor, batch_size=batch_size, on_images=tell)
        return columns | {"labels": torch.tensor(told or [-1] * len(rows))}

    plan = {**model_plan(model, base), "label_policy": labels, "features": extractor.hash}
    plan["label_shares"] = list(map(float, label_shares)) if labels == "data" and label_shares is not None else None
    columns = compute_in_shards(num, compute, plan=plan, folder=folder, process=process, on_images=tell)
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
    model: LatentFlow,
    request: SampleRequest,
    given: Given,
    extractor: FeatureExtractor,
    *,
    batch_size: int,
    on_images: OnImages,
    finish: Callable[[Samples, slice], tuple[Tensor, dict[str, Tensor]]] | None = None,
) -> dict[str, Tensor]:
    """Draw the images of a shard: their features [N, D], evaluations [N] and seconds [1, 2] (drawing, features).

    Args:
        finish: what is done to each batch before its features are taken, told which images of the request it holds;
            returns the uint8 images, and further tensors that are joined along their first dimension.

    Raises:
        NonFiniteError: latents of an image are not finite.
    """
    parts: list[dict[str, Tensor]] = []
    seconds = torch.zeros(1, 2, dtype=torch.float64)
    start = 0
    for samples in draw(model, request, given, batch_size=batch_size):
        wrong = ~torch.isfinite(samples.latents).flatten(1).all(1)
        if wrong.any():
            seed = samples.request.seeds[int(wrong.nonzero()[0])]
            raise NonFiniteError(f"the latents of seed {seed} are NaN or infinite; take more steps or less guidance")
        began, num = time.perf_counter(), len(samples.pixels)
        pixels, more = finish(samples, slice(start, start + num)) if finish else (samples.pixels, {})
        features = require_features(extractor(pixels).float().cpu(), "generated")
        parts.append({"features": features, "evaluations": samples.evaluations.cpu(), **more})
        seconds += torch.tensor([samples.seconds, time.perf_counter() - began])
        start += num
        on_images(num)
    return join_columns(parts) | {"seconds": seconds}


def set_request(
    model: LatentFlow,
    *,
    labels: str = "balanced",
    label_shares: Sequence[float] | None = None,
    seed: int = 0,
    preset: Mapping[str, Any] | None = None,
) -> tuple[SampleRequest, Callable[[int], int | None]]:
    """The request of a set's first image, and which class image i is told (None: no class); see `draw_set`.

    Raises:
        ConfigError: a request that the model was not trained for.
    """
    for name, task in (("inpainting", "inpaint"), ("semantic_map", "mask-to-image")):
        if model.config.conditioning.dropout.get(name) == 0:
            raise ConfigError(f"the model never learned to do without the condition {name}: evaluate it --task {task}")
    label_of = _label_rule(model, labels, label_shares, seed)
    told = [] if label_of(0) is None else [label_of(0)]
    return make_request(model, num=1, seed=seed, classes=told, **(preset or {})), label_of


def _label_rule(
    model: LatentFlow, policy: str, shares: Sequence[float] | None, seed: int
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


def model_plan(model: LatentFlow, request: SampleRequest) -> dict[str, Any]:
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


def compute_in_shards(
    num: int,
    compute: Callable[[range], dict[str, Tensor]],
    *,
    plan: Mapping[str, Any],
    folder: str | Path | None = None,
    process: tuple[int, int] = (0, 1),
    on_images: OnImages = lambda num_images: None,
) -> dict[str, Tensor]:
    """Compute something of images 0 ... num - 1, shard by shard, leaving out the shards that `folder` has already.

    Args:
        compute: the tensors of a range of images, to be joined along their first dimension.
        plan: what makes two sets the same, as JSON; `num` need not be in it, since a larger set only has more shards.
        on_images: told of shards found complete; of others `compute` tells.

    Raises:
        ConfigError: several processes without a folder.
        ArtifactError: the folder holds a set of another plan, or another process never delivered its shards.
    """
    shards = [range(start, min(start + SHARD_SIZE, num)) for start in range(0, num, SHARD_SIZE)]
    rank, num_processes = process
    if folder is None:
        if num_processes > 1:
            raise ConfigError(f"{num_processes} processes share their work through files: give --out")
        return join_columns([compute(rows) for rows in shards])
    folder = make_folder(folder)
    with only_writer(folder, Runtime(torch.device("cpu"), rank, num_processes)):
        _claim(folder, json.loads(json.dumps({**plan, "shard_size": SHARD_SIZE})))
        for rows in shards[rank::num_processes]:
            if _read_shard(folder, rows) is None:
                tensors = compute(rows)
                if not folder.is_dir():  # writing would make it anew, without what it held
                    raise _removed(_shard(folder, rows))
                write_tensors(_shard(folder, rows), tensors, {"rows": f"{rows.start} {rows.stop}"})
            else:
                on_images(len(rows))
        return join_columns([_awaited(folder, rows, process) for rows in shards])


def _removed(shard: Path) -> ArtifactError:
    return ArtifactError(f"{shard} was removed while it was needed; repeat the command to go on")


def join_columns(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several sets of images as those of one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan into an empty folder, or make sure that the plan found there is the same."""
    file = folder / _PLAN
    # Listed before looking for the plan: what another process writes in between must not seem strange.
    strangers = contents(folder)
    if not file.exists():
        if strangers:
            raise ArtifactError(
                f"{folder} is not empty ({strangers[0].name}, ...) and holds no features; choose another place"
            )
        write_json(file, plan)
        return
    found = read_json(file)
    if not isinstance(found, dict):
        raise ArtifactError(f"{file} is damaged; delete {folder} or choose another place")
    if differing := sorted(key for key in plan.keys() | found.keys() if plan.get(key) != found.get(key)):
        raise ArtifactError(
            f"{folder} was begun with other images or features (another {', '.join(differing)}); "
            "choose another --out or delete the folder"
        )


def _shard(folder: Path, rows: range) -> Path:
    return folder / f"shard-{rows.start // SHARD_SIZE:05d}.safetensors"


def _read_shard(folder: Path, rows: range) -> dict[str, Tensor] | None:
    """The tensors of a shard; None where it is missing, damaged or of fewer images than it should be."""
    try:
        with open_tensors(_shard(folder, rows)) as file:
            if (file.metadata() or {}).get("rows") != f"{rows.start} {rows.stop}":
                return None
            return checked_tensors(file, _shard(folder, rows))
    except ArtifactError:
        return None


def _awaited(folder: Path, rows: range, process: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of a shard, once the process that computes it has written it.

    Raises:
        ArtifactError: they will not come: that process is dead, or files are being removed.
    """
    rank, num_processes = process
    owner = rows.start // SHARD_SIZE % num_processes
    seen = time.monotonic()
    while (tensors := _read_shard(folder, rows)) is None:
        if owner == rank or not folder.is_dir():
            raise _removed(_shard(folder, rows))
        if holder(folder, owner):
            seen = time.monotonic()
        patience = _PATIENCE_SECONDS if holder(folder, rank) else _PATIENCE_WITHOUT_LOCKS_SECONDS
        if time.monotonic() - seen > patience:
            raise ArtifactError(
                f"{_shard(folder, rows)} does not come: process {owner} of {num_processes} has ended or never began; "
                "repeat the command to go on"
            )
        time.sleep(_POLL_SECONDS)
    return tensors
