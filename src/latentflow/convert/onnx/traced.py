"""What is traced for ONNX: velocity, decoder and encoder as modules of tensors alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latentflow.autoencoder import Autoencoder, latent_mean
from latentflow.model.config import ModelConfig
from latentflow.networks.layers import TimeEmbedding, sinusoids, time_frequencies
from latentflow.shapes import Condition

GIVEN = ("labels", "masked_latents", "mask", "class_fractions", "input", "columns")
"""The fields of a condition that are inputs of the graph, in this order. The numbers of variants are zero in it."""


class VelocityGraph(nn.Module):
    """The velocity of a model, called as graph(latents, time, [the condition's fields in the order of `names`]).

    Args:
        config: of the model.
        network: copied; the copy is on the CPU, in float32.
        names: the fields of a condition that the network takes.
    """

    def __init__(self, config: ModelConfig, network: nn.Module, names: Sequence[str]):
        super().__init__()
        self.network = copy.deepcopy(network).to("cpu", torch.float32, memory_format=torch.contiguous_format).eval()
        self.names = tuple(names)
        self.num_augmentations = len(config.conditioning.augmentation)
        for module in list(self.network.modules()):
            for name, part in list(module.named_children()):
                if isinstance(part, TimeEmbedding):
                    setattr(module, name, _FrozenTime(part))

    def forward(self, latents: Tensor, time: Tensor, given: list[Tensor]) -> Tensor:
        augmentation = latents.new_zeros(latents.shape[0], self.num_augmentations) if self.num_augmentations else None
        condition = Condition(augmentation=augmentation, **dict(zip(self.names, given, strict=True)))
        return self.network(latents, time, condition)


class _FrozenTime(nn.Module):
    """A `TimeEmbedding` whose frequencies are stored in the file.

    The time is multiplied by up to 1000: were the frequencies computed by another library, their last digit alone would
    move the velocity by 4e-6 of its largest value.
    """

    def __init__(self, embedding: TimeEmbedding):
        super().__init__()
        self.mlp, self.scale = embedding.mlp, embedding.scale
        self.register_buffer("frequencies", time_frequencies())

    def forward(self, time: Tensor) -> Tensor:
        return self.mlp(sinusoids(time * self.scale, self.frequencies))


class _AutoencoderGraph(nn.Module):
    """The copy of an autoencoder on the CPU, and the latent normalisation of a model."""

    def __init__(self, config: ModelConfig, autoencoder: Autoencoder):
        super().__init__()
        self.model = copy.deepcopy(autoencoder.model).to("cpu").to(memory_format=torch.contiguous_format).eval()
        self.num_channels = autoencoder.num_channels
        self.is_gray = config.pixel_format.channels == 1 < autoencoder.pixel_channels
        self.register_buffer("shift", torch.tensor(config.normalisation.shift)[:, None, None])
        self.register_buffer("scale", torch.tensor(config.normalisation.scale)[:, None, None])


class DecoderGraph(_AutoencoderGraph):
    """latents [B, C, h, w] of the flow => pixels [B, P, H, W] in [-1, 1]."""

    def forward(self, latents: Tensor) -> Tensor:
        pixels = self.model.decode(latents / self.scale + self.shift, return_dict=False)[0].clamp(-1, 1)
        return pixels.mean(1, keepdim=True) if self.is_gray else pixels


class EncoderGraph(_AutoencoderGraph):
    """pixels [B, P, H, W] in [-1, 1] => latents [B, C, h, w] of the flow: the posterior's mode."""

    def forward(self, pixels: Tensor) -> Tensor:
        encoded = self.model.encode(pixels, return_dict=False)[0]
        moments = encoded.parameters if hasattr(encoded, "parameters") else encoded
        return (latent_mean(moments, self.num_channels) - self.shift) * self.scale
