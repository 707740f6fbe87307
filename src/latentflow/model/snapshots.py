"""The models that a run kept on its way, and their names.

RUN@1/8 is that of a share of its steps, RUN@1000 that of a step, and RUN@best that of the lowest held-out loss.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import yaml

from latentflow.artifacts import restore
from latentflow.errors import ArtifactError

CHECKPOINTS, MODEL = "checkpoints", "model"
"""The folders of a run, and of a milestone in it, that hold them."""

BEST = "best"
"""The folder of a run with its model of the lowest held-out loss, and the name of this snapshot."""

_STEP = re.compile(r"step-(\d{8,})")
_SHARE = re.compile(r"\d{1,9}(/\d{1,9}|\.\d{1,18})")


def step_of_share(share: Fraction | float, steps: int) -> int:
    """The step at a share of a run, rounded down; a float counts as the decimal number that it is written as."""
    exact = share if isinstance(share, Fraction) else Fraction(str(share))
    return int(exact * steps)


def snapshot_steps(run: str | Path) -> list[int]:
    """The steps of which a run has kept a model, rising."""
    folders = [folder for folder in (Path(run) / CHECKPOINTS).glob("step-*") if (folder / MODEL).is_dir()]
    return sorted(int(match[1]) for folder in folders if (match := _STEP.fullmatch(folder.name)))


def run_of(folder: str | Path) -> Path:
    """The run folder of the model in it; any other folder is its own."""
    folder = Path(folder)
    return folder.parent if folder.name == MODEL and (folder.parent / CHECKPOINTS).is_dir() else folder


def split_snapshot(model: str | Path) -> tuple[Path, str] | None:
    """A run folder and the name of a snapshot, from RUN@SNAPSHOT; None: it is something else.

    What exists under the whole name comes first, and what is no folder before the "@" may be a hub id.
    """
    run, at, snapshot = str(model).rpartition("@")
    if not at or not run or Path(model).exists() or not Path(run).is_dir():
        return None
    return Path(run), snapshot


def find_snapshot(run: str | Path, snapshot: str) -> Path:
    """The model folder of a snapshot of a run.

    Args:
        snapshot: a step, "1000", a share of the steps in the run's recipe, "1/8" or "0.125", or "best".

    Raises:
        ArtifactError: the run has no such snapshot; names those that it has.
    """
    if snapshot == BEST:
        return _best(Path(run))
    if re.fullmatch(r"\d{1,12}", snapshot):
        step = int(snapshot)
    elif _SHARE.fullmatch(snapshot) and not snapshot.endswith("/0"):
        step = step_of_share(Fraction(snapshot), _num_steps(Path(run), snapshot))
    else:
        raise ArtifactError(
            f"{run}@{snapshot}: a snapshot is a step, such as {run}@1000, a share of the run, such as {run}@1/8, or "
            f"{run}@{BEST}"
        )
    kept = snapshot_steps(run)
    if step not in kept:
        has = f"it has those of the steps {', '.join(map(str, kept))}" if kept else "it has none"
        raise ArtifactError(
            f"{run} has no snapshot of step {step} ({run}@{snapshot}); {has}; training.keep_at and "
            "training.keep_every keep them while a run passes the step"
        )
    return Path(run) / CHECKPOINTS / f"step-{step:08d}" / MODEL


def _best(run: Path) -> Path:
    restore(run / BEST)
    if not (run / BEST).is_dir():
        raise ArtifactError(
            f"{run} has no snapshot of the lowest held-out loss ({run}@{BEST}); runs that hold images out "
            "(data.held_out) keep it from their first checkpoint on"
        )
    return run / BEST


def _num_steps(run: Path, snapshot: str) -> int:
    """The steps that a run is to take, by its recipe."""
    file = run / "recipe.yaml"
    try:
        return int(yaml.safe_load(file.read_text(encoding="utf-8"))["training"]["steps"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise ArtifactError(
            f"{run}@{snapshot}: {file} does not say how many steps the run takes; name the step, such as {run}@1000"
        ) from None
