"""The U-Net: where things are, what options change, ways to run, messages."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from latentflow.errors import ConfigError
from latentflow.networks.base import VectorInputs
from latentflow.networks.layers import time_sinusoid
from latentflow.networks.running import set_memory
from latentflow.networks.unet import VARIANTS, Embedding, UNet, UNetConfig
from latentflow.networks.unet_blocks import Downsample, MapAttention, ResidualBlock, Upsample
from latentflow.shapes import Condition
from tests import tiny

TINY = {"channels": 8, "multipliers": (1, 2), "blocks_per_level": 1, "attention_factors": (2,), "norm_groups": 4}
OF_VARIANT = {"adm": {}, "dhariwal": {"head_channels": 8}, "ddpm++": {}, "ncsn++": {}}
EVERY_VARIANT = pytest.mark.parametrize("variant", OF_VARIANT)
LABELS = Condition(torch.tensor([0, 2, 3]))
NO_LABELS = Condition()


def config(variant: str = "adm", **options) -> UNetConfig:
    return UNetConfig(**{**TINY, "variant": variant, **OF_VARIANT[variant], **options})


def unet(variant: str = "adm", *, channels_in: int = 4, seed: int = 0, asleep: bool = False, **options) -> UNet:
    """A tiny network; unless `asleep`, what starts as zero is drawn at random too."""
    facts = {name: options.pop(name) for name in ("num_classes", "inpainting", "num_map_classes") if name in options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNet(config(variant, **options), in_channels=channels_in, out_channels=4, **facts)
        with torch.no_grad():
            for parameter in network.parameters():
                if not asleep and not parameter.any():
                    fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
                    parameter.normal_(std=fan_in**-0.5)
    return network


def inputs(batch: int = 3, height: int = 8, width: int = 8, channels: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator), torch.rand(batch, generator=generator)


def every(network: nn.Module, kind: type) -> list:
    return [module for module in network.modules() if isinstance(module, kind)]


# A published size ------------------------------------------------------------------------------------------------


def test_a_published_network_computes_every_gradient():
    with torch.device("meta"):
        sizes = UNetConfig(channels=256, multipliers=[1, 2, 2, 2], attention_factors=[8])
        network = UNet(sizes, in_channels=4, out_channels=4)
    network = tiny.randomise(network.to_empty(device="cpu"))
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == 153.1
    latents, time = inputs(1, 32, 32)
    velocity = network(latents, time, NO_LABELS)
    assert velocity.shape == (1, 4, 32, 32)
    velocity.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# Initial weights -------------------------------------------------------------------------------------------------


@EVERY_VARIANT
def test_untrained_output_is_exactly_zero(variant):
    latents, time = inputs()
    network = unet(variant, num_classes=3, asleep=True)
    assert torch.equal(network(latents, time, LABELS), torch.zeros(3, 4, 8, 8))
    with torch.no_grad():
        awake = unet(variant, num_classes=3)
        assert awake(latents, time, LABELS).std() > 0.01
        awake.reset_parameters()
        assert torch.equal(awake(latents, time, LABELS), torch.zeros(3, 4, 8, 8))


@EVERY_VARIANT
def test_initial_weights_follow_the_seed(variant):
    states = [unet(variant, num_classes=3, num_map_classes=2, asleep=True, seed=s).state_dict() for s in (7, 7, 8)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    drawn = ["stem.weight", "embedding.label.weight", "spatial.map_encoder.mix.weight"]
    drawn += ["embedding.frequencies"] if variant == "ncsn++" else []
    assert not any(torch.equal(states[0][key], states[2][key]) for key in drawn)


@pytest.mark.parametrize("variant", ["adm", "ddpm++"])
def test_every_block_starts_as_its_skip(variant):
    network = unet(variant, asleep=True)
    x, c = torch.randn(2, 16, 4, 4), torch.randn(2, 32)
    gain = VARIANTS[variant]["residual_scale"]
    for block, times in zip(network.middle, (2, 1), strict=True):  # the first has an attention, which scales too
        torch.testing.assert_close(block(x, c), x * gain**times)
    assert network.embedding.label is None


# Where things are ------------------------------------------------------------------------------------------------


def attending(network: UNet) -> tuple[list, list, list]:
    """Levels and blocks that attend on the way down, in the middle and on the way up; level 0 has full size."""
    levels = len(network.encoder)
    down = [(level, i) for level, s in enumerate(network.encoder) for i, b in enumerate(s.blocks) if b.attention]
    middle = [i for i, block in enumerate(network.middle) if block.attention]
    up = [(levels - 1 - n, i) for n, s in enumerate(network.decoder) for i, b in enumerate(s.blocks) if b.attention]
    return down, middle, up


THREE = {"multipliers": (1, 2, 2), "blocks_per_level": 2}


@pytest.mark.parametrize(
    ("options", "down", "middle", "up"),
    [
        ({"attention_factors": ()}, [], [0], []),
        ({"attention_factors": (4,)}, [(2, 0), (2, 1)], [0], [(2, 0), (2, 1), (2, 2)]),
        ({"attention_factors": (1,), "middle_attention": False}, [(0, 0), (0, 1)], [], [(0, 0), (0, 1), (0, 2)]),
        ({"attention_factors": (2,), "decoder_attention": "last"}, [(1, 0), (1, 1)], [0], [(1, 2)]),
        (
            {"attention_factors": (4, 1), "decoder_attention": "last"},
            [(0, 0), (0, 1), (2, 0), (2, 1)],
            [0],
            [(2, 2), (0, 2)],
        ),
        (
            {"attention_factors": None, "attention_sizes": (8,), "latent_size": 16},
            [(1, 0), (1, 1)],
            [0],
            [(1, 0), (1, 1), (1, 2)],
        ),
    ],
)
def test_where_blocks_attend(options, down, middle, up):
    network = unet(**{**THREE, **options}, asleep=True)
    assert attending(network) == (down, middle, up)
    assert len(every(network, MapAttention)) == len(down + middle + up)


def test_sizes_are_those_of_the_latents():
    # The published "16 8 4" of 32 x 32 latents with four levels: everywhere but at full size.
    sizes = {"channels": 64, "multipliers": [1, 2, 3, 4], "variant": "dhariwal"}
    assert UNetConfig(**sizes, attention_sizes=[16, 8, 4], latent_size=32).attention_factors == (2, 4, 8)


def test_heads():
    by_number = unet(num_heads=2, num_decoder_heads=4, attention_factors=(1, 2))
    by_channels = unet("dhariwal", head_channels=4, attention_factors=(1, 2))
    heads = [[m.attention.num_heads for m in every(part, MapAttention)] for part in (by_number, by_channels)]
    assert heads == [[2, 2, 2, 4, 4, 4, 4], [2, 4, 4, 4, 4, 2, 2]]  # levels 0 1, middle, levels 1 1 0 0
    assert unet(num_heads=2).middle[0].attention.attention.num_heads == 2


@EVERY_VARIANT
def test_norms(variant):
    network = unet(variant, channels=16, norm_groups=16)
    least = VARIANTS[variant]["norm_group_channels"]
    norms = every(network, nn.GroupNorm)
    assert {(n.num_channels, n.num_groups) for n in norms} >= {(16, 16 // least), (32, min(16, 32 // least))}
    assert {n.eps for n in norms} == {VARIANTS[variant]["norm_eps"]}
    assert {n.eps for n in every(unet(variant, norm_eps=0.25), nn.GroupNorm)} == {0.25}


@pytest.mark.parametrize(
    ("options", "kinds", "learned"),
    [
        ({"resample": "conv"}, {Downsample, Upsample}, True),
        ({"resample": "plain"}, {Downsample, Upsample}, False),
        ({"resample": "block"}, {ResidualBlock}, None),
    ],
)
def test_what_changes_the_size(options, kinds, learned):
    network = unet(**THREE, attention_factors=(), **options)
    assert [stage.resize is None for stage in (*network.encoder, *network.decoder)] == [True, *[False] * 4, True]
    found = [stage.resize for stage in (*network.encoder, *network.decoder) if stage.resize is not None]
    assert {type(module) for module in found} == kinds
    if learned is None:
        assert [module.resize for module in found] == ["halve", "halve", "double", "double"]
    else:
        assert all((module.conv is not None) == learned for module in found)
    seen = []
    network.middle[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[2:]))
    assert network(*inputs(1, 8, 12), NO_LABELS).shape == (1, 4, 8, 12)
    assert seen == [(2, 3)]


@pytest.mark.parametrize("skip_conv", [False, True])
def test_resampling_blocks(skip_conv):
    network = unet(resample="block", resample_filter="binomial", resample_skip_conv=skip_conv)
    blocks = every(network, ResidualBlock)
    assert {
        (b.resize is not None, b.skip is not None) for b in blocks if b.norm1.num_channels == b.norm2.num_channels
    } == {
        (False, False),
        (True, skip_conv),
    }
    assert {b.resample_filter for b in blocks} == {"binomial"}


def test_residual_scale_and_modulation_reach_every_block():
    network = unet(residual_scale=0.7, modulation="shift", resample="block")
    assert {m.residual_scale for m in network.modules() if isinstance(m, ResidualBlock | MapAttention)} == {0.7}
    assert not any(block.scales for block in every(network, ResidualBlock))
    assert all(block.scales for block in every(unet(resample="block"), ResidualBlock))


def test_stem_channels():
    assert unet().stem.out_channels == unet().config.stem_channels == 8
    assert unet(multipliers=(2, 2)).stem.out_channels == 16
    network = unet(stem_channels=12, norm_groups=4)
    assert network.stem.out_channels == 12
    assert network.encoder[0].blocks[0].norm1.num_channels == 12
    assert network.decoder[-1].blocks[-1].norm1.num_channels == 8 + 12  # it meets the stem again
    assert network(*inputs(), NO_LABELS).shape == (3, 4, 8, 8)


def test_the_input_on_every_level():
    network = unet(**THREE, input_on_every_level=True, inpainting=True)
    branches = [stage.input_branch for stage in network.encoder]
    assert branches[0] is None
    assert [(b.conv.in_channels, b.conv.out_channels) for b in branches[1:]] == [(9, 8), (8, 16)]
    assert not any(stage.input_branch for stage in unet(**THREE).encoder)


@pytest.mark.parametrize("joined", [False, True])
def test_the_input_reaches_the_lower_level_past_the_first(joined):
    # With a zero first convolution, the latents enter only through the branch.
    network = unet(input_on_every_level=joined)
    nn.init.zeros_(network.stem.weight)
    one, other = (network(inputs(seed=seed)[0], torch.zeros(3), NO_LABELS) for seed in (0, 1))
    assert torch.equal(one, other) != joined


# Time and labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joins", ["features", "embedding"])
@pytest.mark.parametrize("features", ["sinusoid", "endpoint", "fourier"])
def test_the_embedding_is_its_equation(joins, features):
    fourier = features == "fourier"
    options = {"time_features": "fourier"} if fourier else {"sinusoid_endpoint": features == "endpoint"}
    made = config(**options, label_joins=joins, time_scale=3.0)
    torch.manual_seed(0)
    embedding = Embedding(made, VectorInputs(num_classes=3))
    time, labels = torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0, 3, 2])
    size = 16 if fourier else 8
    if fourier:
        angles = 2 * math.pi * embedding.frequencies * (3 * time)[:, None]
        assert embedding.frequencies.shape == (8,)
    else:
        longest = 10_000 ** (1 if features == "endpoint" else 3 / 4)
        angles = torch.tensor([1, longest ** (-1 / 3), longest ** (-2 / 3), 1 / longest]) * (3 * time)[:, None]
    x = torch.cat([angles.cos(), angles.sin()], 1)
    assert made.time_channels == size and embedding.label.weight.shape == (4, size if joins == "features" else 32)
    said = embedding.label.weight[labels]
    x = x + said if joins == "features" else x
    x = embedding.linear2(nn.functional.silu(embedding.linear1(x)))
    x = x if joins == "features" else x + said
    torch.testing.assert_close(embedding(time, Condition(labels=labels)), nn.functional.silu(x), atol=1e-5, rtol=1e-5)


def test_the_endpoint_is_the_longest_period():
    time = torch.tensor([10_000.0])
    assert time_sinusoid(time, 6, endpoint=True)[0, 2].item() == pytest.approx(math.cos(1), abs=1e-3)
    assert time_sinusoid(time, 6)[0, 2].item() == pytest.approx(math.cos(10_000 ** (1 / 3)), abs=1e-3)


def test_fourier_frequencies_are_saved_and_restored():
    network, other = unet("ncsn++"), unet("ncsn++", seed=1)
    assert "embedding.frequencies" in network.state_dict()
    assert not any(parameter is network.embedding.frequencies for parameter in network.parameters())
    latents, time = inputs()
    assert not torch.equal(network(latents, time, NO_LABELS), other(latents, time, NO_LABELS))
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(latents, time, NO_LABELS), other(latents, time, NO_LABELS))
    torch.manual_seed(0)
    spread = (
        Embedding(UNetConfig(channels=2048, multipliers=[1], variant="ncsn++"), VectorInputs()).frequencies.std().item()
    )
    assert spread == pytest.approx(16, rel=0.05)


@EVERY_VARIANT
def test_neighbouring_times_have_neighbouring_features(variant):
    """A thousandth of the way is a small step of any trained field; features that turn meanwhile teach it noise."""
    torch.manual_seed(0)
    made = UNetConfig(channels=256, multipliers=[1], variant=variant)
    embedding, features = Embedding(made, VectorInputs()), []
    embedding.linear1.register_forward_pre_hook(lambda _, arguments: features.append(arguments[0]))
    time = torch.linspace(0, 0.9, 10)
    for at in (time, time + 0.001, time + 0.1):
        embedding(at, Condition())
    alike = [nn.functional.cosine_similarity(features[0], other).mean().item() for other in features[1:]]
    assert alike[0] > 0.9
    assert alike[1] < 0.9


@EVERY_VARIANT
def test_time_is_seen_and_scaled(variant):
    latents, _ = inputs()
    time = torch.tensor([0.1, 0.4, 0.9])
    slow, fast = unet(variant, time_scale=1.0), unet(variant, time_scale=4.0)
    torch.testing.assert_close(slow(latents, time * 4, NO_LABELS), fast(latents, time, NO_LABELS))
    assert (slow(latents, time, NO_LABELS) - fast(latents, time, NO_LABELS)).abs().max() > 1e-3


@EVERY_VARIANT
def test_null_label_is_the_last_row(variant):
    network = unet(variant, num_classes=5).requires_grad_(False)
    assert network.vectors.null_label == 5 and unet(variant).vectors.null_label is None
    assert len(network.embedding.label.weight) == 6
    latents, time = inputs()
    before = [network(latents, time, Condition(torch.full((3,), label))) for label in (4, 5)]
    network.embedding.label.weight[5] += 1
    after = [network(latents, time, Condition(torch.full((3,), label))) for label in (4, 5)]
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-3


# What goes in and what comes out ---------------------------------------------------------------------------------


@EVERY_VARIANT
@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 12), (12, 8)])
def test_any_multiple_and_no_image_sees_another(variant, height, width):
    network = unet(variant, multipliers=(1, 2, 2), attention_factors=(2, 4), num_classes=3, channels_in=5)
    assert network.config.size_multiple == 4
    latents, time = inputs(3, height, width, channels=5)
    velocity = network(latents, time, LABELS)
    assert velocity.shape == (3, 4, height, width)
    single = network(latents[1:2], time[1:2], Condition(LABELS.labels[1:2]))
    torch.testing.assert_close(velocity[1:2], single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((3, 4, 6, 8), [0, 1, 2], "latents of 6 x 8 do not fit this network: height and width must be multiples of 4"),
        ((3, 4, 8, 10), [0, 1, 2], "latents of 8 x 10 do not fit this network"),
        ((3, 9, 8, 8), [0, 1, 2], r"expected latents \[B, 4, H, W\], got \[3, 9, 8, 8\]"),
        ((3, 4, 8, 8), None, "labels are missing"),
        ((3, 4, 8, 8), [0, 1, 4], "label 4 is out of range"),
    ],
)
def test_inputs_that_do_not_fit(shape, labels, message):
    network = unet(multipliers=(1, 1, 2), num_classes=3)
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(shape), torch.zeros(3), Condition(None if labels is None else torch.tensor(labels)))


@pytest.mark.parametrize("variant", ["adm", "ncsn++"])
@pytest.mark.parametrize("field", ["masked_latents", "mask", "class_fractions"])
def test_every_spatial_field_has_a_say_and_only_in_its_own_image(variant, field):
    network = unet(variant, inpainting=True, num_map_classes=3).requires_grad_(False)
    assert network.stem.in_channels == 4 + 5 + 4
    latents, time = inputs(2)
    channels = {"masked_latents": 4, "mask": 1, "class_fractions": 3}
    fields = {name: inputs(2, channels=count, seed=5)[0].sigmoid() for name, count in channels.items()}
    one = network(latents, time, Condition(**fields))
    fields[field] = torch.stack([fields[field][0], 1 - fields[field][1]])
    changed = network(latents, time, Condition(**fields))
    torch.testing.assert_close(one[0], changed[0], rtol=0, atol=1e-6)
    assert (one[1] - changed[1]).abs().max() > 1e-3
    del fields[field]
    with pytest.raises(ValueError, match=rf"condition\.{field}: this network wants"):
        network(latents, time, Condition(**fields))


# Ways to run -----------------------------------------------------------------------------------------------------


def gradients(network: UNet) -> list[torch.Tensor]:
    latents, time = inputs()
    torch.manual_seed(0)
    network(latents, time, LABELS).square().mean().backward()
    return [parameter.grad for parameter in network.parameters()]


@EVERY_VARIANT
@pytest.mark.parametrize("mode", ["recompute-cheap", "checkpoint"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_computed_again_gives_the_same_gradients(variant, dropout, mode):
    plain, saving = (unet(variant, num_classes=3, dropout=dropout) for _ in range(2))
    set_memory(saving, mode)
    calls = []
    saving.middle[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(saving), strict=True))
    assert len(calls) == 2  # forward, and again on the way back
    with torch.no_grad():
        saving(*inputs(), LABELS)
    assert len(calls) == 3


def test_dropout_only_in_training():
    plain, dropping = unet(), unet(dropout=0.3)
    assert {module.p for module in every(dropping, nn.Dropout)} == {0.3}
    latents, time = inputs()
    torch.manual_seed(0)
    one, other = (dropping(latents, time, NO_LABELS) for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(dropping.eval()(latents, time, NO_LABELS), plain(latents, time, NO_LABELS))


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [("adm", [(8, 4)]), ("ncsn++", [(8, 8), (4, 12)])],  # the second size makes the graph dynamic
)
def test_compiled_is_eager(variant, sizes):
    torch.compiler.reset()  # what was compiled before would make this graph dynamic all over, which takes long
    network = unet(variant, num_classes=3, multipliers=(1, 1), attention_factors=())
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for height, width in sizes:
        latents, time = inputs(3, height, width)
        with torch.no_grad():
            expected = network(latents, time, LABELS)
            torch.testing.assert_close(compiled(latents, time, LABELS), expected, atol=1e-5, rtol=1e-5)


@EVERY_VARIANT
def test_autocast_is_near_float32(variant):
    network = unet(variant, num_classes=3)
    latents, time = inputs()
    exact = network(latents, time, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(latents, time, LABELS)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 0.02
    rough.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@EVERY_VARIANT
def test_float64(variant):
    network, latents, time = unet(variant, time_scale=1.0), *inputs()
    narrow = network(latents, time, NO_LABELS)
    wide = network.double()(latents.double(), time.double(), NO_LABELS)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(narrow, wide.float(), atol=1e-4, rtol=1e-4)


@EVERY_VARIANT
def test_channels_last_is_contiguous(variant):
    network, (latents, time) = unet(variant).double(), inputs()
    latents = latents.double()
    expected = network(latents, time, NO_LABELS)
    turned = latents.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(turned, time, NO_LABELS), expected, rtol=0, atol=1e-12)
    network = network.to(memory_format=torch.channels_last)
    assert network.stem.weight.is_contiguous(memory_format=torch.channels_last)
    for given in (latents, turned):
        torch.testing.assert_close(network(given, time, NO_LABELS), expected, rtol=0, atol=1e-12)


@EVERY_VARIANT
def test_learns_a_fixed_batch(variant):
    network = unet(variant, num_classes=3, asleep=True)
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
    assert losses[-1] < 0.7 * losses[0]


# Config ----------------------------------------------------------------------------------------------------------


@EVERY_VARIANT
def test_a_variant_is_the_default_of_its_options(variant):
    made = UNetConfig(channels=64, multipliers=[1, 2], variant=variant)
    assert {key: getattr(made, key) for key in VARIANTS[variant]} == VARIANTS[variant]
    assert made.title == f"U-Net ({variant}) of 64 x 1, 2 channels"
    changed = UNetConfig(
        channels=64, multipliers=[1, 2], variant=variant, modulation="shift", norm_eps=0.5, num_heads=2
    )
    assert (changed.modulation, changed.norm_eps, changed.num_heads, changed.head_channels) == ("shift", 0.5, 2, None)


@EVERY_VARIANT
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_factors": None, "attention_sizes": [16], "latent_size": 32, "head_channels": 8, "num_heads": None},
        {"head_channels": None, "num_heads": 2, "num_decoder_heads": 4, "time_scale": 1.0, "stem_channels": 12},
        {"dropout": 0.1, "middle_attention": False, "time_channels": 6},
    ],
)
def test_resolved_config_reloads(variant, options):
    made = config(variant, **options)
    assert UNetConfig(**made.model_dump()) == made
    assert UNetConfig(**made.model_dump(mode="json")) == made
    assert UNetConfig.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multipler": 3}, "unknown network option 'multipler': did you mean 'multipliers'"),
        ({"patch_size": 2}, "unknown network option 'patch_size'"),
        ({"variant": "dariwal"}, "unknown network variant 'dariwal': did you mean 'dhariwal'"),
        ({"variant": ["adm"]}, "unknown network variant"),
        ({"channels": None}, "network without channels: give them, for example channels: 256"),
        ({"channels": None, "multipliers": None}, "network without channels, multipliers"),
        ({"attention_factors": [4]}, r"no level is smaller by 4; the 2 levels of multipliers \[1, 2\] are .* by 1, 2"),
        ({"attention_factors": [-1]}, "no level is smaller by -1"),
        ({"num_heads": 3}, "16 channels cannot be shared by 3 attention heads"),
        ({"num_decoder_heads": 3}, "16 channels cannot be shared by 3 attention heads"),
        ({"attention_factors": [1], "num_heads": 16}, "8 channels cannot be shared by 16 attention heads"),
        (
            {"head_channels": 32},
            r"16 channels cannot be shared by 0 attention heads \(num_heads None, head_channels 32",
        ),
        ({"num_heads": 4, "head_channels": 8}, "network.num_heads = 4 and network.head_channels = 8: give one"),
        ({"attention_sizes": [16], "latent_size": 32}, "go together, in place of network.attention_factors"),
    ],
)
def test_configs_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        UNetConfig(**{**TINY, **options})


def test_heads_of_levels_that_do_not_attend_are_no_matter():
    assert UNetConfig(channels=8, multipliers=[1, 3], num_heads=6).heads(24) == 6
    with pytest.raises(ConfigError, match="9 attention heads"):
        UNetConfig(channels=8, multipliers=[1, 3], num_heads=9)
    assert not attending(unet(multipliers=(1, 3), num_heads=9, middle_attention=False, attention_factors=()))[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_sizes": [16]}, "network.attention_sizes and network.latent_size go together"),
        ({"latent_size": 32}, "network.attention_sizes and network.latent_size go together"),
        ({"attention_sizes": [5], "latent_size": 32}, "no level of latents of 32 x 32 has the size 5"),
        ({"attention_sizes": [64], "latent_size": 32}, "no level of latents of 32 x 32 has the size 64"),
        ({"attention_sizes": [8], "latent_size": 32}, "no level is smaller by 4"),
        ({"attention_sizes": [0], "latent_size": 32}, "has the size 0"),
        ({"attention_sizes": [-16], "latent_size": 32}, "has the size -16"),
        ({"attention_sizes": [None], "latent_size": 32}, "has the size None"),
        ({"attention_sizes": [1.5], "latent_size": 32}, "has the size 1.5"),
        ({"attention_sizes": "16", "latent_size": 32}, "attention_sizes"),
        ({"attention_sizes": 16, "latent_size": 32}, "attention_sizes"),
        ({"attention_sizes": 1.5, "latent_size": 32}, "attention_sizes"),
        ({"attention_sizes": [16], "latent_size": "32"}, "attention_sizes"),
        ({"attention_sizes": [16], "latent_size": 0}, "attention"),
    ],
)
def test_attention_sizes_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        UNetConfig(channels=32, multipliers=[1, 2], **options)


WRONG = ["x", 1.5, [], {}, -1, float("nan"), [None], ["a"], [1.5], [-1], [0], object()]


@pytest.mark.parametrize("key", [*UNetConfig.model_fields, "attention_sizes", "latent_size"])
def test_wrong_values_are_refused_in_words(key):
    """Every value is either taken, and the network can be built, or refused with an error meant for people."""
    refused = 0
    for value in WRONG:
        try:
            made = UNetConfig(**{**TINY, key: value})
        except (ConfigError, ValidationError):
            refused += 1
            continue
        network = UNet(made, in_channels=4, out_channels=4)
        assert network(*inputs(1), NO_LABELS).isfinite().all(), (key, value)
    assert refused >= len(WRONG) - 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 9, "num_heads": 1, "norm_groups": 1}, "time_channels|multiple of 2"),
        ({"time_channels": 7}, "multiple of 2"),
        ({"multipliers": (1, 0)}, "multipliers|greater than 0"),
        ({"multipliers": ()}, "at least 1 item"),
        ({"dropout": 1.0}, "less than 1"),
        ({"residual_scale": 1.5}, "less than or equal to 1"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises((ConfigError, ValidationError), match=message):
        UNetConfig(**{**TINY, **options})


def test_two_time_features_with_an_endpoint_are_numbers():
    """Of one frequency the series has no last one: either refused, or it is 1."""
    try:
        network = unet("ddpm++", time_channels=2)
    except (ConfigError, ValidationError):
        return
    assert network(*inputs(), NO_LABELS).isfinite().all()


def test_a_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        config().channels = 3
