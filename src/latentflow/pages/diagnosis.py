"""A diagnosis as a page to read."""

from __future__ import annotations

import math
from pathlib import Path

from latentflow.analysis.diagnosis import RARE, Diagnosis, Nearness, fine_detail
from latentflow.analysis.verdicts import WORDS, verdicts
from latentflow.pages import html as report
from latentflow.pages.html import Series, contact_sheet, figure, line_chart, page, paragraph, table

_TIME = "time t: 0 is data, 1 is noise"


def diagnosis_page(diagnosis: Diagnosis, out: Path) -> str:
    """The page of a diagnosis whose pictures lie in `out`/pictures, as one HTML document."""
    sections = [
        ("What was found", _found(diagnosis)),
        ("The loss by time", _loss(diagnosis)),
        ("The way from noise to data", _ways(diagnosis)),
        ("Latents of samples and of data", _latents(diagnosis)),
        ("Are the samples copies?", _memorisation(diagnosis, out)),
        ("The autoencoder's floor", _floor(diagnosis)),
    ]
    lead = f"What is right and wrong with {diagnosis.model}, measured on {diagnosis.data}."
    footer = "Written by latentflow diagnose. Every figure on this page is in diagnose.json beside it."
    return page("latentflow: the diagnosis", lead, sections, footer)


def _found(diagnosis: Diagnosis) -> str:
    samples = diagnosis.floor.num
    same = " They are the images that the model was trained on." if diagnosis.is_training_data else ""
    text = (
        f"{diagnosis.num:,} images and {samples:,} samples, drawn with {diagnosis.sampling}. The images were encoded "
        f"as in training, and the model was told {diagnosis.told}.{same}"
    )
    lines = [(one.mark, f"{one.topic}: {WORDS[one.mark]}", one.text, one.rule) for one in verdicts(diagnosis)]
    return paragraph(text) + report.verdicts(lines)


def _loss(diagnosis: Diagnosis) -> str:
    curves = [diagnosis.loss] + ([diagnosis.training_loss] if diagnosis.training_loss else [])
    names = ["images"] if len(curves) == 1 else ["held-out images", "training images"]
    lines = [
        Series(name, list(zip(curve.times, curve.loss, strict=True)), errors=curve.standard_error)
        for name, curve in zip(names, curves, strict=True)
    ]
    baseline = list(zip(diagnosis.loss.times, diagnosis.loss.baseline, strict=True))
    lines.append(Series("mean and variance alone", baseline, dashed=True))
    means = ", ".join(f"{sum(c.loss) / len(c.loss):.3f} on {c.data}" for c in curves)
    return paragraph(f"The mean over all times, which counts each alike: {means}.") + figure(
        line_chart(lines, _TIME, "loss"),
        "Mean squared error of the velocity per latent value. The dashed line is the loss of the best velocity for "
        "independent Gaussian values with the mean and variance of their channel; bars are one standard error.",
    )


def _ways(diagnosis: Diagnosis) -> str:
    names = [f"guidance {ways.guidance:g}" for ways in diagnosis.ways]
    lines = [
        Series(name, list(zip(ways.times, ways.turning, strict=True)), markers=False)
        for name, ways in zip(names, diagnosis.ways, strict=True)
    ]
    rows = [
        [
            name,
            f"{ways.straightness:.3f}",
            f"{ways.straightness_quantiles[0]:.3f} to {ways.straightness_quantiles[1]:.3f}",
            f"{math.degrees(ways.total_turning):.0f}°",
            str(ways.num),
        ]
        for name, ways in zip(names, diagnosis.ways, strict=True)
    ]
    header = ["", "straightness", "of 8 in 10 samples", "turns in all", "samples"]
    text = (
        "The straightness is the mean of |v - (x_1 - x_0)|² along the model's own trajectory, divided by that of |v|²: "
        "0 where the velocity is the straight line from the sample to its noise all the time, 1 where the way ends "
        "where it began."
    )
    return (
        paragraph(text)
        + figure(table(header, rows), "Followed with 40 steps of Heun's method.")
        + figure(
            line_chart(lines, _TIME, "radians per unit of time"),
            "Where the ways bend: how fast the direction of the velocity turns. A sampler spends its steps best there.",
        )
    )


