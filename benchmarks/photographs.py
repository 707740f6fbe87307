"""Three models of photographs, from the images to their figures and pictures.

    python benchmarks/photographs.py --train cifar10/split/train --held-out cifar10/split/held_out \
        --autoencoder madebyollin/taesd --features judges/cifar10 --steps 20000 \
        --work /scratch/photographs --out results
    python benchmarks/photographs.py ... --parts guides,grids                    # these only

A model of all classes, one without labels, and one of a single class. Repeat the command to go on: what is there stays.
Reports and grids go to --out, one folder or file for each part.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "ladder"))
from worker import Failed, Workers

from latentflow.artifacts import make_folder, read_json

_SOLVERS = "euler,heun,ab2,ab4,unipc2,fitted-6,fitted-8,fitted-10"
_SOLVER_STEPS = "3,5,6,8,10,16,25"
_SCALES = "1,1.25,1.5,2,3"
_SNAPSHOTS = "@1/16,@1/8"
_WORKERS = {"cpu": 1, "cuda": 4}  # next to the one that trains
_SAMPLING = ("--solver", "ab2", "--steps", "16")


@dataclass(frozen=True)
class Study:
    """Where things are, and how large everything is.

    Attributes:
        run: runs a command of latentflow.
        small: images of each cell of a table; whole reports have four times as many.
    """

    options: argparse.Namespace
    run: Callable[..., Path]
    work: Path
    out: Path
    small: int

    @property
    def device(self) -> tuple[str, ...]:
        return ("--device", self.options.device)

    @property
    def judged(self) -> tuple[object, ...]:
        """Held-out photographs in the features of the judge."""
        return ("--features", self.options.features, "--batch-size", self.options.batch_size)

    @property
    def labelled(self) -> Path:
        return self.work / "labelled"

    @property
    def unlabelled(self) -> Path:
        return self.work / "unlabelled"

    @property
    def single(self) -> Path:
        return self.work / "single"

    def command(self, name: str, *arguments: object) -> None:
        """Run one command, with a log of its name."""
        self.run([*arguments, *self.device], self.work / "logs" / name, self.options.limit)


def encode(study: Study) -> None:
    """Latents of all photographs, and of those of one class."""
    options = study.options
    how = ("--autoencoder", options.autoencoder, "--image-size", options.image_size, "--flips")
    study.command("encode", "encode", options.train, *how, "--out", study.work / "cache")
    chosen = Path(options.train) / options.one_class
    study.command("encode-single", "encode", chosen, *how, "--out", study.work / "cache-single")


def train_labelled(study: Study) -> None:
    """The model of all classes."""
    _train(study, study.labelled, "cache", study.options.steps)


def train_unlabelled(study: Study) -> None:
    """The one that knows no labels, for half of the steps."""
    _train(study, study.unlabelled, "cache", study.options.steps // 2, "data.labels=false", "sampling.guidance=1")


def train_single(study: Study) -> None:
    """The one of a single class, for a quarter of the steps."""
    _train(study, study.single, "cache-single", study.options.steps // 4, "sampling.guidance=1")


def _train(study: Study, run: Path, cache: str, steps: int, *changes: str) -> None:
    options = study.options
    keys = [f"data.path={study.work / cache}", f"out={run}", f"training.steps={steps}"]
    given = [f"autoencoder={options.autoencoder}", *options.set, *changes]
    study.command(f"train-{run.name}", "train", options.recipe, *keys, *given)


def floor(study: Study) -> None:
    """The reconstructions against held-out photographs: as near as samples can come."""
    options = study.options
    how = ("--reconstruction", "--image-size", options.image_size)
    study.command("floor", "evaluate", options.autoencoder, *how, *_reported(study), "--out", study.out / "floor")


def scores_labelled(study: Study) -> None:
    """Samples of the labelled model without guidance."""
    _scores(study, study.labelled)


def scores_unlabelled(study: Study) -> None:
    """Samples of the model without labels."""
    _scores(study, study.unlabelled)


def _scores(study: Study, run: Path) -> None:
    how = (*_reported(study), *_SAMPLING, "--guidance", 1, "--out", study.out / f"{run.name}-guidance1")
    study.command(f"scores-{run.name}", "evaluate", run, *how)


def _reported(study: Study) -> tuple[object, ...]:
    reference = ("--reference-out", study.work / "held-out.safetensors")
    return ("--data", study.options.held_out, *study.judged, *reference, "--num", 4 * study.small)


def guides_labelled(study: Study) -> None:
    """Guidance by the null condition and by earlier snapshots, and the preset that follows."""
    _guides(study, study.labelled, f"none,{_SNAPSHOTS}")


def guides_unlabelled(study: Study) -> None:
    """The same without labels, where there is no null condition."""
    _guides(study, study.unlabelled, _SNAPSHOTS)


def _guides(study: Study, run: Path, kinds: str) -> None:
    data = ("--data", study.options.held_out, *study.judged, "--num", study.small, "--solvers", "ab2", "--steps", 16)
    chosen = ("--guides", kinds, "--guidance", _SCALES, "--write", "--out", study.out / f"guides-{run.name}")
    study.command(f"guides-{run.name}", "sweep", run, *data, *chosen)


def solvers(study: Study) -> None:
    """Solvers of few evaluations, fitted to the labelled model, against others; at guidance 1."""
    study.command("fit", "fit-solver", study.labelled, "--evaluations", "6,8,10", "--guidance", 1)
    data = ("--data", study.options.held_out, *study.judged, "--num", study.small, "--guidance", 1)
    chosen = ("--guides", "none", "--solvers", _SOLVERS, "--steps", _SOLVER_STEPS, "--out", study.out / "solvers")
    study.command("solvers", "sweep", study.labelled, *data, *chosen)


def preset(study: Study) -> None:
    """The labelled model by its preset."""
    study.command("preset", "evaluate", study.labelled, *_reported(study), "--out", study.out / "labelled-preset")


def copies(study: Study) -> None:
    """Whether the model of a single class repeats its training images."""
    options = study.options
    data = ("--data", Path(options.held_out) / options.one_class, "--train", Path(options.train) / options.one_class)
    study.command(
        "copies", "diagnose", study.single, *data, *study.judged, "--guidance", 1, "--out", study.out / "copies"
    )


def grids(study: Study) -> None:
    """Pictures of all three models, without guidance and by the preset."""
    for run in (study.labelled, study.unlabelled, study.single):
        for name, how in (("guidance1", ("--guidance", 1, *_SAMPLING)), ("preset", ())):
            folder = study.work / f"samples-{run.name}-{name}"
            drawn = ("--num", 80, "--columns", 10, "--batch-size", 80, "--out", folder)
            study.command(f"grid-{run.name}-{name}", "sample", run, *how, *drawn)
            shutil.copy(folder / "grid.png", study.out / f"{run.name}-{name}.png")


@dataclass(frozen=True)
class Part:
    """A function, and the parts that it needs."""

    do: Callable[[Study], None]
    after: tuple[str, ...] = ()


PARTS: Mapping[str, Part] = {
    "encode": Part(encode),
    "train_labelled": Part(train_labelled, after=("encode",)),
    "train_unlabelled": Part(train_unlabelled, after=("train_labelled",)),  # in turn: a GPU is one
    "train_single": Part(train_single, after=("train_unlabelled",)),
    "floor": Part(floor, after=("encode",)),
    "scores_labelled": Part(scores_labelled, after=("train_labelled", "floor")),
    "guides_labelled": Part(guides_labelled, after=("train_labelled",)),
    "preset": Part(preset, after=("guides_labelled", "floor")),
    "solvers": Part(solvers, after=("guides_labelled",)),  # both write into the model's folder
    "scores_unlabelled": Part(scores_unlabelled, after=("train_unlabelled", "floor")),
    "guides_unlabelled": Part(guides_unlabelled, after=("train_unlabelled",)),
    "copies": Part(copies, after=("train_single",)),
    "grids": Part(grids, after=("train_single", "guides_labelled", "guides_unlabelled")),
}


def run_parts(study: Study, chosen: Sequence[str], at_once: int) -> list[str]:
    """Run parts, `at_once` of them side by side and each after what it needs; returns the names of those that failed.

    A part whose needs failed is tried all the same: an earlier call may have made them.
    """
    begun: dict[str, Future[bool]] = {}

    def did(name: str) -> bool:
        for need in PARTS[name].after:
            if need in begun:
                begun[need].result()
        print(name, flush=True)
        try:
            PARTS[name].do(study)
        except Failed as error:
            print(f"  {name} failed: {error}", flush=True)
            return False
        return True

    # One thread takes them in order, and what a part needs comes before it.
    with ThreadPoolExecutor(at_once) as pool:
        for name in PARTS:
            if name in chosen:
                begun[name] = pool.submit(did, name)
    return [name for name, part in begun.items() if not part.result()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for, in their order; one that fails is named, and the others go on."""
    options = _options().parse_args(arguments)
    chosen = options.parts.split(",") if options.parts else list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        raise SystemExit(f"--parts: there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    at_once = len(PARTS) if options.device == "cuda" else 1  # a GPU measures models while it trains the next
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the workers, too
    workers = Workers(others=_WORKERS[options.device])
    study = Study(options, workers, make_folder(options.work), make_folder(options.out), options.num)
    try:
        failed = run_parts(study, chosen, at_once)
    finally:
        workers.close()
    for report in sorted(study.out.glob("*/report.json")):
        found = {key: round(score["value"], 4) for key, score in read_json(report)["scores"].items()}
        print(report.parent.name, found)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the logs are in {study.work / 'logs'}")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="images to train on, in class sub-folders")
    parser.add_argument("--held-out", required=True, help="images to compare with, of the same classes")
    parser.add_argument("--autoencoder", required=True, help="a folder, a hub id, or 'shapes'")
    parser.add_argument("--features", required=True, help="a folder by `train-features`")
    parser.add_argument("--recipe", default="cifar10_64", help="of all three models")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="a change of the recipe")
    parser.add_argument("--steps", type=int, required=True, help="of the model of all classes")
    parser.add_argument("--one-class", default="automobile", help="of the third model")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--num", type=int, default=2500, help="images of each cell of a table")
    parser.add_argument("--batch-size", type=int, default=250, help="images drawn together")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit", type=float, default=24 * 3600.0, help="seconds that a command may take")
    parser.add_argument("--parts", help=f"only these, of {', '.join(PARTS)}")
    parser.add_argument("--work", required=True, help="folder for caches, runs and logs; gigabytes")
    parser.add_argument("--out", required=True, help="folder for reports and pictures")
    return parser


if __name__ == "__main__":
    main()
