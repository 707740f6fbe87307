"""Which network a model has, and what its output means.

Models trained here predict the velocity. Converted networks may predict the noise or the data along another path, from
which the velocity follows exactly. They are wrapped, so that to everything else they are velocity networks.

Legend: B images, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor, nn

from latentflow.errors import ConfigError, nearest
from latentflow.networks.dit import DiT, DiTConfig
from latentflow.networks.registered import RegisteredNetwork, UnnamedNetwork
from latentflow.networks.unet import UNet, UNetConfig
from latentflow.records import Record
from latentflow.shapes import Condition, per_image


def _by_kind(*kinds: str) -> Discriminator:
    """Distinguishes the configs of a union by their `kind`; the default is the first of `kinds`."""

    def kind_of(value: Any) -> str:
        kind = value.get("kind", kinds[0]) if isinstance(value, dict) else getattr(value, "kind", kinds[0])
        if kind not in kinds:
            raise ConfigError(f"unknown kind {kind!r}; {nearest(kind, kinds)}")
        return kind

    return Discriminator(kind_of)


NetworkConfig = Annotated[
    Annotated[DiTConfig, Tag("dit")] | Annotated[UNetConfig, Tag("unet")], _by_kind("dit", "unet")
]
"""The config of a velocity network; `kind` is "dit" by default."""

ModelNetwork = Annotated[
    Annotated[DiTConfig, Tag("dit")]
    | Annotated[UNetConfig, Tag("unet")]
    | Annotated[RegisteredNetwork, Tag("registered")]
    | Annotated[UnnamedNetwork, Tag("unnamed")],
    _by_kind("dit", "unet", "registered", "unnamed"),
]
"""The config of the network of a model, which may be one's own; recipes train those of `NetworkConfig`."""

NETWORKS: dict[str, type[DiT | UNet]] = {"dit": DiT, "unet": UNet}


class VelocityPrediction(Record):
    """The network's output is the velocity."""

    kind: Literal["velocity"] = "velocity"


class NoisePrediction(Record):
    """The output is the noise, on a variance-preserving chain of discrete steps (DDPM, DiT); the path is the cosine.

    A chain's x_k = sqrt(abar_k) data + sqrt(1 - abar_k) noise lies on the cosine path, whose coefficients are cos and
    sin of an angle; only the time is parametrised differently.
    """

    kind: Literal["noise"] = "noise"
    num_steps: int = Field(
        1000, ge=2, le=100_000, description="Steps of the chain; the network gets times from 0 to num_steps - 1."
    )
    first_beta: float = Field(1e-4, gt=0, lt=1, description="Variance added by the first step.")
    last_beta: float = Field(0.02, gt=0, lt=1, description="Variance added by the last step; linear in between.")


class DenoiserPrediction(Record):
    """The output is the inner network of EDM's preconditioned denoiser (arXiv 2206.00364, table 1); linear path."""

    kind: Literal["edm"] = "edm"
    sigma_data: float = Field(0.5, gt=0, le=1e6, description="Standard deviation of the training data.")
    sigma_min: float = Field(0.002, gt=0, le=1e6, description="Smallest noise level in training.")
    sigma_max: float = Field(80.0, gt=0, le=1e6, description="Largest noise level in training.")

    @model_validator(mode="after")
    def _check(self) -> DenoiserPrediction:
        if self.sigma_min >= self.sigma_max:
            raise ConfigError(f"sigma_min {self.sigma_min:g} is not below sigma_max {self.sigma_max:g}")
        return self


PredictionConfig = Annotated[
    Annotated[VelocityPrediction, Tag("velocity")]
    | Annotated[NoisePrediction, Tag("noise")]
    | Annotated[DenoiserPrediction, Tag("edm")],
    _by_kind("velocity", "noise", "edm"),
]
"""What a network's output means, in a config."""


def build_network(
    config: DiTConfig | UNetConfig | RegisteredNetwork | UnnamedNetwork,
    prediction: VelocityPrediction | NoisePrediction | DenoiserPrediction,
    *,
    channels: int,
    **inputs: Any,
) -> nn.Module:
    """A network with fresh weights, called as network(latents [B, C, H, W], time [B], condition) => velocity.

    Args:
        channels: C.
        inputs: classes, columns, spatial conditions and those of students; see `VelocityNetwork`. One's own network
            has its options instead.

    Raises:
        ConfigError: one's own network is not registered in this program.
    """
    if isinstance(config, RegisteredNetwork | UnnamedNetwork):
        return wrap_network(config.build(), prediction)
    network = NETWORKS[config.kind](config, in_channels=channels, out_channels=channels, **inputs)
    return wrap_network(network, prediction)


