"""Trackers: where the numbers of a run go besides metrics.jsonl, through accelerate's classes for them.

    tensorboard   RUN/tensorboard/
    wandb         the project "latentflow" (or WANDB_PROJECT) of Weights & Biases; local files in RUN/wandb/
    trackio       the project "latentflow" on this machine; `trackio show` opens it
    mlflow        the experiment "latentflow" at MLFLOW_TRACKING_URI

A tracker never stops a run: what it does not take is announced once, and metrics.jsonl has all of it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from latentflow.artifacts import read_json, write_json, writing
from latentflow.console import notice
from latentflow.errors import ConfigError

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
TRACKER_FILE = "tracker.json"
"""In the run folder: by which name or id a resumed run goes on in its tracker."""
_PROJECT = "latentflow"
_RECIPE_FILE = "recipe.yaml"
_LOGIN = {
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "trackio": "check the folder that TRACKIO_DIR names",
    "mlflow": "check the server that MLFLOW_TRACKING_URI names",
}


class Tracker(Protocol):
    """What takes the numbers of a run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take in the numbers after `step` steps, by "key" or "key/part"."""

    def finish(self) -> None:
        """Write what is still to be written."""


def require_tracker(name: str | None) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        ConfigError: with the command that installs it.
    """
    if name is not None and find_spec(name) is None:
        raise ConfigError(
            f"training.track = {name} needs the package {name}, which is not installed: pip install {name}"
        )


def open_tracker(run: Path, name: str | None, first_step: int) -> Tracker | None:
    """The tracker of a run, which a resumed run continues.

    Args:
        name: None: TensorBoard where it is installed, else none.
        first_step: steps done already.

    Raises:
        ConfigError: it cannot be opened, as without a login.
    """
    if name in (None, "tensorboard"):
        return _tensorboard(run, first_step)
    file = run / TRACKER_FILE
    known = read_json(file) if file.exists() else {}
    own = known.get("id") if known.get("track") == name else None
    from accelerate import PartialState

    PartialState(cpu=True)  # which accelerate's trackers ask for; that of several processes is there already
    try:
        tracker, identity = _OPENED[name](run, own)
        tracker.start()
        if own is None:
            write_json(file, {"track": name, "id": identity(tracker)})
            tracker.store_init_configuration(_settings(run))
    except Exception as error:  # of anybody's library, over any network
        raise ConfigError(f"training.track = {name}: {_first_line(error)}; {_LOGIN[name]}, or leave it out") from error
    return _Careful(name, tracker)


class _TensorBoard:
    """Numbers for TensorBoard, in the run folder."""

    def __init__(self, folder: Path, writer: Any):
        self._folder, self._writer = folder, writer

    def log(self, values: Mapping[str, float], step: int) -> None:
        with writing(self._folder):
            for name, number in values.items():
                self._writer.add_scalar(name, number, step)

    def finish(self) -> None:
        with writing(self._folder):
            self._writer.close()


class _Careful:
    """A tracker of accelerate whose failures stop nothing."""

    def __init__(self, name: str, tracker: Any):
        self._name, self._tracker = name, tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._try(f"the numbers of step {step}", lambda: self._tracker.log(dict(values), step=step))

    def finish(self) -> None:
        self._try("the end of the run", self._tracker.finish)

    def _try(self, what: str, send: Callable[[], object]) -> None:
        try:
            send()
        except Exception as error:  # of anybody's library, over any network
            text = f"{self._name} did not take {what} ({_first_line(error)}); metrics.jsonl has all numbers"
            notice(text, f"tracker {self._name}")


def _tensorboard(run: Path, first_step: int) -> Tracker | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the `track` extra is not installed
        return None
    folder = run / "tensorboard"
    return _TensorBoard(folder, SummaryWriter(str(folder), purge_step=first_step + 1))


def _wandb(run: Path, own: str | None) -> tuple[Any, Callable[[Any], str]]:
    from accelerate.tracking import WandBTracker

    identity = own or uuid.uuid4().hex[:12]
    project = os.environ.get("WANDB_PROJECT", _PROJECT)
    made = WandBTracker(project, name=run.name, id=identity, resume="allow", dir=str(run))
    return made, lambda tracker: identity


def _trackio(run: Path, own: str | None) -> tuple[Any, Callable[[Any], str]]:
    from accelerate.tracking import TrackioTracker

    name = own or f"{run.name}-{uuid.uuid4().hex[:6]}"
    return TrackioTracker(_PROJECT, name=name, resume="allow"), lambda tracker: name


def _mlflow(run: Path, own: str | None) -> tuple[Any, Callable[[Any], str]]:
    from accelerate.tracking import MLflowTracker

    made = MLflowTracker(experiment_name=_PROJECT, run_id=own, run_name=run.name)
    return made, lambda tracker: str(tracker.tracker.info.run_id)


_OPENED = {"wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}


def _settings(run: Path) -> dict[str, str | int | float | bool | None]:
    """The recipe of a run, by keys like "training.steps"."""
    found: dict[str, str | int | float | bool | None] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                add(f"{key}.{name}".strip("."), inner)
        else:
            found[key] = value if isinstance(value, str | int | float) or value is None else str(value)

    file = run / _RECIPE_FILE
    add("", yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {})
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
