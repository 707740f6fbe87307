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

from latentflow.artifacts import (
    atomic_folder,
    checksum_of,
    read_json,
    read_tensors,
    remove_folder,
    write_json,
    write_tensors,
)
from latentflow.errors import ArtifactError
from latentflow.training.ema import EMA
from latentflow.weights import load_weights, require_values

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
        state = {**progress.__dict__, "files": sizes}
        write_json(temporary / _STATE, {**state, "checksum": checksum_of(state)})
    keep_newest(run, keep)
    return folder


def keep_newest(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; a resumed run does what one that was killed had left to do."""
    for old in _checkpoints(run)[:-keep]:
        remove_folder(old)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    return next(reversed(_checkpoints(run)), None)


def load_checkpoint(folder: Path, network: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore network, average and optimizer in place.

    Raises:
        ArtifactError: a file is missing, truncated, or does not fit the network.
    """
    remedy = f"delete {folder} to go on from the checkpoint before it"
    try:
        progress, sizes = _read_state(folder / _STATE)
        for name, num_bytes in sizes.items():
            found = (folder / name).stat().st_size if (folder / name).exists() else 0
            if found != num_bytes:
                raise ArtifactError(f"{folder / name} is truncated or damaged: {found} bytes, not {num_bytes}")
        load_weights(network, read_tensors(folder / "network.safetensors"), folder / "network.safetensors")
        average = read_tensors(folder / "ema.safetensors")
        require_values(network.state_dict(), average, folder / "ema.safetensors")
        ema.load(average)
        tensors = read_tensors(folder / "optimizer.safetensors")
        _load_optimizer(network, optimizer, tensors, folder / "optimizer.safetensors")
    except ArtifactError as error:
        raise ArtifactError(f"{error}; {remedy}") from error
    return progress


def _read_state(file: Path) -> tuple[Progress, dict[str, int]]:
    """How far the run had come, and the sizes of the checkpoint's files."""
    try:
        state = dict(read_json(file))
        checksum = state.pop("checksum", None)
        if checksum is not None and checksum != checksum_of(state):
            raise ValueError("it does not match its checksum")
        sizes = {str(name): int(size) for name, size in dict(state.pop("files")).items()}
        progress = Progress(**state)
        numbers = (progress.step, progress.images_seen)
        if not all(type(number) is int and 0 <= number < 2**60 for number in numbers):
            raise ValueError(f"{numbers} are no counts of steps and images")
        if not isinstance(progress.loss_scale, float | int | None):
            raise ValueError("the loss scale is no number")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{file} is damaged ({error})") from error
    return progress, sizes


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


def _load_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], file: Path
) -> None:
    parameters = dict(network.named_parameters())
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in parameters:
            raise ArtifactError(f"{file} is damaged: {key!r} belongs to no parameter")
        parameter = parameters[name]
        if value.numel() > 1 and value.shape != parameter.shape:
            raise ArtifactError(f"{file} is damaged: {key!r} has shape {list(value.shape)}")
        if not value.isfinite().all():
            raise ArtifactError(f"{file} is damaged: {key!r} holds values that are not finite")
        # Copied out of the memory-mapped file, whose pages must not be written to; moments lie in memory as their
        # parameter does (channels last, for a convolution), as the fused optimizer wants them.
        like = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
        optimizer.state[parameter][entry] = like.to(parameter.device, value.dtype).copy_(value)
