"""The subject of an evaluation: images that a model draws, samples in files, reconstructions, or paintings.

Each is opened once, which checks the request against it and against the real images. Then `columns` gives the numbers
of its images: their features, and whatever else the task scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

import torch
from torch import Tensor

from latentflow.autoencoder import Autoencoder
from latentflow.data.items import ImageSource, stack_pixels
from latentflow.data.painting.input_rules import NO_INPUTS
from latentflow.data.paired_choice import PairedChoice
from latentflow.data.pixel_choice import PixelChoice
from latentflow.data.sources.images import table_with
from latentflow.data.sources.pixel_survey import choice_for
from latentflow.data.table_options import TableOptions
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.evaluation.autoencoders import open_autoencoder
from latentflow.evaluation.class_accuracy import require_class_judge, require_judged
from latentflow.evaluation.drawn_set import plan_set
from latentflow.evaluation.painted import compares_inputs, painted, plan_painting, require_same_classes
from latentflow.evaluation.read_images import read_batches, require_readable
from latentflow.evaluation.real_images import RealFeatures, RealImages, image_features, open_real_images
from latentflow.evaluation.request import EvaluationRequest
from latentflow.evaluation.samples_in_files import open_samples
from latentflow.evaluation.shards import Columns, Work
from latentflow.metrics.evaluation_report import ModelFacts
from latentflow.metrics.feature_scores import check_metrics
from latentflow.metrics.features.extractors import FeatureExtractor, open_features
from latentflow.metrics.features.judge_folder import read_judge
from latentflow.metrics.features.lpips import load_lpips
from latentflow.metrics.names import (
    CLASS_ACCURACY,
    DISCRIMINATIVE_SCORES,
    METRICS,
    USUAL_METRICS,
    features_name,
    is_judge,
)
from latentflow.metrics.pairs import PairJudge, pair_order
from latentflow.metrics.scores import require_enough, some_of
from latentflow.model.flow_model import FlowModel
from latentflow.pixel_format import PixelFormat
from latentflow.runtime import Runtime
from latentflow.sampling.drawing import trained_size
from latentflow.sampling.row_conditions import require_known_columns, row_conditions
from latentflow.sizes import Size

USUAL_NUM = 50_000  # images of a published FID


class Subject(ABC):
    """Images to be scored, checked against the request and the real images.

    Attributes:
        task: as in `EvaluationProtocol`.
        image_size: of its images.
        pixel_format: of its images, which the real ones are read in.
        device: where it is computed.
        autoencoder: for features that are its latents.
        real: the real images.
        metrics: what is scored.
        judge: measures pairs.
        num: number of images.
        labels: the label policy; "none": unconditional, "not known": of images in files.
        num_classes: of the model; 0 without one.
        sampling: the preset, for the report; empty: nothing is drawn.
        inputs: holes or segmenter, for the report.

    Raises:
        ConfigError, DataError, ArtifactError: something in the request does not exist or does not fit.
    """

    task: Literal["sample", "images", "reconstruction", "inpaint", "mask-to-image", "translate"]
    autoencoder: Autoencoder | None = None
    labels = "none"
    num_classes = 0

    def __init__(
        self,
        request: EvaluationRequest,
        image_size: Size,
        device: torch.device,
        pixel_format: PixelFormat | None = None,
    ):
        self.request, self.image_size, self.device = request, image_size, device
        judge = read_judge(request.features) if is_judge(request.features) else None
        self._judged = judge.class_names if judge else []
        self.sampling: dict[str, Any] = {}
        self.inputs: dict[str, str] = {}
        self.real = self._chosen(self._open_real(request, pixel_format))
        self.pixel_format = pixel_format or self.real.pixel_format
        self.metrics = request.wanted or [*self._usual_metrics(), *(["lpips"] if request.lpips else [])]
        network = load_lpips(request.lpips, device) if request.lpips else None
        self.judge = PairJudge(bool({"ssim", "ssim-hole"} & {*self.metrics}), network, device, self.pixel_format)
        if self._available is not None and request.num is not None and request.num > self._available:
            raise DataError(f"--num {request.num}, but there are {self._available} images; remove it to take all")
        self.num = request.num or self._available or USUAL_NUM
        self._check_classes()
        self._check_scores()

    def _open_real(self, request: EvaluationRequest, pixel_format: PixelFormat | PixelChoice | None) -> RealImages:
        table = TableOptions(label_column=request.label_column)
        return open_real_images(request.data, self.image_size, pixel_format, inputs=self._inputs, table=table)

    @abstractmethod
    def facts(self) -> ModelFacts:
        """Whose images they are; weights are hashed when this is called."""

    @abstractmethod
    def columns(self, extractor: FeatureExtractor, reference: RealFeatures, work: Work) -> Columns:
        """The numbers of the images by name, each [N, ...], "features" among them.

        In all but the first of several processes they are not complete.
        """

    @property
    def class_names(self) -> Sequence[str]:
        """The classes that the labels of its images are indices of; none: they have no labels."""
        return ()

    @property
    def _inputs(self) -> PairedChoice:
        """The paired inputs of the real images."""
        return PairedChoice(NO_INPUTS)

    @property
    def _available(self) -> int | None:
        """The most images there can be; None: any number."""
        return len(self._real_source())

    def _chosen(self, real: RealImages) -> RealImages:
        """Those of the real images that the request asks for."""
        return real

    def _real_source(self) -> ImageSource:
        """The real images themselves, which tasks of pairs need."""
        if self.real.source is None:
            raise ConfigError(
                f"the task {self.task} needs the images themselves, not {self.real.data}, their statistics"
            )
        return self.real.source

    def _usual_metrics(self) -> list[str]:
        return ["fid"] if self.real.source is None else list(USUAL_METRICS[self.request.whole_task])

    def _check_classes(self) -> None:
        """Refuse a judge of other classes, and class accuracy that cannot be measured; add it where a judge can."""
        request, names = self.request, self.class_names
        require_judged(self._judged, names, request.features)
        if CLASS_ACCURACY in self.metrics:
            require_class_judge(self._judged, names, self.real)
        elif request.metrics is None and CLASS_ACCURACY in METRICS[request.whole_task]:
            self.metrics += [CLASS_ACCURACY] if self._judged and names and request.labels != "none" else []

    def _check_scores(self) -> None:
        """Refuse what cannot be computed, before features are."""
        real, features = self.real, features_name(self.request.features)
        if real.source is None and real.stored.provenance.feature_name not in (features, "not known"):
            raise DataError(
                f"{real.data} holds statistics of features {real.stored.provenance.feature_name}, not of {features}"
            )
        check_metrics(self.metrics, self.num, real.num_images)
        for name in self.metrics:
            if name in DISCRIMINATIVE_SCORES:
                require_enough(name.replace("-", "_"), self.num)

    def open_extractor(self) -> FeatureExtractor:
        """The feature network, on the subject's device.

        Raises:
            ArtifactError: its weights are not there; names the features that need none.
            ConfigError: see `open_features`.
        """
        try:
            return open_features(
                self.request.features,
                weights=self.request.weights,
                autoencoder=self.autoencoder,
                image_size=self.image_size,
                device=self.device,
                precision=self.request.features_precision,
                pixel_format=self.pixel_format,
            )
        except ArtifactError as error:
            if self.request.weights is not None:
                raise
            raise ArtifactError(f"{error}; or choose --features random or latents, which need no download") from error

    def _paired_rows(self, reference: RealFeatures) -> list[int]:
        """The real images that the images belong to."""
        return [] if reference.rows is None else reference.rows[some_of(len(reference.rows), self.num)].tolist()


class _OfAModel(Subject):
    """Images that a model draws."""

    def __init__(self, request: EvaluationRequest, runtime: Runtime):
        self.flow = FlowModel.from_pretrained(request.model, runtime=runtime)
        self.autoencoder = self.flow.autoencoder
        self.num_classes = self.flow.config.conditioning.num_classes
        size = trained_size(self.flow, request.image_size or self.flow.config.image_size)
        super().__init__(request, size, self.flow.device, self.flow.config.pixel_format)

    @property
    def class_names(self) -> Sequence[str]:
        return self.flow.config.conditioning.class_names

    def _chosen(self, real: RealImages) -> RealImages:
        return real.of_shape(self.flow.config, self.request.split)

    def facts(self) -> ModelFacts:
        training = self.flow.config.training.model_dump(mode="json")
        return ModelFacts(name=self.flow.reference, weights=self.flow.weights_hash, training=training)


class Drawn(_OfAModel):
    """Images that a model draws from noise; they are never written."""

    task = "sample"
    _available = None

    def __init__(self, request: EvaluationRequest, runtime: Runtime):
        super().__init__(request, runtime)
        labels, shares = self._policy(request), None
        if labels == "rows" or (labels == "data" and self.num_classes):
            if self.real.source is None:
                what = "the images" if labels == "rows" else "the labelled images"
                raise ConfigError(f"labels {labels!r} need {what} themselves, not {self.real.data}, their statistics")
            if self.num_classes:
                require_same_classes(self.flow, self.real.source)
            shares = [1.0] * self.num_classes  # the true ones follow with the features
        if labels == "rows":
            self._require_conditions(self.real.source)
        how = {"labels": labels, "label_shares": shares, "preset": request.preset(), "image_size": request.image_size}
        self._set = plan_set(self.flow, seed=request.seed, **how)
        self.labels, self.sampling = self._set.policy, self._set.drawing.sampling.model_dump(mode="json")

    def _policy(self, request: EvaluationRequest) -> str:
        return request.labels or ("rows" if self.flow.config.conditioning.columns else "balanced")

    def _require_conditions(self, source: ImageSource) -> None:
        try:
            require_known_columns(self.flow.config.conditioning, source)
        except ConfigError as error:
            raise ConfigError(
                f"{error}; add it, or give --labels balanced, which leaves named conditions out"
            ) from error

    def _open_real(self, request: EvaluationRequest, pixel_format: PixelFormat | None) -> RealImages:
        own = self.flow.config.conditioning.columns if self._policy(request) == "rows" else ()
        columns = [one.column for one in own]
        try:
            table = table_with(request.data, columns, request.label_column, self.class_names)
            return open_real_images(request.data, self.image_size, pixel_format, inputs=self._inputs, table=table)
        except DataError as error:
            if not columns:
                raise
            named = ", ".join(column.name for column in columns)
            raise DataError(
                f"{error}; images are to be drawn under the conditions of DATA ({named}); give --labels balanced to "
                "leave these out"
            ) from error

    def columns(self, extractor: FeatureExtractor, reference: RealFeatures, work: Work) -> Columns:
        chosen = self._set
        if self.labels == "data":
            chosen = chosen.with_shares(torch.bincount(reference.labels, minlength=self.num_classes).tolist())
        if self.labels == "rows":
            labels = reference.labels if self.num_classes else None
            rows = (self._real_source(), reference.rows.tolist(), labels, self.request.seed)
            chosen = chosen.with_rows(row_conditions(self.flow.config.conditioning, *rows))
        return chosen.draw(extractor, self.num, work)


class Painted(_OfAModel):
    """Images that a model paints over real ones: holes, semantic maps or paired inputs."""

    def __init__(self, request: EvaluationRequest, runtime: Runtime):
        self.task = request.task
        super().__init__(request, runtime)
        self._painting = plan_painting(self.flow, self._real_source(), request, self.judge)
        self.labels = "data" if self._painting.own_labels else "none"
        self.sampling, self.inputs = self._painting.drawing.sampling.model_dump(mode="json"), self._painting.inputs

    def _usual_metrics(self) -> list[str]:
        """Inputs are compared with images where they are made from them."""
        usual, inputs = super()._usual_metrics(), self.flow.config.inputs
        derived = inputs is not None and inputs.is_derived and compares_inputs(self.flow)
        return [name for name in usual if derived or not name.endswith("-input")]

    @property
    def _inputs(self) -> PairedChoice:
        return self.flow.config.paired

    def columns(self, extractor: FeatureExtractor, reference: RealFeatures, work: Work) -> Columns:
        return painted(self.flow, self._painting, self._real_source(), self._paired_rows(reference), extractor, work)


class Reconstructed(Subject):
    """Real images as an autoencoder reconstructs them: the best that its models can reach."""

    task = "reconstruction"

    def __init__(self, request: EvaluationRequest, runtime: Runtime):
        self.autoencoder, image_size, pixel_format = open_autoencoder(request.model, request.image_size, runtime)
        super().__init__(request, image_size, self.autoencoder.device, pixel_format)
        self.autoencoder.require_channels(self.pixel_format.channels, request.data)

    def _open_real(self, request: EvaluationRequest, pixel_format: PixelFormat | PixelChoice | None) -> RealImages:
        return super()._open_real(request, pixel_format or choice_for(PixelChoice(), request.model))

    @property
    def class_names(self) -> Sequence[str]:
        return self._real_source().class_names

    def facts(self) -> ModelFacts:
        return ModelFacts(name=self.autoencoder.reference, weights=self.autoencoder.content_hash)

    def columns(self, extractor: FeatureExtractor, reference: RealFeatures, work: Work) -> Columns:
        def change(pixels: Tensor, rows: list[int]) -> tuple[Tensor, Columns]:
            parts = self.autoencoder.slices(pixels)
            reconstructed = torch.cat([self.autoencoder.reconstruct(part, self.pixel_format) for part in parts])
            return reconstructed, self.judge(reconstructed, pixels)

        plan = {
            "data": self.real.fingerprint,
            "image_size": self.image_size.written,
            "features": extractor.hash,
            "autoencoder": self.autoencoder.content_hash,
            "pairs": self.judge.key,
        }
        rows = self._paired_rows(reference)
        return image_features(self._real_source(), rows, extractor, plan=plan, work=work, change=change)


class Files(Subject):
    """Generated images in files."""

    task = "images"

    def __init__(self, request: EvaluationRequest, runtime: Runtime, samples: ImageSource, rows: Sequence[int]):
        self._samples, self._rows = samples, rows
        given = {"labels": request.labels, "masks": request.masks, "image_size": request.image_size}
        drawing = {**given, "split": None if request.split == "all" else request.split, **request.preset()}
        for name in (name for name, value in drawing.items() if value is not None):
            raise ConfigError(f"--{name.replace('_', '-')} has no effect on images in files; remove it")
        for ending, what in (
            ("-hole", "where the holes of images in files were"),
            ("-input", "what they were drawn from"),
        ):
            for name in (name for name in request.wanted if name.endswith(ending)):
                raise ConfigError(f"{name}: it is not known {what}; remove it")
        super().__init__(request, samples.image_size, runtime.device, samples.pixel_format)
        self.labels = "not known"

    @property
    def _available(self) -> int | None:
        return len(self._rows)

    def facts(self) -> ModelFacts:
        return ModelFacts(name=self._samples.description, weights=self._samples.fingerprint())

    def columns(self, extractor: FeatureExtractor, reference: RealFeatures, work: Work) -> Columns:
        rows, plan = self._rows[: self.num], {"samples": self._samples.fingerprint(), "features": extractor.hash}
        columns = image_features(self._samples, rows, extractor, plan=plan, work=work, for_all=("rows",))
        if missing := self.num - len(columns["rows"]):
            raise DataError(f"{missing} of the generated images cannot be read; draw them again")
        return columns


class PaintedFiles(Files):
    """Painted images in files, each paired with the real image of the same name, whatever the suffix."""

    def __init__(self, request: EvaluationRequest, runtime: Runtime, samples: ImageSource, rows: Sequence[int]):
        self.task = request.task
        super().__init__(request, runtime, samples, rows)
        self.labels = "none"

    @property
    def _available(self) -> int | None:
        return len(self._real_source())

    def _usual_metrics(self) -> list[str]:
        return [name for name in super()._usual_metrics() if not name.endswith(("-hole", "-input"))]

    def columns(self, extractor: FeatureExtractor, reference: RealFeatures, work: Work) -> Columns:
        samples, source, rows = self._samples, self._real_source(), self._paired_rows(reference)
        places = pair_order(_stems(source, rows), _stems(samples, self._rows))
        order = [self._rows[place] for place in places]
        partner = dict(zip(order, rows, strict=True))

        def change(pixels: Tensor, painted_rows: list[int]) -> tuple[Tensor, Columns]:
            (pairs,) = read_batches(source, [partner[row] for row in painted_rows], len(painted_rows))
            return pixels, self.judge(pixels, stack_pixels([require_readable(found).pixels for _, found in pairs]))

        plan = {
            "samples": samples.fingerprint(),
            "data": source.fingerprint(),
            "features": extractor.hash,
            "pairs": self.judge.key,
        }
        columns = image_features(samples, order, extractor, plan=plan, work=work, change=change, for_all=("rows",))
        if missing := len(order) - len(columns["rows"]):
            raise DataError(f"{missing} of the painted images cannot be read; paint them again")
        return columns


def _stems(images: ImageSource, rows: Sequence[int]) -> list[str]:
    return [str(PurePosixPath(images.name(row)).with_suffix("")) for row in rows]


def open_subject(request: EvaluationRequest, runtime: Runtime) -> Subject:
    """Open the subject of a request.

    Raises:
        ArtifactError, ConfigError, DataError: there are none, or not of the kind that the task needs.
    """
    if request.reconstruction:
        return Reconstructed(request, runtime)
    if (found := open_samples(request.model)) is None:
        return (Drawn if request.task == "sample" else Painted)(request, runtime)
    if request.task == "mask-to-image":
        raise ConfigError(f"{request.model} is a set of images; the task mask-to-image draws its own: give a model")
    return (Files if request.task == "sample" else PaintedFiles)(request, runtime, *found)
