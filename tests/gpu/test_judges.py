"""Judges on a GPU: they learn and judge as on the CPU, and a sweep with one finds the CPU's distances."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latentflow.commands.sweep import sweep
from latentflow.commands.train import train
from latentflow.commands.train_features import train_features
from latentflow.data.items import stack_pixels
from latentflow.data.sources.images import open_images
from latentflow.evaluation.request import SweepRequest
from latentflow.metrics.features.extractors import open_features
from latentflow.training import feature_run, loop
from latentflow.training.feature_run import prepare_features, train_feature_network
from latentflow.training.log import read_metrics
from latentflow.training.request import TrainFeaturesRequest
from tests import tiny

SMALL = {"image_size": tiny.IMAGE_SIZE, "side": 16, "width": 8, "steps": 12, "batch_size": 16}
CLASSES = {"classes": tiny.CLASSES, "per_class": 90}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("pictures"), **CLASSES)


def on(device: str, precision: str = "fp32"):
    chosen = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return replace(tiny.CPU, device=chosen).with_precision(precision)


@pytest.mark.parametrize("without_labels", [False, True], ids=["labels", "views"])
def test_a_step_as_a_graph_gives_the_same_losses(cuda, pictures, tmp_path, monkeypatch, caplog, without_labels):
    losses = {}
    for name, captures in (("graph", True), ("kernels", False)):
        made = lambda wanted=captures, **given: loop.Job(**{**given, "captures": wanted})  # noqa: E731
        monkeypatch.setattr(feature_run, "Job", made)
        request = TrainFeaturesRequest(data=pictures, out=tmp_path / name, without_labels=without_labels, **SMALL)
        prepared = prepare_features(request, on(cuda))
        prepared.begin()
        train_feature_network(prepared)
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name)]
    assert "kernel by kernel" not in caplog.text
    assert losses["graph"] == pytest.approx(losses["kernels"], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_judge_is_the_same_anywhere(device, pictures, tmp_path, precision):
    """Trained on a GPU, it knows its classes and gives the features of the CPU."""
    request = TrainFeaturesRequest(data=pictures, out=tmp_path / "judge", **{**SMALL, "steps": 60})
    record = train_features(request, runtime=on(device, precision)).record
    assert record.accuracy > 1.5 / len(tiny.CLASSES)
    source = open_images(pictures, tiny.IMAGE_SIZE)
    pixels = stack_pixels([source[index].pixels for index in range(0, len(source), 3)])
    here, there = (
        open_features(str(tmp_path / "judge"), device=place)(pixels).float().cpu() for place in ("cpu", device)
    )
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-2 * float(here.abs().max()))


def test_a_sweep_finds_the_distances_of_the_cpu(device, pictures, gpu_cache, recipe, tmp_path):
    """With two guidances and two averages: weights that change between candidates are not those of an old graph."""
    training = {"precision": "fp32", "ema_lengths": [0.05, 0.1], "ema_snapshots": 2}
    run = train(recipe("run", training=training), runtime=on(device)).run
    judge = train_features(TrainFeaturesRequest(data=pictures, out=tmp_path / "judge", **SMALL), runtime=on("cpu"))
    given = {"model": run, "data": str(pictures), "features": str(judge.folder), "num": 96, "margin": 0.1}
    swept = {"solvers": ["ab2"], "steps": [10], "guidance": [1.0, 2.0], "ema": [0.05, 0.1]}
    found = {}
    for place in ("cpu", device):
        result = sweep(SweepRequest(**given, **swept, out=tmp_path / place), runtime=on(place))
        found[place] = [point.distance for point in result.final.points]
    assert len(set(found["cpu"])) == 4
    assert found[device] == pytest.approx(found["cpu"], rel=2e-2)
