"""Converted networks against the numbers that the published implementations gave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow.convert.families.edm_unet import block_rules
from latentflow.convert.families.registry import architecture
from latentflow.convert.keymap import KeyMap
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.networks.spatial_encoder import SpatialEncoder
from latentflow.networks.unet_blocks import BlockOptions, MapAttention, ResidualBlock, group_norm
from latentflow.shapes import Condition
from tests.convert.parity import (
    FAMILY_OF_KIND,
    dtype_of,
    find,
    fixtures,
    needs_parity,
    relative_error,
    tensors,
    weights,
)

LIMIT = 1e-5

GUIDED = {"sit": 3, "dit": 3}
"""The first channels that the published guidance acts on; None: all."""


def task_of(fixture: dict[str, Any]) -> dict[str, Any]:
    """The task of a network, which the published constructors do not say."""
    return {"inpainting": True} if fixture["constructor"].get("num_in_channels") == 9 else {}


def condition(network: torch.nn.Module, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Condition]:
    """A published input as latents and condition."""
    if not network.spatial.inpainting:
        return x, Condition(labels)
    c = network.in_channels
    return x[:, :c], Condition(labels, masked_latents=x[:, c : 2 * c], mask=x[:, 2 * c :])


def cases():
    return [
        pytest.param(fixture, case, id=f"{fixture['id']}-{case['name']}")
        for fixture in fixtures()
        for case in fixture["cases"]
    ]


@pytest.mark.parametrize(("fixture", "case"), cases())
def test_networks(fixture, case):
    error = error_of(fixture, case)
    print(f"parity {fixture['id']} {case['name']}: largest error {error:.1e} of the largest value")
    assert error <= LIMIT


@torch.no_grad()
def error_of(fixture: dict[str, Any], case: dict[str, Any]) -> float:
    """The largest error of the converted network, relative to the largest published value."""
    family, dtype, given = FAMILY_OF_KIND[fixture["kind"]], dtype_of(case), tensors(fixture)
    published = architecture(family, fixture["constructor"], **task_of(fixture))
    network = published.load(weights(fixture, case.get("weight_gain", 1)), fixture["file"]).to(dtype)
    x, time, labels = inputs(network, case, given)
    if family == "sit":
        time = 1 - time
    expected = given[case["output"]][:, : network.out_channels]  # without the variance of DiT
    if case["method"] == "forward_with_cfg":
        found, expected = guided(network, x, time, labels, case["kwargs"]["cfg_scale"], family), expected[: len(x) // 2]
    else:
        latents, conditions = condition(network, x, labels)
        found = network(latents, time, conditions)
    assert found.dtype == dtype
    return relative_error(-found if family == "sit" else found, expected)


def inputs(
    network: torch.nn.Module, case: dict[str, Any], given: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents, times and labels of a case; the null label where it gives none."""
    dtype = dtype_of(case)
    x = given[case["inputs"]["x"]].to(dtype)
    time = given[case["inputs"]["t"]].expand(len(x))
    if time.is_floating_point():
        time = time.to(dtype)
    if not network.vectors.num_classes:
        return x, time, None
    labels = given[case["inputs"]["y"]] if "y" in case["inputs"] else torch.full((len(x),), network.vectors.null_label)
    if case.get("kwargs", {}).get("drop_half_label"):
        labels = labels.clone()
        labels[len(x) // 2 :] = network.vectors.null_label
    return x, time, labels


def guided(network: torch.nn.Module, x: Tensor, time: Tensor, labels: Tensor, scale: float, family: str) -> Tensor:
    """Classifier-free guidance of the first half of a batch; these cases evaluate the halves at different times."""
    half = len(x) // 2
    null = Condition(torch.full((half,), network.vectors.null_label))
    velocity = ConditionedVelocity(
        lambda x, _, condition: network(x, time, condition),
        Condition(labels[:half]),
        null,
        scale,
        guided_channels=GUIDED.get(family),
    )
    return velocity(x[:half], time[:half])


def wrong_gelu(patch: pytest.MonkeyPatch) -> None:
    gelu = torch.nn.functional.gelu
    patch.setattr(torch.nn.functional, "gelu", lambda x, approximate="none": gelu(x))


def wrong_attention_scale(patch: pytest.MonkeyPatch) -> None:
    attend = torch.nn.functional.scaled_dot_product_attention
    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: attend(1.01 * q, k, v))


def wrong_norm_eps(patch: pytest.MonkeyPatch) -> None:
    normalise = torch.nn.functional.group_norm
    patch.setattr(torch.nn.functional, "group_norm", lambda x, g, w, b, eps: normalise(x, g, w, b, 2 * eps))


@pytest.mark.parametrize(
    ("fixture", "case", "change"),
    [
        ("sit", "base", wrong_gelu),
        ("sit", "base", wrong_attention_scale),
        ("guided_unet", "base", wrong_attention_scale),
        ("guided_unet", "small_x", wrong_norm_eps),
        ("guided_unet_inpainting", "base", wrong_attention_scale),
        ("edm_ddpmpp", "gain2", wrong_attention_scale),
        ("edm_ddpmpp", "small_x", wrong_norm_eps),
    ],
)
def test_the_fixtures_are_sharp(monkeypatch, fixture, case, change):
    """What is easily mistaken in a port moves the outputs by many times the tolerance."""
    found = find(fixture)
    change(monkeypatch)
    error = error_of(found, next(one for one in found["cases"] if one["name"] == case))
    print(f"parity {fixture} {case} with {change.__name__}: largest error {error:.1e} of the largest value")
    assert error > 5 * LIMIT


@needs_parity
@pytest.mark.parametrize("case", ["base", "gain2"])
@torch.no_grad()
def test_block_of_two_heads(case):
    fixture = find("lfm_edm_block_2heads")
    made, given = fixture["constructor"], tensors(fixture)
    channels, heads = made["out_channels"], made["out_channels"] // made["channels_per_head"]

    def norm():
        return group_norm(channels, groups=32, group_channels=4, eps=1e-5)

    attention = MapAttention(norm(), heads, 1.0)
    block = ResidualBlock(norm(), norm(), BlockOptions(made["emb_channels"]), attention=attention).eval()
    keys = KeyMap(block_rules("", "", num_heads=heads))
    gain = next(c for c in fixture["cases"] if c["name"] == case).get("weight_gain", 1)
    block.load_state_dict(keys.ours(weights(fixture, gain), block.state_dict(), fixture["file"]))
    error = relative_error(block(given["inputs/x"], given["inputs/emb"]), given[f"outputs/{case}"])
    print(f"parity lfm_edm_block_2heads {case}: largest error {error:.1e} of the largest value")
    assert error <= LIMIT


@needs_parity
@pytest.mark.parametrize(("case", "source"), [("base", "inputs/x"), ("odd", "inputs/x_odd")])
@torch.no_grad()
def test_spatial_encoder(case, source):
    """Their halvings are the shares of the classes in each latent pixel, which come with the data here."""
    fixture = find("lfm_spatial_rescaler")
    given, made = tensors(fixture), fixture["constructor"]
    encoder = SpatialEncoder(made["in_channels"], made["out_channels"])
    encoder.mix.weight.copy_(weights(fixture)["channel_mapper.weight"])
    shares = torch.nn.functional.avg_pool2d(given[source], 2 ** made["n_stages"])
    error = relative_error(encoder(shares), given[f"outputs/{case}"])
    print(f"parity lfm_spatial_rescaler {case}: largest error {error:.1e} of the largest value")
    assert error <= LIMIT
