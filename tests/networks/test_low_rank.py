"""Low-rank adaptation: nothing changes at the start, only factors learn, and merged weights compute the same."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from latentflow.columns import Column
from latentflow.networks.column_embedding import ColumnInput
from latentflow.networks.dit import DiT, DiTConfig
from latentflow.networks.layers import swiglu
from latentflow.networks.lean import LowRankLinear, linear_of
from latentflow.networks.low_rank import (
    FACTOR_B,
    add_low_rank,
    factors,
    low_rank_layers,
    low_rank_of,
    merge_low_rank,
)
from latentflow.networks.running import MEMORY_MODES, compile_blocks, set_memory
from latentflow.networks.unet import UNet, UNetConfig
from latentflow.networks.velocity_network import NoisePrediction, NoisePredictor
from latentflow.shapes import Condition
from latentflow.training.muon import hidden_matrices
from latentflow.training.optim import OptimizerConfig, build_optimizer
from tests import tiny
from tests.networks.saved_bytes import saved_bytes

CONDITION = Condition(torch.tensor([0, 2, 3]))
NETWORKS = pytest.mark.parametrize("variant", ["classic", "modern", "value residual", "noise", "adm", "ncsn++"])


def network(variant: str) -> nn.Module:
    torch.manual_seed(0)
    if variant in ("adm", "ncsn++"):
        sizes = {"channels": 8, "multipliers": (1, 2), "blocks_per_level": 1, "num_heads": 2, "norm_groups": 4}
        config = UNetConfig(variant=variant, attention_factors=[1], **sizes)
        return tiny.randomise(UNet(config, in_channels=4, out_channels=4, num_classes=3))
    chosen = {"variant": "modern" if variant == "modern" else "classic", "value_residual": variant == "value residual"}
    config = DiTConfig(**chosen, depth=2, hidden_size=32, num_heads=2, patch_size=2)
    made = tiny.randomise(DiT(config, in_channels=4, out_channels=4, num_classes=3))
    return NoisePredictor(made, NoisePrediction()) if variant == "noise" else made


def awake(network: nn.Module) -> nn.Module:
    """Every B drawn at random."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(FACTOR_B):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def inputs(images: int = 3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 4, 8, 8, generator=generator), torch.rand(images, generator=generator)


