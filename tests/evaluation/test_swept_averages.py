"""A sweep over averages: names of candidates, and that each is drawn with its own weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from latentflow.artifacts import read_json, write_json
from latentflow.commands.ema import ema
from latentflow.commands.sweep import sweep
from latentflow.commands.train import train
from latentflow.errors import ArtifactError
from latentflow.evaluation.drawn_set import ImageSet
from latentflow.evaluation.request import SweepRequest
from latentflow.evaluation.swept_averages import SweptAverages, with_lengths
from latentflow.model.fitted_solvers import SOLVERS_FILE
from latentflow.model.flow_model import FlowModel, read_config
from latentflow.requests import RequestError
from latentflow.training.request import EmaRequest
from tests import tiny

GIVEN = {"num": 8, "solvers": ["euler"], "steps": [1, 2], "guidance": [1.0]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache, kl_folder) -> Path:
    """A run that has kept its averages, at a rate at which they differ."""
    run = tmp_path_factory.mktemp("runs") / "run"
    training = {"steps": 8, "ema_lengths": [0.05, 0.1], "ema_snapshots": 4}
    given = {"data": {"path": cache}, "autoencoder": kl_folder, "training": training, "out": run}
    return train(tiny.recipe(optimizer={"learning_rate": 0.03}, **given), runtime=tiny.CPU).run


@pytest.fixture
def swept(trained, images, tmp_path):
    def run(model: Path = trained, **given):
        return sweep(SweepRequest(model=model, data=images, out=tmp_path / "out", **{**GIVEN, **given}), tiny.CPU)

    return run


def test_every_candidate_with_every_length():
    presets, lengths = with_lengths({"euler-2": {"steps": 2}, "heun-4": {"steps": 4}}, [0.05, 0.1])
    assert list(presets) == ["euler-2_e0.05", "euler-2_e0.1", "heun-4_e0.05", "heun-4_e0.1"]
    assert lengths["heun-4_e0.1"] == 0.1
    assert presets["heun-4_e0.05"] == {"steps": 4}


def test_each_is_drawn_with_its_own_weights(swept, trained, images, tmp_path):
    """Its distance is that of a sweep of the model with this average."""
    found = swept(ema=[0.1, 0.06]).final.measured
    assert list(found) == ["euler-1_e0.1", "euler-1_e0.06", "euler-2_e0.1", "euler-2_e0.06"]
    for length in (0.1, 0.06):
        ema(EmaRequest(run=trained, length=length, out=tmp_path / f"{length}"))
        alone = sweep(
            SweepRequest(model=tmp_path / f"{length}", data=images, out=tmp_path / f"sweep_{length}", **GIVEN), tiny.CPU
        )
        for name, one in alone.final.measured.items():
            assert found[f"{name}_e{length}"].distance == one.distance
    assert found["euler-2_e0.1"].distance != found["euler-2_e0.06"].distance


def test_repeating_draws_nothing_and_the_record_names_the_lengths(swept, tmp_path, monkeypatch):
    first = swept(ema=[0.05, 0.1])
    candidates = read_json(tmp_path / "out" / "sweep.json")["candidates"]
    assert {one["name"]: one["ema_length"] for one in candidates} == first.lengths
    monkeypatch.setattr(ImageSet, "draw", lambda *args, **given: pytest.fail("drawn again"))
    assert swept(ema=[0.05, 0.1]).final == first.final
    with pytest.raises(ArtifactError, match="holds a sweep with other settings"):
        swept(ema=[0.05, 0.12])


def test_the_best_is_written_with_its_weights(swept, trained, tmp_path):
    """One candidate has nobody to beat."""
    run = shutil.copytree(trained, tmp_path / "run")
    result = swept(model=run, ema=[0.08], steps=[1], write=True)
    assert result.written
    config = read_config(run / "model")
    assert (config.training.ema_length, config.sampling.steps) == (0.08, 1)
    ema(EmaRequest(run=trained, length=0.08, out=tmp_path / "other"))
    one, other = (FlowModel.from_pretrained(folder, runtime=tiny.CPU) for folder in (run, tmp_path / "other"))
    assert one.weights_hash == other.weights_hash


def test_weights_are_put_in_once_for_candidates_in_a_row(trained, monkeypatch):
    averages = SweptAverages(trained, [0.05, 0.1], read_config(trained / "model"))
    network, loaded = FlowModel.from_pretrained(trained, runtime=tiny.CPU).network, []
    put = averages.put_into(network, {"a": 0.05, "b": 0.05, "c": 0.1})
    monkeypatch.setattr(network, "load_state_dict", lambda weights: loaded.append(weights))
    for name in "abc":
        put(name)
    assert len(loaded) == 2
    for weights, length in zip(loaded, (0.05, 0.1), strict=True):
        assert weights["patch_embedding.weight"] is averages.weights[length]["patch_embedding.weight"]


def test_refusals(swept, trained, tmp_path):
    with pytest.raises(RequestError, match=r"ema 0\.27: the averages that .* give 0\.0\d+ to 0\.1"):
        swept(ema=[0.05, 0.27])
    with pytest.raises(ArtifactError, match="has kept no averages"):
        swept(model=trained / "model", ema=[0.05])
    for lengths in ([0.05, 0.5], [], [0.1, 0.1]):
        with pytest.raises(RequestError, match=r"give (one length|lengths)"):
            swept(ema=lengths)
    run = shutil.copytree(trained, tmp_path / "run")
    solver = {"times": [1, 0.5, 0], "weights": [[1], [1]], "fitted_with": {}, "error": 0, "others": {}}
    weights = FlowModel.from_pretrained(run, runtime=tiny.CPU).weights_hash
    write_json(run / "model" / SOLVERS_FILE, {"weights": weights, "solvers": {"fitted-2": solver}})
    with pytest.raises(RequestError, match=r"solvers fitted-2@.*: it was fitted to the model's own weights"):
        swept(model=run, solvers=["euler", "fitted-2"], ema=[0.05])
    assert not (tmp_path / "out").exists()
