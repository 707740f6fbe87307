"""Requests in, images out.

    noise, one stream per seed  ->  condition and its null twin  ->  solver over the guided velocity  ->  decode

Nothing here looks across images: image i of a request is the same in any batch and on any number of processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from latentflow.artifacts import atomic_file
from latentflow.autoencoder import to_uint8
from latentflow.errors import ConfigError
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.solvers import integrate, is_adaptive
from latentflow.flow.times import sampling_times
from latentflow.latent_flow import LatentFlow, SamplingPreset
from latentflow.randomness import ImageRandom, derive_seed


class SampleRequest(BaseModel):
    """What is to be drawn: one image per seed, each with its class.

    The same record is stored in every PNG, reduced to that image.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: list[int] = Field(description="One per image; equal seeds start from equal noise.")
    labels: list[int] = Field(
        default_factory=list, description="One class index per image; empty: unconditional model."
    )
    sampling: SamplingPreset = SamplingPreset()


@dataclass(frozen=True)
class Samples:
    """What came out.

    Attributes:
        pixels: [B, 3, S, S] uint8.
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
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in self.pixels]

    def save(self, folder: str | Path) -> list[Path]:
        """Write one PNG per image, named by number, class and seed, with its request in the metadata."""
        return [self._save_one(Path(folder), row, image) for row, image in enumerate(self.images)]

    def _save_one(self, folder: Path, row: int, image: Image.Image) -> Path:
        labels = self.request.labels[row : row + 1]
        own = self.request.model_copy(update={"seeds": [self.request.seeds[row]], "labels": labels})
        metadata = {**own.model_dump(mode="json"), "evaluations": int(self.evaluations[row])}
        if labels:
            metadata["class_name"] = self.class_names[labels[0]]
        text = PngImagePlugin.PngInfo()
        text.add_text("latentflow", json.dumps(metadata))
        file = folder / image_name(own.seeds[0], labels[0] if labels else None)
        with atomic_file(file) as temporary:
            image.save(temporary, pnginfo=text)
        return file


def image_name(seed: int, label: int | None) -> str:
    """The file name of one image: "class-003_seed-00000017.png"."""
    return (f"class-{label:03d}_" if label is not None else "") + f"seed-{seed:08d}.png"


def make_request(
    model: LatentFlow,
    *,
    num: int = 1,
    classes: Sequence[int | str] | None = None,
    seed: int = 0,
    solver: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    shift: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> SampleRequest:
    """One checked request; what is None comes from the preset in the model folder.

    Args:
        num: number of images; image i has seed `seed + i`.
        classes: by index or name, dealt out in turn (image i gets class i mod their number); None: all classes in turn.

    Raises:
        ConfigError: a class, solver or value that does not exist or that the model was not trained for.
    """
    if num < 1:
        raise ConfigError(f"number of images {num}: at least 1 is needed")
    conditioning = model.config.conditioning
    chosen = [conditioning.class_index(c) for c in classes] if classes else list(range(conditioning.num_classes))
    given = {
        "solver": solver,
        "steps": steps,
        "guidance": guidance,
        "guidance_interval": guidance_interval,
        "shift": shift,
        "rtol": rtol,
        "atol": atol,
    }
    preset = model.config.sampling.model_copy(update={key: value for key, value in given.items() if value is not None})
    request = SampleRequest(
        seeds=list(range(seed, seed + num)),
        labels=[chosen[i % len(chosen)] for i in range(num)] if chosen else [],
        sampling=preset,
    )
    check_request(model, request)
    return request


def check_request(model: LatentFlow, request: SampleRequest) -> None:
    """Refuse what cannot be drawn, before anything is computed.

    Raises:
        ConfigError: with the value and the remedy.
    """
    sampling, conditioning = request.sampling, model.config.conditioning
    if sampling.guidance < 0:
        raise ConfigError(f"guidance {sampling.guidance} is below zero; 1 switches it off, 1.5 to 4 are usual")
    if sampling.guidance != 1 and not conditioning.can_guide:
        why = "is unconditional" if not conditioning.num_classes else "was trained with conditioning.label_dropout = 0"
        raise ConfigError(
            f"guidance {sampling.guidance}: the model {why}, so its null condition means nothing; use guidance 1"
        )
    if len(request.labels) != (len(request.seeds) if conditioning.num_classes else 0):
        raise ConfigError(
            f"{len(request.labels)} labels for {len(request.seeds)} seeds; a conditional model needs one per image"
        )
    for label in request.labels:
        conditioning.class_index(label)
    if is_adaptive(sampling.solver) and not (sampling.rtol > 0 and sampling.atol > 0):
        raise ConfigError(f"rtol {sampling.rtol} and atol {sampling.atol} must both be above 0; 1e-5 is usual")
    sampling_times(sampling.steps, sampling.shift)
    _conditioned_velocity(model, request)


def draw(
    model: LatentFlow,
    request: SampleRequest,
    *,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Iterator[Samples]:
    """Draw a request batch by batch.

    Args:
        batch_size: images computed together; it changes speed and memory, not the pictures.
        on_images: told the number of images just finished.
    """
    check_request(model, request)
    for start in range(0, len(request.seeds), batch_size):
        rows = slice(start, start + batch_size)
        part = request.model_copy(update={"seeds": request.seeds[rows], "labels": request.labels[rows]})
        yield _draw_batch(model, part)
        on_images(len(part.seeds))


def sample(model: LatentFlow, *, num: int = 1, batch_size: int = 16, **request: object) -> Samples:
    """Draw `num` images at once into memory; the arguments are those of `make_request`.

    Raises:
        ConfigError: see `make_request`.
    """
    parts = list(draw(model, make_request(model, num=num, **request), batch_size=batch_size))
    return join_samples(parts)


def join_samples(parts: Sequence[Samples]) -> Samples:
    """One record of several batches, in their order."""
    request = parts[0].request.model_copy(
        update={
            "seeds": [seed for part in parts for seed in part.request.seeds],
            "labels": [label for part in parts for label in part.request.labels],
        }
    )
    return Samples(
        pixels=torch.cat([part.pixels for part in parts]),
        latents=torch.cat([part.latents for part in parts]),
        evaluations=torch.cat([part.evaluations for part in parts]),
        request=request,
        class_names=parts[0].class_names,
        seconds=sum(part.seconds for part in parts),
    )


def initial_noise(model: LatentFlow, seeds: Sequence[int]) -> Tensor:
    """The Gaussian noise of each seed, [B, C, h, w] float32; equal on every device."""
    random = ImageRandom(derive_seed("sample", seed) for seed in seeds)
    return random.normal(*model.config.latent_shape, device=model.device)


def _conditioned_velocity(model: LatentFlow, request: SampleRequest) -> ConditionedVelocity:
    conditioning = model.config.conditioning
    return ConditionedVelocity(
        model.velocity,
        conditioning.for_labels(request.labels, model.device),
        null=conditioning.null(len(request.seeds), model.device),
        scale=request.sampling.guidance,
        interval=request.sampling.guidance_interval,
    )


@torch.inference_mode()
def _draw_batch(model: LatentFlow, request: SampleRequest) -> Samples:
    began, sampling = time.perf_counter(), request.sampling
    velocity = _conditioned_velocity(model, request)
    solution = integrate(
        velocity,
        initial_noise(model, request.seeds),
        sampling_times(sampling.steps, sampling.shift),
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
