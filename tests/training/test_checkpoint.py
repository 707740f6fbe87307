"""Checkpoints are written from copies while training goes on; milestones stay; a damaged one is named."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from latentflow.artifacts import open_tensors, read_json, read_tensors, write_json, write_tensors
from latentflow.commands.train import train as train_command
from latentflow.errors import ArtifactError
from latentflow.training import checkpoint
from latentflow.training.checkpoint import (
    CheckpointWriter,
    Keeping,
    Progress,
    keep_newest,
    load_checkpoint,
    newest_checkpoint,
)
from latentflow.training.ema import EMA
from latentflow.training.optim import OptimizerConfig, build_optimizer
from tests import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache, kl_folder) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    training = {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 2}
    train_command(
        tiny.recipe(data={"path": cache}, autoencoder=kl_folder, training=training, out=run), runtime=tiny.CPU
    )
    return run


@pytest.fixture
def resume(trained, tmp_path, cache, kl_folder):
    """Copy the run, damage its newest checkpoint, and go on; returns the run."""

    def go_on(damage=lambda folder: None, run: Path | None = None) -> Path:
        if run is None:
            run = shutil.copytree(trained, tmp_path / "run")
            damage(newest_checkpoint(run))
        training = {"steps": 6, "checkpoint_every": 2, "keep_checkpoints": 2}
        recipe = tiny.recipe(data={"path": cache}, autoencoder=kl_folder, training=training, out=run)
        train_command(recipe, runtime=tiny.CPU, allow_change=["training.steps"])
        return run

    return go_on


def flip(name: str):
    """Flip the lowest bit of the last byte, which belongs to the data."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return damage


def plant(name: str, value: float):
    """Another value in a file whose checksums fit, as of a writer that had it in memory."""

    def damage(folder: Path) -> None:
        tensors = {key: tensor.clone() for key, tensor in read_tensors(folder / name).items()}
        key = next(key for key, tensor in tensors.items() if tensor.numel() > 1)
        tensors[key].view(-1)[0] = value
        write_tensors(folder / name, tensors)
        _right_size(folder, name)

    return damage


def rename_key(folder: Path) -> None:
    tensors = read_tensors(folder / "optimizer.safetensors")
    save_file({f"x{key}": tensor.clone() for key, tensor in tensors.items()}, folder / "optimizer.safetensors")
    _right_size(folder, "optimizer.safetensors")


def _right_size(folder: Path, name: str) -> None:
    state = read_json(folder / "state.json")
    del state["checksum"]
    state["files"][name] = (folder / name).stat().st_size
    write_json(folder / "state.json", state)


def state(content: bytes):
    return lambda folder: (folder / "state.json").write_bytes(content)


def digit(folder: Path) -> None:
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"images_seen": 16', '"images_seen": 17'))


FILES = ("network.safetensors", "ema.safetensors", "optimizer.safetensors")
DAMAGES = {
    **{f"a bit of {name}": flip(name) for name in FILES},
    **{f"NaN in {name}": plant(name, float("nan")) for name in FILES},
    "a key of the optimizer": rename_key,
    "no state": lambda folder: (folder / "state.json").unlink(),
    "a digit of the state": digit,
    "state of bytes": state(b"\xff\xfe\x00"),
    "state of a list": state(b"[1, 2]"),
    "state without keys": state(b"{}"),
    "state of text": state(json.dumps({"step": "4", "images_seen": 16, "files": {}}).encode()),
    "state of huge numbers": state(json.dumps({"step": 10**40, "images_seen": 16, "files": {}}).encode()),
    "files that are no sizes": state(json.dumps({"step": 4, "images_seen": 16, "files": {"a": None}}).encode()),
    "deep state": state(b"[" * 100_000),
}


def test_a_checkpoint_that_is_removed_while_others_look_is_none(tmp_path, monkeypatch):
    for step in (4, 8):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "files").mkdir(parents=True)
    listed = checkpoint._complete

    def and_removed(place):
        found = listed(place)
        shutil.rmtree(found[0])
        return found

    monkeypatch.setattr(checkpoint, "_complete", and_removed)
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-00000008"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_named_and_the_remedy_helps(resume, tmp_path, damage):
    with pytest.raises(ArtifactError) as caught:
        resume(damage)
    message = str(caught.value)
    assert "\n" not in message
    folder = Path(re.search(r"delete (.+) to go on from the checkpoint before it", message)[1])
    assert folder.name == "step-00000004"
    shutil.rmtree(folder)
    assert newest_checkpoint(resume(run=tmp_path / "run")).name == "step-00000006"


