"""The config of a model, as its folder stores it in config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from latentflow.autoencoder import BUILT_IN, Autoencoder, LatentNormalisation
from latentflow.data.buckets import Bucket, nearest_bucket
from latentflow.data.hold_out import HeldOut
from latentflow.data.painting.input_rules import NO_INPUTS, InputRules
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.paired_choice import PairedChoice
from latentflow.errors import ConfigError, nearest
from latentflow.flow.path import LinearPath, PathConfig
from latentflow.flow.solvers import SOLVERS
from latentflow.model.conditioning import CONDITION_NAMES, Conditioning, ConditionName
from latentflow.model.guide_reference import GuideReference
from latentflow.model.student_record import StudentRecord
from latentflow.networks.velocity_network import (
    DenoiserPrediction,
    ModelNetwork,
    NoisePrediction,
    PredictionConfig,
    VelocityPrediction,
    build_network,
)
from latentflow.pixel_format import PixelFormat
from latentflow.records import Record
from latentflow.sizes import ImageSize, Size, bounded

AUTOENCODER_FOLDER = "autoencoder"
"""The subfolder of a model folder for an autoencoder that is not on the hub."""


class SamplingPreset(Record):
    """How a model is sampled by default."""

    solver: str = Field(default="heun", description="A name from flow.solvers.SOLVERS; jumps: those of a student.")
    steps: int = Field(
        default=25, ge=1, le=10_000, description="Intervals of a fixed-step solver; adaptive solvers choose their own."
    )
    guidance: float = Field(default=1.0, ge=0, le=1000, description="Guidance scale; 1: off.")
    guidance_interval: tuple[float, float] = Field(default=(0.0, 1.0), description="Times at which guidance applies.")
    guided_by: list[ConditionName] | None = Field(
        default=None, description="Conditions that guidance strengthens; null: all that are given."
    )
    guided_channels: int | None = Field(
        default=None,
        ge=1,
        description="Guide only the first latent channels, as the published DiT does; null: all of them.",
    )
    guide: GuideReference | None = Field(
        default=None, description="The model to guide away from; null: the null condition of the model itself."
    )
    shift: float = Field(
        default=1.0, gt=0, le=1e4, description="Time shift of the grid; above 1: more steps near the noise."
    )
    rtol: float = Field(default=1e-5, gt=0, le=1, description="Relative tolerance of adaptive solvers, per image.")
    atol: float = Field(default=1e-5, gt=0, le=100, description="Absolute tolerance of adaptive solvers, per image.")

    @property
    def in_words(self) -> str:
        """What it does, in a line."""
        adaptive = getattr(SOLVERS.get(self.solver), "error_weights", None) is not None
        parts = [self.solver, f"tolerance {self.rtol:g}" if adaptive else f"{self.steps} steps"]
        parts.append(f"guidance {self.guidance:g}")
        if self.guidance != 1 and self.guide is not None:
            parts.append(f"away from {self.guide.model}")
        if self.guidance != 1 and self.guidance_interval != (0.0, 1.0):
            parts.append("between {:g} and {:g}".format(*self.guidance_interval))
        if self.shift != 1 and not adaptive:
            parts.append(f"shift {self.shift:g}")
        return ", ".join(parts)

    def guided_from(self, guide: GuideReference | None) -> SamplingPreset:
        """The same with a guide, or with none; another guide than before gets all conditions."""
        is_other = guide is not None and (self.guide is None or guide.model != self.guide.model)
        changed = {"guide": guide, "guided_by": None} if is_other else {"guide": guide}
        return self.model_copy(update=changed)


class AutoencoderRecord(Record):
    """The autoencoder that a model was trained with."""

    reference: str = Field(
        max_length=1000, description=f"A hub id, or {AUTOENCODER_FOLDER!r}: the folder inside the model folder."
    )
    content_hash: str = Field(pattern="^[0-9a-f]{64}$")
    factor: int = Field(ge=1, le=4096)
    num_channels: int = Field(ge=1, le=65_536)

    @classmethod
    def of(cls, autoencoder: Autoencoder) -> AutoencoderRecord:
        """The record of an autoencoder; one that is not on the hub is kept inside the model folder."""
        embedded = autoencoder.reference in BUILT_IN or Path(autoencoder.reference).is_dir()
        return cls(
            reference=AUTOENCODER_FOLDER if embedded else autoencoder.reference,
            content_hash=autoencoder.content_hash,
            factor=autoencoder.factor,
            num_channels=autoencoder.num_channels,
        )


class TrainingRecord(Record):
    """What a model was trained on, and for how long."""

    data: str = Field(default="", max_length=10_000)
    data_fingerprint: str = Field(default="", max_length=1000)
    masks_fingerprint: str = Field(default="", max_length=1000, description="Of the folder that holes were taken from.")
    num_images: int = Field(default=0, ge=0)
    held_out: HeldOut | None = Field(default=None, description="Images of the data that were never trained on.")
    held_out_loss: float | None = Field(default=None, ge=0, description="On them, with these weights, if measured.")
    variants: int = Field(default=0, ge=0, description="Augmented variants of each image; 0: none were used.")
    images_per_class: list[int] = Field(
        default_factory=list, description="Training images of each class; empty: not known."
    )
    source: str = Field(default="", max_length=10_000, description="The model that it was finetuned from.")
    source_weights: str = Field(
        default="", pattern="^([0-9a-f]{12})?$", description="The first digits of the SHA-256 of that model's weights."
    )
    step: int = Field(default=0, ge=0)
    images_seen: int = Field(default=0, ge=0)
    ema_length: float | None = Field(
        default=None, ge=0, description="Relative length of the weights' power function average; null: exponential."
    )


class ModelConfig(Record):
    """Everything that defines a model but its weights."""

    format_version: Literal[1] = 1
    image_size: Annotated[ImageSize, bounded(1, 16_384)]
    buckets: list[Bucket] = Field(
        default_factory=list,
        description="The sizes it was trained on, each with the number of its images, where there are several; the "
        "first is `image_size`.",
    )
    pixel_format: PixelFormat = PixelFormat()
    network: ModelNetwork
    prediction: PredictionConfig = VelocityPrediction()
    path: PathConfig = LinearPath()
    conditioning: Conditioning = Conditioning()
    masks: MaskRules | None = Field(default=None, description="Which holes an inpainting model learned to fill.")
    inputs: InputRules | None = Field(
        default=None, description="Where paired inputs came from, and how the network gets them; null: no inputs."
    )
    input_format: PixelFormat | None = Field(
        default=None, description="What the stored values of paired inputs are; null: no inputs."
    )
    autoencoder: AutoencoderRecord
    normalisation: LatentNormalisation
    sampling: SamplingPreset = SamplingPreset()
    training: TrainingRecord = TrainingRecord()
    student: StudentRecord | None = Field(default=None, description="Whose student it is; null: nobody's.")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents."""
        return self.autoencoder.num_channels, *self.image_size.over(self.autoencoder.factor)

    @property
    def sizes(self) -> list[Size]:
        """The sizes that it was trained on, `image_size` first."""
        return [bucket.size for bucket in self.buckets] or [self.image_size]

    def size_for(self, picture: Size) -> Size:
        """Of the sizes that it was trained on, the one nearest to the shape of a picture."""
        return self.sizes[nearest_bucket(picture, self.sizes)]

    @property
    def pixel_multiple(self) -> int:
        """The number that height and width of an image must be multiples of."""
        return self.autoencoder.factor * self.network.size_multiple

    @property
    def seen_classes(self) -> list[int]:
        """The classes with training images; all classes if that is not known."""
        counts = self.training.images_per_class or [1] * self.conditioning.num_classes
        return [label for label, count in enumerate(counts) if count > 0]

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if len(self.training.images_per_class) not in (0, self.conditioning.num_classes):
            raise ValueError(
                f"{len(self.training.images_per_class)} counts of images for {self.conditioning.num_classes} classes"
            )
        if isinstance(self.prediction, NoisePrediction) and self.path.kind != "cosine":
            raise ValueError(f"a network that predicts noise needs the cosine path, not {self.path.kind}")
        if isinstance(self.prediction, DenoiserPrediction) and self.path != LinearPath(sigma_min=0):
            raise ValueError("a denoiser needs the linear path with sigma_min 0")
        has_inputs = {self.inputs is None, self.input_format is None, self.conditioning.input_channels == 0}
        if len(has_inputs) > 1:
            raise ValueError("inputs, input_format and conditioning.input_channels belong together")
        channels, multiple = self.autoencoder.num_channels, self.pixel_multiple
        for size in self.sizes:
            if not size.is_multiple_of(multiple):
                raise ValueError(f"image_size {size} is not a multiple of {multiple}, as the network needs it")
        if self.sizes[0] != self.image_size:
            raise ValueError(f"image_size {self.image_size} is not the first of buckets, {self.sizes[0]}")
        for name in self.sampling.guided_by or ():
            if name not in (known := [*CONDITION_NAMES, *(one.name for one in self.conditioning.columns)]):
                raise ValueError(f"sampling.guided_by = {name!r}: no such condition; {nearest(name, known)}")
        lengths = len(self.normalisation.shift), len(self.normalisation.scale)
        if lengths != (channels, channels):
            raise ValueError(f"normalisation has {lengths[0]} and {lengths[1]} numbers for {channels} latent channels")
        if (self.sampling.guided_channels or 1) > channels:
            raise ValueError(f"sampling.guided_channels {self.sampling.guided_channels}: there are {channels} channels")
        return self

    @property
    def paired(self) -> PairedChoice:
        """The paired inputs that images for this model need."""
        if self.inputs is None:
            return PairedChoice(NO_INPUTS)
        return PairedChoice(self.inputs.origin, self.input_format)

    @property
    def computation(self) -> dict[str, Any]:
        """Everything that affects the output but not the shapes of the weights, as JSON holds it."""
        fields: dict[str, Any] = {
            "image_size": True,
            "network": True,
            "prediction": True,
            "path": True,
            "normalisation": True,
            "autoencoder": {"content_hash", "factor", "num_channels"},
        }
        if self.pixel_format != PixelFormat():  # which earlier versions did not write
            fields["pixel_format"] = {"channels", "dtype", "low", "high", "mode"}
        if self.conditioning.columns:  # whose order and scale the shapes do not show
            fields["conditioning"] = {"columns": {"__all__": {"name", "kind", "mean", "deviation"}}}
        if self.inputs is not None:
            fields |= {"inputs": True, "input_format": {"channels", "dtype", "low", "high", "mode"}}
        return self.model_dump(mode="json", include=fields, exclude={"network": {"dropout"}})

    def build_network(self) -> torch.nn.Module:
        """A new network with random weights."""
        return build_network(
            self.network,
            self.prediction,
            channels=self.autoencoder.num_channels,
            num_classes=self.conditioning.num_classes,
            inpainting=self.conditioning.inpainting,
            num_map_classes=self.conditioning.num_map_classes,
            num_augmentations=len(self.conditioning.augmentation),
            input_channels=self.conditioning.input_channels,
            columns=[column.network_input for column in self.conditioning.columns],
            jumps=self.student is not None,
            guided=self.student is not None and self.student.guided,
            constant_embedding=self.conditioning.constant_embedding,
        )


def require_same_format(config: ModelConfig, found: PixelFormat | None, whose: object) -> None:
    """Refuse paired inputs of another format than those that the model was trained on.

    Raises:
        ConfigError: with both.
    """
    if found is None:
        raise ConfigError(f"{whose} has no paired inputs, which the model was trained on")
    known = config.input_format
    if known is not None and found.model_copy(update={"rule": known.rule}) != known:
        raise ConfigError(f"{whose} has inputs of {found.title}, but the model was trained on inputs of {known.title}")
