"""What must not go wrong on a machine with a GPU: launchers, kills, damaged files, threads. Needs one CUDA device.

Every command runs in a process of its own, as a user's does.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from latentflow.api import LatentFlow
from latentflow.artifacts import read_tensors
from latentflow.training.log import read_metrics
from latentflow.training.settings import to_yaml
from tests import tiny
from tests.gpu.conftest import latentflow, started, torchrun


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, gpu_cache, kl_folder) -> Path:
    """A recipe of 20 steps on a cache that was encoded on the GPU."""
    folder = tmp_path_factory.mktemp("drills")
    training = {"steps": 20, "log_every": 5, "checkpoint_every": 5}
    recipe = tiny.recipe(data={"path": gpu_cache}, autoencoder=kl_folder, training=training)
    (folder / "fruit.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    return folder / "fruit.yaml"


@pytest.fixture(scope="module")
def run(recipe_file, device) -> Path:
    """A run that was never interrupted."""
    folder = recipe_file.parent / "run"
    done = latentflow("train", recipe_file, f"out={folder}", "--device", device)
    assert done.returncode == 0, done.stderr
    return folder


def weights_differ(one: Path, other: Path) -> float:
    """The largest relative difference of two models' weights."""
    ours, theirs = (read_tensors(run / "model" / "velocity.safetensors") for run in (one, other))
    largest = max(float(tensor.abs().max()) for tensor in ours.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours) / largest


def test_a_launcher_that_says_two_is_two_on_the_cpu(recipe_file, run):
    folder = recipe_file.parent / "two"
    done = latentflow("train", recipe_file, f"out={folder}", "--device", "cpu", launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(folder)] == [5, 10, 15, 20]
    assert weights_differ(folder, run) < 1e-2  # the one ran on the GPU


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_killed_run_ends_like_one_that_was_not(recipe_file, run, device, kill):
    folder = recipe_file.parent / f"killed_{kill.name}"
    args = ("train", recipe_file, f"out={folder}", "--device", device)
    with started(*args) as process:
        while process.poll() is None and not list(folder.glob("checkpoints/step-*")):
            time.sleep(0.01)
        process.send_signal(kill)
        process.communicate(timeout=60)
    done = latentflow(*args)
    assert done.returncode == 0, done.stderr
    assert weights_differ(folder, run) < 1e-3


def test_a_flipped_bit_of_the_weights_is_noticed(run, device, tmp_path):
    file = run / "model" / "velocity.safetensors"
    whole = file.read_bytes()
    try:
        damaged = bytearray(whole)
        damaged[-100] ^= 1
        file.write_bytes(damaged)
        done = latentflow("sample", run, "--num", 2, "--out", tmp_path / "samples", "--device", device)
    finally:
        file.write_bytes(whole)
    assert done.returncode == 2
    assert "velocity.safetensors" in done.stderr
    assert not (tmp_path / "samples").exists()


def test_threads_load_and_draw_on_one_device(run, device):
    def draw(seed: int) -> torch.Tensor:
        return LatentFlow.from_pretrained(run, device=device).sample(num=2, classes=[0, 1], seed=seed).pixels

    alone = [draw(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(draw, range(8)))
    for one, other in zip(alone, together, strict=True):
        assert (one.int() - other.int()).abs().max() <= 1


def test_known_pixels_stay_on_a_gpu(run, images, device, tmp_path):
    picture = next(images.rglob("*.png"))
    hole = Image.new("L", Image.open(picture).size)
    ImageDraw.Draw(hole).rectangle((6, 6, 12, 12), fill=255)
    hole.save(tmp_path / "hole.png")
    out = tmp_path / "filled.png"
    done = latentflow("inpaint", run, picture, tmp_path / "hole.png", "--out", out, "--device", device)
    assert done.returncode == 0, done.stderr
    known = np.asarray(hole) == 0
    before, after = (np.asarray(Image.open(file).convert("RGB")) for file in (picture, out))
    assert np.array_equal(before[known], after[known])


def test_a_full_gpu_costs_one_line(cuda, run, tmp_path):
    """Out of memory is no traceback: another program may hold the card."""
    program = (
        "import torch, sys; torch.cuda.set_per_process_memory_fraction(1e-4); "
        "from latentflow.cli import main; sys.argv = ['latentflow', *sys.argv[1:]]; main()"
    )
    args = ["sample", str(run), "--num", "512", "--batch-size", "512", "--out", str(tmp_path / "samples")]
    done = subprocess.run(
        [sys.executable, "-c", program, *args], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "memory" in done.stderr
