"""What the product is measured against: loops of a few lines around a bare network, and the arithmetic of the device.

Legend: B images, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn

from latentflow.networks.velocity_network import NetworkConfig, VelocityPrediction, build_network
from latentflow.shapes import Condition

NOMINAL = {"H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 311.9e12}
"""Operations per second of dense bf16 matrix products, as the maker states them, by part of the device's name."""


def wait(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bare_network(config: NetworkConfig, shape: Sequence[int], num_classes: int) -> nn.Module:
    """A velocity network for latents of `shape` (C, H, W), with weights that are nowhere zero."""
    torch.manual_seed(0)
    network = build_network(config, VelocityPrediction(), channels=shape[0], num_classes=num_classes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def matmul_rate(device: torch.device, size: int = 8192) -> float:
    """Operations per second of a `size` x `size` matrix product in bf16."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16).unbind()
    rates = []
    for _ in range(3):
        wait(device)
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(device)
        rates.append(10 * 2 * size**3 / (time.perf_counter() - began))
    return max(rates)


def nominal_rate(device: torch.device) -> float | None:
    """What the maker states; None where it is not known here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for known, rate in NOMINAL.items() if all(word in name for word in known.split())), None)


def training_rate(
    network: nn.Module,
    shape: Sequence[int],
    *,
    batch_size: int,
    num_classes: int,
    device: torch.device,
    half: bool,
    seconds: float,
    warm_up: int = 5,
) -> dict[str, float]:
    """Images per second of a plain training loop: the batch is on the device, no average, no log, no checkpoint."""
    network = network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    data = torch.randn(batch_size, *shape, device=device)
    condition = Condition(torch.randint(num_classes, (batch_size,), device=device))
    began, steps, first = time.perf_counter(), 0, 0.0
    while steps <= warm_up or time.perf_counter() - began < seconds:
        t = torch.rand(batch_size, device=device)
        noise, mix = torch.randn_like(data), t[:, None, None, None]
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            velocity = network((1 - mix) * data + mix * noise, t, condition)
        loss = (velocity.float() - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        if steps in (1, warm_up):
            wait(device)
            now = time.perf_counter()
            first, began = (now - began if steps == 1 else first), now
    wait(device)
    rate = (steps - warm_up) * batch_size / (time.perf_counter() - began)
    return {
        "images_per_second": rate,
        "seconds_to_first_step": first,
        "steps": steps - warm_up,
        "loss": float(loss.detach()),
    }


@torch.inference_mode()
def heun(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """From noise at t = 1 to data at t = 0 in `steps` of Heun's method; no guidance."""
    x, times = noise, torch.linspace(1, 0, steps + 1).tolist()
    for now, then in pairwise(times):
        first = velocity(x, torch.full((len(x),), now, device=x.device))
        second = velocity(x + (then - now) * first, torch.full((len(x),), then, device=x.device))
        x = x + (then - now) / 2 * (first + second)
    return x
