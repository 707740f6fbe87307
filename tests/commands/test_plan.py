"""`latentflow plan`: tables, JSON, and one line for what cannot be planned."""

from __future__ import annotations

import json

import pytest

from latentflow.commands import plan as plan_module
from latentflow.planning.probe import Speed
from latentflow.training.config import Recipe
from latentflow.training.settings import to_yaml
from tests import tiny
from tests.processes import run_here

LARGE = "imnet_f8_ditb2"


@pytest.fixture
def unprobed(monkeypatch) -> None:
    """Take a speed from the air, where it is not what the test is about."""
    speed = Speed(0.5, 0.1, 10**9, 6e9, "nothing", True)
    monkeypatch.setattr(plan_module, "probe", lambda config, runtime, **given: speed)


@pytest.fixture
def recipe(cache, kl_folder, tmp_path):
    """The tiny recipe on a latent cache, with some values changed."""

    def made(**given) -> Recipe:
        data = {"path": cache, **given.pop("data", {})}
        return tiny.recipe(data=data, autoencoder=kl_folder, out=tmp_path / "run", **given)

    return made


def test_the_command_prints_tables_and_records(recipe, tmp_path, capsys, monkeypatch):
    file = tmp_path / "fruit.yaml"
    file.write_text(to_yaml(recipe()), encoding="utf-8")
    shown = run_here(("plan", file, "training.steps=100", "--device", "cpu"), capsys, monkeypatch)
    assert shown.code == 0
    for words in ("parameters", "memory of a process", "kept for backward, checkpoint", "a checkpoint", "exact"):
        assert words in shown.out
    printed = run_here(("plan", file, "training.steps=100", "--device", "cpu", "--json"), capsys, monkeypatch)
    record = json.loads(printed.out)
    assert record["steps"] == 100
    assert record["memory"]["fits"] is True
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nothing",), "no recipe 'nothing'"),
        ((LARGE, "training.batch=3"), "unknown key"),
        (("own_images", "autoencoder=somebody/else"), "--latents 4x32x32"),
        ((LARGE, "data.image_size=252"), "not a multiple of 8"),
        ((LARGE, "network.patch_size=7"), "do not fit"),
        ((LARGE, "--processes", "3"), "cannot be shared by 3 processes"),
        ((LARGE, "--processes", "0"), "--processes"),
        ((LARGE, "--device-memory", "0"), "--device-memory"),
        ((LARGE, "--device-memory", "much"), "--device-memory"),
        ((LARGE, "--latents", "4x32"), "--latents"),
        ((LARGE, "--latents", "4x30x30"), "does not divide"),
        ((LARGE, "--latents", "4x32x16"), "square"),
        ((LARGE, "--images", "0"), "--images"),
        ((LARGE, "training.precision=fp16", "--device", "cpu"), "fp16"),
        (("semantic_kl", "data.path=synthetic:8", "autoencoder=shapes", "data.image_size=30"), "not a multiple"),
    ],
)
@pytest.mark.usefixtures("unprobed")
def test_what_cannot_be_planned_is_one_line(args, words, capsys, monkeypatch):
    done = run_here(("plan", *args), capsys, monkeypatch)
    assert done.code == 2
    assert words in done.error
