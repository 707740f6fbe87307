"""The solvers that were fitted to a model, as its folder stores them in solvers.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from latentflow.artifacts import read_json, write_json
from latentflow.errors import ArtifactError, ConfigError
from latentflow.flow.multistep import FittedMultistep
from latentflow.records import Record, explain

SOLVERS_FILE = "solvers.json"
_MOST_BYTES = 16 << 20


class FittedSolver(Record):
    """Times and weights of a multistep solver, and how they were found."""

    times: list[float] = Field(min_length=3, max_length=1000, description="t_0 = 1 to t_N = 0.")
    weights: list[list[float]] = Field(
        description="For each step, of the newest to the oldest velocity; their sum is 1."
    )
    fitted_with: dict[str, Any] = Field(description="What it was fitted with: guidance, seeds, and the reference.")
    error: float = Field(description="Mean distance of its end points from the reference, on held-out seeds.")
    others: dict[str, float] = Field(description="The same of other solvers of as many evaluations.")

    @model_validator(mode="after")
    def _check(self) -> FittedSolver:
        falling = all(t > t_next for t, t_next in zip(self.times, self.times[1:], strict=False))
        if not falling or (self.times[0], self.times[-1]) != (1, 0):
            raise ValueError("times must fall from 1 to 0")
        if len(self.weights) != len(self.times) - 1:
            raise ValueError(f"{len(self.weights)} rows of weights for {len(self.times) - 1} steps")
        if any(not 1 <= len(row) <= step + 1 for step, row in enumerate(self.weights)):
            raise ValueError("a step has no weight, or more weights than there are velocities")
        return self

    @property
    def method(self) -> FittedMultistep:
        return FittedMultistep(tuple(self.times), tuple(map(tuple, self.weights)))

    @property
    def hash(self) -> str:
        """Eight hex digits of the SHA-256 of times and weights."""
        return hashlib.sha256(json.dumps([self.times, self.weights]).encode()).hexdigest()[:8]


class FittedSolvers(Record):
    """All solvers that were fitted to one network."""

    weights: str = Field(default="", description="SHA-256 of the weights of the network that they were fitted to.")
    solvers: dict[str, FittedSolver] = Field(default_factory=dict, description="By name: fitted-N has N evaluations.")

    def resolved(self, name: str, model: str, weights: str) -> tuple[str, FittedMultistep]:
        """The solver called fitted-N, or fitted-N@HASH for that one and no other, and its name with the hash.

        Args:
            model: the folder, for messages.
            weights: SHA-256 of those that the network has.

        Raises:
            ConfigError: there is none, it was fitted to other weights, or it is another one.
        """
        plain, _, wanted = name.partition("@")
        again = f"run `latentflow fit-solver {model} --evaluations {plain.rpartition('-')[2]}`"
        if plain not in self.solvers:
            others = f"it has {', '.join(self.solvers)}; for this one " if self.solvers else ""
            raise ConfigError(f"the model has no solver {plain}; {others}{again}")
        if self.weights != weights:
            raise ConfigError(f"{plain} was fitted to other weights than the model has; {again} again")
        found = self.solvers[plain]
        if wanted and wanted != found.hash:
            raise ConfigError(f"the solver {name} is not there: the model's {plain} is now {found.hash}; use {plain}")
        return f"{plain}@{found.hash}", found.method


def read_solvers(folder: str | Path) -> FittedSolvers:
    """The fitted solvers of a model folder; none if it has no such file.

    Raises:
        ArtifactError: the file is damaged or of another version.
    """
    file = Path(folder) / SOLVERS_FILE
    if not file.exists():
        return FittedSolvers()
    if file.stat().st_size > _MOST_BYTES:
        raise ArtifactError(f"{file} is larger than {_MOST_BYTES >> 20} MiB, which no fitted solvers are; delete it")
    try:
        return FittedSolvers.model_validate(read_json(file))
    except ValidationError as error:
        reason = explain(error, FittedSolvers)
    raise ArtifactError(f"{file} does not hold fitted solvers ({reason}); delete it, or fit them again")


def write_solvers(folder: str | Path, solvers: FittedSolvers) -> None:
    """Write the fitted solvers of a model folder, complete or not at all."""
    write_json(Path(folder) / SOLVERS_FILE, solvers.model_dump(mode="json"))
