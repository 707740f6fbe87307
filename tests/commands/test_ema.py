"""`latentflow ema`: averages kept in a run, another made of them, and what cannot be made."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from latentflow.artifacts import read_json, read_tensors, write_tensors
from latentflow.commands.ema import ema
from latentflow.commands.train import train as train_command
from latentflow.errors import ArtifactError, ConfigError
from latentflow.model.flow_model import FlowModel, read_config
from latentflow.requests import RequestError
from latentflow.training import checkpoint, velocity
from latentflow.training.checkpoint import newest_checkpoint
from latentflow.training.config import TrainingConfig
from latentflow.training.kept_averages import KeptAverages
from latentflow.training.request import EmaRequest
from latentflow.training.settings import to_yaml
from tests import processes, tiny
from tests.processes import run_here
from tests.training.test_loop import at_step

STEPS, SNAPSHOTS = 20, 5
LENGTHS = (0.05, 0.1)


@pytest.fixture(scope="module")
def given(cache, kl_folder):
    """The tiny recipe with averages kept, in a run folder."""

    def make(run: Path, **training):
        kept = {"steps": STEPS, "ema_lengths": list(LENGTHS), "ema_snapshots": SNAPSHOTS, "checkpoint_every": 8}
        return tiny.recipe(data={"path": cache}, autoencoder=kl_folder, training={**kept, **training}, out=run)

    return make


@pytest.fixture(scope="module")
def trained(given, tmp_path_factory) -> Path:
    """A run that has kept its averages."""
    return train_command(given(tmp_path_factory.mktemp("runs") / "run"), runtime=tiny.CPU).run


def files(run: Path) -> dict[str, str]:
    """Everything of a run that depends on what was computed, with a hash."""
    kept = ("checkpoints", "averages", "model")
    return {name: digest for name, digest in tiny.tree(run).items() if name.startswith(kept)}


def test_a_run_keeps_snapshots_at_even_distances(trained):
    folders = sorted((trained / "averages").iterdir())
    assert [folder.name for folder in folders] == [f"step-{step:08d}" for step in (4, 8, 12, 16, 20)]
    for folder in folders:
        assert sorted(file.name for file in folder.iterdir()) == [
            "average-0.05.safetensors",
            "average-0.1.safetensors",
            "state.json",
        ]
    assert read_json(folders[1] / "state.json")["images_seen"] == 32
    assert sorted(f.name for f in newest_checkpoint(trained).glob("average-*")) == [
        "average-0.05.safetensors",
        "average-0.1.safetensors",
    ]


def test_without_lengths_nothing_is_kept_and_the_run_is_the_same(given, trained, tmp_path):
    plain = train_command(given(tmp_path / "plain", ema_lengths=None), runtime=tiny.CPU).run
    assert not (plain / "averages").exists()
    for file in ("network.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, other = ((newest_checkpoint(run) / file).read_bytes() for run in (plain, trained))
        assert one == other
    assert tiny.tree(plain / "model") == tiny.tree(trained / "model")


@pytest.mark.parametrize(("length", "most"), [(0.07, 0.015), (0.13, 0.02)])
def test_it_is_the_average_that_a_run_would_have_kept(given, trained, tmp_path, length, most):
    """The difference, as a share of that between the average and the last weights."""
    direct = train_command(given(tmp_path / "direct", ema_lengths=[length]), runtime=tiny.CPU).run
    exact = read_tensors(newest_checkpoint(direct) / f"average-{length}.safetensors")
    ema(EmaRequest(run=trained, length=length, out=tmp_path / "model"))
    made = read_tensors(tmp_path / "model" / "velocity.safetensors")
    last = read_tensors(newest_checkpoint(trained) / "network.safetensors")
    assert made.keys() == exact.keys()
    error, moved = (
        sum(float((one[name] - exact[name]).square().sum()) for name in exact) ** 0.5 for one in (made, last)
    )
    assert 0 < error < most * moved


def test_a_kept_length_comes_back_as_it_was(trained, tmp_path):
    ema(EmaRequest(run=trained, length=0.1, step=12, out=tmp_path / "model"))
    made = read_tensors(tmp_path / "model" / "velocity.safetensors")
    kept = read_tensors(trained / "averages" / "step-00000012" / "average-0.1.safetensors")
    for name, tensor in kept.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-5, atol=1e-7)
    training = read_config(tmp_path / "model").training
    assert (training.step, training.images_seen, training.ema_length) == (12, 48, 0.1)


def test_the_command_writes_a_model_that_says_its_length(trained, tmp_path, capsys, monkeypatch):
    result = run_here(["ema", trained, "--length", "0.08", "--out", tmp_path / "model", "--json"], capsys, monkeypatch)
    assert result.code == 0, result.err
    rows = json.loads(result.out)
    assert (rows["length"], rows["step"], rows["made of"]) == (0.08, STEPS, 2 * SNAPSHOTS)
    assert 0 < rows["error of the profile"] < 0.05
    low, high = rows["possible lengths"]
    assert low < 0.05 < 0.1 < high
    facts = json.loads(run_here(["info", tmp_path / "model", "--json"], capsys, monkeypatch).out)
    assert facts["average of the weights"] == "power function of length 0.08"
    assert "power function of length 0.08" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    drawn = run_here(
        ["sample", tmp_path / "model", "--num", 1, "--out", tmp_path / "drawn", "--device", "cpu"], capsys, monkeypatch
    )
    assert drawn.code == 0, drawn.err


def test_writing_into_the_run_replaces_its_model_and_training_puts_it_back(
    given, trained, tmp_path, capsys, monkeypatch
):
    run = shutil.copytree(trained, tmp_path / "run")
    assert run_here(["ema", run, "--length", "0.06", "--write"], capsys, monkeypatch).code == 0
    assert read_config(run / "model").training.ema_length == 0.06
    assert FlowModel.from_pretrained(run, runtime=tiny.CPU).weights_hash != (
        FlowModel.from_pretrained(trained, runtime=tiny.CPU).weights_hash
    )
    longer = given(run, steps=STEPS + 4)
    train_command(longer, runtime=tiny.CPU)
    training = read_config(run / "model").training
    assert (training.step, training.ema_length) == (STEPS + 4, None)


def test_a_stopped_run_ends_in_the_averages_of_its_checkpoint(given, tmp_path, monkeypatch):
    stop = at_step(11, lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(velocity, "training_step", stop)
    run = train_command(given(tmp_path / "run"), runtime=tiny.CPU).run
    kept = KeptAverages(run)
    assert kept.steps == [4, 8, 11]
    ema(EmaRequest(run=run, length=0.08, out=tmp_path / "model"))
    assert read_config(tmp_path / "model").training.step == 11


@pytest.mark.parametrize(("steps", "number"), [(1, 1), (1, 16), (7, 3), (10, 16), (20, 5), (1000, 7)])
def test_snapshots_are_taken_at_the_ends_of_equal_parts(steps, number):
    training = TrainingConfig(steps=steps, ema_lengths=[0.1], ema_snapshots=number, checkpoint_every=10**6, keep_at=[])
    due = [step for step in range(1, steps + 1) if training.keeps_averages(step)]
    assert due == training.averages_at == [step for step in range(1, steps + 1) if training.is_saved(step)]
    assert len(due) == min(steps, number)
    assert due[-1] == steps
    assert all(0 <= step - part * steps / len(due) < 1 for part, step in enumerate(due, start=1))


# Resuming


@pytest.mark.parametrize("stop", [3, 8, 10])
def test_resume_by_a_signal_is_exact(given, trained, tmp_path, monkeypatch, stop):
    with monkeypatch.context() as patched:
        patched.setattr(velocity, "training_step", at_step(stop, lambda: signal.raise_signal(signal.SIGTERM)))
        run = train_command(given(tmp_path / "run"), runtime=tiny.CPU).run
    assert newest_checkpoint(run).name == f"step-{stop:08d}"
    train_command(given(tmp_path / "run"), runtime=tiny.CPU)
    assert files(run) == files(trained)


def test_killed_between_snapshot_and_checkpoint(given, trained, tmp_path, monkeypatch):
    def die(*args, **options):
        raise KeyError("killed here")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_checkpoint", die)
        with pytest.raises(KeyError):
            train_command(given(tmp_path / "run"), runtime=tiny.CPU)
    assert [folder.name for folder in (tmp_path / "run" / "averages").iterdir()] == ["step-00000004"]
    train_command(given(tmp_path / "run"), runtime=tiny.CPU)
    assert files(tmp_path / "run") == files(trained)


def test_snapshots_of_steps_that_are_done_again_go(given, trained, tmp_path, monkeypatch):
    """A run goes back to an older checkpoint: what was kept after it is not that of the steps to come."""
    run, seen = shutil.copytree(trained, tmp_path / "run"), []
    shutil.rmtree(newest_checkpoint(run))
    stop = at_step(1, lambda: seen.extend(sorted(f.name for f in (run / "averages").iterdir())))
    monkeypatch.setattr(velocity, "training_step", stop)
    train_command(given(run), runtime=tiny.CPU)
    assert seen == [f"step-{step:08d}" for step in (4, 8, 12, 16)]
    assert files(run) == files(trained)


def test_kill_9_at_random_moments(given, tmp_path):
    endless = {"steps": 100_000, "checkpoint_every": 4, "ema_snapshots": 256}
    file, run, log = tmp_path / "recipe.yaml", tmp_path / "killed", tmp_path / "log"
    file.write_text(to_yaml(given(run, **endless)), encoding="utf-8")
    for _ in range(2):
        before = newest_checkpoint(run)
        process = processes.start(("train", file, "--device", "cpu"), log)
        processes.wait_until(lambda before=before: newest_checkpoint(run) != before, process)
        process.join(random.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
    steps = checkpoint.step_of(newest_checkpoint(run)) + 3
    ended = {"steps": steps, "checkpoint_every": 4, "ema_snapshots": 4}
    train_command(given(run, **ended), runtime=tiny.CPU)
    whole = train_command(given(tmp_path / "whole", **ended), runtime=tiny.CPU).run
    last = f"averages/step-{steps:08d}/"
    one, other = (
        {n: d for n, d in files(r).items() if not n.startswith("averages") or last in n} for r in (run, whole)
    )
    assert one == other


def test_the_lengths_of_a_run_cannot_change(given, trained, tmp_path):
    for lengths in (None, [0.05, 0.2]):
        with pytest.raises(ConfigError, match=r"training\.ema_lengths cannot change: an average has to begin"):
            train_command(given(trained, ema_lengths=lengths), allow_change=["training.ema_lengths"], runtime=tiny.CPU)


def test_a_damaged_average_of_a_checkpoint_is_named(given, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    file = newest_checkpoint(run) / "average-0.1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"average-0\.1\.safetensors is damaged.*delete .*step-00000020 to go on"):
        train_command(given(run, steps=STEPS + 1), runtime=tiny.CPU)


# Refusals


def test_a_length_that_is_not_spanned_is_refused(trained, tmp_path, capsys, monkeypatch):
    for length in ("0.02", "0.28"):
        result = run_here(["ema", trained, "--length", length, "--out", tmp_path / "model"], capsys, monkeypatch)
        assert result.code == 2
        assert result.error.startswith(
            f"latentflow: --length {length}: the averages that {trained} has kept make it to"
        )
        low, high = result.error.rpartition("give ")[2].split(" to ")
        assert float(low) < 0.05 < 0.1 < float(high)
        for allowed in (low, high):
            assert KeptAverages(trained).why_not(float(allowed)) == ""
    assert not (tmp_path / "model").exists()


def test_a_step_without_averages_is_refused(trained, tmp_path):
    with pytest.raises(RequestError, match=r"step 13: .* has kept no average of it; the nearest is 12"):
        ema(EmaRequest(run=trained, length=0.1, step=13, out=tmp_path / "model"))


def test_a_run_without_averages_is_refused(trained, tmp_path):
    with pytest.raises(ArtifactError, match=r"kept no averages .*training\.ema_lengths=\[0\.05, 0\.1\]"):
        ema(EmaRequest(run=trained / "model", length=0.1, out=tmp_path / "model"))


def test_averages_of_another_network_are_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    file = run / "averages" / "step-00000008" / "average-0.05.safetensors"
    write_tensors(file, {f"x{name}": tensor for name, tensor in read_tensors(file).items()})
    with pytest.raises(ArtifactError, match=r"average-0\.05\.safetensors does not fit its config: .* is missing"):
        ema(EmaRequest(run=run, length=0.1, out=tmp_path / "model"))
    assert not (tmp_path / "model").exists()
