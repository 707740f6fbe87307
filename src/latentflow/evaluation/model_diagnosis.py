"""A model measured on images: its loss, trajectories, latents, copies of training images, and distance to the data.

Half of the images are compared with the other half, and with samples, of which there are as many if nothing else is
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentflow.analysis.bound import velocity_error
from latentflow.analysis.diagnosis import (
    Diagnosis,
    Floor,
    LatentStatistics,
    LossByTime,
    Memorisation,
    Nearness,
    TrajectoryShapes,
    baseline_loss,
    channel_moments,
    nearness,
    radial_spectrum,
)
from latentflow.analysis.latent_space import measure_latent_space
from latentflow.analysis.trajectories import follow
from latentflow.data.items import ImageSource
from latentflow.data.pictures.shown import as_shown
from latentflow.errors import DataError
from latentflow.evaluation.encoded_images import ReferenceLatents, encode_reference, velocity_given
from latentflow.evaluation.model_features import open_features_for
from latentflow.evaluation.request import LEAST_EXAMINED, DiagnoseRequest
from latentflow.flow.times import sampling_times
from latentflow.metrics.features.extractors import FeatureExtractor
from latentflow.metrics.resampling import interval_over_images
from latentflow.metrics.scores import frechet_contributions, frechet_distance
from latentflow.metrics.statistics import FeatureStatistics
from latentflow.model.flow_model import FlowModel
from latentflow.model.own_images import is_own, is_trained_on, part_of_own
from latentflow.progress import image_progress
from latentflow.randomness import ImageRandom
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.pipeline import Given, conditioned_velocity, draw_all, initial_noise
from latentflow.sampling.request import SampleRequest
from latentflow.sampling.row_conditions import drawing_of_rows
from latentflow.sampling.samples import Samples

_BINS = 10
_LOOKS = 4  # times at which the loss of each image is measured
_MOST_WAYS, _WAY_STEPS = 64, 40
_PAIRS = 8  # shown on each sheet
_MOST_ENCODED = 64  # images whose turned and shrunken versions are encoded
_TWIN = 1e-5  # relative distance of features below which two images are the same


@dataclass(frozen=True)
class Examined:
    """Images by their latents and features, on the CPU.

    Attributes:
        latents: with labels and their source.
        features: [N, D] of the images.
        reconstructed: [N, D] of their reconstructions; None if they were not needed.
    """

    latents: ReferenceLatents
    features: Tensor
    reconstructed: Tensor | None = None

    def rows(self, rows: slice | Tensor) -> Examined:
        """A part of the images."""
        reconstructed = None if self.reconstructed is None else self.reconstructed[rows]
        return Examined(self.latents.rows(rows), self.features[rows], reconstructed)

    def pictures(self, rows: Sequence[int]) -> Tensor:
        """The pixels of some images, read again: [B, P, H, W]."""
        source = self.latents.source
        pixels = [source[self.latents.indices[row]].pixels for row in rows]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def held_out_and_trained(flow: FlowModel, source: ImageSource) -> tuple[ImageSource, ImageSource] | None:
    """The images of a model's own data that were held out, and those that it was trained on; of its usual size.

    None: these are not its own, or fewer were held out than a diagnosis needs.
    """
    training, size = flow.config.training, flow.config.image_size
    if training.held_out is None or not is_own(training, source):
        return None
    try:
        held_out, trained = (part_of_own(training, source, split, size) for split in ("held-out", "training"))
    except DataError:  # none of that size
        return None
    return None if len(held_out) < LEAST_EXAMINED else (held_out, trained)


def measure_diagnosis(
    flow: FlowModel, source: ImageSource, train_source: ImageSource | None, request: DiagnoseRequest
) -> tuple[Diagnosis, dict[str, Tensor]]:
    """Measure a model on images.

    Args:
        source: best held-out images.
        train_source: training images, for the memorisation test and for overfitting; None: half of `source` stands for
            them.

    Returns:
        The diagnosis but its `seconds`; and sheets of pictures by name, [rows, columns, 3, H, W].

    Raises:
        DataError: too few images can be read.
        NonFiniteError: the model's numbers are not finite.
    """
    half, num, batch_size = request.num // 2, request.num_drawn, request.batch_size
    asked = SampleRequest(num=num, seed=request.seed, guidance=request.guidance, guide=request.guide)
    network = open_features_for(flow, request.features)
    examined = _examine(flow, source, network, request, least=request.num, reconstruct=True)
    rows = examined.latents.for_others(request.seed)
    drawing, given = drawing_of_rows(flow, asked, rows)
    training = None
    if train_source is not None:
        training = _examine(flow, train_source, network, request, num=request.num_train)
    with image_progress("drawing", num) as on_images:
        samples = draw_all(flow, drawing, given, batch_size=batch_size, on_images=on_images)
    features = torch.cat([network(part).cpu() for part in samples.pixels.split(batch_size)])
    first, second = examined.rows(slice(0, half)), examined.rows(slice(half, 2 * half))
    memorisation, pairs = _memorisation(flow, samples, features, first, second, training, network.name)
    diagnosis = Diagnosis(
        request=request.model_dump(mode="json"),
        model=request.model,
        data=source.description,
        is_training_data=is_trained_on(flow.config.training, source),
        told=examined.latents.told,
        sampling=drawing.sampling.in_words,
        num=request.num,
        loss=_loss(flow, examined.latents, request),
        training_loss=_training_loss(flow, training, request),
        ways=_trajectories(flow, drawing, given, batch_size),
        latents=_latent_statistics(samples.latents, examined.latents.latents, half),
        memorisation=memorisation,
        floor=_floor(network, features, first, second),
        latent_space=measure_latent_space(
            flow.encode, flow.config.pixel_format.to_unit(first.pictures(range(half)[:_MOST_ENCODED]))
        ),
        seconds=0.0,
    )
    return diagnosis, pairs


def _examine(
    flow: FlowModel,
    source: ImageSource,
    network: FeatureExtractor,
    request: DiagnoseRequest,
    *,
    num: int | None = None,
    least: int = 2,
    reconstruct: bool = False,
) -> Examined:
    features: list[Tensor] = []
    reconstructed: list[Tensor] = []

    def visit(pixels: Tensor, latents: Tensor) -> None:
        features.append(network(pixels).cpu())
        if reconstruct:
            reconstructed.append(network(flow.pixels(latents)).cpu())

    how = {"least": least, "batch_size": request.batch_size, "seed": request.seed, "visit": visit}
    latents, _ = encode_reference(flow, source, num or request.num, **how)
    latents = latents.with_columns(flow.config.conditioning)
    return Examined(latents, torch.cat(features), torch.cat(reconstructed) if reconstruct else None)


def _training_loss(flow: FlowModel, training: Examined | None, request: DiagnoseRequest) -> LossByTime | None:
    """Of as many training images as are examined; None of few, which leave bins of time without a spread."""
    if training is None or len(training.features) < LEAST_EXAMINED:
        return None
    return _loss(flow, training.latents.rows(slice(0, request.num)), request)


def _loss(flow: FlowModel, reference: ReferenceLatents, request: DiagnoseRequest) -> LossByTime:
    """The loss of each image at some times, spread evenly over [0, 1]."""
    path, count, curve = flow.config.path, len(reference.indices), None
    batch_size, seed = request.batch_size, request.seed
    elements = reference.latents[0].numel()
    total = _LOOKS * count
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    times = (order.double() + 0.5) / total
    with image_progress("loss", total) as on_images, torch.no_grad():
        for start in range(0, total, batch_size):
            places = range(start, min(start + batch_size, total))
            part = reference.rows(torch.tensor([place % count for place in places]))
            noise = ImageRandom.at(seed, "diagnose", places).normal(*part.latents.shape[1:])
            velocity = velocity_given(flow, part.given, len(part.indices))
            drawn = velocity_error(velocity, path, part.latents, noise, times[list(places)], bins=_BINS)
            curve = drawn if curve is None else curve + drawn
            on_images(len(places))
    return LossByTime(
        data=reference.source.description,
        times=curve.times.tolist(),
        loss=(curve.filled().mean / elements).tolist(),
        standard_error=(curve.standard_error / elements).tolist(),
        baseline=_mean_baseline(flow, reference.latents),
    )


def _mean_baseline(flow: FlowModel, latents: Tensor) -> list[float]:
    """The baseline's mean over each bin, of 20 times within it."""
    fine = (torch.arange(20 * _BINS, dtype=torch.float64) + 0.5) / (20 * _BINS)
    losses = torch.tensor(baseline_loss(flow.config.path, latents, fine), dtype=torch.float64)
    return losses.reshape(_BINS, 20).mean(1).tolist()


