"""Blocks of the U-Net against their equations, written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentflow.errors import ConfigError
from latentflow.networks.unet_blocks import (
    BlockOptions,
    Downsample,
    InputBranch,
    MapAttention,
    ResidualBlock,
    Upsample,
    double,
    group_norm,
    halve,
)

EXACT = {"rtol": 0, "atol": 1e-12}


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def drawn(module: nn.Module) -> nn.Module:
    """In float64, every weight drawn at random; norms too, so that each of them is seen."""
    generator = torch.Generator().manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module.requires_grad_(False)


def norm(channels: int, groups: int = 2) -> nn.GroupNorm:
    return group_norm(channels, groups=groups, group_channels=1, eps=1e-5)


# Norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "groups", "group_channels", "expected"),
    [
        (256, 32, 1, 32),
        (256, 32, 4, 32),
        (64, 32, 4, 16),
        (48, 32, 4, 12),
        (32, 32, 1, 32),
        (3, 32, 4, 1),
        (8, 2, 1, 2),
    ],
)
def test_number_of_groups(channels, groups, group_channels, expected):
    made = group_norm(channels, groups=groups, group_channels=group_channels, eps=1e-6)
    assert (made.num_groups, made.num_channels, made.eps) == (expected, channels, 1e-6)


@pytest.mark.parametrize(("channels", "group_channels", "groups"), [(48, 1, 32), (30, 4, 7)])
def test_groups_that_do_not_divide_are_refused(channels, group_channels, groups):
    said = f"{channels} channels cannot be normalised in {groups} groups; choose network.channels as a multiple"
    with pytest.raises(ConfigError, match=said):
        group_norm(channels, groups=32, group_channels=group_channels, eps=1e-5)


# Changes of size -------------------------------------------------------------------------------------------------


def test_box_is_means_and_repeated_pixels():
    x = torch.tensor([[1.0, 3.0, 5.0, 5.0], [5.0, 7.0, 1.0, -3.0]], dtype=torch.float64)[None, None]
    assert halve(x, "box").tolist() == [[[[4.0, 2.0]]]]
    assert double(halve(x, "box"), "box").tolist() == [[[[4.0, 4.0, 2.0, 2.0]] * 2]]


def test_binomial_halving_is_1_3_3_1_in_both_directions():
    x = image(2, 3, 6, 8)
    padded = F.pad(x, (1, 1, 1, 1))
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    expected = torch.einsum("bdijpq,p,q->bdij", padded.unfold(2, 4, 2).unfold(3, 4, 2), taps, taps)
    torch.testing.assert_close(halve(x, "binomial"), expected, **EXACT)
    torch.testing.assert_close(halve(padded, "binomial", padding=0), expected, **EXACT)


def test_binomial_doubling_is_linear_interpolation_inside():
    # 1 3 3 1 with a zero between pixels: weights 3/4 and 1/4, as bilinear interpolation has them.
    x = image(2, 3, 4, 6)
    doubled = double(x, "binomial")
    bilinear = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(doubled[..., 1:-1, 1:-1], bilinear[..., 1:-1, 1:-1], **EXACT)
    # Outside of the image is zero: the corner keeps (3/4)^2.
    torch.testing.assert_close(doubled[..., 0, 0], x[..., 0, 0] * 9 / 16, **EXACT)


@pytest.mark.parametrize("resample_filter", ["box", "binomial"])
def test_doubling_is_the_transpose_of_halving(resample_filter):
    x, y = image(1, 2, 4, 6), image(1, 2, 8, 12, seed=1)
    left, right = (double(x, resample_filter) * y).sum(), 4 * (x * halve(y, resample_filter)).sum()
    torch.testing.assert_close(left, right, **EXACT)


def test_downsample_and_upsample():
    x, c = image(2, 3, 4, 6), image(2, 5)
    assert torch.equal(Downsample(3, learned=False)(x, c), halve(x, "box"))
    assert torch.equal(Upsample(3, learned=False)(x, c), double(x, "box"))
    down, up = drawn(Downsample(3, learned=True)), drawn(Upsample(3, learned=True))
    expected = F.conv2d(x, down.conv.weight, down.conv.bias, stride=2, padding=1)
    torch.testing.assert_close(down(x, c), expected, **EXACT)
    expected = F.conv2d(double(x, "box"), up.conv.weight, up.conv.bias, padding=1)
    torch.testing.assert_close(up(x, c), expected, **EXACT)
    assert down(x, c).shape[2:] == (2, 3) and up(x, c).shape[2:] == (8, 12)
    assert not list(Downsample(3, learned=False).parameters()) + list(Upsample(3, learned=False).parameters())


@pytest.mark.parametrize("resample_filter", ["box", "binomial"])
def test_the_input_branch_convolves_and_halves(resample_filter):
    branch, x = drawn(InputBranch(3, 4, resample_filter)), image(2, 3, 8, 12)
    convolved = F.conv2d(x, branch.conv.weight, branch.conv.bias, padding=1)
    expected, found = halve(convolved, resample_filter), branch(x)
    assert found.shape == (2, 4, 4, 6)
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], **EXACT)
    if resample_filter == "binomial":  # at the border the filter meets convolved pixels, not zeros
        wide = F.conv2d(F.pad(x, (2, 2, 2, 2)), branch.conv.weight, branch.conv.bias)
        torch.testing.assert_close(found, halve(wide, "binomial", padding=0), **EXACT)
        assert (found[..., 0, 0] - expected[..., 0, 0]).abs().max() > 1e-3
    else:
        torch.testing.assert_close(found, expected, **EXACT)


# Attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_heads", "gain"), [(1, 1.0), (2, 1.0), (4, math.sqrt(0.5))])
def test_map_attention_is_softmax_over_pixels(num_heads, gain):
    block, x = drawn(MapAttention(norm(8), num_heads, gain)), image(2, 8, 2, 3)
    tokens = F.group_norm(x, 2, block.norm.weight, block.norm.bias, eps=1e-5).flatten(2).mT  # [B, N, D]
    qkv, out = block.attention.qkv, block.attention.out
    query, key, value = (tokens @ qkv.weight.T + qkv.bias).chunk(3, dim=2)
    heads = []
    for head in range(num_heads):
        own = slice(head * 8 // num_heads, (head + 1) * 8 // num_heads)
        logits = query[..., own] @ key[..., own].mT / math.sqrt(8 / num_heads)
        heads.append(logits.softmax(2) @ value[..., own])
    attended = (torch.cat(heads, 2) @ out.weight.T + out.bias).mT.reshape(x.shape)
    torch.testing.assert_close(block(x), (x + attended) * gain, **EXACT)


# Residual blocks -------------------------------------------------------------------------------------------------


def by_hand(block: ResidualBlock, x: torch.Tensor, c: torch.Tensor, *, modulation, resize, resample_filter, gain):
    """The docstring's equation."""
    change = {None: lambda x, _: x, "halve": halve, "double": double}[resize]

    def resized(x: torch.Tensor) -> torch.Tensor:
        return change(x, resample_filter)

    h = F.silu(F.group_norm(x, 2, block.norm1.weight, block.norm1.bias, eps=1e-5))
    h = F.conv2d(resized(h), block.conv1.weight, block.conv1.bias, padding=1)
    embedded = (c @ block.modulation.weight.T + block.modulation.bias)[:, :, None, None]
    second = (2, block.norm2.weight, block.norm2.bias, 1e-5)
    if modulation == "scale_shift":
        d = h.shape[1]
        h = F.group_norm(h, *second) * (1 + embedded[:, :d]) + embedded[:, d:]
    else:
        h = F.group_norm(h + embedded, *second)
    h = F.conv2d(F.silu(h), block.conv2.weight, block.conv2.bias, padding=1)
    skip = resized(x)
    if block.skip is not None:
        skip = F.conv2d(skip, block.skip.weight, block.skip.bias)
    return (skip + h) * gain


