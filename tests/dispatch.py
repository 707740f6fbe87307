"""What makes the host wait for a device, seen without one.

A meta tensor has a shape and no numbers. A program that runs on the device "meta" never read a number back: torch
refuses `item`, `nonzero`, masks as indices, and copies to the host. What goes the other way would pass in silence, so
`watched` writes it down. The same holds on any other device, where all of this is only slow.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SOURCE = str(Path(__file__).parents[1] / "src")
_READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique_dim",
    "_unique2",
    "bincount",
)
_INDEXES = ("index", "index_put", "index_put_", "_index_put_impl_")


@contextmanager
def watched(device: str = "meta") -> Iterator[list[str]]:
    """Yields the list of what made the host wait for `device`, in order: the operation, and the line that asked for it.

    Each read of a number counts, and each copy from the host but an asynchronous one from pinned memory. With
    "cpu" all reads of tensors on the CPU count, those of bookkeeping included. On "meta" there is no autocast.
    """
    waits: list[str] = []
    with ExitStack() as stack:
        if device == "meta":
            stack.enter_context(patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext()))
            stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *args: False))
        stack.enter_context(_Operations(device, waits))
        stack.enter_context(_Constructors(device, waits))
        yield waits


class LiveBytes(TorchDispatchMode):
    """What the tensors made inside take at a time; on "meta" nothing is computed.

    Attributes:
        peak: the most so far, in bytes.
    """

    def __init__(self):
        super().__init__()
        self.peak = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            result = function.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = function(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and (storage := made.untyped_storage())._cdata not in self._alive:
                self._alive.add(storage._cdata)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


class Recorder:
    """Does what a CUDA graph does, on any device: records a computation; returns its result, and what computes it.

    Only operations on tensors are repeated, on the same memory: a number that the host read, or a tensor that it made,
    stays what it was. What is written in place is as before until it is computed for the first time.

    Attributes:
        count: of computations recorded so far.
    """

    def __init__(self):
        self.count = 0

    def __call__(self, compute: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.count += 1
        tape = _Tape()
        with tape:
            result = compute()
        tape.undo()
        return result, tape.replay


class _Tape(TorchDispatchMode):
    """Operations with what they were given and what they gave."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for argument, given in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(x, x.detach().clone()) for x in tree_leaves(given) if isinstance(x, Tensor)]
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        for x, before in reversed(self.before):
            x.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.operations:
            for place, x in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != x.data_ptr():  # neither a view nor in place
                    place.copy_(x)


class _Operations(TorchDispatchMode):
    def __init__(self, device: str, waits: list[str]):
        super().__init__()
        self.device, self.waits = device, waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # in inference mode operations come whole that are else seen as what they are made of
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if why := self._why(function.overloadpacket.__name__, args, kwargs):
            self.waits.append(f"{why} in {_asked_by()}")
        return function(*args, **kwargs)

    def _why(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in _READS:
            return name if any(self._is_there(tensor) for tensor in tensors) else None
        if name in _INDEXES and self._is_there(tensors[0]):
            places = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
            if any(place.dtype in (torch.bool, torch.uint8) for place in places):
                return f"{name} by a mask"
            return None if all(self._is_there(place) for place in places) else f"{name} by places on the host"
        if name in ("_to_copy", "copy_"):
            target, source = args[:2] if name == "copy_" else (None, args[0])
            goes_to = (kwargs.get("device") or source.device) if target is None else target.device
            at_once = kwargs.get("non_blocking") or args[2:] == (True,)
            if self._is_there(source) and goes_to.type != self.device:
                return None if at_once else f"{name} to the host"
            if goes_to.type == self.device and not self._is_there(source):
                return None if at_once and source.is_pinned() else f"{name} from memory that is not pinned"
        return None

    def _is_there(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device


class _Constructors(TorchFunctionMode):
    """Tensors made of Python's numbers, which are copied to the device out of sight of the operations."""

    def __init__(self, device: str, waits: list[str]):
        super().__init__()
        self.device, self.waits = device, waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        place = kwargs.get("device")
        makes = function in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], Tensor)
        if makes and place is not None and torch.device(place).type == self.device != "cpu":
            self.waits.append(f"{function.__name__} of numbers in {_asked_by()}")
        return function(*args, **kwargs)


def _asked_by() -> str:
    """The innermost line of the program on the stack."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_SOURCE)]
    if not frames:
        return "the test"
    return f"{Path(frames[-1].filename).relative_to(_SOURCE)}:{frames[-1].lineno}: {frames[-1].line}"
