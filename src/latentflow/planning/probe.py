"""How fast a network trains on this device: a few real steps, of a part of the network if the whole takes too long.

Legend: B images, C latent channels, h and w latent height and width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from latentflow.errors import ConfigError
from latentflow.flow.loss import flow_matching_loss
from latentflow.model.config import ModelConfig
from latentflow.networks.dit import DiTConfig
from latentflow.networks.running import MemoryMode, compile_blocks, set_memory
from latentflow.runtime import Runtime
from latentflow.training.ema import EMA
from latentflow.training.memory import count_parameters, forward_flops, network_in_training, training_flops
from latentflow.training.muon import hidden_matrices, newton_schulz, orthogonalisation_flops
from latentflow.training.optim import OptimizerConfig, build_optimizer, clip_gradients, trained_parameters
from latentflow.weights import without_memory

_UPDATED = {"cpu": 4_000_000, "cuda": 100_000_000}  # parameters in the timed update
_ORTHOGONALISED = {"cpu": (2, 256, torch.float32), "cuda": (8, 1024, torch.bfloat16)}  # matrices, side, as in Muon
_PASSES = 3  # forward and backward together, in units of the forward pass, if everything is trained
RECOMPUTED: dict[MemoryMode, float] = {"none": 0.0, "recompute-cheap": 0.15, "checkpoint": 1.0}
"""Approximate share of the forward pass that the modes of `training.memory` repeat in the backward pass."""
_REACHED = 0.4  # of the stated peak; large networks reach a little more, small ones less
_LARGEST_PROBE = 2**30  # bytes of weights, on a CPU


@dataclass(frozen=True)
class Speed:
    """A measured or stated speed.

    Attributes:
        seconds_per_image: forward and backward.
        seconds_per_forward: of an image, without a backward pass.
        seconds_per_update: optimizer, gradient clipping and average, once per step.
        forward_flops: of one image, exact: 2 for each multiply-add.
        flops_per_second: achieved.
        probed: what ran, in words.
        whole: whether the whole network ran.
        measured: false for a stated speed.
    """

    seconds_per_image: float
    seconds_per_forward: float
    seconds_per_update: float
    forward_flops: int
    flops_per_second: float
    probed: str
    whole: bool
    measured: bool = True


@dataclass(frozen=True)
class _Way:
    """How a network is built, with what is not trained frozen, and run."""

    build: Callable[[ModelConfig], nn.Module]
    runtime: Runtime
    mode: MemoryMode
    compiled: bool


@dataclass(frozen=True)
class _Part:
    """A network with fewer blocks or smaller latents, and its approximate share of the operations."""

    config: ModelConfig
    share: float
    what: str


def probe(
    config: ModelConfig,
    runtime: Runtime,
    *,
    images: int,
    seconds: float,
    mode: MemoryMode = "none",
    compiled: bool = False,
    ema_lengths: Sequence[float] = (),
    build: Callable[[ModelConfig], nn.Module] = network_in_training,
) -> Speed:
    """Time a few steps.

    Of a transformer that is too large, one block and two blocks are timed; the difference is the time of each block. A
    U-Net that is too large runs on smaller latents, and the time is scaled by the number of operations.

    Args:
        images: computed together in training; fewer if they would take too long.
        seconds: about how long this may take, without compilation.
        mode: what the backward pass recomputes.
        compiled: whether blocks are compiled first.
        ema_lengths: of the averages next to the exponential one.
        build: makes a network of a config without memory; what is not trained is frozen.
    """
    way, network = _Way(build, runtime, mode, compiled), build(config)
    whole, trained = forward_flops(config), sum(one.numel() for one in trained_parameters(network))
    update = _seconds_per_update(trained, runtime, ema_lengths)
    rate = _matmul_rate(runtime)
    budget = rate * seconds / (4 * _PASSES)  # operations of one forward pass: two networks, each with a warm-up
    parts = list(_parts(config))
    small = (part for part in parts if part.share * whole <= budget and _fits(part.config, runtime))
    part = next(small, parts[-1])
    flops = forward_flops(part.config) if part.share < 1 else whole
    together = max(min(images, int(budget // flops)), 1)
    per_image = _seconds_of_pass(part.config, way, together, seconds / 3) / together
    if part.share < 1:
        scaled = per_image * whole / flops
        if isinstance(config.network, DiTConfig):
            first = _seconds_of_pass(_with_depth(config, 1), way, together, seconds / 3) / together
            block = (per_image - first) / (part.config.network.depth - 1)
            by_block = first + block * (config.network.depth - 1)
            # if other load disturbed the clock, the count of operations is more reliable
            scaled = by_block if 0.5 * scaled < by_block < 2 * scaled else scaled
        per_image = scaled
    training = training_flops(network, config)
    forward = per_image * whole / (training + RECOMPUTED[mode] * whole)
    what = f"{together} images, {part.what}" + (", compiled" if compiled else "")
    return Speed(per_image, forward, update, whole, training / per_image, what, part.share == 1)


def stated_speed(
    config: ModelConfig, network: nn.Module, peak: float, mode: MemoryMode, optimizer: OptimizerConfig
) -> Speed:
    """The speed to expect of a device with a peak of `peak` operations per second; nothing is measured.

    Args:
        network: of `config`, without memory; what is not trained is frozen.
    """
    flops, training, reached = forward_flops(config), training_flops(network, config), _REACHED * peak
    per_image = (training + RECOMPUTED[mode] * flops) / reached
    update = _flops_of_orthogonalisation(config, optimizer) / reached
    what = f"{_REACHED:.0%} of {peak / 1e12:g} TFLOP/s, typical of training"
    given = {"whole": False, "measured": False}
    return Speed(per_image, flops / reached, update, flops, training / per_image, what, **given)


def _parts(config: ModelConfig) -> Iterator[_Part]:
    """The network itself, then smaller and smaller parts of it."""
    yield _Part(config, 1.0, "the whole network")
    network = config.network
    if isinstance(network, DiTConfig):
        if network.depth > 2:
            yield _Part(_with_depth(config, 2), 2 / network.depth, f"2 of {network.depth} blocks")
        return
    size, multiple = config.image_size, config.pixel_multiple
    while all(side % 2 == 0 for side in size) and size.over(2).is_multiple_of(multiple):
        size = size.over(2)
        latents = size.over(config.autoencoder.factor).words
        smaller = config.model_copy(update={"image_size": size})
        yield _Part(smaller, size.area / config.image_size.area, f"on latents of {latents}")
    with suppress(ConfigError):  # its heads or norms may not divide the channels
        channels = network.channels // 2
        half = network.model_copy(update={"channels": channels, "stem_channels": channels})
        narrow = config.model_copy(update={"network": half, "image_size": size})
        count_parameters(narrow)
        what = f"half as wide, on latents of {size.over(config.autoencoder.factor).words}"
        yield _Part(narrow, size.area / config.image_size.area / 4, what)


def _with_depth(config: ModelConfig, depth: int) -> ModelConfig:
    network = config.network.model_copy(update={"depth": depth, "name": None})
    return config.model_copy(update={"network": network})


def _fits(config: ModelConfig, runtime: Runtime) -> bool:
    return runtime.device.type != "cpu" or 4 * count_parameters(config) <= _LARGEST_PROBE


def _inputs(config: ModelConfig, images: int, device: torch.device):
    """(latents [B, C, h, w], time [B], null condition), with noise as latents."""
    latents = torch.randn(images, *config.latent_shape, device=device)
    condition = config.conditioning.build(latents.shape, device)
    return latents, torch.full((images,), 0.5, device=device), condition


def _seconds_of_pass(config: ModelConfig, way: _Way, images: int, seconds: float) -> float:
    """The minimum time of a forward and backward pass over a few repetitions, after a warm-up."""
    runtime, network = way.runtime, _with_values(way.build(config), way.runtime.device).train()
    set_memory(network, way.mode)
    if way.compiled:
        compile_blocks(network)
    data, time_, condition = _inputs(config, images, runtime.device)
    noise, taken, began = torch.randn_like(data), [], 0.0

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with runtime.autocast():
            return network(x, t, condition)

    while len(taken) < 2 or (time.perf_counter() - began < seconds and len(taken) < 20):
        start = _now(runtime.device)
        began = start if len(taken) == 1 else began
        with runtime.float32_policy():
            flow_matching_loss(velocity, config.path, data, noise, time_).mean().backward()
        taken.append(_now(runtime.device) - start)
    return min(taken[1:])


def _with_values(network: nn.Module, device: torch.device) -> nn.Module:
    """A network without memory with cheap random weights, none of them zero: denormal numbers are slow."""
    network.to_empty(device=device)
    some = 0.02 * torch.randn(2**16, device=device)
    with torch.no_grad():
        for tensor in [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]:
            flat = tensor.view(-1)
            for start in range(0, len(flat), len(some)):
                flat[start : start + len(some)] = some[: len(flat) - start]
    return network


def _seconds_per_update(total: int, runtime: Runtime, ema_lengths: Sequence[float]) -> float:
    """Time of clipping, optimizer and averages of `total` weights, extrapolated from some: memory limits it."""
    number = min(total, _UPDATED.get(runtime.device.type, _UPDATED["cpu"]))
    layers = nn.ParameterList(torch.full((2**16,), 0.5) for _ in range(math.ceil(number / 2**16)))
    layers.to(runtime.device)
    optimizer, average = build_optimizer(layers, OptimizerConfig()), EMA(layers, 0.999, ema_lengths)
    taken = []
    for step in range(3):
        for parameter in layers.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        start = _now(runtime.device)
        clip_gradients(list(layers.parameters()), 1.0)
        optimizer.step()
        average.update(step)
        taken.append(_now(runtime.device) - start)
    return min(taken[1:]) * total / (len(layers) * 2**16)


def _flops_of_orthogonalisation(config: ModelConfig, optimizer: OptimizerConfig) -> float:
    """Per step on average."""
    if optimizer.kind != "muon":
        return 0.0
    with without_memory():
        matrices = hidden_matrices(config.build_network())
    return orthogonalisation_flops(matrices, optimizer.orthogonalise_every)


def seconds_of_orthogonalisation(config: ModelConfig, optimizer: OptimizerConfig, runtime: Runtime) -> float:
    """Per step of Muon on average, from the time of a few matrices and the number of operations; 0 for AdamW."""
    flops = _flops_of_orthogonalisation(config, optimizer)
    if not flops:
        return 0.0
    number, size, dtype = _ORTHOGONALISED.get(runtime.device.type, _ORTHOGONALISED["cpu"])
    x, taken = torch.full((number, size, size), 1 / size, dtype=dtype, device=runtime.device), []
    for _ in range(3):
        start = _now(runtime.device)
        newton_schulz(x)
        taken.append(_now(runtime.device) - start)
    return min(taken[1:]) * flops / (30 * number * size**3)  # five times three products of 2 size^3


def _matmul_rate(runtime: Runtime, size: int = 512) -> float:
    """Operations per second of a matrix product, a rough guide to how much can be timed."""
    a, taken = torch.full((size, size), 0.5, device=runtime.device), []
    for _ in range(3):
        start = _now(runtime.device)
        with runtime.autocast():
            a @ a
        taken.append(_now(runtime.device) - start)
    return 2 * size**3 / min(taken[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
