"""Shards: any number of processes find the same as one, only the first gets it, and a kill costs at most a shard."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from latentflow.errors import ArtifactError
from latentflow.evaluation import shards
from latentflow.evaluation.shards import Work, compute_in_shards, join_columns
from latentflow.runtime import leave, open_runtime

SIZE = 4  # images in a shard here
PLAN = {"of": "numbers"}


def numbers(rows: range) -> dict[str, torch.Tensor]:
    """What is computed of images: two columns of each, and one row of each shard."""
    rows_of = torch.tensor([*rows])
    return {"rows": rows_of, "squares": rows_of.double().square()[:, None].expand(-1, 3), "cost": torch.ones(1, 2)}


def whole(num: int) -> dict[str, list]:
    """The columns of all images, as lists."""
    found = join_columns([numbers(range(start, min(start + SIZE, num))) for start in range(0, num, SIZE)])
    return {name: column.tolist() for name, column in found.items()}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_SIZE", SIZE)


def _share(rank: int, world: int, port: int, num: int, folder: Path | None, fatal: int | None, results) -> None:
    """One of several processes; it is killed as it computes the shard `fatal`."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    shards.SHARD_SIZE = SIZE
    computed, counted = [], []

    def compute(rows: range) -> dict[str, torch.Tensor]:
        if rows.start // SIZE == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        computed.append(rows.start // SIZE)
        counted.append(len(rows))
        return numbers(rows)

    runtime = open_runtime("cpu")
    work = Work(folder=folder, runtime=runtime, on_images=counted.append)
    try:
        found = compute_in_shards(num, compute, plan=PLAN, work=work, for_all=("rows",))
    except ArtifactError as error:
        results.put((rank, str(error), computed, 0))
        raise SystemExit(2) from error
    results.put((rank, {name: column.tolist() for name, column in found.items()}, computed, sum(counted)))
    leave()


def run(world: int, num: int, folder: Path | None = None, fatal: int | None = None) -> list[tuple]:
    """What each process found and computed, in the order of ranks, of those that lived."""
    context = multiprocessing.get_context("forkserver")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = context.Queue()
    given = (world, store.port, num, folder, fatal, results)
    processes = [context.Process(target=_share, args=(rank, *given)) for rank in range(world)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=120) for _ in range(world - (fatal is not None)))
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "a process hangs"
    assert [process.exitcode for process in processes].count(-signal.SIGKILL) == (fatal is not None)
    return found


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("world", "num"), [(2, 22), (3, 22), (3, 3)])  # of 3 images two processes have none
def test_the_first_process_gets_all_and_the_others_what_is_for_all(tmp_path, world, num, kept):
    folder = tmp_path / "set" if kept else None
    found = run(world, num, folder)
    wanted, places = whole(num), [*range(-(-num // SIZE))]
    assert found[0][1] == wanted
    assert [columns for _, columns, *_ in found[1:]] == [{"rows": wanted["rows"]}] * (world - 1)
    assert [computed for *_, computed, _ in found] == [places[rank::world] for rank in range(world)]
    assert sum(counted for *_, counted in found) == num
    if kept:
        again = run(world, num, folder)
        assert [columns for _, columns, *_ in again] == [columns for _, columns, *_ in found]
        assert not any(computed for *_, computed, _ in again)
        assert sum(counted for *_, counted in again) == num
        assert sorted(file.name for file in folder.iterdir()) == [
            "plan.json",
            *(f"shard-{place:05d}.safetensors" for place in places),
        ]


def test_a_process_that_is_killed_ends_the_others_and_costs_one_shard(tmp_path):
    """Shards 0, 3 and 6 are of the first process, 1 and 4 of the second, which dies in its second."""
    began = time.monotonic()
    ended = run(3, 28, tmp_path / "set", fatal=4)
    assert time.monotonic() - began < 60
    assert [rank for rank, *_ in ended] == [0, 2]
    for _, said, *_ in ended:
        assert said.startswith("another process of this launch ended before its work was done")
    kept = {int(file.stem[-5:]) for file in (tmp_path / "set").glob("shard-*")}
    assert {0, 1, 2, 5} <= kept <= {0, 1, 2, 3, 5, 6}
    again = run(2, 28, tmp_path / "set")
    assert again[0][1] == whole(28)
    missing = [place for place in range(7) if place not in kept]
    assert [computed for *_, computed, _ in again] == [missing[0::2], missing[1::2]]


def test_a_single_process(tmp_path):
    for folder in (None, tmp_path / "set", tmp_path / "set"):
        found = compute_in_shards(10, numbers, plan=PLAN, work=Work(folder=folder))
        assert {name: column.tolist() for name, column in found.items()} == whole(10)


def test_parts_are_joined_by_name_and_let_go():
    parts = [{"a": torch.zeros(0, 2)}, {"a": torch.ones(2, 2), "b": torch.tensor([3, 4])}]  # the first has no images
    found = join_columns(parts)
    assert (found["a"].tolist(), found["b"].tolist()) == ([[1, 1], [1, 1]], [3, 4])
    assert parts == [{}, {}]


def test_a_folder_that_is_removed_meanwhile_is_noticed_with_the_next_shard(tmp_path):
    folder, computed = tmp_path / "set", []

    def compute(rows):
        computed.append(rows)
        if len(computed) == 2:
            shutil.rmtree(folder)
        return {"features": torch.zeros(len(rows), 2)}

    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors was removed while it was needed; repeat"):
        compute_in_shards(10, compute, plan=PLAN, work=Work(folder=folder))
    assert len(computed) == 2
    assert not list(folder.glob("*.safetensors"))
