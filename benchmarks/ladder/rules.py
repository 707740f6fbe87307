"""Rungs, what their runs gave, and which of them are kept.

A rung is a change of a recipe. It is tried on top of those that were kept before it, trained for the same seconds with
several seeds, and kept if the Fréchet distance falls by more than the spread of seeds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import yaml
from pydantic import Field

from latentflow.records import Record

FINAL = "final"
"""The name of runs of the last kept recipe that take a part of the seconds."""


class Rung(Record):
    """One YAML file: a change, and what it is compared with."""

    title: str
    source: str = Field("", description="Where the change is from.")
    role: Literal["baseline", "reference", "rung"] = Field(
        "rung", description="baseline: the recipe that the first rung changes; reference: a recipe to compare with."
    )
    against: str = Field(
        "",
        description="Compared with this rung, and changes its recipe; empty: the last kept one. Never kept for others.",
    )
    changes: dict[str, Any] = Field({}, description="Of the recipe, by its sections.")
    factors: dict[str, Any] = Field({}, description="What numbers of the recipe are multiplied by, after the changes.")
    encode: list[str] = Field([], description="Options of `latentflow encode` for the latent cache, besides --flips.")
    autoencoder: list[str] | None = Field(
        None,
        description="Train one on the images, with these changes of `own_images`; null: the one that is given. Never "
        "kept for others, which do not have the seconds that its training takes.",
    )
    ema_length: float | None = Field(None, description="Evaluate the average of this length; see `latentflow ema`.")

    @property
    def is_aside(self) -> bool:
        """Whether nothing stands on it, however good it is."""
        return self.role == "reference" or bool(self.against) or self.autoencoder is not None


@dataclass(frozen=True)
class Spec:
    """A recipe with everything that goes before and after it."""

    changes: Mapping[str, Any]
    encode: tuple[str, ...] = ()
    autoencoder: tuple[str, ...] | None = None
    ema_length: float | None = None

    def on_top(self, rung: Rung) -> Spec:
        """This recipe, changed by a rung."""
        return Spec(
            multiplied(merged(self.changes, rung.changes), rung.factors),
            tuple(rung.encode) or self.encode,
            self.autoencoder if rung.autoencoder is None else tuple(rung.autoencoder),
            self.ema_length if rung.ema_length is None else rung.ema_length,
        )

    @property
    def training(self) -> str:
        """A key of everything that training depends on but steps and seed."""
        return key_of([self.changes, self.encode, self.autoencoder])

    @property
    def key(self) -> str:
        """A key of everything."""
        return key_of([self.training, self.ema_length])


class Setting(Record):
    """What all runs of a ladder share; results of another setting are not compared."""

    device: str
    seconds: float = Field(description="Of training, for each run.")
    train: str
    held_out: str
    autoencoder: str
    features: str
    num: int = Field(description="Samples of each run that are compared with the held-out images.")
    image_size: int
    changes: dict[str, Any] = Field({}, description="Of every recipe.")
    kept: list[str] = Field([], description="Rungs that later ones stand on, whatever is measured here.")
    busy: bool = Field(False, description="Speeds were probed while other programs computed.")

    @property
    def key(self) -> str:
        return key_of(self.model_dump())


class Outcome(Record):
    """One run: a line of results.jsonl."""

    setting: Setting
    rung: str
    title: str
    seed: int
    spec: str
    against: str
    share: float = Field(1.0, description="Of the setting's seconds.")
    steps: int = 0
    seconds: float = Field(0.0, description="Of training, at the median speed while it ran.")
    scores: dict[str, float] = Field({}, description="By metric, with the limits of real images as METRIC of real.")
    features: str = Field("", description="Name and hash of the features.")
    held_out_loss: float | None = None
    failed: str = Field("", description="Why there are no scores.")
    machine: str = ""
    versions: dict[str, str] = Field({})
    date: str = ""

    @property
    def distance(self) -> float:
        """The Fréchet distance of whichever features."""
        return self.scores["fid"] if "fid" in self.scores else self.scores["fd"]


@dataclass(frozen=True)
class Verdict:
    """A rung compared with another one.

    Attributes:
        gain: how much lower its mean distance is.
        spread: the standard deviation over seeds, of both pooled; infinite with one seed.
        recall_falls: the recall falls by more than its own spread.
    """

    gain: float
    spread: float
    recall_falls: bool = False
    failed: str = ""

    @property
    def kept(self) -> bool:
        return not self.failed and self.gain > self.spread


@dataclass(frozen=True)
class Step:
    """A rung in its place on the ladder.

    Attributes:
        base: the name of the rung that it is compared with; empty: none.
        below: its recipe.
        verdict: None: there are no results to compare yet.
        kept: later rungs stand on it.
    """

    name: str
    rung: Rung
    spec: Spec
    base: str
    below: Spec | None
    verdict: Verdict | None
    kept: bool


def read_rungs(folder: Path) -> dict[str, Rung]:
    """All rungs by name, in the order of their names; the first is the baseline.

    Raises:
        ValueError: a file is no rung, or names one that does not come before it.
    """
    rungs: dict[str, Rung] = {}
    for file in sorted(folder.glob("*.yaml")):
        rung = Rung.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
        if rung.against and rung.against not in rungs:
            raise ValueError(f"{file}: against = {rung.against!r} is none of the rungs before it: {', '.join(rungs)}")
        if (rung.role == "baseline") is bool(rungs):
            raise ValueError(f"{file}: the first rung, and no other, has the role baseline")
        rungs[file.stem] = rung
    return rungs


def climb(
    rungs: Mapping[str, Rung], outcomes: Sequence[Outcome], base: Mapping[str, Any], kept: Sequence[str] = ()
) -> list[Step]:
    """Every rung with its recipe and verdict, as far as the outcomes decide.

    Args:
        outcomes: of one setting.
        base: the recipe that the baseline changes.
        kept: rungs that later ones stand on without a verdict, as another setting has decided.
    """
    steps: dict[str, Step] = {}
    last = ""
    for name, rung in rungs.items():
        below = rung.against or (next(iter(rungs)) if rung.role == "reference" else last)
        standing_on = steps[below].spec if below else None
        spec = (standing_on or Spec(base)).on_top(rung)
        ours = [one for one in outcomes if one.rung == name and one.spec == spec.key and one.share == 1]
        theirs = [one for one in outcomes if below and one.rung == below and one.spec == steps[below].spec.key]
        verdict = compare(ours, [one for one in theirs if one.share == 1]) if below else None
        stands = name in kept or (verdict is not None and verdict.kept)
        stands = rung.role == "baseline" or (stands and not rung.is_aside)
        steps[name] = Step(name, rung, spec, below, standing_on, verdict, stands)
        last = name if stands else last
    return list(steps.values())


def last_kept(steps: Sequence[Step]) -> Step:
    """The highest rung that later ones stand on."""
    return [step for step in steps if step.kept][-1]


def compare(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Verdict | None:
    """The verdict on a rung by its runs and those of the rung below; None: one of the two has none."""
    failed = next((one.failed for one in ours if one.failed), "")
    if failed:
        return Verdict(0.0, math.inf, failed=failed)
    theirs = [one for one in theirs if not one.failed]
    if not ours or not theirs:
        return None
    mine, others = ([one.distance for one in runs] for runs in (ours, theirs))
    recalls = [[one.scores["recall"] for one in runs if "recall" in one.scores] for runs in (ours, theirs)]
    falls = all(recalls) and fmean(recalls[1]) - fmean(recalls[0]) > pooled(*recalls)
    return Verdict(fmean(others) - fmean(mine), pooled(mine, others), falls)


def pooled(one: Sequence[float], other: Sequence[float]) -> float:
    """The standard deviation within two groups together: sqrt of the mean of their variances, weighted by n - 1."""
    groups = [group for group in (one, other) if len(group) > 1]
    if not groups:
        return math.inf
    weight = sum(len(group) - 1 for group in groups)
    return math.sqrt(sum((len(group) - 1) * stdev(group) ** 2 for group in groups) / weight)


def time_to(target: float, curve: Mapping[float, float]) -> float:
    """The seconds after which a curve of distances by seconds falls to `target`, both interpolated as logarithms.

    The least measured seconds if it is below the target from the beginning, infinity if it never is.
    """
    points = sorted(curve.items())
    for (before, high), (after, low) in pairwise(points):
        if high > target >= low:
            part = math.log(high / target) / math.log(high / low)
            return before * (after / before) ** part
    return points[0][0] if points[0][1] <= target else math.inf


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with the values of `other` where both have a key."""
    result = dict(one)
    for key, value in other.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result


def multiplied(values: Mapping[str, Any], factors: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with some numbers multiplied; whole numbers stay whole.

    Raises:
        KeyError: a number is not among the values.
    """
    result = dict(values)
    for key, factor in factors.items():
        value = values[key]
        if isinstance(factor, Mapping):
            result[key] = multiplied(value, factor)
        else:
            result[key] = round(value * factor) if isinstance(value, int) else value * factor
    return result


def key_of(value: Any) -> str:
    """A short name of any JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:12]


def read_outcomes(file: Path) -> list[Outcome]:
    """The lines of results.jsonl, of repeated runs the last; a line that a kill cut off is left out."""
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
    outcomes = [Outcome.model_validate(json.loads(line)) for line in lines[:-1] if line]
    return list({(one.setting.key, one.rung, one.spec, one.seed, one.share): one for one in outcomes}.values())
