"""Trackers: the numbers of metrics.jsonl go to them as well, a resumed run goes on in them, and they stop nothing."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from latentflow.commands.train import train
from latentflow.errors import ConfigError
from latentflow.training import trackers
from latentflow.training.log import RunLog, read_metrics
from tests import tiny

VALUES = {"images_seen": 4, "loss": 1.5, "learning_rate": 1e-3, "images_per_second": 10.0}

FAKE = """
import json, os
FILE = os.environ["FAKE_TRACKER"]
def note(*what):
    with open(FILE, "a") as file:
        file.write(json.dumps(what) + "\\n")
class Run:
    class info:
        run_id = "m1"
    def log(self, values, step=None):
        if os.environ.get("FAKE_FAILS") == "log":
            raise RuntimeError("no network\\nat all")
        note("log", step, values)
    def finish(self):
        note("finish")
class config:
    @staticmethod
    def update(values, allow_val_change):
        note("config", values)
def init(**given):
    if os.environ.get("FAKE_FAILS") == "init":
        raise RuntimeError("no API key\\nsee above")
    note("init", {name: str(value) for name, value in given.items()})
    return Run()
# mlflow
class utils:
    class validation:
        MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH = 6000, 100
def search_experiments(filter_string):
    return []
def create_experiment(**given):
    return "e1"
def start_run(**given):
    return init(**given)
def log_params(values):
    note("config", values)
def log_metrics(values, step):
    Run().log(values, step)
def end_run():
    note("finish")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package of one of the names that writes down how it is called; returns its notes."""
    notes = tmp_path / "notes.jsonl"
    monkeypatch.setenv("FAKE_TRACKER", str(notes))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    def installed(name: str):
        (tmp_path / "packages").mkdir()
        (tmp_path / "packages" / f"{name}.py").write_text(FAKE, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path / "packages")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return lambda: [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []

    yield installed
    for name in ("wandb", "trackio", "mlflow"):
        if getattr(sys.modules.get(name), "FILE", None):
            del sys.modules[name]


def write(run, track, first_step=0):
    run.mkdir(exist_ok=True)
    with RunLog(run, num_steps=9, first_step=first_step, enabled=True, track=track) as opened:
        for step in (first_step + 1, first_step + 2):
            opened.metrics(step, {**VALUES, "loss_by_time": {"0.0-0.1": 2.0}})


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_gets_the_numbers_and_a_resumed_run_goes_on_in_it(name, fake, tmp_path):
    notes, run = fake(name), tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("training: {steps: 9, keep_at: [0.5]}\nout: x\n", encoding="utf-8")
    write(run, name)
    (what, how), (config, settings), *logged, finish = notes()
    assert (what, config, finish) == ("init", "config", ["finish"])
    assert settings == {"training.steps": 9, "training.keep_at": "[0.5]", "out": "x"}
    wanted = {**VALUES, "loss_by_time/0.0-0.1": 2.0}
    assert logged == [["log", 1, wanted], ["log", 2, wanted]]
    assert not (run / "tensorboard").exists()
    identity = json.loads((run / trackers.TRACKER_FILE).read_text())
    assert identity["track"] == name
    write(run, name, first_step=2)
    again = notes()[5:]
    assert [entry[0] for entry in again] == ["init", "log", "log", "finish"]
    key = {"wandb": "id", "trackio": "name", "mlflow": "run_id"}[name]
    assert again[0][1][key] == identity["id"]
    assert again[0][1][key] == how[key] or name == "mlflow"
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]


def test_without_a_name_there_is_tensorboard_and_no_other_file(tmp_path):
    for track in (None, "tensorboard"):
        run = tmp_path / str(track)
        write(run, track)
        assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "tensorboard"}
        assert len(list((run / "tensorboard").iterdir())) == 1


def test_a_tracker_that_fails_stops_nothing(fake, tmp_path, monkeypatch, caplog):
    fake("wandb")
    monkeypatch.setenv("FAKE_FAILS", "log")
    with caplog.at_level(logging.WARNING, "latentflow"):
        write(tmp_path / "run", "wandb")
    (said,) = caplog.messages
    assert said == "wandb did not take the numbers of step 1 (no network); metrics.jsonl has all numbers"
    assert len(read_metrics(tmp_path / "run")) == 2


def test_a_tracker_that_does_not_open_is_one_line(fake, tmp_path, monkeypatch):
    fake("wandb")
    monkeypatch.setenv("FAKE_FAILS", "init")
    with pytest.raises(ConfigError, match=r"training.track = wandb: no API key; log in with `wandb login`") as refused:
        write(tmp_path / "run", "wandb")
    assert "\n" not in str(refused.value)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(recipe, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    asked = recipe(training={**tiny.RECIPE["training"], "track": "mlflow"})
    with pytest.raises(
        ConfigError, match=r"training.track = mlflow needs .*, which is not installed: pip install mlflow"
    ):
        train(asked)
    assert not Path(asked.out).exists()


def test_a_run_is_tracked(recipe, fake):
    notes = fake("wandb")
    train(recipe(training={**tiny.RECIPE["training"], "steps": 2, "track": "wandb"}))
    assert [entry[0] for entry in notes()] == ["init", "config", "log", "log", "finish"]
    assert notes()[1][1]["training.track"] == "wandb"
