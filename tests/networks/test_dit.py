"""The diffusion transformer: published sizes, positions, options, messages."""

import pytest
import torch
from pydantic import ValidationError

from latentflow.errors import ConfigError
from latentflow.networks.dit import NAMES, DiT, DiTConfig
from latentflow.networks.layers import (
    GeluMLP,
    SelfAttention,
    SwigluMLP,
    rotary_positions,
    rotate,
    sincos_positions,
    time_sinusoid,
)
from latentflow.networks.running import set_memory
from latentflow.shapes import Condition

TINY = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 2}
NO_LABELS = Condition()
OPTIONS = pytest.mark.parametrize(
    "options",
    [{"variant": "classic"}, {"variant": "modern"}, {"variant": "modern", "value_residual": True, "depth": 2}],
    ids=["classic", "modern", "value residual"],
)


def tiny(*, num_classes: int = 0, in_channels: int = 4, out_channels: int = 4, **options) -> DiT:
    return DiT(
        DiTConfig(**{**TINY, **options}), in_channels=in_channels, out_channels=out_channels, num_classes=num_classes
    )


def awake(network: DiT, seed: int = 0, std: float = 0.2) -> DiT:
    """Every weight drawn at random, so that no gate is closed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return network


def inputs(batch: int = 3, height: int = 8, width: int = 8, channels: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator), torch.rand(batch, generator=generator)


# Sizes -----------------------------------------------------------------------------------------------------------


def num_parameters(name: str, **facts) -> int:
    with torch.device("meta"):
        network = DiT(DiTConfig(name=name), **facts)
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "published", "out_channels", "num_classes"),
    [
        ("DiT-S/2", 32_963_360, 8, 1000),
        ("DiT-B/2", 130_512_416, 8, 1000),
        ("DiT-L/2", 458_102_816, 8, 1000),
        ("DiT-XL/2", 675_129_632, 8, 1000),
        ("DiT-XL/4", 675_074_432, 8, 1000),
        ("DiT-B/2", 130_500_112, 4, 1000),
    ],
)
def test_published_parameter_counts(name, published, out_channels, num_classes):
    # The published classes count their frozen positions of a 32 x 32 latent as a parameter; here it is none.
    positions = (32 // NAMES[name]["patch_size"]) ** 2 * NAMES[name]["hidden_size"]
    ours = num_parameters(name, in_channels=4, out_channels=out_channels, num_classes=num_classes)
    assert ours + positions == published


def test_unconditional_count_differs_by_the_one_row_table():
    # 457.1M: DiT-L/2 of LFM with one class, its label row (1024 numbers) and its positions (256 tokens) counted in.
    assert num_parameters("DiT-L/2", in_channels=4, out_channels=4) + 1024 + 256 * 1024 == 457_062_416


@pytest.mark.parametrize(("hidden_size", "ratio"), [(384, 4.0), (768, 4.0), (1024, 4.0), (1152, 4.0), (256, 3.0)])
def test_swiglu_has_the_parameters_of_gelu(hidden_size, ratio):
    swiglu, gelu = (sum(p.numel() for p in mlp(hidden_size, ratio).parameters()) for mlp in (SwigluMLP, GeluMLP))
    assert abs(swiglu / gelu - 1) < 0.01
    assert SwigluMLP(hidden_size, ratio).down.in_features % 8 == 0


# Initial weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["classic", "modern"])
def test_untrained_output_is_exactly_zero(variant):
    latents, time = inputs()
    assert torch.equal(tiny(variant=variant)(latents, time, NO_LABELS), torch.zeros(3, 4, 8, 8))


def test_initial_weights_follow_the_seed():
    states = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        states.append(tiny(num_classes=3).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["blocks.0.mlp.up.weight"], states[2]["blocks.0.mlp.up.weight"])


def test_initial_scales():
    torch.manual_seed(0)
    network = tiny(hidden_size=256, num_classes=500)
    assert network.label_embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert network.time_embedding.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    # Xavier: uniform with variance 2 / (fan in + fan out)
    assert network.blocks[0].mlp.up.weight.std().item() == pytest.approx((2 / (256 + 1024)) ** 0.5, rel=0.02)
    assert network.patch_embedding.weight.std().item() == pytest.approx((2 / (16 + 256)) ** 0.5, rel=0.02)
    assert not any(bias.any() for name, bias in network.named_parameters() if name.endswith("bias"))


def test_positions_are_not_saved():
    assert not [key for key in tiny().state_dict() if "position" in key]
    assert not list(tiny().buffers())


# What goes in and what comes out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["classic", "modern"])
@pytest.mark.parametrize(("height", "width", "patch_size"), [(8, 8, 2), (4, 12, 2), (6, 10, 2), (8, 4, 4), (3, 5, 1)])
def test_any_size_the_patch_divides(variant, height, width, patch_size):
    network = awake(tiny(variant=variant, patch_size=patch_size, in_channels=5, out_channels=3))
    latents, time = inputs(2, height, width, channels=5)
    velocity = network(latents, time, NO_LABELS)
    assert velocity.shape == (2, 3, height, width)
    # No image sees another one.
    single = network(latents[1:], time[1:], NO_LABELS)
    torch.testing.assert_close(velocity[1:], single, atol=1e-5, rtol=1e-5)


def test_patches_return_to_their_place():
    # While the blocks are closed, a patch of zeros stays zero and every other one answers in its own place.
    network = tiny(position="rope", in_channels=1, out_channels=1)
    latents = torch.zeros(1, 1, 4, 6)
    latents[0, 0, 2:4, 4:6] = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    torch.nn.init.normal_(network.final_linear.weight)
    velocity = network(latents, torch.zeros(1), NO_LABELS)
    assert velocity[0, 0, 2:4, 4:6].abs().min() > 0
    velocity[0, 0, 2:4, 4:6] = 0
    assert not velocity.any()


def test_blocks_know_positions_only_by_rotation():
    block = awake(tiny(variant="modern")).blocks[0]
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 6, 32, generator=generator), torch.randn(2, 32, generator=generator)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(block(x[:, order], c, None), block(x, c, None)[:, order], atol=1e-4, rtol=1e-4)
    rotary = rotary_positions(2, 3, 8)
    assert (block(x[:, order], c, rotary) - block(x, c, rotary)[:, order]).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["classic", "modern"])
def test_positions_are_seen(variant):
    network = awake(tiny(variant=variant))
    latents, time = inputs(1, 4, 8)
    turned = latents.roll(4, dims=3)
    difference = network(turned, time, NO_LABELS).roll(-4, dims=3) - network(latents, time, NO_LABELS)
    assert difference.abs().max() > 1e-3


def test_null_label_is_the_last_row():
    network = awake(tiny(num_classes=5))
    assert network.vectors.null_label == 5
    assert network.label_embedding.weight.shape == (6, 32)
    latents, time = inputs()
    with torch.no_grad():
        before = [network(latents, time, Condition(torch.full((3,), label))) for label in (4, 5)]
        network.label_embedding.weight[5] += 1
        after = [network(latents, time, Condition(torch.full((3,), label))) for label in (4, 5)]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    assert tiny().vectors.null_label is None


@pytest.mark.parametrize(
    ("num_classes", "labels", "message"),
    [
        (0, [1, 0], r"labels \[1, 0\] given to a network without labels"),
        (3, None, r"labels are missing; .* 3 classes .*3 is the null label"),
        (3, [0, 4], r"label 4 is out of range: 0 to 2, or 3 for the null label"),
        (3, [-1, 0], r"label -1 is out of range"),
        (3, [0], r"one label per image, shape \[2\], got \[1\]"),
    ],
)
def test_labels_that_do_not_fit(num_classes, labels, message):
    latents, time = inputs(2)
    condition = Condition(None if labels is None else torch.tensor(labels))
    with pytest.raises(ValueError, match=message):
        tiny(num_classes=num_classes)(latents, time, condition)


@pytest.mark.parametrize(
    ("shape", "time_shape", "message"),
    [
        ((2, 4, 7, 8), (2,), "latents of 7 x 8 do not fit this network: height and width must be multiples of 2"),
        ((2, 3, 8, 8), (2,), r"expected latents \[B, 4, H, W\], got \[2, 3, 8, 8\]"),
        ((2, 4, 8, 8), (), r"one time per image, shape \[2\], got \[\]"),
        ((2, 4, 8, 8), (1,), r"one time per image, shape \[2\], got \[1\]"),
    ],
)
def test_shapes_that_do_not_fit(shape, time_shape, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape), torch.zeros(time_shape), NO_LABELS)


def test_time_scale():
    latents, time = inputs()
    slow, fast = awake(tiny(time_scale=1.0)), awake(tiny())
    torch.testing.assert_close(slow(latents, time * 1000, NO_LABELS), fast(latents, time, NO_LABELS))


def test_time_sinusoid():
    time = torch.tensor([0.0, 0.25, 1000.0], dtype=torch.float64)
    sinusoid = time_sinusoid(time, channels=6)
    frequencies = torch.tensor([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)])
    angles = time.float()[:, None] * frequencies
    assert sinusoid.dtype == torch.float32
    torch.testing.assert_close(sinusoid, torch.cat([angles.cos(), angles.sin()], 1), atol=1e-4, rtol=0)


# Positions -------------------------------------------------------------------------------------------------------


def test_sincos_positions_column_first():
    table = sincos_positions(2, 3, 8)
    row, column = 1, 2
    frequencies = torch.tensor([1.0, 0.01])  # 10000 ** (-i / 2)
    expected = torch.cat([f(p * frequencies) for p in (column, row) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(table[row * 3 + column], expected)


def test_rotary_logits_depend_only_on_the_offset():
    height, width, channels = 5, 7, 16
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(channels, generator=generator).expand(1, 1, height * width, -1) for _ in range(2))
    cosine, sine = rotary_positions(height, width, channels)
    logits = (rotate(query, cosine, sine) @ rotate(key, cosine, sine).mT).reshape(height, width, height, width)
    # The same query and key everywhere: equal offsets, equal logits.
    torch.testing.assert_close(logits[1:, 1:, 1:, 1:], logits[:-1, :-1, :-1, :-1], atol=1e-4, rtol=0)
    row_offset, column_offset = logits[0, 0, 1, 0], logits[0, 0, 0, 1]
    assert (row_offset - column_offset).abs() > 1e-2
    # At the same place the rotation drops out.
    torch.testing.assert_close(logits[3, 4, 3, 4], (query * key).sum(-1)[0, 0, 0], atol=1e-4, rtol=0)


def test_rotation_keeps_lengths():
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x, *rotary_positions(2, 3, 8)).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("variant", ["classic", "modern"])
def test_training_after_sampling_in_inference_mode(variant):
    network = awake(tiny(variant=variant))
    latents, time = inputs(1, 10, 14)  # a grid no other test uses: its table is born in inference mode
    with torch.inference_mode():
        sampled = network(latents, time, NO_LABELS)
    trained = network(latents, time, NO_LABELS)
    trained.square().mean().backward()
    assert torch.equal(sampled, trained.detach())


# Value residual --------------------------------------------------------------------------------------------------


def mixing(first: float, own: float, **options) -> DiT:
    """A network whose blocks mix values with these weights, drawn like one that mixes none."""
    network = tiny(depth=3, value_residual=True, **options)
    plain = awake(tiny(depth=3, **options)).state_dict()
    left = network.load_state_dict(plain, strict=False)
    assert left == ([f"blocks.{number}.attention.value_mix" for number in (1, 2)], [])
    for block in network.blocks[1:]:
        torch.nn.init.constant_(block.attention.value_mix[0], first)
        torch.nn.init.constant_(block.attention.value_mix[1], own)
    return network


@pytest.mark.parametrize("variant", ["classic", "modern"])
def test_own_values_alone_are_a_plain_network(variant):
    latents, time = inputs()
    plain, mixed = awake(tiny(depth=3, variant=variant)), mixing(0.0, 1.0, variant=variant)
    assert torch.equal(mixed(latents, time, NO_LABELS), plain(latents, time, NO_LABELS))
    assert not torch.equal(mixing(0.5, 0.5, variant=variant)(latents, time, NO_LABELS), plain(latents, time, NO_LABELS))


def test_values_of_the_first_block_alone():
    """Later blocks attend to the values of the first with their own queries and keys."""
    latents, time = inputs()
    network = mixing(1.0, 0.0)
    before = network(latents, time, NO_LABELS)
    for part, is_heard in (("values", False), ("keys", True)):
        rows = slice(64, None) if part == "values" else slice(32, 64)
        with torch.no_grad():
            network.blocks[2].attention.qkv.weight[rows] += 1
        assert torch.equal(network(latents, time, NO_LABELS), before) is not is_heard


def test_values_are_mixed_before_attention():
    attention = SelfAttention(8, 2, mixes_values=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        attention.value_mix.copy_(torch.tensor([0.3, -1.7]))
    x, first = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 5, 2, 4, generator=generator)
    found, values = attention.with_values(x, None, first)
    query, key, value = attention.qkv(x).reshape(2, 5, 3, 2, 4).unbind(2)
    mixed = 0.3 * first - 1.7 * value
    torch.testing.assert_close(values, mixed)
    logits = torch.einsum("bnke,bmke->bknm", query, key) / 2
    expected = torch.einsum("bknm,bmke->bnke", logits.softmax(-1), mixed)
    torch.testing.assert_close(found, attention.out(expected.flatten(2)), atol=1e-5, rtol=1e-5)


def test_value_residual_starts_with_the_mean_and_draws_nothing():
    torch.manual_seed(0)
    plain = tiny(depth=3).state_dict()
    torch.manual_seed(0)
    mixed = tiny(depth=3, value_residual=True).state_dict()
    new = mixed.keys() - plain.keys()
    assert new == {f"blocks.{number}.attention.value_mix" for number in (1, 2)}
    assert all(mixed[key].tolist() == [0.5, 0.5] for key in new)
    assert all(torch.equal(mixed[key], plain[key]) for key in plain)


# Ways to run -----------------------------------------------------------------------------------------------------


def gradients(network: DiT) -> list[torch.Tensor]:
    latents, time = inputs()
    network.zero_grad()
    network(latents, time, Condition(torch.tensor([0, 2, 3]))).square().mean().backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("mode", ["recompute-cheap", "checkpoint"])
@OPTIONS
def test_what_is_computed_again_gives_the_same_gradients(options, mode):
    plain, saving = (awake(tiny(**options, num_classes=3)) for _ in range(2))
    set_memory(saving, mode)
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(saving), strict=True))


@OPTIONS
def test_compiled_is_eager(options):
    network = awake(tiny(**{"depth": 1, **options}, num_classes=3))
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for height, width in ((8, 8), (4, 12)):  # the second size makes the graph dynamic
        latents, time = inputs(3, height, width)
        condition = Condition(torch.tensor([0, 2, 3]))
        with torch.no_grad():
            expected = network(latents, time, condition)
            torch.testing.assert_close(compiled(latents, time, condition), expected, atol=1e-5, rtol=1e-5)


@OPTIONS
def test_autocast_is_near_float32(options):
    network = awake(tiny(**options, num_classes=3))
    latents, time = inputs()
    condition = Condition(torch.tensor([0, 2, 3]))
    exact = network(latents, time, condition)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(latents, time, condition)
    assert rough.dtype == torch.float32
    error = (rough - exact).norm() / exact.norm()
    assert 0 < error < 0.02
    rough.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@OPTIONS
def test_other_dtypes(options, dtype):
    network = awake(tiny(**options)).to(dtype)
    latents, time = inputs()
    assert network(latents.to(dtype), time.double(), NO_LABELS).dtype == dtype


@OPTIONS
def test_learns_a_fixed_batch(options):
    torch.manual_seed(0)
    network = tiny(**options, num_classes=3)
    latents, time = inputs(8)
    target, _ = inputs(8, seed=1)
    condition = Condition(torch.arange(8) % 4)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (network(latents, time, condition) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(target.square().mean().item())  # an untrained network returns zero
    assert losses[-1] < 0.5 * losses[0]


# Config ----------------------------------------------------------------------------------------------------------


def test_name_fills_what_is_not_given():
    config = DiTConfig(name="DiT-S/4", depth=3)
    assert (config.depth, config.hidden_size, config.num_heads, config.patch_size) == (3, 384, 6, 4)
    assert (config.position, config.mlp, config.norm, config.qk_norm) == ("sincos", "gelu", "layernorm", False)


def test_options_of_earlier_versions_are_passed_over():
    assert DiTConfig(**TINY, gradient_checkpointing=True) == DiTConfig(**TINY)
    assert "gradient_checkpointing" not in DiTConfig(**TINY).model_dump()


def test_modern_sets_all_four_and_explicit_values_win():
    config = DiTConfig(**TINY, variant="modern")
    assert (config.position, config.mlp, config.norm, config.qk_norm) == ("rope", "swiglu", "rmsnorm", True)
    config = DiTConfig(**TINY, variant="modern", mlp="gelu", qk_norm=False)
    assert (config.position, config.mlp, config.norm, config.qk_norm) == ("rope", "gelu", "rmsnorm", False)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "DiT-S/8"},
        {"name": "DiT-S/8", "variant": "modern", "depth": 2},
        {**TINY, "variant": "modern", "position": "sincos", "time_scale": 1.0},
    ],
)
def test_resolved_config_reloads(options):
    config = DiTConfig(**options)
    assert DiTConfig(**config.model_dump()) == config
    assert DiTConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "DiT-B2"}, r"unknown network name 'DiT-B2': did you mean 'DiT-B/2'\?"),
        ({"dept": 3}, "unknown network option 'dept': did you mean 'depth'"),
        ({**TINY, "variant": "moderm"}, "unknown network variant 'moderm': did you mean 'modern'"),
        ({}, "network without depth, hidden_size, num_heads, patch_size: give them, or a name"),
        ({"depth": 2, "hidden_size": 32, "patch_size": 2}, "network without num_heads"),
        ({**TINY, "num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({**TINY, "hidden_size": 30, "num_heads": 3}, "position 'sincos' needs a hidden_size divisible by 4, got 30"),
        ({**TINY, "num_heads": 16, "position": "rope"}, r"divisible by 4, got 32 / 16 = 2"),
        ({**TINY, "depth": 1, "value_residual": True}, "depth is 1; use a depth of 2 or more, or value_residual=false"),
    ],
)
def test_configs_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        DiTConfig(**options)


def test_configs_of_earlier_versions_have_no_value_residual():
    old = {key: value for key, value in DiTConfig(**TINY).model_dump().items() if key != "value_residual"}
    assert DiTConfig(**old) == DiTConfig(**TINY)
    assert not DiTConfig(**old).value_residual


def test_values_out_of_range_are_refused():
    with pytest.raises(ValidationError, match="'sincos' or 'rope'"):
        DiTConfig(**TINY, position="roope")
    with pytest.raises(ValidationError, match="greater than 0"):
        DiTConfig(**{**TINY, "depth": 0})
    with pytest.raises(ValidationError, match="frozen"):
        DiTConfig(**TINY).depth = 3
