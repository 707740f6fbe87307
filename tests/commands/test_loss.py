"""`latentflow loss`: one row per set of conditions, as a table or as JSON, and one line for what cannot be measured."""

from __future__ import annotations

import json

import pytest

from tests import tiny
from tests.processes import run_here


@pytest.fixture(scope="module")
def folder(kl, tmp_path_factory):
    """A model with labels, inpainting and semantic maps."""
    folder = tmp_path_factory.mktemp("models") / "all"
    tiny.model(kl, conditioning=tiny.SPATIAL).save_pretrained(folder)
    return folder


def test_a_row_per_set_of_conditions(folder, segmented, capsys, monkeypatch):
    command = ("loss", folder, "--data", segmented, "--num", 6, "--batch-size", 4, "--device", "cpu")
    shown = run_here(command, capsys, monkeypatch)
    assert shown.code == 0, shown.err
    rows = json.loads(run_here((*command, "--json"), capsys, monkeypatch).out)
    assert list(rows) == ["nothing", "label", "inpainting", "semantic_map", "label + inpainting + semantic_map"]
    for name, row in rows.items():
        assert f"{row['loss']:.4f} +- {row['standard_error']:.4f}" in shown.out
        assert row["told"] == ([] if name == "nothing" else name.split(" + "))
        assert len(row["by_time"]) == 10


def test_any_whole_number_is_a_seed(folder, segmented, capsys, monkeypatch):
    command = ("loss", folder, "--data", segmented, "--num", 6, "--device", "cpu", "--json", "--seed")
    first, again, other = (run_here((*command, seed), capsys, monkeypatch) for seed in (-1, -1, 1))
    assert (first.code, first.out) == (0, again.out), first.err
    assert first.out != other.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--num", 0), "--num 0: give a whole number from 1"),
        (("--seed", 1.5), "--seed"),
        (("--data", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_one_line(folder, segmented, capsys, monkeypatch, options, said):
    done = run_here(("loss", folder, "--data", segmented, "--device", "cpu", *options), capsys, monkeypatch)
    assert done.code == 2
    assert said in done.error
