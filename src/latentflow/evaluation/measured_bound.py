"""The terms of the Wasserstein-2 bound of arXiv 2307.08698, measured on images.

The formula and its terms are in `analysis/bound.py`. Three choices are made here.

    condition  the label of each image, if both model and images have labels, and the named columns that the model
               requires; every other condition is null. Guidance is off. With conditions the bound is one for pairs of
               image and condition. A number that no two images share leaves one image for each velocity of the data.
    data       latents are drawn as in training: once from the posterior of each image, if the encoder has one.
    velocity   of the path, v, is that of the images' own latents (of one condition): `empirical_velocity`. The images
               are a sample of the data distribution, and v fits this sample more closely than any model can learn: in
               the mean, the error against it lies between the true error and the loss, and falls with the number of
               images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from latentflow.analysis.bound import (
    Estimate,
    Reconstruction,
    WassersteinBound,
    empirical_velocity,
    velocity_error,
)
from latentflow.analysis.lipschitz import TimeCurve, VelocityGrowth, largest_singular_value, lipschitz_along_paths
from latentflow.errors import ConfigError, NonFiniteError
from latentflow.evaluation.encoded_images import ReferenceLatents, Velocity, velocity_given
from latentflow.evaluation.request import BoundRequest
from latentflow.flow.solvers import integrate
from latentflow.flow.times import sampling_times
from latentflow.model.flow_model import FlowModel
from latentflow.model.own_images import is_trained_on
from latentflow.progress import image_progress
from latentflow.randomness import ImageRandom, derive_seed
from latentflow.shapes import Condition

_OWN_STEPS = 20  # of Heun's method on the model's own trajectories
_DATA_STEPS = 100  # of Euler's method on those of the data, whose last step ends on an image's latents


@dataclass(frozen=True)
class MeasuredBound:
    """A bound, and how it was measured.

    Attributes:
        request: as it was given.
        bound: its terms.
        coupling: sqrt(E|y - x|^2) of latents that the model (y) and the flow of the data (x) make from the same noise:
            what `WassersteinBound.flow_distance` bounds, up to the discretisation of the solvers.
        data: which images.
        told: the condition, in words.
        num_data: images whose latents stand for the data distribution.
        is_training_data: whether these are the very images that the model was trained on.
        seconds: in all.
    """

    request: BoundRequest
    bound: WassersteinBound
    coupling: Estimate
    data: str
    told: str
    num_data: int
    is_training_data: bool
    seconds: float = 0.0

    @property
    def farthest(self) -> float:
        """The largest distance of two images with values in [-1, 1]."""
        return 2 * math.sqrt(self.bound.reconstruction.elements)


def measure_bound(
    flow: FlowModel, reference: ReferenceLatents, reconstruction: Reconstruction, request: BoundRequest
) -> MeasuredBound:
    """The bound of a model on encoded images."""
    points, seed = request.points, request.seed
    loss, error = _velocity_errors(flow, reference, request)
    own, coupling = _own_trajectories(flow, reference, request)
    with image_progress("derivatives", 3 * points) as on_images:
        drawn = reference.rows(_draw(len(reference.indices), points, seed, "points"))
        noise = ImageRandom.at(seed, "noise of points", range(points)).normal(*drawn.latents.shape[1:])
        times = _spread_times(points, seed)
        states = flow.config.path.interpolate(drawn.latents.double(), noise.double(), times).float()
        growth = _growth(flow, states, times, drawn.given, request, on_images)
        growth = growth + _growth(flow, own.states, own.times, own.given, request, on_images)
        halves = torch.cat([drawn.latents[: points - points // 2], own.ends[: points // 2]])
        decoder = _decoder_constants(flow, halves, request, on_images)
    made = WassersteinBound(
        flow.config.path, reference.latents[0].numel(), reconstruction, decoder, growth, loss, error
    )
    return MeasuredBound(
        request=request,
        bound=made,
        coupling=coupling,
        data=reference.source.description,
        told=reference.told,
        num_data=len(reference.indices),
        is_training_data=is_trained_on(flow.config.training, reference.source),
    )


def data_velocity(flow: FlowModel, reference: ReferenceLatents, given: Condition) -> Velocity:
    """The velocity of the path if the data are the latents of `reference`; of those with the conditions `given` to each
    image."""
    path = flow.config.path
    if not given.names:
        return partial(empirical_velocity, path, reference.latents)
    wanted, found_there = _numbers(given), _numbers(reference.given)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        found = torch.empty_like(x)
        for one in wanted.unique(dim=0):
            rows, alike = (wanted == one).all(1), (found_there == one).all(1)
            found[rows] = empirical_velocity(path, reference.latents[alike], x[rows], time[rows])
        return found

    return velocity


def _numbers(given: Condition) -> Tensor:
    """Labels and columns of images as one row of numbers each: [B, n] float64; equal rows are equal conditions."""
    parts = [x.reshape(len(x), -1).double() for x in (given.labels, given.columns) if x is not None]
    return torch.cat(parts, dim=1)


def differentiable_decoder(flow: FlowModel) -> Callable[[Tensor], Tensor]:
    """The decoder as a differentiable function of latents [B, C, h, w]: `FlowModel.decode` without the clamp.

    The model's images are clamped to [-1, 1]. This is the projection onto a convex set (a cube), which is
    non-expansive: a Lipschitz constant of this function is also one of the clamped decoder, and it does not vanish
    where a pixel is white.
    """

    def decode(latents: Tensor) -> Tensor:
        return flow.autoencoder.model.decode(flow.config.normalisation.restore(latents), return_dict=False)[0].float()

    return decode


def _velocity_errors(
    flow: FlowModel, reference: ReferenceLatents, request: BoundRequest
) -> tuple[TimeCurve, TimeCurve]:
    """The loss and the error against the velocity of the data, for `num` draws in every bin.

    The network computes in float32; everything around it, above all the velocity of the data, in float64.
    """
    path, num, bins, seed = flow.config.path, request.num, request.bins, request.seed
    curves: list[tuple[TimeCurve, TimeCurve]] = []
    with image_progress("velocity error", num * bins) as on_images:
        for number in range(bins):
            rows = _draw(len(reference.indices), num, seed, f"bin {number}")
            times = (number + _spread_times(num, seed, f"bin {number}")) / bins
            for start in range(0, num, request.batch_size):
                batch = slice(start, start + request.batch_size)
                part, t = reference.rows(rows[batch]), times[batch]
                data, count = part.latents.double(), len(part.indices)
                positions = range(number * num + start, number * num + start + count)
                noise = ImageRandom.at(seed, "noise of draws", positions).normal(*data.shape[1:]).double()
                with torch.no_grad():  # once for both measurements
                    found = velocity_given(flow, part.given, count)(path.interpolate(data, noise, t), t)
                options = {"path": path, "data": data, "noise": noise, "time": t, "bins": bins}
                marginal = data_velocity(flow, reference, part.given)
                error = velocity_error(_constant(found), **options, marginal=marginal)
                curves.append((velocity_error(_constant(found), **options), error))
                on_images(count)
    loss, error = curves[0]
    for more_loss, more_error in curves[1:]:
        loss, error = loss + more_loss, error + more_error
    return loss, error


def _constant(value: Tensor) -> Velocity:
    return lambda x, time: value


@dataclass(frozen=True)
class _Own:
    """States [B, ...] on the model's own trajectories at their `times` [B], what is `given` and their `ends`."""

    states: Tensor
    times: Tensor
    given: Condition
    ends: Tensor


