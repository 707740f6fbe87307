"""Requests of the verbs that measure, checked before anything is opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from latentflow.errors import nearest
from latentflow.metrics.names import (
    CLASS_ACCURACY,
    FEATURE_PRECISIONS,
    FEATURES,
    JUDGE_FILE,
    METRICS,
    NEIGHBOURS,
    is_judge,
)
from latentflow.requests import (
    FromText,
    ModelText,
    Names,
    Number,
    Numbers,
    Option,
    PathText,
    Request,
    RequestError,
    Split,
    Whole,
    WholeNumbers,
)
from latentflow.sampling.request import (
    GUIDE_DESCRIPTION,
    MOST_IMAGES,
    MOST_SEED,
    GuideName,
    SamplingRequest,
    require_interval,
)
from latentflow.sizes import ImageSize, bounded, typed_size
from latentflow.training.request import LONGEST, SHORTEST

LABEL_POLICIES = ("balanced", "uniform", "data", "rows", "none")
_TASKS = ("sample", "inpaint", "mask-to-image", "translate")
_NEIGHBOURS_EACH = 5  # that density and coverage count, so that six images are the fewest

LEAST_EXAMINED = 8
"""Images of a diagnosis."""

_BATCH_SIZE = "Images computed together; does not change the result."
_FIRST_SEED = "Seed of the first image; image i has seed SEED + i."


def _intervals(text: str) -> list[tuple[float, float]]:
    try:
        pairs = [tuple(map(float, part.split(":"))) for part in text.split(",")]
    except ValueError:
        pairs = [()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("is not a list of intervals like 0:1,0.1:0.8")
    return pairs


class EvaluationRequest(SamplingRequest):
    """Images to score against real ones, and by what."""

    model: ModelText = Field(
        description="A model; a folder or zip of PNG samples; with --reconstruction, also an autoencoder."
    )
    data: PathText = Field(description="Real images as for `encode`, or statistics of them: .safetensors or .npz.")
    metrics: Names | None = Field(
        None,
        description="fid, kid, is, precision, recall, density, coverage, class-accuracy; for pairs psnr, ssim, lpips; "
        "for holes psnr-hole, ssim-hole, p-ids, u-ids; for maps miou; for inputs psnr-input, ssim-input. Otherwise the "
        "usual ones of the task.",
    )
    num: Annotated[Whole, Option(called="number of images", remedy="scores compare sets of images")] | None = Field(
        None,
        ge=2,
        le=100 * MOST_IMAGES,
        description="Number of images; otherwise 50,000 if they are drawn, or all there are.",
    )
    task: str = Field(
        "sample",
        description="sample; inpaint, which fills holes in DATA; mask-to-image, which paints its maps; translate, "
        "which draws from the paired inputs of DATA.",
    )
    reconstruction: bool = Field(
        False, description="Score the autoencoder's reconstructions of DATA: the best that its models can reach."
    )
    features: str = Field(
        "inception",
        description="inception (FID); dinov2; latents or random, which need no download; or the folder of a judge, by "
        "`train-features`.",
    )
    weights: PathText | None = Field(None, description="Weights of the features: a file; otherwise downloaded once.")
    features_precision: str = Field(
        "fp32", description="Precision of the features: fp32, as published; tf32 or bf16 are faster and not comparable."
    )
    labels: str | None = Field(
        None,
        description="Class of image i: balanced (the default), uniform, data (as often as in DATA), rows (class and "
        "named conditions of an image of DATA; the default for a model with named conditions) or none.",
    )
    label_column: str | None = Field(
        None, description="If DATA is a table: its column of classes, if it is not called label, class or category."
    )
    seed: Whole = Field(0, ge=0, le=MOST_SEED, description=_FIRST_SEED)
    batch_size: Whole = Field(32, ge=1, description="Images computed together; does not change them.")
    num_workers: Whole | None = Field(
        None, ge=0, le=256, description="Processes that read images; 0: threads; otherwise as many as speed it up."
    )
    split: Split = Field("all", description="Which of the model's own images in DATA: held-out, training, or all.")
    masks: PathText | None = Field(
        None,
        description="Holes: a folder of masks, or mixed, strokes, boxes, halves, borders; otherwise as in training.",
    )
    segmenter: str | None = Field(
        None, description="For miou: package.module:function, uint8 [B, 3, H, W] to classes [B, H, W]."
    )
    lpips: Path | None = Field(
        None, description="For lpips: a folder with alexnet-owt-7be5be79.pth and alex.pth, or one file of both."
    )
    image_size: Annotated[ImageSize, bounded(1, 16_384), FromText(typed_size)] | None = Field(
        None,
        description="Image size in pixels, 256 or WIDTHxHEIGHT: needed if MODEL is an autoencoder; of a model with "
        "several sizes, the one to draw and to compare with the images nearest to it. Default: that of most training "
        "images.",
    )
    resamples: Annotated[Whole, Option(remedy="0 for none; 200 are usual")] | None = Field(
        None,
        ge=0,
        le=100_000,
        description="Bootstrap resamples for the intervals; 0: no intervals; otherwise from the spread over images.",
    )
    neighbours: Whole = Field(
        NEIGHBOURS,
        ge=0,
        description="Precision, recall, density and coverage look at this many images of each kind at most; 0: all.",
    )
    reference_out: Path | None = Field(
        None, description="File for the statistics of DATA, .safetensors; otherwise next to OUT."
    )
    out: Path | None = Field(
        None, description="A folder, or a .json file; repeat the command to go on after an interruption."
    )
    against: Path | None = Field(
        None,
        description="Another report to compare with: its folder or its .json file; refused if the protocols differ.",
    )
    anyway: bool = Field(False, description="Compare even if the protocols differ.")

    @property
    def whole_task(self) -> str:
        """The task, "reconstruction" included."""
        return "reconstruction" if self.reconstruction else self.task

    @property
    def wanted(self) -> list[str]:
        """The metrics that are named, each once; empty: the usual ones."""
        return list(dict.fromkeys("fid" if name == "fd" else name for name in self.metrics or ()))

    @model_validator(mode="after")
    def _check_words(self) -> EvaluationRequest:
        _require_word(self, "task", _TASKS)
        _require_features(self)
        _require_word(self, "features_precision", FEATURE_PRECISIONS)
        if self.labels is not None:
            _require_word(self, "labels", LABEL_POLICIES)
        if self.reconstruction and self.task != "sample":
            raise RequestError("reconstruction", f" measures the autoencoder only: remove --task {self.task}")
        for name in self.wanted:
            if name not in METRICS[self.whole_task]:
                valid = nearest(name, METRICS[self.whole_task])
                raise RequestError("metrics", f": the task {self.whole_task} has no metric {name!r}; {valid}")
        return self

    @model_validator(mode="after")
    def _check_numbers(self) -> EvaluationRequest:
        if self.resamples == 1:
            raise RequestError("resamples", " 1: give 0 for none, or 2 or more; 200 are usual")
        if 0 < self.neighbours <= _NEIGHBOURS_EACH:
            raise RequestError(
                "neighbours",
                f" among {self.neighbours} images: each needs {_NEIGHBOURS_EACH}, so give {_NEIGHBOURS_EACH + 1} or "
                "more, or 0 for all",
            )
        return self

    @model_validator(mode="after")
    def _check_metrics(self) -> EvaluationRequest:
        if "is" in self.wanted and self.features != "inception":
            raise RequestError(
                "metrics", f": the Inception Score needs the features 'inception', not {self.features!r}; remove 'is'"
            )
        if CLASS_ACCURACY in self.wanted and self.labels == "none":
            raise RequestError("metrics", f": {CLASS_ACCURACY} needs images with a class; remove --labels none")
        if "lpips" in self.wanted and self.lpips is None:
            raise RequestError(
                "metrics", ": lpips needs the weights of its network: --lpips FILE, or a folder with the two files"
            )
        if "miou" in self.wanted and self.segmenter is None:
            raise RequestError("metrics", ": miou needs a segmentation network: --segmenter package.module:function")
        return self

    @model_validator(mode="after")
    def _check_effects(self) -> EvaluationRequest:
        """Refuse options without effect, as far as this is known without the model."""
        drawing = {"labels": self.labels is not None, **dict.fromkeys(self.preset(), True)}
        useless = {
            "split": self.split != "all" and self.reconstruction,
            "masks": self.masks is not None and self.whole_task != "inpaint",
            "segmenter": self.segmenter is not None and self.whole_task != "mask-to-image",
            **{name: given and self.reconstruction for name, given in drawing.items()},
        }
        for name in (name for name, is_useless in useless.items() if is_useless):
            raise RequestError(name, f" has no effect {self._with_what()}; remove it")
        if self.task != "sample" and self.labels not in (None, "none", "data"):
            raise RequestError(
                "labels",
                f" {self.labels!r}: with --task {self.task} an image has the class of its real one: data, or none",
            )
        return self

    def _with_what(self) -> str:
        return "with --reconstruction" if self.reconstruction else f"with --task {self.task}"


class SweepRequest(Request):
    """Sampling presets to compare, and by what."""

    model: ModelText = Field(description="A model folder, a run folder or a hub id.")
    data: PathText = Field(description="Images as for `encode`, or a file of reference statistics.")
    out: Path = Field(Path("sweep"), description="Folder for page.html, sweep.json, sweep.svg and the candidates.")
    features: str = Field(
        "random",
        description="What images are compared by: random, latents, inception, dinov2, or the folder of a judge.",
    )
    weights: PathText | None = Field(
        None, description="Weights of the features: of inception a file, of dinov2 a folder or hub id."
    )
    solvers: Names = Field(["heun", "ab2", "ab4", "dopri5"], description="Solvers to compare; of a student its jumps.")
    steps: WholeNumbers = Field(
        [4, 8, 16, 32], description="Steps of the fixed-step solvers; of a student 1, 2, 4 and 8."
    )
    tolerances: Numbers = Field([1e-2, 1e-3], description="Tolerances of bosh3 and dopri5: rtol = atol.")
    guidance: Numbers | None = Field(
        None,
        description="Guidance scales; otherwise 1,1.5,2,3, or only 1 if the model cannot be guided by its classes.",
    )
    intervals: (
        Annotated[list[Annotated[tuple[Number, Number], AfterValidator(require_interval)]], FromText(_intervals)] | None
    ) = Field(None, description="Times between which guidance acts: 0:1,0.1:0.8; otherwise always.")
    guides: Names | None = Field(
        None,
        description="Guides to compare: models as for --guide of `sample`, @1/8, and none for the null condition; "
        "otherwise as in the model's preset.",
    )
    shifts: Numbers = Field([1.0], description="Time shifts of the grid; 1: even.")
    ema: Numbers | None = Field(
        None,
        description="Lengths of the weights' average, for a run with training.ema_lengths; otherwise the model's own.",
    )
    num: Whole = Field(1000, ge=2, le=MOST_IMAGES, description="Images per candidate in the last round.")
    budget: Number | None = Field(
        None,
        description="Stop starting new candidates after this many seconds. All candidates then draw few images, the "
        "promising half twice as many, and so on; without a budget all of them draw --num.",
    )
    margin: Number = Field(0.1, description="Treat a distance that is larger by less than this share as equal.")
    write: bool = Field(
        False, description="Write the best preset into the model folder; nothing is written if it is undecided."
    )
    batch_size: Whole = Field(32, ge=1, description=_BATCH_SIZE)
    seed: Whole = Field(0, ge=0, le=MOST_SEED, description=_FIRST_SEED)

    @model_validator(mode="after")
    def _check(self) -> SweepRequest:
        _require_features(self)
        if self.guides is not None and not all(self.guides):
            raise RequestError("guides", ": a name is empty; give models such as @1/8, or none")
        if self.budget is not None and not self.budget > 0:
            raise RequestError("budget", f" {self.budget:g} s: give more than 0, or remove it to measure everything")
        for length in self.ema or ():
            if not SHORTEST <= length <= LONGEST:
                raise RequestError(
                    "ema", f" {length:g}: give lengths from {SHORTEST:g} to {LONGEST:g}, such as 0.05,0.1"
                )
        if self.ema is not None and len(set(self.ema)) < max(len(self.ema), 1):
            raise RequestError("ema", ": give one length or more, each once, such as 0.05,0.1")
        if not 0 <= self.margin < 1:
            raise RequestError("margin", f" {self.margin:g}: give a share from 0 to below 1, such as 0.1")
        return self


class DiagnoseRequest(Request):
    """A model to examine, and the images to examine it on."""

    model: ModelText = Field(description="A model folder, a run folder or a hub id.")
    data: PathText = Field(description="Images as for `encode`, preferably held-out ones.")
    out: Path = Field(Path("diagnosis"), description="Folder for page.html, diagnose.json and pictures.")
    train: PathText | None = Field(
        None,
        description="Training images of the model, to search for copies; otherwise those of DATA that were not held "
        "out, or half of DATA.",
    )
    num: Annotated[Whole, Option(called="number of images", remedy="they are compared in two halves")] = Field(
        512, ge=LEAST_EXAMINED, description="Images of DATA; fewer if only fewer were held out."
    )
    num_train: Whole = Field(4096, ge=2, description="Training images, if there are as many.")
    num_samples: Whole | None = Field(
        None, ge=4, le=MOST_IMAGES, description="Images to draw; otherwise half of --num."
    )
    features: str = Field(
        "random",
        description="What images are compared by: random, latents, inception, dinov2, or the folder of a judge.",
    )
    guidance: Number | None = Field(None, ge=0, le=1000, description="Guidance scale; otherwise the model's preset.")
    guide: GuideName | None = Field(None, description=GUIDE_DESCRIPTION)
    batch_size: Whole = Field(16, ge=1, description=_BATCH_SIZE)
    seed: Whole = Field(0, ge=0, le=MOST_SEED, description=_FIRST_SEED)

    @property
    def num_drawn(self) -> int:
        """Images to draw."""
        return self.num_samples or self.num // 2

    def fitting(self, available: int) -> DiagnoseRequest:
        """The same with at most so many images of DATA, and as many samples as before."""
        return self.model_copy(update={"num": min(self.num, available), "num_samples": self.num_drawn})

    @model_validator(mode="after")
    def _check_words(self) -> DiagnoseRequest:
        _require_features(self)
        return self


class BoundRequest(Request):
    """A model whose Wasserstein bound is measured, and on how many draws."""

    model: ModelText = Field(description="A model folder, a run folder or a hub id.")
    data: PathText = Field(description="Images as for `encode`, preferably held-out ones.")
    out: Path | None = Field(None, description="Folder for page.html, bound.json and the charts.")
    num: Annotated[Whole, Option(called="number of images", remedy="a standard error needs two")] = Field(
        256, ge=2, description="Images to reconstruct, and draws for the loss in each bin of time."
    )
    num_data: Whole = Field(
        4096, ge=1, description="Images whose latents stand for the data distribution, if there are as many."
    )
    points: Whole = Field(64, ge=1, description="States of each kind at which derivatives are taken.")
    bins: Whole = Field(10, ge=1, description="Bins of time.")
    batch_size: Whole = Field(8, ge=1, description="Images computed together; smaller needs less memory.")
    seed: Whole = Field(0, ge=0, le=MOST_SEED, description="Seed of images, times and noises.")

    @model_validator(mode="after")
    def _check_points(self) -> BoundRequest:
        if self.points < self.bins:
            raise RequestError("points", f" {self.points}: give at least one for each of the {self.bins} bins of time")
        return self


class BenchmarkRequest(SamplingRequest):
    """A model whose sampling is timed, and how often."""

    model: ModelText = Field(description="A model folder, a run folder or a hub id.")
    num: Annotated[Whole, Option(called="number of images")] = Field(
        8, ge=1, description="Images of each repeat, rounded up to whole batches."
    )
    batch_sizes: WholeNumbers = Field([1, 8], description="Batch sizes to compare.")
    repeats: Annotated[Whole, Option(called="number of repeats")] = Field(
        3, ge=1, description="Timed repeats, after one that warms up."
    )
    seed: Whole = Field(0, ge=0, le=MOST_SEED, description=_FIRST_SEED)

    @model_validator(mode="after")
    def _check_batch_sizes(self) -> BenchmarkRequest:
        if not self.batch_sizes:
            raise RequestError("batch_sizes", ": no batch sizes; give one or more, such as 1,8")
        if min(self.batch_sizes) < 1:
            raise RequestError("batch_sizes", f": {min(self.batch_sizes)} images in a batch; give 1 or more")
        return self


def _require_features(request: EvaluationRequest | SweepRequest | DiagnoseRequest) -> None:
    """Refuse features that are neither known by name nor the folder of a finished judge, and weights for a judge."""
    given = request.features
    if is_judge(given):
        if getattr(request, "weights", None) is not None:
            raise RequestError("weights", " has no effect with a judge, which has its own; remove it")
        return
    if given not in FEATURES and Path(given).is_dir():
        begun = (Path(given) / "plan.json").is_file() and (Path(given) / "checkpoints").is_dir()
        advice = (
            "its training has not finished: repeat the command that began it"
            if begun
            else "give the folder that `latentflow train-features DATA --out FOLDER` wrote"
        )
        raise RequestError("features", f" {given!r}: there is no {JUDGE_FILE} in this folder; {advice}")
    if given not in FEATURES and os.sep in given:
        known = ", ".join(FEATURES)
        raise RequestError("features", f" {given!r}: there is no such folder; give that of a judge, or one of {known}")
    _require_word(request, "features", FEATURES)


def _require_word(request: Request, field: str, words: tuple[str, ...]) -> None:
    """Refuse a value that is not one of `words`, naming the nearest of them."""
    value = getattr(request, field)
    if value not in words:
        raise RequestError(field, f" {value!r}: {nearest(value, words)}")