def test_going_on_from_the_one_before_is_the_same(resume, tmp_path, trained):
    whole = {name: read_tensors(newest_checkpoint(trained) / name) for name in FILES}
    run = resume(lambda folder: shutil.rmtree(folder))
    for name in FILES:
        again = read_tensors(run / "checkpoints" / "step-00000004" / name)
        assert all(torch.equal(again[key], tensor) for key, tensor in whole[name].items())


def test_a_checkpoint_has_checksums(trained):
    for name in FILES:
        with open_tensors(newest_checkpoint(trained) / name) as file:
            assert set(json.loads(file.metadata()["crc32"])) == {"", *file.keys()}


# Writing in the background


class Training:
    """A network that is trained, one step at a time."""

    def __init__(self, **given):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        self.ema = EMA(self.network, 0.9)
        self.optimizer = build_optimizer(self.network, OptimizerConfig(learning_rate=0.1, weight_decay=0.1, **given))
        self.done = 0

    @property
    def parts(self) -> tuple[nn.Module, EMA, torch.optim.Optimizer]:
        return self.network, self.ema, self.optimizer

    def step(self) -> None:
        self.network(torch.full((2, 3, 4, 4), 0.1 * self.done)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.done)
        self.done += 1

    def state(self) -> dict[str, torch.Tensor]:
        state = checkpoint.training_state(*self.parts)
        return {f"{file}:{name}": value.clone() for file, part in state.items() for name, value in part.items()}


class Frozen(Training):
    """The same with a convolution that is not trained."""

    def __init__(self, **given):
        super().__init__(**given)
        self.network[0].requires_grad_(False)
        self.ema = EMA(self.network, 0.9)
        self.optimizer = build_optimizer(self.network, OptimizerConfig(learning_rate=0.1, weight_decay=0.1, **given))


@pytest.fixture
def writer(tmp_path):
    return CheckpointWriter(tmp_path, torch.device("cpu"), Keeping(2))


@pytest.fixture
def held(monkeypatch):
    """The disk waits until it is `set`."""
    gate, true = threading.Event(), checkpoint.write_checkpoint

    def slowly(*args):
        assert gate.wait(60)
        return true(*args)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slowly)
    yield gate
    gate.set()


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(folder) for folder in sorted((run / "checkpoints").iterdir())]


def test_frozen_weights_are_in_no_copy_and_in_every_model(tmp_path, writer):
    training, averages = Frozen(), []
    for _ in range(2):
        training.step()
    own = training.network.state_dict()
    assert training.ema.average["0.weight"].data_ptr() == own["0.weight"].data_ptr()
    writer.save_model = lambda folder, average: averages.append(average)
    writer.save(Progress(2, 4), *training.parts)
    writer.wait()
    (average,) = averages
    assert average.keys() == own.keys() and torch.equal(average["0.weight"], own["0.weight"])
    names = {name for name in training.state() if "0.weight" in name or "0.bias" in name}
    assert not names, "neither weights, nor averages, nor moments"
    other = Frozen()
    assert load_checkpoint(newest_checkpoint(tmp_path), *other.parts) == Progress(2, 4)
    training.step()
    other.done = 2
    other.step()
    assert all(torch.equal(other.state()[name], value) for name, value in training.state().items())
    with pytest.raises(ArtifactError, match=r"network\.safetensors does not fit .*'0\.bias' is missing"):
        load_checkpoint(newest_checkpoint(tmp_path), *Training().parts)


def test_what_is_written_is_the_state_of_the_save_and_not_of_later_steps(tmp_path, writer, held):
    training = Training()
    training.step()
    expected, averages = training.state(), []
    writer.save_model = lambda folder, average: averages.append(average)
    writer.save(Progress(1, 2), *training.parts)
    for _ in range(3):
        training.step()
    assert newest_checkpoint(tmp_path) is None  # and training went on
    held.set()
    writer.wait()
    copy = Training()
    assert load_checkpoint(newest_checkpoint(tmp_path), *copy.parts) == Progress(1, 2)
    assert copy.state().keys() == expected.keys()
    assert all(torch.equal(copy.state()[name], value) for name, value in expected.items())
    (average,) = averages
    assert all(torch.equal(average[name], value) for name, value in copy.ema.average.items())


def test_one_is_written_at_a_time(tmp_path, writer, held):
    """The next save waits for the last one."""
    training, order = Training(), []
    training.step()
    writer.save_model = lambda folder, average: order.append("model")
    writer.save(Progress(1, 2), *training.parts)
    second = threading.Thread(target=lambda: writer.save(Progress(2, 4), *training.parts) or order.append("second"))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    order.append("let go")
    held.set()
    second.join(60)
    writer.wait()
    assert order.index("let go") == 1
    assert steps(tmp_path) == [1, 2]


