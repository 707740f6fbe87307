"""`latentflow diagnose`: what is right and wrong with a model, measured on images, as a page with pictures."""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    Ways,
    baseline_loss,
    channel_moments,
    nearness,
    radial_spectrum,
)
from latentflow.analysis.trajectories import follow
from latentflow.analysis.verdicts import verdicts
from latentflow.artifacts import make_folder, require_apart, require_writable, write_json, write_text
from latentflow.autoencoder import to_uint8
from latentflow.data.items import ImageSource
from latentflow.errors import ConfigError, DataError
from latentflow.evaluation.encoded_images import (
    ReferenceLatents,
    encode_reference,
    open_reference,
    told_velocity,
)
from latentflow.flow.times import sampling_times
from latentflow.locks import writes
from latentflow.metrics.features.extractors import RandomFeatures
from latentflow.metrics.resampling import interval_over_images
from latentflow.metrics.scores import frechet_contributions, frechet_distance
from latentflow.metrics.statistics import FeatureStatistics
from latentflow.model.flow_model import FlowModel
from latentflow.pages.diagnosis import diagnosis_page
from latentflow.progress import image_progress
from latentflow.randomness import ImageRandom
from latentflow.runtime import Runtime
from latentflow.sampling.contact_sheet import save_grid
from latentflow.sampling.drawing import Drawing, make_drawing
from latentflow.sampling.pipeline import Given, conditioned_velocity, draw_all, initial_noise
from latentflow.sampling.request import SampleRequest
from latentflow.sampling.samples import Samples

_BINS = 10
_LOOKS = 4  # times that each image is looked at for the loss
_MOST_WAYS, _WAY_STEPS = 64, 40
_PAIRS = 8  # shown on each sheet
_TWIN = 1e-5  # relative distance of features below which two images are one


@dataclass(frozen=True)
class Looked:
    """Images encoded, with what is needed of them; on the CPU.

    Attributes:
        latents: with labels and where they come from.
        features: [N, D] of the images.
        reconstructed: [N, D] of what the autoencoder makes of them; None where that was not asked for.
    """

    latents: ReferenceLatents
    features: Tensor
    reconstructed: Tensor | None = None

    def rows(self, rows: slice | Tensor) -> Looked:
        """Some of them."""
        reconstructed = None if self.reconstructed is None else self.reconstructed[rows]
        return Looked(self.latents.rows(rows), self.features[rows], reconstructed)

    def pictures(self, rows: Sequence[int]) -> Tensor:
        """Some of the images, read again: [B, 3, S, S] uint8."""
        source = self.latents.source
        pixels = [source[self.latents.indices[row]].pixels for row in rows]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


