"""A model of all classes of a set but one, finetuned to that one by each method, against training from random weights.

For each number of images and each method, a run takes the same seconds: its speed is measured first, which decides its
steps. "scratch" trains all weights of a network of random weights, of the same size and on the same latents. Each run
is judged by its best weights (`RUN@best`): the Fréchet distance and the class accuracy of the judge, and the loss on
held-out images of the class, also with guidance by the model that it was finetuned from.

    python benchmarks/finetuning.py --train cifar10/train --held-out cifar10/held_out --autoencoder madebyollin/taesd \
        --features judges/cifar10 --images 100,500,4500 --seconds 600 --work /scratch/finetuning

Repeat the command to go on: what is there stays.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch

from latentflow.api import LatentFlow
from latentflow.artifacts import make_folder, read_json, write_json, write_text
from latentflow.commands.encode import encode
from latentflow.commands.evaluate import evaluate
from latentflow.commands.finetune import finetune_recipe
from latentflow.commands.loss import loss
from latentflow.commands.sample import sample
from latentflow.commands.train import train
from latentflow.data.request import EncodeRequest
from latentflow.evaluation.request import EvaluationRequest
from latentflow.model.flow_model import read_config
from latentflow.randomness import derive_seed
from latentflow.runtime import Runtime, open_runtime
from latentflow.sampling.request import SampleRequest
from latentflow.training.config import Recipe, load_recipe
from latentflow.training.held_out_watch import read_best
from latentflow.training.log import read_metrics
from latentflow.training.request import FinetuneRequest, LossRequest

SCRATCH = "scratch"
METHODS = ("full", "lora", "biases", SCRATCH)
_RATE_OF_SCRATCH = 6e-4  # of AdamW, which trains the other methods as well
_SAMPLING = {"solver": "ab2", "steps": 16}
_SHOWN = 40  # pictures of each model


@dataclass(frozen=True)
class Study:
    """Where things are, and where they run."""

    options: argparse.Namespace
    work: Path
    runtime: Runtime

    @property
    def source(self) -> Path:
        """The run of the other classes."""
        return Path(self.options.source or self.work / "source")

    @property
    def random(self) -> Path:
        """The same network with random weights."""
        return self.work / "random"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Encode, train, finetune, judge, print and write; returns what was written."""
    options = _options().parse_args(arguments)
    measuring.setup(options.device, options.threads)
    study = Study(options, make_folder(options.work), open_runtime(options.device))
    make_source(study)
    rows = []
    for number in map(int, options.images.split(",")):
        encode_first(study, number)
        for method in options.methods.split(","):
            rows.append(finetuned(study, number, method))
            print(line_of(rows[-1]), flush=True)
    names = ("one_class", "image_size", "seconds", "num", "guidance", "changes")
    source = {"steps": read_config(study.source / "model").training.step, **judged_source(study)}
    written = {**{name: getattr(options, name) for name in names}, "source": source, "runs": rows}
    measuring.write_results("finetuning", study.runtime.device, written, options.results)
    return written


def make_source(study: Study) -> None:
    """Train a model of all classes but one, if there is none, and save its network with random weights as another."""
    if not study.options.source:
        train_source(study)
    if study.options.one_class in read_config(study.source / "model").conditioning.class_names:
        raise SystemExit(f"{study.source} knows the class {study.options.one_class}; name another with --one-class")
    if not study.random.exists():
        model = LatentFlow.from_pretrained(study.source, runtime=study.runtime)
        torch.manual_seed(derive_seed(0, "weights"))
        model.network = model.config.build_network()
        model.save_pretrained(study.random)


def train_source(study: Study) -> None:
    """Encode the images of all classes but one, and train."""
    options, others = study.options, study.work / "other_classes"
    if not others.exists():
        copy_others(Path(options.train), options.one_class, others)
    encode(_encoded(study, others), study.work / "cache_source", runtime=study.runtime)
    given = {
        "data.path": study.work / "cache_source",
        "autoencoder": options.autoencoder,
        "data.image_size": options.image_size,
        "out": study.source,
        "training.steps": options.source_steps,
    }
    _train(load_recipe(options.recipe, measuring.overrides(given, options.changes)), study)


