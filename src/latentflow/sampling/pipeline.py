"""Requests in, images out; what a request is, stands in `request.py`.

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

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

import latentflow
from latentflow.artifacts import atomic_file, sha256_tensors
from latentflow.autoencoder import to_uint8
from latentflow.errors import ConfigError
from latentflow.flow.composition import BlendedVelocity, KnownRegionVelocity
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.solvers import integrate
from latentflow.flow.times import sampling_times
from latentflow.latent_flow import LatentFlow
from latentflow.randomness import ImageRandom, derive_seed
from latentflow.sampling.request import SampleRequest, check_request, guided_by, make_request
from latentflow.shapes import per_image


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
        class_names: of the model.
        drawn_by: which model, and which version of this program.
        seconds: wall time of solver and decoder.
        finish: makes of the pixels of a picture, [H, W, 3], the image that is written.
    """

    pixels: Tensor
    latents: Tensor
    evaluations: Tensor
    request: SampleRequest
    class_names: Sequence[str] = field(default=())
    drawn_by: Mapping[str, str | int] = field(default_factory=dict)
    seconds: float = 0.0
    finish: Callable[[np.ndarray], Image.Image] = Image.fromarray

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, as RGB images of Pillow."""
        return [Image.fromarray(self._array(row)) for row in range(len(self.pixels))]

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

    def _array(self, row: int) -> np.ndarray:
        return self.pixels[row].permute(1, 2, 0).numpy()

    def _write(self, file: Path, row: int) -> Path:
        own = self.request.at(slice(row, row + 1))
        metadata = {**own.model_dump(mode="json"), "evaluations": int(self.evaluations[row])}
        metadata["drawn_by"] = dict(self.drawn_by)
        if own.labels:
            metadata["class_name"] = self.class_names[own.labels[0]]
        text = PngImagePlugin.PngInfo()
        text.add_text("latentflow", json.dumps(metadata))
        with atomic_file(file) as temporary:
            self.finish(self._array(row)).save(temporary, format="PNG", pnginfo=text)
        return file


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
        drawn_by=parts[0].drawn_by,
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
        sampling = request.sampling
        return ConditionedVelocity(
            model.velocity, condition, null, sampling.guidance, sampling.guidance_interval, sampling.guided_channels
        )

    if all(blend.label is None for blend in request.blends):
        return told(request.labels)
    pairs = zip(request.labels, request.blends, strict=True)
    others = [own if blend.label is None else blend.label for own, blend in pairs]
    weights = torch.tensor([blend.weight for blend in request.blends], device=model.device)
    return BlendedVelocity(told(request.labels), told(others), weights)


def _drawn_by(model: LatentFlow) -> dict[str, str | int]:
    training = model.config.training
    return {
        "latentflow": latentflow.__version__,
        "model": model.reference,
        "trained_on": training.data_fingerprint[:12],
        "images_seen": training.images_seen,
    }


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
        drawn_by=_drawn_by(model),
        seconds=time.perf_counter() - began,
    )
