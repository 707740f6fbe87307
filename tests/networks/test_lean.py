"""Layers that keep little: their values and derivatives are torch's, and nothing but the argument is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentflow.networks.layers import SwigluMLP, add_gated, modulated_norm, rotary_positions, rotate, swiglu
from latentflow.networks.lean import NORM_EPS, linear_of, scaled_norm
from tests.networks.saved_bytes import saved_bytes

CENTRED = pytest.mark.parametrize("centred", [False, True], ids=["rmsnorm", "layernorm"])
# What is scaled: tokens by numbers of their image, queries and keys by those of all, each of its own.
SHAPES = pytest.mark.parametrize(
    ("shape", "scale_shape", "shifted"), [((2, 5, 6), (2, 1, 6), True), ((2, 3, 2, 4, 6), (2, 1, 6), False)]
)


def drawn(*shapes, dtype=torch.float64, seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype).requires_grad_(requires_grad)
        for shape in shapes
    ]


def of_torch(x, scale, shift, centred):
    norm = F.layer_norm if centred else F.rms_norm
    y = norm(x, x.shape[-1:], eps=NORM_EPS) * scale
    return y if shift is None else y + shift


@CENTRED
@SHAPES
def test_values_and_gradients_are_those_of_torch(shape, scale_shape, shifted, centred):
    inputs = drawn(shape, *[scale_shape] * (1 + shifted))
    shift = inputs[2] if shifted else None
    one, other = scaled_norm(*inputs, centred=centred), of_torch(inputs[0], inputs[1], shift, centred)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    towards = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(*(torch.autograd.grad(y, inputs, towards) for y in (one, other)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@CENTRED
@SHAPES
def test_norms_have_second_derivatives(shape, scale_shape, shifted, centred):
    inputs = drawn(shape, *[scale_shape] * (1 + shifted))
    assert torch.autograd.gradcheck(lambda *given: scaled_norm(*given, centred=centred), inputs)
    assert torch.autograd.gradgradcheck(lambda *given: scaled_norm(*given, centred=centred), inputs)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_a_function_has_second_derivatives(bias):
    (x, weight), biases = drawn((2, 3, 8), (5, 4)), drawn((5,)) if bias else []
    layer = nn.Linear(4, 5, bias=bias)

    def with_weights(x, weight, *biases):
        layer.weight, layer.bias = weight, (biases or [None])[0]
        return linear_of(swiglu, x, layer)

    del layer.weight, layer.bias
    given = [x, weight, *biases]
    torch.testing.assert_close(with_weights(*given), F.linear(swiglu(x), *given[1:]), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(with_weights, given)
    assert torch.autograd.gradgradcheck(with_weights, given)


@CENTRED
def test_only_the_argument_is_saved(centred):
    x, shift, scale = drawn((2, 64, 32), (2, 32), (2, 32), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        small = saved_bytes(lambda: modulated_norm(x, shift, scale, "layernorm" if centred else "rmsnorm"), apart=[x])
    assert small.total == 2 * 32 * 4  # 1 + scale
    layer = nn.Linear(16, 8)
    kept = saved_bytes(lambda: linear_of(swiglu, x, layer), apart=[*layer.parameters()])
    assert kept.kept == [(x.numel() * 4, torch.float32, tuple(x.shape))]


def test_a_gated_sum_keeps_what_is_narrow():
    x, branch, gate = (
        t.to(d)
        for t, d in zip(drawn((2, 8, 4), (2, 8, 4), (2, 4)), [torch.float32] + 2 * [torch.bfloat16], strict=True)
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = add_gated(x, gate, branch)
        kept = saved_bytes(lambda: add_gated(x, gate, branch), apart=[x])
    assert y.dtype == torch.float32 and kept.wide == 0 and kept.total == 2 * (branch.numel() + gate.numel())
    torch.testing.assert_close(y, x + gate.float()[:, None] * branch.float())


def test_a_rotation_keeps_its_tables():
    (x,), tables = drawn((2, 6, 8), dtype=torch.float32), rotary_positions(2, 3, 8)
    assert saved_bytes(lambda: rotate(x, *tables), apart=tables).total == 0


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen):
    inputs = drawn((2, 5, 6), (2, 1, 6), (2, 1, 6))
    inputs[frozen] = inputs[frozen].detach()
    scaled_norm(*inputs).square().sum().backward()
    assert [given.grad is None for given in inputs] == [number == frozen for number in range(3)]
    layer, (x,) = nn.Linear(4, 5).requires_grad_(False), drawn((2, 8), dtype=torch.float32)
    linear_of(swiglu, x, layer).sum().backward()
    assert x.grad is not None and layer.weight.grad is None and layer.bias.grad is None


@CENTRED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_wide(centred, dtype):
    x, scale = drawn((3, 4096), (4096,), dtype=dtype)
    with torch.no_grad():
        x += 50  # float16 cannot hold the sum of the squares, nor bfloat16 the variance
    y = scaled_norm(x, scale, centred=centred)
    y.float().sum().backward()
    wide = [given.detach().double().requires_grad_() for given in (x, scale)]
    expected = of_torch(*wide, None, centred)
    expected.sum().backward()
    assert y.dtype == x.grad.dtype == scale.grad.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(x.grad.double(), wide[0].grad, rtol=3e-2, atol=3e-2)


def test_transforms_of_functions_see_the_plain_formula():
    mlp = SwigluMLP(6, 2.0).double()
    x, shift, scale, direction = drawn((2, 5, 6), (2, 6), (2, 6), (2, 5, 6))

    def function(x):
        return mlp(modulated_norm(x, shift, scale, "rmsnorm"))

    value, pushed = torch.func.jvp(function, (x.detach(),), (direction.detach(),))
    torch.testing.assert_close(value, function(x))
    step = 1e-6 * direction.detach()
    torch.testing.assert_close(pushed, (function(x + step) - function(x - step)) / 2e-6, rtol=1e-6, atol=1e-6)


def test_compiled_gradients_are_the_same():
    mlp = SwigluMLP(6, 2.0)
    given = drawn((2, 5, 6), (2, 6), (2, 6), dtype=torch.float32)

    def function(x, shift, scale):
        return add_gated(x, shift, mlp(modulated_norm(x, shift, scale, "layernorm"))).square().mean()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    wanted = [*given, *mlp.parameters()]
    for one, other in zip(*(torch.autograd.grad(f(*given), wanted) for f in (function, compiled)), strict=True):
        torch.testing.assert_close(one, other)
