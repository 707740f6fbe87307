"""Training images per second from a latent cache, against encoding in the loop.

Same images in the same order, same recipe, same network, same loop: the real training loop runs, and takes its batches
in turn from the cache and from the image files, which it then encodes in the step. The figure to keep is the median
over the rounds of (seconds of the encoding steps / seconds of the cached steps): other load on the machine meets both.

With --holes it is an inpainting model that is trained, latents come from the cache on both sides, and the two sides are
the images without their holes: stored in the cache, or cut anew and encoded in the step.

Keys of the recipe may be changed: training_throughput.py 'network={name: DiT-S/2}' training.batch_size=16
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import REST, Enough, Lap, Stopwatch, by_clock, median_and_quartiles, seconds
from PIL import Image

from latentflow.autoencoder import Autoencoder
from latentflow.data.batches import Batch, SpatialData, StreamPositions, TrainingImages, stream_batches
from latentflow.data.cache.reader import LatentCache
from latentflow.data.cache.writer import write_cache
from latentflow.data.request import CacheOptions
from latentflow.data.sources.images import open_images
from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.runtime import open_runtime
from latentflow.sizes import Size
from latentflow.training.config import load_recipe
from latentflow.training.fresh_model import build_model
from latentflow.training.velocity import train_velocity

CACHED, ENCODING = "latent cache", "encoding in the loop"
STORED, ANEW = "holes stored in the cache", "holes cut anew"
READING = "reading"
SD_ARCHITECTURE = "sd-architecture"


class InTurn(TrainingImages):
    """Batches from several streams in turn, `steps_per_round` from each, until `num_rounds` are measured.

    The first round warms up. Afterwards `laps` holds the time of each step, from asking for its batch to asking for
    the next.
    """

    def __init__(
        self,
        like: TrainingImages,
        streams: Mapping[str, Iterator[Batch]],
        stopwatch: Stopwatch,
        *,
        num_rounds: int,
        steps_per_round: int,
    ):
        super().__init__(like.source, seed=like.seed, flip=like.flip, spatial=like.spatial)
        self.streams, self.stopwatch = streams, stopwatch
        self.num_rounds, self.steps_per_round = num_rounds, steps_per_round
        self.laps: dict[str, list[Lap]] = {side: [] for side in streams}
        self._taken, self._side = 0, ""

    def at(self, positions: Sequence[int]) -> Batch:
        lap = self.stopwatch.lap()
        if self._taken > self.steps_per_round * len(self.streams):
            self.laps[self._side].append(lap)
        turn, sides = self._taken // self.steps_per_round, list(self.streams)
        if turn == (1 + self.num_rounds) * len(sides):
            raise Enough
        self._side, self._taken = sides[turn % len(sides)], self._taken + 1
        with self.stopwatch.part(READING):
            return next(self.streams[self._side])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo", help="a name from `latentflow recipes`, or a YAML file")
    parser.add_argument(
        "--autoencoder",
        help="a folder, a hub id, 'shapes', or 'sd-architecture': Stable Diffusion's layers with untrained weights, as "
        "fast as with trained ones; default: the recipe's",
    )
    parser.add_argument("--data", help="a folder or zip of images; default: --num-images synthetic PNG files")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--holes", action="store_true", help="compare two sources of images with holes")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps-per-round", type=int, default=1)
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="that read image files; each reads 4 batches ahead, so take longer rounds",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--results", default=measuring.RESULTS, help="folder of the JSON file")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="of the recipe")
    options = parser.parse_intermixed_args(arguments)
    measuring.setup(options.device, options.threads)
    device = torch.device(options.device)
    autoencoder = load_autoencoder(options.autoencoder or load_recipe(options.recipe).autoencoder).to(device)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, autoencoder, device, Path(folder))
    print_table(results)
    name = "training_throughput_holes" if options.holes else "training_throughput"
    measuring.write_results(name, device, results, options.results)
    return results


def load_autoencoder(reference: str) -> Autoencoder:
    """The autoencoder of a recipe, or the untrained one with Stable Diffusion's layers."""
    if reference == SD_ARCHITECTURE:
        return measuring.variational((128, 256, 512, 512), layers_per_block=2, name=reference)
    return Autoencoder.from_pretrained(reference)


