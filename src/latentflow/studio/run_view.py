"""A run folder as the page shows it: how far it is, its losses, its previews. Files are read, nothing else is done."""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from latentflow.artifacts import LOCK
from latentflow.errors import ArtifactError
from latentflow.model.snapshots import CHECKPOINTS

MOST_POINTS = 400
"""Of a curve; the mean of neighbours stands for more."""

_LATEST = 10  # log lines whose mean speed tells the time left
_SHARES = (0.1, 0.4, 1.0)  # of the run so far, at which the loss by time bin is shown
_PREVIEW = re.compile(r"step-(\d{1,12})\.png")


def run_facts(run: str | Path) -> dict[str, Any]:
    """The state of a run as JSON; a number that its files do not hold is None.

    Raises:
        ArtifactError: it is no run folder.
    """
    run = Path(run)
    recipe, lines = _recipe(run), read_lines(run / "metrics.jsonl")
    last = lines[-1] if lines else {}
    steps, step = _number(recipe.get("training"), "steps"), last.get("step", 0)
    holder = _holder(run)
    return {
        "name": str(run),
        "description": str(recipe.get("description") or ""),
        "state": _state(steps, step, holder),
        "step": step,
        "steps": steps,
        "images_per_second": last.get("images_per_second"),
        "seconds_left": _seconds_left(lines, steps, recipe),
        "learning_rate": last.get("learning_rate"),
        "memory": _memory(holder),
        "device": _device(run),
        "loss": _curve(lines, "loss"),
        "held_out": _curve(lines, "held_out_loss"),
        "by_time": _by_time(lines, "loss_by_time"),
        "previews": previews_of(run),
        "newest": _newest(run),
    }


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a log that may be written to at this moment: what is no whole line is left out."""
    try:
        content = file.read_bytes()
    except OSError:
        return []
    found = []
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            found.append(line)
    return found


def previews_of(run: Path) -> list[int]:
    """The steps of its preview grids, rising."""
    matches = (_PREVIEW.fullmatch(file.name) for file in (run / "samples").glob("step-*.png"))
    return sorted(int(match[1]) for match in matches if match)


def preview_file(run: Path, step: int) -> Path:
    """The preview grid of a step.

    Raises:
        ArtifactError: there is none.
    """
    for file in (run / "samples").glob("step-*.png"):
        if (match := _PREVIEW.fullmatch(file.name)) and int(match[1]) == step:
            return file
    raise ArtifactError(f"{run} has no preview of step {step}")


def _recipe(run: Path) -> dict[str, Any]:
    file = run / "recipe.yaml"
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}; is {run} a run folder?") from None
    return found if isinstance(found, dict) else {}


def _number(section: Any, name: str) -> int | None:
    value = section.get(name) if isinstance(section, Mapping) else None
    return value if type(value) is int else None


def _state(steps: int | None, step: int, holder: Mapping[str, Any]) -> str:
    if holder:
        return "training"
    return "finished" if steps is not None and step >= steps else "stopped"


def _holder(run: Path) -> Mapping[str, Any]:
    """The process that writes the run, by its lock file; empty: there is none, or it has gone.

    The lock is not tried, since that would keep a run that is just beginning from taking it.
    """
    try:
        found = json.loads((run / f"{LOCK}.0").read_text(encoding="utf-8"))
        here = found["host"] == socket.gethostname()
        return found if not here or Path(f"/proc/{int(found['pid'])}").exists() or not Path("/proc").exists() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _memory(holder: Mapping[str, Any]) -> int | None:
    """Bytes of main memory that a run's first process holds; None: not known from here."""
    if not holder or holder.get("host") != socket.gethostname():
        return None
    try:
        status = Path(f"/proc/{int(holder['pid'])}/status").read_text(encoding="utf-8")
        return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])
    except (OSError, ValueError, TypeError):
        return None


def _device(run: Path) -> str | None:
    try:
        return str(json.loads((run / "environment.json").read_text(encoding="utf-8"))["device"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _seconds_left(lines: Sequence[Mapping[str, Any]], steps: int | None, recipe: Mapping[str, Any]) -> float | None:
    """By the speed of the latest log lines; pauses for checkpoints and previews are not counted."""
    rates = [line["images_per_second"] for line in lines[-_LATEST:] if line.get("images_per_second")]
    batch = _number(recipe.get("training"), "batch_size")
    if not rates or steps is None or batch is None:
        return None
    return max(steps - lines[-1]["step"], 0) * batch / (sum(rates) / len(rates))


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    """[step, value] of what was logged, at most `MOST_POINTS`; what is not finite is left out."""
    points = [(line["step"], line[name]) for line in lines if _is_finite(line.get(name))]
    group = -(-len(points) // MOST_POINTS) or 1
    parts = [points[start : start + group] for start in range(0, len(points), group)]
    return [[part[-1][0], sum(value for _, value in part) / len(part)] for part in parts]


def _by_time(lines: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """The loss by time bin at some shares of the run so far, each the mean of a tenth of the lines."""
    binned = [line for line in lines if isinstance(line.get(name), dict)]
    found = []
    for share in _SHARES if len(binned) >= 2 * _LATEST else _SHARES[-1:]:
        end = max(round(share * len(binned)), 1)
        part = binned[max(end - max(len(binned) // 10, 1), 0) : end]
        bins = {key: [line[name][key] for line in part if _is_finite(line[name].get(key))] for key in _bins(part, name)}
        points = [[_middle(key), sum(values) / len(values)] for key, values in sorted(bins.items()) if values]
        if points:
            found.append({"step": part[-1]["step"], "points": points})
    return found


def _bins(lines: Sequence[Mapping[str, Any]], name: str) -> set[str]:
    return {key for line in lines for key in line[name] if re.fullmatch(r"[\d.]+-[\d.]+", key)}


def _middle(bin_name: str) -> float:
    low, high = bin_name.split("-")
    return (float(low) + float(high)) / 2


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _newest(run: Path) -> str | None:
    """The name of the run's newest model; None: there is none yet."""
    if (run / "model" / "config.json").is_file():
        return str(run)
    steps = sorted(run.glob(f"{CHECKPOINTS}/step-*/model"))
    return f"{run}@{int(steps[-1].parent.name.removeprefix('step-'))}" if steps else None
