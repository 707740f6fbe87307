"""What the demo measures: one record per stage; report.json holds them all."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field

from latentflow.data.sources.synthetic import CLASS_NAMES
from latentflow.records import Record
from latentflow.sizes import ImageSize
from latentflow.training.config import Recipe


class DemoScale(Record):
    """How much the demo draws and measures."""

    num_judged: int = Field(200, ge=12, description="Number of samples, and of real images, to recognise.")
    guidance_scales: tuple[float, ...] = Field((0.0, 1.0, 1.5, 2.0, 3.0, 5.0), description="Scales to sweep.")
    num_per_scale: int = Field(60, ge=12, description="Samples per guidance scale, with the same seeds.")
    num_painted: int = Field(100, ge=8, description="Held-out images for maps and for holes.")
    painting_scales: tuple[float, ...] = Field((1.0, 2.0, 3.0), description="Guidance scales for maps and known parts.")
    num_draws: int = Field(512, ge=8, description="Draws of image, time and noise per held-out loss.")
    num_solved: int = Field(6, ge=1, description="Samples on which solvers are compared.")
    budgets: tuple[int, ...] = Field((8, 16, 32, 64), description="Evaluations of fixed-step solvers.")
    tolerances: tuple[float, ...] = Field((1e-1, 1e-2, 1e-3, 1e-4), description="rtol and atol of adaptive solvers.")
    reference_steps: int = Field(120, ge=1, description="Steps of rk4 for the reference.")

    @property
    def num_shown(self) -> int:
        """Samples of each class on their contact sheet; sample i has class i mod 12."""
        return min(8, self.num_judged // len(CLASS_NAMES))


class Recognised(Record):
    """The shares of pictures that show the requested class."""

    num_images: int
    both: float = Field(description="Shape and colour are right.")
    shape: float = Field(description="The shape is right.")
    colour: float = Field(description="The colour is right.")
    nothing: float = Field(description="Nothing was recognised.")
    by_class: dict[str, float] = Field(description="`both` per class.")
    wrong: list[int] = Field(description="Indices of the pictures that do not show both.")

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of `both` (Wilson 1927)."""
        n, p, z = self.num_images, self.both, 1.96
        middle, spread = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        return max(0.0, (middle - spread) / (1 + z**2 / n)), min(1.0, (middle + spread) / (1 + z**2 / n))


class Encoding(Record):
    """Images => latent cache."""

    seconds: float
    num_images: int
    image_size: ImageSize
    latent_shape: tuple[int, int, int]
    images_per_second: float = Field(description="Throughput of the images that this call encoded.")


class FirstStage(Record):
    """What the autoencoder keeps of images that nothing was trained on; PSNR in dB of 8-bit pixels."""

    seconds: float
    psnr: float = Field(description="Mean over the images, in dB.")
    worst_psnr: float
    shown_psnr: list[float] = Field(description="PSNR of each picture in samples/reconstructions.png.")
    real: Recognised
    reconstructed: Recognised


class Training(Record):
    """The training of the velocity network."""

    seconds: float = Field(description="Time of all optimizer steps, over all calls of the demo.")
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
    drawing_seconds: float = Field(description="Time of solver and decoder.")
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
    """Samples from held-out semantic maps at one guidance scale."""

    scale: float
    evaluations: float
    iou: float = Field(description="Mean IoU of requested and recovered maps; see `mean_iou`.")


class MapPainting(Record):
    """Mask-to-image: a program recovers the map from the sample, and it is compared with the requested one."""

    seconds: float
    num_images: int
    real_iou: float = Field(description="The same for the real images of these maps: the ceiling.")
    reconstructed_iou: float = Field(description="The same for their reconstructions.")
    runs: list[MapRun]


class HoleRun(Record):
    """Images with holes, filled by one method."""

    name: str
    evaluations: float
    rmse: float = Field(description="RMSE inside the holes, in levels of 255.")
    known_changed: int = Field(description="Number of values changed outside the holes.")


class HoleFilling(Record):
    """Inpainting of held-out images, compared with the original content of the holes."""

    seconds: float
    num_images: int
    share: float = Field(description="Mean share of the image that the hole covers.")
    runs: list[HoleRun]


class ConditionLoss(Record):
    """The loss on held-out images under some conditions; the others are null."""

    told: list[str]
    loss: float
    standard_error: float


class ConditionLosses(Record):
    """What each condition contributes."""

    seconds: float
    num_draws: int
    runs: list[ConditionLoss]


class SolverRun(Record):
    """One solver at one setting, compared with the fine reference."""

    solver: str
    steps: int | None = Field(None, description="Steps of a fixed-step solver.")
    tolerance: float | None = Field(None, description="rtol and atol of an adaptive solver.")
    evaluations: float = Field(description="Mean network calls per image; guidance counts twice.")
    distance: float = Field(description="RMS distance of the latents from the reference, over its RMS.")


class SolverComparison(Record):
    """All solvers at several costs."""

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
