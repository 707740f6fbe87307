"""Climb the ladder: train every rung for the same seconds, evaluate it, and write a line for each run.

    python benchmarks/ladder/run.py --train cifar10/train --held-out cifar10/held_out --autoencoder taesd \
        --features judges/cifar10 --seconds 360 --work /scratch/ladder
    python benchmarks/ladder/run.py ... --device cuda --seconds 60
    OMP_NUM_THREADS=1 python benchmarks/ladder/run.py ... --at-once 3          # on a CPU: the three seeds side by side
    python benchmarks/ladder/run.py ... --rungs 00_baseline,01_lfm,10_muon     # these only
    python benchmarks/ladder/run.py --render                                   # RESULTS.md again

Repeat the command to go on after an interruption: finished runs are in results.jsonl, begun ones resume. Speeds are
probed first, on an otherwise idle machine; they give the number of steps, so that the cosine of every run ends after
the same seconds. From then on results do not depend on how busy the machine is. Every command has a time limit, and
runs in a worker process that stays for the next; what fails is a line, too.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import yaml
from commands import Place, autoencoder, cache, limit_of, measured, reference_of, train
from rules import FINAL, Outcome, Rung, Setting, Step, climb, key_of, last_kept, merged, read_outcomes, read_rungs
from speeds import PROBE_STEPS, seconds_per_step
from table import write_table
from worker import Failed, Workers

from latentflow.artifacts import json_line, make_folder, sha256_file, write_text

HERE = Path(__file__).parent
BASE = HERE / "base.yaml"
_EVALUATIONS_ON_A_GPU = 3  # side by side, next to a training
_WRITING = Lock()  # of results.jsonl, by several evaluations
_FIRST_EVALUATION = Lock()  # which makes what all are compared with


@dataclass(frozen=True)
class Run:
    """A rung's recipe, trained with one seed for a share of the seconds."""

    step: Step
    seed: int
    share: float = 1.0

    @property
    def name(self) -> str:
        """The rung's, or that of the runs of the last kept recipe for a part of the time."""
        return self.step.name if self.share == 1 else FINAL

    def __str__(self) -> str:
        part = f", {self.share:g} of the time" if self.share != 1 else ""
        return f"{self.name}, seed {self.seed}{part}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Climb, then write the page."""
    options = _options().parse_args(arguments)
    rungs, recipe = read_rungs(Path(options.ladder) / "rungs"), base_recipe()
    results = make_folder(options.results) / "results.jsonl"
    if not options.render:
        chosen = options.rungs.split(",") if options.rungs else list(rungs)
        for option, names in (("--rungs", chosen), ("--kept", options.kept)):
            if unknown := [name for name in names if name not in rungs]:
                raise SystemExit(f"{option}: there is no rung {unknown[0]!r}; there are {', '.join(rungs)}")
        if apart := [name for name in options.kept if rungs[name].is_aside]:
            raise SystemExit(f"--kept: later rungs never stand on {apart[0]}; leave it out")
        if options.at_once < 1 or (options.at_once > 1 and options.device == "cuda"):
            raise SystemExit(f"--at-once {options.at_once}: give 1 or more on a CPU, and leave it out on a GPU")
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the workers, too
        with ExitStack() as ends:
            trainings, others = workers_of(options)
            launch = Workers(trainings, others)
            place = _place(options, results, recipe, launch)
            ends.enter_context(alone(Path(options.work)))
            ends.callback(launch.close)
            whole_ladder(place, rungs, chosen, options.seeds)
            parts_of_the_time(place, rungs, options.seeds, options.shares)
    write_table(Path(options.results) / "RESULTS.md", rungs, read_outcomes(results), recipe)
    print(f"written to {Path(options.results) / 'RESULTS.md'}")


