"""Adapters: the low-rank differences of a finetuned model from its base, and what was trained besides, in a folder.

    adapter_config.json     rank, scale, layers, and the hash of the base's weights
    adapter.safetensors     the factors, and whole tensors that the base does not have or that were trained as a whole
    config.json             of the finetuned model: its classes, its image size, its preset

Names and keys are those of peft where it has them: `base_model.model.LAYER.lora_A.weight`. Whole tensors are there as
those of peft's `modules_to_save` are, `base_model.model.NAME`, and what they began with is `start.NAME`, so that a
strength acts on them as well. A model of base and adapter has, with s the strength,

    matrices    W + s (alpha / rank) B A
    whole       (1 - s) start + s trained

which is the finetuned model at s = 1, and at s = 0 what its first step began with: a model that computes what the base
does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor

from latentflow.artifacts import read_json, read_tensors, sha256_tensors, write_json, write_tensors
from latentflow.errors import ArtifactError
from latentflow.model.config import ModelConfig
from latentflow.networks.low_rank import FACTOR_A, FACTOR_B, factors, merge_low_rank
from latentflow.records import Record, explain
from latentflow.weights import without_memory

ADAPTER_FOLDER = "adapter"
"""The folder in that of a model that was finetuned by low rank."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter.safetensors"
_OURS, _START = "base_model.model.", "start."
_HINT = "`latentflow finetune MODEL --data CACHE --method lora` makes adapters"


@dataclass(frozen=True)
class AdapterBase:
    """What a model that is finetuned by low rank began with.

    Attributes:
        reference: the name of its source.
        weights: the SHA-256 of the source's weights.
        start: those of its own weights that are trained as a whole, or that the source does not have, as they began.
    """

    reference: str
    weights: str
    start: Mapping[str, Tensor]


