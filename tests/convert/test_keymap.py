"""Key maps: every weight goes somewhere and comes back, and what does not fit is an error of one line.

Where weights are rearranged, the same quantity is computed here directly, as the published programs define it.
"""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
import torch

from latentflow.convert.architecture import Architecture
from latentflow.convert.families.dit import turn_time
from latentflow.convert.families.edm_unet import swap_halves
from latentflow.convert.families.registry import architecture
from latentflow.convert.keymap import KeyMap
from latentflow.convert.rules import attention
from latentflow.errors import ArtifactError
from latentflow.networks.layers import TimeEmbedding
from latentflow.networks.unet_blocks import MapAttention
from latentflow.shapes import Condition
from tests.convert import foreign
from tests.convert.parity import relative_error

EVERY = pytest.mark.parametrize("name", foreign.NETWORKS)

COMPUTED = {
    "sit": {"t_embedder.mlp.0.weight"},  # turned by an angle
    "edm ddpm++": {"map_label.weight"},  # times sqrt(classes)
    "edm ncsn++": {"map_label.weight"},
}
"""Foreign weights that ours are computed from, so that they come back but for rounding; all others are moved."""


def computed(name: str) -> set[str]:
    return next((keys for start, keys in COMPUTED.items() if name.startswith(start)), set())


def refusal(published: Architecture, weights: dict[str, torch.Tensor]) -> str:
    """The one line about weights that do not fit."""
    with pytest.raises(ArtifactError) as caught:
        published.load(weights, "model_475.pth")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model_475.pth")
    return message


# There and back


@EVERY
def test_every_key_is_used_once(name):
    keys = foreign.network(name).keys
    theirs = [key for rule in keys.rules for key in rule.theirs] + [constant.theirs for constant in keys.constants]
    ours = [rule.ours for rule in keys.rules]
    assert set(Counter([*theirs, *keys.unused]).values()) == {1}
    assert set(Counter(ours).values()) == {1}
    assert set(ours) == set(foreign.network(name).empty().state_dict())


@EVERY
def test_weights_come_back(name):
    published = foreign.network(name)
    theirs = foreign.draw(published)
    ours = published.load(theirs).state_dict()
    back = published.keys.theirs(ours)
    assert back.keys() == theirs.keys() - published.keys.unused.keys()
    inexact = {key for rule in published.keys.rules if not rule.exact_back for key in rule.theirs}
    for key in back.keys() - inexact:
        assert back[key].dtype == theirs[key].dtype
        if key in computed(name):
            assert relative_error(back[key], theirs[key]) < 3e-7, key
        else:
            assert torch.equal(back[key], theirs[key]), key

    again = published.load(back).state_dict()
    made_of = {rule.ours: rule.theirs for rule in published.keys.rules}
    for key, tensor in ours.items():
        if computed(name).intersection(made_of[key]):
            assert relative_error(again[key], tensor) < 3e-7, key
        else:
            assert torch.equal(again[key], tensor), key


@pytest.mark.parametrize("name", ["sit", "edm ddpm++, 3 classes", "edm ncsn++, 3 classes"])
def test_computed_weights_come_back_in_double_precision(name):
    published = foreign.network(name)
    theirs = {key: tensor.double() for key, tensor in foreign.draw(published).items()}
    with torch.device("meta"):
        expected = published.empty().double().state_dict()
    back = published.keys.theirs(published.keys.ours(theirs, expected, "file"))
    for key in computed(name):
        torch.testing.assert_close(back[key], theirs[key], rtol=1e-13, atol=1e-14)


def test_only_two_kinds_of_weights_are_lost():
    """The half of an output that no velocity needs, and how a bias and the only row of a table shared their sum."""
    lost = {
        key
        for name in foreign.NETWORKS
        for rule in foreign.network(name).keys.rules
        if not rule.exact_back
        for key in rule.theirs
    }
    assert lost == {
        "final_layer.linear.weight",
        "final_layer.linear.bias",
        "t_embedder.mlp.2.bias",
        "y_embedder.embedding_table.weight",
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["lfm DiT, 10 classes", "guided", "edm adm, 3 classes"])
def test_files_in_half_precision(name, dtype):
    published = foreign.network(name)
    half = foreign.draw(published, dtype=dtype)
    found = published.load(half).state_dict()
    expected = published.load({key: tensor.float() for key, tensor in half.items()}).state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# What is computed


