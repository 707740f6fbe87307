"""Students on a GPU: a step waits for nothing, is one graph or is compiled, and few jumps draw as graphs, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentflow.api import LatentFlow
from latentflow.autoencoder import Autoencoder
from latentflow.commands.distill import distill
from latentflow.networks.unet import UNetConfig
from latentflow.sampling import pipeline
from latentflow.sampling.captured_calls import plainly
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.pipeline import Given, draw_all
from latentflow.sampling.request import SampleRequest
from latentflow.training.log import read_metrics
from latentflow.training.student_recipe import StudentRecipe
from tests import tiny
from tests.gpu.test_training import PRECISIONS, after_steps, checkpoint


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, kl_folder) -> Path:
    """A transformer and a U-Net with random weights."""
    folder, autoencoder = tmp_path_factory.mktemp("teachers"), Autoencoder.from_pretrained(kl_folder)
    made = tiny.model(autoencoder, time_scale=20.0, guidance=2.0, guidance_interval=(0.1, 0.9))
    made.save_pretrained(folder / "dit")
    sizes = {"channels": 8, "multipliers": [1, 2], "blocks_per_level": 1, "norm_groups": 4, "num_heads": 1}
    config = made.config.model_copy(update={"network": UNetConfig(**sizes)})
    LatentFlow(config, tiny.randomise(config.build_network()).eval(), autoencoder).save_pretrained(folder / "unet")
    return folder


@pytest.fixture
def recipe(teachers, gpu_cache, tmp_path):
    """The recipe of a tiny student: recipe("name", training={...})."""

    def made(name: str, teacher: str = "dit", **training) -> StudentRecipe:
        pace = {"steps": 20, "batch_size": 8, "log_every": 5, "checkpoint_every": 5, "preview_every": 0, "keep_at": []}
        values = {
            "teacher": str(teachers / teacher),
            "out": str(tmp_path / name),
            "data": {"path": str(gpu_cache)},
            "optimizer": {"learning_rate": 1e-3},
            "training": {**pace, "ema_decay": 0.9, **training},
        }
        return StudentRecipe.model_validate(values)

    return made


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("teacher", ["dit", "unet"])
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(recipe, runtime, precision, teacher):
    """It is cut off after the checkpoint of step 10: the share of the teacher depends on the steps of the whole run."""
    place, given = runtime(precision), {"precision": precision, "teacher": teacher}
    whole = distill(recipe("whole", **given), runtime=place).run

    def cut(number: int) -> None:
        if number == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), after_steps(cut):
        distill(recipe("parts", **given), runtime=place)
    parts = distill(recipe("parts", **given), runtime=place).run
    assert [line["step"] for line in read_metrics(parts)] == [5, 10, 15, 20]
    losses = [[line["loss"] for line in read_metrics(run)] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert all(tensor.isfinite().all() for tensor in checkpoint(parts, 20)[1].values())


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_no_step_between_log_lines_waits_for_the_gpu(recipe, runtime, cuda, precision):
    """CUDA itself raises where anything synchronises, from the third step to the last but one before the log line."""
    asked = []

    def step(number: int) -> None:
        asked.append(number)
        torch.cuda.set_sync_debug_mode("error" if 2 <= number < 18 else "default")

    try:
        with after_steps(step):
            given = {"precision": precision, "log_every": 20, "checkpoint_every": 20}
            distill(recipe("lean", **given), runtime=runtime(precision))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(asked) == 20


@pytest.mark.parametrize("compiled", ["false", "true"], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_as_a_graph_gives_the_same_numbers(recipe, runtime, cuda, precision, compiled, caplog):
    given, runs = {"precision": precision, "compile": compiled}, {}
    for name, graph in (("kernels", "false"), ("graph", "true")):
        runs[name] = distill(recipe(name, **given, cuda_graph=graph), runtime=runtime(precision)).run
    assert "kernel by kernel" not in caplog.text
    losses = [[line["loss"] for line in read_metrics(run)] for run in runs.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_compiled_blocks_learn_the_same(recipe, runtime):
    """Those of the teacher are compiled as well."""
    losses = []
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        run = distill(recipe(name, precision="fp32", compile=compiled, steps=10), runtime=runtime("fp32")).run
        losses.append([line["loss"] for line in read_metrics(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_autocast_keeps_gradients_of_every_weight(recipe, runtime, device):
    """Copies of weights in half precision from the call without gradients must not serve the one with them."""
    run = distill(recipe("moved", precision="bf16", steps=10), runtime=runtime("bf16")).run
    moments = {name: x for name, x in checkpoint(run, 10)[1].items() if name.endswith("exp_avg_sq")}
    assert moments
    assert all(tensor.abs().max() > 0 for tensor in moments.values())


@pytest.mark.parametrize("evaluations", [1, 4, 8])
def test_jumps_as_graphs_draw_the_same(cuda, teachers, monkeypatch, caplog, evaluations):
    teacher = LatentFlow.from_pretrained(teachers / "dit", device="cuda", precision="fp32")
    student = tiny.student(teacher, seed=1).to(teacher.runtime)
    request = make_drawing(student, SampleRequest(num=40, evaluations=evaluations, guidance=2.0))
    captured = draw_all(student, request, batch_size=4)  # ten batches of one shape
    monkeypatch.setattr(pipeline, "calls_for", lambda device, drawing: plainly)
    plain = draw_all(student, request, batch_size=4)
    assert "kernel by kernel" not in caplog.text
    torch.testing.assert_close(captured.latents, plain.latents, rtol=1e-3, atol=1e-3)
    assert captured.evaluations.tolist() == [evaluations] * 40


def test_a_whole_batch_is_asked_for_without_waiting(cuda, teachers):
    teacher = LatentFlow.from_pretrained(teachers / "dit", device="cuda", precision="bf16")
    student = tiny.student(teacher, seed=1).to(teacher.runtime)
    request = make_drawing(student, SampleRequest(num=6, evaluations=4, guidance=2.0))
    first = pipeline._begin(student, request, Given()).arrived()
    torch.cuda.set_sync_debug_mode("error")
    try:
        begun = pipeline._begin(student, request, Given())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(begun.arrived().pixels, first.pixels)
