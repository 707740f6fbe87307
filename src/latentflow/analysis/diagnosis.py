"""The records of a diagnosis, and the arithmetic behind them.

Legend: N images, C latent channels, h and w latent height and width, D features of an image.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from latentflow.analysis.latent_space import LatentSpace
from latentflow.flow.path import Path
from latentflow.records import Record
from latentflow.runtime import Runtime

RARE = 0.01
"""The share of held-out images, the nearest ones, that a copy must be nearer than."""

MEMORISED = 1 / 3
"""The distance to the nearest training image over that to the second-nearest, below which a sample counts as a copy of
the former (arXiv 2505.17638)."""

_TWIN = 1e-5  # relative distance below which two training images are the same
_OF_MANY = 10  # a copy stands out even if its training image is there this many times, less one
_BLOCK = 1024  # rows of a distance matrix held at a time


class LossByTime(Record):
    """The flow-matching loss, mean over the elements of a latent, in equal bins of time."""

    data: str
    times: list[float]
    loss: list[float]
    standard_error: list[float]
    baseline: list[float] = Field(description="Of a model that knows only mean and variance of each channel.")

    @property
    def ratio(self) -> float:
        """The loss over the baseline, both as means over time."""
        return sum(self.loss) / sum(self.baseline)

    @property
    def ratio_error(self) -> float:
        """The standard error of `ratio`."""
        return math.hypot(*self.standard_error) / sum(self.baseline)


class TrajectoryShapes(Record):
    """The shapes of trajectories; see `analysis.trajectories`."""

    guidance: float
    num: int
    straightness: float = Field(description="Mean; 0 is straight at constant speed.")
    straightness_error: float = Field(description="Standard error of this mean.")
    straightness_quantiles: tuple[float, float] = Field(description="Of a tenth and of nine tenths of the images.")
    total_turning: float = Field(description="Mean, in radians.")
    times: list[float]
    turning: list[float] = Field(description="Mean over images at `times`, radians per unit of time.")


class ChannelMoments(Record):
    """Moments of each channel over images and positions; kurtosis is that in excess of a Gaussian's."""

    mean: list[float]
    std: list[float]
    skew: list[float]
    kurtosis: list[float]


class LatentStatistics(Record):
    """Latents of samples compared with those of data, and of one half of the data with the other."""

    samples: ChannelMoments
    data: ChannelMoments
    halves: tuple[ChannelMoments, ChannelMoments]
    frequencies: list[int] = Field(description="Waves per side.")
    spectrum_samples: list[float] = Field(description="Mean power at each frequency, over directions and channels.")
    spectrum_data: list[float]
    spectrum_halves: tuple[list[float], list[float]]


class Nearness(Record):
    """How near samples lie to the training images, compared with held-out images, in one kind of coordinates."""

    space: str
    samples: list[float] = Field(description="Distance of each sample to the nearest training image.")
    held_out: list[float] = Field(description="Distance of each held-out image to the nearest training image.")
    nearest_of_samples: list[int] = Field(description="The index of this training image.")
    nearest_of_held_out: list[int]
    samples_alone: list[float] = Field(
        description="This distance over that to the tenth-nearest: near 1 for what is equally near to many training "
        "images, near 0 for a copy of one, also of one that is there a few times."
    )
    held_out_alone: list[float]
    samples_ratio: list[float] = Field([], description="The same over that to the second-nearest training image.")
    held_out_ratio: list[float] = Field([], description="The same of each held-out image.")
    second_of_samples: list[int] = Field([], description="The index of this second-nearest training image.")

    @property
    def memorised(self) -> int:
        """How many samples are memorised training images: nearer than `MEMORISED` times to the second-nearest."""
        return sum(ratio < MEMORISED for ratio in self.samples_ratio)

    @property
    def memorised_held_out(self) -> int:
        """How many held-out images would count as memorised: those with a near twin among the training images."""
        return sum(ratio < MEMORISED for ratio in self.held_out_ratio)

    @property
    def nearer(self) -> float:
        """The probability that a sample is nearer to the training images than a held-out image; 1/2: no difference."""
        samples, held_out = torch.tensor(self.samples).double(), torch.tensor(self.held_out).double()
        less, equal = samples[:, None] < held_out, samples[:, None] == held_out
        return float(less.double().mean() + equal.double().mean() / 2)

    @property
    def rank(self) -> int:
        """The rank, from the nearest, of the held-out image that a copy must be nearer than: one in a hundred."""
        return max(round(RARE * len(self.held_out)), 1)

    @property
    def threshold(self) -> float:
        """The distance of the held-out image of this rank."""
        return sorted(self.held_out)[self.rank - 1]

    @property
    def copies(self) -> int:
        """How many samples are nearer to a training image than `threshold`, also by `samples_alone`."""
        limit = sorted(self.held_out_alone)[self.rank - 1]
        pairs = zip(self.samples, self.samples_alone, strict=True)
        return sum(near < self.threshold and single < limit for near, single in pairs)

    @property
    def near(self) -> int:
        """How many samples are nearer to a training image than `threshold`."""
        return sum(distance < self.threshold for distance in self.samples)


