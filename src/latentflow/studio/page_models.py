"""The models and runs that a page was opened with, and the snapshots of the runs; each is loaded at its first use."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from latentflow.api import LatentFlow
from latentflow.errors import ArtifactError, LatentFlowError, nearest
from latentflow.model.flow_model import WEIGHTS_FILE, config_of
from latentflow.model.snapshots import BEST, snapshot_steps
from latentflow.runtime import Runtime


@dataclass(frozen=True)
class Choice:
    """A model that can be chosen.

    Attributes:
        key: its reference, as `LatentFlow.from_pretrained` takes it.
        name: for people.
    """

    key: str
    name: str


class PageModels:
    """Models by reference. Only the given ones can be opened: a page is no way to read other folders.

    Args:
        given: model folders, run folders or hub ids.
        runtime: what they compute on.

    Raises:
        ArtifactError: one of them is neither a model nor a run.
    """

    def __init__(self, given: Sequence[str], runtime: Runtime):
        self.runtime = runtime
        self.runs = [one for one in given if is_run(one)]
        for one in given:
            if one not in self.runs:
                config_of(one)
        self._given = list(dict.fromkeys(given))
        self._opened: dict[str, tuple[int, LatentFlow]] = {}
        self._lock = threading.Lock()

    def choices(self) -> list[Choice]:
        """What can be opened now: a run that trains may have more of them later."""
        found = []
        for one in self._given:
            if one not in self.runs:
                found.append(Choice(one, one))
                continue
            if (Path(one) / "model" / "config.json").is_file():
                found.append(Choice(one, one))
            if (Path(one) / BEST).is_dir():
                found.append(Choice(f"{one}@{BEST}", f"{one}, lowest held-out loss"))
            for step in reversed(snapshot_steps(one)):
                found.append(Choice(f"{one}@{step}", f"{one}, step {step:,}"))
        return found

    def open(self, key: str) -> LatentFlow:
        """A model by its key, loaded at the first call, and again where a run has written another one since.

        Raises:
            ArtifactError: it is none of the choices, or cannot be read.
        """
        with self._lock:
            keys = [one.key for one in self.choices()]
            if key not in keys:
                known = nearest(key, keys) if keys else "no model is there yet"
                raise ArtifactError(f"{key:.200} is none of the models that this page was opened with; {known}")
            stamp = _stamp(key)
            if key not in self._opened or self._opened[key][0] != stamp:
                self._opened[key] = stamp, LatentFlow.from_pretrained(key, runtime=self.runtime)
            return self._opened[key][1]

    def with_weights(self, weights: str, name: str = "") -> str | None:
        """The key of a model with these weights, given by the first digits of their hash; None: none is known.

        Args:
            name: under which the model drew; the choice of this name is loaded to look at its weights.
        """
        with self._lock:
            opened = {key: model for key, (_, model) in self._opened.items()}
        if name not in opened and name in [one.key for one in self.choices()]:
            with suppress(LatentFlowError):
                opened[name] = self.open(name)
        return next((key for key, model in opened.items() if weights and model.weights_hash.startswith(weights)), None)


def is_run(place: str) -> bool:
    """Whether a place is a run folder: it has a recipe."""
    return (Path(place) / "recipe.yaml").is_file()


def _stamp(key: str) -> int:
    """When the weights of a local model were written; 0 where there is no such file."""
    files = [Path(key) / WEIGHTS_FILE, Path(key) / "model" / WEIGHTS_FILE]
    return next((file.stat().st_mtime_ns for file in files if file.is_file()), 0)
