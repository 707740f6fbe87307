"""Runs that are finetuned by low rank: what they leave, as one graph, in half precision, in two processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from latentflow.api import LatentFlow
from latentflow.artifacts import open_tensors, read_tensors, write_tensors
from latentflow.commands.info import describe
from latentflow.commands.train import train as train_command
from latentflow.errors import ConfigError
from latentflow.model.flow_model import open_adapter
from latentflow.training import held_out_watch, loop, velocity
from latentflow.training.checkpoint import newest_checkpoint
from latentflow.training.config import Recipe
from tests import processes, tiny
from tests.dispatch import Recorder
from tests.training.test_loop import final, largest_difference

NETWORKS: dict[str, dict[str, Any]] = {
    "classic": tiny.RECIPE["network"],
    "modern": {**tiny.RECIPE["network"], "variant": "modern", "value_residual": True},
    "unet": {
        "kind": "unet",
        "channels": 8,
        "multipliers": [1, 2],
        "blocks_per_level": 1,
        "num_heads": 2,
        "norm_groups": 4,
        "attention_factors": [2],
        "dropout": 0.2,
    },
}
EVERY_NETWORK = pytest.mark.parametrize("network", NETWORKS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory, cache, kl_folder) -> Path:
    """A run of each network, to begin with."""
    folder = tmp_path_factory.mktemp("sources")
    for name, network in NETWORKS.items():
        made = Recipe.model_validate(
            {
                **tiny.RECIPE,
                "network": network,
                "data": {"path": str(cache), "flip": False},
                "autoencoder": str(kl_folder),
                "out": str(folder / name),
                "training": {**tiny.RECIPE["training"], "steps": 3},
            }
        )
        train_command(made, runtime=tiny.CPU)
    return folder


@pytest.fixture
def recipe(tmp_path, cache, sources, monkeypatch):
    """A recipe that finetunes one of the sources by low rank, with images held out."""
    monkeypatch.setattr(held_out_watch, "COST", 1e9)  # measured in every step

    def make(name: str, network: str = "classic", **given: Any) -> Recipe:
        training = {**tiny.RECIPE["training"], "steps": 6, **given.pop("training", {})}
        values = {
            "init_from": str(sources / network),
            "finetuning": {"method": "lora", "rank": 2},
            "data": {"path": str(cache), "flip": True, "held_out": 0.2},
            "optimizer": {"learning_rate": 1e-2, **given.pop("optimizer", {})},
            "training": training,
            "out": str(tmp_path / name),
        }
        return Recipe.model_validate({**values, **given})

    return make


@pytest.fixture
def train(recipe):
    return lambda name, network="classic", **given: train_command(recipe(name, network, **given), runtime=tiny.CPU).run


@EVERY_NETWORK
def test_the_source_and_the_adapter_are_the_model_of_the_run(train, sources, network):
    run = train("run", network, training={"keep_every": 3, "preview_every": 3})
    for snapshot in (run, f"{run}@best", f"{run}@3"):
        whole = LatentFlow.from_pretrained(snapshot, device="cpu")
        both = LatentFlow.from_pretrained(sources / network, adapter=snapshot, device="cpu")
        assert both.weights_hash == whole.weights_hash and both.config == whole.config
    source = LatentFlow.from_pretrained(sources / network, device="cpu")
    whole, others = whole.network.state_dict(), source.network.state_dict()
    moved = {name for name, tensor in whole.items() if not torch.equal(tensor, others[name])}
    assert moved == {f"{layer}.weight" for layer in open_adapter(run).record.target_modules}
    none = LatentFlow.from_pretrained(sources / network, adapter=run, adapter_strength=0, device="cpu")
    assert none.weights_hash == source.weights_hash
    facts = describe(run)
    assert (
        facts["adapter"] == str(run / "model" / "adapter")
        and facts["parameters"] == describe(sources / network)["parameters"]
    )


@EVERY_NETWORK
def test_checkpoints_hold_what_is_trained_and_runs_resume_exactly(train, network):
    given = {"training": {"micro_batch_size": 2}, "times": {"stratified": True}}
    whole = train("whole", network, **given)
    train("parts", network, **{**given, "training": {"micro_batch_size": 2, "steps": 4}})
    parts = train("parts", network, **given)
    assert final(parts) == final(whole)
    for folder in ("model/adapter", "best/adapter"):
        assert tiny.tree(parts / folder) == tiny.tree(whole / folder)
    for file in ("network", "ema"):
        names = read_tensors(newest_checkpoint(whole) / f"{file}.safetensors").keys()
        assert {name for name in names if "lora_" not in name} <= {"embedding.frequencies"}
    state = read_tensors(newest_checkpoint(whole) / "optimizer.safetensors")
    assert all("lora_" in name for name in state) and len(state) == 3 * 2 * len(
        open_adapter(whole).record.target_modules
    )


def test_an_average_of_a_source_with_other_classes(train, cache, sources):
    """What is trained as a whole is averaged, saved and scaled by the strength like the factors."""
    run = train("run", conditioning={"label_dropout": 0.0}, data={"path": str(cache), "labels": False})
    whole = LatentFlow.from_pretrained(run, device="cpu")
    assert open_adapter(run).record.whole_tensors == ["constant_embedding"]
    both = LatentFlow.from_pretrained(sources / "classic", adapter=run, device="cpu")
    assert both.weights_hash == whole.weights_hash
    average = read_tensors(newest_checkpoint(run) / "ema.safetensors")["constant_embedding"]
    assert torch.equal(whole.network.constant_embedding, average)


def test_a_source_of_half_precision_on_disk(train, sources, cache, tmp_path):
    """What is trained as a whole begins wide, in the run and in its adapter."""
    shutil.copytree(sources / "classic" / "model", tmp_path / "half")
    file = tmp_path / "half" / "velocity.safetensors"
    with open_tensors(file) as opened:
        config = {"config": opened.metadata()["config"]}
    write_tensors(file, {name: tensor.half() for name, tensor in read_tensors(file).items()}, config)
    given = {"conditioning": {"label_dropout": 0.0}, "data": {"path": str(cache), "labels": False}}
    run = train("run", init_from=str(tmp_path / "half"), **given)
    both = LatentFlow.from_pretrained(tmp_path / "half", adapter=run, device="cpu")
    assert both.weights_hash == LatentFlow.from_pretrained(run, device="cpu").weights_hash
    assert {tensor.dtype for tensor in open_adapter(run).tensors.values()} == {torch.float32}
    file = run / "model" / "adapter" / "adapter.safetensors"  # as earlier versions wrote it
    tensors, name = read_tensors(file), "start.constant_embedding"
    write_tensors(file, {**tensors, name: tensors[name].half()})
    again = LatentFlow.from_pretrained(tmp_path / "half", adapter=run, device="cpu")
    assert again.weights_hash == both.weights_hash


@EVERY_NETWORK
def test_a_run_of_graphs_ends_like_one_without(train, monkeypatch, network):
    if network == "unet":
        pytest.skip("its dropout is seeded by the host")
    plain = train("plain", network)
    monkeypatch.setattr(loop, "cuda_graph", recorder := Recorder())
    monkeypatch.setattr(velocity, "captures", lambda *_: True)
    assert final(train("graph", network)) == final(plain) and recorder.count == 1


def test_in_half_precision_what_is_kept_is_wide(train, sources):
    run = train("run", "modern", training={"precision": "bf16"})
    for file in newest_checkpoint(run).glob("*.safetensors"):
        assert {tensor.dtype for tensor in read_tensors(file).values()} == {torch.float32}
    both = LatentFlow.from_pretrained(sources / "modern", adapter=run, device="cpu")
    assert both.weights_hash == LatentFlow.from_pretrained(run, device="cpu").weights_hash


def test_two_processes_equal_one(recipe, train, tmp_path):
    one = train("one")
    file = tmp_path / "two.yaml"
    given = recipe("two", training={"micro_batch_size": 1}).model_dump(mode="json", exclude_unset=True)
    file.write_text(yaml.safe_dump(given), encoding="utf-8")
    workers = processes.start_processes(("train", file, "--device", "cpu"), tmp_path / "log", 2)
    for rank, worker in enumerate(workers):
        log = tmp_path / f"log.{rank}"
        assert processes.finish(worker, log) == 0, log.read_text()
    assert largest_difference(one, tmp_path / "two") < 1e-5
    adapters = [open_adapter(run).tensors for run in (one, tmp_path / "two")]
    assert max(float((tensor - adapters[1][name]).abs().max()) for name, tensor in adapters[0].items()) < 1e-5


def test_muon_is_refused_before_anything_is_written(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer\.kind = muon .* finetuning\.method = full, not with lora"):
        train_command(recipe("run", optimizer={"kind": "muon"}), runtime=tiny.CPU)
    assert not (tmp_path / "run").exists()
