"""The share of a training step and of a sampling step that is not the network itself.

The real training loop runs here, and before each of its steps the bare network goes forward and backward on the same
shapes; the real solver runs with guidance, and before each of its steps the bare network is called as often. So what
is compared lies seconds apart. Two figures come out:

    by difference    1 - bare network / whole step, the median over the steps; as noisy as the machine
    by part          what was spent outside the network's calls, each part timed on its own; steadier, and it says where

Then the loop runs twice more with a network that does next to nothing: what is left of a step is what the main thread
does between two calls of the network. At a large batch (--large-batch) a CPU computes noise and mixes it; with one
image a step there is next to nothing to compute, and what is left is what a device would have to wait for.

Keys of the recipe may be changed: overhead.py training.batch_size=8 'network={name: DiT-B/4}'
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import measuring
import numpy as np
import torch
from measuring import REST, Enough, Lap, Stopwatch, by_clock, median_and_quartiles, seconds
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from latentflow.data.batches import TrainingImages
from latentflow.data.cache.reader import LatentCache
from latentflow.data.cache.writer import write_cache
from latentflow.data.request import CacheOptions
from latentflow.data.sources.images import open_images
from latentflow.flow.guidance import ConditionedVelocity
from latentflow.flow.solvers import SOLVERS, integrate
from latentflow.flow.times import TrainingTimes, sampling_times
from latentflow.model.conditioning import Conditioning
from latentflow.model.flow_model import FlowModel
from latentflow.networks.running import compile_blocks
from latentflow.randomness import ImageRandom
from latentflow.runtime import Runtime, open_runtime
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.pipeline import initial_noise
from latentflow.shapes import Condition
from latentflow.training import loop as loop_module
from latentflow.training import step as step_module
from latentflow.training.config import Recipe, load_recipe
from latentflow.training.ema import EMA
from latentflow.training.fitting import with_values
from latentflow.training.fresh_model import build_model
from latentflow.training.log import LossBins, RunLog
from latentflow.training.loop import FiniteGuard
from latentflow.training.velocity import train_velocity

NETWORK, BARE, PAUSE = "network", "bare network", "pause"
OPTIMIZER_PARTS = ("optimizer", "gradient clipping", "EMA")
TINY = "{depth: 2, hidden_size: 32, num_heads: 2, patch_size: 2}"
NUM_IMAGES = 64
GUIDANCE = 2.0


class Dummy(nn.Module):
    """Called as a velocity network is, and about nothing to compute."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.label = nn.Embedding(num_classes + 1, 1)

    def forward(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        embedding = self.label(condition.labels)[:, 0] + time
        return latents * self.weight + embedding[:, None, None, None]


@contextmanager
def between_steps(call: Callable[[], None]) -> Iterator[None]:
    """Call something after every update of the weights, wherever the loop makes it, until it raises `Enough`."""
    hook = register_optimizer_step_post_hook(lambda *_: call())
    try:
        with suppress(Enough):
            yield
            raise AssertionError("the recipe has fewer steps than are measured")
    finally:
        hook.remove()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--rounds", type=int, help="training steps measured, and half as many sampling steps")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--large-batch", type=int, default=256, help="images a step, with a network that does nothing")
    parser.add_argument("--solver", choices=("euler", "heun", "rk4"), default="heun")
    parser.add_argument("--results", default=measuring.RESULTS, help="folder of the JSON file")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="of the recipe")
    options = parser.parse_intermixed_args(arguments)
    measuring.setup(options.device, options.threads)
    rounds = options.rounds or (3 if options.quick else {"cpu": 8, "cuda": 40}[options.device])
    defaults = {
        "data.image_size": 32 if options.quick else 256,
        "network": TINY if options.quick else "{name: DiT-S/2}",
        "training.steps": 1_000_000_000,
        "training.batch_size": 2 if options.quick else 16,
        "training.precision": "fp32",
        "training.compile": "false",  # parts are timed where the loop calls them, which a graph does not
        "training.cuda_graph": "false",
        "training.log_every": min(50, rounds),
        "training.checkpoint_every": 1_000_000,
        "training.preview_every": 0,
    }
    recipe = load_recipe("own_images", measuring.overrides(defaults, options.changes))
    runtime = open_runtime(options.device, recipe.training.precision)
    device = runtime.device
    with tempfile.TemporaryDirectory() as folder:
        images, model = prepare(recipe, Path(folder))
        training = training_laps(recipe, images, model, Path(folder) / "run", runtime, rounds)
        idle = {}
        for name, size in (("main_thread", 4 if options.quick else options.large_batch), ("main_thread_alone", 1)):
            sized = with_values(recipe, {"training.batch_size": size})
            idle[name] = idle_steps(sized, images, model, Path(folder) / name, runtime, 5 * rounds)
    sampling = sampling_laps(recipe, model, runtime, options.solver, max(rounds // 2, 2))
    size, batch_size = "x".join(map(str, model.config.latent_shape)), recipe.training.batch_size
    results = {
        "network": recipe.network.model_dump(mode="json"),
        "setting": f"{recipe.network.name or 'DiT'}, latents {size}, batch {batch_size}, {recipe.training.precision}",
        "sampling_setting": f"{options.solver}, guidance {GUIDANCE:g}, decoder left out",
        "training": summary(training, OPTIMIZER_PARTS),
        "sampling": summary(sampling),
        **idle,
    }
    print(f"{results['setting']}, {options.device}, {torch.get_num_threads()} threads")
    print_table("training step", results["training"])
    print_table(f"sampling step ({results['sampling_setting']})", results["sampling"])
    for one in idle.values():
        print(f"\n{one['setting']}: {one['num_steps']} steps, median and middle half in ms")
        for clock in ("wall", "main_thread"):
            middle = " to ".join(f"{one['milliseconds'][name][clock]:.2f}" for name in ("low", "high"))
            print(f"  {clock.replace('_', ' '):<42}{one['milliseconds']['median'][clock]:>9.2f} ({middle})")
        for part, value in one["milliseconds_of_part"].items():
            print(f"    {part:<40}{value:>9.2f}")
    measuring.write_results("overhead", device, results, options.results)
    return results


def prepare(recipe: Recipe, folder: Path) -> tuple[TrainingImages, FlowModel]:
    """A cache with the latent shape of Stable Diffusion's autoencoder, and a model that has left its zeros.

    The gates of a fresh network are zero, and so close to zero are its first gradients that AdamW computes with
    denormal numbers, several times slower than ever after.
    """
    autoencoder = measuring.variational((8, 8, 8, 8), layers_per_block=1, name="a small stand-in")
    source = open_images(f"synthetic:{NUM_IMAGES}", recipe.data.image_size)
    write_cache(source, autoencoder, folder / "cache", CacheOptions(flips=True))
    images = TrainingImages(LatentCache(folder / "cache"), seed=0, flip=recipe.data.flip)
    model = build_model(recipe, autoencoder, images)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return images, model


def training_laps(
    recipe: Recipe, images: TrainingImages, model: FlowModel, run: Path, runtime: Runtime, rounds: int
) -> list[Lap]:
    """The parts of each step of the real loop, with a bare forward and backward pass before it."""
    device = runtime.device
    batch_size, num_classes = recipe.training.batch_size, model.config.conditioning.num_classes
    copied = copy.deepcopy(model.network).to(device).train().requires_grad_()
    if recipe.training.compile == "true":
        compile_blocks(copied)
    latents = torch.randn(batch_size, *model.config.latent_shape, device=device)
    times = torch.rand(batch_size, device=device)
    condition = Condition(torch.randint(num_classes, (batch_size,), device=device))
    stopwatch, laps = Stopwatch(device), []
    warm_up = warm_up_rounds(device)

    def before_step() -> None:
        laps.append(stopwatch.lap())
        if len(laps) > warm_up + rounds:
            raise Enough
        with stopwatch.part(BARE):
            with runtime.autocast():
                velocity = copied(latents, times, condition)
            torch.autograd.backward(velocity, torch.ones_like(velocity))
        with stopwatch.part(PAUSE):
            copied.zero_grad()
        stopwatch.fine = times_parts(device, len(laps))

    with between_steps(before_step), timed_parts(stopwatch, model.network):
        train_velocity(recipe, model, images, run, runtime)
    return laps[1 + warm_up :]


@contextmanager
def timed_parts(stopwatch: Stopwatch, network: nn.Module) -> Iterator[None]:
    """Time the parts of the training loop's steps."""
    with ExitStack() as patches:
        for owner, name, part in (
            (TrainingImages, "at", "reading"),
            (network, "forward", NETWORK),
            (Tensor, "backward", NETWORK),
            (loop_module, "clip_gradients", "gradient clipping"),
            (torch.optim.AdamW, "step", "optimizer"),
            (torch.optim.AdamW, "zero_grad", "optimizer"),
            (EMA, "update", "EMA"),
            (ImageRandom, "at", "randomness"),
            (ImageRandom, "ahead", "randomness"),
            (ImageRandom, "normal", "randomness"),
            (ImageRandom, "uniform", "randomness"),
            (TrainingTimes, "draw", "randomness"),
            (FlowModel, "latents", "latents and condition"),
            (Conditioning, "draw_dropped", "latents and condition"),
            (Conditioning, "build", "latents and condition"),
            (Conditioning, "drop", "latents and condition"),
            (step_module, "flow_matching_loss", "mixing and loss"),
            (FiniteGuard, "watch", "finite guard"),
            (FiniteGuard, "raise_if_bad", "finite guard"),
            (LossBins, "add", "log"),
            (LossBins, "means", "log"),
            (RunLog, "metrics", "log"),
            (RunLog, "advance", "log"),
        ):
            patches.enter_context(patch.object(owner, name, stopwatch.timed(part, getattr(owner, name))))
        yield


def idle_steps(
    recipe: Recipe, images: TrainingImages, model: FlowModel, run: Path, runtime: Runtime, rounds: int
) -> dict[str, Any]:
    """Milliseconds of a step with `Dummy` in the network's place; nobody waits for the device in between.

    On the CPU, where there is nobody else to do it, computing the noise and mixing it in are among them; with one
    image a step there is next to nothing to compute, and what is left is what a device would have to wait for.
    """
    warm_up = warm_up_rounds(runtime.device)
    light = FlowModel(model.config, Dummy(model.config.conditioning.num_classes), model.autoencoder)
    stopwatch, readings, laps = Stopwatch(torch.device("cpu")), [], []

    def read() -> None:
        readings.append((time.perf_counter(), time.thread_time()))
        laps.append(stopwatch.lap())
        if len(readings) > warm_up + rounds:
            raise Enough

    with between_steps(read), timed_parts(stopwatch, light.network):
        train_velocity(recipe, light, images, run, runtime)
    laps = laps[1 + warm_up :]
    parts = sorted({part for lap in laps for part in lap})
    return {
        "setting": f"batch {recipe.training.batch_size}, a network that does nothing",
        "num_steps": len(laps),
        "milliseconds": spread(np.diff(np.array(readings[warm_up:]), axis=0)),
        "milliseconds_of_part": {part: float(1e3 * np.median(seconds(laps, part)[:, 0])) for part in parts},
    }


def spread(laps: np.ndarray) -> dict[str, dict[str, float]]:
    """Median and middle half of [n, 2] seconds of the wall and of the main thread, in milliseconds."""
    return {
        name: dict(zip(("wall", "main_thread"), (1e3 * np.quantile(laps, q, axis=0)).tolist(), strict=True))
        for name, q in (("median", 0.5), ("low", 0.25), ("high", 0.75))
    }


@torch.inference_mode()
def sampling_laps(recipe: Recipe, model: FlowModel, runtime: Runtime, solver: str, rounds: int) -> list[Lap]:
    """The parts of each step of the real solver, with the bare network's calls before it."""
    network, device = model.to(runtime).network.eval(), runtime.device
    batch_size, conditioning = recipe.training.batch_size, model.config.conditioning
    noise = initial_noise(model, Drawing(seeds=range(batch_size)))
    labels = torch.arange(batch_size) % conditioning.num_classes
    condition = conditioning.build(noise.shape, device, Condition(labels=labels))
    null = conditioning.without(condition, ["label"])
    stopwatch, laps = Stopwatch(device), []
    warm_up = warm_up_rounds(device)
    doubled = (torch.cat([noise, noise]), torch.rand(2 * batch_size, device=device), condition.concatenate(null))

    def before_step() -> None:
        laps.append(stopwatch.lap())
        with stopwatch.part(BARE):
            for _ in SOLVERS[solver].nodes:
                with runtime.autocast():
                    network(*doubled)
        stopwatch.fine = times_parts(device, len(laps))

    velocity = ConditionedVelocity(stopwatch.timed(NETWORK, model.velocity), condition, null, GUIDANCE)
    before_step()
    integrate(
        stopwatch.timed("guidance", velocity),
        noise,
        sampling_times(warm_up + rounds),
        solver=solver,
        callback=lambda step, time, x: before_step(),
    )
    return laps[1 + warm_up :]


def warm_up_rounds(device: torch.device) -> int:
    """Steps that are not counted: in the first, buffers are allocated and kernels chosen."""
    return 10 if device.type == "cuda" else 1


def times_parts(device: torch.device, number: int) -> bool:
    """Whether step `number` is timed by part: on an accelerator, which then has to wait, only every second one."""
    return device.type == "cpu" or number % 2 == 0


def summary(laps: list[Lap], optimizer_parts: Sequence[str] = ()) -> dict[str, Any]:
    """The shares of a step: by difference from the undisturbed steps, by part from those that were timed by part."""
    fine = [lap for lap in laps if NETWORK in lap]
    undisturbed = [lap for lap in laps if NETWORK not in lap] or fine
    parts = sorted({part for lap in fine for part in lap} - {BARE, PAUSE, NETWORK, REST})
    inside = (NETWORK, *parts, REST)
    whole, bare = seconds(undisturbed, *inside), seconds(undisturbed, BARE)
    total = seconds(fine, *inside).sum(0)
    share = {part: seconds(fine, part).sum(0) / total for part in (*parts, REST)}
    others = [part for part in share if part not in optimizer_parts]
    return {
        "num_steps": len(undisturbed),
        "seconds_per_step": median_and_quartiles(whole)["median"],
        "seconds_of_bare_network": median_and_quartiles(bare)["median"],
        "not_network_by_difference": median_and_quartiles(1 - bare / whole),
        "not_network_by_part": by_clock(sum(share.values())),
        "optimizer_clipping_ema": by_clock(sum((share[part] for part in optimizer_parts), 0 * total)),
        "everything_but_these": by_clock(sum(share[part] for part in others)),
        "milliseconds_outside_the_network": by_clock(1e3 * seconds(fine, *parts, REST).mean(0)),
        "milliseconds_of_part": {part: by_clock(1e3 * seconds(fine, part).mean(0)) for part in share},
        "share_of_part": {part: by_clock(value) for part, value in share.items()},
    }


def print_table(title: str, figures: dict[str, Any]) -> None:
    """A short table: one column per clock."""

    def row(name: str, values: dict[str, float], form: str) -> None:
        print(f"  {name:<42}" + "".join(f"{form.format(values[clock]):>12}" for clock in measuring.CLOCKS))

    print(f"\n{title}, {figures['num_steps']} steps")
    row("", dict(zip(measuring.CLOCKS, ("wall", "CPU time"), strict=True)), "{}")
    row("whole step", figures["seconds_per_step"], "{:.4g} s")
    row("bare network", figures["seconds_of_bare_network"], "{:.4g} s")
    difference = figures["not_network_by_difference"]
    row("not the network, by difference", difference["median"], "{:.2%}")
    row("    middle half of the steps, from", difference["low"], "{:.2%}")
    row("    to", difference["high"], "{:.2%}")
    row("not the network, by part", figures["not_network_by_part"], "{:.2%}")
    row("    in milliseconds", figures["milliseconds_outside_the_network"], "{:.2f} ms")
    if any(figures["optimizer_clipping_ema"].values()):
        row("    optimizer, clipping and EMA", figures["optimizer_clipping_ema"], "{:.2%}")
        row("    everything else", figures["everything_but_these"], "{:.2%}")
    for part, values in figures["milliseconds_of_part"].items():
        row(part, values, "{:.2f} ms")


if __name__ == "__main__":
    main()
