"""Resuming a run with a changed recipe: what may change, what must be allowed, what cannot change."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from latentflow.artifacts import write_text
from latentflow.console import notice
from latentflow.errors import ConfigError, nearest
from latentflow.plans import changed_values, spelled_out
from latentflow.training.checkpoint import newest_checkpoint, step_of
from latentflow.training.settings import is_within, keys_of, load_settings

Schema = TypeVar("Schema", bound=BaseModel)

RECIPE_FILE = "recipe.yaml"
CHANGES_FILE = "changes.jsonl"

FREE_IN_EVERY_RUN = (
    "data.num_workers",
    "data.resident",
    "training.steps",
    "training.micro_batch_size",
    "training.memory",
    "training.compile",
    "training.cuda_graph",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_every",
    "training.ema_snapshots",
    "training.keep_at",
    "training.preview_every",
    "training.track",
    "sampling",
)
"""Keys of recipes of velocity networks and students that may change between a run and its continuation."""


@dataclass(frozen=True)
class ChangeRules:
    """What may change when a run is resumed. Keys may be sections; all other keys may change if they are allowed to.

    Attributes:
        free: keys that may change at any time.
        fixed: keys that may never change, each with the reason.
        former: keys "section.key" that came later, each with the value of runs whose recipes do not have them.
    """

    free: tuple[str, ...]
    fixed: Mapping[str, str]
    former: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Changes:
    """How the recipe of a run changed after some steps.

    Attributes:
        run: the run folder.
        step: steps done with the old recipe.
        old, new: the recipes.
        values: each changed key with its old and its new value.
    """

    run: Path
    step: int
    old: BaseModel
    new: BaseModel
    values: dict[str, tuple[Any, Any]]

    def record(self) -> None:
        """Append the changes to the run's history, changes.jsonl, once."""
        file = self.run / CHANGES_FILE
        before = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        entries = ({"step": self.step, "key": key, "old": old, "new": new} for key, (old, new) in self.values.items())
        lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        added = [line for line in lines if line not in before]  # a killed command may have written some already
        if added:
            write_text(file, "".join(f"{line}\n" for line in [*before, *added]))

    def rates(self) -> tuple[float, float]:
        """The learning rate of the next step in the old and in the new recipe."""
        old, new = ((one.optimizer, one.training.steps) for one in (self.old, self.new))
        return old[0].rate(self.step, old[1]), new[0].rate(self.step, new[1])

    def announce(self) -> None:
        """Print what changed, and how it changes the learning rate."""
        if self.values:
            notice(f"from step {self.step + 1} on with another recipe: {spelled_out(self.values)}")
        before, now = self.rates()
        if before != now:
            last = self.old.optimizer.rate(max(self.step - 1, 0), self.old.training.steps)
            notice(
                f"resuming at another learning rate: {last:.3g} at step {self.step}, {now:.3g} at step {self.step + 1}"
            )


def as_begun(recipe: Schema, run: Path, rules: ChangeRules) -> Schema:
    """A recipe with what the run began with where it sets nothing, and earlier versions had another default or none."""
    if trained_steps(run) is None:
        return recipe
    begun = load_settings(type(recipe), run / RECIPE_FILE)
    if "weight_decay_on" not in recipe.optimizer.model_fields_set:
        recipe = _with_value(recipe, "optimizer.weight_decay_on", begun.optimizer.weight_decay_on)
    for key, value in rules.former.items():
        if not _sets(recipe, key) and not _sets(begun, key):
            recipe = _with_value(recipe, key, value)
    return recipe


def _begun(schema: type[Schema], run: Path, rules: ChangeRules) -> Schema:
    """The recipe of a run, of whichever version."""
    begun = load_settings(schema, run / RECIPE_FILE)
    for key, value in rules.former.items():
        begun = begun if _sets(begun, key) else _with_value(begun, key, value)
    return begun


def _sets(recipe: BaseModel, key: str) -> bool:
    section, _, entry = key.partition(".")
    return entry in getattr(recipe, section).model_fields_set


def _with_value(recipe: Schema, key: str, value: Any) -> Schema:
    section, _, entry = key.partition(".")
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={entry: value})})


def check_changes(run: Path, recipe: BaseModel, rules: ChangeRules, allowed: Sequence[str] = ()) -> Changes | None:
    """How `recipe` differs from the one that `run` was trained with so far; nothing is written.

    None if nothing was trained in the folder yet; then any recipe will do.

    Args:
        allowed: keys that may change although they change what is computed.

    Raises:
        ConfigError: a key changed that was not allowed to or never can, or `allowed` names a key that does not exist.
    """
    keys = keys_of(recipe)
    for key in allowed:
        if key not in keys:
            raise ConfigError(f"--allow-change {key}: no such key; {nearest(key, keys)}")
    step = trained_steps(run)
    if step is None:
        return None
    old = _begun(type(recipe), run, rules)
    changed = changed_values(old.model_dump(mode="json"), recipe.model_dump(mode="json"))
    for key, values in changed.items():
        reason = next((reason for name, reason in rules.fixed.items() if is_within(key, [name])), None)
        if reason:
            raise ConfigError(
                f"{run} was trained with another recipe ({spelled_out({key: values})}), and {key} cannot change: "
                f"{reason}; restore it, or choose another out"
            )
    refused = {key: values for key, values in changed.items() if not is_within(key, [*rules.free, *allowed])}
    if refused:
        flags = " ".join(f"--allow-change {key}" for key in refused)
        raise ConfigError(
            f"{run} was trained with another recipe ({spelled_out(refused)}); add {flags} to continue with the new "
            "one, restore the old one, or choose another out"
        )
    return Changes(run, step, old, recipe, changed)


def trained_steps(run: Path) -> int | None:
    """Saved steps of a run; None if there are none."""
    newest = newest_checkpoint(run)
    if not (run / RECIPE_FILE).exists():
        return None
    if newest is None:
        return 0 if (run / "model").exists() else None
    return step_of(newest)
