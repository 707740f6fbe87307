"""RESULTS.md: every rung in a line, kept or not, and how long the last recipe takes to the reference's distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rules import FINAL, Outcome, Rung, Setting, Step, climb, last_kept, merged, time_to

from latentflow.artifacts import write_text

_HEAD = """# The ladder

One line for each rung of `rungs/`, failures included; `run.py` writes this page from `results.jsonl`. Each rung changes
the last recipe that was kept, and is trained for the same seconds. Values are means over seeds, ± their standard
deviation. *Gain* is how much lower the Fréchet distance is than that of the rung named next to it; a rung is kept if it
exceeds the standard deviation over seeds, of both rungs pooled.
"""


def write_table(file: Path, rungs: Mapping[str, Rung], outcomes: Sequence[Outcome], recipe: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        recipe: that the rungs change, without the changes of a setting.
    """
    settings = {one.setting.key: one.setting for one in outcomes}
    parts = [_HEAD]
    for key, setting in settings.items():
        mine = [one for one in outcomes if one.setting.key == key]
        steps = climb(rungs, mine, merged(recipe, setting.changes), setting.kept)
        parts.append(section(setting, steps, mine))
    write_text(file, "\n".join(parts))


def section(setting: Setting, steps: Sequence[Step], outcomes: Sequence[Outcome]) -> str:
    """The results of one setting."""
    done = [one for one in outcomes if not one.failed]
    machines = sorted({one.machine for one in outcomes if one.machine})
    changed = f" Changed in all: `{' '.join(flat(setting.changes))}`." if setting.changes else ""
    changed += (
        " Speeds were probed while other programs computed, so the seconds are not equal." if setting.busy else ""
    )
    changed += f" Kept by another setting: {', '.join(setting.kept)}." if setting.kept else ""
    features = sorted({one.features for one in done})
    lines = [
        f"\n## {setting.device}, {setting.seconds:g} s, on {setting.train}",
        "",
        f"{', '.join(machines)}. Trained on {setting.train} at {setting.image_size} pixels with the autoencoder "
        f"{setting.autoencoder}; {setting.num:,} samples against {setting.held_out}, guidance 1, in the features "
        f"{', '.join(features)}.{changed}",
        "",
        "| rung | what changes | seeds | steps | FD | precision | recall | class accuracy | held-out loss | gain | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for step in steps:
        runs = [one for one in outcomes if (one.rung, one.spec, one.share) == (step.name, step.spec.key, 1)]
        if runs:
            lines.append(row(step, runs))
    return "\n".join([*lines, "", *sentence(steps, outcomes)]) + "\n"


def flat(changes: Mapping[str, Any], before: str = "") -> list[str]:
    """Nested changes as `key=value`."""
    found = []
    for key, value in changes.items():
        name = f"{before}{key}"
        found += flat(value, f"{name}.") if isinstance(value, Mapping) else [f"{name}={value}"]
    return found


def row(step: Step, runs: Sequence[Outcome]) -> str:
    """One line of the table."""
    done = [one for one in runs if not one.failed]
    cells = [step.name, step.rung.title, f"{len(done)}", f"{done[0].steps:,}" if done else ""]
    cells += [spread(done, lambda one: one.distance)]
    cells += [spread(done, lambda one, name=name: one.scores.get(name)) for name in ("precision", "recall")]
    accuracy = spread(done, lambda one: one.scores.get("class-accuracy"))
    ceiling = next(
        (one.scores["class-accuracy of real"] for one in done if "class-accuracy of real" in one.scores), None
    )
    cells += [f"{accuracy} of {ceiling:.2f}" if ceiling is not None else accuracy]
    cells += [spread(done, lambda one: one.held_out_loss)]
    return f"| {' | '.join([*cells, *judged(step)])} |"


def judged(step: Step) -> tuple[str, str]:
    """The gain and the verdict in words."""
    verdict = step.verdict
    if step.rung.role == "baseline":
        return "", "baseline"
    if verdict is None:
        return "", "kept by another setting" if step.kept else "not comparable yet"
    if verdict.failed:
        return "", f"failed: {verdict.failed}"
    alone = math.isinf(verdict.spread)
    gain = f"{verdict.gain:+.3g} on {step.base}" + ("" if alone else f", spread {verdict.spread:.2g}")
    if step.rung.role == "reference":
        return gain, "reference"
    if alone:
        return gain, "undecided: one seed has no spread"
    words = "kept" if verdict.kept else "kept by another setting" if step.kept else "not kept"
    if verdict.kept and step.rung.is_aside:
        words = f"better than {step.base}"
    return gain, words + (", recall falls" if verdict.recall_falls else "")


def spread(runs: Sequence[Outcome], value: Callable[[Outcome], float | None]) -> str:
    """Mean and standard deviation of a number over runs."""
    values = [found for one in runs if (found := value(one)) is not None]
    if not values:
        return ""
    return f"{fmean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def sentence(steps: Sequence[Step], outcomes: Sequence[Outcome]) -> list[str]:
    """How long the last kept recipe takes to the distance of each reference, in shares of its seconds."""
    final = last_kept(steps)
    done = [one for one in outcomes if not one.failed and one.spec == final.spec.key]
    curves: dict[int, dict[float, float]] = {}
    for one in done:
        if one.rung == FINAL or one.rung == final.name:
            curves.setdefault(one.seed, {})[one.share] = one.distance
    found = []
    for step in steps:
        if step.rung.role != "reference":
            continue
        targets = {
            one.seed: one.distance
            for one in outcomes
            if one.rung == step.name and one.spec == step.spec.key and not one.failed
        }
        ratios = [time_to(targets[seed], curve) for seed, curve in curves.items() if seed in targets and len(curve) > 1]
        if ratios:
            found += [
                _ratio_in_words(step.rung.title, final.name, ratios, min(min(curve) for curve in curves.values()))
            ]
    return found


def _ratio_in_words(title: str, final: str, ratios: Sequence[float], least: float) -> str:
    low, high = min(ratios), max(ratios)
    if math.isinf(high):
        return f"{final} does not reach the distance of {title} in the same time with every seed."
    mean = math.exp(fmean(math.log(ratio) for ratio in ratios))
    at_most = "at most " if low <= least else ""
    return (
        f"**{final} reaches the distance of {title} in {at_most}{mean:.2f} of its time** ({low:.2f} to {high:.2f} over "
        f"{len(ratios)} seeds, each with its cosine to the end; interpolated between shares of the time)."
    )
