"""What every training run does before its first step: check where it reads and writes, and record what it is."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import latentflow
from latentflow.artifacts import make_folder, require_apart, require_writable, write_json, write_text
from latentflow.data.batches import TrainingImages
from latentflow.errors import ConfigError
from latentflow.runtime import Runtime
from latentflow.training.changes import RECIPE_FILE, Changes
from latentflow.training.config import Recipe
from latentflow.training.first_stage import AutoencoderRecipe
from latentflow.training.settings import to_yaml
from latentflow.training.trackers import require_tracker

_LONGEST_NAME = 255  # bytes, on every usual file system


@dataclass(frozen=True)
class PreparedRun:
    """A run that has been checked; nothing is written yet.

    Attributes:
        recipe: with everything decided.
        runtime: what it runs on.
        images: what it trains on.
        broken: images that cannot be read, each with the reason where it is known.
        changes: of the recipe since the run began; None for a new run.
    """

    recipe: Recipe | AutoencoderRecipe
    runtime: Runtime
    images: TrainingImages
    broken: list[str]
    changes: Changes | None

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.recipe.out)

    def begin(self) -> None:
        """Make the run folder and record recipe, changes and environment in it; in one process of a run."""
        run = make_folder(self.run)
        if self.changes:
            self.changes.announce()
            self.changes.record()
        write_text(run / RECIPE_FILE, to_yaml(self.recipe))
        write_json(run / "environment.json", environment(self.runtime))

    def rows(self) -> dict[str, str]:
        """What describes any run: how long it trains, where, and what is left out."""
        training, runtime = self.recipe.training, self.runtime
        passes = training.steps * training.batch_size / len(self.images)
        over = f"{passes:,.0f} passes" if passes >= 10 else f"{passes:.2g} passes"
        processes = f", {runtime.world} processes" if runtime.world > 1 else ""
        rows = {
            "training": f"{training.steps:,} steps of {training.batch_size} images, {over} over the data",
            "device": f"{runtime.device_name}, {runtime.precision}{processes}",
            "run": f"{self.run}, " + (f"going on after step {self.changes.step:,}" if self.changes else "new"),
        }
        return {**rows, "left out": f"{len(self.broken)} images that cannot be read"} if self.broken else rows


def check_places(
    recipe: Recipe | AutoencoderRecipe, data: str, also_read: Sequence[str] = (), *, replaced: Sequence[str]
) -> Path:
    """The run folder of a recipe, once it is known that it can be written and holds none of the data.

    Args:
        data: what `data.path` may be, for the message where it is not set.
        also_read: other paths that the run reads.
        replaced: folders in the run folder that training replaces.

    Raises:
        ConfigError: a path is not set, or cannot be the name of a file; or the run's tracker is not installed.
        ArtifactError: the folder cannot be written, or lies inside of the data.
    """
    if not recipe.data.path:
        raise ConfigError(f"data.path is not set; add data.path=FOLDER ({data})")
    if not recipe.out:
        raise ConfigError("out is not set; add out=runs/NAME")
    for key, path in (("data.path", recipe.data.path), ("out", recipe.out)):
        longest = max((len(os.fsencode(part)) for part in Path(path).parts), default=0)
        if longest > _LONGEST_NAME:
            raise ConfigError(f"{key} = {path[:20]!r}... has a name of {longest} bytes; the limit is {_LONGEST_NAME}")
    require_tracker(getattr(recipe.training, "track", None))  # an autoencoder's run has none
    run = require_writable(recipe.out)
    require_apart(run, recipe.data.path, *also_read, replaced=tuple(replaced))
    return Path(run)


def environment(runtime: Runtime) -> dict[str, object]:
    """What a run ran on, for environment.json."""
    return {
        "latentflow": latentflow.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": runtime.device_name,
        "num_processes": runtime.world,
        "num_threads": torch.get_num_threads(),
    }
