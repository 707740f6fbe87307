"""Training states on disk: complete or absent, never pickled, the newest few kept.

`checkpoints/step-00001000/` holds `network.safetensors`, `ema.safetensors`, `optimizer.safetensors` and
`state.json`. Randomness and data order follow from (seed, images seen), so no generator state is stored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from latentflow.artifacts import atomic_folder, read_json, read_tensors, remove_folder, write_json, write_tensors
from latentflow.errors import ArtifactError
from latentflow.training.ema import EMA
from latentflow.weights import load_weights

_FOLDER = re.compile(r"step-(\d{8})")
_STATE = "state.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        images_seen: images of those steps, over all processes.
        loss_scale: of fp16 training, None otherwise.
    """

    step: int = 0
    images_seen: int = 0
    loss_scale: float | None = None


def save_checkpoint(
    run: Path, progress: Progress, network: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, *, keep: int
) -> Path:
    """Write one checkpoint and delete all but the newest `keep`."""
    folder = run / "checkpoints" / f"step-{progress.step:08d}"
    with atomic_folder(folder) as temporary:
        write_tensors(temporary / "network.safetensors", network.state_dict())
        write_tensors(temporary / "ema.safetensors", ema.average)
        write_tensors(temporary / "optimizer.safetensors", _optimizer_tensors(network, optimizer))
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        write_json(temporary / _STATE, {**progress.__dict__, "files": sizes})
    for old in _checkpoints(run)[:-keep]:
        remove_folder(old)
    return folder


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    return next(reversed(_checkpoints(run)), None)


def load_checkpoint(folder: Path, network: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore network, average and optimizer in place.

    Raises:
        ArtifactError: a file is missing, truncated, or does not fit the network.
    """
    state = read_json(folder / _STATE)
    remedy = f"delete {folder} to go on from the checkpoint before it"
    for name, num_bytes in state.pop("files").items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != num_bytes:
            raise ArtifactError(f"{folder / name} is truncated or damaged: {found} bytes, not {num_bytes}; {remedy}")
    load_weights(network, read_tensors(folder / "network.safetensors"), folder / "network.safetensors")
    ema.load(read_tensors(folder / "ema.safetensors"))
    _load_optimizer(network, optimizer, read_tensors(folder / "optimizer.safetensors"))
    return Progress(**state)


def _checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first: a folder under its final name was complete when it got it."""
    return sorted(folder for folder in (run / "checkpoints").glob("step-*") if _FOLDER.fullmatch(folder.name))


def _optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: "blocks.0.weight/exp_avg"."""
    return {
        f"{name}/{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(network.named_parameters())
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        # Copied out of the memory-mapped file, whose pages must not be written to; moments lie in memory as their
        # parameter does (channels last, for a convolution), as the fused optimizer wants them.
        like = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
        optimizer.state[parameter][entry] = like.to(parameter.device, value.dtype).copy_(value)
