"""The averages that a run has kept, and averages of other lengths made of them after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from latentflow.artifacts import read_tensors
from latentflow.errors import ArtifactError
from latentflow.model.config import ModelConfig, TrainingRecord
from latentflow.training.averaging import TOLERANCE, Combination, PowerProfile, combine_profiles, spanned
from latentflow.training.checkpoint import averages_in, folders_of_averages, newest_checkpoint, read_progress, step_of
from latentflow.weights import require_values, without_memory


@dataclass(frozen=True)
class KeptAverage:
    """An average on disk.

    Attributes:
        file: of its weights.
        profile: its length and step.
        images_seen: by the run until then.
    """

    file: Path
    profile: PowerProfile
    images_seen: int


@dataclass(frozen=True)
class PostHocAverage:
    """An average to be made of others.

    Attributes:
        parts: of which it is made.
        combination: the share of each.
    """

    parts: Sequence[KeptAverage]
    combination: Combination

    @property
    def images_seen(self) -> int:
        """By the run until the step of the average."""
        return next(p.images_seen for p in self.parts if p.profile.step == self.combination.target.step)

    @property
    def spanned(self) -> tuple[float, float]:
        """The shortest and the longest length around its own, or nearest to it, that the parts make at this step."""
        target = self.combination.target
        found = spanned([part.profile for part in self.parts], target.step, target.length)
        assert found  # those that are kept are among them
        return found

    def record(self, training: TrainingRecord) -> TrainingRecord:
        """What a model with these weights says of its training."""
        target = self.combination.target
        done = {"step": target.step, "images_seen": self.images_seen, "ema_length": target.length}
        return training.model_copy(update=done)

    def weights(self, config: ModelConfig) -> dict[str, Tensor]:
        """The averaged weights of the network of `config`, by name: sums in float64, rounded to float32 at the end.

        Buffers are those of the newest part.

        Raises:
            ArtifactError: a file is damaged, or of another network.
        """
        with without_memory():
            network = config.build_network()
        expected = network.state_dict()
        learned = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        sums: dict[str, Tensor] = {}
        for part, share in zip(self.parts, self.combination.shares, strict=True):
            tensors = read_tensors(part.file)
            require_values(expected, tensors, part.file)
            for name, tensor in tensors.items():
                if name not in learned:
                    sums[name] = tensor
                elif name in sums:
                    sums[name].add_(tensor.double(), alpha=share)
                else:
                    sums[name] = share * tensor.double()
        return {name: sums[name].to(tensor.dtype).contiguous() for name, tensor in expected.items()}


def open_averages(run: str | Path) -> KeptAverages:
    """The averages that a run has kept.

    Raises:
        ArtifactError: there is no such run, or it has kept none.
    """
    if not Path(run).is_dir():
        raise ArtifactError(f"{run} does not exist; give the folder of a run of `latentflow train`")
    return KeptAverages(Path(run))


class KeptAverages:
    """The power function averages of a run: its snapshots, and those of its newest checkpoint.

    Args:
        run: the run folder.

    Attributes:
        found: the oldest first.

    Raises:
        ArtifactError: there are none.
    """

    def __init__(self, run: Path):
        self.run = run
        folders = {step_of(folder): folder for folder in folders_of_averages(run)}
        newest = newest_checkpoint(run)
        if newest is not None:
            folders.setdefault(step_of(newest), newest)
        self.found = [part for _, folder in sorted(folders.items()) for part in _kept_in(folder)]
        if not self.found:
            raise ArtifactError(
                f"{run} has kept no averages to make others of; train it with 'training.ema_lengths=[0.05, 0.1]'"
            )

    @cached_property
    def steps(self) -> list[int]:
        """The steps of which averages are kept, rising."""
        return sorted({part.profile.step for part in self.found})

    def reconstruct(self, length: float, step: int | None = None) -> PostHocAverage:
        """The average of a length, of what was kept until its step.

        Args:
            step: one of `steps`; None: the last of them.
        """
        step = self.steps[-1] if step is None else step
        parts = [part for part in self.found if part.profile.step <= step]
        return PostHocAverage(parts, combine_profiles([part.profile for part in parts], PowerProfile(length, step)))

    def why_not(self, length: float, step: int | None = None) -> str:
        """Why an average cannot be had, to follow its length in a message; "" if it can."""
        made = self.reconstruct(length, step)
        if made.combination.error <= TOLERANCE:
            return ""
        error, (low, high) = 100 * made.combination.error, made.spanned
        return (
            f" {length:g}: the averages that {self.run} has kept make it to {error:.2g} % of its profile, and at most "
            f"{100 * TOLERANCE:g} % are allowed; give {low:g} to {high:g}"
        )


def _kept_in(folder: Path) -> list[KeptAverage]:
    """The averages in a snapshot or a checkpoint."""
    files = averages_in(folder)
    if not files:
        return []
    progress, _ = read_progress(folder)
    return [KeptAverage(f, PowerProfile(length, progress.step), progress.images_seen) for length, f in files.items()]
