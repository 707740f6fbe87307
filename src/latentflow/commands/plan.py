"""`latentflow plan`: what a training run will take, before it is begun, and what would make it fit.

Three kinds of numbers stand side by side, and each is called what it is: exact ones (parameters, weights, gradients,
averages, the optimizer's moments, checkpoints), estimates (what is kept for the backward pass, what a preview takes),
and what was measured here (time, from a few real steps).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentflow.data.cache.resident import stays_resident
from latentflow.flow.solvers import expected_evaluations, is_adaptive
from latentflow.model.config import AUTOENCODER_FOLDER
from latentflow.model.flow_model import FlowModel
from latentflow.networks.dit import NAMES, SIZES, DiTConfig
from latentflow.networks.running import MEMORY_MODES
from latentflow.planning.probe import SLOWER, Speed, probe, stated_speed
from latentflow.planning.subject import Subject, plan_subject
from latentflow.progress import duration
from latentflow.runtime import Runtime
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.preview import preview_request
from latentflow.training.compiling import compiles
from latentflow.training.config import Recipe
from latentflow.training.fitting import with_values
from latentflow.training.loop import micro_batches
from latentflow.training.memory import bytes_per_image, fitting_mode, micro_batch_that_fits, total_memory

EXACT, ESTIMATE, MEASURED, ASSUMED = "exact", "estimate", "measured here", "assumed"

_PROBE_SECONDS = 3.0
_PNG_BYTES = 2  # of a pixel of a preview, about
_DECODED = 12  # maps of the decoder's last width that are alive at once, float32, about
_DECODED_TOGETHER = 16


@dataclass(frozen=True)
class Machine:
    """What is planned for.

    Attributes:
        name: what it is called.
        memory: bytes that a process can use; None where nobody knows.
        precision: that networks compute in.
        gpu: whether it is one.
        num_processes: that share a batch.
        here: whether it is the one that this runs on.
    """

    name: str
    memory: int | None
    precision: str
    gpu: bool
    num_processes: int
    here: bool

    @property
    def half(self) -> bool:
        return self.precision in ("bf16", "fp16")


@dataclass(frozen=True)
class Memory:
    """Bytes that one process of the run takes.

    Attributes:
        exact: weights, gradients, average and optimizer, by name.
        estimated: what else is always there, by name.
        kept_per_image: for the backward pass, by mode of `training.memory`.
        preview: while a preview is decoded, when nothing is kept for a backward pass.
        mode: of `training.memory` that the run uses.
        micro_batch_size: images in one forward pass.
        share: images of one process in one step.
    """

    exact: Mapping[str, int]
    estimated: Mapping[str, int]
    kept_per_image: Mapping[str, int]
    preview: int
    mode: str
    micro_batch_size: int
    share: int

    @property
    def fixed(self) -> int:
        """What is there whatever the batch."""
        return sum(self.exact.values()) + sum(self.estimated.values())

    def kept(self, mode: str) -> int:
        """For the backward pass of a micro-batch."""
        return self.kept_per_image[mode] * self.micro_batch_size

    @property
    def peak(self) -> int:
        """The most at any time, about."""
        return self.fixed + max(self.kept(self.mode), self.preview)

    def largest_micro_batch(self, mode: str, memory: int | None) -> int:
        """The largest part of a process's images that fits in training; 0: not even one image."""
        return micro_batch_that_fits(self.fixed, self.kept_per_image[mode], self.share, memory)

    def previews_fit(self, memory: int | None) -> bool:
        """Whether a preview can be decoded beside all that stays."""
        return micro_batch_that_fits(self.fixed, self.preview, 1, memory) == 1

    def fits(self, memory: int | None) -> bool:
        """Whether the run as it is set fits."""
        return self.largest_micro_batch(self.mode, memory) >= self.micro_batch_size and self.previews_fit(memory)


@dataclass(frozen=True)
class Disk:
    """Bytes on disk, without the headers of files (a few hundred bytes for each tensor).

    Attributes:
        checkpoint: one of them: weights, average, optimizer.
        num_checkpoints: that are there at once, milestones and one that is being written included.
        num_milestones: of them hold a model of their own.
        model: the folder that is sampled from.
        cache: the latent cache; None where the number of images is not known, or images are trained from.
        cache_is_here: whether it is there already.
        previews: all of them.
        free: where the run would be written.
    """

    checkpoint: int
    num_checkpoints: int
    num_milestones: int
    model: int
    cache: int | None
    cache_is_here: bool
    previews: int
    free: int

    @property
    def run(self) -> int:
        """Of the run folder."""
        return self.checkpoint * self.num_checkpoints + self.model * (1 + self.num_milestones) + self.previews


