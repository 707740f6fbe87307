"""How much memory an image takes in training: bytes kept for the backward pass."""

import pytest
import torch

from latentflow.networks.dit import DiT, DiTConfig
from latentflow.shapes import Condition
from tests.networks.saved_bytes import Saved, saved_bytes

TOKENS, WIDTH, BLOCKS = 256, 384, 4


def kept_by(network: torch.nn.Module, images: int, *, half: bool = True) -> Saved:
    """What a network keeps of latents 4 x 32 x 32 and weights, under bf16 autocast or in float32."""
    latents, time = torch.randn(images, 4, 32, 32), torch.rand(images)
    condition = Condition(torch.zeros(images, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        return saved_bytes(lambda: network(latents, time, condition), [*network.parameters(), latents, time])


@pytest.mark.parametrize(("variant", "bytes_of_two", "bytes_of_one_more"), [("classic", 70, 43), ("modern", 65, 42)])
def test_bytes_of_a_transformer(variant, bytes_of_two, bytes_of_one_more):
    config = DiTConfig(depth=BLOCKS, hidden_size=WIDTH, num_heads=6, patch_size=2, variant=variant)
    network = DiT(config, in_channels=4, out_channels=4, num_classes=3)
    unit = TOKENS * BLOCKS * WIDTH  # of one image
    two, four = kept_by(network, 2), kept_by(network, 4)
    assert two.total / (2 * unit) <= bytes_of_two  # with the weights that autocast has narrowed
    assert (four.total - two.total) / (2 * unit) <= bytes_of_one_more
    assert two.wide / (2 * unit) <= 9.5  # the sum over the blocks, before attention and before the MLP
