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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

import latentflow
from latentflow.artifacts import atomic_file, sha256_tensors
from latentflow.autoencoder import to_uint8
from latentflow.console import notice
from latentflow.errors import ConfigError, NonFiniteError
from latentflow.flow.composition import BlendedVelocity, KnownRegionVelocity
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.solvers import expected_evaluations, integrate, is_adaptive
from latentflow.flow.times import sampling_times
from latentflow.latent_flow import LatentFlow
from latentflow.randomness import ImageRandom
from latentflow.sampling.naming import picture_facts, picture_name
from latentflow.sampling.request import SampleRequest, check_request, guided_by, make_request, require_count
from latentflow.shapes import per_image

MOST_TOGETHER = 65_536
"""Images in one batch."""
MOST_BYTES = 8 * 2**30
"""Of pictures that are held in memory at once."""
MANY_CALLS = 100
"""Network calls a picture from which on their cost is said before drawing."""


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
        drawn_by: says which model, and which version of this program.
        seconds: wall time of solver and decoder.
        finish: makes of the pixels of a picture, [H, W, 3], the image that is written.
    """

    pixels: Tensor
    latents: Tensor
    evaluations: Tensor
    request: SampleRequest
    class_names: Sequence[str] = field(default=())
    drawn_by: Callable[[], Mapping[str, str | int]] = field(default=dict)
    seconds: float = 0.0
    finish: Callable[[np.ndarray], Image.Image] = Image.fromarray

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, as RGB images of Pillow."""
        return [Image.fromarray(self._array(row)) for row in range(len(self.pixels))]

    @property
    def mean_evaluations(self) -> float:
        """Network calls per image."""
        return float(self.evaluations.double().mean())

    def save(self, folder: str | Path) -> list[Path]:
        """Write one PNG per image, named by class and seed, with its request in the metadata."""
        return [self.write(Path(folder) / self.name(row), row) for row in range(len(self.pixels))]

    def save_as(self, file: str | Path) -> list[Path]:
        """Write one image to `file`, several to files named like it and by what sets them apart."""
        files = files_like(file, self.request, self.class_names)
        return [self.write(own, row) for row, own in enumerate(files)]

    def name(self, row: int) -> str:
        """The file name of one image: "cat_seed-00000017.png"."""
        return picture_name(self.request.at(slice(row, row + 1)), self.class_names)

    def write(self, file: Path, row: int) -> Path:
        """Write one image as PNG, with its request in the metadata."""
        own = self.request.at(slice(row, row + 1))
        facts = picture_facts(own, self.class_names, dict(self.drawn_by()))
        text = PngImagePlugin.PngInfo()
        text.add_text("latentflow", json.dumps(facts | {"evaluations": int(self.evaluations[row])}))
        with atomic_file(file) as temporary:
            self.finish(self._array(row)).save(temporary, format="PNG", pnginfo=text)
        return file

    def _array(self, row: int) -> np.ndarray:
        return self.pixels[row].permute(1, 2, 0).numpy()


def files_like(file: str | Path, request: SampleRequest, class_names: Sequence[str]) -> list[Path]:
    """Where the pictures of a request go: one to `file`, several to files named like it and by what sets them apart."""
    file = Path(file)
    if len(request.seeds) == 1:
        return [file]
    rows = (request.at(slice(row, row + 1)) for row in range(len(request.seeds)))
    return [file.with_name(f"{file.stem}_{picture_name(row, class_names)}") for row in rows]


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
    require_count("batch size", batch_size, 1, MOST_TOGETHER, "16 are usual")
    tell_cost(model, request, batch_size)
    for start in range(0, len(request.seeds), batch_size):
        rows = slice(start, start + batch_size)
        part = request.at(rows)
        yield _draw_batch(model, part, given.at(rows, len(part.seeds), model.device))
        on_images(len(part.seeds))


