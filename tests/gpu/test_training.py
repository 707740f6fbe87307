"""Training in every precision: it goes on exactly, computes in what it says, and keeps what must be wide."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from latentflow.api import LatentFlow
from latentflow.artifacts import read_json, read_tensors
from latentflow.commands.train import train
from latentflow.training import velocity
from latentflow.training.log import read_metrics

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@contextmanager
def after_steps(call) -> Iterator[None]:
    """Call something with the number of updates made, after each of them; a step of Muon is one of AdamW as well."""
    made = []

    def hook(optimizer: torch.optim.Optimizer, *_) -> None:
        if isinstance(optimizer, torch.optim.AdamW):
            made.append(None)
            call(len(made))

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def checkpoint(run: Path, step: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """State and tensors of one checkpoint; the tensors of its files are told apart by the files' names."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    files = sorted(folder.glob("*.safetensors"))
    tensors = {f"{file.stem}/{name}": tensor for file in files for name, tensor in read_tensors(file).items()}
    return read_json(folder / "state.json"), tensors


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of tensors, relative to the largest value of the tensor that it is in."""
    assert ours.keys() == theirs.keys()
    gaps = ((a - theirs[name]).abs().max() / a.abs().max().clamp(min=1e-3) for name, a in ours.items() if a.numel())
    return max((float(gap) for gap in gaps), default=0.0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(recipe, runtime, precision):
    """The loss scale of fp16 is part of where a run stood: one that began anew at 65,536 would skip other steps."""
    place, given = runtime(precision), {"precision": precision}
    whole = train(recipe("whole", training=given), runtime=place).run
    train(recipe("parts", training={**given, "steps": 10}), runtime=place)
    parts = train(recipe("parts", training=given), runtime=place).run
    state, tensors = checkpoint(whole, 20)
    resumed_state, resumed = checkpoint(parts, 20)
    assert (state["loss_scale"] is not None) == (precision == "fp16")
    for name in ("step", "images_seen", "loss_scale"):
        assert state[name] == resumed_state[name]
    assert furthest(tensors, resumed) < 1e-3  # a GPU adds in no fixed order
    losses = [line["loss"] for line in read_metrics(whole)]
    assert [line["step"] for line in read_metrics(parts)] == [5, 10, 15, 20]
    assert losses == pytest.approx([line["loss"] for line in read_metrics(parts)], rel=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_kept_is_wide_whatever_is_computed_in(recipe, runtime, precision):
    """Weights, average and moments are float32 under every word, and so is the model that is written."""
    run = train(recipe("wide", training={"precision": precision, "steps": 5}), runtime=runtime(precision)).run
    _, tensors = checkpoint(run, 5)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {tensor.dtype for tensor in read_tensors(run / "model" / "velocity.safetensors").values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_precisions_differ_by_their_rounding_alone(recipe, runtime, device):
    """The losses of the first steps agree to what each precision can tell apart, and bf16 is no float32 in disguise."""
    losses = {}
    for precision in PRECISIONS if device == "cuda" else ("fp32", "bf16"):
        run = train(recipe(precision, training={"precision": precision, "steps": 5}), runtime=runtime(precision)).run
        losses[precision] = read_metrics(run)[0]["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["bf16"] != losses["fp32"]
    if device == "cuda":
        assert losses["tf32"] == pytest.approx(losses["fp32"], rel=2e-3)
        assert losses["fp16"] == pytest.approx(losses["fp32"], rel=5e-3)


def test_the_policy_of_float32_products_is_given_back(recipe, runtime, cuda):
    """A run in tf32 leaves the caller's matrix products and convolutions as they were."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [place.fp32_precision for place in places]
    for precision in ("tf32", "fp32"):
        train(recipe(precision, training={"precision": precision, "steps": 2}), runtime=runtime(precision))
        assert [place.fp32_precision for place in places] == before