class AdapterRecord(Record):
    """The content of adapter_config.json; other keys, such as those of later versions of peft, are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    peft_type: Literal["LORA"] = "LORA"
    base_model_name_or_path: str = Field(max_length=10_000, description="The base, as it was named then.")
    base_weights: str = Field(pattern="^[0-9a-f]{64}$", description="The SHA-256 of its weights.")
    r: int = Field(ge=1, le=65_536, description="Rank of the factors.")
    lora_alpha: float = Field(gt=0, le=1e9, description="alpha; differences are multiplied by alpha / r.")
    target_modules: list[str] = Field(max_length=100_000, description="The layers with factors.")
    whole_tensors: list[str] = Field(max_length=100_000, description="Tensors that are there as a whole.")
    modules_to_save: list[str] | None = Field(None, description="The modules that these belong to; for peft.")
    bias: Literal["none"] = "none"
    lora_dropout: float = 0.0
    fan_in_fan_out: Literal[False] = False
    use_rslora: Literal[False] = False
    use_dora: Literal[False] = False

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.lora_alpha / self.r


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read.

    Attributes:
        folder: where it lies.
        record: its adapter_config.json.
        config: of the finetuned model.
        tensors: by their names in adapter.safetensors.
    """

    folder: Path
    record: AdapterRecord
    config: ModelConfig
    tensors: Mapping[str, Tensor]

    @property
    def weights_hash(self) -> str:
        """The SHA-256 of its tensors."""
        return sha256_tensors(self.tensors)

    @property
    def num_parameters(self) -> int:
        """Numbers that it holds, but for those that whole tensors began with."""
        return sum(tensor.numel() for name, tensor in self.tensors.items() if name.startswith(_OURS))

    def require_base(self, weights: Mapping[str, Tensor], name: object) -> None:
        """Refuse a model other than the one that the adapter was trained on.

        Args:
            name: of the model, for the message.

        Raises:
            ArtifactError: with the base's name of then.
        """
        found = sha256_tensors(weights)
        if found != self.record.base_weights:
            raise ArtifactError(
                f"{self.folder} is an adapter of {self.record.base_model_name_or_path}, whose weights have the hash "
                f"{self.record.base_weights[:12]}, but those of {name} have {found[:12]}; give the model that it was "
                "trained on"
            )

    def applied(self, base: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
        """The weights of base and adapter, for a network of `config`.

        Args:
            base: the weights of the base.

        Raises:
            ArtifactError: base, adapter and config do not fit each other.
        """
        with without_memory():
            wanted = self.config.build_network().state_dict()
        weights = {name: tensor.to(wanted[name].dtype) for name, tensor in base.items() if name in wanted}
        for name in self.record.whole_tensors:
            start, trained = self._tensor(f"{_START}{name}"), self._tensor(f"{_OURS}{name}")
            if start.shape != trained.shape:
                raise self._unfit(f"{name!r} began with the shape {list(start.shape)} and is {list(trained.shape)}")
            start = start.to(trained.dtype)  # some were written in the half precision of their base
            weights[name] = torch.lerp(start, trained, strength) if trained.is_floating_point() else trained
        low_rank: dict[str, Tensor] = {}
        for layer in self.record.target_modules:
            a, b = (self._tensor(f"{_OURS}{layer}.{end}") for end in (FACTOR_A, FACTOR_B))
            self._require_factors(layer, weights.get(f"{layer}.weight"), a, b)
            low_rank |= {f"{layer}.{FACTOR_A}": a, f"{layer}.{FACTOR_B}": b}
        return merge_low_rank({**weights, **low_rank}, strength * self.record.scale)

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise self._unfit(f"{name!r} is missing")
        tensor = self.tensors[name]
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ArtifactError(
                f"{self.folder / ADAPTER_WEIGHTS}: {name!r} holds values that are not finite; copy or fetch it again"
            )
        return tensor

    def _require_factors(self, layer: str, weight: Tensor | None, a: Tensor, b: Tensor) -> None:
        """Refuse factors that are not of the shape of a weight."""
        rank = self.record.r
        if weight is None or weight.dim() < 2:
            raise self._unfit(f"the network has no layer {layer!r}")
        shapes = ((rank, weight[0].numel()), (weight.shape[0], rank))
        for one, shape, end in zip((a, b), shapes, (FACTOR_A, FACTOR_B), strict=True):
            if one.dim() < 2 or (one.shape[0], one[0].numel()) != shape:
                raise self._unfit(f"{layer}.{end} has shape {list(one.shape)}, for a weight of {list(weight.shape)}")

    def _unfit(self, reason: str) -> ArtifactError:
        return ArtifactError(
            f"{self.folder / ADAPTER_WEIGHTS} does not fit {ADAPTER_CONFIG} and its base: {reason}; restore the folder"
        )


def is_adapter(folder: Path) -> bool:
    """Whether a folder looks like that of an adapter, of this program or of peft."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_record(folder: Path) -> AdapterRecord:
    """The adapter_config.json of a folder.

    Raises:
        ArtifactError: there is none, or it is of another kind.
    """
    file = folder / ADAPTER_CONFIG
    found = read_json(file)
    try:
        return AdapterRecord.model_validate(found)
    except ValidationError as error:
        reason = explain(error, AdapterRecord)
    raise ArtifactError(f"{file} is not that of an adapter for latentflow ({reason}); {_HINT}")


def read_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """The adapter in a folder.

    Args:
        config: that of the folder.

    Raises:
        ArtifactError: a file is missing, damaged or of another kind.
    """
    record = read_record(folder)
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    known = {f"{_OURS}{layer}.{end}" for layer in record.target_modules for end in (FACTOR_A, FACTOR_B)}
    known |= {f"{begin}{name}" for name in record.whole_tensors for begin in (_OURS, _START)}
    if unknown := sorted(tensors.keys() - known):
        raise ArtifactError(
            f"{folder / ADAPTER_WEIGHTS} does not fit {ADAPTER_CONFIG}: {unknown[0]!r} is unknown "
            f"({len(unknown)} unknown); restore the folder"
        )
    return Adapter(folder, record, config, tensors)


def write_adapter(folder: Path, base: AdapterBase, rank: int, scale: float, weights: Mapping[str, Tensor]) -> None:
    """Write adapter_config.json and adapter.safetensors into a folder.

    Args:
        rank, scale: of the factors; see `latentflow.networks.low_rank`.
        weights: of the network, factors among them.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for layer, a, b in factors(weights):
        layers.append(layer)
        tensors |= {f"{_OURS}{layer}.{FACTOR_A}": a, f"{_OURS}{layer}.{FACTOR_B}": b}
    for name, start in base.start.items():
        tensors |= {f"{_OURS}{name}": weights[name], f"{_START}{name}": start}
    record = AdapterRecord(
        base_model_name_or_path=base.reference,
        base_weights=base.weights,
        r=rank,
        lora_alpha=scale * rank,
        target_modules=sorted(layers),
        whole_tensors=sorted(base.start),
        modules_to_save=sorted({name.rpartition(".")[0] for name in base.start} - {""}) or None,
    )
    write_json(folder / ADAPTER_CONFIG, record.model_dump(mode="json"))
    write_tensors(folder / ADAPTER_WEIGHTS, tensors)
