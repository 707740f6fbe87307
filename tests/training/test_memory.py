"""Estimates of memory and arithmetic, against what is measured."""

import dataclasses

import pytest
import torch

from latentflow.errors import ConfigError
from latentflow.networks.align_head import AlignedNetwork
from latentflow.networks.dit import DiT, DiTConfig
from latentflow.networks.running import MEMORY_MODES, set_memory
from latentflow.networks.unet import VARIANTS, UNetConfig
from latentflow.networks.velocity_network import NETWORKS
from latentflow.runtime import Runtime
from latentflow.shapes import Condition
from latentflow.sizes import Size
from latentflow.training import memory as memory_module
from latentflow.training.config import Recipe
from latentflow.training.memory import (
    bytes_per_image,
    count_parameters,
    forward_flops,
    memory_mode,
    state_bytes,
    state_parts,
)
from tests import tiny
from tests.networks.saved_bytes import held_bytes

GIB = 2**30
MODES = pytest.mark.parametrize("mode", MEMORY_MODES)
HALF = pytest.mark.parametrize("half", [True, False], ids=["bf16", "fp32"])


def held_per_image(config, mode, half, images=2, side=16):
    """What the graph of one call holds per image, when every weight is in place already."""
    network = NETWORKS[config.kind](config, in_channels=4, out_channels=4)
    set_memory(network, mode)
    latents, time = torch.randn(images, 4, side, side), torch.rand(images)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        network(latents, time, Condition())  # narrows the weights
        return held_bytes(lambda: network(latents, time, Condition())) / images


@HALF
@MODES
@pytest.mark.parametrize(
    "options",
    [
        {"variant": "classic"},
        {"variant": "modern"},
        {"variant": "modern", "qk_norm": False, "position": "sincos"},
        {"variant": "modern", "mlp": "gelu", "mlp_ratio": 2.0},
        {"variant": "classic", "value_residual": True},
        {"variant": "modern", "value_residual": True},
    ],
    ids=["classic", "modern", "plain attention", "narrow gelu", "classic value residual", "modern value residual"],
)
def test_what_a_transformer_keeps(options, mode, half):
    config = DiTConfig(depth=4, hidden_size=384, num_heads=6, patch_size=1, **options)
    deeper = config.model_copy(update={"depth": 8})
    # Of the difference between two depths the block that is computed again drops out.
    estimate = bytes_per_image(deeper, 16, half=half, memory=mode) - bytes_per_image(config, 16, half=half, memory=mode)
    found = held_per_image(deeper, mode, half) - held_per_image(config, mode, half)
    assert estimate == pytest.approx(found, rel=0.03)
    assert bytes_per_image(config, 16, half=half, memory=mode) > held_per_image(config, mode, half)


@HALF
def test_what_an_align_head_keeps(half):
    config = DiTConfig(depth=4, hidden_size=384, num_heads=6, patch_size=1)
    plain = DiT(config, in_channels=4, out_channels=4)
    aligned, images = AlignedNetwork(plain, block=2), 2
    latents, time = torch.randn(images, 4, 16, 16), torch.rand(images)

    def kept(network, losses) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            network(latents, time, Condition())  # narrows the weights
            return held_bytes(lambda: losses(network(latents, time, Condition()))) / images

    found = kept(aligned, lambda pair: pair[0] + pair[1]) - kept(plain, lambda velocity: velocity + 1)
    estimate = bytes_per_image(config, 16, half=half, aligned=True) - bytes_per_image(config, 16, half=half)
    assert estimate == pytest.approx(found, rel=0.05)


def test_state_and_operations_of_an_align_head(kl):
    config = tiny.model(kl).config
    size, tokens, numbers = config.network.hidden_size, 16, 2 * 2 * 4
    more = count_parameters(config, aligned=True) - count_parameters(config)
    assert more == 4 * (size**2 + size) + size * numbers + numbers
    operations = forward_flops(config, aligned=True) - forward_flops(config)
    assert operations == 2 * tokens * (4 * size**2 + size * numbers)


