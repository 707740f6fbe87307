"""The folder of a judge, which `latentflow train-features` writes: a feature network that was trained on one's images.

Legend: D features of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from torch import Tensor

from latentflow.artifacts import read_json, read_tensors, sha256_tensors, write_json, write_tensors
from latentflow.errors import ArtifactError
from latentflow.metrics.class_judge import ClassJudge
from latentflow.metrics.names import JUDGE_FILE
from latentflow.networks.feature_network import FeatureNetwork, FeatureNetworkConfig
from latentflow.records import Record, explain
from latentflow.sizes import ImageSize
from latentflow.weights import filled

WEIGHTS_FILE = "judge.safetensors"
MOST_PAIRS = 256
"""Held-out images whose views are to be distinguished, at most."""
_NETWORK, _CLASSES = "network.", "classes."


class JudgeRecord(Record):
    """What a judge is; judge.json."""

    format_version: Literal[1] = 1
    data: str = Field(description="The images it was trained on, in a line.")
    fingerprint: str = Field(description="Of these images.")
    num_images: int = Field(description="That it was trained on.")
    image_size: ImageSize = Field(description="Their size in pixels, before they are resized to that of the network.")
    class_names: list[str] = Field(description="Of the classes it judges; empty: it knows none.")
    method: Literal["labels", "contrastive"] = Field(description="What the network learned from.")
    network: FeatureNetworkConfig
    steps: int
    accuracy: float | None = Field(
        description="Of held-out images: the share whose class is recognised; without classes, the share of views "
        "whose nearest one, among at most 256 images, is the other view of the same image; null: it learned from "
        "labels, and its features do not separate the classes."
    )
    ceiling: float | None = Field(
        None, description="The class accuracy of held-out images, which also have to be typical; null: no classes."
    )
    num_held_out: int
    hash: str = Field(description="SHA-256 over the weights and the judge of classes.")

    @property
    def judged(self) -> str:
        """What it is, in a few words."""
        if self.class_names:
            return f"{100 * self.accuracy:.1f} % of {self.num_held_out:,} held-out images recognised"
        if self.accuracy is None:
            return "trained on labels, which its features are not shown to tell apart"
        most = min(self.num_held_out, MOST_PAIRS)
        return f"{100 * self.accuracy:.1f} % of views of {most:,} held-out images recognised"


def read_judge(folder: str | Path) -> JudgeRecord:
    """The record of a judge.

    Raises:
        ArtifactError: the folder holds none, or it is damaged.
    """
    file = Path(folder) / JUDGE_FILE
    try:
        return JudgeRecord.model_validate(read_json(file))
    except ValidationError as error:
        raise ArtifactError(f"{file} is not the record of a judge ({explain(error)}); train it again") from error


@dataclass(frozen=True)
class Judge:
    """A judge: its network, and what it knows about classes.

    Attributes:
        mean, std: [D], of the features of its training images, which standardise them.
        classes: None: it knows none.
    """

    network: FeatureNetwork
    mean: Tensor
    std: Tensor
    classes: ClassJudge | None

    def feature_tensors(self) -> dict[str, Tensor]:
        """Everything that features depend on."""
        weights = {f"{_NETWORK}{name}": tensor for name, tensor in self.network.state_dict().items()}
        return {**weights, "mean": self.mean, "std": self.std}

    def save(self, folder: str | Path, record: JudgeRecord) -> JudgeRecord:
        """Write the tensors, and then the record with their hash, which completes the judge; returns the record."""
        tensors = self.feature_tensors()
        if self.classes:
            tensors |= {f"{_CLASSES}{name}": tensor for name, tensor in self.classes.tensors().items()}
        write_tensors(Path(folder) / WEIGHTS_FILE, tensors)
        record = record.model_copy(update={"hash": sha256_tensors(tensors)})
        write_json(Path(folder) / JUDGE_FILE, record.model_dump(mode="json"))
        return record


def load_judge(folder: str | Path) -> tuple[JudgeRecord, Judge]:
    """A judge with its record.

    Raises:
        ArtifactError: the folder holds none, or it is damaged.
    """
    record, file = read_judge(folder), Path(folder) / WEIGHTS_FILE
    tensors = read_tensors(file)
    if sha256_tensors(tensors) != record.hash:
        raise ArtifactError(f"{file} does not belong to its {JUDGE_FILE}; copy both again, or train the judge again")
    network = filled(lambda: FeatureNetwork(record.network), _below(_NETWORK, tensors), file)
    found, classes = _below(_CLASSES, tensors), None
    if found:
        scalars = {"accuracy": record.ceiling, "recognised": record.accuracy, "num_held_out": record.num_held_out}
        classes = ClassJudge(**found, **scalars)
    return record, Judge(network, tensors["mean"], tensors["std"], classes)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