def direct_sinusoid(time: torch.Tensor) -> torch.Tensor:
    """[B] => [B, 256] float64: cos and sin of time / 10000^(i / 128)."""
    angles = time.double()[:, None] * 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def test_turned_time_is_the_time_from_the_other_end():
    weight = torch.randn(7, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    time = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = direct_sinusoid(1 - time) @ weight.T
    torch.testing.assert_close(direct_sinusoid(time) @ turn_time(weight).T, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(turn_time(turn_time(weight)), weight, rtol=0, atol=1e-14)

    embedding = TimeEmbedding(7, scale=1.0).double()
    embedding.mlp[0].weight.data = turn_time(weight)
    hidden = expected + embedding.mlp[0].bias
    expected = torch.nn.functional.silu(hidden) @ embedding.mlp[2].weight.T + embedding.mlp[2].bias
    assert (embedding(time) - expected).abs().max() < 1e-5  # its sinusoids are float32


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize(("order", "axes"), [("qhc", (3, "h", "c")), ("hqc", ("h", 3, "c")), ("hcq", ("h", "c", 3))])
@torch.no_grad()
def test_attention_of_each_order_of_rows(order, axes, num_heads):
    """Against attention written out for that order."""
    channels, generator = 16, torch.Generator().manual_seed(0)
    head = channels // num_heads

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    qkv, qkv_bias, out, out_bias = draw(48, channels), draw(48), draw(channels, channels), draw(channels)
    scale, shift = draw(channels), draw(channels)
    theirs = {"norm.weight": scale, "norm.bias": shift, "qkv.weight": qkv[:, :, None], "qkv.bias": qkv_bias}
    theirs |= {"proj.weight": out[:, :, None], "proj.bias": out_bias}

    ours = MapAttention(torch.nn.GroupNorm(4, channels), num_heads, 1.0).double()
    keys = KeyMap(
        attention("map", {"norm": "norm", "qkv": "qkv", "out": "proj"}, num_heads, order, num_spatial=1),
    )
    state = {f"map.{key}": tensor for key, tensor in ours.state_dict().items()}
    ours.load_state_dict({key.removeprefix("map."): x for key, x in keys.ours(theirs, state, "file").items()})

    x = draw(2, channels, 3, 5)
    normed = torch.nn.functional.group_norm(x, 4, scale, shift).flatten(2)
    rows = torch.einsum("oi,bin->bon", qkv, normed) + qkv_bias[:, None]
    rows = rows.unflatten(1, [{"h": num_heads, "c": head, 3: 3}[axis] for axis in axes])
    names = "".join({"h": "h", "c": "c", 3: "q"}[axis] for axis in axes)
    q, k, v = torch.einsum(f"b{names}n->qbhcn", rows)
    weights = (torch.einsum("bhcn,bhcm->bhnm", q, k) / math.sqrt(head)).softmax(-1)
    attended = torch.einsum("bhnm,bhcm->bhcn", weights, v).flatten(1, 2)
    expected = x + (torch.einsum("oi,bin->bon", out, attended) + out_bias[:, None]).unflatten(2, (3, 5))
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "key", "num_heads", "order"),
    [
        ("guided", "middle_block.1.qkv.weight", 2, "hqc"),
        ("guided, other order", "middle_block.1.qkv.weight", 2, "qhc"),
        ("edm adm, 0 classes", "dec.4x4_in0.qkv.weight", 2, "hcq"),
    ],
)
def test_which_order_belongs_to_which_network(name, key, num_heads, order):
    """Every foreign row holds its own number."""
    published = foreign.network(name)
    theirs = foreign.draw(published)
    rows = len(theirs[key])
    theirs[key] = torch.arange(float(rows)).reshape(-1, *(1,) * (theirs[key].dim() - 1)).expand_as(theirs[key])
    ours = next(rule.ours for rule in published.keys.rules if rule.theirs == (key,))
    found = published.load(theirs).state_dict()[ours][:, 0].long()
    width = rows // 3 // num_heads
    q, h, c = torch.meshgrid(torch.arange(3), torch.arange(num_heads), torch.arange(width), indexing="ij")
    expected = {
        "qhc": (q * num_heads + h) * width + c,
        "hqc": (h * 3 + q) * width + c,
        "hcq": (h * width + c) * 3 + q,
    }[order]
    assert torch.equal(found, expected.flatten())


