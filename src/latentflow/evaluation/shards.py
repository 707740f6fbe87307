"""Work on many images in shards, which processes share and which survive a kill.

Shard k holds the images 256 k to 256 k + 255. The processes of a launch share the missing shards. Each writes a shard
as soon as it is computed, and at the end the first process gathers what the others hold. Files serve to go on after a
kill: no process waits for one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from latentflow.artifacts import checked_tensors, make_folder, open_tensors, write_tensors
from latentflow.errors import ArtifactError
from latentflow.locks import only_writer
from latentflow.plans import claim_folder, require_same_plan
from latentflow.runtime import Runtime

SHARD_SIZE = 256  # images; the most that a kill loses
_WHAT = "features of images"  # in such a folder, for messages

OnImages = Callable[[int], None]
Columns = dict[str, Tensor]
"""Numbers of images by name, each tensor [B, ...]."""


@dataclass(frozen=True)
class Work:
    """How images are worked on. It changes speed and memory, not the numbers.

    Attributes:
        batch_size: images computed together.
        num_workers: processes that read images; 0: threads; None: as many as pay.
        folder: where finished shards are kept, so that repeating the call goes on; None: in memory only.
        runtime: whose processes share the work; by default this process does all of it.
        on_images: called with the number of images that this process has just finished, shards found complete included.
    """

    batch_size: int = 32
    num_workers: int | None = None
    folder: Path | None = None
    runtime: Runtime = field(default_factory=lambda: Runtime(torch.device("cpu")))
    on_images: OnImages = lambda num_images: None


def compute_in_shards(
    num: int,
    compute: Callable[[range], Columns],
    *,
    plan: Mapping[str, Any],
    work: Work,
    for_all: Collection[str] = (),
    on_begin: Callable[[Sequence[range]], None] = lambda shards: None,
) -> Columns:
    """Compute something of images 0 ... num - 1, shard by shard, except for the shards that the folder has already.

    All processes of the launch must get here, also one for which nothing is left to do.

    Args:
        compute: the tensors of a range of images, to be joined along their first dimension; it counts its images.
        plan: what makes two sets the same, as JSON; `num` need not be in it, since a larger set only has more shards.
        for_all: columns that every process gets.
        on_begin: called with the ranges that `compute` will be called with in this process, in order.

    Returns:
        The columns of all images; in all but the first process those of `for_all`.

    Raises:
        ArtifactError: the folder holds a set of another plan, it was removed, or another process of the launch ended.
    """
    runtime, folder = work.runtime, work.folder
    shards = [range(start, min(start + SHARD_SIZE, num)) for start in range(0, num, SHARD_SIZE)]
    folder = None if folder is None else make_folder(folder)
    with nullcontext() if folder is None else only_writer(folder, runtime):
        found: dict[int, Columns] = {}
        if folder is not None:
            wanted = json.loads(json.dumps({**plan, "shard_size": SHARD_SIZE}))  # tuples as lists, as a file gives them
            require_same_plan(folder, claim_folder(folder, wanted, _WHAT), wanted, _WHAT)
            found = _found(folder, shards) if runtime.is_main else {}
        places = [place for place in range(len(shards)) if place not in found]
        missing = json.loads(_of_the_first(runtime, json.dumps(places).encode()))
        complete = sorted({*range(len(shards))} - {*missing})
        work.on_images(sum(len(shards[complete[index]]) for index in runtime.share(range(len(complete)))))
        own, ahead = [], [shards[missing[index]] for index in runtime.share(range(len(missing)))]
        on_begin(ahead)
        for rows in ahead:
            own.append(compute(rows))
            if folder is not None:
                _write_shard(folder, rows, own[-1])
        found |= _collected(runtime, missing, own)
        columns = join_columns([found[place] for place in sorted(found)]) if runtime.is_main else {}
    shared = of_the_first(runtime, {name: columns[name] for name in for_all if runtime.is_main})
    return columns | shared


def join_columns(parts: Sequence[Columns]) -> Columns:
    """Tensors of several sets of images as those of one; the parts are emptied, so that there is one copy of them."""
    joined = {}
    for name in [*dict.fromkeys(name for part in parts for name in part)]:
        tensors = [part.pop(name) for part in parts if name in part]  # of a shard without images some are missing
        whole = tensors[0].new_empty(sum(map(len, tensors)), *tensors[0].shape[1:])
        place = 0
        while tensors:
            tensor = tensors.pop(0)
            whole[place : place + len(tensor)] = tensor
            place += len(tensor)
        joined[name] = whole
    return joined


def of_the_first(runtime: Runtime, columns: Columns) -> Columns:
    """Columns of the first process, broadcast to all processes."""
    if runtime.world == 1:
        return columns
    return safetensors.torch.load(_of_the_first(runtime, _packed(columns)))


def _collected(runtime: Runtime, missing: Sequence[int], own: list[Columns]) -> dict[int, Columns]:
    """The columns of all processes by shard, gathered in the first process; nothing in the others.

    One shard of each process is exchanged at a time, so that none ever holds much more than its own.
    """
    if runtime.world == 1:
        return dict(zip(missing, own, strict=True))
    found = {}
    for start in range(0, len(missing), runtime.world):
        number = start // runtime.world
        parts = _of_each(runtime, _packed(own[number]) if number < len(own) else b"")
        if runtime.is_main:
            for place, part in zip(missing[start : start + runtime.world], parts, strict=False):
                found[place] = safetensors.torch.load(part)
    return found


def _packed(columns: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: x.detach().cpu().contiguous() for name, x in columns.items()})


def _of_each(runtime: Runtime, content: bytes) -> list[bytes]:
    """The content of every process, in the order of ranks."""
    try:
        lengths = runtime.gather(torch.tensor([len(content)]))
        joined = runtime.gather(torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[: len(content)])
    except RuntimeError as error:  # of torch.distributed, once the connection is gone
        raise ArtifactError(
            "another process of this launch ended before its work was done (see its message); repeat the command, "
            "which with --out continues from the finished shards"
        ) from error
    return [bytes(part.numpy()) for part in joined.split(lengths.tolist())]


def _of_the_first(runtime: Runtime, content: bytes) -> bytes:
    return _of_each(runtime, content if runtime.is_main else b"")[0]


def _found(folder: Path, shards: Sequence[range]) -> dict[int, Columns]:
    found = ((place, _read_shard(folder, rows)) for place, rows in enumerate(shards))
    return {place: tensors for place, tensors in found if tensors is not None}


def _shard(folder: Path, rows: range) -> Path:
    return folder / f"shard-{rows.start // SHARD_SIZE:05d}.safetensors"


def _write_shard(folder: Path, rows: range, columns: Columns) -> None:
    if not folder.is_dir():  # writing would create it again, without what it held
        raise ArtifactError(f"{_shard(folder, rows)} was removed while it was needed; repeat the command to go on")
    write_tensors(_shard(folder, rows), columns, {"rows": f"{rows.start} {rows.stop}"})


def _read_shard(folder: Path, rows: range) -> Columns | None:
    """The tensors of a shard; None if it is missing, damaged or of fewer images than it should be."""
    try:
        with open_tensors(_shard(folder, rows)) as file:
            if (file.metadata() or {}).get("rows") != f"{rows.start} {rows.stop}":
                return None
            return checked_tensors(file, _shard(folder, rows))
    except ArtifactError:
        return None
