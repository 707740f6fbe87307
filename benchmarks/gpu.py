"""One part of the benchmark of a whole machine, or the table of all of them; `gpu.sh` runs one after another.

    python benchmarks/gpu.py train-s2 --device cuda --work /tmp/work
    python benchmarks/gpu.py table --device cuda

Every part is a process of its own and writes `results/gpu_PART-DEVICE.json`. The product is run by its command line, in
this process, so that its memory and its first step can be seen; what it is compared with stands in `plain.py`.
`--quick` makes everything tiny, to see that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import plain
import torch
import typer
import yaml
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from latentflow import LatentFlow
from latentflow.artifacts import make_folder, read_json
from latentflow.autoencoder import Autoencoder, LatentNormalisation, to_uint8
from latentflow.cli import app
from latentflow.data.cache.writer import write_cache
from latentflow.data.request import CacheOptions
from latentflow.data.sources.images import open_images
from latentflow.model.conditioning import Conditioning
from latentflow.model.config import AutoencoderRecord, ModelConfig
from latentflow.networks.dit import DiTConfig
from latentflow.networks.running import compile_blocks, set_memory
from latentflow.runtime import open_runtime
from latentflow.shapes import Condition
from latentflow.training.log import read_metrics
from latentflow.training.memory import forward_flops, memory_mode

NUM_CLASSES = 12
"""Of the built-in images."""


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: torch.device
    quick: bool
    work: Path
    autoencoder: str

    @property
    def half(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds(self) -> float:
        """That a speed is measured for."""
        return 0.3 if self.quick else 6.0

    def network(self, name: str, variant: str) -> DiTConfig:
        if self.quick:
            return DiTConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, variant=variant)
        return DiTConfig(name=name, variant=variant)

    def batch(self, size: int) -> int:
        return 4 if self.quick else size


@dataclass(frozen=True)
class Workload:
    """A network on latents of one size."""

    network: str
    side: int
    batch_size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (4, self.side, self.side)


S2, XL2, S1 = Workload("DiT-S/2", 32, 256), Workload("DiT-XL/2", 32, 128), Workload("DiT-S/1", 8, 512)


class Enough(BaseException):
    """Leaves a training loop when enough was measured: its own end would write a checkpoint."""


class StepClock:
    """Counts a training loop's steps from outside, by the hooks that torch's optimizers have.

    The device is waited for after the first step, after `warm_up` steps and at the end; in between nothing is added to
    the loop but a look at the clock.
    """

    def __init__(self, device: torch.device, *, seconds: float, warm_up: int = 12):
        self.device, self.seconds, self.warm_up = device, seconds, warm_up
        self.steps, self.made, self.first, self.began, self.ended = 0, 0.0, 0.0, 0.0, 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the steps made inside, until there were enough."""
        make = torch.optim.AdamW.__init__
        clock = self

        def made(optimizer: torch.optim.AdamW, *args: Any, **kwargs: Any) -> None:
            make(optimizer, *args, **kwargs)
            clock.made = time.perf_counter()

        torch.optim.AdamW.__init__ = made
        handle = register_optimizer_step_post_hook(lambda *_: self._count())
        try:
            with contextlib.suppress(Enough):
                yield
        finally:
            torch.optim.AdamW.__init__ = make
            handle.remove()

    def _count(self) -> None:
        self.steps += 1
        now = time.perf_counter()
        ends = self.steps > self.warm_up and now - self.began > self.seconds
        if self.steps in (1, self.warm_up) or ends:
            plain.wait(self.device)
            now = time.perf_counter()
            if self.steps == 1:
                self.first = now
            if self.steps == self.warm_up:
                self.began = now
            if ends:
                self.ended = now
                raise Enough

    def steps_per_second(self) -> float:
        if not self.ended:
            raise RuntimeError(f"only {self.steps} steps were made")
        return (self.steps - self.warm_up) / (self.ended - self.began)