@HALF
@MODES
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_unet_keeps(variant, mode, half):
    heads = {} if variant == "dhariwal" else {"num_heads": 2}
    config = UNetConfig(channels=64, multipliers=(1, 2, 2), attention_factors=(4,), variant=variant, **heads)
    found, estimate = held_per_image(config, mode, half, side=32), bytes_per_image(config, 32, half=half, memory=mode)
    assert found < estimate < 2 * found + 4 * estimate * (mode == "checkpoint")


def test_dit_xl_of_128_images_fits_a_gpu():
    config = DiTConfig(name="DiT-XL/2", variant="modern")
    totals = {
        mode: (state_bytes(675_000_000, half=True) + 128 * bytes_per_image(config, 32, half=True, memory=mode)) / GIB
        for mode in MEMORY_MODES
    }
    assert totals["none"] < 60 and totals["recompute-cheap"] < 45 and totals["checkpoint"] < 22


@pytest.mark.parametrize(
    ("name", "published"), [("DiT-S/2", 6.06), ("DiT-B/2", 23.01), ("DiT-L/2", 80.71), ("DiT-XL/2", 118.64)]
)
def test_flops_are_those_of_the_paper(kl, name, published):
    """arXiv 2212.09748 counts a product and its sum as one."""
    config = tiny.model(kl).config.model_copy(
        update={"network": DiTConfig(name=name), "image_size": Size.of(32 * tiny.FACTOR)}
    )
    assert forward_flops(config) / 2e9 == pytest.approx(published, rel=0.002)


def test_state_by_parts():
    parts = state_parts(1000)
    assert sum(parts.values()) == state_bytes(1000) == 20_000
    assert state_bytes(1000, half=True) - state_bytes(1000) == 2000
    assert state_bytes(1000, averages=3) - state_bytes(1000) == 2 * parts["average of the weights"] == 8000


@pytest.mark.parametrize(
    ("share", "mode"), [(1.3, "none"), (0.9, "recompute-cheap"), (0.4, "checkpoint"), (0.01, "checkpoint")]
)
def test_auto_computes_again_what_the_memory_needs(kl, monkeypatch, share, mode):
    config, images = tiny.model(kl).config, 512
    whole = images * bytes_per_image(config.network, 8, half=False)
    monkeypatch.setattr(
        memory_module, "total_memory", lambda device: state_bytes(count_parameters(config)) + int(share * whole)
    )
    assert memory_mode("auto", config, images, tiny.CPU) == mode
    assert memory_mode("recompute-cheap", config, images, tiny.CPU) == "recompute-cheap"
    monkeypatch.setattr(memory_module, "total_memory", lambda device: None)
    assert memory_mode("auto", config, images, tiny.CPU) == "none"


def test_processes_of_one_computer_share_its_memory(kl, monkeypatch):
    config, images = tiny.model(kl).config, 512
    whole = state_bytes(count_parameters(config)) + images * bytes_per_image(config.network, 8, half=False)
    monkeypatch.setattr(memory_module, "total_memory", lambda device: int(1.3 * whole))
    assert memory_mode("auto", config, images, tiny.CPU) == "none"
    of_four = Runtime(torch.device("cpu"), world=4, local_world=4)
    assert memory_mode("auto", config, images, dataclasses.replace(of_four)) == "checkpoint"


@pytest.mark.parametrize("said", [True, "true"])
def test_recipes_name_the_new_place_of_checkpointing(said):
    network = {"name": "DiT-S/2", "gradient_checkpointing": said}
    with pytest.raises(ConfigError, match=r"^network\.gradient_checkpointing has moved: write training\.memory=check"):
        Recipe.model_validate({"network": network})
    Recipe.model_validate({"network": {**network, "gradient_checkpointing": False}})
