"""Climb the ladder: train every rung for the same seconds, evaluate it, and write a line for each run.

    python benchmarks/ladder/run.py --train cifar10/train --held-out cifar10/held_out --autoencoder taesd \
        --features judges/cifar10 --seconds 360 --work /scratch/ladder
    python benchmarks/ladder/run.py ... --device cuda --seconds 60
    python benchmarks/ladder/run.py ... --rungs 00_baseline,01_lfm,10_muon     # these only
    python benchmarks/ladder/run.py --render                                   # RESULTS.md again

Repeat the command to go on after an interruption: finished runs are in results.jsonl, begun ones resume. Speeds are
probed first, a rung and the one below it in turn, on an otherwise idle machine; they give the number of steps, so that
the cosine of every run ends after the same seconds. From then on results do not depend on how busy the machine is.
Every command has a time limit, and runs in a worker process that stays for the next; what fails is a line, too.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rules import FINAL, Outcome, Rung, Setting, Spec, Step, climb, key_of, last_kept, merged, read_outcomes, read_rungs
from table import write_table
from worker import Failed, Workers

from latentflow.artifacts import json_line, make_folder, read_json, sha256_file, write_text

HERE = Path(__file__).parent
BASE = HERE / "base.yaml"
_PROBE_STEPS = {"cpu": 30, "cuda": 300}
_PROBE_ROUNDS = 3
_BUSY = 0.15  # share of the processors' time that others may take while a speed is probed
_AT_ONCE = {"cpu": 32, "cuda": 500}  # samples
_SAMPLING = ("--guidance", "1", "--solver", "ab2", "--steps", "16")
_LEAST_LIMIT = 900.0  # seconds that any command may take, starting and loading included


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


@dataclass(frozen=True)
class Place:
    """What the runs of one setting are made from, and where.

    Attributes:
        probe_steps: whose speed is measured.
        again: repeat what failed.
        launch: runs `latentflow ARGUMENTS`.
    """

    setting: Setting
    train: str
    held_out: str
    autoencoder: str
    features: str
    work: Path
    results: Path
    recipe: Mapping[str, Any]
    probe_steps: int
    again: bool
    launch: Workers


def main(arguments: Sequence[str] | None = None) -> None:
    """Climb, then write the page."""
    options = _options().parse_args(arguments)
    rungs, recipe = read_rungs(Path(options.ladder) / "rungs"), base_recipe()
    results = make_folder(options.results) / "results.jsonl"
    if not options.render:
        chosen = options.rungs.split(",") if options.rungs else list(rungs)
        if unknown := [name for name in chosen if name not in rungs]:
            raise SystemExit(f"--rungs: there is no rung {unknown[0]!r}; there are {', '.join(rungs)}")
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the process that runs, too
        with ExitStack() as ends:
            place = _place(options, results, recipe, launch := Workers())
            ends.enter_context(alone(Path(options.work)))
            ends.callback(launch.close)
            whole_ladder(place, rungs, chosen, options.seeds)
            parts_of_the_time(place, rungs, options.seeds, options.shares)
    write_table(Path(options.results) / "RESULTS.md", rungs, read_outcomes(results), recipe)
    print(f"written to {Path(options.results) / 'RESULTS.md'}")


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
    names = list(rungs)
    base_and_references = [name for name in names if rungs[name].role != "rung" and name in chosen]
    steps = [_step(place, rungs, name) for name in base_and_references]
    all_runs(place, [Run(step, seed) for seed in seeds for step in steps])  # in turn: what drifts meets all of them
    for name in names:
        if name in chosen and name not in base_and_references:
            all_runs(place, [Run(_step(place, rungs, name), seed) for seed in seeds])


def parts_of_the_time(place: Place, rungs: Mapping[str, Rung], seeds: Sequence[int], shares: Sequence[float]) -> None:
    """Train the last kept recipe for parts of the time."""
    final = last_kept(climb(rungs, _of_this_setting(place), _recipe(place)))
    all_runs(place, [Run(final, seed, share) for seed in seeds for share in shares])


def _step(place: Place, rungs: Mapping[str, Rung], name: str) -> Step:
    return next(step for step in climb(rungs, _of_this_setting(place), _recipe(place)) if step.name == name)


def _of_this_setting(place: Place) -> list[Outcome]:
    return [one for one in read_outcomes(place.results) if one.setting.key == place.setting.key]


def _recipe(place: Place) -> dict[str, Any]:
    return merged(place.recipe, place.setting.changes)


def all_runs(place: Place, runs: Sequence[Run]) -> None:
    """Probe speeds, then train and evaluate what has no line yet; a GPU evaluates one run while it trains the next."""
    runs = [run for run in runs if not _is_there(place, run)]
    for step in {run.step.name: run.step for run in runs}.values():
        try:
            cache(place, step.spec, held_out=True)
            seconds_per_step(place, step)
        except Failed as error:
            failed = next(run for run in runs if run.step.name == step.name)
            append(place.results, outcome_of(place, failed, failed=str(error)))
    with ThreadPoolExecutor(1) as evaluating:
        begun: list[Future[None]] = []
        try:
            for run in runs:
                if _is_there(place, run):
                    continue
                print(run, flush=True)
                if folder := trained(place, run):
                    begun.append(evaluating.submit(evaluated, place, run, folder))
                    if place.setting.device == "cpu":
                        begun[-1].result()
            for one in begun:
                one.result()
        except BaseException:
            place.launch.close()  # an evaluation would be waited for
            raise


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
    """Train; returns the folder, or None after a line that says why it failed."""
    try:
        steps = max(round(run.share * place.setting.seconds / seconds_per_step(place, run.step)), 1)
        folder = place.work / "runs" / f"{run.step.spec.training}-{steps}-{run.seed}"
        train(place, run.step.spec, folder, steps, run.seed, limit=_limit(place))
        return folder
    except Failed as error:
        print(f"  failed: {error}", flush=True)
        append(place.results, outcome_of(place, run, failed=str(error)))
        return None


def evaluated(place: Place, run: Run, folder: Path) -> None:
    """Evaluate a trained run, and write its line."""
    try:
        outcome = outcome_of(place, run, **measured(place, run.step.spec, folder))
        print(f"  {run}: FD {outcome.distance:.4g} after {outcome.steps:,} steps", flush=True)
    except Failed as error:
        outcome = outcome_of(place, run, failed=str(error))
        print(f"  {run}: failed: {error}", flush=True)
    append(place.results, outcome)
    if not outcome.failed and "ema_lengths" not in run.step.spec.changes.get("training", {}):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the most of its bytes; the model stays


def _limit(place: Place) -> float:
    return 3 * place.setting.seconds + _LEAST_LIMIT


def measured(place: Place, spec: Spec, run: Path) -> dict[str, Any]:
    """Evaluate the model in the folder `run`, and return the figures."""
    setting, limit = place.setting, _limit(place)
    evaluated = place.work / "evaluated" / f"{spec.key}-{run.name}-{setting.key}"
    steps = log_lines(run)[-1]["step"]
    model = run
    if spec.ema_length is not None:
        model = evaluated / "model"
        if not (model / "config.json").exists():
            place.launch(["ema", run, "--length", spec.ema_length, "--out", model], evaluated / "ema", limit)
    device = ("--device", setting.device)
    reference = place.work / f"held-out-{setting.key}.safetensors"  # with features beside it, which all runs share
    data = ("--data", place.held_out, "--reference-out", reference)
    drawn = ("--features", place.features, "--num", setting.num, "--batch-size", _AT_ONCE[setting.device], *_SAMPLING)
    place.launch(
        ["evaluate", model, *data, *drawn, *device, "--out", evaluated / "scores"], evaluated / "evaluate", limit
    )
    report = read_json(evaluated / "scores" / "report.json")
    held_out = cache(place, spec, held_out=True)
    printed = place.launch(
        ["loss", model, "--data", held_out, "--num", setting.num, *device, "--json"], evaluated / "loss", limit
    )
    features = report["protocol"]["features"]
    scores = {name: score["value"] for name, score in report["scores"].items()}
    limits = {
        f"{name} of real": score["limit"] for name, score in report["scores"].items() if score["limit"] is not None
    }
    return {
        "steps": steps,
        "seconds": steps * median_seconds(run),
        "scores": {**scores, **limits},
        "features": f"{Path(features['name']).name} {features['hash'][:12]}",
        "held_out_loss": list(json.loads(printed.read_text(encoding="utf-8")).values())[-1]["loss"],
        "versions": report["protocol"]["versions"],
    }


def train(
    place: Place, spec: Spec, run: Path, steps: int, seed: int, *, limit: float, extra: Sequence[str] = ()
) -> None:
    """Train a recipe into the folder `run`, with `extra` keys, in `limit` seconds at most."""
    recipe = place.work / "recipes" / f"{spec.training}.yaml"
    write_text(make_folder(recipe.parent) / recipe.name, yaml.safe_dump(dict(spec.changes), sort_keys=False))
    compiled = str(place.setting.device == "cuda").lower()
    keys = {
        "data.path": cache(place, spec),
        "autoencoder": autoencoder(place, spec),
        "out": run,
        "training.steps": steps,
        "training.seed": seed,
        "training.compile": compiled,
    }
    given = [f"{key}={value}" for key, value in keys.items()]
    arguments = ["train", recipe, *given, *extra, "--device", place.setting.device]
    place.launch(arguments, run.parent / f"{run.name}.log", limit)


def autoencoder(place: Place, spec: Spec) -> str:
    """The autoencoder of a recipe, trained now if it is one of its own."""
    if spec.autoencoder is None:
        return place.autoencoder
    run = place.work / "autoencoders" / key_of([spec.autoencoder, place.setting.image_size])
    if not (run / "autoencoder" / "config.json").exists():
        size = f"data.image_size={place.setting.image_size}"
        given = [f"data.path={place.train}", size, f"out={run}", *spec.autoencoder]
        arguments = ["train-autoencoder", "own_images", *given, "--device", place.setting.device]
        place.launch(arguments, run.parent / f"{run.name}.log", 24 * 3600.0)
    return str(run / "autoencoder")


def cache(place: Place, spec: Spec, *, held_out: bool = False) -> Path:
    """The latent cache of a recipe, encoded now if it is not there; of the held-out images without variants."""
    options = () if held_out else ("--flips", *spec.encode)
    data = place.held_out if held_out else place.train
    reference, size = autoencoder(place, spec), place.setting.image_size
    folder = place.work / "caches" / key_of([data, reference, size, options])
    if not (folder / "index.json").exists():
        arguments = ["encode", data, "--autoencoder", reference, "--image-size", size, *options, "--out", folder]
        place.launch([*arguments, "--device", place.setting.device], folder.parent / f"{folder.name}.log", 24 * 3600.0)
    return folder


def seconds_per_step(place: Place, step: Step) -> float:
    """Of a recipe, probed once; on a CPU in turn with the one below it, whose seconds are those of its own probe.

    Raises:
        Failed: a recipe does not train.
        SystemExit: other programs compute.
    """
    file = place.work / f"speeds-{place.setting.device}.json"
    speeds = read_json(file) if file.exists() else {}
    key = step.spec.training
    if key not in speeds:
        speeds[key] = _probed(place, step, speeds)
        write_text(file, json.dumps(speeds, indent=1) + "\n")
    return speeds[key]


def _probed(place: Place, step: Step, speeds: Mapping[str, float]) -> float:
    if place.setting.device == "cuda":  # whose steps take the same time each
        return probe(place, step.spec, step.name)
    rounds = []
    for _ in range(_PROBE_ROUNDS):
        if not place.setting.busy:
            require_idle()
        sides = {step.base: step.below, step.name: step.spec} if step.below else {step.name: step.spec}
        rounds.append([probe(place, spec, name) for name, spec in sides.items()])
    ratio = median(times[-1] / times[0] for times in rounds)
    reference = speeds.get(step.below.training) if step.below else None
    return ratio * (reference or median(times[0] for times in rounds))


def probe(place: Place, spec: Spec, name: str) -> float:
    """Seconds per step of a short run, which is removed afterwards."""
    run = place.work / "probes" / spec.training
    shutil.rmtree(run, ignore_errors=True)
    every = max(place.probe_steps // 6, 1)
    extra = [f"training.log_every={every}", f"training.checkpoint_every={10**6}", "training.keep_at=[]"]
    if "ema_lengths" in spec.changes.get("training", {}):
        extra.append(
            "training.ema_snapshots=1"
        )  # a whole run has few for its length, and writes them in the background
    train(place, spec, run, place.probe_steps, 0, limit=_LEAST_LIMIT, extra=extra)
    seconds = median_seconds(run)
    print(f"  {name}: {1000 * seconds:.1f} ms a step", flush=True)
    shutil.rmtree(run)
    return seconds


def log_lines(run: Path) -> list[dict[str, Any]]:
    """What a run has logged."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line]


