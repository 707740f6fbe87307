"""How long a step of a recipe takes, probed on an otherwise idle machine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median

from commands import LEAST_LIMIT, Place, seconds_of_lines, train
from rules import Spec, Step

from latentflow.artifacts import read_json, write_text

PROBE_STEPS = {"cpu": 30, "cuda": 300}
"""Of a probe, by device."""
_PROBE_ROUNDS = 3
_BUSY = 0.15  # share of the processors' time that others may take while a speed is probed


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
        return probe(place, step.spec, step.name, min)  # other work on it only makes some slower
    rounds = []
    for _ in range(_PROBE_ROUNDS):
        if not place.setting.busy:
            require_idle()
        sides = {step.base: step.below, step.name: step.spec} if step.below else {step.name: step.spec}
        rounds.append([probe(place, spec, name) for name, spec in sides.items()])
    ratio = median(times[-1] / times[0] for times in rounds)
    reference = speeds.get(step.below.training) if step.below else None
    return ratio * (reference or median(times[0] for times in rounds))


def probe(place: Place, spec: Spec, name: str, of_lines: Callable[[Iterable[float]], float] = median) -> float:
    """Seconds per step of a short run, which is removed afterwards; `of_lines` of those of its log lines."""
    run = place.work / "probes" / spec.training
    shutil.rmtree(run, ignore_errors=True)
    every = max(place.probe_steps // 6, 1)
    extra = [f"training.log_every={every}", f"training.checkpoint_every={10**6}", "training.keep_at=[]"]
    if "ema_lengths" in spec.changes.get("training", {}):
        # a whole run has few for its length, and writes them in the background
        extra.append("training.ema_snapshots=1")
    train(place, spec, run, place.probe_steps, 0, limit=LEAST_LIMIT, extra=extra)
    seconds = of_lines(seconds_of_lines(run))
    print(f"  {name}: {1000 * seconds:.1f} ms a step", flush=True)
    shutil.rmtree(run)
    return seconds


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
