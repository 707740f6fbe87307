"""Adapters on the command line: every verb that opens a model takes one, and results say which."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from latentflow.api import LatentFlow
from latentflow.cli.options import every_command
from latentflow.commands.sweep import write_preset
from latentflow.model.config import SamplingPreset
from latentflow.sampling.picture_file import read_facts
from tests import tiny
from tests.processes import run_here

OPENS = (
    *("sample", "inpaint", "mask-to-image", "translate", "image-to-image", "interpolate", "vary", "invert"),
    *("loss", "evaluate", "sweep", "diagnose", "bound", "benchmark", "export", "merge", "serve"),
)


@pytest.fixture(scope="module")
def models(kl, tmp_path_factory) -> Path:
    """A base, and a model that was finetuned from it."""
    folder = tmp_path_factory.mktemp("models")
    tiny.model(kl, time_scale=1.0).save_pretrained(folder / "base")
    tiny.finetuned(folder / "base", ("cherry", "apple", "berry")).save_pretrained(folder / "tuned")
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    def called(*arguments: object) -> dict:
        done = run_here([*map(str, arguments), "--json"], capsys, monkeypatch)
        assert done.code == 0, done.err
        return json.loads(done.out)

    return called


def test_every_verb_that_opens_a_model_takes_an_adapter():
    options = {name: {one for p in verb.params for one in p.opts} for name, verb in every_command().items()}
    assert {name for name, own in options.items() if {"--adapter", "--adapter-strength"} <= own} >= {*OPENS}
    assert not any("--adapter" in options[name] for name in ("push", "fit-solver", "info", "encode"))


def test_a_picture_of_an_adapter_is_that_of_the_finetuned_model(run, models, tmp_path):
    how = ("--num", 3, "--solver", "euler", "--steps", 2, "--seed", 4)
    run("sample", models / "base", "--adapter", models / "tuned", *how, "--out", tmp_path / "both")
    run("sample", models / "tuned", *how, "--out", tmp_path / "whole")
    for file in sorted((tmp_path / "whole").glob("*seed*.png")):
        facts = [read_facts(str(tmp_path / folder / file.name)) for folder in ("whole", "both")]
        assert facts[1]["drawn_by"].pop("model") == f"{models / 'base'}+{models / 'tuned'}"
        assert facts[0]["drawn_by"].pop("model") == str(models / "tuned")
        assert facts[0] == facts[1]
    names = {file.name for file in (tmp_path / "both").glob("*.png")}
    assert names == {file.name for file in (tmp_path / "whole").glob("*.png")}


def test_an_evaluation_says_which_adapter_at_which_strength(run, models, images, tmp_path):
    how = ("--data", images, "--features", "random", "--metrics", "fid", "--num", 12, "--steps", 1, "--solver", "euler")
    given = ("--adapter", models / "tuned", "--adapter-strength", 0.5)
    report = run("evaluate", models / "base", *given, *how, "--out", tmp_path / "report.json")
    model = LatentFlow.from_pretrained(models / "base", adapter=models / "tuned", adapter_strength=0.5)
    assert report["protocol"]["model"]["name"] == f"{models / 'base'}+{models / 'tuned'}:0.5"
    assert report["protocol"]["model"]["weights"] == model.weights_hash


def test_reconstructions_of_a_model_with_an_adapter(run, models, images, tmp_path):
    how = (
        "--data",
        images,
        "--features",
        "random",
        "--metrics",
        "fid",
        "--reconstruction",
        "--out",
        tmp_path / "r.json",
    )
    report = run("evaluate", models / "base", "--adapter", models / "tuned", *how)
    assert report["protocol"]["task"] == "reconstruction"


def test_merge_and_export(run, models, tmp_path):
    given = (models / "base", "--adapter", models / "tuned" / "adapter", "--adapter-strength", 0.7)
    merged = run("merge", *given, "--out", tmp_path / "merged")
    assert merged["merged"] == f"{models / 'base'}+{models / 'tuned' / 'adapter'}:0.7"
    assert run("info", tmp_path / "merged")["classes"] == ["cherry", "apple", "berry"]
    both = LatentFlow.from_pretrained(models / "base", adapter=models / "tuned", adapter_strength=0.7)
    assert LatentFlow.from_pretrained(tmp_path / "merged").weights_hash == both.weights_hash
    cost = run("benchmark", *given, "--batch-sizes", 1, "--steps", 1, "--solver", "euler", "--num", 2)
    assert cost["request"]["model"] == merged["merged"]
    assert run("info", models / "tuned" / "adapter")["rank"] == 3
    exported = run("export", *given, "--out", tmp_path / "exported")
    assert exported["largest relative error"] < 1e-4 and (tmp_path / "exported").is_dir()


def test_a_new_preset_is_that_of_the_adapter_as_well(models, tmp_path):
    shutil.copytree(models / "tuned", tmp_path / "tuned")
    write_preset(tmp_path / "tuned", SamplingPreset(solver="ab2", steps=7))
    whole = LatentFlow.from_pretrained(tmp_path / "tuned")
    both = LatentFlow.from_pretrained(models / "base", adapter=tmp_path / "tuned")
    assert both.config == whole.config and both.config.sampling.steps == 7


def test_a_sweep_goes_on_with_the_same_adapter_only(run, models, images, tmp_path, capsys, monkeypatch):
    how = ("--data", images, "--num", 12, "--solvers", "euler", "--steps", "1,2", "--guidance", "1")
    given = ("sweep", models / "base", "--adapter", models / "tuned", *how, "--out", tmp_path / "sweep")
    run(*given)
    run(*given)
    other = run_here([*map(str, given), "--adapter-strength", "0.5"], capsys, monkeypatch)
    assert other.code == 2 and "weights" in other.err
    written = run_here([*map(str, given), "--write"], capsys, monkeypatch)
    assert written.code == 2 and "remove --write" in written.err
