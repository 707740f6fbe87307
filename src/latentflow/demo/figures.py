"""What the demo measures: one record per stage, and report.json that holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from latentflow.data.sources.synthetic import CLASS_NAMES
from latentflow.demo.recognition import recognise
from latentflow.records import Record
from latentflow.training.config import Recipe


class DemoScale(Record):
    """How much the demo draws and measures."""

    num_judged: int = Field(200, ge=12, description="Samples, and as many real images, that are recognised.")
    guidance_scales: tuple[float, ...] = Field((0.0, 1.0, 1.5, 2.0, 3.0, 5.0), description="Of the guidance sweep.")
    num_per_scale: int = Field(60, ge=12, description="Samples per guidance scale; the same seeds for each.")
    num_painted: int = Field(100, ge=8, description="Held-out maps that are painted, and images with holes.")
    painting_scales: tuple[float, ...] = Field((1.0, 2.0, 3.0), description="Guidance by maps and known parts.")
    num_draws: int = Field(512, ge=8, description="Draws of image, time and noise for a held-out loss.")
    num_solved: int = Field(6, ge=1, description="Images on which solvers are compared.")
    budgets: tuple[int, ...] = Field((8, 16, 32, 64), description="Velocity calls granted to fixed-step solvers.")
    tolerances: tuple[float, ...] = Field((1e-1, 1e-2, 1e-3, 1e-4), description="Of adaptive solvers, rtol = atol.")
    reference_steps: int = Field(120, ge=1, description="Steps of rk4 for the solution that others are held against.")

    @property
    def num_shown(self) -> int:
        """Samples of each class in the picture of them; classes are dealt out in turn."""
        return min(8, self.num_judged // len(CLASS_NAMES))


class Recognised(Record):
    """How many of some pictures show what they should, as shares of `num_images`."""

    num_images: int
    both: float = Field(description="Shape and colour are those asked for.")
    shape: float = Field(description="The shape is.")
    colour: float = Field(description="The colour is.")
    nothing: float = Field(description="Nothing was recognised at all.")
    by_class: dict[str, float] = Field(description="`both`, for each class.")
    wrong: list[int] = Field(description="Which pictures do not show both.")

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of `both` (Wilson 1927)."""
        n, p, z = self.num_images, self.both, 1.96
        middle, spread = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        return max(0.0, (middle - spread) / (1 + z**2 / n)), min(1.0, (middle + spread) / (1 + z**2 / n))


def judge(pixels: Tensor, labels: Sequence[int]) -> Recognised:
    """Recognise pictures ([B, 3, S, S] uint8) that should show the classes `labels` of the built-in dataset."""
    found = [recognise(picture.permute(1, 2, 0).numpy()) for picture in pixels]
    wanted = [CLASS_NAMES[label].split() for label in labels]
    colour = np.array([f is not None and f.colour == name for f, (name, _) in zip(found, wanted, strict=True)])
    shape = np.array([f is not None and f.shape == name for f, (_, name) in zip(found, wanted, strict=True)])
    both, label_of = colour & shape, np.array(labels)
    return Recognised(
        num_images=len(found),
        both=both.mean(),
        shape=shape.mean(),
        colour=colour.mean(),
        nothing=sum(f is None for f in found) / len(found),
        by_class={name: both[label_of == n].mean() for n, name in enumerate(CLASS_NAMES) if (label_of == n).any()},
        wrong=np.flatnonzero(~both).tolist(),
    )


class Encoding(Record):
    """Images => latent cache."""

    seconds: float
    num_images: int
    image_size: int
    latent_shape: tuple[int, int, int]
    images_per_second: float = Field(description="Of the images that this call encoded.")


class FirstStage(Record):
    """What the autoencoder keeps of images that nothing was trained on; PSNR in dB of 8-bit pixels."""

    seconds: float
    psnr: float = Field(description="Mean over the images.")
    worst_psnr: float
    shown_psnr: list[float] = Field(description="Of each picture in samples/reconstructions.png.")
    real: Recognised
    reconstructed: Recognised


class Training(Record):
    """The training of the velocity network."""

    seconds: float = Field(description="Spent in optimizer steps, over all calls of the demo.")
    images_seen: int
    num_parameters: int
    device: str
    num_threads: int
    curve: list[dict[str, Any]] = Field(description="The lines of metrics.jsonl.")

    @property
    def images_per_second(self) -> float:
        return self.images_seen / self.seconds


class Sampling(Record):
    """Class-conditional samples with the recipe's own preset."""

    seconds: float
    drawing_seconds: float = Field(description="Of solver and decoder alone.")
    evaluations: float = Field(description="Network calls per image; guidance counts twice.")
    recognised: Recognised


class GuidanceRun(Record):
    """The samples of one guidance scale."""

    scale: float
    evaluations: float
    recognised: Recognised


class GuidanceSweep(Record):
    """The same seeds at several guidance scales."""

    seconds: float
    runs: list[GuidanceRun]


class MapRun(Record):
    """Held-out semantic maps, painted at one guidance scale."""

    scale: float
    evaluations: float
    iou: float = Field(description="Mean over maps of the mean IoU of their classes, asked for against recovered.")


class MapPainting(Record):
    """Mask-to-image: the map is recovered from the picture by a program and held against the one asked for."""

    seconds: float
    num_images: int
    real_iou: float = Field(description="Of the real images of these maps: the ceiling.")
    reconstructed_iou: float = Field(description="Of what the autoencoder makes of these.")
    runs: list[MapRun]


class HoleRun(Record):
    """Images with holes, filled in one way."""

    name: str
    evaluations: float
    rmse: float = Field(description="Root mean square error inside the holes, in levels of 255.")
    known_changed: int = Field(description="Values outside the holes that differ from the image.")


class HoleFilling(Record):
    """Inpainting of held-out images, against the image that the hole covered."""

    seconds: float
    num_images: int
    share: float = Field(description="Mean share of the image in the hole.")
    runs: list[HoleRun]


class ConditionLoss(Record):
    """The loss on held-out images told this or that."""

    told: list[str]
    loss: float
    standard_error: float


class ConditionLosses(Record):
    """What each condition is worth to the network."""

    seconds: float
    num_draws: int
    runs: list[ConditionLoss]


class SolverRun(Record):
    """One solver at one setting, against the fine reference."""

    solver: str
    steps: int | None = Field(None, description="Of a fixed-step solver.")
    tolerance: float | None = Field(None, description="rtol and atol of an adaptive solver.")
    evaluations: float = Field(description="Network calls per image, mean; guidance counts twice.")
    distance: float = Field(description="Root mean square distance of the latents over that of the reference from 0.")


class SolverComparison(Record):
    """Every solver at several costs."""

    seconds: float
    reference_evaluations: float
    runs: list[SolverRun]


class DemoFigures(Record):
    """Everything the demo measured; a stage that has not been run is None."""

    scale: DemoScale
    recipe: Recipe
    encoding: Encoding | None = None
    first_stage: FirstStage | None = None
    training: Training | None = None
    sampling: Sampling | None = None
    guidance: GuidanceSweep | None = None
    maps: MapPainting | None = None
    holes: HoleFilling | None = None
    losses: ConditionLosses | None = None
    solvers: SolverComparison | None = None
