"""A diagnosis as a page."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

from latentflow.analysis.diagnosis import (
    RARE,
    Diagnosis,
    Floor,
    LatentStatistics,
    Memorisation,
    TrajectoryShapes,
    fine_detail,
)
from latentflow.analysis.latent_space import LatentSpace
from latentflow.analysis.verdicts import WORDS, verdicts
from latentflow.pages.charts import TIME, Chart, Series
from latentflow.pages.numbers import number
from latentflow.pages.page import Sheet, Table, render

_PAIRS = 8  # shown on each sheet


def diagnosis_page(diagnosis: Diagnosis, out: Path) -> str:
    """The page of a diagnosis whose pictures lie in `out`/pictures, as one HTML document."""
    curves = [diagnosis.loss] + ([diagnosis.training_loss] if diagnosis.training_loss else [])
    latents = diagnosis.latents
    return render(
        "diagnosis.html",
        diagnosis=diagnosis,
        verdicts=verdicts(diagnosis),
        words=WORDS,
        mean_losses=[(curve.data, sum(curve.loss) / len(curve.loss)) for curve in curves],
        loss_chart=_loss_chart(diagnosis),
        trajectories=_trajectory_table(diagnosis.ways),
        turning_chart=_turning_chart(diagnosis.ways),
        moments=_moments_table(latents),
        spectrum_chart=_spectrum_chart(latents),
        fine_detail=fine_detail(latents.frequencies, latents.spectrum_samples, latents.spectrum_data),
        distances=_distance_table(diagnosis.memorisation),
        rare=RARE,
        sheets=_sheets(diagnosis.memorisation, out),
        floor=_floor_table(diagnosis.floor),
        latent_space=_latent_space_table(diagnosis.latent_space),
    )


def _loss_chart(diagnosis: Diagnosis) -> Chart:
    loss, training = diagnosis.loss, diagnosis.training_loss
    named = {"images": loss} if training is None else {"held-out images": loss, "training images": training}
    series = [
        Series(name, list(zip(curve.times, curve.loss, strict=True)), errors=curve.standard_error)
        for name, curve in named.items()
    ]
    baseline = Series("mean and variance only", list(zip(loss.times, loss.baseline, strict=True)), dashed=True)
    return Chart([*series, baseline], TIME, "loss")


def _trajectory_table(runs: list[TrajectoryShapes]) -> Table:
    rows = [
        (
            f"guidance {ways.guidance:g}",
            f"{ways.straightness:.3f}",
            f"{ways.straightness_quantiles[0]:.3f} to {ways.straightness_quantiles[1]:.3f}",
            f"{math.degrees(ways.total_turning):.0f}°",
            f"{ways.num}",
        )
        for ways in runs
    ]
    return Table(("trajectories", "straightness", "10th to 90th percentile", "total turning", "samples"), rows)


def _turning_chart(runs: list[TrajectoryShapes]) -> Chart:
    series = [
        Series(f"guidance {ways.guidance:g}", list(zip(ways.times, ways.turning, strict=True)), markers=False)
        for ways in runs
    ]
    return Chart(series, TIME, "radians per unit of time")


def _moments_table(latents: LatentStatistics) -> Table:
    rows = []
    for channel in range(len(latents.data.mean)):
        for name, moments in (("samples", latents.samples), ("data", latents.data)):
            values = (moments.mean, moments.std, moments.skew, moments.kurtosis)
            rows.append((f"channel {channel}, {name}", *(f"{value[channel]:.3f}" for value in values)))
    return Table(("latents", "mean", "standard deviation", "skew", "excess kurtosis"), rows)


def _spectrum_chart(latents: LatentStatistics) -> Chart:
    series = [
        Series("samples", list(zip(latents.frequencies, latents.spectrum_samples, strict=True))),
        Series("data", list(zip(latents.frequencies, latents.spectrum_data, strict=True)), dashed=True),
    ]
    return Chart(series, "cycles per side of the latent", "power", log_y=True)


def _distance_table(test: Memorisation) -> Table:
    rows = [
        (
            space.space,
            number(median(space.samples)),
            number(median(space.held_out)),
            number(space.threshold),
            f"{space.near} of {len(space.samples)}",
            f"{space.copies}",
            f"{space.memorised}",
            f"{space.nearer:.2f}",
        )
        for space in test.spaces
    ]
    header = ("distances in", "samples", "held out", "limit", "samples below", "copies", "memorised", "chance nearer")
    return Table(header, rows)


def _sheets(test: Memorisation, out: Path) -> list[tuple[Sheet, str]]:
    """The nearest pairs, and samples with the two nearest training images, each sheet with what it shows."""
    latents, features = test.spaces
    sheets = []
    for file, name, distances, what in (
        ("pairs_latents", "sample", latents.samples, "samples nearest to a training image, by latents"),
        ("pairs_features", "sample", features.samples, f"samples nearest to a training image, by {features.space}"),
        ("pairs_held_out", "held out", latents.held_out, "held-out images nearest to a training image, by latents"),
    ):
        shown = [number(distance) for distance in sorted(distances)[:_PAIRS]]
        alt = f"Pairs of pictures: the {what}"
        picture = out / "pictures" / f"{file}.png"
        caption = f"The {what}, with the distance of each pair above it and the training image below."
        sheets.append((Sheet(picture, alt, [name, "training"], len(shown), columns=shown), caption))
    for file, space in (("memorised_latents", latents), ("memorised_features", features)):
        what = f"samples nearest to one training image compared with a second one, by {space.space}"
        shown = [f"{ratio:.2f}" for ratio in sorted(space.samples_ratio)[:_PAIRS]]
        picture, rows = out / "pictures" / f"{file}.png", ["sample", "nearest", "second"]
        caption = f"The {what}, with the ratio of the two distances above and the two training images below."
        sheets.append((Sheet(picture, f"Pictures: the {what}", rows, len(shown), columns=shown), caption))
    return sheets


def _floor_table(floor: Floor) -> Table:
    names = ("other real images: sampling noise", "their reconstructions: autoencoder", "samples: generator")
    values = (floor.real, floor.reconstructed, floor.samples)
    rows = [
        (name, number(value, 4), number(error, 2))
        for name, value, error in zip(names, values, floor.standard_errors, strict=True)
    ]
    return Table(("Fréchet distance to one half", "value", "standard error"), rows)


def _latent_space_table(space: LatentSpace) -> Table:
    shrinking = "" if space.shrinking_error is None else f"{space.shrinking_error:.2f}"
    rows = [
        ("equivariance error, turned by a quarter", f"{space.turning_error:.2f}"),
        ("equivariance error, shrunk to half", shrinking),
        ("share of high frequencies, latents", f"{space.fine_share:.2f}"),
        ("the same, images at the size of the latents", f"{space.fine_share_of_images:.2f}"),
        ("the same, white noise", f"{space.fine_share_of_noise:.2f}"),
    ]
    return Table(("autoencoder", "value"), rows)
