"""From a drawing to images; `latentflow.sampling.drawing` defines what a drawing is.

    noise, one stream per seed  ->  condition and null condition  ->  solver over the guided velocity  ->  decode

Images never influence each other: image i of a drawing is the same in any batch and on any number of processes.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import latentflow
from latentflow.artifacts import sha256_tensors
from latentflow.errors import ConfigError, NonFiniteError
from latentflow.flow.composition import BlendedVelocity, KnownRegionVelocity
from latentflow.flow.guidance import AverageVelocity, ConditionedVelocity, Guide
from latentflow.flow.solvers import Solution, Tolerance, Velocity, fitted_evaluations, integrate
from latentflow.flow.times import sampling_times
from latentflow.model.flow_model import FlowModel
from latentflow.networks.running import is_compiled
from latentflow.pixel_format import RGB
from latentflow.randomness import ImageRandom
from latentflow.sampling.captured_calls import Calls, calls_for, plainly
from latentflow.sampling.cost import announce_cost
from latentflow.sampling.drawing import (
    Drawing,
    blended_towards,
    check_drawing,
    guide_of,
    guided_by,
    make_drawing,
    require_count,
)
from latentflow.sampling.guides import guide_condition, shared_conditions
from latentflow.sampling.named_conditions import NamedValue, condition_rows
from latentflow.sampling.request import SampleRequest
from latentflow.sampling.samples import Samples, join_samples
from latentflow.shapes import Condition, per_image, send
from latentflow.sizes import Size

MOST_TOGETHER = 65_536
"""Images in one batch."""
MOST_BYTES = 8 * 2**30
"""Of pictures held in memory at once."""
_FIELDS = ("masked_latents", "mask", "class_fractions", "input", "columns")  # of a condition, besides labels
_ROUNDING = {"tf32": 2.0**-10, "bf16": 2.0**-7, "fp16": 2.0**-10}  # of a network's products


@dataclass(frozen=True)
class Given:
    """The tensors that images are drawn from, in addition to seeds and labels; one row per image, or one row for all.

    Attributes:
        masked_latents: [B, C, h, w], condition: latents of the known part of an image.
        mask: [B, 1, h, w], condition: fraction of each latent pixel in the hole; with `masked_latents`.
        class_fractions: [B, K, h, w], condition: the semantic map.
        input: [B, I, h, w], condition: the paired image.
        columns: [B, W], the values of named conditions; in place of those of the drawing.
        noise: [B, C, h, w], replaces the noise of the seeds.
        latents: [B, C, h, w] of an image to start from, at x_t of the path for t = the drawing's `start`.
        hole: [B, 1, h, w] of 0 and 1; outside it the state follows the path to `latents`.
    """

    masked_latents: Tensor | None = None
    mask: Tensor | None = None
    class_fractions: Tensor | None = None
    input: Tensor | None = None
    columns: Tensor | None = None
    noise: Tensor | None = None
    latents: Tensor | None = None
    hole: Tensor | None = None

    def at(self, rows: slice | list[int]) -> Given:
        """The same for some of the images."""
        return Given(**{name: x if x is None or len(x) == 1 else x[rows] for name, x in vars(self).items()})

    def on(self, device: torch.device, num_images: int) -> dict[str, Tensor | None]:
        """Each tensor on `device`, with one row per image."""
        return {
            name: None if x is None else send(x, device).expand(num_images, *[-1] * (x.dim() - 1))
            for name, x in vars(self).items()
        }


@dataclass(frozen=True)
class Prepared:
    """A request that was checked, and is ready to be drawn.

    Attributes:
        given: computes the tensors that it is drawn from; called once, where the model computes.
        finish: turns what the model draws into what was asked for: an image with its hole filled.
        together: images in one batch, at most.
    """

    drawing: Drawing
    given: Callable[[], Given] = Given
    finish: Callable[[Samples], Samples] = lambda samples: samples
    together: int = 16


def draw_prepared(model: FlowModel, prepared: Prepared, **options: Any) -> Samples:
    """Compute what was prepared, in memory; the options are those of `draw`."""
    return prepared.finish(draw_all(model, prepared.drawing, prepared.given(), **options))


def draw(
    model: FlowModel,
    drawing: Drawing,
    given: Given = Given(),
    *,
    batch_size: int = 16,
    calls: Calls | None = None,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Iterator[Samples]:
    """Compute a drawing batch by batch.

    Args:
        given: the tensors that it is drawn from, in addition to seeds and labels.
        batch_size: images computed together; it changes speed and memory, not the pictures.
        calls: how the network is called; None: as is fastest on the device. Graphs are captured once for all drawings
            that share it.
        on_images: called with the number of images just finished.
    """
    check_drawing(model, drawing)
    require_count("batch size", batch_size, 1, MOST_TOGETHER, "16 are usual")
    announce_cost(model, drawing, batch_size)
    parts = [slice(start, start + batch_size) for start in range(0, len(drawing.seeds), batch_size)]
    batches = ((drawing.at(rows), given.at(rows)) for rows in parts)
    for samples in draw_batches(model, batches, batch_size, calls):
        yield samples
        on_images(len(samples.pixels))


def draw_batches(
    model: FlowModel, batches: Iterable[tuple[Drawing, Given]], batch_size: int, calls: Calls | None = None
) -> Iterator[Samples]:
    """Draw batches one after another; a GPU draws the next batch while the caller processes the last one.

    Args:
        batch_size: batches of a compiled network are padded to it: another size would be compiled again.
        calls: how the network is called; None: as is fastest on the device.
    """
    size = batch_size if is_compiled(model.network) else 0
    ahead = _batches_ahead(model.device)
    begun: deque[_Begun] = deque()
    for drawing, given in batches:
        calls = calls or calls_for(model.device, drawing)
        try:
            begun.append(_begin(model, drawing, given, size, calls))
        except NonFiniteError:  # the batches before are not lost
            yield from (batch.arrived() for batch in begun)
            raise
        if len(begun) > ahead:
            yield begun.popleft().arrived()
    yield from (batch.arrived() for batch in begun)


def draw_all(model: FlowModel, drawing: Drawing, given: Given = Given(), **options: Any) -> Samples:
    """Compute a whole drawing in memory; the options are those of `draw`.

    Raises:
        ConfigError: the pictures would need more than `MOST_BYTES`.
    """
    size = drawing.image_size or model.config.image_size
    most = MOST_BYTES // (model.config.pixel_format.bytes_per_pixel * size.area)
    if len(drawing.seeds) > most:
        raise ConfigError(
            f"{len(drawing.seeds):,} images of {size.words} pixels at once in memory: at most {most:,}; draw "
            "fewer, or write them with `latentflow sample`"
        )
    return join_samples(list(draw(model, drawing, given, **options)))


def sample(
    model: FlowModel,
    request: SampleRequest,
    *,
    noise: Tensor | None = None,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Samples:
    """Draw images into memory.

    Args:
        noise: [num, C, h, w] to start from instead of the seeds' noise, for example from `invert`.

    Raises:
        ConfigError: see `make_drawing`; also for noise of another shape.
    """
    drawing = make_drawing(model, request)
    if noise is not None:
        sides = (drawing.image_size or model.config.image_size).over(model.config.autoencoder.factor)
        wanted = (request.num, model.config.autoencoder.num_channels, *sides)
        if tuple(noise.shape) != wanted:
            raise ConfigError(
                f"noise of shape {list(noise.shape)}; {request.num} images of this model need {list(wanted)}"
            )
        drawing = naming_noise(drawing, noise)
    return draw_all(model, drawing, Given(noise=noise), batch_size=batch_size, on_images=on_images)


def naming_noise(drawing: Drawing, noise: Tensor) -> Drawing:
    """The drawing with the hash of the noise that replaces that of its seeds."""
    origin = f"sha256:{sha256_tensors({'noise': noise})[:12]}"
    return drawing.model_copy(update={"inputs": {**drawing.inputs, "noise": origin}})


def initial_noise(model: FlowModel, drawing: Drawing) -> Tensor:
    """The Gaussian noise each image of a drawing starts from, [B, C, h, w] float32; equal on every device.

    A blend lies between the noises of two seeds on a great circle, where Gaussian noise has its usual length:
    cos(w pi/2) a + sin(w pi/2) b is again standard normal, as a and b are independent.
    """
    own = _noise(model, drawing.seeds, drawing.image_size)
    if not drawing.blends:
        return own
    other = _noise(model, [blend.seed for blend in drawing.blends], drawing.image_size)
    same = torch.tensor([b.seed == seed for b, seed in zip(drawing.blends, drawing.seeds, strict=True)])
    angle = torch.tensor([blend.weight for blend in drawing.blends]).masked_fill(same, 0) * (math.pi / 2)
    return per_image(angle.cos(), own) * own + per_image(angle.sin(), own) * other


def _noise(model: FlowModel, seeds: Sequence[int], image_size: Size | None) -> Tensor:
    random = ImageRandom.of_seeds("sample", seeds, model.device)
    channels, *sides = model.config.latent_shape
    if image_size is not None:
        sides = image_size.over(model.config.autoencoder.factor)
    return random.normal(channels, *sides)


def conditioned_velocity(
    model: FlowModel,
    drawing: Drawing,
    given: Mapping[str, Tensor | None],
    latents_shape: Sequence[int],
    calls: Calls = plainly,
) -> ConditionedVelocity | BlendedVelocity:
    """The guided velocity of a drawing's images, in the drawing's precision; `given` as from `Given.on`."""
    conditioning, network = model.config.conditioning, calls(model.computing_in(drawing.precision))
    sampling, guide, student = drawing.sampling, guide_of(model, drawing), model.config.student

    def guided_away(labels: Sequence[int], others: Mapping[str, Tensor | None]) -> Guide:
        shared = shared_conditions(model, guide, drawing.told, sampling.guided_by)
        condition = guide_condition(model, guide, shared, labels, others, latents_shape)
        return Guide(calls(guide.flow.computing_in(drawing.precision)), condition, guide.cost)

    def conditioned_on(labels: Sequence[int], named: Mapping[str, Sequence[NamedValue]]) -> ConditionedVelocity:
        label = {"labels": send(torch.tensor(labels), model.device)} if labels else {}
        others = {field: given.get(field) for field in _FIELDS}
        if others["columns"] is None and named:
            others["columns"] = send(condition_rows(conditioning, named, latents_shape[0]), model.device)
        condition = conditioning.build(latents_shape, model.device, Condition(**label, **others))
        if student is not None:
            scale = torch.full((latents_shape[0],), sampling.guidance, device=model.device)
            return AverageVelocity(network, replace(condition, guidance=scale if student.guided else None))
        guided = guided_by(model, drawing) if sampling.guidance != 1 and guide is None else []
        return ConditionedVelocity(
            network,
            condition,
            conditioning.without(condition, guided) if guided else None,
            sampling.guidance,
            sampling.guidance_interval,
            sampling.guided_channels,
            None if guide is None else guided_away(labels, others),
        )

    first = conditioned_on(drawing.labels, drawing.conditions)
    if all(blend.label is None and not blend.conditions for blend in drawing.blends):
        return first
    weights = send(torch.tensor([blend.weight for blend in drawing.blends]), model.device)
    return BlendedVelocity(first, conditioned_on(*blended_towards(drawing)), weights)


def solve(model: FlowModel, drawing: Drawing, velocity: Velocity, x: Tensor, times: Tensor) -> Solution:
    """Integrate the velocity of a drawing's images from x at times[0] to times[-1], with the drawing's solver.

    A fitted solver takes its own times from t = 1 to t = 0, whatever `times` are.
    """
    sampling = drawing.sampling
    solver = sampling.solver
    if fitted_evaluations(solver) is not None:
        _, solver = model.fitted_solver(solver)
        times = torch.tensor(solver.times, dtype=torch.float64)
    computed = "fp32" if drawing.precision == "tf32" and not x.is_cuda else drawing.precision
    return integrate(
        velocity,
        x,
        times,
        solver=solver,
        path=model.config.path,
        tolerance=Tolerance(sampling.rtol, sampling.atol, _ROUNDING.get(computed)),
    )


def drawn_by(model: FlowModel) -> dict[str, Any]:
    """The origin of pictures, as their metadata states it: the program, the model and its weights.

    A pixel format other than 8-bit RGB is there as well.
    """
    training, pixel_format = model.config.training, model.config.pixel_format
    return {
        "latentflow": latentflow.__version__,
        "model": model.reference,
        "weights": model.weights_hash[:12],
        "autoencoder": model.config.autoencoder.content_hash[:12],
        "trained_on": training.data_fingerprint[:12],
        "images_seen": training.images_seen,
        **({} if pixel_format == RGB else {"pixel_format": pixel_format.model_dump(mode="json")}),
    }


@torch.inference_mode()
def _begin(model: FlowModel, drawing: Drawing, given: Given, size: int = 0, calls: Calls = plainly) -> _Begun:
    """Queue a batch of pictures on the device; with fixed steps, without waiting for any of it.

    Args:
        size: the least size of the batch that is computed: it is padded with copies of its last picture.
    """
    watch, sampling, path, num = _Stopwatch(model.device), drawing.sampling, model.config.path, len(drawing.seeds)
    whole = drawing
    if num < size:
        rows = [min(row, num - 1) for row in range(size)]
        whole, given = drawing.at(rows), given.at(rows)
    inputs = given.on(model.device, len(whole.seeds))
    noise = initial_noise(model, whole) if inputs["noise"] is None else inputs["noise"]
    velocity, x = conditioned_velocity(model, whole, inputs, noise.shape, calls), noise
    if inputs["latents"] is not None:
        x = path.interpolate(inputs["latents"], noise, torch.full((len(noise),), drawing.start, device=noise.device))
    if inputs["hole"] is not None:
        velocity = KnownRegionVelocity(velocity, path, inputs["latents"], noise, inputs["hole"])
    times = sampling_times(sampling.steps, sampling.shift, start=drawing.start)
    end = solve(model, drawing, velocity, x, times).x[:num]
    pixels, latents = (_fetched(tensor) for tensor in (model.pixels(end), end.float()))
    watch.stop()
    return _Begun(model, drawing, pixels, latents, velocity.evaluations[:num], watch)


@dataclass(frozen=True)
class _Begun:
    """A batch that a GPU may still be computing; `arrived` waits for it."""

    model: FlowModel
    drawing: Drawing
    pixels: Tensor
    latents: Tensor
    evaluations: Tensor
    watch: _Stopwatch

    def arrived(self) -> Samples:
        seconds = self.watch.seconds()
        if (wrong := ~self.latents.isfinite().flatten(1).all(1)).any():
            seed = self.drawing.seeds[int(wrong.nonzero()[0])]
            remedy = "try more steps or less guidance; if that does not help, the weights are damaged"
            if self.drawing.precision == "fp16":
                remedy = "the network may exceed the range of fp16: use --precision bf16 or tf32"
            raise NonFiniteError(f"the latents of seed {seed} are not finite, so there is no picture; {remedy}")
        return Samples(
            pixels=self.pixels,
            latents=self.latents,
            evaluations=self.evaluations,
            drawing=self.drawing,
            class_names=tuple(self.model.config.conditioning.class_names),
            drawn_by=partial(drawn_by, self.model),
            seconds=seconds,
            pixel_format=self.model.config.pixel_format,
        )


def _batches_ahead(device: torch.device) -> int:
    """How many batches are queued before the first one is waited for; none on a device that computes synchronously."""
    return 1 if device.type == "cuda" else 0


class _Stopwatch:
    """Time on the device between two points of the program; on a GPU measured by CUDA events."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks = [self._mark()]

    def stop(self) -> None:
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """Waits until the device has reached the second point."""
        began, ended = self._marks
        if self._device.type != "cuda":
            return ended - began
        ended.synchronize()
        return began.elapsed_time(ended) / 1000

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _fetched(x: Tensor) -> Tensor:
    """Copy a tensor to the host; from a GPU asynchronously, into pinned memory."""
    return x.to("cpu", non_blocking=x.is_cuda)