@pytest.mark.parametrize("modulation", ["scale_shift", "shift"])
@pytest.mark.parametrize(
    ("channels", "resize", "resample_filter", "skip_conv", "gain"),
    [
        ((4, 4), None, "box", False, 1.0),
        ((4, 6), None, "box", False, math.sqrt(0.5)),
        ((4, 4), "halve", "box", False, 1.0),
        ((4, 4), "halve", "binomial", True, 0.5),
        ((4, 4), "double", "box", True, 1.0),
        ((4, 4), "double", "binomial", False, 1.0),
    ],
)
def test_residual_block(modulation, channels, resize, resample_filter, skip_conv, gain):
    wide_in, wide_out = channels
    options = BlockOptions(
        5, modulation=modulation, resample_filter=resample_filter, skip_conv=skip_conv, residual_scale=gain
    )
    block = ResidualBlock(norm(wide_in), norm(wide_out), options, resize=resize)
    assert (block.skip is not None) == (skip_conv or wide_in != wide_out)
    block, x, c = drawn(block), image(2, wide_in, 4, 6), image(2, 5, seed=1)
    expected = by_hand(*(block, x, c), modulation=modulation, resize=resize, resample_filter=resample_filter, gain=gain)
    torch.testing.assert_close(block(x, c), expected, **EXACT)


def test_attention_comes_after_the_scaled_sum():
    attention = drawn(MapAttention(norm(4), 2, 0.5))
    with_attention = drawn(ResidualBlock(norm(4), norm(4), BlockOptions(5, residual_scale=0.5), attention=attention))
    without = ResidualBlock(norm(4), norm(4), BlockOptions(5, residual_scale=0.5)).double()
    own = {k: v for k, v in with_attention.state_dict().items() if not k.startswith("attention.")}
    without.load_state_dict(own)
    x, c = image(2, 4, 4, 4), image(2, 5, seed=1)
    torch.testing.assert_close(with_attention(x, c), with_attention.attention(without(x, c)), **EXACT)


def test_dropout_follows_the_second_activation_in_training_only():
    block = drawn(ResidualBlock(norm(4), norm(4), BlockOptions(5, dropout=0.4)))
    x, c = image(2, 4, 8, 8), image(2, 5, seed=1)
    plain = drawn(ResidualBlock(norm(4), norm(4), BlockOptions(5)))
    assert torch.equal(block.eval()(x, c), plain(x, c))
    seen = []
    block.conv2.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    torch.manual_seed(0)
    block(x, c), block.train()(x, c)
    kept = seen[1] != 0
    assert kept.double().mean().item() == pytest.approx(0.6, abs=0.06)  # 512 values: 0.02 is one deviation
    torch.testing.assert_close(seen[1][kept], seen[0][kept] / 0.6, **EXACT)


def test_a_block_with_a_zero_last_convolution_is_its_skip():
    block = ResidualBlock(norm(4), norm(4), BlockOptions(5, residual_scale=0.5))
    nn.init.zeros_(block.conv2.weight), nn.init.zeros_(block.conv2.bias)
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 5)), x * 0.5)
