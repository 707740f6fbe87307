"""`latentflow plan`: tables, JSON, and one line for what cannot be planned."""

from __future__ import annotations

import json

import pytest

from latentflow.training.settings import to_yaml
from tests import tiny
from tests.processes import run_here


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
        ((tiny.LARGE_RECIPE, "training.batch=3"), "unknown key"),
        (("own_images", "autoencoder=somebody/else"), "--latents 4x32x32"),
        ((tiny.LARGE_RECIPE, "data.image_size=252"), "not a multiple of 8"),
        ((tiny.LARGE_RECIPE, "network.patch_size=7"), "do not fit"),
        ((tiny.LARGE_RECIPE, "--processes", "3"), "cannot be shared by 3 processes"),
        ((tiny.LARGE_RECIPE, "--processes", "0"), "--processes"),
        ((tiny.LARGE_RECIPE, "--device-memory", "0"), "--device-memory"),
        ((tiny.LARGE_RECIPE, "--device-memory", "much"), "--device-memory"),
        ((tiny.LARGE_RECIPE, "--latents", "4x32"), "--latents"),
        ((tiny.LARGE_RECIPE, "--latents", "4x30x30"), "does not divide"),
        ((tiny.LARGE_RECIPE, "--latents", "4x32x16"), "square"),
        ((tiny.LARGE_RECIPE, "--images", "0"), "--images"),
        ((tiny.LARGE_RECIPE, "training.precision=fp16", "--device", "cpu"), "fp16"),
        (("semantic_kl", "data.path=synthetic:8", "autoencoder=shapes", "data.image_size=30"), "not a multiple"),
    ],
)
@pytest.mark.usefixtures("unprobed")
def test_what_cannot_be_planned_is_one_line(args, words, capsys, monkeypatch):
    done = run_here(("plan", *args), capsys, monkeypatch)
    assert done.code == 2
    assert words in done.error
