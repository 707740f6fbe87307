"""A head for training that predicts the clean latents from the tokens of an early block (SRA 2, arXiv 2601.17830).

It gives the first blocks a task of their level: to recognise the image in the noise. The model does without it.

Legend: B images, C latent channels, H and W latent height and width, p patch size, N tokens, D hidden channels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentflow.networks.dit import DiT
from latentflow.networks.in_training import InTraining
from latentflow.networks.lean import linear_of
from latentflow.shapes import Condition

HEAD_LAYERS = 5  # as in the paper


class AlignHead(nn.Module):
    """Linear layers with SiLU between them, on each token by itself: [B, N, D] => [B, N, out_features].

    With D channels inside, it costs 4 D^2 multiply-adds per token, a third of a block: about 4 % of a network of 8
    blocks. That is the paper's share in the cost of its largest network.
    """

    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        sizes = [*[hidden_size] * HEAD_LAYERS, out_features]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        first, *others = self.layers
        x = first(tokens)
        for layer in others:
            x = linear_of(F.silu, x, layer)
        return x


class AlignedNetwork(InTraining):
    """A transformer in training, with the head on the tokens after one of its blocks.

    Args:
        network: the velocity network, which stays usable without the head.
        block: number of the block whose tokens the head reads; the first is 1.
    """

    def __init__(self, network: DiT, block: int):
        super().__init__()
        self.network = network
        self.block = block
        config = network.config
        self.head = AlignHead(config.hidden_size, config.patch_size**2 * network.in_channels)

    def forward(self, latents: Tensor, time: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The velocity and the predicted clean latents, two of [B, C, H, W]; arguments as of `DiT.forward`."""
        velocity, tokens = self.network.with_tokens(latents, time, condition, self.block)
        patches = self.network.run_once(self.head, tokens)
        return velocity, self.network.as_latents(patches, latents)


def add_align_head(network: DiT, block: int, seed: int) -> AlignedNetwork:
    """`network` with a new head, on the device and in the dtype of its weights.

    Args:
        block: see `AlignedNetwork`.
        seed: of the head's weights.
    """
    torch.manual_seed(seed)
    weight = network.final_linear.weight
    return AlignedNetwork(network, block).to(weight.device, weight.dtype)