def verb(*args: object) -> str:
    """What a verb of the command line prints, run in this process."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        typer.main.get_command(app)([str(arg) for arg in args], standalone_mode=False)
    return printed.getvalue()


def latents_as_images(setting: Setting, side: int) -> Path:
    """A cache of 4 x side x side latents, 12 classes: their encoder keeps the size, so small pictures do."""
    folder, autoencoder = setting.work / f"cache{side}", setting.work / "same_size"
    if not (folder / "index.json").exists():
        stand_in = measuring.variational((8,), layers_per_block=1, name="same size")
        if not autoencoder.exists():
            stand_in.save_pretrained(autoencoder)
        source = open_images(f"synthetic:{64 if setting.quick else 6000}", side)
        write_cache(
            source, Autoencoder.from_pretrained(autoencoder).to(setting.device), folder, CacheOptions(batch_size=512)
        )
    return folder


def train(setting: Setting, load: Workload, **training: Any) -> dict[str, Any]:
    """Speed and memory of `latentflow train`, previews and checkpoints left out."""
    cache = latents_as_images(setting, load.side)
    network = setting.network(load.network, "modern")
    batch_size = setting.batch(load.batch_size)
    values = {"steps": 10**6, "batch_size": batch_size, "checkpoint_every": 10**6, "preview_every": 0}
    values |= {"compile": not setting.quick, "precision": "bf16" if setting.half else "fp32"}
    recipe = {
        "data": {"path": str(cache), "image_size": load.side, "flip": False},
        "autoencoder": str(setting.work / "same_size"),
        "network": {key: value for key, value in network.model_dump(mode="json").items() if value is not None},
        "training": {**values, **training},
    }
    name = f"{load.network.replace('/', '_')}_{os.getpid()}"
    file = setting.work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    rates = peak_rates(setting)
    clock, began = StepClock(setting.device, seconds=setting.seconds, warm_up=2 if setting.quick else 12), time.time()
    called = time.perf_counter()
    with clock.running():
        verb("train", file, f"out={setting.work / name}", "--device", setting.device.type)
    steps = clock.steps_per_second()
    return {
        **described(setting, load, network, steps * batch_size, rates),
        "seconds_before_the_loop": clock.made - called,
        "seconds_to_first_step": clock.first - clock.made,
        "seconds_in_all": time.time() - began,
        "steps": clock.steps,
        "recipe": recipe["training"],
    }


def bare(setting: Setting, load: Workload, variant: str) -> dict[str, Any]:
    """The same of a bare network in a plain loop, compiled by block, and saving as much memory as the product would."""
    rates = peak_rates(setting)
    config, batch_size = setting.network(load.network, variant), setting.batch(load.batch_size)
    network = plain.bare_network(config, load.shape, NUM_CLASSES)
    runtime = open_runtime(setting.device.type, "bf16" if setting.half else "fp32")
    mode = memory_mode("auto", model_config(config, load.shape), batch_size, runtime)
    set_memory(network, mode)
    if not setting.quick:
        compile_blocks(network)
    found = plain.training_rate(
        network,
        load.shape,
        batch_size=batch_size,
        num_classes=NUM_CLASSES,
        device=setting.device,
        half=setting.half,
        seconds=setting.seconds,
    )
    return {**found, "memory": mode, **described(setting, load, config, found["images_per_second"], rates)}


def described(
    setting: Setting, load: Workload, config: DiTConfig, rate: float, peaks: dict[str, float | None]
) -> dict[str, Any]:
    """A speed with what it means for the machine; 3 times the way forward is forward and backward."""
    flops = 3 * forward_flops(model_config(config, load.shape)) * rate
    cuda = setting.device.type == "cuda"
    gib = torch.cuda.max_memory_allocated(setting.device) / 2**30 if cuda else None
    reserved = torch.cuda.max_memory_reserved(setting.device) / 2**30 if cuda else None
    shape = "x".join(map(str, load.shape))
    return {
        "setting": f"{config.title} {config.variant}, latents {shape}, batch {setting.batch(load.batch_size)}",
        "images_per_second": rate,
        "gib": gib,
        "gib_reserved": reserved,
        "flops_per_second": flops,
        "mfu": {name: flops / peak for name, peak in peaks.items() if peak},
        "peak_flops_per_second": peaks,
    }


def peak_rates(setting: Setting) -> dict[str, float | None]:
    """What the device does at most, measured and as its maker states it; memory is as if nothing had been."""
    measured = plain.matmul_rate(setting.device, 256 if setting.quick else 8192)
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
    return {"measured": measured, "nominal": plain.nominal_rate(setting.device)}


def model_config(network: DiTConfig, shape: Sequence[int], autoencoder: Autoencoder | None = None) -> ModelConfig:
    """What a model of a network says of itself; without an autoencoder pixels are latents."""
    stage = AutoencoderRecord(reference="a/none", content_hash="0" * 64, factor=1, num_channels=shape[0])
    normalisation = LatentNormalisation(shift=[0.0] * shape[0], scale=[1.0] * shape[0])
    return ModelConfig(
        image_size=shape[-1] * (autoencoder.factor if autoencoder else 1),
        network=network,
        conditioning=Conditioning(class_names=[f"class {number}" for number in range(NUM_CLASSES)]),
        autoencoder=AutoencoderRecord.of(autoencoder) if autoencoder else stage,
        normalisation=autoencoder.normalisation if autoencoder else normalisation,
    )


def sampling(setting: Setting) -> dict[str, Any]:
    """The sampler against a plain loop with the same weights: Heun, 25 steps, guidance 1, decoding included.

    By `latentflow sample`, which also writes the pictures, and from Python, which holds them in memory as loops do.
    """
    num, batch_size, steps = (8, 4, 2) if setting.quick else (3000, 500, 25)
    autoencoder = Autoencoder.from_pretrained(setting.autoencoder)
    network = setting.network("DiT-S/1", "modern")
    config = model_config(network, (autoencoder.num_channels, 8, 8), autoencoder)
    flow = LatentFlow(config, plain.bare_network(network, config.latent_shape, NUM_CLASSES).eval(), autoencoder)
    folder = setting.work / f"model_{os.getpid()}"
    flow.save_pretrained(folder)
    asked = ["--num", num, "--batch-size", batch_size, "--solver", "heun", "--steps", steps, "--guidance", 1]
    results: dict[str, Any] = {"setting": f"{network.title} modern, {num} images, Heun {steps}, batch {batch_size}"}
    for run in ("cold", "warm"):
        began = time.perf_counter()
        out = folder.with_name(f"{folder.name}_{run}")
        found = json.loads(verb("sample", folder, *asked, "--out", out, "--json", "--device", setting.device.type))
        results[f"verb_{run}"] = {"seconds_in_all": time.perf_counter() - began, "seconds": found["seconds"]}
    flow = LatentFlow.from_pretrained(folder, device=setting.device)
    for run in ("cold", "warm"):
        began = time.perf_counter()
        flow.sample(num=num, batch_size=batch_size, solver="heun", steps=steps, guidance=1.0, seed=0).pixels.cpu()
        results[f"python_{run}"] = {"seconds": time.perf_counter() - began}
    flow.autoencoder.slice_size = batch_size
    for way in ("eager", "compiled"):
        net = flow.network.eval().requires_grad_(False)
        if way == "compiled" and not setting.quick:
            compile_blocks(net)
        for run in ("cold", "warm"):
            plain.wait(setting.device)
            began = time.perf_counter()
            for start in range(0, num, batch_size):
                labels = torch.arange(start, start + batch_size, device=setting.device) % NUM_CLASSES
                noise = torch.randn(batch_size, *config.latent_shape, device=setting.device)

                def velocity(x: torch.Tensor, t: torch.Tensor, net=net, labels=labels) -> torch.Tensor:
                    with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.half):
                        return net(x, t, Condition(labels))

                to_uint8(flow.decode(plain.heun(velocity, noise, steps))).cpu()
            results[f"plain_{way}_{run}"] = {"seconds": time.perf_counter() - began}
    return results


def encoding(setting: Setting) -> dict[str, Any]:
    """`latentflow encode` of a folder of small JPEGs to 64 pixels."""
    images = folder_of_jpegs(setting, 24 if setting.quick else 20_000)
    began = time.perf_counter()
    asked = ["--autoencoder", setting.autoencoder, "--image-size", 64, "--batch-size", 4 if setting.quick else 256]
    out = setting.work / f"encoded_{os.getpid()}"
    found = json.loads(verb("encode", images, *asked, "--out", out, "--json", "--device", setting.device.type))
    seconds = time.perf_counter() - began
    return {
        "setting": f"{found['images']} JPEGs of 72 pixels to 64, {Path(setting.autoencoder).name}",
        "images_per_second": found["images"] / seconds,
        "seconds": seconds,
        "seconds_told": found["seconds"],
        "cores": os.cpu_count(),
    }


def judging(setting: Setting) -> dict[str, Any]:
    """`latentflow train-features` on such JPEGs at 32 pixels: the speed of its steps, and all that is around them."""
    num, steps, batch_size = (300, 80, 8) if setting.quick else (20_000, 1000, 256)
    images, out = folder_of_jpegs(setting, num), setting.work / f"judge_{os.getpid()}"
    asked = ["--image-size", 32, "--steps", steps, "--batch-size", batch_size, *(["--width", 8] * setting.quick)]
    began = time.perf_counter()
    verb("train-features", images, *asked, "--out", out, "--device", setting.device.type)
    seconds = time.perf_counter() - began
    speeds = [line["images_per_second"] for line in read_metrics(out)[1:]]  # the first has the start
    return {
        "setting": f"{num} JPEGs of 72 pixels to 32, {steps} steps of {batch_size}",
        "images_per_second": statistics.median(speeds),
        "seconds": seconds,
        "seconds_around_the_steps": seconds - steps * batch_size / statistics.median(speeds),
        "cores": os.cpu_count(),
    }


def folder_of_jpegs(setting: Setting, num: int) -> Path:
    """A folder of so many pictures in classes."""
    images = setting.work / f"jpegs{num}"
    for label in range(NUM_CLASSES):
        (images / f"class{label}").mkdir(parents=True, exist_ok=True)
    jobs = [(images, start, min(start + 500, num)) for start in range(0, num, 500)]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), get_context("fork")) as pool:
        list(pool.map(write_jpegs, *zip(*jobs, strict=True)))
    return images


def write_jpegs(folder: Path, start: int, end: int) -> None:
    """Pictures of soft noise, class after class; a class has a colour."""
    for number in range(start, end):
        label = number % NUM_CLASSES
        colour = np.random.default_rng(label).integers(0, 128, 3, dtype=np.uint8)
        coarse = colour + np.random.default_rng(number).integers(0, 128, (9, 9, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((72, 72), Image.Resampling.BICUBIC)
        picture.save(folder / f"class{label}" / f"{number}.jpg", quality=90)


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "train-s2": lambda setting: train(setting, S2),
    "bare-s2": lambda setting: bare(setting, S2, "modern"),
    "classic-s2": lambda setting: bare(setting, S2, "classic"),
    "train-xl2": lambda setting: train(setting, XL2),
    "bare-xl2": lambda setting: bare(setting, XL2, "modern"),
    "train-s1": lambda setting: train(setting, S1),
    "bare-s1": lambda setting: bare(setting, S1, "modern"),
    "classic-s1": lambda setting: bare(setting, S1, "classic"),
    "sample": sampling,
    "encode": encoding,
    "judge": judging,
}


def table(results: Path, device: str) -> list[str]:
    """All that was measured, a line each, and what was aimed at."""
    files = {name: results / f"gpu_{name.replace('-', '_')}-{device}.json" for name in PARTS}
    files["overhead"] = results / f"overhead-{device}.json"
    found = {name: read_json(file) for name, file in files.items() if file.exists()}
    lines = []
    if found:
        machine = next(iter(found.values()))["machine"]
        lines += [f"{machine['device']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}", ""]
    form = "{:<12} {:>12} {:>7} {:>9} {:>9} {:>10}  {}".format
    lines += [form("training", "images/s", "GiB", "MFU", "nominal", "first step", "")]
    for name, one in found.items():
        if "mfu" in one:
            mfu = [f"{one['mfu'][kind]:.1%}" if kind in one["mfu"] else "-" for kind in ("measured", "nominal")]
            gib = "-" if one["gib"] is None else f"{one['gib']:.1f}"
            first = f"{one['seconds_to_first_step']:.1f} s"
            lines.append(form(name, f"{one['images_per_second']:,.0f}", gib, *mfu, first, one["setting"]))
    if "sample" in found:
        lines += ["", f"sampling: {found['sample']['setting']}"]
        for name, value in found["sample"].items():
            if isinstance(value, dict) and "seconds" in value:
                whole = f", {value['seconds_in_all']:.1f} s with all around" if "seconds_in_all" in value else ""
                lines.append(f"  {name.replace('_', ' '):<22} {value['seconds']:>8.2f} s{whole}")
    if "encode" in found:
        one = found["encode"]
        lines += ["", f"encode: {one['setting']}: {one['images_per_second']:,.0f} images/s, {one['seconds']:.1f} s"]
    if "judge" in found:
        one = found["judge"]
        around = f"{one['seconds_around_the_steps']:.1f} s around the steps"
        lines += ["", f"train-features: {one['setting']}: {one['images_per_second']:,.0f} images/s, {around}"]
    if "main_thread" in found.get("overhead", {}):
        one = found["overhead"]["main_thread"]
        middle = one["milliseconds"]["median"]
        lines += ["", f"main thread, {one['setting']}: {middle['wall']:.2f} ms a step"]
    if any(one.get("quick") for one in found.values()):
        lines += ["", "Everything was tiny: these numbers mean nothing."]
    else:
        lines += ["", *goals(found)]
    missing = [name for name in files if name not in found]
    return [*lines, *([f"not measured: {', '.join(missing)}"] if missing else [])]


def goals(found: dict[str, dict[str, Any]]) -> list[str]:
    """What was aimed at, with what it came to."""

    def ratio(one: str, other: str) -> float | None:
        both = one in found and other in found
        return found[one]["images_per_second"] / found[other]["images_per_second"] if both else None

    drawn, large = found.get("sample"), found.get("train-xl2", {})
    judged = [
        ("loop : its bare compiled network, S/2", ratio("train-s2", "bare-s2"), 0.97),
        ("compiled modern : compiled classic, S/2", ratio("bare-s2", "classic-s2"), 1.0),
        ("loop : its bare compiled network, XL/2", ratio("train-xl2", "bare-xl2"), 0.97),
        ("loop : its bare compiled network, S/1", ratio("train-s1", "bare-s1"), 0.97),
        ("DiT-XL/2, batch 128: share of 60 GiB", (large["gib"] / 60 if large.get("gib") else None), -1.0),
        ("DiT-XL/2, batch 128: MFU of the measured peak", large.get("mfu", {}).get("measured"), 0.45),
        ("DiT-XL/2: share of 30 s until the first step", share_of(large.get("seconds_to_first_step"), 30), -1.0),
        (
            "plain loop's seconds : sampler's",
            drawn and drawn["plain_eager_warm"]["seconds"] / drawn["python_warm"]["seconds"],
            0.95,
        ),
    ]
    lines = []
    for what, value, least in judged:
        if value is not None:
            reached = value >= least if least > 0 else value <= -least
            aim = f"at least {least:g}" if least > 0 else f"at most {-least:g}"
            lines.append(f"{'reached' if reached else 'MISSED ':<8} {value:>7.3f}, {aim}: {what}")
    return lines


def share_of(value: float | None, most: float) -> float | None:
    return None if value is None else value / most


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure one part and write it, or print the table; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "table"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--autoencoder", default="shapes", help="of sampling and encoding: a folder, such as TAESD's")
    parser.add_argument("--work", type=Path, default=Path("/tmp/latentflow_benchmark"), help="folder for what is made")
    parser.add_argument("--results", type=Path, default=measuring.RESULTS, help="folder of the JSON files")
    options = parser.parse_args(arguments)
    if options.part == "table":
        print("\n".join(table(options.results, options.device)))
        return {}
    measuring.setup(options.device, None)
    device = torch.device(options.device)
    setting = Setting(device, options.quick, make_folder(options.work), options.autoencoder)
    results = {**PARTS[options.part](setting), "quick": options.quick}
    print(json.dumps(results, indent=1))
    measuring.write_results(f"gpu_{options.part.replace('-', '_')}", device, results, options.results)
    return results


if __name__ == "__main__":
    main()
