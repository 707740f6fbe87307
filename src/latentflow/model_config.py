"""What a model folder says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from latentflow.autoencoder import BUILT_IN, Autoencoder, LatentNormalisation
from latentflow.conditioning import Conditioning, ConditionName
from latentflow.data.masks import MaskRules
from latentflow.flow.path import LinearPath, PathConfig
from latentflow.networks.velocity_network import (
    DenoiserPrediction,
    NetworkConfig,
    NoisePrediction,
    PredictionConfig,
    VelocityPrediction,
    build_network,
)

AUTOENCODER_FOLDER = "autoencoder"
"""Where a model folder keeps a first stage that is no hub id."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingPreset(_Section):
    """How a model is sampled unless the user says otherwise."""

    solver: str = Field("heun", description="A name from flow.solvers.SOLVERS.")
    steps: int = Field(25, ge=1, description="Intervals of a fixed-step solver; adaptive solvers choose their own.")
    guidance: float = Field(1.0, ge=0, description="Classifier-free guidance scale; 1: off.")
    guidance_interval: tuple[float, float] = Field((0.0, 1.0), description="Times at which guidance applies.")
    guided_by: list[ConditionName] | None = Field(
        None, description="Conditions that guidance strengthens; null: all that an image is told."
    )
    guided_channels: int | None = Field(
        None, ge=1, description="Guidance acts on the first latent channels alone; null: on all, as it should."
    )
    shift: float = Field(1.0, gt=0, description="Time shift of the grid; above 1: more steps near the noise.")
    rtol: float = Field(1e-5, gt=0, description="Relative tolerance of adaptive solvers, per image.")
    atol: float = Field(1e-5, gt=0, description="Absolute tolerance of adaptive solvers, per image.")


class AutoencoderRecord(_Section):
    """Which first stage a model lives on."""

    reference: str = Field(description=f"A hub id, or {AUTOENCODER_FOLDER!r}: the folder inside the model folder.")
    content_hash: str
    factor: int
    num_channels: int

    @classmethod
    def of(cls, autoencoder: Autoencoder) -> AutoencoderRecord:
        """The record of a first stage; one that is no hub id is kept inside the model folder."""
        embedded = autoencoder.reference in BUILT_IN or Path(autoencoder.reference).is_dir()
        return cls(
            reference=AUTOENCODER_FOLDER if embedded else autoencoder.reference,
            content_hash=autoencoder.content_hash,
            factor=autoencoder.factor,
            num_channels=autoencoder.num_channels,
        )


class TrainingRecord(_Section):
    """What a model was trained on and for how long."""

    data: str = ""
    data_fingerprint: str = ""
    num_images: int = 0
    step: int = 0
    images_seen: int = 0


class ModelConfig(_Section):
    """Everything a model folder says about itself."""

    format_version: Literal[1] = 1
    image_size: int
    network: NetworkConfig
    prediction: PredictionConfig = VelocityPrediction()
    path: PathConfig = LinearPath()
    conditioning: Conditioning = Conditioning()
    masks: MaskRules | None = Field(None, description="Which holes an inpainting model learned to fill.")
    autoencoder: AutoencoderRecord
    normalisation: LatentNormalisation
    sampling: SamplingPreset = SamplingPreset()
    training: TrainingRecord = TrainingRecord()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents."""
        side = self.image_size // self.autoencoder.factor
        return self.autoencoder.num_channels, side, side

    @property
    def pixel_multiple(self) -> int:
        """What height and width of an image must be multiples of."""
        return self.autoencoder.factor * self.network.size_multiple

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if isinstance(self.prediction, NoisePrediction) and self.path.kind != "cosine":
            raise ValueError(f"a network that predicts noise needs the cosine path, not {self.path.kind}")
        if isinstance(self.prediction, DenoiserPrediction) and self.path != LinearPath(sigma_min=0):
            raise ValueError("a denoiser needs the linear path with sigma_min 0")
        return self

    def build_network(self) -> torch.nn.Module:
        """A network with fresh weights, as this config describes it."""
        return build_network(
            self.network,
            self.prediction,
            channels=self.autoencoder.num_channels,
            num_classes=self.conditioning.num_classes,
            inpainting=self.conditioning.inpainting,
            num_map_classes=self.conditioning.num_map_classes,
        )