def measure(
    options: argparse.Namespace, autoencoder: Autoencoder, device: torch.device, folder: Path
) -> dict[str, Any]:
    """Encode once, then train in turn from the cache and from the files."""
    defaults = {
        "training.steps": 1_000_000,
        "training.precision": "fp32",
        "training.micro_batch_size": "null",
        "training.checkpoint_every": 1_000_000,
        "training.preview_every": 0,
        "data.flip": "false",
        "conditioning.semantic_map": "false",
        "conditioning.inpainting": str(options.holes).lower(),
    }
    recipe = load_recipe(options.recipe, measuring.overrides(defaults, options.changes))
    source = open_images(
        options.data or write_images(folder / "images", options.num_images, recipe.data.image_size),
        recipe.data.image_size,
    )
    began = time.perf_counter()
    write_cache(source, autoencoder, folder / "cache", CacheOptions(mask_variants=int(options.holes)))
    encoding_seconds = time.perf_counter() - began

    batch_size, training = recipe.training.batch_size, {"seed": recipe.training.seed, "flip": recipe.data.flip}
    cache, factor, holes = LatentCache(folder / "cache"), autoencoder.factor, recipe.data.masks
    if options.holes:
        (fast, stored), (slow, anew) = (
            (STORED, SpatialData(factor, holes=holes, cached_holes=True)),
            (ANEW, SpatialData(factor, holes=holes, pictures=source)),
        )
        cached, files = (TrainingImages(cache, **training, spatial=spatial) for spatial in (stored, anew))
    else:
        fast, slow = CACHED, ENCODING
        cached, files = TrainingImages(cache, **training), TrainingImages(source, **training)

    def stream(images: TrainingImages, num_workers: int) -> Iterator[Batch]:
        positions = StreamPositions(0, batch_size, batch_size, rank=0, num_processes=1)
        return stream_batches(images, positions, num_workers=num_workers, pin_memory=device.type == "cuda")

    streams = {fast: stream(cached, 0), slow: stream(files, options.workers)}
    batches = InTurn(
        cached, streams, Stopwatch(device), num_rounds=options.rounds, steps_per_round=options.steps_per_round
    )
    model = build_model(recipe, autoencoder, cached)
    with suppress(Enough):
        train_velocity(recipe, model, batches, folder / "run", open_runtime(device, recipe.training.precision))
    size = batch_size * options.steps_per_round
    rounds = {
        side: seconds(laps, READING, REST).reshape(options.rounds, -1, 2).sum(1) for side, laps in batches.laps.items()
    }
    return {
        "recipe": " ".join([options.recipe, *options.changes]),
        "autoencoder": Path(autoencoder.reference).name
        if Path(autoencoder.reference).is_dir()
        else autoencoder.reference,
        "image_size": recipe.data.image_size.written,
        "latent_shape": list(model.config.latent_shape),
        "batch_size": batch_size,
        "rounds": options.rounds,
        "steps_per_round": options.steps_per_round,
        "workers": options.workers,
        "images_per_second": {side: median_and_quartiles(size / taken)["median"] for side, taken in rounds.items()},
        "share_of_reading": {
            side: by_clock(seconds(laps, READING).sum(0) / seconds(laps, READING, REST).sum(0))
            for side, laps in batches.laps.items()
        },
        "times_faster_from_the_cache": median_and_quartiles(rounds[slow] / rounds[fast]),
        "images_per_second_of_writing_the_cache": len(source) / encoding_seconds,
    }


def write_images(folder: Path, num_images: int, image_size: Size) -> Path:
    """Synthetic images as PNG files, a folder per class."""
    source = SyntheticShapes(num_images, image_size)
    for number in range(num_images):
        item = source[number]
        file = folder / source.class_names[item.label] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(item.pixels).save(file)
    return folder


def print_table(results: dict[str, Any]) -> None:
    """A short table: one column per clock."""
    size, batch_size = results["image_size"], results["batch_size"]
    shape = "x".join(map(str, results["latent_shape"]))
    print(f"recipe {results['recipe']}: images of {size}, latents {shape}, batch {batch_size}")
    print(f"autoencoder {results['autoencoder']}")
    print(f"{results['rounds']} rounds, {results['steps_per_round']} steps of each side a round\n")
    print(f"  {'':<42}{'wall':>12}{'CPU time':>12}")

    def row(name: str, values: dict[str, float], form: str) -> None:
        print(f"  {name:<42}" + "".join(f"{form.format(values[clock]):>12}" for clock in measuring.CLOCKS))

    for side, speed in results["images_per_second"].items():
        row(side, speed, "{:.1f} /s")
        row("    of this, reading", results["share_of_reading"][side], "{:.1%}")
    faster = results["times_faster_from_the_cache"]
    row("times faster from the cache", faster["median"], "{:.2f}")
    row("    middle half of the rounds, from", faster["low"], "{:.2f}")
    row("    to", faster["high"], "{:.2f}")
    print(f"  writing the cache, once: {results['images_per_second_of_writing_the_cache']:.1f} images/s")


if __name__ == "__main__":
    main()
