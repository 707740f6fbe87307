"""Our networks as classes of diffusers: the class, its arguments, and where each of our weights goes.

Only identical functions are mapped: to `UNet2DModel` the U-Nets that it can express, to `DiTTransformer2DModel` the
transformers whose time features it can reproduce. Everything else is refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from latentflow.convert.keymap import Constant, KeyMap, Rule
from latentflow.convert.rules import layer
from latentflow.errors import ArtifactError
from latentflow.model.config import ModelConfig
from latentflow.networks.dit import DiTConfig
from latentflow.networks.layers import NORM_EPS
from latentflow.networks.unet import UNet, UNetConfig
from latentflow.networks.unet_blocks import MapAttention, ResidualBlock
from latentflow.weights import without_memory

TIME_CHANNELS = 256
"""Time features of a transformer, in both libraries."""

_TIME_TOLERANCE = 1e-6  # of features in [-1, 1]; float32 rounds them by 1e-7


@dataclass(frozen=True)
class DiffusersNetwork:
    """A velocity network in diffusers.

    Attributes:
        class_name: name of the class.
        folder: subfolder that diffusers' pipelines use for such a network.
        keys: where our weights go.
        arguments: of the class.
        any_size: whether it computes the same for latents of every size; False: only for the size in `arguments`.
    """

    class_name: str
    folder: str
    keys: KeyMap
    arguments: dict[str, Any] = field(default_factory=dict)
    any_size: bool = True


def diffusers_network(config: ModelConfig) -> DiffusersNetwork:
    """The class of diffusers that computes the same velocity as the network of a model.

    Raises:
        ArtifactError: there is none; the message says why.
    """
    network, conditioning = config.network, config.conditioning
    _refuse((not isinstance(network, DiTConfig | UNetConfig), f"its network is one's own, a {network.title}"))
    _refuse(
        (config.student is not None, "it is a student, and diffusers' networks take no end time; export its teacher"),
        (config.prediction.kind != "velocity", f"its network predicts {config.prediction.kind}, not the velocity"),
        (
            config.path.kind != "linear",
            f"its path is {config.path.kind}; FlowMatchEulerDiscreteScheduler only knows the linear path",
        ),
        (
            conditioning.num_map_classes > 0,
            "it is conditioned on semantic maps, and diffusers' networks have no encoder of maps",
        ),
        (
            bool(conditioning.columns),
            "it has named conditions, and diffusers' networks have no embedding of them",
        ),
        (
            conditioning.constant_embedding,
            "its finetuning left a learned vector in place of labels, which diffusers' networks do not have; use "
            "--format pipeline or onnx",
        ),
        (
            conditioning.input_channels > 0,
            "it is conditioned on paired images, and diffusers' pipelines have no input for them",
        ),
        (
            not float(network.time_scale).is_integer(),
            f"its time_scale is {network.time_scale:g}; FlowMatchEulerDiscreteScheduler needs a whole number",
        ),
    )
    channels = config.autoencoder.num_channels
    arguments = {
        "sample_size": config.latent_shape[-1],
        "in_channels": 2 * channels + 1 if conditioning.inpainting else channels,
        "out_channels": channels,
    }
    if isinstance(network, UNetConfig):
        return _unet(config, network, arguments)
    return _transformer(config, network, arguments)


def _refuse(*reasons: tuple[bool, str]) -> None:
    for applies, reason in reasons:
        if applies:
            raise ArtifactError(f"this model cannot be exported to diffusers: {reason}")


# UNet2DModel


def _unet(config: ModelConfig, network: UNetConfig, arguments: dict[str, Any]) -> DiffusersNetwork:
    _require_unet2d(network, config.conditioning.num_classes)
    with without_memory():
        built = config.build_network()
    num_groups, head_channels = _groups_and_head_channels(built)
    num_classes = config.conditioning.num_classes
    by_block = network.resample == "block"
    plain = {"down": "ResnetDownsampleBlock2D", "up": "ResnetUpsampleBlock2D"}
    if not by_block:
        plain = {"down": "DownBlock2D", "up": "UpBlock2D"}
    attends = [2**level in network.attention_factors for level in range(len(network.multipliers))]
    arguments = arguments | {
        "block_out_channels": [network.channels * multiplier for multiplier in network.multipliers],
        "down_block_types": ["AttnDownBlock2D" if attending else plain["down"] for attending in attends],
        "up_block_types": ["AttnUpBlock2D" if attending else plain["up"] for attending in reversed(attends)],
        "layers_per_block": network.blocks_per_level,
        "downsample_type": "resnet" if by_block else "conv",
        "upsample_type": "resnet" if by_block else "conv",
        "downsample_padding": 1,
        "add_attention": network.middle_attention,
        "attention_head_dim": head_channels,
        "norm_num_groups": num_groups,
        "attn_norm_num_groups": num_groups,  # of the middle, which otherwise would have no norm
        "norm_eps": network.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if network.modulation == "scale_shift" else "default",
        "time_embedding_type": "positional",
        "flip_sin_to_cos": True,  # cosines first
        "freq_shift": 1 if network.sinusoid_endpoint else 0,
        "num_class_embeds": num_classes + 1 if num_classes else None,
        "dropout": network.dropout,
    }
    return DiffusersNetwork("UNet2DModel", "unet", KeyMap(_unet_rules(built)), arguments)


def _require_unet2d(network: UNetConfig, num_classes: int) -> None:
    """Refuse options that UNet2DModel does not have."""
    first = network.channels * network.multipliers[0]
    attends = any(2**level in network.attention_factors for level in range(len(network.multipliers)))
    _refuse(
        (network.time_features != "sinusoid", "its time features are Fourier's, which UNet2DModel scales differently"),
        (network.input_on_every_level, "its input enters on every level, which no block of UNet2DModel does"),
        (network.residual_scale != 1, f"its sums are scaled by {network.residual_scale:.4g}, in UNet2DModel by 1"),
        (
            network.label_joins != "embedding" and num_classes > 0,
            "its labels are added to the time features, in UNet2DModel to their embedding",
        ),
        (network.resample == "plain", "it changes sizes without a convolution, which UNet2DModel cannot do"),
        (
            network.resample == "block" and (network.resample_filter != "box" or network.resample_skip_conv),
            "its blocks that change sizes have filters or convolutions on the skip, those of UNet2DModel do not",
        ),
        (
            network.decoder_attention != "every" and attends,
            "only the last blocks of its levels attend on the way up, in UNet2DModel all do",
        ),
        (
            not first == network.stem_channels == network.time_channels == network.embedding_channels // 4,
            f"its first level has {first} channels, its first convolution {network.stem_channels}, its time "
            f"{network.time_channels} and a quarter of its embedding {network.embedding_channels // 4}; "
            "in UNet2DModel these four are one number",
        ),
    )


def _groups_and_head_channels(network: UNet) -> tuple[int, int | None]:
    """The groups of every norm, and the channels of every attention head; None: every attention has one head."""
    groups = {module.num_groups for module in network.modules() if isinstance(module, torch.nn.GroupNorm)}
    heads = {(m.norm.num_channels, m.attention.num_heads) for m in network.modules() if isinstance(m, MapAttention)}
    head_channels = {channels // count for channels, count in heads}
    _refuse(
        (len(groups) > 1, f"its norms have {_listed(groups)} groups, those of UNet2DModel have one number of them"),
        (
            len(head_channels) > 1 and any(count > 1 for _, count in heads),
            f"its attention heads have {_listed(head_channels)} channels, those of UNet2DModel have one number of "
            "them; train with network.head_channels in place of network.num_heads",
        ),
    )
    return groups.pop(), head_channels.pop() if len(head_channels) == 1 else None


def _listed(numbers: set[int]) -> str:
    return " and ".join(map(str, sorted(numbers)))


def _unet_rules(network: UNet) -> list[Rule]:
    rules = [*layer("stem", "conv_in"), *layer("out_norm", "conv_norm_out"), *layer("out_conv", "conv_out")]
    for number in (1, 2):
        rules += layer(f"embedding.linear{number}", f"time_embedding.linear_{number}")
    if network.embedding.label is not None:
        rules.append(Rule("embedding.label.weight", ("class_embedding.weight",)))
    for level, stage in enumerate(network.encoder):
        for index, block in enumerate(stage.blocks):
            rules += _block(f"encoder.{level}.blocks.{index}", f"down_blocks.{level}", index, block)
        if stage.resize is not None:  # in diffusers it belongs to the level before
            rules += _resize(f"encoder.{level}.resize", f"down_blocks.{level - 1}.downsamplers.0", stage.resize)
    for index, block in enumerate(network.middle):
        rules += _block(f"middle.{index}", "mid_block", index, block)
    for number, stage in enumerate(network.decoder):
        for index, block in enumerate(stage.blocks):
            rules += _block(f"decoder.{number}.blocks.{index}", f"up_blocks.{number}", index, block)
        if stage.resize is not None:
            rules += _resize(f"decoder.{number}.resize", f"up_blocks.{number}.upsamplers.0", stage.resize)
    return rules


def _block(ours: str, theirs: str, index: int, block: ResidualBlock) -> list[Rule]:
    rules = _residual(ours, f"{theirs}.resnets.{index}", block)
    if block.attention is not None:
        ours, theirs = f"{ours}.attention", f"{theirs}.attentions.{index}"
        rules += [
            *layer(f"{ours}.norm", f"{theirs}.group_norm"),
            *_queries_keys_values(f"{ours}.attention.qkv", theirs),
            *layer(f"{ours}.attention.out", f"{theirs}.to_out.0"),
        ]
    return rules


def _residual(ours: str, theirs: str, block: ResidualBlock) -> list[Rule]:
    names = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"modulation": "time_emb_proj"}
    if block.skip is not None:
        names["skip"] = "conv_shortcut"
    return [rule for name, foreign in names.items() for rule in layer(f"{ours}.{name}", f"{theirs}.{foreign}")]


def _resize(ours: str, theirs: str, module: torch.nn.Module) -> list[Rule]:
    if isinstance(module, ResidualBlock):
        return _residual(ours, theirs, module)
    return layer(f"{ours}.conv", f"{theirs}.conv")


def _queries_keys_values(ours: str, theirs: str) -> list[Rule]:
    """Our rows are [q|k|v][head][channel]; diffusers has a layer for each of the three."""
    return [
        Rule(
            f"{ours}.{part}",
            tuple(f"{theirs}.to_{one}.{part}" for one in "qkv"),
            forth=lambda *rows: torch.cat(rows),
            back=lambda rows: rows.chunk(3),
        )
        for part in ("weight", "bias")
    ]


# DiTTransformer2DModel


def _transformer(config: ModelConfig, network: DiTConfig, arguments: dict[str, Any]) -> DiffusersNetwork:
    wanted = {"position": "sincos", "mlp": "gelu", "norm": "layernorm", "qk_norm": False, "value_residual": False}
    _refuse(
        *(
            (
                getattr(network, option) != value,
                f"its option {option} is {getattr(network, option)!r}, in DiTTransformer2DModel {value!r}",
            )
            for option, value in wanted.items()
        ),
        (
            int(network.hidden_size * network.mlp_ratio) != 4 * network.hidden_size,
            f"its mlp_ratio is {network.mlp_ratio:g}, in DiTTransformer2DModel 4",
        ),
    )
    turned, residual = _time_in_their_frequencies(network.time_scale)
    _refuse(
        (
            residual > _TIME_TOLERANCE,
            "DiTTransformer2DModel has other time frequencies, 10000^(-i/127) where ours are 10000^(-i/128); for times "
            f"from 0 to {network.time_scale:g} its features cannot express ours (with network.time_scale up to 10 "
            "they can; U-Nets have no such limit)",
        )
    )
    num_classes = config.conditioning.num_classes
    return DiffusersNetwork(
        "DiTTransformer2DModel",
        "transformer",
        _transformer_keys(network, num_classes, turned),
        {
            **arguments,
            "num_attention_heads": network.num_heads,
            "attention_head_dim": network.hidden_size // network.num_heads,
            "num_layers": network.depth,
            "patch_size": network.patch_size,
            "num_embeds_ada_norm": num_classes,  # a null row is added; without classes it is the only row
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "norm_eps": NORM_EPS,
        },
        any_size=False,
    )


def _transformer_keys(network: DiTConfig, num_classes: int, turned: Tensor) -> KeyMap:
    blocks = [f"transformer_blocks.{index}" for index in range(network.depth)]

    def shared(ours: str, theirs: str, change: Callable[[Tensor], Tensor] | None = None) -> Rule:
        """In diffusers every block has its own copy of the embedding of time and label."""
        copies = tuple(f"{block}.norm1.emb.{theirs}" for block in blocks)
        return Rule(
            ours,
            copies,
            forth=lambda *tensors: tensors[0],
            back=lambda tensor: (change(tensor) if change else tensor,) * len(copies),
            exact_back=change is None,
        )

    first = "timestep_embedder.linear_1.weight"
    rules = [
        *layer("patch_embedding", "pos_embed.proj"),
        shared("time_embedding.mlp.0.weight", first, lambda weight: weight @ turned.to(weight.device)),
        shared("time_embedding.mlp.0.bias", "timestep_embedder.linear_1.bias"),
        shared("time_embedding.mlp.2.weight", "timestep_embedder.linear_2.weight"),
        shared("time_embedding.mlp.2.bias", "timestep_embedder.linear_2.bias"),
        *layer("final_modulation", "proj_out_1"),
        *layer("final_linear", "proj_out_2"),
    ]
    constants = []
    table = "class_embedder.embedding_table.weight"
    if num_classes:
        rules.append(shared("label_embedding.weight", table))
    else:
        nothing = torch.zeros(1, network.hidden_size)
        constants = [Constant(f"{block}.norm1.emb.{table}", nothing.clone()) for block in blocks]
    for index, theirs in enumerate(blocks):
        ours = f"blocks.{index}"
        rules += [
            *layer(f"{ours}.modulation", f"{theirs}.norm1.linear"),
            *_queries_keys_values(f"{ours}.attention.qkv", f"{theirs}.attn1"),
            *layer(f"{ours}.attention.out", f"{theirs}.attn1.to_out.0"),
            *layer(f"{ours}.mlp.up", f"{theirs}.ff.net.0.proj"),
            *layer(f"{ours}.mlp.down", f"{theirs}.ff.net.2"),
        ]
    return KeyMap(rules, constants)


@lru_cache(maxsize=4)
def _time_in_their_frequencies(time_scale: float) -> tuple[Tensor, float]:
    """The matrix M that expresses our time features f by those of diffusers, g, and the largest error of a feature.

    If f(t) = M g(t) for times from 0 to `time_scale`, a layer with weights W on f has weights W M on g. For short times
    all features are smooth, and each of ours lies between two of theirs: least squares find M, with entries no larger
    than 1. For long times they are too far apart, and no M fits.
    """
    points = (1 - torch.linspace(0, math.pi, 2000, dtype=torch.float64).cos()) / 2 * time_scale  # dense at the ends
    half = TIME_CHANNELS // 2
    ours, theirs = _features(points, half), _features(points, half - 1)
    turned = torch.linalg.pinv(theirs, rtol=1e-10) @ ours
    between = (points[1:] + points[:-1]) / 2
    residual = (_features(between, half - 1) @ turned - _features(between, half)).abs().max().item()
    return turned.T.contiguous(), residual


def _features(times: Tensor, period: int) -> Tensor:
    """Cosines, then sines, of frequencies 10000^(-i / period): times [n] => [n, 256] float64."""
    exponents = torch.arange(TIME_CHANNELS // 2, dtype=torch.float64) / period
    angles = times[:, None] * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
