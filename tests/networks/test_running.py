"""How blocks are run: what is computed again, and what is compiled."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from latentflow.errors import ConfigError
from latentflow.networks.dit import DiT, DiTConfig
from latentflow.networks.running import (
    MEMORY_MODES,
    borrowed_weights,
    compile_blocks,
    is_compiled,
    run_block,
    set_memory,
    uncompiled,
)
from latentflow.networks.unet import UNet, UNetConfig
from latentflow.networks.velocity_network import NoisePrediction, NoisePredictor
from latentflow.shapes import Condition
from tests import tiny
from tests.networks.saved_bytes import held_bytes

LABELS = Condition(torch.tensor([0, 2, 3]))
GRAPHS = {"classic": 2, "modern": 2, "value residual": 3, "adm": 8, "ncsn++": 8}
"""Distinct blocks of each network below, and its last layer."""
NETWORKS = pytest.mark.parametrize("variant", GRAPHS)


def network(variant: str, **options) -> nn.Module:
    torch.manual_seed(0)
    if variant in ("classic", "modern", "value residual"):
        sizes = {"depth": 4, "hidden_size": 32, "num_heads": 2, "patch_size": 2}
        chosen = {"variant": variant} if variant in ("classic", "modern") else {"value_residual": True}
        made = DiT(DiTConfig(**chosen, **sizes), in_channels=4, out_channels=4, num_classes=3)
    else:
        sizes = {"channels": 8, "multipliers": (1, 1), "blocks_per_level": 1, "num_heads": 2, "norm_groups": 4}
        made = UNet(UNetConfig(variant=variant, **{**sizes, **options}), in_channels=4, out_channels=4, num_classes=3)
    return tiny.randomise(made)


def inputs(images: int = 3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 4, 8, 8, generator=generator), torch.rand(images, generator=generator)


def gradients(network: nn.Module, *, half: bool = False) -> list[torch.Tensor]:
    network.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        velocity = network(*inputs(), LABELS)
    velocity.square().mean().backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


def assert_same(one, other, tolerance):
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-9


@pytest.fixture
def graphs():
    """Counts what is compiled from here on."""
    torch.compiler.reset()
    counters.clear()
    yield lambda: (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    torch.compiler.reset()


# Memory ----------------------------------------------------------------------------------------------------------


@NETWORKS
def test_each_mode_keeps_less(variant):
    made = network(variant)

    def kept(mode):
        set_memory(made, mode)
        return held_bytes(lambda: made(*inputs(), LABELS))

    none, cheap, least = (kept(mode) for mode in MEMORY_MODES)
    assert least < 0.6 * cheap and cheap < 0.85 * none


def test_cheap_computes_no_product_again():
    made, multiplied = network("modern"), Counter()

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            multiplied[function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)] += 1
            return function(*args, **(kwargs or {}))

    found = {}
    for mode in MEMORY_MODES:
        set_memory(made, mode)
        multiplied.clear()
        with Count():
            gradients(made)
        found[mode] = (multiplied[True], multiplied[False])
    assert found["none"][0] == found["recompute-cheap"][0] < found["checkpoint"][0]
    assert found["none"][1] < found["recompute-cheap"][1]


def test_modes_reach_wrapped_networks():
    inner = network("classic")
    wrapped = NoisePredictor(inner, NoisePrediction())
    set_memory(wrapped, "checkpoint")
    assert inner.memory == "checkpoint"
    set_memory(wrapped, "none")
    assert inner.memory == "none"
    with pytest.raises(ConfigError, match="unknown memory mode 'recompute'; did you mean 'recompute-cheap'"):
        set_memory(inner, "recompute")


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_modes_go_with_distributed_training(mode, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        eager, made = network("modern"), network("modern")
        set_memory(made, mode)
        wrapped = nn.parallel.DistributedDataParallel(made)
        wrapped(*inputs(), LABELS).square().mean().backward()
        assert_same([p.grad for p in made.parameters()], gradients(eager), 1e-6)
    finally:
        torch.distributed.destroy_process_group()


# Compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "mode"),
    [
        *(("modern", mode) for mode in MEMORY_MODES),
        ("classic", "none"),
        *(("value residual", mode) for mode in MEMORY_MODES),
        ("adm", "none"),
        ("ncsn++", "recompute-cheap"),
    ],
)
def test_each_distinct_block_is_one_graph(variant, mode, graphs):
    made = network(variant)
    expected = gradients(made)
    set_memory(made, mode)
    compile_blocks(made, backend="aot_eager")
    assert_same(gradients(made), expected, 1e-5)
    assert graphs() == (GRAPHS[variant], 0)
    gradients(made)
    compile_blocks(copy.deepcopy(made), backend="aot_eager")
    assert graphs() == (GRAPHS[variant], 0)


def test_compiled_in_half_precision(graphs):
    made = network("modern")
    expected = gradients(made, half=True)
    set_memory(made, "recompute-cheap")
    compile_blocks(made, backend="aot_eager")
    assert_same(gradients(made, half=True), expected, 0.02)
    assert graphs() == (GRAPHS["modern"], 0)


def test_compiled_dropout_is_the_same_again(graphs):
    made = network("adm", dropout=0.3, multipliers=(1,), middle_attention=False)
    compile_blocks(made, backend="aot_eager")
    expected = gradients(made)
    for mode in MEMORY_MODES[1:]:
        set_memory(made, mode)
        assert_same(gradients(made), expected, 1e-5)


def test_uncompiled_for_a_while(graphs):
    made = network("classic")
    latents, time = inputs(2)
    labels = Condition(torch.tensor([0, 1]))
    expected = made(latents, time, labels)
    compile_blocks(made, backend="aot_eager")
    assert made._run_block is not run_block
    with uncompiled(made), torch.no_grad():
        torch.testing.assert_close(made(latents, time, labels), expected, rtol=0, atol=0)
    assert graphs() == (0, 0) and made._run_block is not run_block
    torch.testing.assert_close(made(latents, time, labels), expected)
    assert graphs() == (GRAPHS["classic"], 0)


def test_compilation_is_no_part_of_the_weights(graphs):
    made = network("classic")
    keys = list(made.state_dict())
    compile_blocks(made, backend="aot_eager")
    gradients(made)
    assert list(made.state_dict()) == keys


def test_with_borrowed_weights_compiled_blocks_are_not_called(kl):
    """Batches of another size would be compiled again; training continues with what was compiled."""
    network = tiny.model(kl).network
    compile_blocks(network, backend="eager")
    with borrowed_weights(network, network.state_dict()):
        assert not is_compiled(network)
    assert is_compiled(network)