def test_the_model_goes_first(tmp_path, writer):
    training, found = Training(), []
    training.step()
    writer.save_model = lambda folder, average: found.append((folder, newest_checkpoint(tmp_path)))
    writer.save(Progress(1, 2), *training.parts)
    writer.wait()
    assert found == [(tmp_path / "model", None)]

    def fails(folder, average):
        raise ArtifactError("cannot write model: no space left on device")

    writer.save_model = fails
    writer.save(Progress(2, 4), *training.parts)
    with pytest.raises(ArtifactError, match="no space left"):
        writer.wait()
    assert steps(tmp_path) == [1]  # no checkpoint without its model


@pytest.mark.parametrize("call", ["raise_failure", "wait", "save", "exit"])
def test_a_failure_surfaces_at_the_next_call_once(tmp_path, writer, call):
    training = Training()
    training.step()
    (tmp_path / "checkpoints").write_text("in the way")
    calls = {"save": lambda: writer.save(Progress(2, 4), *training.parts), "exit": lambda: writer.__exit__(*[None] * 3)}
    writer.save(Progress(1, 2), *training.parts)
    writer._thread.join()
    with pytest.raises(ArtifactError, match=r"cannot create the folder .*checkpoints"):
        calls.get(call, getattr(writer, call, None))()
    (tmp_path / "checkpoints").unlink()
    writer.raise_failure()
    with writer:
        writer.save(Progress(3, 6), *training.parts)
    assert steps(tmp_path) == [3]


def test_the_end_waits_for_the_disk(tmp_path, writer):
    training = Training()
    training.step()
    with writer:
        writer.save(Progress(1, 2), *training.parts)
    assert steps(tmp_path) == [1]
    with pytest.raises(KeyError), writer:
        writer.save(Progress(2, 4), *training.parts)
        raise KeyError("a fault of training")
    assert steps(tmp_path) == [1, 2]


def test_a_second_signal_does_not_wait(tmp_path, writer, held):
    training = Training()
    training.step()
    with pytest.raises(KeyboardInterrupt), writer:
        writer.save(Progress(1, 2), *training.parts)
        raise KeyboardInterrupt
    assert newest_checkpoint(tmp_path) is None
    held.set()
    writer.wait()


def test_the_files_are_those_of_the_tensors_themselves(tmp_path, writer):
    """Channels last, counts and empty states, too."""
    training = Training()
    training.network.to(memory_format=torch.channels_last)
    training.step()
    writer.save(Progress(1, 2), *training.parts)
    writer.wait()
    state = checkpoint.training_state(*training.parts)
    for file, tensors in state.items():
        write_tensors(tmp_path / file, tensors)
        assert (tmp_path / file).read_bytes() == (newest_checkpoint(tmp_path) / file).read_bytes()


def test_the_state_lies_by_name_however_parameters_are_grouped(tmp_path, writer):
    """So that a run whose optimizer had one group goes on with two."""
    old = Training(weight_decay_on="all")
    old.step()
    with writer:
        writer.save(Progress(1, 2), *old.parts)
    new = Training()
    load_checkpoint(newest_checkpoint(tmp_path), *new.parts)
    assert [len(group["params"]) for group in new.optimizer.param_groups] == [2, 4]
    for one, other in zip(old.network.parameters(), new.network.parameters(), strict=True):
        for key, value in old.optimizer.state[one].items():
            assert torch.equal(value, new.optimizer.state[other][key])


# What stays


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [(1, None, [9]), (2, None, [8, 9]), (2, 3, [3, 6, 8, 9]), (3, 4, [4, 7, 8, 9]), (1, 10, [9]), (4, 1, range(1, 10))],
)
def test_milestones_are_kept_with_the_newest(tmp_path, keep, keep_every, kept):
    training = Training()
    training.step()
    keeping = Keeping(keep, keep_every)
    with CheckpointWriter(tmp_path, torch.device("cpu"), keeping) as writer:
        for step in range(1, 10):
            writer.save(Progress(step, 2 * step), *training.parts)
    assert steps(tmp_path) == list(kept)
    keep_newest(tmp_path, keeping)
    assert steps(tmp_path) == list(kept)


def test_checkpoints_of_an_earlier_version_are_read(tmp_path, writer):
    """Their state knows no growth tracker."""
    training = Training()
    training.step()
    with writer:
        writer.save(Progress(1, 2, loss_scale=1024.0, growth_tracker=7), *training.parts)
    file = newest_checkpoint(tmp_path) / "state.json"
    assert load_checkpoint(file.parent, *Training().parts) == Progress(1, 2, 1024.0, 7)
    state = read_json(file)
    del state["growth_tracker"], state["checksum"]
    write_json(file, state)
    assert load_checkpoint(file.parent, *Training().parts) == Progress(1, 2, 1024.0, 0)