def _trajectories(flow: FlowModel, drawing: Drawing, given: Given, batch_size: int) -> list[TrajectoryShapes]:
    """Trajectories of the first samples, with the guidance they are drawn with and, if there is any, without."""
    few = drawing.at(slice(0, min(len(drawing.seeds), _MOST_WAYS)))
    plain = few.model_copy(update={"sampling": few.sampling.model_copy(update={"guidance": 1.0, "guided_by": None})})
    chosen = [few] if few.sampling.guidance == 1 else [few, plain]
    with image_progress("trajectories", len(chosen) * len(few.seeds)) as on_images:
        return [_followed(flow, one, given, batch_size, on_images) for one in chosen]


def _followed(
    flow: FlowModel, drawing: Drawing, given: Given, batch_size: int, on_images: Callable[[int], None]
) -> TrajectoryShapes:
    ways = None
    for start in range(0, len(drawing.seeds), batch_size):
        rows = slice(start, min(start + batch_size, len(drawing.seeds)))
        part = drawing.at(rows)
        noise = initial_noise(flow, part)
        velocity = conditioned_velocity(flow, part, given.at(rows).on(flow.device, len(noise)), noise.shape)
        followed = follow(velocity, noise, sampling_times(_WAY_STEPS))
        ways = followed if ways is None else ways + followed
        on_images(len(noise))
    straightness = ways.straightness
    tails = torch.quantile(straightness, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    return TrajectoryShapes(
        guidance=drawing.sampling.guidance,
        num=len(straightness),
        straightness=float(straightness.mean()),
        straightness_error=float(straightness.std() / len(straightness) ** 0.5) if len(straightness) > 1 else 0.0,
        straightness_quantiles=(tails[0], tails[1]),
        total_turning=float(ways.total_turning.mean()),
        times=ways.middles.tolist(),
        turning=ways.turning.mean(0).tolist(),
    )


def _latent_statistics(samples: Tensor, data: Tensor, half: int) -> LatentStatistics:
    frequencies, of_samples = radial_spectrum(samples)
    return LatentStatistics(
        samples=channel_moments(samples),
        data=channel_moments(data),
        halves=(channel_moments(data[:half]), channel_moments(data[half : 2 * half])),
        frequencies=frequencies,
        spectrum_samples=of_samples,
        spectrum_data=radial_spectrum(data)[1],
        spectrum_halves=(radial_spectrum(data[:half])[1], radial_spectrum(data[half : 2 * half])[1]),
    )


def _memorisation(
    flow: FlowModel,
    samples: Samples,
    features: Tensor,
    first: Examined,
    second: Examined,
    training: Examined | None,
    kind: str,
) -> tuple[Memorisation, dict[str, Tensor]]:
    """The test by latents and by features of a `kind`; and sheets of pictures by name: nearest pairs of samples in each
    space and of held-out images, and samples with the two nearest training images."""
    members = first if training is None else training
    second, num_twins = _without_twins(second, members)
    spaces = [
        nearness("latents", samples.latents, second.latents.latents, members.latents.latents, flow.device),
        nearness(f"{kind} features", features, second.features, members.features, flow.device),
    ]
    count = f"{len(members.latents.indices):,}"
    source = members.latents.source.description
    seen = is_trained_on(flow.config.training, members.latents.source)
    unseen = not is_trained_on(flow.config.training, second.latents.source)
    if training is None:
        kind = "all of which the model was trained on" if seen else "none of which need have been trained on"
        against = (
            f"{count} images, half of {source}, stand for the training images, and the other half for held-out "
            f"ones, {kind}: a test for copies of the first half only; give training images with --train for a real one"
        )
    else:
        exact = "the images the model was trained on" if seen else "taken for images the model was trained on"
        against = f"{count} of {source}, {exact}, and {len(second.latents.indices):,} others as held-out images"
    test = Memorisation(
        against=against,
        is_test=training is not None and unseen,
        covers=training is not None or seen,
        num_training=len(members.latents.indices),
        num_all=len(members.latents.source) if training is not None or seen else len(members.latents.indices),
        num_twins=num_twins,
        spaces=spaces,
    )

    return test, _sheets_of(samples, members, second, spaces)


def _sheets_of(
    samples: Samples, members: Examined, held_out: Examined, spaces: Sequence[Nearness]
) -> dict[str, Tensor]:
    """Sheets of pictures by name, [rows, columns, 3, H, W]."""

    def lowest(values: list[float]) -> list[int]:
        return np.argsort(values, kind="stable")[:_PAIRS].tolist()

    def sheet(pictures: Callable[[list[int]], Tensor], order: list[float], *found: list[int]) -> Tensor:
        rows = lowest(order)
        columns = [pictures(rows), *(members.pictures([places[row] for row in rows]) for places in found)]
        return torch.stack([as_shown(one, samples.pixel_format) for one in columns])

    def drawn(rows: list[int]) -> Tensor:
        return samples.pixels[rows]

    sheets = {}
    for name, space in zip(("latents", "features"), spaces, strict=True):
        nearest, second = space.nearest_of_samples, space.second_of_samples
        sheets[f"pairs_{name}"] = sheet(drawn, space.samples, nearest)
        sheets[f"memorised_{name}"] = sheet(drawn, space.samples_ratio, nearest, second)
    first = spaces[0]
    return {**sheets, "pairs_held_out": sheet(held_out.pictures, first.held_out, first.nearest_of_held_out)}


def _without_twins(held_out: Examined, members: Examined) -> tuple[Examined, int]:
    """The held-out images that are not among the members, and how many are.

    Raises:
        DataError: fewer than two are left.
    """
    distances = nearness("", held_out.features, held_out.features, members.features).samples
    scale = held_out.features.double().norm(dim=1)
    distinct = torch.tensor(distances, dtype=torch.float64) > _TWIN * scale
    if int(distinct.sum()) < 2:
        raise DataError(
            "the images of DATA are the training images themselves, so no held-out images are left to compare with; "
            "give other images as DATA, or remove --train"
        )
    return held_out.rows(distinct), int((~distinct).sum())


def _floor(network: FeatureExtractor, features: Tensor, first: Examined, second: Examined) -> Floor:
    num = min(len(features), len(first.features))
    reference = FeatureStatistics.of(first.features[:num])
    distances, errors = [], []
    for rows in (second.features[:num], second.reconstructed[:num], features[:num]):
        statistics = FeatureStatistics.of(rows)
        distances.append(frechet_distance(statistics, reference))
        contributions = frechet_contributions(rows, statistics, reference)
        errors.append(interval_over_images(contributions, distances[-1]).standard_error)
    return Floor(
        label=network.label,
        features=network.name,
        num=num,
        real=distances[0],
        reconstructed=distances[1],
        samples=distances[2],
        standard_errors=(errors[0], errors[1], errors[2]),
    )
