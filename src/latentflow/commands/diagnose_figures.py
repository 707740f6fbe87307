"""What `diagnose` measures: the records of it, the arithmetic behind them, and what is made of the numbers.

Legend: N images, C latent channels, h and w latent height and width, D features of an image.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from latentflow.flow.path import Path

RARE = 0.01
"""The share of held-out images that count as copies by definition: the nearest ones."""

_BLOCK = 1024  # rows of a distance matrix held at a time


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LossByTime(_Record):
    """The flow-matching loss, mean over the elements of a latent, in equal bins of time."""

    data: str
    times: list[float]
    loss: list[float]
    standard_error: list[float]
    baseline: list[float] = Field(description="Of a model that knows mean and variance of each channel alone.")

    @property
    def ratio(self) -> float:
        """The loss over the baseline, both as means over time."""
        return sum(self.loss) / sum(self.baseline)


class Ways(_Record):
    """The shapes of trajectories; see `metrics.trajectories`."""

    guidance: float
    num: int
    straightness: float = Field(description="Mean; 0 is straight at constant speed.")
    straightness_quantiles: tuple[float, float] = Field(description="Of a tenth and of nine tenths of the images.")
    total_turning: float = Field(description="Mean, in radians.")
    times: list[float]
    turning: list[float] = Field(description="Mean over images at `times`, radians per unit of time.")


class ChannelMoments(_Record):
    """Moments of each channel over images and positions; kurtosis is that in excess of a Gaussian's."""

    mean: list[float]
    std: list[float]
    skew: list[float]
    kurtosis: list[float]


class LatentStatistics(_Record):
    """Latents of samples beside those of data, and of two halves of the data beside each other."""

    samples: ChannelMoments
    data: ChannelMoments
    halves: tuple[ChannelMoments, ChannelMoments]
    frequencies: list[int] = Field(description="Waves per side.")
    spectrum_samples: list[float] = Field(description="Mean power at each frequency, over directions and channels.")
    spectrum_data: list[float]


class Nearness(_Record):
    """How near samples lie to the training images, beside how near held-out images do, in one kind of coordinates."""

    space: str
    samples: list[float] = Field(description="Distance of each sample to the nearest training image.")
    held_out: list[float] = Field(description="Distance of each held-out image to the nearest training image.")
    nearest_of_samples: list[int] = Field(description="Which training image that is, by its place among them.")
    nearest_of_held_out: list[int]

    @property
    def nearer(self) -> float:
        """The chance that a sample is nearer to the training images than a held-out image is; 1/2: alike."""
        samples, held_out = torch.tensor(self.samples).double(), torch.tensor(self.held_out).double()
        less, equal = samples[:, None] < held_out, samples[:, None] == held_out
        return float(less.double().mean() + equal.double().mean() / 2)

    @property
    def threshold(self) -> float:
        """The distance that only `RARE` of the held-out images stay below."""
        return float(torch.quantile(torch.tensor(self.held_out).double(), RARE))

    @property
    def copies(self) -> float:
        """The share of samples below `threshold`: `RARE` if they are like held-out images."""
        return float((torch.tensor(self.samples).double() < self.threshold).double().mean())


class Memorisation(_Record):
    """The memorisation test."""

    against: str = Field(description="What counts as training images, and what as held out.")
    is_test: bool = Field(description="Whether these are really images the model was trained on, and others.")
    num_training: int
    spaces: list[Nearness]


class Floor(_Record):
    """Fréchet distances to one half of the real images, each of as many images."""

    label: str
    num: int
    real: float = Field(description="Of the other half: chance alone.")
    reconstructed: float = Field(description="Of the other half, encoded and decoded: the floor of any generator.")
    samples: float
    standard_errors: tuple[float, float, float]


class Verdict(_Record):
    """One finding in plain words, and the rule it follows."""

    mark: Literal["good", "look", "bad"]
    topic: str
    text: str
    rule: str


class Diagnosis(_Record):
    """Everything that was measured."""

    model: str
    data: str
    is_training_data: bool = Field(description="Whether DATA are the very images the model was trained on.")
    told: str
    sampling: str
    num: int
    loss: LossByTime
    training_loss: LossByTime | None
    ways: list[Ways]
    latents: LatentStatistics
    memorisation: Memorisation
    floor: Floor
    seconds: float


def baseline_loss(path: Path, latents: Tensor, times: Tensor) -> list[float]:
    """The loss of the best velocity for independent Gaussian elements with the mean and variance of their channel.

    With x = alpha data + sigma noise, Var(u | x) = (alpha sigma' - alpha' sigma)^2 s^2 / (alpha^2 s^2 + sigma^2).

    Args:
        latents: [N, C, h, w].
        times: [n] in (0, 1].
    """
    t = times.double()[:, None]
    variance = latents.double().var((0, 2, 3))
    determinant = path.alpha(t) * path.d_sigma(t) - path.d_alpha(t) * path.sigma(t)
    losses = determinant.square() * variance / (path.alpha(t).square() * variance + path.sigma(t).square())
    return losses.mean(1).tolist()


