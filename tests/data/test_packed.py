"""Many texts in one array."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
import torch  # noqa: F401 - teaches ForkingPickler to share tensors

from latentflow.data.packed import PackedBytes, PackedText

TEXTS = ["", "a", "über/\u96ea 'x'.png", "", "lone \udce9 byte", "n01440764/n01440764_10026.JPEG", "\0"]


@pytest.mark.parametrize("texts", [TEXTS, [], [""], ["only"]])
def test_it_is_read_as_a_list_is(texts):
    for packed, items in ((PackedText(texts), texts), (PackedBytes([b"\xff", b"", b"x"]), [b"\xff", b"", b"x"])):
        assert list(packed) == items
        assert [packed[n] for n in range(len(packed))] == items
        assert (packed[1:3], packed[:], packed[::-1]) == (items[1:3], items[:], items[::-1])
        assert list(pickle.loads(pickle.dumps(packed))) == items
        for place in (-1, len(items)):
            with pytest.raises(IndexError):
                packed[place]


def _length(packed: PackedText, results) -> None:
    results.put((len(packed), packed[0], packed[len(packed) - 1], len(list(packed))))


@pytest.mark.parametrize("free", [1 << 30, 0])
def test_spawned_processes_share_it(monkeypatch, free):
    """Where there is shared memory; otherwise each gets a copy."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    packed = PackedText(f"n{number:08d}.jpg" for number in range(50_000))
    sizes = [len(ForkingPickler.dumps(packed)) for _ in range(2)]
    assert all(size < 2000 for size in sizes) if free else min(sizes) > 500_000
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_length, args=(packed, results))
    process.start()
    assert results.get(timeout=600) == (50_000, "n00000000.jpg", "n00049999.jpg", 50_000)
    process.join()
    assert packed[7] == "n00000007.jpg"