@writes("out")
def diagnose(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    train: str | Path | None = None,
    num: int = 512,
    num_train: int = 4096,
    guidance: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
    runtime: Runtime | None = None,
) -> Diagnosis:
    """Measure a model on images, and write page.html, diagnose.json and pictures/ into `out`.

    Half of the images are compared with the other half, and with as many samples, drawn as the preset says.

    Args:
        data: best images that the model was not trained on.
        train: images that it was trained on, for the memorisation test and for overfitting; None: one half of `data`
            stands for them.
        num: images of `data`; half as many samples.
        num_train: images of `train` that samples are looked for among; fewer where there are no more.
        guidance: in place of the preset's.

    Raises:
        ArtifactError, ConfigError, DataError: the model or the images cannot be used, or do not fit each other.
        NonFiniteError: the model's numbers are not finite.
    """
    began = clock.perf_counter()
    if num < 8 or num_train < 2:
        raise ConfigError(f"{num} images and {num_train} of training: at least 8, in two halves, and 2 are needed")
    folder = require_writable(out)
    flow = FlowModel.from_pretrained(model, precision="fp32", runtime=runtime)
    require_apart(out, data, train)
    source = open_reference(flow, data)
    train_source = None if train is None else open_reference(flow, train)
    half = num // 2
    request = make_drawing(flow, SampleRequest(num=half, seed=seed, guidance=guidance))
    network = RandomFeatures(flow.device)
    looked = _look(flow, source, network, num, least=num, seed=seed, batch_size=batch_size, reconstruct=True)
    training = None
    if train_source is not None:
        training = _look(flow, train_source, network, num_train, least=2, seed=seed, batch_size=batch_size)
    with image_progress("drawing", half) as on_images:
        samples = draw_all(flow, request, batch_size=batch_size, on_images=on_images)
    features = torch.cat([network(part).cpu() for part in samples.pixels.split(batch_size)])
    first, second = looked.rows(slice(0, half)), looked.rows(slice(half, 2 * half))
    memorisation, pairs = _memorisation(flow, samples, features, first, second, training)
    preset = request.sampling
    diagnosis = Diagnosis(
        model=str(model),
        data=source.description,
        is_training_data=_is_training_data(flow, source),
        told=looked.latents.told,
        sampling=f"{preset.solver}, {preset.steps} steps, guidance {preset.guidance:g}",
        num=num,
        loss=_loss(flow, looked.latents, batch_size, seed),
        training_loss=None if training is None else _loss(flow, _as_many(training.latents, num), batch_size, seed),
        ways=_ways(flow, request, batch_size),
        latents=_latent_statistics(samples.latents, looked.latents.latents, half),
        memorisation=memorisation,
        floor=_floor(network.label, features, first, second),
        seconds=round(clock.perf_counter() - began, 1),
    )
    for name, pixels in pairs.items():
        save_grid(make_folder(folder / "pictures") / f"{name}.png", pixels, len(pixels) // 2)
    found = [one.model_dump() for one in verdicts(diagnosis)]
    write_json(folder / "diagnose.json", {**diagnosis.model_dump(mode="json"), "verdicts": found})
    write_text(folder / "page.html", diagnosis_page(diagnosis, folder))
    return diagnosis


def _look(
    flow: FlowModel,
    source: ImageSource,
    network: RandomFeatures,
    num: int,
    *,
    least: int,
    seed: int,
    batch_size: int,
    reconstruct: bool = False,
) -> Looked:
    features: list[Tensor] = []
    reconstructed: list[Tensor] = []

    def visit(pixels: Tensor, latents: Tensor) -> None:
        features.append(network(pixels).cpu())
        if reconstruct:
            reconstructed.append(network(to_uint8(flow.decode(latents))).cpu())

    latents, _ = encode_reference(flow, source, num, least=least, batch_size=batch_size, seed=seed, visit=visit)
    return Looked(latents, torch.cat(features), torch.cat(reconstructed) if reconstruct else None)


def _as_many(latents: ReferenceLatents, num: int) -> ReferenceLatents:
    return latents.rows(slice(0, num))


def _is_training_data(flow: FlowModel, source: ImageSource) -> bool:
    return source.fingerprint() == flow.config.training.data_fingerprint


def _loss(flow: FlowModel, reference: ReferenceLatents, batch_size: int, seed: int) -> LossByTime:
    """Each image at some times, spread evenly over [0, 1]."""
    path, count, curve = flow.config.path, len(reference.indices), None
    elements = reference.latents[0].numel()
    total = _LOOKS * count
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    times = (order.double() + 0.5) / total
    with image_progress("loss", total) as on_images, torch.no_grad():
        for start in range(0, total, batch_size):
            places = range(start, min(start + batch_size, total))
            part = reference.rows(torch.tensor([place % count for place in places]))
            noise = ImageRandom.at(seed, "diagnose", places).normal(*part.latents.shape[1:])
            velocity = told_velocity(flow, part.labels, len(part.indices))
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


def _ways(flow: FlowModel, request: Drawing, batch_size: int) -> list[Ways]:
    """Trajectories of the first samples, as they are drawn and, where that is guided, without guidance."""
    few = request.at(slice(0, min(len(request.seeds), _MOST_WAYS)))
    plain = few.model_copy(update={"sampling": few.sampling.model_copy(update={"guidance": 1.0, "guided_by": None})})
    chosen = [few] if few.sampling.guidance == 1 else [few, plain]
    with image_progress("trajectories", len(chosen) * len(few.seeds)) as on_images:
        return [_followed(flow, one, batch_size, on_images) for one in chosen]


def _followed(flow: FlowModel, request: Drawing, batch_size: int, on_images: Callable[[int], None]) -> Ways:
    ways = None
    for start in range(0, len(request.seeds), batch_size):
        part = request.at(slice(start, start + batch_size))
        noise = initial_noise(flow, part)
        given = Given().on(flow.device, len(noise))
        velocity = conditioned_velocity(flow, part, given, noise.shape)
        followed = follow(velocity, noise, sampling_times(_WAY_STEPS))
        ways = followed if ways is None else ways + followed
        on_images(len(noise))
    straightness = ways.straightness
    tails = torch.quantile(straightness, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    return Ways(
        guidance=request.sampling.guidance,
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
    flow: FlowModel, samples: Samples, features: Tensor, first: Looked, second: Looked, training: Looked | None
) -> tuple[Memorisation, dict[str, Tensor]]:
    """The test, and its sheets of pictures by name: nearest pairs of samples in each space, and of held-out images."""
    members = first if training is None else training
    second, num_twins = _without_twins(second, members)
    spaces = [
        nearness("latents", samples.latents, second.latents.latents, members.latents.latents, flow.device),
        nearness("random features", features, second.features, members.features, flow.device),
    ]
    count = f"{len(members.latents.indices):,}"
    source = members.latents.source.description
    seen = _is_training_data(flow, members.latents.source)
    unseen = not _is_training_data(flow, second.latents.source)
    if training is None:
        kind = "all of which the model was trained on" if seen else "none of which need have been trained on"
        against = (
            f"{count} images, one half of {source}, stand for the training images, and the other half for held-out "
            f"ones, {kind}: a test of copies of the first half alone; give training images with --train for a real one"
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

    def sheet(pictures: Callable[[list[int]], Tensor], distances: list[float], found: list[int]) -> Tensor:
        rows = np.argsort(distances, kind="stable")[:_PAIRS].tolist()
        return torch.cat([pictures(rows), members.pictures([found[row] for row in rows])])

    def by_space(space: Nearness) -> Tensor:
        return sheet(lambda rows: samples.pixels[rows], space.samples, space.nearest_of_samples)

    held_out = sheet(second.pictures, spaces[0].held_out, spaces[0].nearest_of_held_out)
    return test, {
        "pairs_latents": by_space(spaces[0]),
        "pairs_features": by_space(spaces[1]),
        "pairs_held_out": held_out,
    }


def _without_twins(held_out: Looked, members: Looked) -> tuple[Looked, int]:
    """Held-out images that are not among the members too, and how many were; all where no two would be left."""
    distances = nearness("", held_out.features, held_out.features, members.features).samples
    scale = held_out.features.double().norm(dim=1)
    alone = torch.tensor(distances, dtype=torch.float64) > _TWIN * scale
    if int(alone.sum()) < 2:
        raise DataError(
            "the images of DATA are the training images themselves, so that nothing is left to compare copies with; "
            "give other images as DATA, or leave --train out"
        )
    return held_out.rows(alone), int((~alone).sum())


def _floor(label: str, features: Tensor, first: Looked, second: Looked) -> Floor:
    reference = FeatureStatistics.of(first.features)
    distances, errors = [], []
    for rows in (second.features, second.reconstructed, features):
        statistics = FeatureStatistics.of(rows)
        distances.append(frechet_distance(statistics, reference))
        contributions = frechet_contributions(rows, statistics, reference)
        errors.append(interval_over_images(contributions, distances[-1]).standard_error)
    return Floor(
        label=label,
        num=len(features),
        real=distances[0],
        reconstructed=distances[1],
        samples=distances[2],
        standard_errors=(errors[0], errors[1], errors[2]),
    )
