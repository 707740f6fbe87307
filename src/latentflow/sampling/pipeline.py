"""Requests in, images out.

    noise, one stream per seed  ->  condition and its null twin  ->  solver over the guided velocity  ->  decode

Nothing here looks across images: image i of a request is the same in any batch and on any number of processes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from latentflow.artifacts import atomic_file, sha256_tensors
from latentflow.autoencoder import to_uint8
from latentflow.conditioning import CONDITION_NAMES, ConditionName
from latentflow.errors import ConfigError, nearest
from latentflow.flow.composition import BlendedVelocity, KnownRegionVelocity
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.solvers import integrate, is_adaptive
from latentflow.flow.times import sampling_times
from latentflow.latent_flow import LatentFlow, SamplingPreset
from latentflow.randomness import ImageRandom, derive_seed
from latentflow.shapes import Condition, per_image


class Blend(BaseModel):
    """What a picture is mixed with: the noise of another seed, and the velocity of another class."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int
    weight: float = Field(ge=0, le=1, description="0: the picture's own seed and class; 1: the other ones.")
    label: int | None = Field(None, description="The other class; null: the picture's own.")


class SampleRequest(BaseModel):
    """What is to be drawn: one image per seed, each with its class.

    The same record is stored in every PNG, reduced to that image.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field("sample", description="The verb that drew it.")
    seeds: list[int] = Field(description="One per image; equal seeds start from equal noise.")
    labels: list[int] = Field(default_factory=list, description="One class index per image; empty: no class is told.")
    blends: list[Blend] = Field(default_factory=list, description="One per image, or none.")
    told: list[ConditionName] = Field(default_factory=list, description="Conditions that are not null.")
    inputs: dict[str, str] = Field(
        default_factory=dict, description="Files it was drawn from, with their hashes, and how they were used."
    )
    start: float = Field(1.0, gt=0, le=1, description="Time at which drawing starts; 1: from noise alone.")
    image_size: tuple[int, int] | None = Field(None, description="Height and width drawn at; null: the model's.")
    sampling: SamplingPreset = SamplingPreset()

    def at(self, rows: slice) -> SampleRequest:
        """The request reduced to some images."""
        lists = {"seeds": self.seeds[rows], "labels": self.labels[rows], "blends": self.blends[rows]}
        return self.model_copy(update=lists)


@dataclass(frozen=True)
class Given:
    """What images are drawn from besides seeds and classes, on the CPU; one row per image, or one row for all.

    Attributes:
        masked_latents: [B, C, h, w], what the model is told of the known part of an image.
        mask: [B, 1, h, w], share of each latent pixel in the hole; with `masked_latents`.
        class_fractions: [B, K, h, w], the semantic map.
        noise: [B, C, h, w], in place of the seeds' own.
        latents: [B, C, h, w] of an image to start from: x_t of the path at the request's `start`.
        hole: [B, 1, h, w] of 0 and 1; outside it the path to `latents` is followed.
    """

    masked_latents: Tensor | None = None
    mask: Tensor | None = None
    class_fractions: Tensor | None = None
    noise: Tensor | None = None
    latents: Tensor | None = None
    hole: Tensor | None = None

    def at(self, rows: slice, num_images: int, device: torch.device) -> dict[str, Tensor | None]:
        """Each tensor for the `num_images` images of `rows`, on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: None if x is None else (x if len(x) == 1 else x[rows]).to(device).expand(num_images, -1, -1, -1)
            for name, x in tensors.items()
        }


