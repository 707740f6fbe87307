"""What the tests of a GPU share. Those that could disturb others run commands, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from latentflow.runtime import Runtime, open_runtime
from latentflow.training.settings import to_yaml
from tests import tiny

REASON = "there is no CUDA device here (LATENTFLOW_TEST_DEVICE=cpu runs most of these on the CPU)"


@pytest.fixture(scope="session")
def device() -> str:
    """Where these tests run: on CUDA, or where the environment says."""
    chosen = os.environ.get("LATENTFLOW_TEST_DEVICE", "cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip(REASON)
    return chosen


@pytest.fixture(scope="session")
def cuda(device) -> str:
    """The same for tests that mean nothing elsewhere."""
    if device != "cuda":
        pytest.skip("this needs a CUDA device")
    return device


@pytest.fixture
def runtime(device) -> Callable[[str], Runtime]:
    """The runtime that a word of precision asks for."""

    def opened(precision: str) -> Runtime:
        if device == "cpu" and precision == "fp16":
            pytest.skip("fp16 needs a GPU")
        return open_runtime(device, precision)

    return opened


@pytest.fixture(scope="session")
def gpu_cache(tmp_path_factory, device, images, kl_folder) -> Path:
    """A latent cache that was encoded there, with mirrored images."""
    folder = tmp_path_factory.mktemp("gpu") / "cache"
    options = ("--image-size", tiny.IMAGE_SIZE, "--flips", "--out", folder, "--device", device)
    done = latentflow("encode", images, "--autoencoder", kl_folder, *options)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def recipe(gpu_cache, kl_folder, tmp_path):
    """The tiny recipe on that cache, with some values changed: recipe("name", training={...})."""

    def made(name: str, **given):
        training = {"steps": 20, "log_every": 5, "checkpoint_every": 5, **given.pop("training", {})}
        return tiny.recipe(
            data={"path": gpu_cache, **given.pop("data", {})},
            autoencoder=kl_folder,
            training=training,
            out=tmp_path / name,
            **given,
        )

    return made


@pytest.fixture
def recipe_file(recipe, tmp_path):
    """The same as a file."""

    def written(name: str, **given) -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(to_yaml(recipe(name, **given)), encoding="utf-8")
        return file

    return written


def latentflow(*args: object, launcher: tuple[str, ...] = ("-m",), seconds: float = 120) -> subprocess.CompletedProcess:
    """`latentflow ARGS` in a process of its own, perhaps under a launcher."""
    command = [sys.executable, *launcher, "latentflow", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


def all_well(*commands: Sequence[object], launchers: Sequence[tuple[str, ...]] = ()) -> list[str]:
    """Several commands side by side, each `latentflow ARGS` in a process of its own; what they print.

    Most of their time goes into starting, and a GPU has room for all of them.
    """
    given = [*launchers, *[("-m",)] * (len(commands) - len(launchers))]
    with ThreadPoolExecutor(len(commands)) as pool:
        every = list(pool.map(lambda command, launcher: latentflow(*command, launcher=launcher), commands, given))
    for done in every:
        assert done.returncode == 0, done.stderr
    return [done.stdout for done in every]


def started(*args: object) -> subprocess.Popen:
    """The same, going on beside the test."""
    command = [sys.executable, "-m", "latentflow", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def torchrun(processes: int) -> tuple[str, ...]:
    """The launcher of so many processes."""
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "--")