@torch.no_grad()
def _own_trajectories(flow: FlowModel, reference: ReferenceLatents, request: BoundRequest) -> tuple[_Own, Estimate]:
    """One state of each of `points` trajectories, at times spread over [0, 1], and the distance between the ends of the
    model's flow and the flow of the data from the same noise."""
    points, batch_size, seed = request.points, request.batch_size, request.seed
    given = reference.given.select(_draw(len(reference.indices), points, seed, "own"))
    noise = ImageRandom.at(seed, "noise of own", range(points)).normal(*reference.latents.shape[1:])
    grid = sampling_times(_OWN_STEPS)
    wanted = torch.linspace(0, _OWN_STEPS, points, dtype=torch.float64).round().long()
    states, ends, squares = noise.clone(), [], []
    with image_progress("own trajectories", points) as on_images:
        for start in range(0, points, batch_size):
            rows = slice(start, start + batch_size)
            here, steps, own = states[rows], wanted[rows], given.select(torch.arange(points)[rows])

            def keep(step: int, time: float, x: Tensor, here: Tensor = here, steps: Tensor = steps) -> None:
                here[steps == step] = x[steps == step]

            velocity = velocity_given(flow, own, len(here))
            end = integrate(velocity, noise[rows], grid, solver="heun", callback=keep).x
            exact = data_velocity(flow, reference, own)
            end_of_data = integrate(exact, noise[rows].double(), sampling_times(_DATA_STEPS), solver="euler").x
            ends.append(end)
            squares.append((end.double() - end_of_data).square().flatten(1).sum(1))
            on_images(len(here))
    if not torch.cat(ends).isfinite().all():
        raise NonFiniteError("the model's own trajectories do not stay finite")
    square = torch.cat(squares)
    distance = math.sqrt(float(square.mean()))
    deviation = float(square.std()) / math.sqrt(points) / (2 * distance) if distance else 0.0
    coupling = Estimate("distance of the flows from the same noise", distance, deviation, points, "none")
    return _Own(states, grid[wanted], given, torch.cat(ends)), coupling


