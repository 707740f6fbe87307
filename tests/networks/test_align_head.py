"""The head that predicts clean latents from an early block's tokens: what it reads, what it moves, what it leaves."""

import pytest
import torch
from torch._dynamo.utils import counters

from latentflow.flow.loss import align_loss
from latentflow.networks.align_head import AlignedNetwork, AlignHead, add_align_head
from latentflow.networks.dit import DiT, DiTConfig
from latentflow.networks.in_training import sampled_part
from latentflow.networks.running import MEMORY_MODES, compile_blocks, set_memory
from latentflow.shapes import Condition
from tests import tiny

LABELS = Condition(torch.tensor([0, 2, 3]))
DEPTH = 3


def network(**options) -> DiT:
    config = DiTConfig(depth=DEPTH, hidden_size=32, num_heads=2, patch_size=2, **options)
    return tiny.randomise(DiT(config, in_channels=4, out_channels=4, num_classes=3))


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 6, 8, generator=generator), torch.rand(3, generator=generator)


def gradients(aligned: AlignedNetwork) -> dict[str, torch.Tensor | None]:
    """Of the align loss alone."""
    aligned.zero_grad()
    _, predicted = aligned(*inputs(), LABELS)
    align_loss(predicted, inputs()[0]).mean().backward()
    return {name: parameter.grad for name, parameter in aligned.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"variant": "modern", "value_residual": True}], ids=["plain", "all options"])
@pytest.mark.parametrize("block", range(1, DEPTH + 1))
def test_the_velocity_is_that_of_the_network(options, block):
    made = network(**options)
    expected = made(*inputs(), LABELS)
    velocity, predicted = add_align_head(made, block, seed=0)(*inputs(), LABELS)
    assert torch.equal(velocity, expected)
    assert predicted.shape == expected.shape


@pytest.mark.parametrize("block", range(1, DEPTH + 1))
def test_blocks_up_to_the_head_learn_from_it(block):
    found = gradients(add_align_head(network(), block, seed=0))
    for number in range(DEPTH):
        grads = [grad for name, grad in found.items() if name.startswith(f"network.blocks.{number}.")]
        is_moved = [grad is not None and bool(grad.any()) for grad in grads]
        assert all(is_moved) if number < block else not any(is_moved)
    assert all(grad.any() for name, grad in found.items() if name.startswith("head."))
    assert found["network.final_linear.weight"] is None


def test_a_patch_is_predicted_from_its_token():
    """A head that repeats one channel of the tokens: what it predicts of a patch changes with this patch alone."""
    made = network(position="rope")
    for block in made.blocks:  # closed, so that a token is its own patch
        torch.nn.init.zeros_(block.modulation.weight)
        torch.nn.init.zeros_(block.modulation.bias)
    aligned = add_align_head(made, 1, seed=0)
    latents, time = inputs()
    other = latents.clone()
    other[:, :, 2:4, 4:6] += 1
    change = (aligned(other, time, LABELS)[1] - aligned(latents, time, LABELS)[1]).abs()
    assert change[:, :, 2:4, 4:6].min() > 0
    change[:, :, 2:4, 4:6] = 0
    assert not change.any()


def test_the_head_costs_four_matrices_of_the_width():
    head = AlignHead(384, 16)
    assert sum(parameter.numel() for parameter in head.parameters()) == 4 * (384**2 + 384) + 384 * 16 + 16
    block = network().blocks[0]
    with torch.no_grad():
        assert AlignHead(32, 16)(torch.zeros(2, 5, 32)).shape == (2, 5, 16)
    assert sum(p.numel() for p in AlignHead(32, 16).parameters()) < 0.4 * sum(p.numel() for p in block.parameters())


def test_the_sampled_part_is_the_network():
    made = network()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    aligned = add_align_head(made, 2, seed=0)
    assert sampled_part(aligned) is sampled_part(made) is made
    assert made.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    again = add_align_head(made, 2, seed=0).head.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in aligned.head.state_dict().items())


@pytest.mark.parametrize("mode", MEMORY_MODES[1:])
def test_what_is_computed_again_gives_the_same_gradients(mode):
    expected = gradients(add_align_head(network(), 2, seed=0))
    saving = add_align_head(network(), 2, seed=0)
    set_memory(saving, mode)
    found = gradients(saving)
    assert all((grad is None) == (expected[name] is None) for name, grad in found.items())
    assert all(grad is None or torch.equal(grad, expected[name]) for name, grad in found.items())


def test_the_head_is_compiled_as_a_graph():
    torch.compiler.reset()
    counters.clear()
    aligned = add_align_head(network(), 2, seed=0)
    expected = aligned(*inputs(), LABELS)
    compile_blocks(aligned, backend="aot_eager")
    for found, wanted in zip(aligned(*inputs(), LABELS), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 3  # a block, the last layer, the head
    assert not counters["graph_break"]
    torch.compiler.reset()


def test_autocast_is_near_float32():
    aligned = add_align_head(network(), 2, seed=0)
    exact = aligned(*inputs(), LABELS)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rough = aligned(*inputs(), LABELS)[1]
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 0.02
