"""Forward and backward pass of a transformer: what value residual and a head for training cost in time and memory.

The sides take turns, one pass each per round, with the same weights, latents and times:

    plain              8 blocks of 256 channels on 16 tokens, on CUDA DiT-B/2 at 256 pixels
    value residual     its later blocks mix their values with those of the first
    head               a head predicts the clean latents from the tokens after block 2
    both

The figure to keep is a ratio, the median over the rounds of (seconds of the side / seconds of the plain network).
Next to it is the same ratio of the operations of products. Memory per image is what `latentflow plan` states.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import measuring
import torch
from measuring import median_and_quartiles, take_turns
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latentflow.flow.loss import align_loss
from latentflow.networks.align_head import add_align_head
from latentflow.networks.dit import DiT, DiTConfig
from latentflow.networks.running import compile_blocks
from latentflow.runtime import open_runtime
from latentflow.shapes import Condition, image_mean
from latentflow.training.memory import bytes_per_image

PLAIN = "plain"
SIDES = {PLAIN: (False, False), "value residual": (True, False), "head": (False, True), "both": (True, True)}
"""Of each side whether it has the value residual, and whether it has the head."""
LATENT_CHANNELS, BLOCK = 4, 2
DEFAULTS = {
    "cpu": {"depth": 8, "hidden_size": 256, "patch_size": 2, "latent_size": 8, "batch_size": 128, "rounds": 12},
    "cuda": {"depth": 12, "hidden_size": 768, "patch_size": 2, "latent_size": 32, "batch_size": 128, "rounds": 50},
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    for name in DEFAULTS["cpu"]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--results", default=measuring.RESULTS, help="folder of the JSON file")
    options = measuring.parsed(parser, DEFAULTS, arguments)
    device = torch.device(options.device)
    results = measure(options, device)
    print_table(results)
    measuring.write_results("transformer", device, results, options.results)
    return results


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All sides in turn; the first round warms up, and is where blocks are compiled."""
    networks = {side: make_network(options, side).to(device) for side in SIDES}
    steps = {side: make_step(network, options, device) for side, network in networks.items()}
    operations = {side: count_operations(step) for side, step in steps.items()}
    if options.compile:
        for network in networks.values():
            compile_blocks(network)

    def there_and_back(side: str, number: int) -> None:
        steps[side]().backward()
        networks[side].zero_grad()

    taken = take_turns({side: partial(there_and_back, side) for side in steps}, device, options.rounds)
    half = open_runtime(device, alone=True).precision in ("bf16", "fp16")
    return {
        "network": make_config(options, PLAIN).title,
        "tokens": options.batch_size * (options.latent_size // options.patch_size) ** 2,
        "rounds": options.rounds,
        "compiled": options.compile,
        "parameters": {side: sum(p.numel() for p in network.parameters()) for side, network in networks.items()},
        "bytes_per_image": {
            side: bytes_per_image(make_config(options, side), options.latent_size, half=half, aligned=has_head)
            for side, (_, has_head) in SIDES.items()
        },
        "seconds_per_pass": {side: median_and_quartiles(one) for side, one in taken.items()},
        "times_as_long": {side: median_and_quartiles(one / taken[PLAIN]) for side, one in taken.items()},
        "times_the_operations": {side: count / operations[PLAIN] for side, count in operations.items()},
    }


def make_config(options: argparse.Namespace, side: str) -> DiTConfig:
    sizes = {"depth": options.depth, "hidden_size": options.hidden_size, "patch_size": options.patch_size}
    heads = max(options.hidden_size // 64, 1)
    return DiTConfig(**sizes, num_heads=heads, variant="modern", value_residual=SIDES[side][0])


def make_network(options: argparse.Namespace, side: str) -> nn.Module:
    torch.manual_seed(0)
    network = DiT(make_config(options, side), in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS)
    return add_align_head(network, BLOCK, seed=0) if SIDES[side][1] else network


def make_step(network: nn.Module, options: argparse.Namespace, device: torch.device) -> Callable[[], Tensor]:
    """Computes the loss of one batch, its graph still there."""
    runtime, shape = open_runtime(device, alone=True), [LATENT_CHANNELS, *[options.latent_size] * 2]
    latents, data = (torch.randn(options.batch_size, *shape, device=device) for _ in range(2))
    time = torch.rand(options.batch_size, device=device)

    def step() -> Tensor:
        with runtime.autocast():
            found = network(latents, time, Condition())
        velocity, predicted = found if isinstance(found, tuple) else (found, None)
        loss = image_mean((velocity - data).square())
        return (loss if predicted is None else loss + align_loss(predicted, data)).mean()

    return step


def count_operations(step: Callable[[], Tensor]) -> int:
    """Operations of the products of a pass: 2 for each multiply-add."""
    with FlopCounterMode(display=False) as counter:
        step().backward()
    return counter.get_total_flops()


def print_table(results: dict[str, Any]) -> None:
    """A short table: one line per side."""
    print(f"{results['network']}, {results['tokens']:,} tokens a pass, {results['rounds']} rounds\n")
    columns = ("ms a pass", "x plain", "middle half", "CPU time", "operations", "KiB an image")
    print(f"  {'':<16}" + "".join(f"{column:>14}" for column in columns))
    for side, ratio in results["times_as_long"].items():
        cells = [
            f"{1000 * results['seconds_per_pass'][side]['median']['wall']:.0f}",
            f"{ratio['median']['wall']:.3f}",
            f"{ratio['low']['wall']:.3f}-{ratio['high']['wall']:.3f}",
            f"{ratio['median']['cpu']:.3f}",
            f"{results['times_the_operations'][side]:.3f}",
            f"{results['bytes_per_image'][side] / 1024:,.0f}",
        ]
        print(f"  {side:<16}" + "".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
