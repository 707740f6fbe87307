"""Signals: noted once, by one thread, and in a long first step answered at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from latentflow.training.interruption import collected_signals, ended_at_once

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def handlers() -> list:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_second_is_not(number):
    before = handlers()
    with collected_signals() as received:
        signal.raise_signal(number)
        assert received == [number]
        assert handlers() == before
    assert handlers() == before


def test_in_another_thread_nothing_is_collected_and_nothing_fails():
    before, seen = handlers(), []

    def train():
        with collected_signals() as received, ended_at_once("it was compiled"):
            seen.append((list(received), handlers()))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [([], before)]


# A first step that takes long


@pytest.mark.parametrize("number", SIGNALS)
def test_a_block_is_left_in_the_middle(number):
    before, began = handlers(), time.monotonic()
    with collected_signals() as received:
        with ended_at_once("it was compiled"):
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
            time.sleep(60)
            raise AssertionError("the block went on")
        assert received == [number]
        assert handlers() == before
    assert time.monotonic() - began < 30
    assert handlers() == before
    assert signal.set_wakeup_fd(-1) == -1


def test_without_a_signal_all_is_as_before():
    with collected_signals() as received:
        inside = handlers()
        with ended_at_once("it was compiled"):
            pass
        assert handlers() == inside
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
    assert signal.set_wakeup_fd(-1) == -1


def test_faults_of_the_block_are_its_own():
    with pytest.raises(KeyError), collected_signals(), ended_at_once("it was compiled"):
        raise KeyError("a bug")


def test_a_compiler_that_loses_its_processes_to_the_signal_ends_like_others():
    """What it raises in the place of the signal is no fault of the run."""
    with collected_signals() as received:
        with ended_at_once("it was compiled"):
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                raise RuntimeError("a worker has died")
        assert received == [signal.SIGTERM]


STUCK = """
import hashlib, sys
from latentflow.training.interruption import collected_signals, ended_at_once
with collected_signals(), ended_at_once("the network was compiled", seconds=0.5):
    print("inside", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without one instruction of Python, as in a compiler
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_block_that_never_gets_back_to_python_ends_the_process(tmp_path: Path, number):
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=errors)
        try:
            assert process.stdout.readline() == b"inside\n"
            time.sleep(1)  # until it is inside
            process.send_signal(number)
            assert process.wait(timeout=60) == 128 + number
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    (line,) = log.read_text().splitlines()
    assert line == "stopped by a signal while the network was compiled; nothing is lost, repeat the command to go on"
