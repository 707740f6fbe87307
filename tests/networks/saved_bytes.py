"""What a network keeps for its backward pass, counted as autograd stores it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor


class Saved(NamedTuple):
    """Bytes of the storages that a graph keeps alive; each counts once, and parameters do not.

    Attributes:
        total: all of them.
        wide: those of float32 and wider.
        kept: dtype and shape of each, the largest first.
    """

    total: int
    wide: int
    kept: list[tuple[int, torch.dtype, tuple[int, ...]]]


def saved_bytes(function: Callable[[], Tensor], apart: Collection[Tensor] = ()) -> Saved:
    """What the graph of `function()` keeps, less the storages of `apart`: parameters and inputs."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in apart}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:  # the graph holds it, so that no other storage gets its address
            kept.setdefault(storage.data_ptr(), (storage.nbytes(), tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    rows = sorted(kept.values(), key=lambda row: -row[0])
    return Saved(sum(row[0] for row in rows), sum(row[0] for row in rows if row[1].itemsize >= 4), rows)


def held_bytes(function: Callable[[], Tensor]) -> int:
    """Bytes that are taken in `function()` and still held when its result is: that, and all that its graph keeps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    assert result.requires_grad
    return sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
