"""One step of low-rank finetuning of a network of SiT-XL/2's size: how much memory it takes, how large the adapter is.

A checkpoint of the published names and shapes, with random values, is converted. Then the model gets seven classes and
is finetuned for one step at batch size 1, in a process of its own, whose peak memory is measured. In another one the
adapter is loaded on the converted model and draws the picture that the finetuned model draws.

    python benchmarks/published_size.py                       # 10 GB of disk, 20 GiB of memory, some minutes
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch
from conversion import small_autoencoder
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.artifacts import make_folder, read_json, write_json
from latentflow.commands.convert import convert
from latentflow.commands.encode import encode
from latentflow.commands.finetune import finetune_recipe
from latentflow.commands.train import train
from latentflow.convert.families.registry import architecture
from latentflow.convert.request import ConvertRequest
from latentflow.data.request import EncodeRequest
from latentflow.networks.dit import SIZES
from latentflow.runtime import open_runtime
from latentflow.training.request import FinetuneRequest

NUM_CLASSES = 7
_SIZE = {
    "hidden_size": SIZES["XL"]["hidden_size"],
    "depth": SIZES["XL"]["depth"],
    "num_heads": SIZES["XL"]["num_heads"],
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Write, convert, finetune, draw, print and write; returns what was written."""
    options = _options().parse_args(arguments)
    measuring.setup("cpu", options.threads)
    if options.part:
        write_json(Path(options.place) / f"{options.part}.json", PARTS[options.part](Path(options.place), options))
        return {}
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        found = {part: run_part(part, Path(temporary), options) for part in PARTS}
    sizes = {name: getattr(options, name) for name in (*_SIZE, "image_size", "rank")}
    written = {**sizes, "classes": NUM_CLASSES, **found}
    for part, figures in found.items():
        print(part, ", ".join(f"{name} {value:,.4g}" for name, value in figures.items()))
    measuring.write_results("published_size", torch.device("cpu"), written, options.results)
    return written


def run_part(part: str, place: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run one part in a process of its own; its figures, and its peak memory."""
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in (*_SIZE, "image_size", "rank")]
    threads = [f"--threads={options.threads}"] if options.threads else []
    began = time.perf_counter()
    subprocess.run([sys.executable, __file__, f"--part={part}", f"--place={place}", *given, *threads], check=True)
    return {**read_json(place / f"{part}.json"), "seconds": time.perf_counter() - began}


def _peak() -> float:
    """The largest memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def converted(place: Path, options: argparse.Namespace) -> dict[str, float]:
    """A model of the published size from a file of random values, and a latent cache of seven classes."""
    sizes = {name: getattr(options, name) for name in _SIZE}
    published = architecture("sit", {**sizes, "input_size": options.image_size // 8})
    generator = torch.Generator().manual_seed(0)
    shapes = published.keys.foreign_shapes(published.empty().state_dict())
    weights = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights |= {constant.theirs: constant.value for constant in published.keys.constants}
    torch.save(weights, place / "model.pt")
    del weights
    autoencoder = small_autoencoder(place / "autoencoder")
    given = [f"{name}={value}" for name, value in {**sizes, "input_size": options.image_size // 8}.items()]
    request = ConvertRequest(
        family="sit", checkpoint=place / "model.pt", options=given, autoencoder=autoencoder, check=False
    )
    number = convert(request, place / "base").num_parameters
    (place / "model.pt").unlink()
    random = np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        folder = make_folder(place / "images" / f"class_{label}")
        for row in range(2):
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{row}.png")
    images = EncodeRequest(data=place / "images", image_size=options.image_size, autoencoder=str(autoencoder))
    encode(images, place / "cache", runtime=open_runtime("cpu"))
    return {"parameters": number, "gib": _peak()}


def finetuned(place: Path, options: argparse.Namespace) -> dict[str, float]:
    """One step at batch size 1, with its checkpoint and its model."""
    request = FinetuneRequest(model=place / "base", data=place / "cache", method="lora", rank=options.rank)
    keys = {"out": place / "run", "training.steps": 1, "training.batch_size": 1, "training.preview_every": 0}
    recipe = finetune_recipe(request, [f"{key}={value}" for key, value in {**keys, "training.keep_at": "[]"}.items()])
    result = train(recipe, runtime=open_runtime("cpu"))
    assert result.outcome.finished
    adapter, checkpoints = place / "run" / "model" / "adapter", place / "run" / "checkpoints"
    return {
        "gib": _peak(),
        "adapter_bytes": sum(file.stat().st_size for file in adapter.iterdir()),
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoints.rglob("*.safetensors")),
    }


def drawn(place: Path, options: argparse.Namespace) -> dict[str, float]:
    """The converted model with the adapter draws what the finetuned model draws."""
    given = {"num": 1, "classes": ["class_3"], "solver": "euler", "steps": 1, "guidance": 1.0, "seed": 0}
    runtime, began = open_runtime("cpu"), time.perf_counter()
    model = LatentFlow.from_pretrained(place / "base", adapter=place / "run", runtime=runtime)
    seconds = time.perf_counter() - began
    pictures = [model.sample(**given).pixels]
    del model
    pictures.append(LatentFlow.from_pretrained(place / "run", runtime=runtime).sample(**given).pixels)
    assert torch.equal(*pictures), "the adapter on the converted model draws another picture than the run"
    return {"gib": _peak(), "seconds_to_load": seconds}


PARTS = {"converted": converted, "finetuned": finetuned, "drawn": drawn}


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in _SIZE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, help="of torch; default: torch's choice")
    parser.add_argument("--work", help="folder for the files, which are removed; default: that of the system")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    parser.add_argument("--results", default=measuring.RESULTS, help="folder of the JSON file")
    return parser


if __name__ == "__main__":
    main()
