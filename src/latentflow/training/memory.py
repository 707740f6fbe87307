"""Memory and arithmetic of training a network, estimated before it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latentflow.errors import ConfigError
from latentflow.model.config import ModelConfig
from latentflow.networks.align_head import HEAD_LAYERS, AlignedNetwork
from latentflow.networks.dit import DiTConfig
from latentflow.networks.running import MEMORY_MODES, MemoryMode
from latentflow.networks.unet import UNetConfig
from latentflow.runtime import Runtime
from latentflow.sizes import Size
from latentflow.weights import without_memory

_WIDE = 4  # bytes of a number that stays float32 under autocast
_AVERAGE = "average of the weights"
_STATE = {"weights": 4, "gradients": 4, "moments of AdamW": 8, _AVERAGE: 4}  # bytes per parameter
# Bytes that a U-Net saves per residual block, channel and latent pixel, in float32 and in half precision: the largest
# of the four variants, measured.
_KEPT_BY_UNET = {"none": (54, 27), "recompute-cheap": (30, 15), "checkpoint": (10, 5)}
_RESERVE = 0.1  # of the memory, for what is not estimated


def network_in_training(config: ModelConfig, *, aligned: bool = False) -> nn.Module:
    """The network that a config describes, if `aligned` with an `AlignHead`; nothing is allocated."""
    with without_memory():
        network = config.build_network()
        return AlignedNetwork(network, block=1) if aligned else network


def count_parameters(config: ModelConfig, *, aligned: bool = False) -> int:
    """Number of weights of the network that a config describes; nothing is allocated.

    Args:
        aligned: with those of an `AlignHead`.
    """
    network = network_in_training(config, aligned=aligned)
    return sum(parameter.numel() for parameter in network.parameters())


def forward_flops(config: ModelConfig, *, aligned: bool = False) -> int:
    """Floating-point operations of a forward pass for one image: 2 for each multiply-add.

    Products, convolutions and attention are counted, on tensors without data. A training step takes three times as
    many: each product has two more in the backward pass.

    Args:
        aligned: with those of an `AlignHead`.
    """
    network = network_in_training(config, aligned=aligned)
    with without_memory(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents = torch.empty(1, *config.latent_shape)
        network(latents, torch.empty(1), config.conditioning.build(latents.shape, latents.device))
    return counter.get_total_flops()


def training_flops(network: nn.Module, config: ModelConfig) -> int:
    """Floating-point operations of a forward and a backward pass for one image; see `forward_flops`.

    Three times those of the forward pass where everything is trained; frozen weights have no gradient to compute.

    Args:
        network: of `config`, without memory, in training mode.
    """
    with without_memory(), FlopCounterMode(display=False) as counter:
        latents = torch.empty(1, *config.latent_shape)
        condition = config.conditioning.build(latents.shape, latents.device)
        network(latents, torch.empty(1), condition).sum().backward()
    return counter.get_total_flops()


def bytes_per_image(
    network: DiTConfig | UNetConfig, size: Size | int, *, half: bool, memory: MemoryMode = "none", aligned: bool = False
) -> int:
    """Estimated bytes of one image in training: what is saved for the backward pass, plus one block.

    Args:
        size: of its latents.
        half: whether most of the computation is in bf16 or fp16.
        memory: what the backward pass recomputes.
        aligned: with what an `AlignHead` saves.
    """
    size = Size.of(size)
    if isinstance(network, DiTConfig):
        e = 2 if half else 4
        kept = _kept_by_block(network, e)
        # After the blocks, the last norm saves the residual stream, and the last layer its input.
        per_channel = network.depth * kept[memory] + kept["none"] + _WIDE + e
        if network.value_residual:  # the values of the first block, which the others share
            per_channel += e
        if aligned:  # the inputs of its layers; the first is the residual stream, of which autocast makes a copy
            per_channel += (HEAD_LAYERS if half else HEAD_LAYERS - 1) * e
        return round(size.over(network.patch_size).area * network.hidden_size * per_channel)
    kept = {mode: narrow if half else wide for mode, (wide, narrow) in _KEPT_BY_UNET.items()}
    per_level = 2 * network.blocks_per_level + 1
    volumes = [network.channels * m * size.over(2**level).area for level, m in enumerate(network.multipliers)]
    return kept[memory] * per_level * sum(volumes) + (kept["none"] - kept[memory]) * max(volumes)


def _kept_by_block(config: DiTConfig, e: int) -> dict[MemoryMode, float]:
    """Bytes per token and channel that a transformer block saves, by memory mode.

    Args:
        e: bytes of a number that is the result of a product.
    """
    products = {
        "queries, keys, values": 3 * e,
        "attention": e,
        "output of the attention branch": e,
        "inside the MLP": config.mlp_ratio * (4 / 3 if config.mlp == "swiglu" else 1) * e,
        "output of the MLP": e,
    }
    more = {
        "residual stream before the MLP": _WIDE,
        "inputs of attention and MLP": 2 * e,
        "queries and keys, normalised and rotated": 2 * e if config.qk_norm or config.position == "rope" else 0,
        "after the activation": config.mlp_ratio * e if config.mlp == "gelu" else 0,
        "values mixed with those of the first block": e if config.value_residual else 0,
    }
    given = _WIDE  # the residual stream before the block
    return {
        "none": given + sum(products.values()) + sum(more.values()),
        "recompute-cheap": given + sum(products.values()),
        "checkpoint": given,
    }


def memory_mode(
    word: Literal["auto", "none", "recompute-cheap", "checkpoint"],
    config: ModelConfig,
    images: int,
    runtime: Runtime,
    *,
    averages: int = 1,
    aligned: bool = False,
    trained: int | None = None,
) -> MemoryMode:
    """The memory mode of a run; for "auto" the fastest one that fits, the same in all processes with equal devices.

    Args:
        config: of the model that is trained.
        images: computed together by one process.
        averages: of the weights, that are kept.
        aligned: with an `AlignHead`.
        trained: how many parameters are trained; None: all.
    """
    if word != "auto":
        return word
    half, available = runtime.precision in ("bf16", "fp16"), memory_of_process(runtime)
    if available is None:
        return "none"
    kept = {"averages": averages, "aligned": aligned, "trained": trained}
    return fitting_mode(config, images, half=half, memory=available, **kept)


def fitting_mode(
    config: ModelConfig,
    images: int,
    *,
    half: bool,
    memory: int,
    averages: int = 1,
    aligned: bool = False,
    trained: int | None = None,
) -> MemoryMode:
    """The fastest mode in which training on `images` together fits into `memory` bytes; the leanest if none does."""
    state = state_bytes(count_parameters(config, aligned=aligned), half=half, averages=averages, trained=trained)
    size = Size(*config.latent_shape[1:])
    for mode in MEMORY_MODES:
        needed = state + images * bytes_per_image(config.network, size, half=half, memory=mode, aligned=aligned)
        if needed <= memory * (1 - _RESERVE):
            return mode
    return MEMORY_MODES[-1]


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a device; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _main_memory("MemAvailable", "memory.current")


def total_memory(device: torch.device) -> int | None:
    """Total bytes of a device, the same at all times and in all processes; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _main_memory("MemTotal", None)


