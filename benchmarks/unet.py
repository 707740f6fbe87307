"""Forward and backward pass of a U-Net: what layout, gradient checkpointing and compilation change, and diffusers'.

The sides take turns, one pass each per round, on the same latents and with the same loss:

    contiguous                weights of convolutions as torch makes them
    channels last             the same weights with their channels innermost
    gradient checkpointing    every block computed again on the way back; less memory
    diffusers                 UNet2DModel with the same sizes, for a yardstick
    compiled                  its blocks compiled, where a compiler is there

The last three have the layout that the package gives to networks on the device: contiguous on the CPU, channels last
on CUDA. The figure to keep is a ratio, the median over the rounds of (seconds of that layout / seconds of the side):
above 1 the side is faster. Peak memory is what a pass holds at most beyond weights and inputs.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import measuring
import torch
from measuring import median_and_quartiles, take_turns
from torch import Tensor, nn

from latentflow.networks.running import compile_blocks, set_memory
from latentflow.networks.unet import UNet, UNetConfig
from latentflow.shapes import Condition

CONTIGUOUS, LAST, CHECKPOINTING, DIFFUSERS, COMPILED = SIDES = (
    "contiguous",
    "channels last",
    "gradient checkpointing",
    "diffusers",
    "compiled",
)
LAYOUTS = {CONTIGUOUS: torch.contiguous_format, LAST: torch.channels_last}
LAYOUT_OF_DEVICE = {"cpu": CONTIGUOUS, "cuda": LAST}
DEFAULTS = {
    "cpu": {"channels": 64, "batch_size": 4, "rounds": 8, "precision": "fp32"},
    "cuda": {"channels": 256, "batch_size": 32, "rounds": 50, "precision": "bf16"},
}
LATENT_CHANNELS = 4
HEADS = 4

Step = Callable[[], Tensor]
"""Computes one loss, its graph still there."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--channels", type=int, help="of the first level; default: 64 on the CPU, 256 on CUDA")
    parser.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 2])
    parser.add_argument("--latent-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, help="default: 4 on the CPU, 32 on CUDA")
    parser.add_argument("--rounds", type=int, help="default: 8 on the CPU, 50 on CUDA")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32 on the CPU, bf16 on CUDA")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled side out")
    parser.add_argument("--results", default=measuring.RESULTS, help="folder of the JSON file")
    options = measuring.parsed(parser, DEFAULTS, arguments)
    device = torch.device(options.device)
    results = measure(options, device)
    print_table(results)
    measuring.write_results("unet", device, results, options.results)
    return results


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All sides in turn; the first round warms up, and is where the compiled side compiles."""
    networks, left_out = make_networks(options, device)
    steps = {side: make_step(side, network, options, device) for side, network in networks.items()}
    peaks = {side: peak_memory(steps[side], networks[side], device) for side in SIDES[:-1]}

    def there_and_back(side: str, number: int) -> None:
        steps[side]().backward()
        networks[side].zero_grad()

    taken = take_turns({side: partial(there_and_back, side) for side in steps}, device, options.rounds)
    own = LAYOUT_OF_DEVICE[device.type]
    return {
        "network": networks[own].config.title,
        "parameters": {side: num_parameters(networks[side]) for side in (own, DIFFUSERS)},
        "latent_shape": [LATENT_CHANNELS, options.latent_size, options.latent_size],
        "batch_size": options.batch_size,
        "precision": options.precision,
        "rounds": options.rounds,
        "layout_of_the_device": own,
        "images_per_second": {
            side: median_and_quartiles(options.batch_size / one)["median"] for side, one in taken.items()
        },
        "times_as_fast": {side: median_and_quartiles(taken[own] / one) for side, one in taken.items() if side != own},
        "peak_memory_mib": {side: peak / 2**20 for side, peak in peaks.items()},
        "left_out": left_out,
    }


def make_networks(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The network of each side, and why a side is left out."""
    own, left_out = LAYOUT_OF_DEVICE[device.type], {}
    sizes = UNetConfig(
        channels=options.channels,
        multipliers=options.multipliers,
        attention_factors=[2 ** (len(options.multipliers) - 1)],
        num_heads=HEADS,
    )

    def ours(layout: str = own) -> nn.Module:
        torch.manual_seed(0)
        network = UNet(sizes, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS)
        return network.to(device, memory_format=LAYOUTS[layout])

    networks: dict[str, nn.Module] = {layout: ours(layout) for layout in LAYOUTS}
    networks[CHECKPOINTING] = ours()
    set_memory(networks[CHECKPOINTING], "checkpoint")
    networks[DIFFUSERS] = same_of_diffusers(sizes, options.latent_size).to(device, memory_format=LAYOUTS[own])
    reason = "it was not wanted" if options.no_compile else why_not_compiled(device)
    if reason:
        left_out[COMPILED] = reason
    else:
        networks[COMPILED] = ours()
        compile_blocks(networks[COMPILED])
    return networks, left_out


