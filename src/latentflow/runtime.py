"""Where a command computes: device, processes, precision. Created once by each verb, and passed down.

Accelerate's state says which of how many processes this is, however they were launched; nothing else in the package
reads the launcher's environment, selects a device, or decides the precision.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from latentflow import console
from latentflow.errors import ConfigError, nearest

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch.distributed import ProcessGroup

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
PrecisionWord = Literal["fp32", "tf32", "bf16", "fp16", "auto"]
PRECISION_WORDS: tuple[str, ...] = get_args(PrecisionWord)

_TO_FIND_EACH_OTHER = timedelta(minutes=10)
# One process may have much more to do than another before they meet; the launcher ends all of them if one dies.
_TO_MEET = timedelta(days=2)
LAUNCHING = threading.RLock()
"""Held while torch's switches for float32 are set, and while a CUDA graph is recorded: threads share both."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Device, processes and precision of one command.

    Attributes:
        device: of this process; with its index on CUDA.
        rank: which of the command's processes this is, from 0; of `world`.
        local_rank: which of those on this machine; of `local_world`.
        precision: of the networks. fp32: IEEE float32. tf32: float32, products of 10-bit mantissas on tensor
            cores (CUDA; elsewhere it is fp32). bf16, fp16: autocast. Weights, optimizer, EMA and solver state are
            float32 under all of them.
        precision_is_explicit: whether the user named it; otherwise an adaptive solver may choose another one.
        group: the process group for host tensors, with a long timeout.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    precision: Precision = "fp32"
    precision_is_explicit: bool = field(default=True, compare=False)
    group: ProcessGroup | None = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The product name of the device, if it is known."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The context for calling networks: autocast for bf16 and fp16, and `float32_policy`."""
        dtype, kind = _DTYPES.get(self.precision), self.device.type
        if not torch.amp.is_autocast_available(kind):
            yield
            return
        with (
            self.float32_policy(),
            torch.autocast(self.device.type, dtype, enabled=dtype is not None),
        ):
            yield

    @contextmanager
    def float32_policy(self) -> Iterator[None]:
        """The context in which float32 products and convolutions use IEEE or TF32, backward passes included."""
        with float32_products(tf32=self.precision != "fp32") if self.device.type == "cuda" else nullcontext():
            yield

    def with_precision(self, word: PrecisionWord) -> Runtime:
        """The same runtime with another precision.

        Raises:
            ConfigError: the device does not support it.
        """
        return replace(self, precision=_resolved(word, self.device), precision_is_explicit=word != "auto")

    def for_autoencoder(self) -> Runtime:
        """The runtime of a frozen autoencoder next to a network: the same, but never in half precision."""
        return replace(self, precision="fp32" if self.precision == "fp32" else "tf32")

    def share(self, rows: range) -> range:
        """This process's share of `rows`: every `world`-th, starting at `rank`."""
        return rows[self.rank :: self.world]

    def barrier(self) -> None:
        """Wait until every process has arrived."""
        self.sum(torch.zeros(1))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, of the same shape in each."""
        if self.world == 1:
            return tensor
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total, group=self._group(total))
        return total

    def sum_later(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start summing a CPU tensor over all processes; returns a function that waits for the result."""
        if self.world == 1:
            return lambda: tensor
        total = tensor.detach().clone()
        work = torch.distributed.all_reduce(total, group=self._group(total), async_op=True)

        def arrived() -> Tensor:
            work.wait()
            return total

        return arrived

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, concatenated along the first axis in the order of ranks.

        Their lengths may differ; their other axes and dtypes must not.
        """
        if self.world == 1:
            return tensor
        lengths = self.sum(torch.eye(self.world, dtype=torch.int64)[self.rank] * len(tensor)).tolist()
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor.detach()
        parts = [torch.empty_like(padded) for _ in lengths]
        torch.distributed.all_gather(parts, padded, group=self._group(padded))
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def _group(self, tensor: Tensor) -> ProcessGroup | None:
        return self.group if tensor.device.type == "cpu" else None


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Compute float32 products and convolutions on CUDA with TF32, or in full precision, inside the context.

    Uses torch's older switches, which also set the newer ones; the other way round torch refuses to report the older
    setting, which its compiler reads. Other threads wait: the switches are those of the process, and one thread would
    compute by the switches of another, or leave them behind.
    """
    with LAUNCHING, _switched(tf32):
        yield


@contextmanager
def _switched(tf32: bool) -> Iterator[None]:
    products, convolutions = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    before = _older_switch(), products.fp32_precision, convolutions.allow_tf32, convolutions.conv.fp32_precision
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    convolutions.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        products.fp32_precision = before[1]
        convolutions.allow_tf32 = before[2]
        convolutions.conv.fp32_precision = before[3]


def _older_switch() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # only the newer one has been set
        return "highest"


