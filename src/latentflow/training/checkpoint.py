"""Training states on disk: complete or absent, never pickled, the newest few and milestones kept.

`checkpoints/step-00001000/` holds `network.safetensors`, `ema.safetensors`, `optimizer.safetensors` and
`state.json`, a milestone also `model/`, the model folder of that step; of the milestones at shares of a run only
`model/` is left in the end. Randomness and data order follow from (seed, images seen), so no generator state is stored.
Frozen weights are in none of them: a run has them from where it began.

A run that keeps power function averages has them in `average-LENGTH.safetensors` of every checkpoint, and in that of
every snapshot, `averages/step-00001000/`, which stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from types import TracebackType

import torch
from torch import Tensor, nn

from latentflow.artifacts import (
    atomic_folder,
    checksum_of,
    contents,
    read_json,
    read_tensors,
    remove_folder,
    write_json,
    write_tensors,
)
from latentflow.errors import ArtifactError
from latentflow.model.snapshots import BEST, CHECKPOINTS, MODEL
from latentflow.networks.in_training import frozen_parameters
from latentflow.training.ema import EMA
from latentflow.weights import require_values

NETWORK_FILE, EMA_FILE, OPTIMIZER_FILE = "network.safetensors", "ema.safetensors", "optimizer.safetensors"

SaveModel = Callable[[Path, Mapping[str, Tensor]], None]
"""Called with (folder, averaged weights, frozen ones among them) to write a model folder."""

AVERAGES = "averages"
"""The folder of a run with snapshots of its averages."""
_FOLDER = re.compile(r"step-(\d{8})")
_AVERAGE = re.compile(r"average-(.+)\.safetensors")
_STATE = "state.json"
_SPARE_BYTES = 2 << 30  # of a GPU's memory that a copy leaves free


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        images_seen: images of those steps, over all processes.
        loss_scale: of fp16 training, None otherwise.
        growth_tracker: steps since the loss scale last changed.
    """

    step: int = 0
    images_seen: int = 0
    loss_scale: float | None = None
    growth_tracker: int = 0


@dataclass(frozen=True)
class Keeping:
    """What stays of a run on disk.

    Attributes:
        newest: how many of the newest checkpoints.
        every: checkpoints at multiples of it, the milestones, stay as well; None: there are none.
        at: steps of further milestones, of which only the model stays when they are no longer among the newest.
        keeps_averages: whether the averages after so many steps stay.
    """

    newest: int
    every: int | None = None
    at: Collection[int] = ()
    keeps_averages: Callable[[int], bool] = lambda step: False

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint after `step` steps holds a model."""
        return step in self.at or (self.every is not None and step % self.every == 0)


class CheckpointWriter:
    """Writes the checkpoints of a run in a separate thread, from copies, while training continues.

    At most one is being written: the next save waits for it. An error in the thread, such as a full disk, is raised by
    the next call. As a context manager it exits when everything is on disk, or immediately on a second Ctrl-C.

    Args:
        run: the run folder.
        device: where the network is trained.
        keeping: what stays on disk.
        save_model: writes `model/` of the run before each checkpoint, and that of a milestone in it. A run that is
            killed between the two repeats the steps since the last checkpoint, and writes both again. Snapshots of
            averages, too, are written before the checkpoint of their step.
    """

    def __init__(self, run: Path, device: torch.device, keeping: Keeping, save_model: SaveModel | None = None):
        self.run, self.device, self.keeping, self.save_model = run, device, keeping, save_model
        self._on_gpu: bool | None = None if device.type == "cuda" else False
        self._on_host: Tensor | None = None
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        progress: Progress,
        network: nn.Module,
        ema: EMA,
        optimizer: torch.optim.Optimizer,
        before: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Copy the current state of training, and begin to write it.

        Args:
            before: what else has to be on disk before the checkpoint is complete; called in the thread.
        """
        self.wait()
        copy, save_model = self._copy(training_state(network, ema, optimizer)), None
        if self.save_model:
            save_model = partial(_save_whole, self.save_model, ema.frozen)  # which nothing changes while they are read
        self._thread = Thread(target=self._write, args=(progress, copy, save_model, before), name="checkpoint")
        self._thread.start()

    def raise_failure(self) -> None:
        """Raise the error of the thread, if there is one; cheap enough for every step.

        Raises:
            ArtifactError: a folder could not be written.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Return once everything is on disk.

        Raises:
            ArtifactError: a folder could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception) and self._thread is not None:
            self._thread.join()

    def _copy(self, state: Mapping[str, Mapping[str, Tensor]]) -> _Copy:
        tensors = [tensor for part in state.values() for tensor in part.values()]
        return _copied(state, self._memory(sum(map(_room, tensors))), self.device)

    def _memory(self, num_bytes: int) -> Tensor:
        """Memory for a copy: on the GPU, if it has room to spare at the first save; otherwise on the host.

        Host memory is kept for the next copy, because allocating it is slow.
        """
        if self._on_gpu is None:
            self._on_gpu = torch.cuda.mem_get_info(self.device)[0] >= num_bytes + _SPARE_BYTES
        if self._on_gpu:
            try:
                return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            except torch.OutOfMemoryError:
                self._on_gpu = False
        if self._on_host is None or self._on_host.nbytes != num_bytes:
            self._on_host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return self._on_host

    def _write(
        self, progress: Progress, copy: _Copy, save_model: SaveModel | None, before: Sequence[Callable[[], None]]
    ) -> None:
        try:
            for write in before:
                write()
            with copy.ready() as state:
                if save_model:
                    save_model(self.run / MODEL, state[EMA_FILE])
                if self.keeping.keeps_averages(progress.step):
                    write_averages(self.run, progress, state)
                is_milestone = self.keeping.is_milestone(progress.step)
                write_checkpoint(self.run, progress, state, save_model if is_milestone else None)
            keep_newest(self.run, self.keeping)
        except BaseException as error:
            self._failure = error


def _save_whole(
    save_model: SaveModel, frozen: Mapping[str, Tensor], folder: Path, moving: Mapping[str, Tensor]
) -> None:
    save_model(folder, {**frozen, **moving})


@dataclass(frozen=True)
class _Copy:
    """A snapshot of the state of training, by file and name.

    Attributes:
        tensors: views of one piece of memory.
        made: the event after which they are complete, if they come from a GPU; None: they are complete.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    made: torch.cuda.Event | None = None

    @contextmanager
    def ready(self) -> Iterator[Mapping[str, Mapping[str, Tensor]]]:
        """The tensors once they are complete; reading them from the GPU does not queue behind training steps."""
        if self.made is None:
            yield self.tensors
            return
        self.made.synchronize()
        with torch.cuda.stream(torch.cuda.Stream(self.made.device)):
            yield self.tensors