def network_class(
    config: DiTConfig | UNetConfig | RegisteredNetwork | UnnamedNetwork,
    prediction: VelocityPrediction | NoisePrediction | DenoiserPrediction,
) -> Callable[..., nn.Module]:
    """What `build_network` calls last: the class of the network, or a function that is registered.

    Raises:
        ConfigError: one's own network is not registered in this program.
    """
    inner = config.maker if isinstance(config, RegisteredNetwork | UnnamedNetwork) else NETWORKS[config.kind]
    if isinstance(prediction, NoisePrediction):
        return NoisePredictor
    return Denoiser if isinstance(prediction, DenoiserPrediction) else inner


def wrap_network(
    network: nn.Module, prediction: VelocityPrediction | NoisePrediction | DenoiserPrediction
) -> nn.Module:
    """Turn a network whose output is `prediction` into a velocity network."""
    if isinstance(prediction, NoisePrediction):
        return NoisePredictor(network, prediction)
    if isinstance(prediction, DenoiserPrediction):
        return Denoiser(network, prediction)
    return network


class NoisePredictor(nn.Module):
    """The velocity on the cosine path, from a network that predicts the noise of a chain of discrete steps.

    With angle = pi t / 2 and x = cos(angle) data + sin(angle) noise, the velocity is dx/dt with the predicted noise:

        v = pi/2 (cos(angle) noise - sin(angle) data) = pi/2 (noise - sin(angle) x) / cos(angle)

    The chain ends shortly before the pure noise of t = 1; from there on the velocity uses the last step. Between two
    steps of the chain the network gets a fractional step.

    Args:
        network: called as network(latents, step [B] in [0, num_steps - 1], condition) => noise.
    """

    def __init__(self, network: nn.Module, config: NoisePrediction):
        super().__init__()
        self.network = network
        betas = torch.linspace(config.first_beta, config.last_beta, config.num_steps, dtype=torch.float64)
        angles = torch.acos((1 - betas).cumprod(0).sqrt())  # alpha of step k is cos(angles[k])
        self.register_buffer("angles", angles.float(), persistent=False)

    def forward(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """latents [B, C, H, W] and time [B] in [0, 1] => velocity [B, C, H, W]."""
        angle = (time * (math.pi / 2)).to(self.angles.dtype).clamp(max=self.angles[-1])
        noise = self.network(latents, self._step(angle), condition)
        sine, cosine = per_image(angle.sin(), latents), per_image(angle.cos(), latents)
        return (math.pi / 2) * (noise - sine * latents) / cosine

    def loss_weight(self, time: Tensor) -> Tensor:
        """What makes the loss of the velocity that of the noise, the one that such networks are trained with [B].

        The velocity's error is that of the noise times pi / (2 cos(angle)), which is without bound towards t = 1.
        """
        angle = (time * (math.pi / 2)).to(self.angles.dtype).clamp(max=self.angles[-1])
        return (angle.cos() * (2 / math.pi)).square()

    def _step(self, angle: Tensor) -> Tensor:
        """The fractional step of the chain at `angle` [B]; 0 below the first."""
        # The place in the sorted angles by comparison, as ONNX has no binary search.
        above = (self.angles < angle[:, None]).sum(1).clamp(1, len(self.angles) - 1)
        low, high = self.angles[above - 1], self.angles[above]
        return (above - 1 + (angle - low) / (high - low)).clamp(min=0)


class Denoiser(nn.Module):
    """The velocity on the linear path (sigma_min = 0), from the inner network F of EDM's preconditioned denoiser.

    EDM's noisy image y = data + sigma noise is x / (1 - t) with sigma = t / (1 - t). Its denoiser
    D = c_skip y + c_out F(c_in y, ln(sigma) / 4) put into v = (x - D) / t gives, with d = sigma_data and
    n = t^2 + d^2 (1 - t)^2,

        v = (t - d^2 (1 - t)) / n x - d / sqrt(n) F(x / sqrt(n), ln(sigma) / 4),

    which is finite at both ends. The sigma that the network gets is clamped to the range of its training.

    Args:
        network: called as network(latents, ln(sigma) / 4 [B], condition) => F.
    """

    def __init__(self, network: nn.Module, config: DenoiserPrediction):
        super().__init__()
        self.network = network
        self.config = config

    def forward(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """latents [B, C, H, W] and time [B] in [0, 1] => velocity [B, C, H, W]."""
        d = self.config.sigma_data
        sigma = (time / (1 - time)).clamp(self.config.sigma_min, self.config.sigma_max)
        n = time**2 + d**2 * (1 - time) ** 2
        inner = self.network(latents / per_image(n.sqrt(), latents), sigma.log() / 4, condition)
        return per_image((time - d**2 * (1 - time)) / n, latents) * latents - per_image(d / n.sqrt(), latents) * inner
