"""The commands that a run of the ladder consists of: encode, train, evaluate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rules import Setting, Spec, key_of
from worker import Workers

from latentflow.artifacts import make_folder, read_json, write_text

_AT_ONCE = {"cpu": 32, "cuda": 500}  # samples
_SAMPLING = ("--guidance", "1", "--solver", "ab2", "--steps", "16")
LEAST_LIMIT = 900.0
"""Seconds that any command may take, starting and loading included."""


@dataclass(frozen=True)
class Place:
    """What the runs of one setting are made from, and where.

    Attributes:
        probe_steps: whose speed is measured.
        at_once: commands that run side by side; on a GPU one training more.
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
    at_once: int
    again: bool
    launch: Workers


def limit_of(place: Place) -> float:
    """Seconds that training, or one command of an evaluation, may take."""
    return 3 * place.setting.seconds + LEAST_LIMIT


def measured(place: Place, spec: Spec, run: Path) -> dict[str, Any]:
    """Evaluate the model in the folder `run`, and return the figures."""
    setting, limit = place.setting, limit_of(place)
    evaluated = place.work / "evaluated" / f"{spec.key}-{run.name}-{setting.key}"
    steps = log_lines(run)[-1]["step"]
    model = run
    if spec.ema_length is not None:
        model = evaluated / "model"
        if not (model / "config.json").exists():
            place.launch(["ema", run, "--length", spec.ema_length, "--out", model], evaluated / "ema", limit)
    device = ("--device", setting.device)
    data = ("--data", place.held_out, "--reference-out", reference_of(place))
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
        "seconds": steps * median(seconds_of_lines(run)),
        "scores": {**scores, **limits},
        "features": f"{Path(features['name']).name} {features['hash'][:12]}",
        "held_out_loss": list(json.loads(printed.read_text(encoding="utf-8")).values())[-1]["loss"],
        "versions": report["protocol"]["versions"],
    }


def reference_of(place: Place) -> Path:
    """Statistics of the held-out images; their features lie next to it, and serve all runs of a setting."""
    return place.work / f"held-out-{place.setting.key}.safetensors"


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


def log_lines(run: Path) -> list[dict[str, Any]]:
    """What a run has logged."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line]


def seconds_of_lines(run: Path) -> list[float]:
    """Seconds per step, of each log line of a run but the first, which has the warm-up."""
    lines = log_lines(run)
    batch = lines[-1]["images_seen"] / lines[-1]["step"]
    return [batch / line["images_per_second"] for line in lines[1:] or lines]