def median_seconds(run: Path) -> float:
    """Seconds per step, the median over the log lines of a run but the first, which has the warm-up."""
    lines = log_lines(run)
    batch = lines[-1]["images_seen"] / lines[-1]["step"]
    return median(batch / line["images_per_second"] for line in lines[1:] or lines)


def require_idle() -> None:
    """Refuse to measure speeds while other programs compute."""
    if (share := busy_share()) > _BUSY:
        raise SystemExit(
            f"other programs take {100 * share:.0f} % of the processors, so speeds would not be those of this machine; "
            "repeat the command when it is idle, or add --busy"
        )


def busy_share(seconds: float = 2.0) -> float:
    """The share of the processors' time that is spent now, of Linux; 0 elsewhere."""
    file = Path("/proc/stat")
    if not file.exists():
        return 0.0

    def counts() -> tuple[int, int]:
        numbers = [int(number) for number in file.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(numbers), numbers[3] + numbers[4]  # idle, and waiting for a disk

    before = counts()
    time.sleep(seconds)
    after = counts()
    return 1 - (after[1] - before[1]) / max(after[0] - before[0], 1)


def append(file: Path, outcome: Outcome) -> None:
    """Add a line; what a kill left of the last one is cut off first."""
    if file.exists() and (text := file.read_bytes()) and not text.endswith(b"\n"):
        write_text(file, text[: text.rfind(b"\n") + 1].decode())
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json_line(outcome.model_dump(mode="json")).rstrip("\n") + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def base_recipe() -> dict[str, Any]:
    """The recipe that the rungs change: one that comes with the package, and what all runs of a ladder change of it."""
    from latentflow.training.config import find_recipe

    given = yaml.safe_load(BASE.read_text(encoding="utf-8"))
    named = yaml.safe_load(find_recipe(given["recipe"]).read_text(encoding="utf-8"))
    return merged(named, given["changes"])


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
        busy=options.busy,
    )
    return Place(
        *(setting, options.train, options.held_out, options.autoencoder, options.features),
        work=make_folder(Path(options.work) / key_of([options.train, options.autoencoder, setting.image_size])),
        results=results,
        recipe=recipe,
        probe_steps=options.probe_steps or _PROBE_STEPS[options.device],
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
        "--shares",
        type=_numbers,
        default=[0.25, 0.33, 0.5],
        help="of the time that the last kept recipe is trained for, too; default: 0.25,0.33,0.5",
    )
    parser.add_argument("--num", type=int, default=2500, help="samples of each run")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--probe-steps", type=int, help="whose speed is measured; default: 30, and 600 on CUDA")
    parser.add_argument("--busy", action="store_true", help="probe speeds although other programs compute")
    parser.add_argument("--again", action="store_true", help="repeat runs that failed")
    parser.add_argument("--set", action="append", metavar="key=value", help="a change of every recipe")
    parser.add_argument("--render", action="store_true", help="only write RESULTS.md again")
    return parser


if __name__ == "__main__":
    main()