@dataclass(frozen=True)
class Samples:
    """What came out.

    Attributes:
        pixels: [B, 3, H, W] uint8.
        latents: [B, C, h, w] float32, normalised, at t = 0.
        evaluations: [B] int64, network calls of each image; a guided call counts twice.
        request: what was asked for.
        seconds: wall time of solver and decoder.
    """

    pixels: Tensor
    latents: Tensor
    evaluations: Tensor
    request: SampleRequest
    class_names: Sequence[str] = field(default=())
    seconds: float = 0.0

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, as RGB images of Pillow."""
        return [self._image(row) for row in range(len(self.pixels))]

    def save(self, folder: str | Path) -> list[Path]:
        """Write one PNG per image, named by class and seed, with its request in the metadata."""
        return [self._write(Path(folder) / self.name(row), row) for row in range(len(self.pixels))]

    def save_as(self, file: str | Path) -> list[Path]:
        """Write one image to `file`, several to files named like it and by what sets them apart."""
        file = Path(file)
        if len(self.pixels) == 1:
            return [self._write(file, 0)]
        return [self._write(file.with_name(f"{file.stem}_{self.name(row)}"), row) for row in range(len(self.pixels))]

    def name(self, row: int) -> str:
        """The file name of one image: "class-003_seed-00000017.png"."""
        own = self.request.at(slice(row, row + 1))
        parts = [f"class-{label:03d}" for label in own.labels] + [f"seed-{seed:08d}" for seed in own.seeds]
        for blend in own.blends:
            parts += [f"to-class-{blend.label:03d}"] if blend.label is not None else []
            parts += [f"to-seed-{blend.seed:08d}"] if [blend.seed] != own.seeds else []
            parts += [f"at-{blend.weight:.3f}"]
        return "_".join(parts) + ".png"

    def _image(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row].permute(1, 2, 0).numpy())

    def _write(self, file: Path, row: int) -> Path:
        own = self.request.at(slice(row, row + 1))
        metadata = {**own.model_dump(mode="json"), "evaluations": int(self.evaluations[row])}
        if own.labels:
            metadata["class_name"] = self.class_names[own.labels[0]]
        text = PngImagePlugin.PngInfo()
        text.add_text("latentflow", json.dumps(metadata))
        with atomic_file(file) as temporary:
            self._image(row).save(temporary, format="PNG", pnginfo=text)
        return file


def make_request(
    model: LatentFlow,
    *,
    num: int = 1,
    classes: Sequence[int | str] | None = None,
    seed: int = 0,
    task: str = "sample",
    told: Sequence[ConditionName] = (),
    inputs: Mapping[str, str] | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
    **preset: object,
) -> SampleRequest:
    """One checked request; what is left out or None comes from the preset in the model folder.

    The preset's guidance is left out where nothing is told that it could strengthen; asked for, it is refused there.

    Args:
        num: number of images; image i has seed `seed + i`.
        classes: by index or name, dealt out in turn (image i gets class i mod their number); an empty list or
            "none": no class is told; None: all classes in turn where that is all the model is told, else no class.
        told: conditions besides the class that are given.
        preset: fields of `SamplingPreset`: solver, steps, guidance, guidance_interval, guided_by, shift, rtol, atol.

    Raises:
        ConfigError: a class, solver or value that does not exist or that the model was not trained for.
    """
    if num < 1:
        raise ConfigError(f"number of images {num}: at least 1 is needed")
    conditioning = model.config.conditioning
    if classes is None:
        chosen = list(range(conditioning.num_classes)) if task == "sample" and not told else []
    elif list(classes) == ["none"] and "none" not in conditioning.class_names:
        chosen = []
    else:
        chosen = [conditioning.class_index(c) for c in classes]
    given = {key: value for key, value in preset.items() if value is not None}
    unknown = given.keys() - SamplingPreset.model_fields.keys()
    if unknown:
        raise TypeError(f"unknown argument {min(unknown)!r}; {nearest(min(unknown), SamplingPreset.model_fields)}")
    told = [*(["label"] if chosen else []), *told]
    strengthened = set(told).intersection(conditioning.can_guide, model.config.sampling.guided_by or CONDITION_NAMES)
    if not strengthened and not given.keys() & {"guidance", "guided_by"}:
        given["guidance"] = 1.0
    if model.config.sampling.guided_by:  # a preset's wish holds as far as it can
        given.setdefault("guided_by", [name for name in told if name in strengthened] or None)
    request = SampleRequest(
        task=task,
        seeds=list(range(seed, seed + num)),
        labels=[chosen[i % len(chosen)] for i in range(num)] if chosen else [],
        told=told,
        inputs=dict(inputs or {}),
        start=start,
        image_size=image_size,
        sampling=model.config.sampling.model_copy(update=given),
    )
    check_request(model, request)
    return request


def check_request(model: LatentFlow, request: SampleRequest) -> None:
    """Refuse what cannot be drawn, before anything is computed.

    Raises:
        ConfigError: with the value and the remedy.
    """
    sampling, conditioning = request.sampling, model.config.conditioning
    if len(request.labels) != (len(request.seeds) if "label" in request.told else 0):
        raise ConfigError(f"{len(request.labels)} labels for {len(request.seeds)} seeds; give one per image, or none")
    if request.blends and len(request.blends) != len(request.seeds):
        raise ConfigError(f"{len(request.blends)} blends for {len(request.seeds)} seeds; give one per image, or none")
    others = [blend.label for blend in request.blends if blend.label is not None]
    if others and not request.labels:
        raise ConfigError(f"a blend towards class {others[0]} needs a class to begin with; give both")
    for label in [*request.labels, *others]:
        conditioning.class_index(label)
    for name in request.told:
        conditioning.require(name)
    for name, share in conditioning.dropout.items():
        if share == 0 and name not in request.told:
            remedy = {
                "label": "give --classes",
                "inpainting": "it can only fill holes: `latentflow inpaint` with the method 'condition'",
                "semantic_map": "give a map: `latentflow inpaint --map`"
                if "inpainting" in request.told
                else "it can only paint maps: `latentflow mask-to-image`",
            }
            if name == "inpainting" and "semantic_map" in request.told:
                remedy[name] += " and --map"
            raise ConfigError(f"the model never learned to do without the condition {name}; {remedy[name]}")
    if sampling.guidance < 0:
        raise ConfigError(f"guidance {sampling.guidance} is below zero; 1 switches it off, 1.5 to 4 are usual")
    if sampling.guidance != 1:
        guided_by(model, request)
    if is_adaptive(sampling.solver) and not (sampling.rtol > 0 and sampling.atol > 0):
        raise ConfigError(f"rtol {sampling.rtol} and atol {sampling.atol} must both be above 0; 1e-5 is usual")
    if not 0 < request.start <= 1:
        raise ConfigError(f"start {request.start}: drawing starts at a time above 0 (the image) and at most 1 (noise)")
    sampling_times(sampling.steps, sampling.shift, start=request.start)
    _conditioned_velocity(model, request, Condition(), Condition())


def guided_by(model: LatentFlow, request: SampleRequest) -> list[ConditionName]:
    """The conditions that guidance strengthens: those that its null twin is not told.

    Raises:
        ConfigError: there are none, or one is not given or has an untrained null.
    """
    conditioning, scale = model.config.conditioning, request.sampling.guidance
    if not request.sampling.guided_by:
        names = [name for name in request.told if name in conditioning.can_guide]
        if not names:
            if not conditioning.dropout:
                why = "the model is unconditional"
            elif not request.told:
                why = "the images are told nothing that it could strengthen"
            else:
                keys = {"label": "label_dropout", "inpainting": "inpainting_dropout", "semantic_map": "map_dropout"}
                why = f"the model was trained with conditioning.{keys[request.told[0]]} = 0"
            raise ConfigError(f"guidance {scale}: {why}, so its null condition means nothing; use guidance 1")
        return names
    for name in request.sampling.guided_by:
        if name not in CONDITION_NAMES:
            raise ConfigError(f"guided by {name!r}: no such condition; {nearest(name, CONDITION_NAMES)}")
        if name not in conditioning.can_guide:
            able = ", ".join(conditioning.can_guide) or "nothing"
            raise ConfigError(f"guided by {name}: its null was never trained in this model, which can guide by {able}")
        if name not in request.told:
            raise ConfigError(f"guided by {name}, which the images are not told; they are told {request.told}")
    return list(request.sampling.guided_by)


def draw(
    model: LatentFlow,
    request: SampleRequest,
    given: Given = Given(),
    *,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Iterator[Samples]:
    """Draw a request batch by batch.

    Args:
        given: what it is drawn from besides seeds and classes.
        batch_size: images computed together; it changes speed and memory, not the pictures.
        on_images: told the number of images just finished.
    """
    check_request(model, request)
    for start in range(0, len(request.seeds), batch_size):
        rows = slice(start, start + batch_size)
        part = request.at(rows)
        yield _draw_batch(model, part, given.at(rows, len(part.seeds), model.device))
        on_images(len(part.seeds))


def draw_all(model: LatentFlow, request: SampleRequest, given: Given = Given(), **options: Any) -> Samples:
    """Draw a request at once into memory; the options are those of `draw`."""
    return join_samples(list(draw(model, request, given, **options)))


def sample(
    model: LatentFlow, *, num: int = 1, batch_size: int = 16, noise: Tensor | None = None, **request: Any
) -> Samples:
    """Draw `num` images at once into memory; the arguments are those of `make_request`.

    Args:
        noise: [num, C, h, w] to start from instead of the seeds' noise, for example from `invert`.

    Raises:
        ConfigError: see `make_request`; also for noise of another shape.
    """
    made = make_request(model, num=num, **request)
    if noise is not None:
        wanted = (num, *model.config.latent_shape)
        if tuple(noise.shape) != wanted:
            raise ConfigError(f"noise of shape {list(noise.shape)}; {num} images of this model need {list(wanted)}")
        origin = f"sha256:{sha256_tensors({'noise': noise})[:12]}"
        made = made.model_copy(update={"inputs": {**made.inputs, "noise": origin}})
    return draw_all(model, made, Given(noise=noise), batch_size=batch_size)


def join_samples(parts: Sequence[Samples]) -> Samples:
    """One record of several batches, in their order."""
    requests = [part.request for part in parts]
    lists = {name: [x for r in requests for x in getattr(r, name)] for name in ("seeds", "labels", "blends")}
    return Samples(
        pixels=torch.cat([part.pixels for part in parts]),
        latents=torch.cat([part.latents for part in parts]),
        evaluations=torch.cat([part.evaluations for part in parts]),
        request=requests[0].model_copy(update=lists),
        class_names=parts[0].class_names,
        seconds=sum(part.seconds for part in parts),
    )


def initial_noise(model: LatentFlow, request: SampleRequest) -> Tensor:
    """The Gaussian noise each image of a request starts from, [B, C, h, w] float32; equal on every device.

    A blend lies between the noises of two seeds on a great circle, where Gaussian noise has its usual length:
    cos(w pi/2) a + sin(w pi/2) b is again standard normal, as a and b are independent.
    """
    own = _noise(model, request.seeds, request.image_size)
    if not request.blends:
        return own
    other = _noise(model, [blend.seed for blend in request.blends], request.image_size)
    same = torch.tensor([b.seed == seed for b, seed in zip(request.blends, request.seeds, strict=True)])
    angle = torch.tensor([blend.weight for blend in request.blends]).masked_fill(same, 0) * (math.pi / 2)
    return per_image(angle.cos(), own) * own + per_image(angle.sin(), own) * other


def _noise(model: LatentFlow, seeds: Sequence[int], image_size: tuple[int, int] | None) -> Tensor:
    random = ImageRandom(derive_seed("sample", seed) for seed in seeds)
    channels, *sides = model.config.latent_shape
    if image_size is not None:
        sides = [side // model.config.autoencoder.factor for side in image_size]
    return random.normal(channels, *sides, device=model.device)


def _conditioned_velocity(
    model: LatentFlow, request: SampleRequest, condition: Condition, null: Condition | None
) -> ConditionedVelocity:
    sampling = request.sampling
    return ConditionedVelocity(
        model.velocity, condition, null=null, scale=sampling.guidance, interval=sampling.guidance_interval
    )


def conditioned_velocity(
    model: LatentFlow, request: SampleRequest, given: Mapping[str, Tensor | None], latents_shape: Sequence[int]
) -> ConditionedVelocity | BlendedVelocity:
    """The guided velocity of a request's images; `given` as from `Given.at`."""
    conditioning = model.config.conditioning

    def told(labels: Sequence[int]) -> ConditionedVelocity:
        condition = conditioning.build(
            latents_shape,
            model.device,
            labels=torch.tensor(labels) if labels else None,
            **{name: given.get(name) for name in ("masked_latents", "mask", "class_fractions")},
        )
        guided = guided_by(model, request) if request.sampling.guidance != 1 else []
        null = conditioning.without(condition, guided) if guided else None
        return _conditioned_velocity(model, request, condition, null)

    if all(blend.label is None for blend in request.blends):
        return told(request.labels)
    pairs = zip(request.labels, request.blends, strict=True)
    others = [own if blend.label is None else blend.label for own, blend in pairs]
    weights = torch.tensor([blend.weight for blend in request.blends], device=model.device)
    return BlendedVelocity(told(request.labels), told(others), weights)


@torch.inference_mode()
def _draw_batch(model: LatentFlow, request: SampleRequest, given: Mapping[str, Tensor | None]) -> Samples:
    began, sampling, path = time.perf_counter(), request.sampling, model.config.path
    noise = initial_noise(model, request) if given["noise"] is None else given["noise"]
    velocity, x = conditioned_velocity(model, request, given, noise.shape), noise
    if given["latents"] is not None:
        x = path.interpolate(given["latents"], noise, torch.full((len(noise),), request.start))
    if given["hole"] is not None:
        velocity = KnownRegionVelocity(velocity, path, given["latents"], noise, given["hole"])
    solution = integrate(
        velocity,
        x,
        sampling_times(sampling.steps, sampling.shift, start=request.start),
        solver=sampling.solver,
        rtol=sampling.rtol,
        atol=sampling.atol,
    )
    pixels = to_uint8(model.decode(solution.x)).cpu()
    return Samples(
        pixels=pixels,
        latents=solution.x.float().cpu(),
        evaluations=velocity.evaluations,
        request=request,
        class_names=tuple(model.config.conditioning.class_names),
        seconds=time.perf_counter() - began,
    )