def _growth(
    flow: FlowModel,
    states: Tensor,
    times: Tensor,
    given: Condition,
    request: BoundRequest,
    on_images: Callable[[int], None],
) -> VelocityGrowth:
    """The Lipschitz constants of the velocity at some states."""
    found = None
    for start in range(0, len(states), request.batch_size):
        rows = slice(start, start + request.batch_size)
        x = states[rows].to(flow.device)
        velocity = velocity_given(flow, given.select(torch.arange(len(states))[rows]), len(x))
        with _derivatives_of("network"):
            time, how = times[rows].to(flow.device, torch.float32), {"bins": request.bins, "seed": request.seed}
            part = lipschitz_along_paths(velocity, x, time, **how)
        found = part if found is None else found + part
        on_images(len(x))
    return found


def _decoder_constants(
    flow: FlowModel, latents: Tensor, request: BoundRequest, on_images: Callable[[int], None]
) -> Tensor:
    """The largest singular value of the decoder's derivative at each of the latents, [B]."""
    decode, found = differentiable_decoder(flow), []
    for part in latents.split(request.batch_size):
        with _derivatives_of("decoder"):
            found.append(largest_singular_value(decode, part.to(flow.device), seed=request.seed).value)
        on_images(len(part))
    return torch.cat(found)


@contextmanager
def _derivatives_of(what: str) -> Iterator[None]:
    """Explain in one line that something cannot be differentiated."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # as torch raises for a derivative that is not implemented
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the {what} of this model cannot be differentiated twice: {reason}") from error


def _draw(total: int, count: int, seed: int, purpose: str) -> Tensor:
    """`count` of `total` images at random, none twice unless there are too few."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "bound", purpose))
    orders = [torch.randperm(total, generator=generator) for _ in range(-(-count // total))]
    return torch.cat(orders)[:count]


def _spread_times(count: int, seed: int, purpose: str = "points") -> Tensor:
    """One time in each of `count` equal parts of [0, 1], in a random order: [count] float64, above 0."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "times", purpose))
    within = torch.rand(count, generator=generator, dtype=torch.float64).clamp(min=1e-3)
    return (torch.randperm(count, generator=generator) + within) / count
