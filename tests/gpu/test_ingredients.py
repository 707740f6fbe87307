"""What a recipe can add to a step, on a GPU: Muon, value residual, the head that predicts clean latents, averages."""

from __future__ import annotations

import pytest
import torch

from latentflow.artifacts import read_tensors
from latentflow.commands.ema import ema
from latentflow.commands.train import train
from latentflow.training import muon
from latentflow.training.log import read_metrics
from latentflow.training.request import EmaRequest
from tests.gpu.test_training import after_steps, checkpoint, furthest

INGREDIENTS = {
    "muon": {"optimizer": {"kind": "muon"}},
    "muon_every_2": {"optimizer": {"kind": "muon", "orthogonalise_every": 2}},
    "value_residual": {"network": {"value_residual": True}},
    "aligned": {"training": {"align_weight": 1.0, "align_block": 1}},
    "averages": {"training": {"ema_lengths": [0.05, 0.1], "ema_snapshots": 2}},
}
every_ingredient = pytest.mark.parametrize("given", INGREDIENTS.values(), ids=INGREDIENTS)


def with_training(given: dict, **training) -> dict:
    return {**given, "training": {**training, **given.get("training", {})}}


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """As `furthest`, but without Muon's last directions: they are of bfloat16 products, where one rounding is 1e-3."""
    ours, theirs = ({name: x for name, x in one.items() if "direction" not in name} for one in (ours, theirs))
    return furthest(ours, theirs)


@every_ingredient
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(recipe, runtime, precision, given):
    place = runtime(precision)
    whole = train(recipe("whole", **with_training(given, precision=precision)), runtime=place).run
    train(recipe("parts", **with_training(given, precision=precision, steps=10)), runtime=place)
    parts = train(recipe("parts", **with_training(given, precision=precision)), runtime=place).run
    assert apart(checkpoint(whole, 20)[1], checkpoint(parts, 20)[1]) < 1e-3  # a GPU adds in no fixed order


@every_ingredient
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_as_a_graph_gives_the_same_numbers(recipe, runtime, cuda, caplog, precision, given):
    runs = {}
    for name, graph in (("kernels", False), ("graph", True)):
        settings = with_training(given, precision=precision, cuda_graph=graph)
        runs[name] = train(recipe(name, **settings), runtime=runtime(precision)).run
    assert "kernel by kernel" not in caplog.text
    assert apart(checkpoint(runs["kernels"], 20)[1], checkpoint(runs["graph"], 20)[1]) < 1e-3
    losses = [[line["loss"] for line in read_metrics(run)] for run in runs.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("every", [1, 2])
def test_the_update_of_muon_as_a_graph_gives_the_same_numbers(recipe, runtime, cuda, monkeypatch, caplog, every):
    optimizer = {"kind": "muon", "orthogonalise_every": every}
    graph = train(recipe("graph", optimizer=optimizer), runtime=runtime("fp32")).run
    assert "kernel by kernel" not in caplog.text
    monkeypatch.setattr(muon, "_NUMBERS_CAPTURED", 0)
    kernels = train(recipe("kernels", optimizer=optimizer), runtime=runtime("fp32")).run
    assert apart(checkpoint(kernels, 20)[1], checkpoint(graph, 20)[1]) < 1e-3


@every_ingredient
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_step_between_log_lines_waits_for_the_gpu(recipe, runtime, cuda, precision, given):
    """CUDA itself raises where anything synchronises, from the third step to the last but one before the log line."""
    asked = []

    def step(number: int) -> None:
        asked.append(number)
        torch.cuda.set_sync_debug_mode("error" if 2 <= number < 18 else "default")

    settings = with_training(given, precision=precision, steps=20, log_every=20, checkpoint_every=20)
    settings["training"]["ema_snapshots"] = 1  # at the end: it is read from the device
    try:
        with after_steps(step):
            train(recipe("lean", **settings), runtime=runtime(precision))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(asked) == 20


def test_compiled_blocks_learn_the_same_with_value_residual_and_head(recipe, runtime, cuda):
    given, losses = {**INGREDIENTS["value_residual"]}, []
    for name, compiled in (("eager", False), ("compiled", True)):
        training = {**INGREDIENTS["aligned"]["training"], "precision": "fp32", "compile": compiled, "steps": 10}
        run = train(recipe(name, training=training, **given), runtime=runtime("fp32")).run
        losses.append([line["loss"] for line in read_metrics(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_what_is_kept_on_the_way_is_that_of_its_step(recipe, runtime, tmp_path):
    """Snapshots of the model and of its averages, and an average that is made of them afterwards."""
    place, given = runtime("fp32"), {"precision": "fp32", "ema_lengths": [0.05, 0.1], "ema_snapshots": 2}
    long = train(recipe("long", training={**given, "keep_at": [0.5]}), runtime=place).run
    short = train(recipe("short", training={**given, "steps": 10, "ema_snapshots": 1}), runtime=place).run
    kept = read_tensors(long / "checkpoints" / "step-00000010" / "model" / "velocity.safetensors")
    assert furthest(kept, read_tensors(short / "model" / "velocity.safetensors")) < 1e-3
    for length in (0.05, 0.1):
        name = f"average-{length}.safetensors"
        ours, theirs = (read_tensors(run / "averages" / "step-00000010" / name) for run in (long, short))
        assert furthest(ours, theirs) < 1e-3
    ema(EmaRequest(run=long, length=0.1, out=tmp_path / "model"))
    made = read_tensors(tmp_path / "model" / "velocity.safetensors")
    assert furthest(made, read_tensors(long / "averages" / "step-00000020" / "average-0.1.safetensors")) < 1e-3