def test_an_overflow_of_fp16_halves_the_scale_and_costs_one_step(recipe, runtime, cuda):
    """A scale that is far too large is lowered step by step, as the scaler does, and is not taken for a broken run."""
    run = train(recipe("scaled", training={"precision": "fp16", "steps": 5}), runtime=runtime("fp16")).run
    folder = run / "checkpoints" / "step-00000005"
    state = read_json(folder / "state.json")
    state.pop("checksum")
    state["loss_scale"] = 2.0**40
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    train(recipe("scaled", training={"precision": "fp16", "steps": 10}), runtime=runtime("fp16"))
    after, tensors = checkpoint(run, 10)
    assert after["loss_scale"] < 2.0**40
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("given", [{}, {"data": {"flip": True}}], ids=["plain", "mirrored"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_no_step_between_log_lines_waits_for_the_gpu(recipe, runtime, cuda, precision, given):
    """CUDA itself raises where anything synchronises, from the third step to the last but one before the log line."""
    asked = []

    def step(number: int) -> None:
        asked.append(number)
        torch.cuda.set_sync_debug_mode("error" if 2 <= number < 18 else "default")

    training = {"precision": precision, "steps": 20, "log_every": 20, "checkpoint_every": 20}
    try:
        with after_steps(step):
            train(recipe("lean", training=training, **given), runtime=runtime(precision))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(asked) == 20


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_as_a_graph_gives_the_same_numbers(recipe, runtime, cuda, precision, compiled, caplog):
    given = {"precision": precision, "compile": compiled}
    runs = {}
    for name, graph in (("kernels", False), ("graph", True)):
        training = {**given, "cuda_graph": graph, "preview_every": 10}
        runs[name] = train(recipe(name, training=training), runtime=runtime(precision)).run
    assert "kernel by kernel" not in caplog.text
    assert furthest(checkpoint(runs["kernels"], 20)[1], checkpoint(runs["graph"], 20)[1]) < 1e-3
    losses = [[line["loss"] for line in read_metrics(run)] for run in runs.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_step_that_waits_for_the_gpu_is_no_graph_and_goes_on(recipe, runtime, cuda, monkeypatch, caplog):
    """A failed capture leaves nothing behind: the run ends like one that was never captured."""
    plain = train(recipe("plain", training={"cuda_graph": False}), runtime=runtime("fp32")).run
    step = velocity.training_step

    def waits(*args, **given):
        result = step(*args, **given)
        float(result.time[0])
        return result

    monkeypatch.setattr(velocity, "training_step", waits)
    run = train(recipe("waits", training={"cuda_graph": True}), runtime=runtime("fp32")).run
    assert "kernel by kernel" in caplog.text
    assert furthest(checkpoint(plain, 20)[1], checkpoint(run, 20)[1]) < 1e-3


def test_micro_batches_add_up(recipe, runtime):
    """One batch at once, and in four parts."""
    whole, parts = (
        train(recipe(name, training={"steps": 5, "precision": "fp32", **given}), runtime=runtime("fp32")).run
        for name, given in (("at_once", {}), ("in_parts", {"micro_batch_size": 1}))
    )
    assert furthest(checkpoint(whole, 5)[1], checkpoint(parts, 5)[1]) < 1e-2
    for ours, theirs in zip(read_metrics(whole), read_metrics(parts), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_the_newest_checkpoints_are_those_of_their_steps(recipe, runtime):
    """They are written beside training: each must hold the state of its step, not of a later one."""
    place = runtime("fp32")
    given = {"precision": "fp32", "keep_checkpoints": 3}
    long = train(recipe("long", training={**given, "steps": 15}), runtime=place).run
    for step in (5, 10):
        short = train(recipe(f"short{step}", training={**given, "steps": step}), runtime=place).run
        state, tensors = checkpoint(long, step)
        assert state["step"] == step
        assert furthest(checkpoint(short, step)[1], tensors) < 1e-3


def test_previews_are_drawn_while_training(recipe, runtime, device):
    """From the averaged weights, without leaving a trace in the run: the same losses as without them."""
    place, given = runtime("fp32"), {"precision": "fp32", "steps": 10}
    plain = train(recipe("plain", training=given), runtime=place).run
    shown = train(recipe("shown", training={**given, "preview_every": 5}), runtime=place).run
    assert [file.name for file in sorted((shown / "samples").iterdir())] == ["step-00000005.png", "step-00000010.png"]
    assert furthest(checkpoint(plain, 10)[1], checkpoint(shown, 10)[1]) < 1e-3


def test_a_trained_model_draws_what_its_copy_on_disk_draws(recipe, runtime, device):
    """Nothing of training stays on the network that would change what is drawn right after it."""
    run = train(recipe("drawn", training={"steps": 5, "precision": "bf16"}), runtime=runtime("bf16")).run
    one, other = (
        LatentFlow.from_pretrained(run, device=device, precision="bf16").sample(num=4, seed=3).latents for _ in range(2)
    )
    assert torch.equal(one, other)
    wide = LatentFlow.from_pretrained(run, device=device, precision="fp32").sample(num=4, seed=3).latents
    assert not math.isclose(float((wide - one).abs().max()), 0.0, abs_tol=1e-7)
    assert (wide - one).abs().max() < 0.1 * wide.abs().max()
