"""Paired images from end to end: encode, train, stop, resume, translate, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.commands.train import train
from latentflow.data.items import stack_pixels
from latentflow.data.painting.input_rules import InputRules
from latentflow.data.sources.images import open_images
from latentflow.metrics.pairs import psnr, ssim
from latentflow.model.flow_model import FlowModel, read_config
from latentflow.training.config import load_recipe
from tests import tiny
from tests.processes import run_here

SIZE = tiny.IMAGE_SIZE
RECIPES = {"super_resolution_4x": "shrink:4", "colouring": "gray"}


@pytest.fixture(scope="module")
def paired(tmp_path_factory) -> Path:
    return tiny.write_paired(tmp_path_factory.mktemp("paired") / "fruit")


@pytest.fixture
def latentflow(capsys, monkeypatch):
    """Runs a command, which must succeed; returns what it prints as JSON."""

    def run(*args: object) -> dict:
        result = run_here([*args, "--json", "--device", "cpu"], capsys, monkeypatch)
        assert result.code == 0, result.err
        return json.loads(result.out)

    return run


def recipe(cache: Path, kl_folder: Path, out: Path, steps: int = 4, **given):
    given = {"training": {"steps": steps, "checkpoint_every": 2}, "conditioning": {"input": True}, **given}
    return tiny.recipe(data={"path": cache, **given.pop("data", {})}, autoencoder=kl_folder, out=out, **given)


@pytest.mark.parametrize("form", ["pixels", "latents"])
def test_from_pairs_of_files_to_scores(latentflow, paired, kl_folder, tmp_path, form):
    cache, run = tmp_path / "cache", tmp_path / "run"
    encode = ["encode", paired, "--autoencoder", kl_folder, "--image-size", SIZE, "--input-form", form]
    assert latentflow(*encode, "--out", cache)["inputs"] == f"files as {form}"
    train(recipe(cache, kl_folder, run, training={"steps": 4, "preview_every": 4}), runtime=tiny.CPU)
    config = read_config(run / "model")
    assert config.inputs.title == f"files as {form}"
    assert config.conditioning.can_guide == ["label", "input"]
    assert (run / "samples" / "step-00000004.png").is_file()
    picture = next((paired / "inputs").rglob("*.jpg"))
    drawn = latentflow("translate", run, picture, "--num", 2, "--out", tmp_path / "drawn.png")
    files = [Path(file) for file in drawn["files"].split(", ")]
    assert [Image.open(file).size for file in files] == [(SIZE, SIZE)] * 2
    asked = ["--task", "translate", "--features", "random", "--metrics", "fid,psnr,ssim", "--num", 12]
    report = latentflow("evaluate", run, "--data", paired, *asked, "--out", tmp_path / "scores")
    assert {"psnr", "ssim"} < report["scores"].keys()
    losses = latentflow("loss", run, "--data", paired, "--num", 64)
    assert set(losses) == {"nothing", "label", "input", "label + input"}


def test_scores_stand_beside_those_of_the_input_and_of_the_autoencoder(latentflow, paired, kl, tmp_path):
    tiny.model(kl, inputs=InputRules(origin="shrink:4")).save_pretrained(tmp_path / "model")
    asked = ["--task", "translate", "--features", "random", "--num", 12, "--metrics", "psnr,ssim,psnr-input,ssim-input"]
    scores = latentflow("evaluate", tmp_path / "model", "--data", paired, *asked)["scores"]
    items = list(open_images(paired, SIZE, inputs="shrink:4"))
    real = stack_pixels([item.pixels for item in items])
    small = [Image.fromarray(item.input) for item in items]
    enlarged = stack_pixels([np.asarray(one.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for one in small])
    assert scores["psnr-input"]["value"] == pytest.approx(float(psnr(enlarged, real).mean()), abs=0.05)
    assert scores["ssim-input"]["value"] == pytest.approx(float(ssim(enlarged, real).mean()), abs=0.005)
    assert scores["psnr"]["limit"] == pytest.approx(float(psnr(kl.reconstruct(real), real).mean()), abs=1e-6)
    assert scores["psnr-input"].get("limit") is None


def test_inputs_are_compared_with_images_by_default_only_if_they_are_made_from_them(latentflow, paired, kl, tmp_path):
    tiny.model(kl, inputs=InputRules()).save_pretrained(tmp_path / "model")
    asked = ["--task", "translate", "--features", "random", "--num", 12]
    scores = latentflow("evaluate", tmp_path / "model", "--data", paired, *asked)["scores"]
    assert {"psnr", "ssim"} < scores.keys()
    assert not {"psnr-input", "ssim-input"} & scores.keys()


@pytest.mark.parametrize("source", ["cache", "images"])
def test_a_stopped_run_ends_in_the_same_weights(paired, kl, kl_folder, tmp_path, source):
    data, inputs = paired, {"inputs": {"origin": "shrink:4"}, "flip": True}
    if source == "cache":
        images, data = open_images(paired, SIZE, inputs="shrink:4"), tmp_path / "cache"
        tiny.write_cache(images, kl, data, flips=True, variants=2)
    for steps in (2, 4):
        train(recipe(data, kl_folder, tmp_path / "stopped", steps, data=inputs), runtime=tiny.CPU)
    train(recipe(data, kl_folder, tmp_path / "whole", data=inputs), runtime=tiny.CPU)
    stopped, whole = (FlowModel.from_pretrained(tmp_path / name, device="cpu") for name in ("stopped", "whole"))
    assert stopped.weights_hash == whole.weights_hash


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_train_on_the_inputs_that_they_are_for(name, paired, kl, kl_folder, tmp_path, latentflow):
    cache, run = tmp_path / "cache", tmp_path / "run"
    tiny.write_cache(open_images(paired, SIZE, inputs=RECIPES[name]), kl, cache)
    small = ["network={depth: 1, hidden_size: 16, num_heads: 2, patch_size: 2}", "training.steps=2"]
    asked = [f"data.path={cache}", f"out={run}", *small, "training.batch_size=4", "training.preview_every=0"]
    train(load_recipe(name, asked), runtime=tiny.CPU)
    config = read_config(run / "model")
    assert (config.inputs.origin, config.conditioning.class_names) == (RECIPES[name], [])
    assert latentflow("plan", name, f"data.path={cache}", *small)
