"""A whole training step with AdamW, with Muon, and with Muon orthogonalising every second step.

The sides take turns, two steps each per round, with the same network, batch and precision; a step is the forward and
the backward pass, clipping and the update. The figure to keep is a ratio, the median over the rounds of (seconds of a
side / seconds of AdamW). Next to it is the arithmetic of the same sizes: 1 + operations of orthogonalisation per
step / operations of forward and backward pass, both of the matrices alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import measuring
import torch
from measuring import median_and_quartiles, take_turns

from latentflow.networks.dit import DiT, DiTConfig
from latentflow.runtime import open_runtime
from latentflow.shapes import Condition
from latentflow.training.muon import hidden_matrices, orthogonalisation_flops
from latentflow.training.optim import OptimizerConfig, build_optimizer, clip_gradients, prepare_step

SIDES = {
    "AdamW": OptimizerConfig(),
    "Muon": OptimizerConfig(kind="muon"),
    "Muon, every 2nd": OptimizerConfig(kind="muon", orthogonalise_every=2),
}
LATENT_CHANNELS, STEPS_PER_ROUND = 4, 2
DEFAULTS = {
    "cpu": {"depth": 8, "hidden_size": 256, "patch_size": 2, "latent_size": 8, "batch_size": 128, "rounds": 6},
    "cuda": {"depth": 12, "hidden_size": 768, "patch_size": 2, "latent_size": 32, "batch_size": 128, "rounds": 30},
}
"""A small network for latents of 8 x 8, and DiT-B/2 at 256 pixels."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    for name in DEFAULTS["cpu"]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--results", default=measuring.RESULTS, help="folder of the JSON file")
    options = measuring.parsed(parser, DEFAULTS, arguments)
    device = torch.device(options.device)
    results = measure(options, device)
    print_table(results)
    measuring.write_results("optimizer", device, results, options.results)
    return results


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All sides in turn; the first round warms up."""
    steps = {side: make_step(config, options, device) for side, config in SIDES.items()}

    def in_round(step: Callable[[int], None], number: int) -> None:
        for place in range(STEPS_PER_ROUND):
            step(STEPS_PER_ROUND * number + place)

    sides = {side: partial(in_round, step) for side, step in steps.items()}
    taken = {side: all_steps / STEPS_PER_ROUND for side, all_steps in take_turns(sides, device, options.rounds).items()}
    network = make_network(options)
    tokens = options.batch_size * (options.latent_size // options.patch_size) ** 2
    matrices = hidden_matrices(network)
    passes = 6 * tokens * sum(matrix.weight.numel() for matrix in matrices)  # three products of 2 operations per weight
    return {
        "network": network.config.title,
        "tokens": tokens,
        "rounds": options.rounds,
        "seconds_per_step": {side: median_and_quartiles(one) for side, one in taken.items()},
        "times_as_long": {
            side: median_and_quartiles(one / taken["AdamW"]) for side, one in taken.items() if side != "AdamW"
        },
        "by_arithmetic": {
            side: 1 + orthogonalisation_flops(matrices, config.orthogonalise_every) / passes
            for side, config in SIDES.items()
            if side != "AdamW"
        },
    }


def make_network(options: argparse.Namespace) -> DiT:
    torch.manual_seed(0)
    sizes = {"depth": options.depth, "hidden_size": options.hidden_size, "patch_size": options.patch_size}
    config = DiTConfig(**sizes, num_heads=max(options.hidden_size // 64, 1), variant="modern")
    return DiT(config, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS)


def make_step(config: OptimizerConfig, options: argparse.Namespace, device: torch.device) -> Callable[[int], None]:
    """One whole step, given its number."""
    runtime, network = open_runtime(device, alone=True), make_network(options).to(device)
    optimizer, parameters = build_optimizer(network, config), list(network.parameters())
    shape = (options.batch_size, LATENT_CHANNELS, options.latent_size, options.latent_size)
    latents, target, time = (torch.randn(size, device=device) for size in (shape, shape, shape[:1]))

    def step(number: int) -> None:
        prepare_step(optimizer, config, number, 1)
        with runtime.autocast():
            velocity = network(latents, time, Condition())
        (velocity - target).square().mean().backward()
        clip_gradients(parameters, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def print_table(results: dict[str, Any]) -> None:
    """A short table: one line per side."""
    print(f"{results['network']}, {results['tokens']:,} tokens a step, {results['rounds']} rounds\n")
    columns = ("ms a step", "x AdamW", "middle half", "CPU time", "arithmetic")
    print(f"  {'':<18}" + "".join(f"{column:>14}" for column in columns))
    for side, step in results["seconds_per_step"].items():
        cells, ratio = [f"{1000 * step['median']['wall']:.0f}"], results["times_as_long"].get(side)
        if ratio:
            middle = f"{ratio['low']['wall']:.2f}-{ratio['high']['wall']:.2f}"
            cells += [f"{ratio['median']['wall']:.2f}", middle, f"{ratio['median']['cpu']:.2f}"]
            cells.append(f"{results['by_arithmetic'][side]:.2f}")
        print(f"  {side:<18}" + "".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
