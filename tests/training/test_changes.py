"""Going on with a run whose recipe was changed, by the command line: every flag that a message names works."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from latentflow.training.log import read_metrics
from latentflow.training.settings import to_yaml
from tests import tiny
from tests.processes import Result, run_here


@pytest.fixture
def train(tmp_path, cache, kl_folder, capsys, monkeypatch):
    """`latentflow train` of the tiny recipe into `tmp_path`/run."""
    file = tmp_path / "fruit.yaml"
    recipe = tiny.recipe(data={"path": cache}, autoencoder=kl_folder, out=tmp_path / "run", training={"steps": 2})
    file.write_text(to_yaml(recipe), encoding="utf-8")
    return lambda *args: run_here(("train", file, "--device", "cpu", *args), capsys, monkeypatch)


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


def flags_of(result: Result) -> list[str]:
    """The options that the last line of a refusal names."""
    return shlex.split(" ".join(re.findall(r"--allow-change [\w.]+", result.err.splitlines()[-1])))


def history(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "changes.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        ["optimizer.learning_rate=1e-4"],
        ["optimizer.clip_norm=null", "optimizer.betas=0.9,0.99"],
        ["optimizer.schedule=cosine", "optimizer.warmup_steps=3"],
        ["training.batch_size=6"],
        ["training.precision=bf16", "training.ema_decay=0.5"],
        ["training.seed=5", "data.flip=true"],
        ["times.distribution=logit_normal"],
    ],
)
def test_the_flags_that_the_refusal_names_work(train, run, changes):
    assert train().code == 0
    before = tiny.tree(run)
    keys = [change.partition("=")[0] for change in changes]
    refusal = train("training.steps=4", *changes)
    assert refusal.code == 2
    assert tiny.tree(run) == before
    flags = flags_of(refusal)
    assert sorted(flags[1::2]) == sorted(keys)
    assert train("training.steps=4", *changes, *flags).code == 0
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]
    assert {entry["key"] for entry in history(run)} == {*keys, "training.steps"}
    assert all(entry["step"] == 2 for entry in history(run))
    assert train("training.steps=4", *changes).code == 0  # the run's recipe is the new one now
    assert len(history(run)) == len(keys) + 1


def test_old_and_new_values_are_kept(train, run):
    train()
    change = ("optimizer.clip_norm=null", "training.steps=3")
    result = train(*change, "--allow-change", "optimizer")  # a whole section, too
    assert (
        "from step 3 on with another recipe: optimizer.clip_norm: 1.0, now null; training.steps: 2, now 3" in result.err
    )
    assert history(run)[0] == {"step": 2, "key": "optimizer.clip_norm", "old": 1.0, "new": None}
    assert yaml.safe_load((run / "recipe.yaml").read_text())["optimizer"]["clip_norm"] is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("network.depth=3", "weights would not fit"),
        ("path.kind=cosine", "velocities"),
        ("conditioning.label_dropout=0.5", "trained with the old conditions"),
        ("normalise=per_channel", "scale"),
        ("data.labels=false", "other images"),
        ("data.masks.policy=boxes", "other images"),
    ],
)
def test_what_can_never_change_says_why(train, run, change, reason):
    train()
    before = tiny.tree(run)
    result = train(change, "--allow-change", change.partition("=")[0])
    assert result.code == 2
    assert change.partition("=")[0] in result.error
    assert reason in result.error
    assert tiny.tree(run) == before


def test_a_key_that_is_none(train, run):
    result = train("--allow-change", "optimizer.learning_rat")
    assert result.code == 2
    assert "did you mean 'optimizer.learning_rate'" in result.error
    assert not run.exists()


def test_a_run_without_a_checkpoint_starts_over(train, run):
    """It stopped before anything was saved, so there is nothing to keep."""
    stopped = train("optimizer.learning_rate=1e9", "optimizer.clip_norm=null", "training.steps=50")
    assert stopped.code == 1
    assert train("network.depth=1").code == 0
    assert not (run / "changes.jsonl").exists()


def test_the_advice_of_a_number_that_is_not_finite_works(train, run):
    train()
    wild = ["optimizer.learning_rate=1e9", "optimizer.clip_norm=null", "training.steps=40"]
    stopped = train(*wild, "--allow-change", "optimizer")
    assert stopped.code == 1, stopped.err
    for _ in range(14):  # each time a tenth of the rate
        advice = re.search(r"repeat the command with (.*) instead of the old values", stopped.err)[1]
        assert "--allow-change optimizer.learning_rate" in advice
        parts = shlex.split(advice)
        given = dict(part.split("=") for part in [*wild, *parts] if "=" in part)
        wild = [f"{key}={value}" for key, value in given.items()]
        stopped = train(*wild, *(part for part in parts if "=" not in part))
        if stopped.code == 0:
            break
    assert stopped.code == 0, stopped.err
    assert read_metrics(run)[-1]["step"] == 40


def test_an_old_run_goes_on_decaying_everything(train, run):
    """It knew no `weight_decay_on`; a recipe that leaves it open means what it meant when the run began."""
    file = run.parent / "fruit.yaml"
    file.write_text(yaml.dump({**yaml.safe_load(file.read_text()), "optimizer": {"weight_decay": 0.1}}))
    train("optimizer.weight_decay_on=all")
    old = (run / "recipe.yaml").read_text().replace("  weight_decay_on: all\n", "")
    assert "weight_decay_on" not in old
    (run / "recipe.yaml").write_text(old)
    assert train("training.steps=3").code == 0
    assert yaml.safe_load((run / "recipe.yaml").read_text())["optimizer"]["weight_decay_on"] == "all"
    change = "optimizer.weight_decay_on=matrices"
    refusal = train("training.steps=4", change)
    assert 'optimizer.weight_decay_on: "all", now "matrices"' in refusal.error
    assert train("training.steps=4", change, *flags_of(refusal)).code == 0  # the state is by parameter
    assert train("training.steps=5").code == 0
    assert yaml.safe_load((run / "recipe.yaml").read_text())["optimizer"]["weight_decay_on"] == "matrices"


def test_a_longer_cosine_tells_the_rates(train, run):
    cosine = ("optimizer.schedule=cosine", "optimizer.final_learning_rate=0")
    train(*cosine, "training.steps=4")
    said = train(*cosine, "training.steps=8").err
    assert "resuming at another learning rate: 0.000146 at step 4, 0.0005 at step 5" in said
    assert read_metrics(run)[3]["learning_rate"] == pytest.approx(0.000146, rel=1e-2)
    assert read_metrics(run)[4]["learning_rate"] == pytest.approx(0.0005)


def test_a_constant_rate_says_nothing_of_itself(train):
    train()
    assert "learning rate" not in train("training.steps=4").err