def encode_first(study: Study, number: int) -> None:
    """A latent cache of the first images of the class."""
    table = one_class(study, Path(study.options.train), study.work / f"images_{number}", number)
    encode(_encoded(study, table), study.work / f"cache_{number}", runtime=study.runtime)


def one_class(study: Study, folder: Path, place: Path, number: int | None = None) -> Path:
    """The first images of the class, with a table of their label, as a single sub-folder is no class; its file."""
    name, table = study.options.one_class, place / "labels.csv"
    if not table.exists():
        files = sorted((folder / name).iterdir())[:number]
        make_folder(place)
        for file in files:
            shutil.copy(file, place / file.name)
        write_text(table, "file,label\n" + "".join(f"{file.name},{name}\n" for file in files))
    return table


def _encoded(study: Study, data: Path) -> EncodeRequest:
    options = study.options
    given = {"image_size": options.image_size, "autoencoder": options.autoencoder, "flips": True}
    return EncodeRequest(data=data, **given)


def _train(recipe: Recipe, study: Study) -> None:
    if not train(recipe, runtime=study.runtime).outcome.finished:
        raise SystemExit("stopped; the same command goes on")


def recipe_of(study: Study, number: int, method: str, out: Path, steps: int) -> Recipe:
    """The recipe of one run; all of them differ in the method, the model that they begin with and the rate."""
    begins = study.random if method == SCRATCH else study.source
    given: dict[str, object] = {
        "out": out,
        "training.steps": steps,
        "training.batch_size": study.options.batch_size,
        "training.log_every": min(20, steps),
        "training.preview_every": 0,
        "training.keep_at": "[]",
        "training.ema_decay": 0.999,
    }
    if method == SCRATCH:
        given |= {"optimizer.learning_rate": _RATE_OF_SCRATCH}
    request = FinetuneRequest(
        model=begins, data=study.work / f"cache_{number}", method="full" if method == SCRATCH else method
    )
    return finetune_recipe(request, measuring.overrides(given, study.options.finetune_set))


def steps_in_time(study: Study, number: int, method: str) -> int:
    """How many steps of a method take the seconds that a run may take, by a short run."""
    file, out = study.work / "paces.json", study.work / f"pace_{method}"
    paces = read_json(file) if file.exists() else {}
    if method not in paces:
        _train(recipe_of(study, number, method, out, study.options.pace_steps), study)
        speeds = [line["images_per_second"] for line in read_metrics(out)]
        paces[method] = speeds[-1]
        write_json(file, paces)
    return max(round(study.options.seconds * paces[method] / study.options.batch_size), 1)


def finetuned(study: Study, number: int, method: str) -> dict[str, Any]:
    """Finetune one model, and judge it."""
    run, steps = study.work / f"{method}_{number}", steps_in_time(study, number, method)
    _train(recipe_of(study, number, method, run, steps), study)
    best, training = read_best(run), read_config(run / "model").training
    model = f"{run}@best" if best else str(run)
    scores = judged(study, model, f"{method}_{number}")
    if method != SCRATCH and study.options.guidance != 1:
        guided = judged(study, model, f"{method}_{number}_guided", guide=str(study.source))
        scores |= {f"guided_{name}": value for name, value in guided.items()}
    adapter = run / "model" / "adapter"
    return {
        "images": number,
        "method": method,
        "trained_on": training.num_images,
        "steps": steps,
        "best_step": best.step if best else steps,
        "held_out_loss": held_out_loss(study, model),
        "held_out_loss_at_the_end": held_out_loss(study, str(run)),
        "adapter_bytes": sum(one.stat().st_size for one in adapter.iterdir()) if adapter.is_dir() else None,
        **scores,
    }


def judged(study: Study, model: str, name: str, guide: str | None = None) -> dict[str, float]:
    """The scores of a model's pictures of the class against held-out ones; keeps some of the pictures."""
    options = study.options
    request = EvaluationRequest(
        model=model,
        data=tenth(study),
        features=options.features,
        num=options.num,
        batch_size=options.draw_together,
        guidance=options.guidance if guide else 1.0,
        guide=guide,
        reference_out=study.work / "held_out.safetensors",
        out=study.work / "evaluated" / name,
        **_SAMPLING,
    )
    result = evaluate(request, study.runtime)
    draw(study, model, name, guide)
    return {score: found.value for score, found in result.report.scores.items()}