def same_of_diffusers(config: UNetConfig, latent_size: int) -> nn.Module:
    """UNet2DModel of the same channels, blocks, attention and modulation."""
    from diffusers import UNet2DModel

    widths = [config.channels * multiplier for multiplier in config.multipliers]
    plain = len(widths) - 1
    return UNet2DModel(
        sample_size=latent_size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=tuple(widths),
        layers_per_block=config.blocks_per_level,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        attention_head_dim=widths[-1] // HEADS,
        norm_num_groups=config.norm_groups,
        resnet_time_scale_shift="scale_shift",
    )


def why_not_compiled(device: torch.device) -> str:
    """What torch.compile lacks here; empty: nothing."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu":
        return "" if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and {compiler} is not here"
    from torch.utils._triton import has_triton

    return "" if has_triton() else "torch.compile needs triton, which is not here"


def make_step(side: str, network: nn.Module, options: argparse.Namespace, device: torch.device) -> Step:
    """One forward pass to a loss."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, LATENT_CHANNELS, options.latent_size, options.latent_size)
    latents, target = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    time = torch.rand(options.batch_size, generator=generator).to(device)
    nothing = Condition()

    def precision() -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16) if options.precision == "bf16" else nullcontext()

    def step() -> Tensor:
        with precision():
            velocity = network(latents, time * 1000).sample if side == DIFFUSERS else network(latents, time, nothing)
        return (velocity.float() - target).square().mean()

    return step


def peak_memory(step: Step, network: nn.Module, device: torch.device) -> int:
    """Bytes that a pass holds at most, above what was there before it; the gradients it leaves behind count."""
    network.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step().backward()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step().backward()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    network.zero_grad()
    return peak


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def print_table(results: dict[str, Any]) -> None:
    """A short table: one line per side."""
    shape, own = "x".join(map(str, results["latent_shape"])), results["layout_of_the_device"]
    counts = ", ".join(f"{side} {count / 1e6:.2f}M" for side, count in results["parameters"].items())
    print(f"{results['network']}, latents {shape}, batch {results['batch_size']}, {results['precision']}")
    print(f"parameters: {counts}; {results['rounds']} rounds\n")
    columns = ("images/s", "CPU time", f"x {own}", "middle half", "CPU time", "peak MiB")
    print(f"  {'':<24}" + "".join(f"{column:>14}" for column in columns))
    for side, speed in results["images_per_second"].items():
        ratio = results["times_as_fast"].get(side)
        cells = [f"{speed['wall']:.2f}", f"{speed['cpu']:.2f}", "", "", ""]
        if ratio:
            low, high = ratio["low"]["wall"], ratio["high"]["wall"]
            cells[2:] = [f"{ratio['median']['wall']:.2f}", f"{low:.2f}-{high:.2f}", f"{ratio['median']['cpu']:.2f}"]
        peak = results["peak_memory_mib"].get(side)
        cells.append("" if peak is None else f"{peak:.0f}")
        print(f"  {side:<24}" + "".join(f"{cell:>14}" for cell in cells))
    for side, reason in results["left_out"].items():
        print(f"  {side:<24}left out: {reason}")


if __name__ == "__main__":
    main()
