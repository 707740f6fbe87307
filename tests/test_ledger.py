"""Facts about files last as long as the files do not change, and nothing depends on their being kept."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from latentflow import ledger
from latentflow.ledger import Ledger, cache_folder, one_at_a_time


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A file that counts as old enough to be remembered."""
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ledger, "_UNSETTLED_SECONDS", -1.0)
    file = tmp_path / "a.bmp"
    file.write_bytes(b"abc")
    return file


def remember(file, value):
    with Ledger("test", file.parent) as book:
        book.put(file.name, file.stat(), value)


def recall(file, kind="test"):
    return Ledger(kind, file.parent).get(file.name, file.stat())


def test_a_fact_is_remembered(settled):
    remember(settled, {"crc": 17})
    assert recall(settled) == {"crc": 17}
    assert recall(settled, "another kind") is None


def test_other_bytes_of_the_same_size_with_the_old_time_are_noticed(settled):
    before = settled.stat()
    remember(settled, 17)
    time.sleep(0.02)
    settled.write_bytes(b"abd")
    os.utime(settled, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert settled.stat().st_mtime_ns == before.st_mtime_ns
    assert recall(settled) is None


def test_a_replaced_file_is_noticed(settled):
    remember(settled, 17)
    other = settled.with_name("other")
    other.write_bytes(b"abd")
    other.replace(settled)
    assert recall(settled) is None


def test_a_file_that_was_just_written_is_not_trusted(settled, monkeypatch):
    monkeypatch.setattr(ledger, "_UNSETTLED_SECONDS", 60.0)
    remember(settled, 17)
    assert recall(settled) is None


def test_names_that_are_no_text(settled):
    file = settled.rename(settled.with_name("caf\udce9.bmp"))
    remember(file, 17)
    assert recall(file) == 17


def test_a_damaged_database_only_costs_time(settled):
    cache_folder().mkdir()
    (cache_folder() / "facts.sqlite").write_bytes(b"no database" * 1000)
    remember(settled, 17)
    assert recall(settled) is None


def test_a_place_that_cannot_be_written_only_costs_time(settled, monkeypatch):
    monkeypatch.setenv("LATENTFLOW_CACHE", str(settled / "below a file"))
    remember(settled, 17)
    assert recall(settled) is None


def test_a_fact_that_follows_from_content_needs_no_file(tmp_path):
    with Ledger("decodes", tmp_path) as ledger:
        ledger.put("a", "12:0000beef", "damaged")
        ledger.put("b", "13:0000beef", "")
        ledger.save()
        assert Ledger("decodes", tmp_path).get("a", "12:0000beef") == "damaged"
    assert Ledger("decodes", tmp_path).get("a", "12:0000cafe") is None
    assert Ledger("decodes", tmp_path).get("b", "13:0000beef") == ""


def _take_a_turn(place, entered):
    with one_at_a_time(place):
        entered.put(os.getpid())
        time.sleep(60)


def test_one_process_at_a_time_and_a_dead_one_lets_the_next_go_on(tmp_path):
    context = multiprocessing.get_context("spawn")
    entered = context.SimpleQueue()
    both = {(one := context.Process(target=_take_a_turn, args=(tmp_path, entered))).start() or one for _ in range(2)}
    running = {process.pid: process for process in both}
    first = running.pop(entered.get())
    with one_at_a_time(tmp_path / "elsewhere"):
        time.sleep(0.3)
    assert entered.empty()
    first.kill()
    second = running.pop(entered.get())
    second.kill()
    for process in both:
        process.join()
