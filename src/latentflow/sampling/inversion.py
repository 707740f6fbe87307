"""Inversion: the noise that an image would be drawn from.

    image => latents z => noise => z' => image        the same velocity, integrated from t = 0 to t = 1 and back

The flow is an ordinary differential equation, so only the error of the solver separates z and z'. A small difference
does not mean that the noise is right, though: a solver that takes the same steps back cancels much of its own error,
even orders (heun, rk4) more than odd ones. `compare_round_trips` therefore also measures the error of the noise.

Legend: B images, C latent channels, h and w latent height and width, S side of the square images in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentflow.data.pictures.shown import as_levels
from latentflow.data.pictures.user_picture import psnr
from latentflow.errors import ConfigError
from latentflow.flow.solvers import is_adaptive
from latentflow.flow.times import sampling_times
from latentflow.model.class_names import ClassList
from latentflow.model.flow_model import FlowModel
from latentflow.sampling.call_cost import call_count
from latentflow.sampling.captured_calls import calls_for
from latentflow.sampling.drawing import Drawing, make_drawing
from latentflow.sampling.inputs import ImageInput, at_most_one, encode_input, read_input
from latentflow.sampling.named_conditions import ends_of
from latentflow.sampling.pipeline import Given, conditioned_velocity, draw_all, naming_noise, solve
from latentflow.sampling.request import InvertRequest, SampleRequest
from latentflow.sampling.samples import Samples
from latentflow.sampling.student import require_few

ROUND_TRIPS: tuple[dict[str, Any], ...] = (
    *({"solver": "euler", "steps": steps} for steps in (8, 16, 32, 64)),
    *({"solver": "heun", "steps": steps} for steps in (4, 8, 16, 32)),
    *({"solver": "rk4", "steps": steps} for steps in (2, 4, 8, 16)),
    *({"solver": "ab2", "steps": steps} for steps in (7, 15, 31, 63)),
    *({"solver": "dopri5", "rtol": tolerance, "atol": tolerance} for tolerance in (1e-2, 1e-3, 1e-4, 1e-5)),
)
"""The default of `compare_round_trips`: 8, 16, 32 and 64 evaluations, or four tolerances."""

REFERENCE: dict[str, Any] = {"solver": "rk4", "steps": 200}
"""The solver of the noise to compare with; this close to the limit, fixed steps need fewer evaluations."""


@dataclass(frozen=True)
class Inversion:
    """The noise that an image would be drawn from; all tensors on the CPU.

    Attributes:
        noise: [1, C, h, w] float32, x_t at t = 1.
        latents: [1, C, h, w] float32, the encoded image, x_t at t = 0.
        pixels: [1, 3, S, S] uint8, the image as the model sees it.
        evaluations: network calls from data to noise.
        drawing: the solver and the class from data to noise.
    """

    noise: Tensor
    latents: Tensor
    pixels: Tensor
    evaluations: float
    drawing: Drawing

    def round_trip(self, model: FlowModel) -> RoundTrip:
        """Draw the image again from its noise, with the same solver and class."""
        return self.compared(model, draw_all(model, naming_noise(self.drawing, self.noise), Given(noise=self.noise)))

    def compared(self, model: FlowModel, drawn: Samples) -> RoundTrip:
        """The image beside `drawn`, what was drawn from its noise."""
        autoencoded = _decode(model, self.latents)
        return RoundTrip(
            samples=drawn,
            autoencoded=autoencoded,
            evaluations=call_count(drawn.evaluations),
            latent_error=float(_relative_error(drawn.latents, self.latents)),
            solver_psnr=float(_psnr(model, autoencoded, drawn.pixels)),
            autoencoder_psnr=float(_psnr(model, self.pixels, autoencoded)),
            image_psnr=float(_psnr(model, self.pixels, drawn.pixels)),
        )


@dataclass(frozen=True)
class RoundTrip:
    """How well an image is recovered: z its latents, z' those drawn from its noise, g the decoder.

    Attributes:
        samples: the image drawn again, z' and g(z').
        autoencoded: [1, 3, S, S] uint8, g(z): the best that any inversion can reach.
        evaluations: network calls from noise to data.
        latent_error: |z' - z| / |z|.
        solver_psnr: dB between g(z) and g(z'), what the two integrations lose.
        autoencoder_psnr: dB between the image and g(z), what the autoencoder loses.
        image_psnr: dB between the image and g(z'), both losses together.
    """

    samples: Samples
    autoencoded: Tensor
    evaluations: float
    latent_error: float
    solver_psnr: float
    autoencoder_psnr: float
    image_psnr: float


def invert(model: FlowModel, image: ImageInput, request: InvertRequest | None = None) -> Inversion:
    """Find the noise that an image would be drawn from: its latents, integrated from t = 0 to t = 1.

    `model.sample(noise=inversion.noise, classes=[], guidance=1)` draws the image again; with another class than that of
    the inversion, it draws an edit of the image.

    Args:
        image: of any size; its middle, of the shape of most training images, is scaled to their size.
        request: more evaluations recover the image better. Guidance is 1 unless it is given, whatever the preset says:
            only the velocity without guidance transports noise to data, and the larger the scale, the less the noise of
            a real image resembles Gaussian noise. A student, which does not jump back, takes heun.

    Raises:
        ConfigError, DataError: before anything is computed.
    """
    request = request or InvertRequest()
    pixels, inputs = read_input(model, image, model.config.image_size)
    ends_of(model.config.conditioning, request.conditions, most=1)
    given = {"classes": at_most_one(model, request.classes), "conditions": request.conditions}
    asked = SampleRequest(num=1, **given, **preset_of_inversion(model, request))
    drawing = make_drawing(model, asked, task="invert", inputs=inputs)
    latents = encode_input(model, pixels)
    noise, evaluations = _to_noise(model, latents, drawing)
    return Inversion(noise, latents, pixels, call_count(evaluations), drawing)


def preset_of_inversion(model: FlowModel, request: InvertRequest) -> dict[str, Any]:
    """The fields of a sampling preset that an inversion sets: those that are asked for, and no guidance.

    Raises:
        RequestError: jumps are asked for.
    """
    require_few(model.config, request.evaluations, "invert")
    usual = {"guidance": 1.0} if model.config.student is None else {"guidance": 1.0, "solver": "heun"}
    return {**usual, **request.preset()}


@dataclass(frozen=True)
class RoundTripRow:
    """The round trip of one solver, as means over images; see `RoundTrip`.

    Attributes:
        steps: of a fixed-step solver, else None.
        tolerance: rtol of an adaptive solver, else None.
        evaluations_there, evaluations_back: network calls per image to the noise, and from it.
        noise_error: |noise - reference| / |reference|, where the reference is the noise of 200 steps of rk4.
    """

    solver: str
    steps: int | None
    tolerance: float | None
    evaluations_there: float
    evaluations_back: float
    noise_error: float
    latent_error: float
    solver_psnr: float


def compare_round_trips(
    model: FlowModel,
    images: Sequence[ImageInput],
    settings: Sequence[Mapping[str, Any]] | None = None,
    *,
    classes: ClassList | None = None,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> list[RoundTripRow]:
    """Invert images and draw them again with each setting: error against solver and evaluations.

    Args:
        settings: fields of `SamplingPreset`; None: `ROUND_TRIPS`. Guidance is always 1.
        classes: cycled over the images; None: no label.
        on_images: called with the number of images just drawn again.

    Raises:
        ConfigError, DataError: before anything is computed.
    """
    if not images:
        raise ConfigError("no images to invert; give at least one")
    settings = ROUND_TRIPS if settings is None else settings
    reference, *drawings = (
        make_drawing(
            model, SampleRequest(num=len(images), classes=classes, **{**setting, "guidance": 1.0}), task="invert"
        )
        for setting in (REFERENCE, *settings)
    )
    pixels = torch.cat([read_input(model, image, model.config.image_size)[0] for image in images])
    latents = encode_input(model, pixels)
    autoencoded = _decode(model, latents)
    right, _ = _to_noise(model, latents, reference, batch_size)
    rows = []
    for drawing in drawings:
        noise, there = _to_noise(model, latents, drawing, batch_size)
        drawn = draw_all(model, drawing, Given(noise=noise), batch_size=batch_size, on_images=on_images)
        sampling = drawing.sampling
        adaptive = is_adaptive(sampling.solver)
        rows.append(
            RoundTripRow(
                solver=sampling.solver,
                steps=None if adaptive else sampling.steps,
                tolerance=sampling.rtol if adaptive else None,
                evaluations_there=float(there.double().mean()),
                evaluations_back=drawn.mean_evaluations,
                noise_error=float(_relative_error(noise, right).mean()),
                latent_error=float(_relative_error(drawn.latents, latents).mean()),
                solver_psnr=float(_psnr(model, autoencoded, drawn.pixels).mean()),
            )
        )
    return rows


@torch.inference_mode()
def _to_noise(model: FlowModel, latents: Tensor, drawing: Drawing, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """dx/dt = velocity(x, t) from x = latents at t = 0 to t = 1: noise [B, C, h, w] and evaluations [B], on the CPU."""
    noise, evaluations = [], []
    sampling, calls = drawing.sampling, calls_for(model.device, drawing)
    times = sampling_times(sampling.steps, sampling.shift, start=0.0, end=1.0)
    for start in range(0, len(latents), batch_size):
        rows = slice(start, start + batch_size)
        x = latents[rows].to(model.device)
        velocity = conditioned_velocity(model, drawing.at(rows), {}, x.shape, calls)
        solution = solve(model, drawing, velocity, x, times)
        noise.append(solution.x.cpu())
        evaluations.append(velocity.evaluations)
    return torch.cat(noise), torch.cat(evaluations)


def _decode(model: FlowModel, latents: Tensor) -> Tensor:
    """latents [B, C, h, w] => stored values [B, P, S, S], on the CPU."""
    return model.pixels(latents.to(model.device)).cpu()


def _psnr(model: FlowModel, pixels: Tensor, other: Tensor) -> Tensor:
    """dB between stored values of the model's format, of which the range is the peak: [B, P, S, S] twice => [B]."""
    return psnr(*(as_levels(one, model.config.pixel_format) for one in (pixels, other)))


def _relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """|found - wanted| / |wanted| of each image: [B, C, h, w] => [B]."""
    error: Tensor = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    return error