def test_tables_of_labels():
    dropped, kept = foreign.network("lfm DiT, 10 classes"), foreign.network("lfm DiT, 10 classes, none dropped")
    theirs = foreign.draw(dropped)
    table = theirs["y_embedder.embedding_table.weight"]
    assert len(table) == 11
    assert torch.equal(dropped.load(theirs).label_embedding.weight, table)

    theirs = foreign.draw(kept)
    table = theirs["y_embedder.embedding_table.weight"]
    assert len(table) == 10
    assert torch.equal(kept.load(theirs).label_embedding.weight, torch.cat([table, table[9:]]))  # y omitted: the last

    guided = foreign.network("guided, 10 classes")
    theirs = foreign.draw(guided)
    found = guided.load(theirs).embedding.label.weight
    assert torch.equal(found[:10], theirs["label_emb.weight"])
    assert not found[10].any()

    for model_type in ("adm", "ddpm++", "ncsn++"):
        edm = foreign.network(f"edm {model_type}, 3 classes")
        theirs = foreign.draw(edm)
        found = edm.load(theirs).embedding.label.weight
        weight, bias = theirs["map_label.weight"], theirs.get("map_label.bias")
        assert (bias is None) == (model_type == "adm")
        one_hot = torch.cat([torch.eye(3), torch.zeros(1, 3)])
        if bias is None:
            assert torch.equal(found, one_hot @ weight.T)
        else:
            expected = (one_hot * math.sqrt(3)) @ weight.T + bias
            half = expected.shape[1] // 2
            torch.testing.assert_close(torch.cat([found[:, half:], found[:, :half]], 1), expected, rtol=0, atol=1e-6)


def test_a_table_of_one_row_is_part_of_a_bias():
    published = foreign.network("lfm DiT, 1 class")
    theirs = foreign.draw(published)
    network = published.load(theirs)
    assert network.vectors.num_classes == 0
    expected = theirs["t_embedder.mlp.2.bias"] + theirs["y_embedder.embedding_table.weight"][0]
    torch.testing.assert_close(network.time_embedding.mlp[2].bias.data, expected, rtol=0, atol=1e-7)


def test_swapped_halves():
    assert swap_halves(torch.arange(6.0)[None]).tolist() == [[3, 4, 5, 0, 1, 2]]


@torch.no_grad()
def test_families_of_transformers_differ_in_sign_and_time():
    """One set of weights read as each family: sit(x, t) = -dit(x, 1 - t)."""
    options = {**foreign.NETWORKS["sit"][1]}
    noise_network = architecture("dit", options)
    theirs = foreign.draw(noise_network)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    time, condition = torch.tensor([0.3, 0.9]), Condition(torch.tensor([1, 3]))
    noise = noise_network.load(theirs)(x, time, condition)
    sit = architecture("sit", options).load(theirs)(x, 1 - time, condition)
    assert noise.shape == x.shape
    assert relative_error(sit, -noise) < 3e-6


# What does not fit


def test_one_key_missing():
    published = foreign.network("guided")
    theirs = foreign.draw(published)
    del theirs["middle_block.1.qkv.bias"]
    assert "lacks 'middle_block.1.qkv.bias'" in refusal(published, theirs)


def test_one_key_too_many():
    published = foreign.network("guided")
    assert "'extra.weight', which this network does not know" in refusal(
        published, {**foreign.draw(published), "extra.weight": torch.ones(1)}
    )


