"""Training: exact resume, whatever ends a run; one result for any share-out of the work; and no step on bad numbers."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from latentflow import artifacts
from latentflow.api import LatentFlow
from latentflow.artifacts import contents, read_json, read_tensors
from latentflow.autoencoder import Autoencoder
from latentflow.commands.train import prepare
from latentflow.commands.train import train as train_command
from latentflow.data.batches import TrainingImages
from latentflow.data.cache.reader import LatentCache
from latentflow.errors import ArtifactError, ConfigError, LatentFlowError, NonFiniteError
from latentflow.model.flow_model import FlowModel, read_config
from latentflow.model.snapshots import snapshot_steps
from latentflow.runtime import Runtime
from latentflow.sampling.preview import save_preview
from latentflow.training import checkpoint, loop, velocity
from latentflow.training.checkpoint import CheckpointWriter, Keeping, Progress, load_checkpoint, newest_checkpoint
from latentflow.training.ema import EMA
from latentflow.training.fresh_model import build_model
from latentflow.training.log import read_metrics
from latentflow.training.optim import OptimizerConfig, build_optimizer
from latentflow.training.settings import to_yaml
from latentflow.training.training_data import open_source
from tests import processes, tiny

STATE = ("network.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture
def recipe(tmp_path, cache, kl_folder):
    """The tiny recipe on the latent cache, 18 images in batches of 4: every epoch ends inside a batch."""

    def make(name: str, *, data: Path | None = None, **given):
        source = {"path": data or cache, **given.pop("source", {})}
        return tiny.recipe(**{"autoencoder": kl_folder, **given}, data=source, out=tmp_path / name)

    return make


@pytest.fixture
def train(recipe):
    """Train into the run folder `name`; returns the folder."""

    def run(name: str, **given) -> Path:
        return train_command(recipe(name, **given), runtime=tiny.CPU).run

    return run


def final(run: Path) -> dict[str, bytes]:
    """The newest checkpoint of a run and the model in its folder, byte by byte."""
    checkpoint = newest_checkpoint(run)
    model = {file: (run / "model" / file).read_bytes() for file in ("velocity.safetensors", "config.json")}
    return {**{file: (checkpoint / file).read_bytes() for file in STATE}, **model}


def largest_difference(one: Path, other: Path) -> float:
    """Over all weights, averages and optimizer states of the newest checkpoints."""
    differences = []
    for file in STATE[:3]:
        left, right = (read_tensors(newest_checkpoint(run) / file) for run in (one, other))
        assert left.keys() == right.keys()
        differences += [(left[key] - right[key]).abs().max().item() for key in left]
    return max(differences)


def at_step(step: int, act) -> callable:
    """A stand-in for `training_step` that first calls `act` in step `step` (the first is 1)."""
    calls = iter(range(1, 1_000_000))

    def stand_in(*args, **options):
        if next(calls) == step:
            act()
        return true_step(*args, **options)

    true_step = velocity.training_step
    return stand_in


# A run that is whole


def test_the_run_folder(train):
    run = train("run", training={"checkpoint_every": 3, "keep_checkpoints": 2, "preview_every": 4})
    assert [folder.name for folder in sorted((run / "checkpoints").iterdir())] == ["step-00000009", "step-00000010"]
    assert sorted(file.name for file in newest_checkpoint(run).iterdir()) == sorted(STATE)
    previews = [f"step-{step:08d}.png" for step in (4, 8, 10)]
    assert sorted(file.name for file in (run / "samples").iterdir()) == previews
    assert read_json(run / "environment.json")["torch"] == torch.__version__
    config = read_config(run / "model")
    assert (config.training.step, config.training.images_seen, config.training.num_images) == (10, 40, tiny.NUM_IMAGES)
    assert config.conditioning.class_names == list(tiny.CLASSES)
    assert (
        read_tensors(run / "model" / "velocity.safetensors").keys()
        == read_tensors(newest_checkpoint(run) / "ema.safetensors").keys()
    )


def test_metrics(train):
    run = train("run", training={"log_every": 2}, optimizer={"warmup_steps": 4})
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert [line["images_seen"] for line in lines] == [8, 16, 24, 32, 40]
    assert [line["learning_rate"] for line in lines] == [5e-4, 1e-3, 1e-3, 1e-3, 1e-3]
    for line in lines:
        assert all(0 <= float(bin.partition("-")[0]) < 1 for bin in line["loss_by_time"])
        assert line["images_per_second"] > 0


def test_the_first_loss_is_that_of_a_zero_velocity(train, cache, kl):
    """An untrained DiT says 0, so its loss is the mean of |target|^2 = |(1 - sigma_min) noise - data|^2."""
    from latentflow.randomness import ImageRandom

    run = train("run", training={"steps": 1, "batch_size": 18})
    images = TrainingImages(LatentCache(cache), seed=0, flip=False)
    batch = images.__getitems__(list(range(18)))
    streams = ImageRandom.at(0, "step", range(18))
    streams.uniform()
    mean, log_variance = batch.moments[:, :4], batch.moments[:, 4:]
    data = kl.normalisation.normalise(mean + torch.exp(0.5 * log_variance) * streams.normal(4, 8, 8))
    expected = ((1 - 1e-5) * streams.normal(4, 8, 8) - data).square().mean().item()
    assert read_metrics(run)[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_loss_falls(train, images, deterministic_folder):
    """18 images without posterior noise can be memorised."""
    steps = {"steps": 100, "log_every": 25, "batch_size": 16}
    optimizer = {"learning_rate": 3e-3}
    run = train("run", data=images, autoencoder=deterministic_folder, training=steps, optimizer=optimizer)
    losses = [line["loss"] for line in read_metrics(run)]
    assert losses[-1] < 0.2 * losses[0]  # measured: 0.09


def test_the_same_run_twice_is_the_same(train):
    assert final(train("one")) == final(train("two"))


def test_another_seed_is_another_run(train):
    assert final(train("one")) != final(train("two", training={"seed": 1}))


def test_the_model_holds_the_average(train):
    run = train("run")
    average, weights = (read_tensors(newest_checkpoint(run) / f"{name}.safetensors") for name in ("ema", "network"))
    model = LatentFlow.from_pretrained(run, device="cpu")
    for key, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, average[key])
    assert any(not torch.equal(average[key], weights[key]) for key in average)


def test_unlabelled_training(train):
    run = train("run", source={"labels": False})
    assert read_config(run / "model").conditioning.num_classes == 0


def test_an_align_head_is_trained_and_left_out_of_the_model(train):
    """It is in the checkpoints, with its optimizer state; average, model and previews are those of the network."""
    steps = {"steps": 60, "batch_size": 16, "log_every": 20, "keep_every": 30}
    plain, run = train("plain", training=steps), train("aligned", training={**steps, "align_weight": 1.0})
    lines = read_metrics(run)
    assert lines[0]["align_loss"] > lines[1]["align_loss"] > lines[2]["align_loss"] > 0
    assert not any("align_loss" in line for line in read_metrics(plain))
    inside = read_tensors(newest_checkpoint(run) / "network.safetensors")
    head = {key for key in inside if key.startswith("head.")}
    assert head and {key.removeprefix("network.") for key in inside.keys() - head} == read_weights(plain).keys()
    assert {f"{key}/exp_avg" for key in inside} <= read_tensors(newest_checkpoint(run) / "optimizer.safetensors").keys()
    for folder in (run, run / "checkpoints" / "step-00000030"):
        assert read_weights(folder).keys() == read_weights(plain).keys()
        assert LatentFlow.from_pretrained(folder, device="cpu").sample(2, steps=1).pixels.shape[0] == 2
    assert any(not torch.equal(tensor, read_weights(plain)[key]) for key, tensor in read_weights(run).items())


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "model" / "velocity.safetensors")


def test_a_dry_run_names_the_head(recipe):
    plain, aligned = (prepare(recipe("run", training={"align_weight": weight}), tiny.CPU) for weight in (0.0, 0.5))
    assert "head" not in plain.describe()
    assert aligned.describe()["head"] == "on block 2, in training only; its loss counts 0.5"


@pytest.mark.parametrize(("before", "after"), [({}, {"align_weight": 1.0}), ({"align_weight": 1.0}, {})])
def test_a_head_comes_and_goes_with_the_run(train, before, after):
    train("run", training={"steps": 2, **before})
    with pytest.raises(ConfigError, match=r"training\.align_weight cannot change: its head is trained from the first"):
        train("run", training={"steps": 4, **after})


# Resume


@pytest.mark.parametrize("stop", [4, 5, 9])  # 16 images: in the first epoch; 20: in the second; 36: at an epoch's end
def test_resume_by_steps_is_exact(train, stop):
    whole = train("whole")
    train("parts", training={"steps": stop})
    assert final(train("parts")) == final(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resume_is_exact(recipe, train, monkeypatch, number):
    whole = train("whole")
    with monkeypatch.context() as patched:
        patched.setattr(velocity, "training_step", at_step(4, lambda: signal.raise_signal(number)))
        before = signal.getsignal(number)
        outcome = train_command(recipe("parts"), runtime=tiny.CPU).outcome
        assert signal.getsignal(number) == before
    assert (outcome.step, outcome.finished, outcome.signal) == (4, False, number)
    assert newest_checkpoint(whole.with_name("parts")).name == "step-00000004"
    assert final(train("parts")) == final(whole)


def test_resume_with_everything_switched_on(train):
    """Muon, schedule, flips, stratified times, scaling, accumulation, dropout, value residual, head; stopped twice."""
    given = {
        "optimizer": {
            "kind": "muon",
            "orthogonalise_every": 2,
            "schedule": "cosine",
            "warmup_steps": 3,
            "weight_decay": 0.1,
        },
        "source": {"flip": True},
        "times": {"distribution": "logit_normal", "stratified": True},
        "normalise": "per_channel",
        "conditioning": {"label_dropout": 0.5},
        "network": {"variant": "modern", "value_residual": True},
    }
    steps = {"micro_batch_size": 2, "checkpoint_every": 2, "align_weight": 0.5, "ema_lengths": [0.05]}
    whole = train("whole", training=steps, **given)
    with pytest.MonkeyPatch.context() as patched:
        for stop in (5, 11):  # micro-batches: within step 3, and within step 6 of the rest
            patched.setattr(velocity, "training_step", at_step(stop, partial(signal.raise_signal, signal.SIGTERM)))
            train("parts", training=steps, **given)
            patched.undo()
    assert newest_checkpoint(whole.with_name("parts")).name == "step-00000009"
    assert final(train("parts", training=steps, **given)) == final(whole)


def test_resume_of_images_encoded_in_the_step(train, images):
    whole = train("whole", data=images, training={"steps": 6})
    train("parts", data=images, training={"steps": 3})
    assert final(train("parts", data=images, training={"steps": 6})) == final(whole)


def test_resume_with_worker_processes(train, images):
    """Workers read ahead; what they read ahead is not lost and not repeated."""
    whole = train("whole", data=images, training={"steps": 6})
    train("parts", data=images, training={"steps": 3}, source={"num_workers": 1})
    assert final(train("parts", data=images, training={"steps": 6}, source={"num_workers": 1})) == final(whole)


def test_metrics_after_resume_are_not_doubled(train, monkeypatch):
    """A run dies at step 8 with a checkpoint of step 6; its lines 7 and 8 are written again, once."""

    def die():
        raise KeyError("the power failed")

    whole = train("whole", training={"checkpoint_every": 6})
    with monkeypatch.context() as patched:
        patched.setattr(velocity, "training_step", at_step(9, die))
        with pytest.raises(KeyError):
            train("parts", training={"checkpoint_every": 6})
    parts = whole.with_name("parts")
    assert [line["step"] for line in read_metrics(parts)] == list(range(1, 9))
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # and the last line was cut short
    train("parts", training={"checkpoint_every": 6})
    timeless = [[{**line, "images_per_second": 0} for line in read_metrics(run)] for run in (whole, parts)]
    assert timeless[0] == timeless[1]
    assert (parts / "metrics.jsonl").read_bytes().count(b"\n") == 10


def test_repeating_a_finished_run_changes_nothing(train):
    run = train("run")
    before = {name: content for name, content in tiny.tree(run).items() if "tensorboard" not in name}
    train("run")
    assert {name: content for name, content in tiny.tree(run).items() if "tensorboard" not in name} == before


def test_killed_between_model_and_checkpoint(train, monkeypatch):
    """At any moment the model in the run folder is at least as new as the checkpoint, so that none is ever lost."""
    whole = train("whole")

    def die(*args, **options):
        raise KeyError("killed here")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_checkpoint", die)
        with pytest.raises(KeyError):
            train("parts")
    assert final(train("parts")) == final(whole)

    with monkeypatch.context() as patched:
        patched.setattr(FlowModel, "save_pretrained", die)
        with pytest.raises(KeyError):
            train("other")
    assert final(train("other")) == final(whole)


@pytest.fixture
def recipe_file(tmp_path):
    """A recipe on disk, for a command."""

    def write(recipe) -> Path:
        file = tmp_path / f"{Path(recipe.out).name}.yaml"
        file.write_text(to_yaml(recipe), encoding="utf-8")
        return file

    return write


def test_kill_9_at_random_moments(recipe, train, recipe_file, tmp_path):
    """A process of its own is killed again and again, wherever it is: in a step, in a save, in a resume."""
    network, training = {"value_residual": True}, {"checkpoint_every": 4, "align_weight": 1.0}
    # No machine is so fast that it ends by itself.
    endless = {"training": {"steps": 100_000, **training}, "network": network}
    command, run = ("train", recipe_file(recipe("killed", **endless)), "--device", "cpu"), tmp_path / "killed"
    log = tmp_path / "log"
    for attempt in range(5):
        before = newest_checkpoint(run)
        process = processes.start(command, log)
        processes.wait_until(lambda before=before: newest_checkpoint(run) != before, process)
        process.join(random.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        assert newest_checkpoint(run) not in (None, before), f"attempt {attempt}: {log.read_text()}"

    steps = read_metrics(run)[-1]["step"] + 3
    ended = {"training": {"steps": steps, **training}, "network": network}
    assert final(train("killed", **ended)) == final(train("whole", **ended))
    assert [line["step"] for line in read_metrics(run)] == list(range(1, steps + 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_signal_ends_the_command_with_its_code(recipe, train, recipe_file, tmp_path, number, num_workers):
    """Terminals and batch systems signal the processes that read images, too."""
    given = {"training": {"steps": 100_000}, "source": {"num_workers": num_workers}}
    log, run = tmp_path / "log", tmp_path / "run"
    process = processes.start(("train", recipe_file(recipe("run", **given)), "--device", "cpu"), log)
    processes.wait_until(lambda: len(read_metrics(run)) > 3, process)
    readers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert bool(readers) == bool(num_workers)
    for reader in (*readers, process.pid):
        os.kill(int(reader), number)
    assert processes.finish(process, log) == 128 + number
    assert "repeat the command to go on" in log.read_text()
    step = read_metrics(run)[-1]["step"]
    assert newest_checkpoint(run).name == f"step-{step:08d}"
    assert final(train("run", training={"steps": step + 3})) == final(train("whole", training={"steps": step + 3}))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_goes_missing_ends_the_command(recipe, recipe_file, tmp_path, num_workers):
    """With processes that read images, too, which must not outlive it."""
    images = tiny.write_images(tmp_path / "fruit")
    given = {"training": {"steps": 100_000}, "source": {"num_workers": num_workers}}
    log, run = tmp_path / "log", tmp_path / "run"
    process = processes.start(("train", recipe_file(recipe("run", data=images, **given)), "--device", "cpu"), log)
    processes.wait_until(lambda: len(read_metrics(run)) > 1, process)
    for file in images.rglob("*.png"):
        file.unlink()
    assert processes.finish(process, log, timeout=60) == 2
    assert "No such file" in log.read_text().splitlines()[-1]


# Checkpoints on disk


def test_a_resumed_run_deletes_what_a_killed_one_had_left(train, monkeypatch):
    """Killed between the last checkpoint and the deletion of an older one."""
    given = {"training": {"checkpoint_every": 2, "steps": 6, "keep_checkpoints": 1}}
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "remove_folder", lambda folder: None)
        run = train("run", **given)
    assert len(list(run.glob("checkpoints/step-*"))) == 3
    assert [folder.name for folder in train("run", **given).glob("checkpoints/step-*")] == ["step-00000006"]


@pytest.mark.parametrize("file", STATE)
def test_a_damaged_checkpoint_is_named_and_can_be_deleted(train, file):
    given = {"training": {"checkpoint_every": 5, "steps": 10}}
    run = train("run", **given)
    expected = final(run)
    os.truncate(newest_checkpoint(run) / file, 20)
    with pytest.raises(ArtifactError) as caught:
        train("run", **given)
    assert str(newest_checkpoint(run) / file) in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(newest_checkpoint(run))  # the remedy
    assert final(train("run", **given)) == expected


def test_a_checkpoint_without_one_of_its_files(train):
    run = train("run")
    (newest_checkpoint(run) / "ema.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"ema\.safetensors is truncated or damaged: 0 bytes"):
        train("run")


def test_a_checkpoint_round_trip_keeps_every_bit(tmp_path):
    config, torch_seed = OptimizerConfig(), torch.Generator().manual_seed(0)

    def parts():
        network = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
        return network, EMA(network, 0.9), build_optimizer(network, config)

    network, ema, optimizer = parts()
    for step in range(3):
        network(torch.randn(4, 3, generator=torch_seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
    with CheckpointWriter(tmp_path, torch.device("cpu"), Keeping(1)) as writer:
        writer.save(Progress(3, 12, 1024.0), network, ema, optimizer)
    folder = newest_checkpoint(tmp_path)
    copies = parts()
    assert load_checkpoint(folder, *copies) == Progress(3, 12, 1024.0)
    for one, other in zip(network.parameters(), copies[0].parameters(), strict=True):
        assert torch.equal(one, other)
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, copies[2].state[other][key])
    assert all(torch.equal(ema.average[key], copies[1].average[key]) for key in ema.average)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_stay(train, keep):
    run = train("run", training={"checkpoint_every": 2, "keep_checkpoints": keep})
    kept = [f"step-{step:08d}" for step in (2, 4, 6, 8, 10)][-keep:]
    assert [folder.name for folder in sorted((run / "checkpoints").iterdir())] == kept


def test_a_checkpoint_half_written_does_not_count(train, tmp_path):
    run = train("run", training={"steps": 5})
    hidden = run / "checkpoints" / ".step-00000009.1.tmp"
    shutil.copytree(newest_checkpoint(run), hidden)
    assert newest_checkpoint(run).name == "step-00000005"


def test_milestones_stay_and_can_be_sampled_from(train, capsys, monkeypatch, tmp_path):
    """Between checkpoints, too; each is a model of its own step, with the average of then."""
    run = train("run", training={"checkpoint_every": 5, "keep_every": 3, "keep_checkpoints": 1})
    kept = sorted((run / "checkpoints").iterdir())
    assert [folder.name for folder in kept] == [f"step-{step:08d}" for step in (3, 6, 9, 10)]
    for folder, step in zip(kept[:3], (3, 6, 9), strict=True):
        model, average = LatentFlow.from_pretrained(folder, device="cpu"), read_tensors(folder / "ema.safetensors")
        assert all(torch.equal(value, average[key]) for key, value in model.network.state_dict().items())
        assert (model.config.training.step, model.config.training.images_seen) == (step, 4 * step)
    command = ("sample", kept[0], "--num", 2, "--device", "cpu", "--out", tmp_path / "samples")
    assert processes.run_here(command, capsys, monkeypatch).code == 0
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3  # with the contact sheet
    assert not (kept[3] / "model").exists()
    assert final(run) == final(train("other"))


def test_a_run_goes_on_while_a_checkpoint_is_written(train, monkeypatch):
    """The disk is so slow that three steps pass; the next save waits for it, and so does the end."""
    write, steps = checkpoint.write_checkpoint, []

    def slowly(run, progress, *args):
        end = time.monotonic() + 60
        while progress.step == 4 and len(read_metrics(run)) < 7 and time.monotonic() < end:
            time.sleep(0.01)
        steps.append((progress.step, len(read_metrics(run))))
        return write(run, progress, *args)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slowly)
    run = train("run", training={"checkpoint_every": 4})
    assert [step for step, _ in steps] == [4, 8, 10]
    assert steps[0][1] >= 7
    monkeypatch.undo()
    assert final(run) == final(train("whole", training={"checkpoint_every": 4}))


def test_a_full_disk_ends_the_run_at_the_next_step(train, recipe, monkeypatch):
    """With the line of the system, as if it had been written in the step; later everything is there."""
    write = checkpoint.write_tensors

    def full(path, tensors):
        if "step-00000004" in str(path):
            with artifacts.writing(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_tensors", full)
        patched.setattr(velocity, "training_step", slowed(velocity.training_step))
        with pytest.raises(ArtifactError, match=r"cannot write .*: no space left on device; free some space"):
            train("run", training={"checkpoint_every": 4})
    run = Path(recipe("run").out)
    assert newest_checkpoint(run) is None
    assert read_metrics(run)[-1]["step"] < 8
    assert final(train("run", training={"checkpoint_every": 4})) == final(train("whole"))


def slowed(function):
    """Steps long enough for a checkpoint to be written in one."""

    def stand_in(*args, **options):
        time.sleep(0.3)
        return function(*args, **options)

    return stand_in


# A run folder belongs to one recipe, one set of images, one latent space


def test_the_data_may_move_but_not_change(train, cache, tmp_path, kl):
    from latentflow.data.sources.images import open_images
    from tests.tiny import write_cache

    whole = train("whole")
    train("parts", training={"steps": 4})
    moved = shutil.copytree(cache, tmp_path / "moved")
    assert final(train("parts", data=moved))["network.safetensors"] == final(whole)["network.safetensors"]

    train("other", training={"steps": 4})
    fewer = tiny.write_images(tmp_path / "fewer", per_class=5)
    write_cache(open_images(fewer, tiny.IMAGE_SIZE), kl, tmp_path / "fewer-cache", flips=True)
    with pytest.raises(LatentFlowError, match=r"data\.path"):
        train("other", data=tmp_path / "fewer-cache")


def test_the_autoencoder_may_move_but_not_change(train, images, kl_folder, tmp_path):
    given = {"data": images, "training": {"steps": 4}}
    whole = train("whole", **given)
    train("parts", data=images, training={"steps": 2})
    moved = shutil.copytree(kl_folder, tmp_path / "moved")
    assert (
        final(train("parts", autoencoder=moved, **given))["network.safetensors"]
        == (final(whole)["network.safetensors"])
    )

    train("other", data=images, training={"steps": 2})
    tiny.kl(seed=1).save_pretrained(tmp_path / "another")
    with pytest.raises(LatentFlowError, match="autoencoder"):
        train("other", autoencoder=tmp_path / "another", **given)


# One result for any share-out of the work


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_accumulation_equals_the_full_batch(train, micro_batch_size):
    full, parts = train("full"), train("parts", training={"micro_batch_size": micro_batch_size})
    assert largest_difference(full, parts) < 1e-6  # measured: 6e-8 after 10 steps
    losses = [[line["loss"] for line in read_metrics(run)] for run in (full, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_batch_that_cannot_be_shared(train):
    with pytest.raises(ConfigError, match=r"training\.batch_size = 4 .* micro-batches of 3"):
        train("run", training={"micro_batch_size": 3})


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_equal_one(recipe, train, recipe_file, tmp_path):
    """Under torchrun: two processes with two micro-batches each, against one with the whole batch."""
    training = {"checkpoint_every": 4, "preview_every": 5, "align_weight": 1.0}
    training |= {"ema_lengths": [0.05, 0.1], "ema_snapshots": 2}
    given = {"source": {"flip": True, "held_out": 0.2}, "times": {"stratified": True}, "training": training}
    one = train("one", **given)
    given["training"]["micro_batch_size"] = 1
    file = recipe_file(recipe("two", **given))
    launcher = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "latentflow", "train", file, "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two"
    assert read_json(two / "environment.json")["num_processes"] == 2
    assert largest_difference(one, two) < 1e-5
    measured, shared = (read_metrics(run)[-1]["held_out_loss_by_time"] for run in (one, two))  # each measures half
    assert shared == pytest.approx(measured, rel=1e-5)
    assert read_config(one / "best").training.step == read_config(two / "best").training.step == 10
    for file in (one / "averages").rglob("*.safetensors"):
        here, there = (read_tensors(run / file.relative_to(one)) for run in (one, two))
        assert max(float((here[name] - there[name]).abs().max()) for name in here) < 1e-5
    assert len(list((two / "averages").rglob("*.safetensors"))) == 4
    assert read_json(newest_checkpoint(two) / "state.json")["images_seen"] == 40
    for grid in ("step-00000005.png", "step-00000010.png"):  # of which each has drawn a half
        here, there = (np.asarray(Image.open(run / "samples" / grid)).astype(int) for run in (one, two))
        assert np.abs(here - there).max() <= 1
    # The loss of a step is the mean over its images: equal means in all steps need the same images in all steps.
    losses, aligned, by_time = (
        [[line[key] for line in read_metrics(run)] for run in (one, two)]
        for key in ("loss", "align_loss", "loss_by_time")
    )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert aligned[0] == pytest.approx(aligned[1], rel=1e-5)
    assert [list(bins) for bins in by_time[0]] == [list(bins) for bins in by_time[1]]


def test_two_processes_take_up_what_one_began(recipe, train, recipe_file, tmp_path):
    """Interrupt with one process, go on with two, stop those by a signal, and finish with one."""
    whole = train("whole")
    train("run", training={"steps": 4})
    command = ("train", recipe_file(recipe("run", training={"steps": 6})), "--device", "cpu")
    workers = processes.start_processes(command, tmp_path / "log", 2)
    for rank, worker in enumerate(workers):
        log = tmp_path / f"log.{rank}"
        assert processes.finish(worker, log) == 0, log.read_text()
    run = train("run")
    assert largest_difference(whole, run) < 1e-5
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 11))


def test_two_agents_of_one_process_each(recipe, train, recipe_file, tmp_path):
    """Two machines, played by two agents that meet over the loopback; before and after them one process goes on."""
    whole = train("whole")
    train("run", training={"steps": 2})
    command = ("-m", "latentflow", "train", recipe_file(recipe("run", training={"steps": 6})), "--device", "cpu")
    address = (
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
    )
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *address, "--node_rank", str(node), *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    said = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert read_json(tmp_path / "run" / "environment.json")["num_processes"] == 2
    assert read_metrics(tmp_path / "run")[-1]["step"] == 6
    assert largest_difference(whole, train("run")) < 1e-5


def test_a_signal_to_one_of_two_processes_stops_both(recipe, recipe_file, tmp_path):
    """At the same step, which is not one of the log: the next line of it would come after hours."""
    given = {"training": {"steps": 10_000_000, "log_every": 1_000_000, "checkpoint_every": 5}}
    command, run = ("train", recipe_file(recipe("run", **given)), "--device", "cpu"), tmp_path / "run"
    workers = processes.start_processes(command, tmp_path / "log", 2)
    processes.wait_until(lambda: newest_checkpoint(run) is not None, workers[0])
    os.kill(workers[1].pid, signal.SIGTERM)
    codes = [processes.finish(worker, tmp_path / f"log.{rank}") for rank, worker in enumerate(workers)]
    assert codes[1] == 128 + signal.SIGTERM
    assert codes[0] != 0  # it was stopped too, so it must not look finished
    step = read_metrics(run)[-1]["step"]
    assert newest_checkpoint(run).name == f"step-{step:08d}"


def test_an_uneven_share_is_refused_in_every_process(recipe, recipe_file, tmp_path):
    command = ("train", recipe_file(recipe("run", training={"batch_size": 5})), "--device", "cpu")
    workers = processes.start_processes(command, tmp_path / "log", 2)
    logs = [tmp_path / f"log.{rank}" for rank in range(2)]
    assert [processes.finish(worker, log) for worker, log in zip(workers, logs, strict=True)] == [2, 2]
    said = "".join(log.read_text() for log in logs)
    assert said.count("training.batch_size = 5 cannot be shared by 2 processes") == 1
    assert not (tmp_path / "run").exists()


def test_compiled_training_equals_eager(train, monkeypatch):
    """The whole machinery of torch.compile but for code generation, which would take a minute here."""
    monkeypatch.setattr(loop, "compile_blocks", partial(loop.compile_blocks, backend="aot_eager"))
    eager = train("eager")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train("compiled", training={"compile": True, "preview_every": 5})
    assert largest_difference(eager, compiled) < 1e-6
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2  # a block, and what comes last; for previews nothing is compiled


def test_a_signal_while_the_network_is_compiled(recipe, train, monkeypatch):
    """The step is dropped where it is: what is on disk is what was, and the run goes on as if nothing had been."""

    def endless(call, **options):
        def compiled(*args):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(60)
            raise AssertionError("it went on")

        return compiled

    whole = train("whole")
    train("run", training={"steps": 4})
    before = tiny.tree(whole.with_name("run") / "checkpoints")
    for name, step in (("run", 4), ("new", 0)):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "compile", endless)
            began = time.monotonic()
            outcome = train_command(recipe(name, training={"compile": True}), runtime=tiny.CPU).outcome
            assert time.monotonic() - began < 30
        assert (outcome.step, outcome.finished, outcome.signal) == (step, False, signal.SIGTERM)
    assert tiny.tree(whole.with_name("run") / "checkpoints") == before
    assert newest_checkpoint(whole.with_name("new")) is None
    for name in ("run", "new"):
        assert final(train(name)) == final(whole)


# Precision


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_average_and_optimizer_are_float32_whatever_is_computed_in(recipe, precision):
    run = Watched(recipe("run", training={"steps": 3}), precision)
    run.train()
    for name, tensor in run.model.network.state_dict().items():
        assert tensor.dtype == torch.float32, name
    for file in ("network", "ema", "optimizer"):
        tensors = read_tensors(newest_checkpoint(Path(run.recipe.out)) / f"{file}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}, file


@pytest.mark.parametrize("optimizer", [{}, {"kind": "muon", "orthogonalise_every": 2}], ids=["adamw", "muon"])
def test_fp16_goes_on_exactly_with_its_loss_scale(recipe, monkeypatch, optimizer):
    """The scale begins so high that gradients overflow, and grows every third step."""
    true = loop.loss_scaler

    def restless(*args):
        scaler = true(*args)
        scaler.set_growth_interval(3)
        return scaler

    monkeypatch.setattr(loop, "loss_scaler", restless)
    for name, stops in (("whole", (10,)), ("parts", (2, 5, 6, 10))):
        for steps in stops:
            Watched(recipe(name, training={"steps": steps}, optimizer=optimizer), "fp16").train()
    one, other = (newest_checkpoint(Path(recipe(name).out)) for name in ("whole", "parts"))
    found = read_json(one / "state.json")
    assert found["loss_scale"] != 2.0**16
    assert found["growth_tracker"] == 10 % 3
    for file in STATE:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def test_fp16_on_a_cpu_is_refused(recipe, recipe_file, capsys, monkeypatch):
    file = recipe_file(recipe("run", training={"precision": "fp16"}))
    result = processes.run_here(("train", file, "--device", "cpu"), capsys, monkeypatch)
    assert result.code == 2
    assert "fp16 needs a GPU" in result.error
    assert not Path(recipe("run").out).exists()


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_a_bad_image_stops_fp16_training(recipe, poisoned, micro_batch_size):
    """Whichever micro-batch it is in; loss scaling skips the steps, so that the weights are sound."""
    folder, name, step = poisoned
    run = Watched(recipe("bad", data=folder, training={"micro_batch_size": micro_batch_size}), "fp16")
    with pytest.raises(NonFiniteError, match=rf"step {step}: .* in the loss of 1 of 4 images, for example {name}"):
        run.train()
    assert all(parameter.isfinite().all() for parameter in run.model.network.parameters())


# Numbers that are not finite


@pytest.fixture
def poisoned(cache, tmp_path, monkeypatch) -> tuple[Path, str, int]:
    """A cache in which one image's moments are NaN, that image's name, and the step that meets it (the first is 1)."""
    monkeypatch.setattr(artifacts, "_verify", False)  # or the checksum would be found wrong before training
    monkeypatch.setattr(artifacts, "verify_checksums", lambda wanted: None)
    folder = shutil.copytree(cache, tmp_path / "poisoned")
    order = TrainingImages(LatentCache(folder), seed=0, flip=False).indices_at(range(18)).tolist()
    image, step = order[10], 3  # batches of 4
    shard, row = divmod(image, 5)
    file = folder / f"shard-{shard:05d}.safetensors"
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = {key: tensor.clone() for key, tensor in read_tensors(file).items()}
    tensors["moments"][row, 0, 3, 3] = float("nan")
    safetensors.torch.save_file(tensors, file, metadata=metadata)
    return folder, LatentCache(folder).names()[image], step


class Watched:
    """Trains with the network and optimizer in view, which `commands.train` keeps to itself."""

    def __init__(self, recipe, precision="fp32"):
        torch.manual_seed(0)
        self.runtime = Runtime(torch.device("cpu"), precision=precision)
        self.recipe = recipe
        source = open_source(recipe)
        self.images = TrainingImages(source, seed=recipe.training.seed, flip=recipe.data.flip)
        self.model = build_model(recipe, Autoencoder.from_pretrained(recipe.autoencoder), self.images)

    def train(self) -> None:
        run = Path(self.recipe.out)
        run.mkdir(exist_ok=True)
        velocity.train_velocity(self.recipe, self.model, self.images, run, self.runtime)


@pytest.mark.parametrize("deferred", [False, True], ids=["read at every step", "read with the log, as on a GPU"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_bad_image_stops_training_and_spares_the_weights(recipe, poisoned, monkeypatch, deferred, micro_batch_size):
    folder, name, step = poisoned
    given = {"micro_batch_size": micro_batch_size, "log_every": 7}
    if deferred:
        monkeypatch.setattr(loop.FiniteGuard, "is_due", lambda self, step, log_every: step % log_every == 0)
    sound = Watched(recipe("sound", training={"steps": step - 1, **given}, data=folder))
    sound.train()
    bad = Watched(recipe("bad", data=folder, training=given))
    with pytest.raises(NonFiniteError) as caught:
        bad.train()
    message = str(caught.value)
    assert name in message
    assert f"step {step}:" in message
    assert "1 of" in message
    for key, tensor in bad.model.network.state_dict().items():
        assert torch.equal(tensor, sound.model.network.state_dict()[key]), key
    assert newest_checkpoint(Path(bad.recipe.out)) is None


def test_no_checkpoint_is_written_after_a_bad_step(recipe, poisoned, monkeypatch):
    """On a GPU the flag is read with the log; a checkpoint that is due before that must read it, too."""
    folder, _, step = poisoned
    monkeypatch.setattr(loop.FiniteGuard, "is_due", lambda self, step, log_every: step % log_every == 0)
    run = Watched(recipe("run", data=folder, training={"log_every": 7, "checkpoint_every": 2}))
    with pytest.raises(NonFiniteError, match=f"newest checkpoint is step {step - 1}"):
        run.train()
    assert newest_checkpoint(Path(run.recipe.out)).name == f"step-{step - 1:08d}"


def test_a_bad_parameter_is_named(recipe, monkeypatch):
    """The loss is finite, a gradient is not."""
    run = Watched(recipe("run"))
    run.model.network.final_linear.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"gradient of final_linear\.weight"):
        run.train()
    assert all(parameter.isfinite().all() for parameter in run.model.network.parameters())


def test_a_bad_image_ends_the_command_with_one_line(recipe, poisoned, recipe_file, capsys, monkeypatch):
    folder, name, _ = poisoned
    file = recipe_file(recipe("run", data=folder))
    result = processes.run_here(("train", file, "--device", "cpu"), capsys, monkeypatch)
    assert result.code == 1
    last = result.err.splitlines()[-1]
    assert last.startswith("latentflow: ")
    assert name in last


# The parts


def test_ema_by_hand():
    """average <- average + (1 - min(decay, (1 + n) / (10 + n))) (weights - average)"""
    network = nn.Linear(1, 1, bias=False)
    values = torch.tensor([3.0, -1.0, 4.0, 1.0, 5.0])
    with torch.no_grad():
        network.weight.fill_(2.0)
    ema = EMA(network, 0.25)
    average = 2.0
    for n, value in enumerate(values.tolist()):
        with torch.no_grad():
            network.weight.fill_(value)
        ema.update(n)
        decay = (0.1, 2 / 11, 0.25, 0.25, 0.25)[n]  # 3 / 12 = 0.25 is the limit
        average = decay * average + (1 - decay) * value
        assert ema.average["weight"].item() == pytest.approx(average, rel=1e-6)


def test_ema_without_decay_is_the_weights(train):
    run = train("run", training={"ema_decay": 0})
    average, weights = (read_tensors(newest_checkpoint(run) / f"{name}.safetensors") for name in ("ema", "network"))
    assert all(torch.equal(average[key], weights[key]) for key in weights)


def test_ema_holds_its_own_memory():
    network = nn.Linear(2, 2)
    ema = EMA(network, 0.9)
    before = ema.average["weight"].clone()
    with torch.no_grad():
        network.weight.add_(1)
    assert torch.equal(ema.average["weight"], before)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (6, 0.1 + 0.9 * 0.5), (8, 0.1), (9, 0.1)],
)
def test_cosine_schedule(step, rate):
    """4 steps of warm-up to 1, then a cosine from 1 to 0.1 over the other 4 of 8."""
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine", final_learning_rate=0.1)
    assert config.rate(step, 8) == pytest.approx(rate, rel=1e-12)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))
    assert config.rate(5, 8) == pytest.approx(quarter, rel=1e-12)


def test_constant_schedule():
    config = OptimizerConfig(learning_rate=0.3, warmup_steps=2)
    assert [config.rate(step, 5) for step in range(5)] == [0.15, 0.3, 0.3, 0.3, 0.3]
    assert OptimizerConfig(learning_rate=0.3).rate(0, 5) == 0.3


def test_the_rate_reaches_the_optimizer(train):
    run = train("run", optimizer={"learning_rate": 1e-3, "warmup_steps": 5, "clip_norm": None, "weight_decay": 0})
    assert [line["learning_rate"] for line in read_metrics(run)][:6] == [
        pytest.approx(1e-3 * n / 5) for n in (1, 2, 3, 4, 5, 5)
    ]
    one = train("one", training={"steps": 1}, optimizer={"learning_rate": 1e-3, "warmup_steps": 5})
    # Adam's first step is the learning rate, whatever the size of a gradient: here a fifth of 1e-3 from zero.
    moved = read_tensors(newest_checkpoint(one) / "network.safetensors")["final_linear.bias"].abs()
    assert moved.max().item() == pytest.approx(2e-4, rel=1e-3)


def test_previews_show_the_average_and_leave_no_trace(train, cache, tmp_path):
    """A run with previews ends as one without; the grid is a function of the weights."""
    plain, shown = train("plain"), train("shown", training={"preview_every": 3})
    assert final(plain) == final(shown)
    model = LatentFlow.from_pretrained(shown, device="cpu")
    weights = read_tensors(newest_checkpoint(shown) / "ema.safetensors")
    images = TrainingImages(LatentCache(cache), seed=0, flip=False)
    save_preview(model, weights, images, tmp_path / "again.png", model.runtime, 4)
    assert (tmp_path / "again.png").read_bytes() == (shown / "samples" / "step-00000010.png").read_bytes()


def test_metrics_lines_are_json(train):
    run = train("run", training={"steps": 2})
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] in (1, 2)


def test_only_a_damaged_line_of_metrics_is_lost(tmp_path, caplog):
    good = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    lines = [json.dumps(line).encode() for line in good]
    bad = [b'{"step": "x"}', b"\xff\xfe{", b"[1]", b'{"step": 4, "lo']
    mixed = [lines[0], bad[0], lines[1], *bad[1:3], lines[2], bad[3]]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(mixed))
    assert read_metrics(tmp_path) == good
    assert "4 of 7 lines" in caplog.text


# Models that are kept at shares of a run


@pytest.fixture
def shares():
    return {"steps": 16, "checkpoint_every": 5, "keep_at": [0.0625, 0.125], "keep_checkpoints": 2}


def test_a_run_keeps_models_at_shares_of_it(train, shares):
    """Only the models, once their checkpoints are not among the newest; the run itself is the same."""
    run = train("run", training=shares)
    folders = sorted((run / "checkpoints").iterdir())
    assert {folder.name: contents(folder) == [folder / "model"] for folder in folders} == {
        "step-00000001": True,
        "step-00000002": True,
        "step-00000015": False,
        "step-00000016": False,
    }
    for share, step in (("1/16", 1), ("1/8", 2)):
        assert LatentFlow.from_pretrained(f"{run}@{share}", device="cpu").config.training.step == step
    assert newest_checkpoint(run).name == "step-00000016"
    assert final(run) == final(train("other", training={**shares, "keep_at": []}))


def test_models_at_shares_stay_when_a_run_goes_on(train, shares):
    """A longer run has other shares; what was kept stays. Without newer checkpoints it goes on from an older one."""
    run = train("run", training={**shares, "steps": 8})
    assert snapshot_steps(run) == [1]
    train("run", training={**shares, "steps": 32, "keep_at": [0.5]})
    assert snapshot_steps(run) == [1, 16]
    whole = final(run)
    for step in (30, 32):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    assert newest_checkpoint(run) is None
    train("run", training={**shares, "steps": 32, "keep_at": []})
    assert final(run) == whole


@pytest.mark.parametrize("at", ["ema.safetensors", "state.json"])
def test_a_kill_while_a_milestone_is_reduced_to_its_model(train, shares, monkeypatch, at):
    """The next part of the run ends what was begun."""
    unlink, killed = Path.unlink, []

    def dies(path, missing_ok=False):
        if path.name == at and path.parent.name == "step-00000001" and not killed:
            killed.append(path)
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            train("run", training=shares)
    run = train("run", training=shares)
    assert killed
    assert contents(run / "checkpoints" / "step-00000001") == [run / "checkpoints" / "step-00000001" / "model"]
    assert final(run) == final(train("other", training=shares))
