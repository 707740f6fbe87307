"""`latentflow benchmark`: counts that are exact, times and memory that are there; bad input costs one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from latentflow.commands.benchmark import benchmark
from latentflow.errors import ConfigError
from latentflow.evaluation.request import BenchmarkRequest
from latentflow.model.flow_model import read_config
from latentflow.sampling.call_cost import multiply_adds
from latentflow.shapes import Condition
from tests import tiny
from tests.processes import run_here

MODELS = {
    "classes": {"label_dropout": 0.1},
    "nothing": {"class_names": ()},
    "painting": {"conditioning": tiny.SPATIAL},
    "required": {"label_dropout": 0.0, "conditioning": {**tiny.SPATIAL, "inpainting_dropout": 0.0}},
}


def measured(model, **given):
    return benchmark(BenchmarkRequest(model=model, **given), tiny.CPU)


@pytest.fixture(scope="module")
def models(tmp_path_factory, deterministic) -> dict[str, Path]:
    """Models on disk by their conditions."""
    folder = tmp_path_factory.mktemp("models")
    for name, given in MODELS.items():
        tiny.model(deterministic, **given).save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_gets_all_its_conditions(models, name):
    result = measured(models[name], num=3, batch_sizes=[2, 1, 2], repeats=1, solver="heun", steps=3)
    assert (result.evaluations, result.fewest, result.most) == (6, 6, 6)
    assert [batch.batch_size for batch in result.batches] == [1, 2]
    assert result.num == 4  # whole batches of 2
    assert result.histogram == {6: 4}
    assert all(batch.network_milliseconds > 0 and batch.decoder_milliseconds > 0 for batch in result.batches)
    assert sorted(result.told) == sorted(read_config(models[name]).conditioning.dropout)


def test_guided_calls_count_twice_and_only_inside_the_interval(models):
    costs = {"num": 2, "batch_sizes": [2], "repeats": 1, "solver": "euler", "steps": 4}
    assert measured(models["classes"], **costs, guidance=2).evaluations == 8
    # t = 1, 0.75, 0.5, 0.25, of which two lie inside
    assert measured(models["classes"], **costs, guidance=2, guidance_interval=(0.4, 0.8)).evaluations == 6
    assert measured(models["painting"], **costs, guidance=2, guided_by=["semantic_map"]).evaluations == 8


def test_adaptive_solvers_get_a_histogram(models):
    result = measured(models["classes"], num=4, batch_sizes=[4], repeats=1, solver="bosh3", rtol=1e-3, atol=1e-3)
    assert sum(result.histogram.values()) == 4
    assert sum(calls * n for calls, n in result.histogram.items()) / 4 == result.evaluations
    assert (min(result.histogram), max(result.histogram)) == (result.fewest, result.most)
    assert list(result.histogram) == sorted(result.histogram)


def test_multiply_adds_are_those_of_the_layers(deterministic):
    """Every linear layer and convolution, once per token or image, and attention's two products."""
    model = tiny.model(deterministic, class_names=())
    counted = {"n": 0}

    def count(module, inputs, output):
        if isinstance(module, torch.nn.Linear):
            counted["n"] += module.weight.numel() * inputs[0].numel() // module.in_features
        elif isinstance(module, torch.nn.Conv2d):
            counted["n"] += module.weight.numel() * output[0, 0].numel()

    for module in model.network.modules():
        module.register_forward_hook(count)
    latents = torch.zeros(1, *model.config.latent_shape)
    model.network(latents, torch.ones(1), Condition())
    made = multiply_adds(model.config)
    tokens, config = (tiny.IMAGE_SIZE // tiny.FACTOR // 2) ** 2, model.config.network
    assert made == counted["n"] + config.depth * 2 * tokens**2 * config.hidden_size


def test_peak_memory_names_its_kind(models):
    result = measured(models["nothing"], num=1, batch_sizes=[1], repeats=1)
    assert "resident" in result.memory
    assert result.batches[0].peak_bytes >= 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num": 0}, "number of images 0"),
        ({"repeats": 0}, "number of repeats 0"),
        ({"batch_sizes": [4, 0]}, "0 images in a batch"),
        ({"batch_sizes": []}, "no batch sizes"),
        ({"solver": "huen"}, "did you mean 'heun'"),
        ({"guidance": 2.0}, "unconditional"),
    ],
)
def test_bad_input_is_refused(models, given, message):
    with pytest.raises(ConfigError, match=message):
        measured(models["nothing"], **given)


def test_command_prints_a_table_and_json(models, capsys, monkeypatch):
    args = ["benchmark", models["classes"], "--num", "2", "--batch-sizes", "1,2", "--repeats", "1", "--device", "cpu"]
    shown = run_here(args, capsys, monkeypatch)
    assert shown.code == 0
    assert all(text in shown.out for text in ("batch of 1", "batch of 2", "multiply-adds", "ms network"))
    result = json.loads(run_here([*args, "--json"], capsys, monkeypatch).out)
    assert result["evaluations"] == 2
    assert result["sampling"]["solver"] == "euler"
    assert [batch["batch_size"] for batch in result["batches"]] == [1, 2]
    assert all(batch["images_per_second"] > 0 for batch in result["batches"])


def test_command_refuses_what_is_no_list_of_numbers(models, capsys, monkeypatch):
    result = run_here(["benchmark", models["classes"], "--batch-sizes", "1,two"], capsys, monkeypatch)
    assert result.code == 2
    assert "--batch-sizes '1,two' is not a list of numbers" in result.err