def test_one_key_misspelt():
    published = foreign.network("lfm DiT, 10 classes")
    theirs = foreign.draw(published)
    theirs["blocks.1.atn.qkv.bias"] = theirs.pop("blocks.1.attn.qkv.bias")
    message = refusal(published, theirs)
    assert "lacks 'blocks.1.attn.qkv.bias'" in message
    assert "has 'blocks.1.atn.qkv.bias'" in message
    assert "did you mean 'blocks.1.attn.qkv.bias'?" in message


def test_many_keys_are_counted():
    message = refusal(foreign.network("guided"), foreign.draw(foreign.network("edm adm, 0 classes")))
    assert re.search(r"lacks '[\w.]+' and \d+ more; it has '[\w.]+' and \d+ more", message)


def test_keys_that_are_not_used_may_be_left_out_but_not_elsewhere():
    augmented, plain = foreign.network("edm adm, augmented"), foreign.network("edm adm, 0 classes")
    theirs = foreign.draw(augmented)
    assert "map_augment.weight" in theirs
    expected = augmented.load(theirs).state_dict()
    assert "map_augment.weight" in refusal(plain, theirs)
    del theirs["map_augment.weight"]
    found = augmented.load(theirs).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_another_shape():
    published = foreign.network("guided")
    theirs = foreign.draw(published)
    theirs["out.2.weight"] = torch.zeros(8, 32, 3, 3)
    message = refusal(published, theirs)
    assert "'out.2.weight' has the shape [8, 32, 3, 3], this network needs [4, 32, 3, 3]" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite(value):
    published = foreign.network("lfm DiT, 1 class")
    theirs = foreign.draw(published)
    theirs["blocks.0.mlp.fc1.weight"][3, 2] = value
    assert "'blocks.0.mlp.fc1.weight' holds values that are not finite" in refusal(published, theirs)


def test_positions_of_another_size():
    published = foreign.network("lfm DiT, 1 class")
    theirs = foreign.draw(published)
    theirs["pos_embed"] = torch.zeros(1, 64, 32)
    message = refusal(published, theirs)
    assert "'pos_embed' has the shape [1, 64, 32], this network needs [1, 16, 32]" in message
    assert "image size" in message


@pytest.mark.parametrize(
    ("name", "key"),
    [("sit", "pos_embed"), ("edm adm, 0 classes", "enc.4x4_down.conv0.resample_filter")],
)
def test_a_constant_of_another_value(name, key):
    published = foreign.network(name)
    theirs = foreign.draw(published)
    theirs[key].view(-1)[-1] += 1e-3
    assert f"{key!r}, which is not a weight, differs by 1.0e-03" in refusal(published, theirs)
    del theirs[key]  # the file need not have it
    published.load(theirs)


def test_a_constant_that_is_not_finite():
    published = foreign.network("sit")
    theirs = foreign.draw(published)
    theirs["pos_embed"][0, 0, 0] = math.nan
    assert "'pos_embed'" in refusal(published, theirs)


def test_constants_are_those_of_the_published_programs():
    """By their definitions: 2-D sinusoids of the column and of the row, and normalised binomials."""
    table = {constant.theirs: constant.value for constant in foreign.network("sit").keys.constants}["pos_embed"]
    frequencies = 10_000.0 ** (-torch.arange(8) / 8)
    row, column = 2, 3  # of 4 x 4 tokens of 32 channels
    parts = [f(place * frequencies) for place in (column, row) for f in (torch.sin, torch.cos)]
    torch.testing.assert_close(table[0, 4 * row + column], torch.cat(parts), rtol=0, atol=1e-6)

    for model_type, taps in (("adm", [1, 1]), ("ncsn++", [1, 3, 3, 1])):
        constants = foreign.network(f"edm {model_type}, 0 classes").keys.constants
        expected = torch.tensor([[a * b for b in taps] for a in taps]) / sum(taps) ** 2
        assert constants
        for constant in constants:
            torch.testing.assert_close(constant.value, expected[None, None])
