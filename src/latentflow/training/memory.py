"""What training a network takes in memory, estimated before it is built."""

from __future__ import annotations

from pathlib import Path

import torch

from latentflow.errors import ConfigError
from latentflow.model_config import ModelConfig
from latentflow.networks.dit import DiTConfig
from latentflow.networks.unet import UNetConfig

_BYTES_PER_PARAMETER = 20  # float32: the weight, its gradient, AdamW's two moments, the average
# Kept for the backward pass, measured: of a transformer per token, block and channel (on a CPU in float32; on a GPU
# with fused attention in bf16), of a U-Net per residual block, channel and latent pixel.
_KEPT = {"dit": {"fp32": 110, "bf16": 75}, "unet": {"fp32": 42, "bf16": 28}}
_RESERVE = 0.1  # of the memory, for what an estimate cannot see


def count_parameters(config: ModelConfig) -> int:
    """Weights of the network that a config describes; nothing is allocated."""
    with torch.device("meta"):
        network = config.build_network()
    return sum(parameter.numel() for parameter in network.parameters())


def bytes_per_image(network: DiTConfig | UNetConfig, side: int, *, half: bool) -> int:
    """Estimated bytes that one image keeps for the backward pass.

    Args:
        side: height and width of its latents.
        half: whether most of the computation is in bf16 or fp16.
    """
    kept = _KEPT[network.kind]["bf16" if half else "fp32"]
    if isinstance(network, DiTConfig):
        volume = (side // network.patch_size) ** 2 * network.depth * network.hidden_size
    else:
        per_level = 2 * network.blocks_per_level + 1
        sides = [side >> level for level in range(len(network.multipliers))]
        volume = per_level * sum(network.channels * m * s**2 for m, s in zip(network.multipliers, sides, strict=True))
    return kept * volume // (8 if network.gradient_checkpointing else 1)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a program could still take on a device; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _main_memory("MemAvailable", "memory.current")


def total_memory(device: torch.device) -> int | None:
    """Bytes of a device's memory, the same at all times and in all processes; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _main_memory("MemTotal", None)


def micro_batch_that_fits(state: int, per_image: int, share: int, memory: int | None) -> int:
    """The largest part of `share`, the images of one process, that memory holds; 0: not even one image.

    Args:
        state: bytes of weights, gradients and moments.
        per_image: bytes that each image keeps for the backward pass.
    """
    parts = [part for part in range(share, 0, -1) if share % part == 0]
    return next((part for part in parts if memory is None or state + part * per_image <= memory * (1 - _RESERVE)), 0)


def require_memory(what: str, num_parameters: int, per_image: int, images: int, free: int | None, key: str) -> None:
    """Refuse a network that the memory cannot hold.

    Args:
        what: the network's name.
        images: computed together.
        key: of the recipe, for the number of images computed together.

    Raises:
        ConfigError: with the estimate, what is free, and what would fit.
    """
    state = state_bytes(num_parameters)
    if free is None or state + images * per_image / 2 <= free:  # half: what might fit after all is not refused
        return
    fits = micro_batch_that_fits(state, per_image, images, free)
    raise ConfigError(
        f"training {what} ({num_parameters:,} parameters) takes about {state / 2**30:.1f} GiB of memory and "
        f"{per_image / 2**20:.1f} MiB for each of {images} images, and {free / 2**30:.1f} GiB are free; "
        + (f"use {key}={fits}" if fits else "choose a smaller network, or smaller images")
    )


def state_bytes(num_parameters: int) -> int:
    """Bytes of a network in training: weights, gradients, the optimizer's moments, the average."""
    return _BYTES_PER_PARAMETER * num_parameters


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
