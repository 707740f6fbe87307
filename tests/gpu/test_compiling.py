"""Compiled networks: one compile for each distinct block, the same numbers, and a run that can be stopped meanwhile."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latentflow.training.log import read_metrics
from tests.gpu.conftest import all_well, latentflow, started

COUNTING = """
import json, sys
import torch._dynamo.utils as dynamo
from latentflow.cli import main
sys.argv = ["latentflow", *sys.argv[1:]]
try:
    main()
except SystemExit as ended:
    code = ended.code
counters = {name: dict(values) for name, values in dynamo.counters.items()}
with open(OUT, "w") as file:
    json.dump({"code": code, "counters": counters}, file)
"""


def counted(file: Path, *args: object) -> dict:
    """`latentflow ARGS` in a process of its own, and what torch's compiler counted in it."""
    program = COUNTING.replace("OUT", repr(str(file)))
    command = [sys.executable, "-c", program, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert file.exists(), done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert not found["code"], done.stderr
    return found["counters"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_distinct_block_is_compiled_once(device, recipe_file, tmp_path, precision):
    """Six blocks are six times the same code: as many graphs as one block has, and no more of them in later steps."""
    graphs = {}

    def count(depth: int, steps: int) -> None:
        network = {"depth": depth, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "variant": "modern"}
        name = f"depth{depth}"
        training = {"precision": precision, "compile": True, "steps": steps, "preview_every": steps // 2}
        file = recipe_file(name, network=network, training=training)
        counters = counted(tmp_path / f"{name}.json", "train", file, "--device", device)
        assert not counters.get("graph_break")
        graphs[depth] = counters["stats"]["unique_graphs"]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(count, (1, 6), (2, 12)))
    assert graphs[6] == graphs[1]
    assert 1 <= graphs[1] <= 3
    assert [line["step"] for line in read_metrics(tmp_path / "depth6")] == [5, 10, 12]


def test_compiled_blocks_learn_the_same(device, recipe_file, tmp_path):
    ways = {"eager": False, "compiled": True}
    training = {"precision": "fp32", "steps": 10}
    files = [recipe_file(name, training={**training, "compile": compiled}) for name, compiled in ways.items()]
    all_well(*(("train", file, "--device", device) for file in files))
    losses = {name: [line["loss"] for line in read_metrics(tmp_path / name)] for name in ways}
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-3)


@pytest.mark.parametrize("seconds", [0.0, 2.0], ids=["at once", "a little later"])
def test_a_signal_while_compiling_ends_the_run(device, recipe_file, tmp_path, seconds):
    """It is answered when the first step is done at the latest: exit code 143, and the run can be repeated."""
    network = {"depth": 4, "hidden_size": 64, "num_heads": 2, "patch_size": 2, "variant": "modern"}
    training = {"precision": "fp32", "compile": True, "steps": 100_000}
    file, run = recipe_file("stopped", network=network, training=training), tmp_path / "stopped"
    process = started("train", file, "--device", device)
    try:
        end = time.monotonic() + 60
        while not (run / "recipe.yaml").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        said = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, output
        assert "Traceback" not in output
        assert time.monotonic() - said < 60
    finally:
        process.kill()
    again = latentflow("train", file, "training.steps=3", "--device", device, seconds=150)
    assert again.returncode == 0, again.stderr
