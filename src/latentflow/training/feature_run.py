"""A run of `latentflow train-features`: it is decided and checked, and the feature network is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError

from latentflow.artifacts import make_folder, read_json, require_apart, require_writable, write_json
from latentflow.data.batches import TrainingImages
from latentflow.data.cache.reader import is_cache
from latentflow.data.cache.resident import stays_resident
from latentflow.data.items import ImageSource, require_every_class
from latentflow.data.prefetch import BYTES_READ_TOGETHER, Reading
from latentflow.data.sources.images import open_images
from latentflow.data.sources.readable import readable
from latentflow.data.sources.shown_images import shown_images
from latentflow.errors import ArtifactError, DataError
from latentflow.networks.feature_network import FeatureNetworkConfig
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.plans import PLAN_FILE, claim_folder, require_same_plan
from latentflow.randomness import derive_seed
from latentflow.records import Record
from latentflow.requests import RequestError
from latentflow.runtime import Runtime
from latentflow.sizes import ImageSize, Size
from latentflow.training.checkpoint import Keeping
from latentflow.training.feature_step import FeatureLearner, FeatureMethod, feature_step
from latentflow.training.first_stage import MeanTerms
from latentflow.training.first_stage_run import split
from latentflow.training.interruption import Outcome
from latentflow.training.loop import Job, MicroBatches, run_loop
from latentflow.training.memory import free_memory
from latentflow.training.optim import OptimizerConfig
from latentflow.training.request import TrainFeaturesRequest
from latentflow.training.run_folder import environment

_WHAT = "a judge"
_LEAST_IMAGES = 250
_HELD_OUT, _LEAST_HELD_OUT, _MOST_HELD_OUT = 0.1, 50, 5000
_LEAST_OF_A_CLASS = 5  # held-out images, or a third of the class
_PASSES, _MOST_PASSES, _ENOUGH_IMAGES = 30, 100, 50_000
_CPU_MULTIPLY_ADDS = 1.4e13  # forward; with the backward pass about ten minutes of two cores
_GPU_MULTIPLY_ADDS = 1e15
_OPTIMIZER = {"learning_rate": 2e-3, "weight_decay": 0.05, "schedule": "cosine", "final_learning_rate": 0.0}
_WARM_UP = 0.05  # share of the steps


class FeaturePlan(Record):
    """Everything that two calls must share for one to continue the other; plan.json."""

    format_version: int = 1
    data: str = Field(description="Fingerprint of the images.")
    image_size: ImageSize
    pixel_format: PixelFormat = RGB
    class_names: list[str] = Field(description="Of the images; empty: there are none, or only one.")
    method: FeatureMethod
    network: FeatureNetworkConfig
    steps: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class FeaturePace:
    """What the loop follows."""

    steps: int
    batch_size: int
    ema_decay: float = 0.995
    log_every: int = 50

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints: a tenth of the run, at most 500."""
        return max(min(self.steps // 10, 500), 1)

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return step % self.checkpoint_every == 0


@dataclass(frozen=True)
class PreparedFeatures:
    """A run that has been checked; nothing is written yet.

    Attributes:
        images: what is trained on.
        held_out: indices in the source of the images that the judge is measured on.
        broken: names of images that cannot be read.
        resident: whether the images are kept in the device's memory, decoded once.
        learner: with fresh weights.
        reason: why there are so many steps.
    """

    request: TrainFeaturesRequest
    plan: FeaturePlan
    runtime: Runtime
    images: TrainingImages
    held_out: list[int]
    broken: list[str]
    resident: bool
    learner: FeatureLearner
    reason: str

    def begin(self) -> None:
        """Claim the folder, and record plan and environment in it; in one process of a run."""
        folder, wanted = make_folder(self.request.out), self.plan.model_dump(mode="json")
        require_same_plan(folder, claim_folder(folder, wanted, _WHAT), wanted, _WHAT)
        write_json(Path(folder) / "environment.json", environment(self.runtime))

    def describe(self) -> dict[str, str]:
        """The run in about ten lines."""
        plan, runtime = self.plan, self.runtime
        size = plan.image_size.words
        how = f"the {len(plan.class_names)} classes" if plan.method == "labels" else "two views of each image"
        in_memory = ", in memory" if self.resident else ""
        parameters = sum(parameter.numel() for parameter in self.learner.network.parameters())
        calls = plan.network.multiply_adds / 1e6
        rows = {
            "data": f"{len(self.images):,} images of {size}{in_memory}: {self.request.data}",
            "held out": f"{len(self.held_out):,} images",
            "learns from": how,
            "network": f"levels of {', '.join(map(str, plan.network.widths))} channels for {plan.network.side} pixels, "
            f"{parameters:,} parameters, {calls:.0f} M multiply-adds",
            "training": f"{plan.steps:,} steps of {plan.batch_size} images ({self.reason})",
            "device": f"{runtime.device_name}, {runtime.precision}"
            + (f", {runtime.world} processes" if runtime.world > 1 else ""),
            "judge": str(self.request.out),
        }
        return {**rows, "left out": f"{len(self.broken)} images that cannot be read"} if self.broken else rows


def prepare_features(request: TrainFeaturesRequest, runtime: Runtime) -> PreparedFeatures:
    """Decide what a request leaves open, and check all of it; nothing is written.

    Raises:
        ArtifactError, ConfigError, DataError: the first thing that is wrong.
    """
    require_writable(request.out)
    require_apart(request.out, request.data)
    if request.batch_size % runtime.world:
        raise RequestError(
            "batch_size", f" {request.batch_size} cannot be shared by {runtime.world} processes; use a multiple of it"
        )
    if is_cache(request.data):
        raise DataError(f"{request.data} is a latent cache; give the images it was made from")
    known = _plan_in(Path(request.out))
    chosen = {"table": request.table, "pixels": request, "known": known and known.pixel_format}
    source = open_images(request.data, request.image_size, **chosen)
    usable, broken = readable(source)
    if len(usable) < _LEAST_IMAGES:
        raise DataError(
            f"{source.description}: {len(usable)} readable images are too few to train features on; give at least "
            f"{_LEAST_IMAGES}, or choose --features random when you evaluate"
        )
    share = max(_HELD_OUT, _LEAST_HELD_OUT / len(usable))
    kept, held_out = split(usable, share, request.seed, _MOST_HELD_OUT)
    class_names = list(source.class_names) if len(source.class_names) > 1 else []
    if class_names:
        kept, held_out = _with_every_class(source, kept, held_out)
    _require_twice(source, class_names, kept)
    plan, reason = _decided(request, source, class_names, len(kept), runtime)
    if runtime.is_main:
        _require_same(Path(request.out), plan)
    torch.manual_seed(derive_seed(request.seed, "weights"))
    learner = FeatureLearner(plan.network, len(class_names) if plan.method == "labels" else 0)
    images = TrainingImages(shown_images(source), seed=request.seed, flip=True, kept=kept)
    names = [error.name for error in broken]
    resident = _stays_resident(plan, images, runtime)
    return PreparedFeatures(request, plan, runtime, images, held_out, names, resident, learner, reason)


def train_feature_network(prepared: PreparedFeatures) -> Outcome:
    """Train until the last step, or until SIGTERM or Ctrl-C; see `run_loop`. The learner then has its average weights.

    Raises:
        NonFiniteError: a gradient was not finite; the checkpoints are from before that step.
    """
    plan, runtime, request = prepared.plan, prepared.runtime, prepared.request
    learner = prepared.learner.to(runtime.device, memory_format=torch.channels_last)
    if prepared.resident:
        pin, sharing = runtime.device.type == "cuda", runtime.local_world
        prepared.images.hold(runtime.device, Reading(request.num_workers, BYTES_READ_TOGETHER, pin, sharing=sharing))
    how: dict[str, Any] = {"prepare": learner.network.prepare, "method": plan.method, "seed": plan.seed}
    job = Job(
        network=learner,
        compare=partial(feature_step, runtime=runtime, **how),
        meter=partial(MeanTerms, ("loss", "accuracy")),
        images=prepared.images,
        run=Path(request.out),
        runtime=runtime,
        config=FeaturePace(plan.steps, plan.batch_size),
        optimizer=OptimizerConfig(warmup_steps=round(_WARM_UP * plan.steps), **_OPTIMIZER),
        parts=MicroBatches(plan.batch_size // runtime.world, 1),
        num_workers=request.num_workers,
        keeping=Keeping(newest=2),
        captures=runtime.device.type == "cuda" and runtime.world == 1,
    )
    outcome, average = run_loop(job)
    learner.load_state_dict(average)
    return outcome


def _stays_resident(plan: FeaturePlan, images: TrainingImages, runtime: Runtime) -> bool:
    """Whether to keep the images in the device's memory: where they are read more than once, and fit."""
    device, num_bytes = runtime.device, len(images) * images.bytes_per_image
    sharing = 1 if device.type == "cuda" else runtime.local_world
    often = plan.steps * plan.batch_size > len(images)
    return often and stays_resident("auto", num_bytes, device, free_memory(device), sharing)


def network_for(
    image_size: Size | int, *, gpu: bool, side: int | None = None, width: int | None = None
) -> FeatureNetworkConfig:
    """The sizes of a network for images of a size: levels down to four pixels, as far as they are not given."""
    side = side or min(max(min(Size.of(image_size)) // 2, 32), 128 if gpu else 64)
    width = width or (64 if gpu or side <= 32 else 32)
    widths, left = [width], side // 2
    while left > 4 and len(widths) < 6:
        left //= 2
        widths.append(min(2 * widths[-1], 4 * width))
    return FeatureNetworkConfig(side=side, widths=tuple(widths))


def steps_for(num_images: int, batch_size: int, network: FeatureNetworkConfig, *, gpu: bool) -> tuple[int, str]:
    """How long to train, and the reason: 30 passes, up to 100 over few images, as far as the machine allows."""
    wanted = max(_PASSES * num_images, min(_MOST_PASSES * num_images, _ENOUGH_IMAGES))
    affordable = (_GPU_MULTIPLY_ADDS if gpu else _CPU_MULTIPLY_ADDS) / network.multiply_adds
    seen = min(wanted, affordable)
    steps = max(round(seen / batch_size), 1)
    passes = f"{steps * batch_size / num_images:.2g} passes over the data"
    limit = (
        "" if seen == wanted else ", all that a few minutes allow" if gpu else ", about ten minutes of two CPU cores"
    )
    return steps, passes + limit


def _decided(
    request: TrainFeaturesRequest, source: ImageSource, class_names: list[str], num_images: int, runtime: Runtime
) -> tuple[FeaturePlan, str]:
    """The plan, and why there are so many steps; what is left open is that of the folder, if it holds a plan."""
    gpu, found = runtime.device.type != "cpu", _plan_in(Path(request.out))
    network = found.network if found else network_for(request.image_size, gpu=gpu)
    if request.side is not None or request.width is not None:
        network = network_for(request.image_size, gpu=gpu, side=request.side, width=request.width)
    if found and request.steps is None:
        steps, reason = found.steps, "as it began"
    elif request.steps is not None:
        steps, reason = request.steps, f"{request.steps * request.batch_size / num_images:.2g} passes over the data"
    else:
        steps, reason = steps_for(num_images, request.batch_size, network, gpu=gpu)
    plan = FeaturePlan(
        data=source.fingerprint(),
        image_size=request.image_size,
        pixel_format=source.pixel_format,
        class_names=class_names,
        method="labels" if class_names and not request.without_labels else "contrastive",
        network=network,
        steps=steps,
        batch_size=request.batch_size,
        seed=request.seed,
    )
    return plan, reason


def _plan_in(folder: Path) -> FeaturePlan | None:
    """The plan that a folder was begun with; None: there is none.

    Raises:
        ArtifactError: there is one of something else.
    """
    file = folder / PLAN_FILE
    if not file.is_file():
        return None
    try:
        return FeaturePlan.model_validate(read_json(file))
    except ValidationError as error:
        raise ArtifactError(f"{file} is not that of a judge, or damaged; choose another --out") from error


def _require_same(folder: Path, plan: FeaturePlan) -> None:
    """Refuse a folder that was begun with another plan, before anything is written."""
    if found := _plan_in(folder):
        require_same_plan(folder, found.model_dump(mode="json"), plan.model_dump(mode="json"), _WHAT)


def _with_every_class(source: ImageSource, kept: Sequence[int], held_out: Sequence[int]) -> tuple[list[int], list[int]]:
    """The same split with a few more held-out images of rare classes, without which nothing could be said of them."""
    there = Counter(source.label(row) for row in held_out)
    moved: set[int] = set()
    for label, rows in _rows_by_class(source, kept).items():
        wanted = min(_LEAST_OF_A_CLASS, (len(rows) + there[label]) // 3)
        if (more := wanted - there[label]) > 0:
            moved.update(rows[:: len(rows) // more][:more])
    return [row for row in kept if row not in moved], sorted([*held_out, *moved])


def _rows_by_class(source: ImageSource, rows: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(source.label(row), []).append(row)
    return found


def _require_twice(source: ImageSource, class_names: Sequence[str], kept: Sequence[int]) -> None:
    """Refuse classes of which fewer than two images are trained on: a spread needs two."""
    if not class_names:
        return
    counts = torch.bincount(torch.tensor([source.label(index) for index in kept]), minlength=len(class_names))
    often = [label for label, count in enumerate(counts.tolist()) if count > 1]
    require_every_class(class_names, often, source.description, "give at least a few images of each, or remove them")