def channel_moments(latents: Tensor) -> ChannelMoments:
    """The moments of [N, C, h, w] latents; skew and kurtosis of a channel that does not vary are 0."""
    rows = latents.double().transpose(0, 1).flatten(1)
    mean = rows.mean(1)
    centred = rows - mean[:, None]
    std = centred.square().mean(1).sqrt()
    z = torch.where(std[:, None] > 0, centred / std[:, None], 0.0)
    kurtosis = torch.where(std > 0, z.pow(4).mean(1) - 3, 0.0)
    return ChannelMoments(
        mean=mean.tolist(), std=std.tolist(), skew=z.pow(3).mean(1).tolist(), kurtosis=kurtosis.tolist()
    )


def radial_spectrum(latents: Tensor) -> tuple[list[int], list[float]]:
    """Frequencies in waves per side, from 1 to half the shorter side, and the mean power of [N, C, h, w] at each.

    Power is |FFT|^2 / (h w), which is the variance at every frequency for white noise.
    """
    height, width = latents.shape[-2:]
    power = torch.fft.fft2(latents.double()).abs().square().mean((0, 1)) / (height * width)
    rows, columns = torch.fft.fftfreq(height) * height, torch.fft.fftfreq(width) * width
    radius = (rows[:, None].square() + columns.square()).sqrt().round().long()
    frequencies = list(range(1, min(height, width) // 2 + 1))
    return frequencies, [float(power[radius == frequency].mean()) for frequency in frequencies]


def nearest(queries: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of each query ([N, D]) to the nearest of `members` ([M, D]), and which it is: [N] each.

    The search may mistake two members that are alike to rounding; the distance is exact.
    """
    queries, members = queries.float(), members.float()
    centre = members.mean(0)
    found = torch.cat([torch.cdist(part - centre, members - centre).argmin(1) for part in queries.split(_BLOCK)])
    return (queries.double() - members[found].double()).norm(dim=1), found


def nearness(space: str, samples: Tensor, held_out: Tensor, training: Tensor) -> Nearness:
    """The record of one kind of coordinates: [N, ...], [N, ...] and [M, ...]."""
    members = training.flatten(1)
    of_samples, of_held_out = nearest(samples.flatten(1), members), nearest(held_out.flatten(1), members)
    return Nearness(
        space=space,
        samples=of_samples[0].tolist(),
        held_out=of_held_out[0].tolist(),
        nearest_of_samples=of_samples[1].tolist(),
        nearest_of_held_out=of_held_out[1].tolist(),
    )


def largest_shift(moments: ChannelMoments, reference: ChannelMoments) -> tuple[float, float]:
    """Of the channels, the largest shift of the mean in standard deviations, and the ratio of these furthest from 1."""
    triples = list(zip(moments.mean, reference.mean, reference.std, strict=True))
    shift = max(abs(mean - other) / std if std else math.inf for mean, other, std in triples)
    ratios = [a / b if b else math.inf for a, b in zip(moments.std, reference.std, strict=True)]
    return shift, max(ratios, key=lambda ratio: abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf)


def fine_detail(statistics: LatentStatistics) -> float:
    """The power of samples over that of data in the highest third of the frequencies."""
    first = -(-2 * len(statistics.frequencies) // 3) if len(statistics.frequencies) > 1 else 0
    power = sum(statistics.spectrum_data[first:])
    return sum(statistics.spectrum_samples[first:]) / power if power else math.inf


def verdicts(diagnosis: Diagnosis) -> list[Verdict]:
    """What the numbers say, each with the rule."""
    found = [_loss_verdict(diagnosis.loss)]
    if diagnosis.training_loss is not None:
        found.append(_gap_verdict(diagnosis.loss, diagnosis.training_loss))
    return [
        *found,
        _ways_verdict(diagnosis.ways),
        _latents_verdict(diagnosis.latents),
        _detail_verdict(diagnosis.latents),
        _memorisation_verdict(diagnosis.memorisation),
        _floor_verdict(diagnosis.floor),
    ]


def _mark(value: float, good: float, bad: float) -> Literal["good", "look", "bad"]:
    """By a value that is better the smaller it is; NaN is bad."""
    return "good" if value <= good else "look" if value < bad else "bad"


def _loss_verdict(loss: LossByTime) -> Verdict:
    worst = max(range(len(loss.times)), key=lambda n: loss.loss[n] / loss.baseline[n])
    return Verdict(
        mark=_mark(loss.ratio, 0.8, 1.0),
        topic="Loss",
        text=f"It is {loss.ratio:.2f} of what a model reaches that knows no more than mean and variance of each "
        f"channel; at its worst, near t = {loss.times[worst]:.2f}, {loss.loss[worst] / loss.baseline[worst]:.2f}.",
        rule="Fine up to 0.8, trouble from 1: then the network has learnt nothing of how latents hang together.",
    )


def _gap_verdict(held_out: LossByTime, training: LossByTime) -> Verdict:
    gap = sum(held_out.loss) / sum(training.loss) - 1
    error = math.hypot(*held_out.standard_error, *training.standard_error) / sum(training.loss)
    return Verdict(
        mark=_mark(gap, 0.05, 0.25),
        topic="Overfitting",
        text=f"The loss on held-out images differs by {100 * gap:+.1f} ± {100 * error:.1f} % from that on training "
        "images.",
        rule="Fine up to +5 %, trouble from +25 %: then more training makes the samples copies.",
    )


def _ways_verdict(ways: list[Ways]) -> Verdict:
    used = ways[0]
    plain = f" Without guidance it is {ways[-1].straightness:.3f}." if len(ways) > 1 else ""
    return Verdict(
        mark=_mark(used.straightness, 0.3, 0.6),
        topic="Straightness",
        text=f"At guidance {used.guidance:g}, {used.straightness:.3f} of the squared speed on the way from noise to "
        f"data is not spent on the straight line, and the way turns by {math.degrees(used.total_turning):.0f} degrees "
        f"in all.{plain}",
        rule="0 is a straight way, which one Euler step goes exactly. Up to 0.3 is usual, and some 10 to 25 steps of "
        "Heun's method do; from 0.6 on, compare with many more steps before the pictures are judged.",
    )


def _latents_verdict(statistics: LatentStatistics) -> Verdict:
    shift, ratio = largest_shift(statistics.samples, statistics.data)
    by_chance = largest_shift(*statistics.halves)
    off = max(shift, abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf)
    return Verdict(
        mark=_mark(off, 0.1, 0.3),
        topic="Latent statistics",
        text=f"The mean of a channel is off by up to {shift:.2f} of its standard deviation, and the standard deviation "
        f"by a factor of up to {ratio:.2f}; between two halves of the data it is {by_chance[0]:.2f} and "
        f"{by_chance[1]:.2f}.",
        rule="Fine within 0.1 and a factor of 1.1, trouble from 0.3 and 1.35. Guidance moves both on purpose: draw at "
        "guidance 1 to see the model alone.",
    )


def _detail_verdict(statistics: LatentStatistics) -> Verdict:
    ratio = fine_detail(statistics)
    off = abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf
    kind = "" if off <= math.log(1.25) else ": too smooth" if ratio < 1 else ": too rough"
    return Verdict(
        mark=_mark(off, math.log(1.25), math.log(2)),
        topic="Fine detail",
        text=f"Latents of samples have {ratio:.2f} times the power of data in the highest third of the "
        f"frequencies{kind}.",
        rule="Fine between 0.8 and 1.25, trouble below 0.5 and above 2.",
    )


def _memorisation_verdict(test: Memorisation) -> Verdict:
    texts = [
        f"in {space.space}, {100 * space.copies:.1f} % of the samples are nearer to a training image than all but "
        f"{100 * RARE:g} % of the held-out images, and a sample is nearer than a held-out image with chance "
        f"{space.nearer:.2f}"
        for space in test.spaces
    ]
    marks = [max(_mark(s.copies, 0.05, 0.2), _mark(s.nearer, 0.65, 0.9), key=_RANKS.index) for s in test.spaces]
    mark = max(marks, key=_RANKS.index)
    limits = (
        f"Copies: fine up to 5 %, trouble from 20 %, with {100 * RARE:g} % expected. Chance: 0.5 if samples are like "
        "held-out images, fine up to 0.65, trouble from 0.9. Plain samples, as strong guidance makes them, are nearer "
        "to everything: look at the pairs below before anything is called a copy."
    )
    limits += "" if test.is_test else " Here the two sets were not told apart by training, which weakens the test."
    words = "; ".join(texts)
    return Verdict(mark=mark, topic="Memorisation", text=f"{words[0].upper()}{words[1:]}.", rule=limits)


def _floor_verdict(floor: Floor) -> Verdict:
    lost, made = max(floor.reconstructed - floor.real, 0.0), max(floor.samples - floor.real, 0.0)
    noise = 2 * math.hypot(floor.standard_errors[0], floor.standard_errors[2])
    if made <= max(2 * lost, noise):
        mark, words = "good", "the generator is no further from the data than the autoencoder, or chance, explains"
    elif made <= 10 * max(lost, noise / 2):
        mark, words = "look", "the generator, and not the autoencoder, is what holds the pictures back"
    else:
        mark, words = "bad", "the generator is far from the data, and the autoencoder has little to do with it"
    return Verdict(
        mark=mark,
        topic="Generator and autoencoder",
        text=f"The Fréchet distance of random features is {floor.samples:.3g} for samples, {floor.reconstructed:.3g} "
        f"for reconstructions and {floor.real:.3g} for other real images: {words}.",
        rule="What chance alone gives is taken off both. Fine while samples exceed it by up to twice as much as "
        "reconstructions do, or by two standard errors; trouble beyond ten times.",
    )


_RANKS = ("good", "look", "bad")
