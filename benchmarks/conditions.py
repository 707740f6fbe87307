"""Does a model draw what its named conditions ask for? Built-in shapes, whose size, place and class can be measured.

A model is trained without class labels on the named columns of synthetic shapes, of which those of middle size are left
out. Then pictures of a given size are drawn,

    inside          of sizes that the training images have
    interpolated    of the middle sizes, which no training image has
    extrapolated    smaller and larger than all of them

and measured: the nominal radius by the area of what is recognised, in hundredths of the image width. The same measure
on real images, encoded and decoded, is the floor of the error. The traits left and high are read off the centre. With
all classes, shape and colour are recognised. What is not asked for is null.

    python benchmarks/conditions.py                                 # red circles: two minutes of training on a core
    python benchmarks/conditions.py --classes all --steps 6000      # every shape and colour
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.autoencoder import Autoencoder
from latentflow.commands.train import train
from latentflow.data.cache.writer import write_cache
from latentflow.data.request import CacheOptions
from latentflow.data.sources.part import PartOfSource
from latentflow.data.sources.synthetic import CLASS_NAMES, COLOURS, COLUMNS, SHAPES, SyntheticShapes, unit_area
from latentflow.demo.recognition import Recognition, recognise
from latentflow.runtime import open_runtime
from latentflow.training.config import load_recipe

SIZE = 32  # of the images, in pixels
GAP = (28.0, 32.0)  # the sizes that training images do not have
ASKED = {"inside": (25, 26, 27, 33, 34, 35), "interpolated": (29, 30, 31), "extrapolated": (20, 22, 38, 40)}
_MEASURED_AT = 128  # pixels; finer than the picture, so that the area of its mask is


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, draw, measure, print and write; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000, help="synthetic shapes, of which some are trained on")
    parser.add_argument(
        "--classes", default="red circle", help="of the shapes that are trained on, with commas, or all"
    )
    parser.add_argument("--steps", type=int, default=1100, help="of training")
    parser.add_argument("--num", type=int, default=64, help="pictures of each size, class and set of traits")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--out", help="keep cache and run in this folder; a repeated call continues")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's choice")
    parser.add_argument("--results", default=measuring.RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    measuring.setup(options.device, options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        model = trained(Path(options.out or temporary), options)
    measure = calibrated(model, options.num)
    result = {
        "sizes": measured_sizes(model, measure, options),
        "traits": measured_traits(model, options),
    }
    if options.classes == "all":
        result["classes"] = measured_classes(model, options)
    report(result)
    settings = {name: getattr(options, name) for name in ("images", "classes", "steps", "num", "guidance")}
    written = {**settings, **result}
    measuring.write_results("conditions", torch.device(options.device), written, options.results)
    return written


def trained(folder: Path, options: argparse.Namespace) -> LatentFlow:
    """A model of the shapes that are not of middle size."""
    source = SyntheticShapes(options.images, SIZE, columns=COLUMNS)
    size = [column.name for column in COLUMNS].index("size")
    classes = CLASS_NAMES if options.classes == "all" else options.classes.split(",")
    wanted = [row for row in range(len(source)) if CLASS_NAMES[source.label(row)] in classes]
    kept = [row for row in wanted if not GAP[0] < source.values(row)[size] < GAP[1]]
    autoencoder = Autoencoder.from_pretrained("shapes")
    write_cache(PartOfSource(source, kept, "training"), autoencoder, folder / "cache", CacheOptions())
    overrides = [
        f"data.path={folder / 'cache'}",
        f"out={folder / 'run'}",
        "data.labels=false",
        f"training.steps={options.steps}",
        "conditioning.inpainting=false",
        "conditioning.semantic_map=false",
        f"conditioning.columns={'shape,colour,' if options.classes == 'all' else ''}traits,size",
        "conditioning.column_dropout=0.3",
        "network.depth=4",
        "network.hidden_size=96",
    ]
    train(load_recipe("demo", overrides), runtime=open_runtime(options.device))
    return LatentFlow.from_pretrained(folder / "run", device=options.device)


def radius_of(pixels: np.ndarray) -> tuple[float, Recognition] | None:
    """The nominal radius of the shape in a picture [S, S, 3], in hundredths of its width, before calibration."""
    fine = Image.fromarray(pixels).resize((_MEASURED_AT, _MEASURED_AT), Image.Resampling.BICUBIC)
    found = recognise(np.asarray(fine))
    if found is None:
        return None
    return 100 * math.sqrt(found.mask.mean() / unit_area(found.shape)), found


def calibrated(model: LatentFlow, num: int) -> dict[str, float]:
    """Slope and offset of the measured radius, by real images that are encoded and decoded, and its error on others."""
    source = SyntheticShapes(4 * num, SIZE, seed=1, columns=COLUMNS)
    pixels = torch.from_numpy(np.stack([item.pixels for item in source])).permute(0, 3, 1, 2)
    decoded = torch.cat([model.autoencoder.reconstruct(part) for part in pixels.split(64)])
    size = [column.name for column in COLUMNS].index("size")
    pairs = [
        (found[0], source.values(row)[size])
        for row, picture in enumerate(decoded.permute(0, 2, 3, 1).numpy())
        if (found := radius_of(picture)) is not None
    ]
    measured, true = np.array(pairs).T
    half = len(pairs) // 2
    slope, offset = np.polyfit(measured[:half], true[:half], 1)
    error = np.abs(slope * measured[half:] + offset - true[half:]).mean()
    recognised = len(pairs) / len(source)
    return {"slope": float(slope), "offset": float(offset), "error": float(error), "recognised": recognised}


def drawn(model: LatentFlow, options: argparse.Namespace, seed: int, **conditions: Any) -> np.ndarray:
    """Pictures [N, S, S, 3] under these conditions, and no others."""
    asked = {"num": options.num, "seed": seed, "conditions": conditions, "guidance": options.guidance}
    return model.sample(**asked, batch_size=64).pixels.permute(0, 2, 3, 1).numpy()


def measured_sizes(model: LatentFlow, measure: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """Of each size that is asked for: mean and spread of the measured ones, and how many pictures show a shape."""
    rows = []
    for kind, sizes in ASKED.items():
        for size in sizes:
            pictures = drawn(model, options, 1000 * size, size=float(size))
            found = [one[0] for one in map(radius_of, pictures) if one is not None]
            radii = measure["slope"] * np.array(found) + measure["offset"]
            share = len(found) / len(pictures)
            row = {"kind": kind, "asked": size, "recognised": share}
            if len(radii):
                row |= {"mean": float(radii.mean()), "spread": float(radii.std())}
                row["error"] = float(np.abs(radii - size).mean())
            rows.append(row)
    return {"floor": measure, "rows": rows}


def measured_classes(model: LatentFlow, options: argparse.Namespace) -> dict[str, float]:
    """How often the shape and the colour that are asked for are recognised, alone and together."""
    right = {"shape alone": [], "colour alone": [], "both": []}
    for place, shape in enumerate(SHAPES):
        right["shape alone"] += _recognised(drawn(model, options, place, shape=shape), shape=shape)
    for place, colour in enumerate(COLOURS):
        right["colour alone"] += _recognised(drawn(model, options, 100 + place, colour=colour), colour=colour)
        for other, shape in enumerate(SHAPES):
            pictures = drawn(model, options, 1000 + 10 * place + other, shape=shape, colour=colour)
            right["both"] += _recognised(pictures, shape=shape, colour=colour)
    return {name: float(np.mean(found)) for name, found in right.items()}


def _recognised(pictures: np.ndarray, **wanted: str) -> list[bool]:
    found = [recognise(picture) for picture in pictures]
    return [one is not None and all(getattr(one, name) == value for name, value in wanted.items()) for one in found]


def measured_traits(model: LatentFlow, options: argparse.Namespace) -> dict[str, float]:
    """Of sets of the traits left and high, how often the centre is where they say, of the pictures with a shape."""
    agreed = {}
    for traits in (set(), {"left"}, {"high"}, {"left", "high"}):
        held = []
        for picture in drawn(model, options, 7000 + 10 * len(traits) + ("high" in traits), traits=traits):
            found = recognise(picture)
            if found is not None:
                rows, columns = np.nonzero(found.mask)
                x, y = (columns.mean() + 0.5) / SIZE, (rows.mean() + 0.5) / SIZE
                held.append((x < 0.5) == ("left" in traits) and (y < 0.5) == ("high" in traits))
        agreed[", ".join(sorted(traits)) or "none"] = float(np.mean(held)) if held else 0.0
    return agreed


def report(result: dict[str, Any]) -> None:
    """Print the tables."""
    floor = result["sizes"]["floor"]
    print(f"size: error on real images, decoded: {floor['error']:.2f} ({floor['recognised']:.0%} recognised)")
    print(f"{'':14}{'asked':>6}{'mean':>8}{'spread':>8}{'error':>8}{'recognised':>12}")
    for row in result["sizes"]["rows"]:
        numbers = [f"{row[name]:8.2f}" if name in row else f"{'-':>8}" for name in ("mean", "spread", "error")]
        print(f"{row['kind']:14}{row['asked']:6}{''.join(numbers)}{row['recognised']:12.0%}")
    if "classes" in result:
        print("classes recognised:", ", ".join(f"{name} {share:.0%}" for name, share in result["classes"].items()))
    print("traits as asked:", ", ".join(f"{name} {share:.0%}" for name, share in result["traits"].items()))


if __name__ == "__main__":
    main()