def draw(study: Study, model: str, name: str, guide: str | None) -> None:
    """A grid of pictures, in the folder `grids`."""
    options = study.options
    how = {"guidance": options.guidance, "guide": guide} if guide else {"guidance": 1.0}
    request = SampleRequest(num=min(_SHOWN, options.num), **how, **_SAMPLING)
    folder = study.work / "samples" / name
    sample(model, request, folder, batch_size=options.draw_together, columns=10, runtime=study.runtime)
    shutil.copy(folder / "grid.png", make_folder(study.work / "grids") / f"{name}.png")


def held_out_loss(study: Study, model: str) -> float:
    """The loss on held-out images of the class, given all conditions."""
    found = loss(model, LossRequest(data=str(tenth(study)), num=study.options.draws), runtime=study.runtime)
    return found[-1].loss


def tenth(study: Study) -> Path:
    """Held-out images of the class, as a table."""
    return one_class(study, Path(study.options.held_out), study.work / "held_out")


def copy_others(folder: Path, one_class: str, place: Path) -> None:
    """The images of all classes but one."""
    for part in sorted(folder.iterdir()):
        if part.is_dir() and part.name != one_class:
            shutil.copytree(part, place / part.name)


def judged_source(study: Study) -> dict[str, float]:
    """How the model that all begin with draws its own classes."""
    options, others = study.options, study.work / "held_out_others"
    if not others.exists():
        copy_others(Path(options.held_out), options.one_class, others)
    request = EvaluationRequest(
        model=str(study.source),
        data=others,
        features=options.features,
        num=options.num,
        batch_size=options.draw_together,
        guidance=1.0,
        out=study.work / "evaluated" / "source",
        **_SAMPLING,
    )
    return {name: score.value for name, score in evaluate(request, study.runtime).report.scores.items()}


def line_of(row: dict[str, Any]) -> str:
    """One run in a line."""
    numbers = {name: value for name, value in row.items() if isinstance(value, float)}
    size = f", adapter {row['adapter_bytes'] / 1e6:.2f} MB" if row["adapter_bytes"] else ""
    found = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    run = f"{row['images']:>5} images, {row['method']:<7} {row['steps']:>6} steps, best {row['best_step']}"
    return f"{run}: {found}{size}"


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="images to train on, in class sub-folders")
    parser.add_argument("--held-out", required=True, help="images to compare with, of the same classes")
    parser.add_argument("--one-class", default="automobile", help="that the source does not see")
    parser.add_argument("--autoencoder", required=True, help="a folder, a hub id, or 'shapes'")
    parser.add_argument("--features", required=True, help="a folder by `train-features`, of all classes")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--source", help="a run of the other classes; otherwise it is trained")
    parser.add_argument("--recipe", default="cifar10_64", help="of the source")
    parser.add_argument("--source-steps", type=int, default=3600)
    parser.add_argument("--images", default="100,500,4500", help="of the class, for one run each")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seconds", type=float, default=600, help="of each run, without its measurements")
    parser.add_argument("--pace-steps", type=int, default=60, help="of the run by which the speed is measured")
    parser.add_argument("--batch-size", type=int, default=32, help="of each run")
    parser.add_argument("--num", type=int, default=1000, help="pictures of each evaluation")
    parser.add_argument("--draws", type=int, default=2000, help="of each held-out loss")
    parser.add_argument("--draw-together", type=int, default=100, help="pictures drawn together")
    parser.add_argument("--guidance", type=float, default=1.5, help="away from the source; 1: none")
    parser.add_argument("--finetune-set", action="append", default=[], metavar="key=value", help="of the runs' recipe")
    parser.add_argument("--work", required=True, help="folder for caches, runs, reports and pictures")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's choice")
    parser.add_argument("--results", default=measuring.RESULTS, help="folder of the JSON file")
    parser.add_argument("changes", nargs="*", help="of the source's recipe, such as network.depth=6")
    return parser


if __name__ == "__main__":
    main()
