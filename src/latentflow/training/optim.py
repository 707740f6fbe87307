"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from latentflow.errors import ConfigError
from latentflow.records import Record
from latentflow.runtime import Runtime
from latentflow.training.muon import Muon, hidden_matrices


class OptimizerConfig(Record):
    """AdamW or Muon, and the learning rate schedule."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: orthogonalised updates for the matrices of the blocks, of the size of AdamW's, so that the "
        "learning rate stays; AdamW for embeddings, modulation, output and vectors.",
    )
    learning_rate: float = Field(1e-4, gt=0, le=1e9, description="Peak learning rate, after the warm-up.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0, le=1e3)
    weight_decay_on: Literal["matrices", "all"] = Field(
        "matrices",
        description="What decays. matrices: weights of products and convolutions, not biases, norms and embeddings. "
        "all: those, too, as in the published recipes.",
    )
    warmup_steps: int = Field(0, ge=0, le=10**9, description="Steps of linear warm-up from zero.")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="cosine: decay to final_learning_rate at the last step."
    )
    final_learning_rate: float = Field(1e-5, ge=0, le=1e9, description="Learning rate at the end of the cosine.")
    clip_norm: float | None = Field(1.0, gt=0, le=1e9, description="Maximum gradient norm; null: no clipping.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Momentum of Muon.")
    orthogonalise_every: int = Field(
        1,
        ge=1,
        le=1000,
        description="Steps from one orthogonalisation of Muon to the next, which use its last result; 2 halves the "
        "cost.",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, values: Any) -> Any:
        """Runs of earlier versions saved every key but `weight_decay_on` and Muon's, and decayed everything."""
        saved = cls.model_fields.keys() - {"weight_decay_on", "kind", "momentum", "orthogonalise_every"}
        if isinstance(values, dict) and "weight_decay_on" not in values and saved <= values.keys():
            return {**values, "weight_decay_on": "all"}
        return values

    @model_validator(mode="after")
    def _only_muon_has_its_keys(self) -> OptimizerConfig:
        for key in ("momentum", "orthogonalise_every"):
            value = getattr(self, key)
            if self.kind != "muon" and value != type(self).model_fields[key].default:
                raise ConfigError(f"optimizer.{key} = {value} is for Muon; add optimizer.kind=muon, or leave it out")
        return self

    @property
    def title(self) -> str:
        """Name for messages and reports."""
        return "AdamW" if self.kind == "adamw" else "Muon with AdamW"

    def rate(self, step: int, num_steps: int) -> float:
        """The learning rate of step `step` (the first is 0) of `num_steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(num_steps - self.warmup_steps, 1)
        height = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * height

    @property
    def gentler(self) -> str:
        """What to add to the command of a run that stopped at a gradient that is not finite."""
        changes = {"optimizer.learning_rate": self.learning_rate / 10}
        if self.clip_norm is None:
            changes["optimizer.clip_norm"] = 1.0
        options = " ".join(f"{key}={value:g} --allow-change {key}" for key, value in changes.items())
        return f"repeat the command with {options} instead of the old values"


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW | Muon:
    """AdamW with the fused update, or Muon for the matrices of the blocks and AdamW for the rest.

    Raises:
        ConfigError: Muon was asked for, and no layer of the network declares matrices that are trained.
    """
    trained = trained_parameters(network)
    if config.kind == "adamw":
        return _adamw(network, config, trained)
    matrices = hidden_matrices(network)
    if not matrices:
        raise ConfigError(
            "optimizer.kind = muon: no layer of this network declares hidden_matrices that are trained; use adamw"
        )
    taken = {id(matrix.weight) for matrix in matrices}
    return Muon(
        matrices,
        _adamw(network, config, [parameter for parameter in trained if id(parameter) not in taken]),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        every=config.orthogonalise_every,
    )


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network that are not frozen."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _adamw(network: nn.Module, config: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW for some parameters of a network."""
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if config.weight_decay and config.weight_decay_on == "matrices":
        chosen = {id(parameter) for parameter in parameters}
        decaying, spared = ([one for one in part if id(one) in chosen] for part in split_by_decay(network))
        groups = [{"params": decaying}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def prepare_step(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Set what changes from step to step, before step `step` (the first is 0) of `num_steps`; returns the rate.

    It depends on nothing but the step, so that a resumed run goes on with it.
    """
    rate = config.rate(step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    if isinstance(optimizer, Muon):
        optimizer.orthogonalises = step % config.orthogonalise_every == 0
    return rate


def optimizer_bytes(network: nn.Module, config: OptimizerConfig) -> int:
    """Bytes of the optimizer's state, exactly."""
    matrices = hidden_matrices(network) if config.kind == "muon" else []
    taken = {id(matrix.weight) for matrix in matrices}
    others = [parameter for parameter in trained_parameters(network) if id(parameter) not in taken]
    total = sum(2 * one.numel() * one.element_size() + 4 for one in others)  # two moments, and a step per tensor
    each = 2 if config.orthogonalise_every > 1 else 1  # the momentum, and the last direction
    return total + each * sum(matrix.weight.numel() * matrix.weight.element_size() for matrix in matrices)


def split_by_decay(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of products and convolutions, and the others: biases, gains of norms, embedding tables.

    The others set levels and scales, which have no reason to be near zero.
    """
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    decaying, spared = [], []
    for parameter in network.parameters():
        (decaying if parameter.dim() > 1 and id(parameter) not in tables else spared).append(parameter)
    return decaying, spared


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], largest: float | None) -> Tensor:
    """Scale the gradients down to the norm `largest` if theirs is larger; returns their norm before that, a scalar.

    This does not synchronise with the device; `FiniteGuard` checks that the norm is finite.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def loss_scaler(runtime: Runtime, loss_scale: float | None, growth_tracker: int) -> torch.amp.GradScaler:
    """The loss scaler of fp16 training, in the state that a run left it; in other precisions it does nothing.

    Args:
        loss_scale: None: the initial one.
        growth_tracker: steps since the scale last changed.
    """
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
    if loss_scale is not None and scaler.is_enabled():
        scaler.load_state_dict({**scaler.state_dict(), "scale": loss_scale, "_growth_tracker": growth_tracker})
    return scaler


def scaler_state(scaler: torch.amp.GradScaler) -> tuple[float | None, int]:
    """Loss scale and growth tracker of a scaler, which a run needs to resume; synchronises with the device."""
    state = scaler.state_dict()
    return state.get("scale"), state.get("_growth_tracker", 0)