def memory_of_process(runtime: Runtime) -> int | None:
    """Total bytes that each process may take: of its GPU, or its share of the main memory; None if unknown."""
    memory = total_memory(runtime.device)
    return memory and memory // (1 if runtime.device.type == "cuda" else runtime.local_world)


def micro_batch_that_fits(state: int, per_image: int, share: int, memory: int | None, multiple: int = 1) -> int:
    """The largest divisor of `share`, the images of one process, that fits into memory; 0: none does.

    Args:
        state: bytes of weights, gradients and moments.
        per_image: bytes saved for the backward pass of each image.
        multiple: of which it has to be one.
    """
    parts = [part for part in range(share, 0, -1) if share % part == 0 and part % multiple == 0]
    return next((part for part in parts if memory is None or state + part * per_image <= memory * (1 - _RESERVE)), 0)


def require_memory(
    what: str,
    num_parameters: int,
    state: int,
    per_image: int,
    images: int,
    free: int | None,
    key: str,
    multiple: int = 1,
) -> None:
    """Refuse a network that does not fit into memory.

    Args:
        what: the network's name.
        state: bytes that it takes whatever the batch; see `state_bytes`.
        images: computed together.
        key: of the recipe, for the number of images computed together.
        multiple: of which this number has to be one.

    Raises:
        ConfigError: with the estimate, the free memory, and what would fit.
    """
    if free is None or state + images * per_image / 2 <= free:  # half: the estimate may be too high
        return
    fits = micro_batch_that_fits(state, per_image, images, free, multiple)
    raise ConfigError(
        f"training {what} ({num_parameters:,} parameters) takes about {state / 2**30:.1f} GiB of memory and "
        f"{per_image / 2**20:.1f} MiB for each of {images} images, and {free / 2**30:.1f} GiB are free; "
        + (f"use {key}={fits}" if fits else "choose a smaller network, or smaller images")
    )


def state_bytes(num_parameters: int, *, half: bool = False, averages: int = 1, trained: int | None = None) -> int:
    """Bytes of a network in training whatever the batch; see `state_parts`."""
    return sum(state_parts(num_parameters, half=half, averages=averages, trained=trained).values())


def state_parts(
    num_parameters: int, *, half: bool = False, averages: int = 1, trained: int | None = None
) -> dict[str, int]:
    """Bytes of a network in training by content: weights, gradients, moments, average.

    Args:
        half: whether products are in bf16 or fp16, for which autocast keeps copies of the weights.
        averages: of the weights, that are kept.
        trained: how many of the parameters are trained; the others are only there. None: all of them.
    """
    trained = num_parameters if trained is None else trained
    parts = {name: size * (num_parameters if name == "weights" else trained) for name, size in _STATE.items()}
    parts[_AVERAGE] *= averages
    return {**parts, "weights in half precision": 2 * num_parameters} if half else parts


def _main_memory(line: str, used_by_group: str | None) -> int | None:
    information, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not information.exists():
        return None
    lines = dict(line.split(":") for line in information.read_text(encoding="utf-8").splitlines())
    memory = int(lines[line].split()[0]) * 1024
    try:
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        return min(memory, limit - (int((group / used_by_group).read_text(encoding="utf-8")) if used_by_group else 0))
    except (OSError, ValueError):  # no such group, or a limit of "max"
        return memory