@dataclass(frozen=True)
class Plan:
    """What a run will take."""

    name: str
    subject: Subject
    machine: Machine
    num_parameters: int
    memory: Memory
    disk: Disk
    speed: Speed

    @property
    def recipe(self) -> Recipe:
        return self.subject.recipe

    @property
    def seconds_per_step(self) -> float:
        return self.memory.share * self.speed.seconds_per_image + self.speed.seconds_per_update

    @property
    def num_previews(self) -> int:
        every = self.recipe.training.preview_every
        return -(-self.recipe.training.steps // every) if every else 0

    @cached_property
    def preview_seconds(self) -> float:
        """Of one preview, shared by the processes, without decoding."""
        request = _preview_of(self.subject)
        preset, num_images = request.sampling, -(-len(request.seeds) // self.machine.num_processes)
        tolerance = preset.rtol if is_adaptive(preset.solver) else 1.0
        calls = expected_evaluations(preset.solver, preset.steps, tolerance) * (1 if preset.guidance == 1 else 2)
        return calls * num_images * self.speed.seconds_per_image / (3 * SLOWER[self.memory.mode])

    @property
    def seconds(self) -> float:
        """Of the run, saving left out."""
        return self.recipe.training.steps * self.seconds_per_step + self.num_previews * self.preview_seconds

    @property
    def advice(self) -> list[str]:
        """What would make it fit, or faster; empty where nothing need be said."""
        return [*_memory_advice(self), *_disk_advice(self)]

    def sections(self) -> dict[str, list[tuple[str, str, str]]]:
        """Tables to print: rows of a name, a value, and how it is known."""
        return {"": _run_rows(self), **_memory_rows(self), "time": _time_rows(self), "disk": _disk_rows(self)}

    def record(self) -> dict[str, Any]:
        """All numbers, for a script; bytes and seconds."""
        memory, disk, machine = self.memory, self.disk, self.machine
        fitting = {mode: memory.largest_micro_batch(mode, machine.memory) for mode in MEMORY_MODES}
        return {
            "recipe": self.name,
            "assumed": self.subject.assumed,
            "network": self.subject.config.network.title,
            "parameters": self.num_parameters,
            "latents": list(self.subject.config.latent_shape),
            "images": self.subject.data.num_images,
            "steps": self.recipe.training.steps,
            "batch_size": self.recipe.training.batch_size,
            "machine": {
                "name": machine.name,
                "memory": machine.memory,
                "precision": machine.precision,
                "processes": machine.num_processes,
            },
            "memory": {
                "exact": dict(memory.exact),
                "estimated": dict(memory.estimated),
                "kept_for_backward": {mode: memory.kept(mode) for mode in MEMORY_MODES},
                "preview": memory.preview,
                "mode": memory.mode,
                "micro_batch_size": memory.micro_batch_size,
                "peak": memory.peak,
                "fits": memory.fits(machine.memory),
                "largest_micro_batch": fitting,
            },
            "time": {
                "forward_flops_per_image": self.speed.forward_flops,
                "probed": self.speed.probed,
                "flops_per_second": self.speed.flops_per_second,
                "seconds_per_step": self.seconds_per_step,
                "images_per_second": self.recipe.training.batch_size / self.seconds_per_step,
                "seconds_per_preview": self.preview_seconds,
                "seconds": self.seconds,
            },
            "disk": {
                "checkpoint": disk.checkpoint,
                "checkpoints": disk.num_checkpoints,
                "model": disk.model,
                "cache": disk.cache,
                "previews": disk.previews,
                "run": disk.run,
                "free": disk.free,
            },
            "advice": self.advice,
        }


def plan(
    recipe: Recipe,
    name: str,
    runtime: Runtime,
    *,
    device_memory: float | None = None,
    device_tflops: float | None = None,
    num_processes: int | None = None,
    num_images: int | None = None,
    num_classes: int | None = None,
    latents: Sequence[int] | None = None,
) -> Plan:
    """What training a recipe will take. Nothing is written, and nothing fetched.

    Args:
        name: of the recipe.
        runtime: where the speed is measured.
        device_memory: GiB of each GPU of another machine; None: this one is planned for.
        device_tflops: its speed in matrix products as its maker states it, 10^12 operations a second, in place of
            steps that are probed here.
        num_processes: that share a batch; None: those of `runtime`.
        num_images, num_classes, latents: in place of what is assumed; see `plan_subject`.

    Raises:
        ConfigError, DataError, ArtifactError: see `plan_subject`; also where the batch cannot be shared out evenly.
    """
    processes, elsewhere = num_processes or runtime.world, device_memory is not None
    runtime = runtime.with_precision("auto" if elsewhere else recipe.training.precision)
    machine = _machine(recipe, runtime, device_memory, processes)
    subject = plan_subject(
        recipe,
        name,
        gpu=machine.gpu,
        memory=machine.memory,
        num_processes=processes,
        num_images=num_images,
        num_classes=num_classes,
        latents=latents,
    )
    parts = micro_batches(subject.recipe.training, replace(runtime, world=processes))
    with torch.device("meta"):
        network = subject.config.build_network()
    memory = _memory(subject, network, machine, parts.size * parts.number, parts.size)
    if device_tflops is None:
        here = memory if machine.here else _memory(subject, network, _machine(recipe, runtime, None, 1), parts.size, 1)
        images = min(parts.size, max(here.largest_micro_batch(here.mode, total_memory(runtime.device)), 1))
        training = subject.recipe.training
        compiled = runtime.device.type == "cuda" and compiles(
            training.compile, subject.config, training.steps * training.batch_size, runtime
        )
        speed = probe(subject.config, runtime, images=images, seconds=_PROBE_SECONDS, mode=here.mode, compiled=compiled)
    else:
        speed = stated_speed(subject.config, 1e12 * device_tflops, memory.mode)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return Plan(name, subject, machine, num_parameters, memory, _disk(subject, network), speed)


def _machine(recipe: Recipe, runtime: Runtime, device_memory: float | None, processes: int) -> Machine:
    word = recipe.training.precision
    if device_memory is not None:
        precision = "bf16" if word == "auto" else word
        return Machine("a GPU", int(device_memory * 2**30), precision, True, processes, here=False)
    total, gpu = total_memory(runtime.device), runtime.device.type == "cuda"
    memory = None if total is None else total if gpu else total // processes
    return Machine(runtime.device_name, memory, runtime.precision, gpu, processes, here=True)


def _memory(subject: Subject, network: nn.Module, machine: Machine, share: int, micro: int) -> Memory:
    config, recipe = subject.config, subject.recipe
    parameters = list(network.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    exact = {
        "weights": weights,
        "gradients": weights,
        "moving average": _state_bytes(network),
        "optimizer's moments": _optimizer_bytes(network),
    }
    latents = config.latent_shape[0] * config.latent_shape[1] * config.latent_shape[2]
    estimated = {"batch and noise": 5 * 4 * micro * latents}
    if machine.half:
        cast = (m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d))
        estimated[f"weights in {machine.precision}"] = sum(2 * p.numel() for m in cast for p in m.parameters())
    if machine.num_processes > 1:
        estimated["gradients on their way"] = weights
    if subject.stage.num_bytes:
        estimated["autoencoder"] = subject.stage.num_bytes
    cached = cached_bytes(subject)
    if cached is not None and _stays_resident(subject.recipe, cached, machine):
        estimated["latent cache"] = cached
    if not machine.gpu:
        estimated["copy for a checkpoint"] = _checkpoint_bytes(network)
    side = config.latent_shape[-1]
    kept = {mode: bytes_per_image(config.network, side, half=machine.half, memory=mode) for mode in MEMORY_MODES}
    preview = 0
    if recipe.training.preview_every:
        together = min(len(_preview_of(subject).seeds), _DECODED_TOGETHER, micro)
        decoded = together * _DECODED * 4 * (subject.stage.width or 128) * recipe.data.image_size**2
        preview = weights + decoded  # the weights that the average stands in for are set aside
    mode = recipe.training.memory
    if mode == "auto":
        memory = machine.memory
        mode = fitting_mode(config, micro, half=machine.half, memory=memory) if memory is not None else "none"
    return Memory(exact, estimated, kept, preview, mode, micro, share)


def cached_bytes(subject: Subject) -> int | None:
    """What the tensors of a latent cache take, mirrored images included; None where their number is not known.

    Data that are not there are taken to become a cache, as the recipes advise.
    """
    data, config = subject.data, subject.config
    if data.num_images is None or (data.cache is None and not data.assumed):
        return None
    channels, (side, _) = subject.stage.num_moments, config.latent_shape[1:]
    wide = data.cache is not None and data.cache.precision == "float32"
    moments = channels * side**2 * (4 if wide else 2) * (2 if subject.recipe.data.flip else 1)
    counts = side**2 * (1 if subject.stage.factor**2 <= 255 else 2)
    variants = data.cache.mask_variants if data.cache is not None and config.conditioning.inpainting else 0
    per_image = moments * (1 + variants) + counts * (config.conditioning.num_map_classes + variants)
    return data.num_images * (per_image + (8 if config.conditioning.num_classes else 0))


def _stays_resident(recipe: Recipe, num_bytes: int, machine: Machine) -> bool:
    """Whether training holds the cache in memory, as if all of the memory were free."""
    data = recipe.data
    if data.images or (data.resident == "auto" and data.num_workers):
        return False
    return stays_resident(data.resident, num_bytes, torch.device("cuda" if machine.gpu else "cpu"), machine.memory)


def _preview_of(subject: Subject) -> Drawing:
    """What a preview asks for."""
    return preview_request(FlowModel(subject.config, nn.Linear(1, 1), None))


def _state_bytes(network: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def _optimizer_bytes(network: nn.Module) -> int:
    """Two moments like the weights, and a step for each of them."""
    return sum(2 * p.numel() * p.element_size() + 4 for p in network.parameters())


def _checkpoint_bytes(network: nn.Module) -> int:
    return 2 * _state_bytes(network) + _optimizer_bytes(network)


def _disk(subject: Subject, network: nn.Module) -> Disk:
    training, config = subject.recipe.training, subject.config
    embedded = config.autoencoder.reference == AUTOENCODER_FOLDER
    every, milestones = training.checkpoint_every, training.keep_every or 0
    num_milestones = training.steps // milestones if milestones else 0
    num_saved = training.steps // every + num_milestones + (not training.is_saved(training.steps))
    if milestones:
        num_saved -= training.steps // math.lcm(every, milestones)
    previews = -(-training.steps // training.preview_every) if training.preview_every else 0
    pixels = len(_preview_of(subject).seeds) * subject.recipe.data.image_size**2
    place = next((p for p in Path(subject.recipe.out or "runs").absolute().parents if p.is_dir()), Path.cwd())
    here = subject.data.num_bytes
    return Disk(
        checkpoint=_checkpoint_bytes(network),
        num_checkpoints=min(training.keep_checkpoints + 1 + num_milestones, num_saved),
        num_milestones=num_milestones,
        model=_state_bytes(network) + (subject.stage.num_bytes or 0 if embedded else 0),
        cache=cached_bytes(subject) if here is None else here,
        cache_is_here=here is not None,
        previews=previews * pixels * _PNG_BYTES,
        free=shutil.disk_usage(place).free,
    )


def _memory_advice(plan: Plan) -> list[str]:
    memory, machine = plan.memory, plan.machine
    lines = [] if memory.previews_fit(machine.memory) else ["previews would not fit: add training.preview_every=0"]
    if memory.largest_micro_batch(memory.mode, machine.memory) >= memory.micro_batch_size:
        return lines
    fitting = {mode: memory.largest_micro_batch(mode, machine.memory) for mode in MEMORY_MODES}
    for mode, largest in fitting.items():
        if largest:
            words = [f"training.memory={mode}"] if mode != memory.mode else []
            words += [f"training.micro_batch_size={largest}"] if largest < memory.micro_batch_size else []
            lines.append(f"{' '.join(words)} would fit")
    if not any(fitting.values()):
        needed = gib(memory.fixed + memory.kept_per_image["checkpoint"])
        lines.append(f"not even one image at a time fits, which takes about {needed}")
        lines += [smaller] if (smaller := _smaller(plan)) else []
    return lines


def _smaller(plan: Plan) -> str | None:
    """The largest published transformer of the same patch that fits."""
    network = plan.subject.config.network
    if not isinstance(network, DiTConfig):
        return "fewer network.channels, or smaller images, would take less"
    for size in reversed(SIZES):
        name = f"DiT-{size}/{network.patch_size}"
        if name not in NAMES or SIZES[size]["hidden_size"] >= network.hidden_size:
            continue
        chosen = DiTConfig(name=name, variant=network.variant)
        config = plan.subject.config.model_copy(update={"network": chosen})
        recipe = with_values(plan.recipe, {"network": chosen})
        subject = Subject(recipe, config, plan.subject.data, plan.subject.stage)
        with torch.device("meta"):
            built = config.build_network()
        memory = _memory(subject, built, plan.machine, plan.memory.share, plan.memory.micro_batch_size)
        if largest := memory.largest_micro_batch(memory.mode, plan.machine.memory):
            return f"network.name={name} would fit, {largest} images at a time"
    return None


def _disk_advice(plan: Plan) -> list[str]:
    disk = plan.disk
    needed = disk.run + (0 if disk.cache_is_here else disk.cache or 0)
    if needed <= disk.free:
        return []
    return [f"{gib(disk.free)} of disk are free, and {gib(needed)} are needed; give out=... on another disk"]


def _run_rows(plan: Plan) -> list[tuple[str, str, str]]:
    subject, training, config = plan.subject, plan.recipe.training, plan.subject.config
    data = subject.data
    images = f"{data.num_images:,} images" if data.num_images else "images"
    told = f", {config.conditioning.num_classes:,} classes" if config.conditioning.num_classes else ""
    maps = f", maps of {config.conditioning.num_map_classes} classes" if config.conditioning.num_map_classes else ""
    shape = " x ".join(map(str, config.latent_shape))
    steps = f"{training.steps:,} steps of {training.batch_size:,} images"
    if data.num_images:
        steps += f", {training.steps * training.batch_size / data.num_images:,.3g} passes over the data"
    known = ASSUMED if data.assumed else EXACT
    rows = [
        ("data", f"{images} of {config.image_size} x {config.image_size}{told}{maps}", known),
        ("latents", f"{shape}, by {plan.recipe.autoencoder}", ASSUMED if subject.stage.assumed else EXACT),
        ("network", f"{config.network.title}, {plan.num_parameters:,} parameters", EXACT),
        ("training", steps, known if data.num_images else EXACT),
    ]
    machine = plan.machine
    size = f", {gib(machine.memory)}" if machine.memory else ""
    each = f", {machine.num_processes} processes" if machine.num_processes > 1 else ""
    rows.append(
        ("planned for", f"{machine.name}{size}, {machine.precision}{each}", EXACT if machine.here else "as given")
    )
    if subject.reasons:
        rows.append(("fitted", "; ".join(subject.reasons), ""))
    return rows + [("assumed", line, "") for line in subject.assumed]


def _memory_rows(plan: Plan) -> dict[str, list[tuple[str, str, str]]]:
    memory, machine = plan.memory, plan.machine
    rows = [(name, gib(value), EXACT) for name, value in memory.exact.items()]
    rows += [(name, gib(value), ESTIMATE) for name, value in memory.estimated.items()]
    for mode in MEMORY_MODES:
        largest = memory.largest_micro_batch(mode, machine.memory)
        most = f"; at most {largest:,} images at a time fit" if machine.memory else ""
        mark = " <" if mode == memory.mode else ""
        rows.append((f"kept for backward, {mode}", f"{gib(memory.kept(mode))}{most}{mark}", ESTIMATE))
    if memory.preview:
        rows.append(("drawing a preview", f"{gib(memory.preview)}, when nothing is kept", ESTIMATE))
    verdict = "" if machine.memory is None else ": it fits" if memory.fits(machine.memory) else ": it does NOT fit"
    rows.append(("at most", f"{gib(memory.peak)}, with training.memory={memory.mode}{verdict}", ESTIMATE))
    return {f"memory of a process, {memory.micro_batch_size:,} images at a time": rows}


def _time_rows(plan: Plan) -> list[tuple[str, str, str]]:
    speed, training = plan.speed, plan.recipe.training
    how = MEASURED if speed.whole else f"{ESTIMATE} from a part" if speed.measured else ESTIMATE
    rate = training.batch_size / plan.seconds_per_step
    rows = [
        ("network", f"{speed.forward_flops / 1e9:,.4g} GFLOP forward, an image", EXACT),
        ("speed", f"{speed.probed}: {speed.flops_per_second / 1e12:.3g} TFLOP/s", MEASURED if speed.measured else how),
        ("a step", f"{duration_of(plan.seconds_per_step)}, {rate:,.3g} images/s", how),
    ]
    if plan.num_previews:
        each = duration_of(plan.preview_seconds)
        rows.append(("previews", f"{plan.num_previews:,} of {each}, without decoding", ESTIMATE))
    where = " on this machine, not on that one" if speed.measured and not plan.machine.here else ""
    return [*rows, ("the run", f"{duration(plan.seconds)}{where}", ESTIMATE)]


def _disk_rows(plan: Plan) -> list[tuple[str, str, str]]:
    disk = plan.disk
    rows = [
        ("a checkpoint", f"{gib(disk.checkpoint)}; {disk.num_checkpoints} at once at most", EXACT),
        ("the model", gib(disk.model), EXACT),
    ]
    if disk.cache is not None:
        known = EXACT if disk.cache_is_here else ASSUMED
        rows.append(("latent cache", gib(disk.cache) + (", there already" if disk.cache_is_here else ""), known))
    if disk.previews:
        rows.append(("previews", gib(disk.previews), ESTIMATE))
    return [*rows, ("the run", f"{gib(disk.run)} of {gib(disk.free)} that are free", ESTIMATE)]


def gib(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"


def duration_of(seconds: float) -> str:
    """A length of time, also of less than a second."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s" if seconds < 90 else duration(seconds)
