"""A damaged checkpoint is named, and deleting it, as the message says, goes on from the one before."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentflow.artifacts import open_tensors, read_json, read_tensors, write_json, write_tensors
from latentflow.commands.train import train as train_command
from latentflow.errors import ArtifactError
from latentflow.training.checkpoint import newest_checkpoint
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


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_named_and_the_remedy_helps(resume, tmp_path, damage):
    with pytest.raises(ArtifactError) as caught:
        resume(damage)
    told = str(caught.value)
    assert "\n" not in told
    folder = Path(re.search(r"delete (.+) to go on from the checkpoint before it", told)[1])
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