def velocity(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(*inputs(), CONDITION)


def gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    network.zero_grad()
    network(*inputs(), CONDITION).square().mean().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


@NETWORKS
def test_at_the_start_nothing_has_changed(variant):
    made = network(variant)
    before, weights = velocity(made), {name: tensor.clone() for name, tensor in made.state_dict().items()}
    state = torch.get_rng_state()
    layers = add_low_rank(made, 4, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(velocity(made), before)
    merged = merge_low_rank(made.state_dict(), 1.0)
    assert merged.keys() == weights.keys() and all(torch.equal(merged[name], weights[name]) for name in weights)
    assert sorted(layer for layer, _, _ in factors(made.state_dict())) == sorted(layers)


@NETWORKS
def test_only_factors_learn_and_what_is_named(variant):
    made = network(variant)
    label = next(name for name, _ in made.named_parameters() if "label" in name)
    add_low_rank(made, 4, also=[label])
    trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert trained == {label, *(name for name, _ in made.named_parameters() if "lora_" in name)}
    assert gradients(awake(made)).keys() == trained
    assert all(gradient.abs().sum() > 0 for gradient in gradients(made).values())


@NETWORKS
def test_merged_weights_compute_the_same(variant):
    made, plain = network(variant), network(variant)
    add_low_rank(made, 4, alpha=6.0)
    assert low_rank_of(made) == (4, 1.5) and low_rank_of(plain) is None
    adapted = velocity(awake(made))
    assert (adapted - velocity(plain)).norm() > 0.01 * adapted.norm()
    plain.load_state_dict(merge_low_rank(made.state_dict(), 1.5))
    assert (velocity(plain) - adapted).norm() < 2e-6 * adapted.norm()


def test_a_strength_scales_the_difference():
    made = awake_dit()
    weights = made.state_dict()
    zero, half, whole = (merge_low_rank(weights, scale) for scale in (0.0, 0.5, 1.0))
    for layer, a, b in factors(weights):
        name = f"{layer}.weight"
        assert torch.equal(zero[name], weights[name])
        torch.testing.assert_close(whole[name] - zero[name], (b @ a).view_as(zero[name]), rtol=0, atol=1e-6)
        torch.testing.assert_close(half[name], (zero[name] + whole[name]) / 2, rtol=0, atol=1e-6)


def awake_dit(variant: str = "modern") -> nn.Module:
    made = network(variant)
    add_low_rank(made, 4)
    return awake(made)


def test_gradients_are_those_of_the_product():
    """Against autograd through the merged matrix, in float64; the activation before the layer is recomputed."""
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(6, 5).double(), 2, 0.7)
    nn.init.normal_(layer.lora_A.weight), nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    wanted = (x, layer.lora_A.weight, layer.lora_B.weight, layer.bias)
    direct = nn.functional.linear(swiglu(x), layer.weight + 0.7 * layer.lora_B.weight @ layer.lora_A.weight, layer.bias)
    towards = torch.randn_like(direct)
    for y in (layer(swiglu(x)), linear_of(swiglu, x, layer)):
        torch.testing.assert_close(y, direct, rtol=0, atol=1e-12)
        found, expected = (torch.autograd.grad(one, wanted, towards, retain_graph=True) for one in (y, direct))
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_the_activation_before_a_layer_is_not_kept():
    """Of a linear layer with an activation before it, the argument is kept, and A x, which is small."""
    layer, x = LowRankLinear(nn.Linear(32, 16), 2, 1.0), torch.randn(4, 10, 64, requires_grad=True)
    kept = saved_bytes(lambda: linear_of(swiglu, x, layer), apart=[x, *layer.parameters()])
    assert 0 < kept.total <= 4 * 10 * 2 * 4


def test_a_is_drawn_from_the_seed_alone():
    first, again, other = (network("classic") for _ in range(3))
    for made, seed in ((first, 1), (again, 1), (other, 2)):
        add_low_rank(made, 4, seed=seed)
    one, same, another = (made.state_dict() for made in (first, again, other))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(not torch.equal(a, another[f"{layer}.lora_A.weight"]) for layer, a, _ in factors(one))
    for _, a, _ in factors(one):
        assert 0.9 < a.abs().max() * a[0].numel() ** 0.5 <= 1 or a.numel() < 100


def test_which_layers_get_factors():
    columns = [ColumnInput(Column(name="age", kind="number").row)]
    config = DiTConfig(depth=1, hidden_size=32, num_heads=2, patch_size=2)
    dit = DiT(config, in_channels=4, out_channels=4, num_classes=3, columns=columns, num_augmentations=2)
    block = [f"blocks.0.{name}" for name in ("modulation", "attention.qkv", "attention.out", "mlp.up", "mlp.down")]
    ends = ["time_embedding.mlp.0", "time_embedding.mlp.2", "final_modulation", "final_linear"]
    assert sorted(low_rank_layers(dit)) == sorted([*block, *ends])
    found = low_rank_layers(network("adm"))
    assert {name.rpartition(".")[2] for name in found} == {
        *("qkv", "out", "conv1", "conv2", "skip", "conv", "modulation", "linear1", "linear2")
    }


def test_what_cannot_be():
    made = awake_dit()
    with pytest.raises(ValueError, match="has low-rank factors already"):
        add_low_rank(made, 4)
    with pytest.raises(ValueError, match=r"no parameter 'label\.weight'"):
        add_low_rank(network("classic"), 4, also=["label.weight"])


@pytest.mark.parametrize("variant", ["modern", "adm"])
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_recomputation_changes_no_gradient(variant, mode):
    made = awake_dit(variant)
    plain = {name: gradient.clone() for name, gradient in gradients(made).items()}
    set_memory(made, mode)
    for name, gradient in gradients(made).items():
        assert (gradient - plain[name]).norm() <= 1e-5 * plain[name].norm() + 1e-9


def test_compiled_blocks_share_graphs_and_compute_the_same():
    torch.compiler.reset()
    counters.clear()
    config = DiTConfig(depth=4, hidden_size=32, num_heads=2, patch_size=2)
    made = tiny.randomise(DiT(config, in_channels=4, out_channels=4, num_classes=3))
    add_low_rank(made, 4)
    plain = {name: gradient.clone() for name, gradient in gradients(awake(made)).items()}
    compile_blocks(made, backend="aot_eager")
    for name, gradient in gradients(made).items():
        assert (gradient - plain[name]).norm() <= 1e-4 * plain[name].norm() + 1e-9
    # the first block, whose tokens no weight before them needs gradients of, all others, and the end
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    torch.compiler.reset()


@pytest.mark.parametrize("variant", ["modern", "adm"])
def test_in_half_precision(variant):
    made = awake_dit(variant)
    exact = gradients(made)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(made)
    for name, gradient in rounded.items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() < 0.1 * exact[name].norm(), name


def test_muon_knows_no_factors():
    made = network("classic")
    label = "label_embedding.weight"
    assert len(hidden_matrices(made)) == 8
    add_low_rank(made, 4, also=[label])
    assert hidden_matrices(made) == []
    optimizer = build_optimizer(made, OptimizerConfig())
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in made.parameters() if parameter.requires_grad}


def test_copies_are_copies():
    made = awake_dit()
    other = copy.deepcopy(made)
    assert torch.equal(velocity(other), velocity(made))
    assert low_rank_of(other) == low_rank_of(made)