def _copied(state: Mapping[str, Mapping[str, Tensor]], memory: Tensor, device: torch.device) -> _Copy:
    """Copy tensors of `device` in stream order: after one step, and before the next.

    The host does not wait for a GPU: a copy on the same GPU takes milliseconds, one to pinned memory longer.
    """
    gpu = device.type == "cuda"
    copies: dict[str, dict[str, Tensor]] = {}
    start = 0
    for file, tensors in state.items():
        copies[file] = {}
        for name, tensor in tensors.items():
            place = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies[file][name] = place.copy_(tensor, non_blocking=gpu)
            start += _room(tensor)
    if not gpu:
        return _Copy(copies)
    made = torch.cuda.Event(blocking=True)
    made.record(torch.cuda.current_stream(device))
    return _Copy(copies, made)


def _room(tensor: Tensor) -> int:
    """Bytes of a tensor in a copy, where each starts at a multiple of 64."""
    return -(-tensor.nbytes // 64) * 64


def training_state(network: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, by file: the tensors themselves, which training continues to change."""
    optimizer_tensors = {
        f"{name}/{key}": value  # "blocks.0.weight/exp_avg", however the parameters are grouped
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    powers = {average_file(length): power.moving for length, power in ema.powers.items()}
    return {NETWORK_FILE: _moving(network), EMA_FILE: ema.moving, OPTIMIZER_FILE: optimizer_tensors, **powers}


def _moving(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network that are not frozen."""
    frozen = frozen_parameters(network)
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def average_file(length: float) -> str:
    """The file of a power function average in a checkpoint or a snapshot."""
    return f"average-{length}.safetensors"


def averages_in(folder: Path) -> dict[float, Path]:
    """The files of the power function averages in a checkpoint or a snapshot, by length."""
    found = ((_AVERAGE.fullmatch(file.name), file) for file in sorted(folder.iterdir()))
    return {float(name[1]): file for name, file in found if name}


def write_checkpoint(
    run: Path, progress: Progress, state: Mapping[str, Mapping[str, Tensor]], save_model: SaveModel | None = None
) -> Path:
    """Write one checkpoint, complete or not at all.

    Args:
        save_model: writes a model folder of its averaged weights into it.
    """
    return _write_state(run / CHECKPOINTS / _folder_name(progress.step), progress, state, save_model)


def write_averages(run: Path, progress: Progress, state: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write the power function averages of one step, complete or not at all.

    Args:
        state: as of a checkpoint.
    """
    averages = {file: tensors for file, tensors in state.items() if _AVERAGE.fullmatch(file)}
    return _write_state(run / AVERAGES / _folder_name(progress.step), progress, averages)


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _write_state(
    folder: Path, progress: Progress, state: Mapping[str, Mapping[str, Tensor]], save_model: SaveModel | None = None
) -> Path:
    with atomic_folder(folder) as temporary:
        for file, tensors in state.items():
            write_tensors(temporary / file, tensors)
        sizes = {file: (temporary / file).stat().st_size for file in sorted(state)}
        record = {**progress.__dict__, "files": sizes}
        write_json(temporary / _STATE, {**record, "checksum": checksum_of(record)})
        if save_model:
            save_model(temporary / MODEL, state[EMA_FILE])
    return folder


def keep_newest(run: Path, keeping: Keeping) -> None:
    """Delete all checkpoints but the newest ones and those of steps that are multiples of `keeping.every`.

    Of the others that hold a model, the model stays.
    """
    for old in _checkpoints(run)[: -keeping.newest]:
        if keeping.every and step_of(old) % keeping.every == 0:
            continue
        if not (old / MODEL).is_dir():
            remove_folder(old)
            continue
        tensors = [file for file in contents(old) if file.name not in (MODEL, _STATE)]
        for file in (*tensors, old / _STATE):  # the last one makes it a checkpoint
            file.unlink(missing_ok=True)


def clean_up(run: Path, keeping: Keeping, step: int) -> None:
    """Delete what a run that was killed could not: old checkpoints, and snapshots that it will write again.

    A run that begins also deletes the best weights that another one left in its folder.

    Args:
        step: at which the run begins or goes on.
    """
    keep_newest(run, keeping)
    if step == 0 and (run / BEST).is_dir():
        remove_folder(run / BEST)
    for folder in folders_of_averages(run):
        if step_of(folder) > step:
            remove_folder(folder)


def folders_of_averages(run: Path) -> list[Path]:
    """The snapshots of a run's averages, oldest first."""
    return _complete(run / AVERAGES)


def step_of(folder: Path) -> int:
    """The step of a checkpoint or a snapshot."""
    return int(folder.name.removeprefix("step-"))


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
        progress, sizes = read_progress(folder)
        for name, num_bytes in sizes.items():
            found = (folder / name).stat().st_size if (folder / name).exists() else 0
            if found != num_bytes:
                raise ArtifactError(f"{folder / name} is truncated or damaged: {found} bytes, not {num_bytes}")
        weights = read_tensors(folder / NETWORK_FILE)
        require_values(_moving(network), weights, folder / NETWORK_FILE)
        network.load_state_dict(weights, strict=False)  # frozen ones are there already
        average = read_tensors(folder / EMA_FILE)
        require_values(ema.moving, average, folder / EMA_FILE)
        ema.load(average)
        for length, power in ema.powers.items():
            kept = read_tensors(folder / average_file(length))
            require_values(ema.moving, kept, folder / average_file(length))
            power.load(kept)
        tensors = read_tensors(folder / OPTIMIZER_FILE)
        _load_optimizer(network, optimizer, tensors, folder / OPTIMIZER_FILE)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; {remedy}") from error
    return progress


def read_progress(folder: Path) -> tuple[Progress, dict[str, int]]:
    """How far the run had come at a checkpoint or a snapshot, and the sizes of its files.

    Raises:
        ArtifactError: it is damaged.
    """
    file = folder / _STATE
    try:
        state = dict(read_json(file))
        checksum = state.pop("checksum", None)
        if checksum is not None and checksum != checksum_of(state):
            raise ValueError("it does not match its checksum")
        sizes = {str(name): int(size) for name, size in dict(state.pop("files")).items()}
        progress = Progress(**state)
        numbers = (progress.step, progress.images_seen, progress.growth_tracker)
        if not all(type(number) is int and 0 <= number < 2**60 for number in numbers):
            raise ValueError(f"{numbers} are not counts of steps and images")
        if not isinstance(progress.loss_scale, float | int | None):
            raise ValueError("the loss scale is not a number")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{file} is damaged ({error})") from error
    return progress, sizes


def _checkpoints(run: Path) -> list[Path]:
    """Those of which `keep_newest` has left the model are none."""
    return [folder for folder in _complete(run / CHECKPOINTS) if _is_checkpoint(folder)]


def _is_checkpoint(folder: Path) -> bool:
    try:
        return contents(folder) != [folder / MODEL]
    except FileNotFoundError:  # a run that trains has removed it since it was listed
        return False


def _complete(place: Path) -> list[Path]:
    """Complete checkpoints or snapshots, oldest first: a folder under its final name was complete when it got it."""
    return sorted(folder for folder in place.glob("step-*") if _FOLDER.fullmatch(folder.name))


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
        # Copied out of the memory-mapped file, whose pages must not be written to. Moments have the memory layout of
        # their parameter (channels last, for a convolution), as the fused optimizer requires.
        like = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
        optimizer.state[parameter][entry] = like.to(parameter.device, value.dtype).copy_(value)