def open_runtime(
    device: str | torch.device | None = None, precision: PrecisionWord = "auto", *, alone: bool = False
) -> Runtime:
    """The runtime of this process: its device, and the processes it was launched with.

    Args:
        device: "cpu", "cuda", "mps", ...; None: a GPU if there is one, else the CPU. Each of several processes gets its
            own GPU.
        precision: "auto" is bf16 on a GPU that computes in it, else fp32.
        alone: ignore other processes, for calls from a user's program.

    Raises:
        ConfigError: there is no such device, it does not support the precision, there are more processes than GPUs, or
            the processes do not find each other.
    """
    local_rank, local_world = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    world = 1 if alone else _number("WORLD_SIZE", 1)
    if world < 1:
        raise ConfigError(f"the environment says WORLD_SIZE={world}; unset it, or start the command with a launcher")
    local_world = max(local_world, local_rank + 1)
    chosen = _device(device, local_rank, local_world, world)
    resolved = _resolved(precision, chosen)
    if world == 1:
        return Runtime(chosen, precision=resolved, precision_is_explicit=precision != "auto")
    rank = _number("RANK", 0)
    if not 0 <= rank < world:
        raise ConfigError(
            f"the environment says RANK={rank} of WORLD_SIZE={world}; ranks begin at 0: unset both, or start the "
            "command with a launcher"
        )
    state, group = _joined(chosen, world)
    if state.process_index:
        console.mute()
    place = (state.process_index, world, local_rank, local_world)
    return Runtime(chosen, *place, precision=resolved, precision_is_explicit=precision != "auto", group=group)


def launch_name() -> str:
    """A name that the processes of one launch share; "" for a single process."""
    if _number("WORLD_SIZE", 1) == 1:
        return ""
    keys = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
    return " ".join(f"{key}={os.environ[key]}" for key in keys if key in os.environ)


def leave() -> None:
    """Leave the process group in order, once all is done."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _device(asked: str | torch.device | None, local_rank: int, local_world: int, world: int) -> torch.device:
    """The device of this process; on CUDA it becomes the current one."""
    from accelerate.utils import parse_flag_from_env

    if asked is None:
        gpu = "mps" if torch.backends.mps.is_available() and world == 1 else "cpu"
        gpu = "cuda" if torch.cuda.is_available() else gpu
        asked = "cpu" if parse_flag_from_env("ACCELERATE_USE_CPU") else gpu
    try:
        device = torch.device(asked)
        if device.type != "cuda" or torch.cuda.is_available():
            if device.type == "cuda":
                device = _own_gpu(device, local_rank, local_world, world)
            torch.empty(0, device=device)
            return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of these
        raise ConfigError(f"device {str(asked)!r} cannot be used here; {_usable()} can") from error
    raise ConfigError(f"device {str(asked)!r} cannot be used here; {_usable()} can")


def _own_gpu(device: torch.device, local_rank: int, local_world: int, world: int) -> torch.device:
    num_gpus = torch.cuda.device_count()
    if world > 1:
        if local_world > num_gpus:
            raise ConfigError(
                f"the launcher started {local_world} processes on this machine, which has {num_gpus} visible GPU(s); "
                f"start {num_gpus}, or add --device cpu"
            )
        if device.index is not None:
            raise ConfigError(
                f"--device {device} would put all {local_world} processes of the launcher on one GPU; use --device "
                "cuda, which gives each its own"
            )
    index = device.index if device.index is not None else local_rank if local_rank < num_gpus else 0
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _usable() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _resolved(word: PrecisionWord, device: torch.device) -> Precision:
    if word not in PRECISION_WORDS:
        raise ConfigError(f"unknown precision {word!r}; {nearest(word, PRECISION_WORDS)}")
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if word == "auto":
        return "bf16" if has_bf16 else "fp32"
    if word == "fp16" and device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU, and this is a CPU; use fp32, or bf16 to try half precision")
    if word == "bf16" and device.type == "cuda" and not has_bf16:
        raise ConfigError(f"precision bf16: {torch.cuda.get_device_name(device)} does not support it; use fp16 or fp32")
    return word


def _joined(device: torch.device, world: int) -> tuple[PartialState, ProcessGroup]:
    """Accelerate's state of this process, and the group of all of them, once they have found each other."""
    from accelerate import PartialState  # slow to import, and not needed for a single process
    from accelerate.utils import parse_flag_from_env

    for key, name in (("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if parse_flag_from_env(f"ACCELERATE_USE_{key}"):
            raise ConfigError(f"{name} shards the weights, which checkpoints here cannot hold; use DDP")
    remedy = "start them with `accelerate launch` or torchrun"
    backend = {"backend": "cpu:gloo,cuda:nccl"} if device.type == "cuda" else {}
    try:
        state = PartialState(cpu=device.type == "cpu", timeout=_TO_FIND_EACH_OTHER, **backend)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the {world} processes of the launcher did not find each other ({reason}); {remedy}"
        ) from error
    if state.num_processes != world:
        raise ConfigError(f"the launcher says {world} processes, accelerate {state.num_processes}; {remedy}")
    return state, _meeting_place()


@cache
def _meeting_place() -> ProcessGroup:
    return cast("ProcessGroup", torch.distributed.new_group(backend="gloo", timeout=_TO_MEET))


def _number(key: str, default: int) -> int:
    text = os.environ.get(key) or str(default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"the environment says {key}={text!r}, which is not a whole number; unset it, or start the command with a "
            "launcher"
        ) from None
