"""What happens to a model of few images, and to one of many, in the same number of steps.

The same network is trained on the first images of a set, once for each number in --images, each time with the share
held out that `data.held_out` says by itself. Then `latentflow diagnose` counts memorised samples at the end of the run
and at `RUN@best`: by latents and by features, those that are less than a third as far from one training image as from
the second-nearest (arXiv 2505.17638).

Few images overtrained: the warning comes before the first step, the held-out loss turns, `best` is from before that,
and the memorised fraction rises after it. With many images it stays near zero.

    python benchmarks/few_images.py --images 100,10000 --steps 14000
    python benchmarks/few_images.py --data cifar10/train --autoencoder madebyollin/taesd --image-size 64 \
        --images 100,10000
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring

from latentflow.commands.diagnose import diagnose
from latentflow.commands.encode import encode
from latentflow.commands.train import train
from latentflow.data.request import EncodeRequest
from latentflow.data.sources.images import open_images
from latentflow.evaluation.request import DiagnoseRequest
from latentflow.model.flow_model import read_config
from latentflow.model.snapshots import snapshot_steps
from latentflow.runtime import Runtime, open_runtime
from latentflow.training.config import load_recipe
from latentflow.training.held_out_watch import read_best
from latentflow.training.log import read_metrics
from latentflow.training.memorisation_onset import memorisation_warning

SYNTHETIC = "synthetic"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Encode, train, diagnose, print and write; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=SYNTHETIC, help="a folder of images, or synthetic: the built-in shapes")
    parser.add_argument("--autoencoder", default="shapes")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--images", default="100,10000", help="how many of them each model gets")
    parser.add_argument("--steps", type=int, default=14_000, help="of each model")
    parser.add_argument("--samples", type=int, default=256, help="drawn from each snapshot")
    parser.add_argument("--features", default="random", help="of `diagnose`; a judge sees more")
    parser.add_argument("--out", help="keep caches and runs in this folder; a repeated call continues")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's choice")
    parser.add_argument("--results", default=measuring.RESULTS, help="folder of the JSON file")
    parser.add_argument("changes", nargs="*", help="of the recipe, such as network.depth=6")
    options = parser.parse_args(arguments)
    measuring.setup(options.device, options.threads)
    runtime = open_runtime(options.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.out or temporary)
        models = {number: measured(int(number), folder, options, runtime) for number in options.images.split(",")}
    report(models)
    settings = {
        name: getattr(options, name) for name in ("data", "image_size", "steps", "samples", "features", "changes")
    }
    written = {**settings, "models": models}
    measuring.write_results("few_images", runtime.device, written, options.results)
    return written


def measured(number: int, folder: Path, options: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """One model: its losses on the way, and the memorised fractions of its snapshots."""
    cache, run = folder / f"cache_{number}", folder / f"run_{number}"
    data = first_of(options.data, number, folder / f"images_{number}")
    encoded = EncodeRequest(data=data, image_size=options.image_size, autoencoder=options.autoencoder)
    encode(encoded, cache, runtime=runtime)
    given = {
        "data.path": cache,
        "out": run,
        "training.steps": options.steps,
        "training.batch_size": 16,
        "training.ema_decay": 0.999,
        "training.log_every": 50,
        "training.preview_every": 0,
        "training.keep_at": "[0.05, 0.1, 0.25, 0.5]",
        "optimizer.learning_rate": 1e-3,
        "network": "{depth: 4, hidden_size: 128, num_heads: 2, patch_size: 2, variant: modern}",
    }
    recipe = load_recipe("own_images", measuring.overrides(given, options.changes))
    if not train(recipe, runtime=runtime).outcome.finished:
        raise SystemExit(f"stopped; with --out {folder} the same command goes on")
    lines = [line for line in read_metrics(run) if "held_out_loss" in line]
    training, best = read_config(run / "model").training, read_best(run)
    snapshots = {"best": f"{run}@best", **{str(step): f"{run}@{step}" for step in snapshot_steps(run)}, "end": str(run)}
    return {
        "trained_on": training.num_images,
        "held_out": training.held_out.num_images,
        "warning": memorisation_warning(options.steps, training.num_images),
        "best_step": best.step,
        "losses": {line["step"]: [line["loss"], line["held_out_loss"]] for line in lines},
        "cost": cost(run),
        "memorised": {
            name: memorised(model, data, number, folder / f"diagnosis_{number}_{name}", options, runtime)
            for name, model in snapshots.items()
        },
    }


def first_of(data: str, number: int, folder: Path) -> str:
    """The first images of a folder, of each class equally many, as a folder; or so many of the built-in ones."""
    if data == SYNTHETIC:
        return f"{SYNTHETIC}:{number}"
    source = open_images(data, 8, first=number)
    for row in range(len(source)):
        place = folder / source.name(row)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            shutil.copy(Path(data) / source.name(row), place)
    return str(folder)


def cost(run: Path) -> float:
    """The share of the time of a run that its measurements took."""
    measuring_seconds, training_seconds, before = 0.0, 0.0, 0
    for line in read_metrics(run):
        training_seconds += (line["images_seen"] - before) / line["images_per_second"]
        measuring_seconds += line.get("held_out_seconds", 0.0)
        before = line["images_seen"]
    return measuring_seconds / (measuring_seconds + training_seconds)


def memorised(
    model: str, data: str, number: int, out: Path, options: argparse.Namespace, runtime: Runtime
) -> dict[str, dict[str, float]]:
    """By latents and by features: the fraction of samples, and of held-out images by the same rule."""
    found = diagnose(
        DiagnoseRequest(
            model=model,
            data=data,
            out=out,
            num_samples=options.samples,
            num_train=number,
            features=options.features,
            guidance=1.0,
            batch_size=64,
        ),
        runtime,
    )
    return {
        space.space: {
            "samples": space.memorised / len(space.samples_ratio),
            "held_out": space.memorised_held_out / len(space.held_out_ratio),
        }
        for space in found.memorisation.spaces
    }


def report(models: dict[str, dict[str, Any]]) -> None:
    """A table of the snapshots of each model."""
    for number, model in models.items():
        print(f"{number} images, {model['trained_on']} of them trained on; measuring took {100 * model['cost']:.1f} %")
        print(f"  warning: {model['warning'] or 'none'}")
        for name, spaces in model["memorised"].items():
            step = {"best": model["best_step"], "end": max(model["losses"])}.get(name) or int(name)
            training, held_out = model["losses"][min(model["losses"], key=lambda at: abs(at - step))]
            found = ", ".join(
                f"{space} {100 * shares['samples']:.1f} % (held out {100 * shares['held_out']:.1f} %)"
                for space, shares in spaces.items()
            )
            print(f"  {name:>6} step {step:>6}  loss {training:.3f}  held out {held_out:.3f}  memorised by {found}")


if __name__ == "__main__":
    main()