class Memorisation(Record):
    """The memorisation test."""

    against: str = Field(description="Which images count as training images, and which as held out.")
    is_test: bool = Field(description="Whether these are training images of the model, and others.")
    covers: bool = Field(description="Whether the model is known, or declared, to be trained on the former.")
    num_training: int
    num_all: int = Field(description="All training images; `num_training` of them were searched.")
    num_twins: int = Field(0, description="Held-out images left out because they are training images themselves.")
    spaces: list[Nearness]


class Floor(Record):
    """Fréchet distances to one half of the real images, all with the same number of images."""

    label: str
    features: str = Field("random", description="What images are compared by.")
    num: int
    real: float = Field(description="Of the other half: the effect of chance.")
    reconstructed: float = Field(description="Of the other half, encoded and decoded: the floor of any generator.")
    samples: float
    standard_errors: tuple[float, float, float]


class Diagnosis(Record):
    """Everything that was measured."""

    request: dict[str, Any] = Field(default_factory=dict, description="The request as it was given.")
    model: str
    data: str
    is_training_data: bool = Field(description="Whether DATA are the very images the model was trained on.")
    told: str
    sampling: str
    num: int
    loss: LossByTime
    training_loss: LossByTime | None
    ways: list[TrajectoryShapes]
    latents: LatentStatistics
    memorisation: Memorisation
    floor: Floor
    latent_space: LatentSpace
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


class NearestMembers(NamedTuple):
    """The nearest members of N queries, [N] each.

    Attributes:
        distance: to the nearest member.
        nearest: its index.
        second: the index of the second-nearest that is another picture; that of the farthest of the ten nearest if all
            are alike.
        ratio: `distance` over that to the second-nearest; 1 if both are 0, or there is none.
        alone: `distance` over that to the tenth-nearest, or the farthest of fewer; 1 if both are 0.
    """

    distance: Tensor
    nearest: Tensor
    second: Tensor
    ratio: Tensor
    alone: Tensor


def nearest_members(queries: Tensor, members: Tensor, device: torch.device | str = "cpu") -> NearestMembers:
    """The nearest of `members` ([M, D]) to each query ([N, D]), and how much it stands out.

    The search, on `device`, may confuse members that are equal up to rounding; the distances are exact.
    """
    queries, members = queries.float(), members.float()
    centre, rank = members.mean(0), min(_OF_MANY, len(members))
    near_centre = (members - centre).to(device)
    with Runtime(near_centre.device).autocast():
        parts = ((part - centre).to(device) for part in queries.split(_BLOCK))
        found = [torch.cdist(part, near_centre).topk(rank, largest=False).indices for part in parts]
    places = torch.cat(found).cpu()

    def to_member(x: Tensor, n: int) -> Tensor:
        return (x - members[places[:, n]].double()).norm(dim=1)

    first, twin = members[places[:, 0]].double(), _TWIN * members[places[:, 0]].double().norm(dim=1)
    others = [to_member(first, n) > twin for n in range(1, rank)]
    second = torch.stack([*others, torch.ones(len(places), dtype=torch.bool)], 1).int().argmax(1) + 1
    second = places.gather(1, second.clamp(max=rank - 1)[:, None])[:, 0]
    queries = queries.double()
    near, far = to_member(queries, 0), to_member(queries, rank - 1)
    next_near = (queries - members[second].double()).norm(dim=1)
    return NearestMembers(near, places[:, 0], second, _over(near, next_near), _over(near, far))


def _over(near: Tensor, far: Tensor) -> Tensor:
    return torch.where(far > 0, near / far, 1.0)


def nearness(
    space: str, samples: Tensor, held_out: Tensor, training: Tensor, device: torch.device | str = "cpu"
) -> Nearness:
    """The record of one kind of coordinates: [N, ...], [N, ...] and [M, ...], on the CPU."""
    members = training.flatten(1)
    of_samples, of_held_out = (nearest_members(images.flatten(1), members, device) for images in (samples, held_out))
    return Nearness(
        space=space,
        samples=of_samples.distance.tolist(),
        held_out=of_held_out.distance.tolist(),
        nearest_of_samples=of_samples.nearest.tolist(),
        nearest_of_held_out=of_held_out.nearest.tolist(),
        samples_alone=of_samples.alone.tolist(),
        held_out_alone=of_held_out.alone.tolist(),
        samples_ratio=of_samples.ratio.tolist(),
        held_out_ratio=of_held_out.ratio.tolist(),
        second_of_samples=of_samples.second.tolist(),
    )


def largest_shift(moments: ChannelMoments, reference: ChannelMoments) -> tuple[float, float]:
    """Over channels, the largest shift of the mean in standard deviations, and the ratio of these furthest from 1."""
    triples = list(zip(moments.mean, reference.mean, reference.std, strict=True))
    shift = max(abs(mean - other) / std if std else math.inf for mean, other, std in triples)
    ratios = [a / b if b else math.inf for a, b in zip(moments.std, reference.std, strict=True)]
    return shift, max(ratios, key=lambda ratio: abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf)


def fine_detail(frequencies: list[int], power: list[float], reference: list[float]) -> float:
    """A power spectrum over another one in the highest third of the frequencies."""
    first = max(min(-(-2 * len(frequencies) // 3), len(frequencies) - 1), 0)
    below = sum(reference[first:])
    return sum(power[first:]) / below if below else math.inf