def _latents(diagnosis: Diagnosis) -> str:
    both = diagnosis.latents
    rows = []
    for channel in range(len(both.data.mean)):
        for name, moments in (("samples", both.samples), ("data", both.data)):
            values = (moments.mean, moments.std, moments.skew, moments.kurtosis)
            rows.append([f"channel {channel}, {name}", *(f"{value[channel]:.3f}" for value in values)])
    lines = [
        Series("samples", list(zip(both.frequencies, both.spectrum_samples, strict=True))),
        Series("data", list(zip(both.frequencies, both.spectrum_data, strict=True)), dashed=True),
    ]
    return figure(
        table(["", "mean", "standard deviation", "skew", "excess kurtosis"], rows),
        "Over all images and positions, of latents as the flow sees them. A Gaussian has skew and excess kurtosis 0.",
    ) + figure(
        line_chart(lines, "waves per side of the latent", "power", log_y=True),
        f"The power at each frequency, over all directions and channels. In the highest third, samples have "
        f"{fine_detail(both.frequencies, both.spectrum_samples, both.spectrum_data):.2f} times that of the data.",
    )


def _memorisation(diagnosis: Diagnosis, out: Path) -> str:
    test = diagnosis.memorisation
    rows = [
        [
            space.space,
            f"{_median(space.samples):.3g}",
            f"{_median(space.held_out):.3g}",
            f"{space.threshold:.3g}",
            f"{space.near} of {len(space.samples)}",
            f"{space.copies}",
            f"{space.nearer:.2f}",
        ]
        for space in test.spaces
    ]
    header = ["distances in", "samples", "held out", "limit", "samples below", "near to one alone", "chance nearer"]
    text = (
        f"For every sample, and for every held-out image, the nearest training image was looked for. {test.against}. "
        "Who learns by heart draws samples that are nearer to the training images than new images are."
    )
    parts = [
        paragraph(text),
        figure(
            table(header, rows),
            "Medians of the distance to the nearest training image; the distance of the held-out image that "
            f"{100 * RARE:g} % of them, or one, reach; how many samples stay below it; how many of these are also "
            "near to one training image and not to ten; and the chance that a sample is nearer than a "
            "held-out image, which is 0.5 where both are alike.",
        ),
    ]
    latents, features = test.spaces
    for file, name, distances, what in (
        ("pairs_latents", "sample", latents.samples, "samples nearest to a training image, by latents"),
        ("pairs_features", "sample", features.samples, "samples nearest to a training image, by random features"),
        ("pairs_held_out", "held out", latents.held_out, "held-out images nearest to a training image, by latents"),
    ):
        shown = [f"{distance:.3g}" for distance in sorted(distances)[: _num_shown(latents)]]
        sheet = contact_sheet(out / "pictures" / f"{file}.png", [name, "training"], shown, num_columns=len(shown))
        parts.append(figure(sheet, f"The {what}; above each pair its distance. Beneath each is that training image."))
    return "".join(parts)


def _num_shown(space: Nearness) -> int:
    return min(8, len(space.samples))


def _floor(diagnosis: Diagnosis) -> str:
    floor = diagnosis.floor
    values = zip((floor.real, floor.reconstructed, floor.samples), floor.standard_errors, strict=True)
    names = ("other real images: chance alone", "their reconstructions: the autoencoder", "samples: the generator")
    rows = [[name, f"{value:.4g}", f"{error:.2g}"] for name, (value, error) in zip(names, values, strict=True)]
    text = (
        "Everything is held against the same half of the real images. The other half says what chance gives, its "
        "reconstructions what the autoencoder loses, and no generator on these latents can be expected to go below."
    )
    return paragraph(text) + figure(
        table(["Fréchet distance to one half", "value", "standard error"], rows),
        f"{floor.num:,} images in each set. {floor.label}. With so few images it is too large by about what the first "
        "row says, for all rows alike.",
    )


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