def workers_of(options: argparse.Namespace) -> tuple[int, int]:
    """Trainings side by side, and other commands; trainings on one GPU would slow each other down."""
    return (1, _EVALUATIONS_ON_A_GPU) if options.device == "cuda" else (options.at_once, options.at_once)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, and let every process that is begun hold it: it outlives a kill of this one.

    Raises:
        SystemExit: another ladder, or what it began, holds it.
    """
    with (folder / ".ladder.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"{folder}: a ladder, or a command that one has begun, still works here; wait for it"
            ) from None
        os.set_inheritable(file.fileno(), True)
        yield


def whole_ladder(place: Place, rungs: Mapping[str, Rung], chosen: Sequence[str], seeds: Sequence[int]) -> None:
    """Run the baseline and the references, seed by seed, then the chosen rungs from the lowest to the highest."""
    prepare(place, _climb(place, rungs), chosen, seeds)
    names = list(rungs)
    base_and_references = [name for name in names if rungs[name].role != "rung" and name in chosen]
    steps = [_step(place, rungs, name) for name in base_and_references]
    all_runs(place, [Run(step, seed) for seed in seeds for step in steps])  # in turn: what drifts meets all of them
    for name in names:
        if name in chosen and name not in base_and_references:
            all_runs(place, [Run(_step(place, rungs, name), seed) for seed in seeds])


def prepare(place: Place, steps: Sequence[Step], chosen: Sequence[str], seeds: Sequence[int]) -> None:
    """Make the caches of the chosen rungs, and their autoencoders, before the first speed is probed.

    What fails is repeated for its own rung, and becomes its line there.
    """
    lacking = [
        step.spec for step in steps if step.name in chosen and not all(_is_there(place, Run(step, n)) for n in seeds)
    ]
    first_stages = {key_of(spec.autoencoder): spec for spec in lacking}
    with _at_once(place) as pool:
        made = {key: pool.submit(autoencoder, place, spec) for key, spec in first_stages.items()}
        well = [spec for spec in lacking if made[key_of(spec.autoencoder)].exception() is None]
        caches = {
            **{key_of([spec.autoencoder, spec.encode]): (spec, False) for spec in well},
            **{key_of(spec.autoencoder): (spec, True) for spec in well},
        }
        for one in [pool.submit(cache, place, spec, held_out=held_out) for spec, held_out in caches.values()]:
            one.exception()


@contextmanager
def _at_once(place: Place) -> Iterator[ThreadPoolExecutor]:
    """Threads for as many commands as run side by side; leaving early ends the commands."""
    with ThreadPoolExecutor(place.at_once) as pool:
        try:
            yield pool
        except BaseException:
            place.launch.close()  # a command would be waited for
            raise


def parts_of_the_time(place: Place, rungs: Mapping[str, Rung], seeds: Sequence[int], shares: Sequence[float]) -> None:
    """Train the last kept recipe for parts of the time."""
    final = last_kept(_climb(place, rungs))
    all_runs(place, [Run(final, seed, share) for seed in seeds for share in shares])


def _step(place: Place, rungs: Mapping[str, Rung], name: str) -> Step:
    return next(step for step in _climb(place, rungs) if step.name == name)


def _climb(place: Place, rungs: Mapping[str, Rung]) -> list[Step]:
    return climb(rungs, _of_this_setting(place), merged(place.recipe, place.setting.changes), place.setting.kept)


def _of_this_setting(place: Place) -> list[Outcome]:
    return [one for one in read_outcomes(place.results) if one.setting.key == place.setting.key]


def all_runs(place: Place, runs: Sequence[Run]) -> None:
    """Probe speeds, then train and evaluate what has no line yet.

    A GPU evaluates while it trains on; on a CPU each training is followed by its evaluation.
    """
    runs = [run for run in runs if not _is_there(place, run)]
    for step in {run.step.name: run.step for run in runs}.values():
        try:
            cache(place, step.spec, held_out=True)
            seconds_per_step(place, step)
        except Failed as error:
            failed = next(run for run in runs if run.step.name == step.name)
            append(place.results, outcome_of(place, failed, failed=str(error)))
    with _at_once(place) as pool:
        if place.setting.device == "cpu":
            begun = [pool.submit(trained_and_evaluated, place, run) for run in runs]
        else:
            begun = [pool.submit(evaluated, place, run, folder) for run in runs if (folder := trained(place, run))]
        for one in begun:
            one.result()


def trained_and_evaluated(place: Place, run: Run) -> None:
    """Both, one after the other."""
    if folder := trained(place, run):
        evaluated(place, run, folder)


def _is_there(place: Place, run: Run) -> bool:
    """Whether a run has its line, or one that failed, which is repeated if it was asked for."""
    there = [
        one
        for one in _of_this_setting(place)
        if (one.rung, one.spec, one.share) == (run.name, run.step.spec.key, run.share)
        and (one.seed == run.seed or one.failed)
    ]
    return any(not (one.failed and place.again) for one in there)


def outcome_of(place: Place, run: Run, **found: Any) -> Outcome:
    """The line of a run, with what was found."""
    step = run.step
    return Outcome(
        setting=place.setting,
        rung=run.name,
        title=step.rung.title,
        seed=run.seed,
        spec=step.spec.key,
        against=step.base,
        share=run.share,
        machine=_machine(place.setting.device),
        date=datetime.date.today().isoformat(),
        **found,
    )


def trained(place: Place, run: Run) -> Path | None:
    """Train; returns the folder, or None if it failed, after a line that says why, or has its line."""
    if _is_there(place, run):
        return None
    print(run, flush=True)
    try:
        steps = max(round(run.share * place.setting.seconds / seconds_per_step(place, run.step)), 1)
        folder = place.work / "runs" / f"{run.step.spec.training}-{steps}-{run.seed}"
        began = time.monotonic()
        train(place, run.step.spec, folder, steps, run.seed, limit=limit_of(place))
        print(f"  {run}: trained in {time.monotonic() - began:.0f} s", flush=True)
        return folder
    except Failed as error:
        print(f"  failed: {error}", flush=True)
        append(place.results, outcome_of(place, run, failed=str(error)))
        return None


def evaluated(place: Place, run: Run, folder: Path) -> None:
    """Evaluate a trained run, and write its line."""
    began = time.monotonic()
    try:
        with nullcontext() if reference_of(place).exists() else _FIRST_EVALUATION:
            outcome = outcome_of(place, run, **measured(place, run.step.spec, folder))
        took = time.monotonic() - began
        print(
            f"  {run}: FD {outcome.distance:.4g} after {outcome.steps:,} steps, evaluated in {took:.0f} s", flush=True
        )
    except Failed as error:
        outcome = outcome_of(place, run, failed=str(error))
        print(f"  {run}: failed: {error}", flush=True)
    append(place.results, outcome)
    if not outcome.failed and "ema_lengths" not in run.step.spec.changes.get("training", {}):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the most of its bytes; the model stays


def append(file: Path, outcome: Outcome) -> None:
    """Add a line; what a kill left of the last one is cut off first."""
    with _WRITING:
        _append(file, outcome)


def _append(file: Path, outcome: Outcome) -> None:
    if file.exists() and (text := file.read_bytes()) and not text.endswith(b"\n"):
        write_text(file, text[: text.rfind(b"\n") + 1].decode())
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json_line(outcome.model_dump(mode="json")).rstrip("\n") + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def base_recipe() -> dict[str, Any]:
    """The recipe that the rungs change."""
    return yaml.safe_load(BASE.read_text(encoding="utf-8"))


def features_of(features: str) -> str:
    """Name of the features; of a folder, with a hash of the weights in it."""
    files = sorted(Path(features).glob("*.safetensors")) if Path(features).is_dir() else []
    return " ".join([Path(features).name, *(sha256_file(file)[:12] for file in files)])


def _place(options: argparse.Namespace, results: Path, recipe: Mapping[str, Any], launch: Workers) -> Place:
    missing = [name for name in ("train", "held_out", "autoencoder", "work") if getattr(options, name) is None]
    if missing:
        raise SystemExit(f"--{missing[0].replace('_', '-')} is missing")
    changes: dict[str, Any] = {}
    for given in options.set or ():
        key, equals, value = given.partition("=")
        if not equals:
            raise SystemExit(f"--set {given}: give key=value, such as training.batch_size=64")
        for part in reversed(key.split(".")):
            value = {part: yaml.safe_load(value) if isinstance(value, str) else value}
        changes = merged(changes, value)
    setting = Setting(
        device=options.device,
        seconds=options.seconds,
        train=Path(options.train).name,
        held_out=Path(options.held_out).name,
        autoencoder=Path(options.autoencoder).name,
        features=features_of(options.features),
        num=options.num,
        image_size=options.image_size,
        changes=merged({"data": {"image_size": options.image_size}}, changes),
        kept=options.kept,
        busy=options.busy,
    )
    return Place(
        *(setting, options.train, options.held_out, options.autoencoder, options.features),
        work=make_folder(Path(options.work) / key_of([options.train, options.autoencoder, setting.image_size])),
        results=results,
        recipe=recipe,
        probe_steps=options.probe_steps or PROBE_STEPS[options.device],
        at_once=workers_of(options)[1],
        again=options.again,
        launch=launch,
    )


def _machine(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    return f"{names[0] if names else platform.machine()}, {threads} thread(s)"


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="images to train on: a folder or zip, sub-folders as classes")
    parser.add_argument("--held-out", help="images to compare with, of the same classes")
    parser.add_argument("--autoencoder", help="a folder, a hub id, or 'shapes'")
    parser.add_argument("--features", default="random", help="a folder by `train-features`, or random")
    parser.add_argument("--work", help="folder for caches, runs and evaluations; gigabytes")
    parser.add_argument("--results", default=HERE, help="folder of results.jsonl and RESULTS.md")
    parser.add_argument("--ladder", default=HERE, help="folder with rungs/")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=360.0, help="of training, for each run")
    parser.add_argument("--seeds", type=_whole_numbers, default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument("--rungs", help="only these, by file name; they still stand on every rung kept before")
    parser.add_argument(
        "--kept",
        type=_names,
        default=[],
        help="rungs that later ones stand on although this setting has not decided so, such as those that a GPU kept",
    )
    parser.add_argument("--at-once", type=int, default=1, help="trainings that run side by side on a CPU")
    parser.add_argument(
        "--shares",
        type=_numbers,
        default=[0.25, 0.33, 0.5],
        help="of the time that the last kept recipe is trained for, too; default: 0.25,0.33,0.5",
    )
    parser.add_argument("--num", type=int, default=2500, help="samples of each run")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--probe-steps", type=int, help="whose speed is measured; default: 30, and 300 on CUDA")
    parser.add_argument("--busy", action="store_true", help="probe speeds although other programs compute")
    parser.add_argument("--again", action="store_true", help="repeat runs that failed")
    parser.add_argument("--set", action="append", metavar="key=value", help="a change of every recipe")
    parser.add_argument("--render", action="store_true", help="only write RESULTS.md again")
    return parser


if __name__ == "__main__":
    main()