def draw_all(model: LatentFlow, request: SampleRequest, given: Given = Given(), **options: Any) -> Samples:
    """Draw a request at once into memory; the options are those of `draw`.

    Raises:
        ConfigError: the pictures would need more than `MOST_BYTES` of it.
    """
    height, width = request.image_size or (model.config.image_size,) * 2
    most = MOST_BYTES // (3 * height * width)
    if len(request.seeds) > most:
        raise ConfigError(
            f"{len(request.seeds):,} images of {height} x {width} pixels at once in memory: at most {most:,}; draw "
            "fewer, or write them with `latentflow sample`"
        )
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
        made = naming_noise(made, noise)
    return draw_all(model, made, Given(noise=noise), batch_size=batch_size)


def naming_noise(request: SampleRequest, noise: Tensor) -> SampleRequest:
    """The request as it is remembered where this noise takes the place of the seeds'."""
    origin = f"sha256:{sha256_tensors({'noise': noise})[:12]}"
    return request.model_copy(update={"inputs": {**request.inputs, "noise": origin}})


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
    random = ImageRandom.of_seeds("sample", seeds, model.device)
    channels, *sides = model.config.latent_shape
    if image_size is not None:
        sides = [side // model.config.autoencoder.factor for side in image_size]
    return random.normal(channels, *sides)


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


def tell_cost(model: LatentFlow, request: SampleRequest, batch_size: int) -> None:
    """Say once what a request costs that needs many network calls, and what draws the like sooner."""
    calls, quick = network_calls(request), {"solver": "heun", "steps": 25}
    sampling = request.sampling.model_copy(update=quick)
    fewer = network_calls(request.model_copy(update={"sampling": sampling}))
    if calls < MANY_CALLS or calls < 1.5 * fewer:
        return
    begin = request.at(slice(0, batch_size))
    rough, num = "about " if is_adaptive(request.sampling.solver) else "", len(request.seeds)
    seconds = _seconds_of_a_call(model, begin) * -(-num // len(begin.seeds))
    how = f"tolerance {request.sampling.rtol:g}" if rough else f"{request.sampling.steps} steps"
    notice(
        f"{request.sampling.solver} with {how} takes {rough}{calls:.0f} network calls a picture, for {num} here some "
        f"{calls * seconds:.2g} s; --solver heun --steps 25 takes {fewer:.0f}, some {fewer * seconds:.2g} s",
        kind=f"cost of {model.reference} {request.sampling}",
    )


def network_calls(request: SampleRequest) -> float:
    """Network calls a picture; of an adaptive solver a rough guess."""
    sampling = request.sampling
    calls = expected_evaluations(sampling.solver, sampling.steps, sampling.rtol)
    guided, blended = sampling.guidance not in (0, 1), any(blend.label is not None for blend in request.blends)
    low, high = sampling.guidance_interval
    return calls * (1 + (high - low) * guided) * (1 + blended)


@torch.inference_mode()
def _seconds_of_a_call(model: LatentFlow, request: SampleRequest) -> float:
    """Wall time of one network call for a batch that is told nothing."""
    noise = initial_noise(model, request)
    condition, time_ = model.config.conditioning.build(noise.shape, model.device), torch.ones(len(noise)).to(noise)
    began = time.perf_counter()
    model.velocity(noise, time_, condition).cpu()
    return time.perf_counter() - began


def drawn_by(model: LatentFlow) -> dict[str, str | int]:
    """Whose pictures these are, as each of them says: the program, the model, and the weights it draws with."""
    training = model.config.training
    return {
        "latentflow": latentflow.__version__,
        "model": model.reference,
        "weights": model.weights_hash[:12],
        "autoencoder": model.config.autoencoder.content_hash[:12],
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
    if (wrong := ~solution.x.isfinite().flatten(1).all(1)).any():
        seed = request.seeds[int(wrong.nonzero()[0])]
        raise NonFiniteError(
            f"the latents of seed {seed} are NaN or infinite, so there is no picture; if more steps or less guidance "
            "do not help, the weights of the model are damaged"
        )
    pixels = to_uint8(model.decode(solution.x)).cpu()
    return Samples(
        pixels=pixels,
        latents=solution.x.float().cpu(),
        evaluations=velocity.evaluations,
        request=request,
        class_names=tuple(model.config.conditioning.class_names),
        drawn_by=partial(drawn_by, model),
        seconds=time.perf_counter() - began,
    )
