"""The benchmark on photographs: the command line takes its commands, and one that fails stops no other."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import typer

import latentflow.cli  # noqa: F401  which adds the verbs
from latentflow.cli.options import app

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PATHS = ("train", "held-out", "autoencoder", "features")


@pytest.fixture
def photographs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("photographs")
    for name in ("photographs", "worker"):
        sys.modules.pop(name, None)


class Played:
    """Stands in for a worker: notes commands, makes the grids, and fails at one verb."""

    def __init__(self, failed, fails_at=""):
        self.failed, self.fails_at, self.commands = failed, fails_at, []

    def __call__(self, arguments, log, limit):
        verb, *rest = map(str, arguments)
        self.commands.append((verb, rest))
        if verb == self.fails_at:
            raise self.failed(f"{verb}: out of ideas")
        if verb == "sample":
            folder = Path(rest[rest.index("--out") + 1])
            folder.mkdir(parents=True)
            (folder / "grid.png").write_bytes(b"grid")

    def close(self):
        pass


def arguments(tmp_path, *more):
    given = [part for name in PATHS for part in (f"--{name}", name)]
    return [*given, "--steps", "40", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), *more]


def test_every_command_is_one_that_the_command_line_takes(photographs, monkeypatch, tmp_path):
    played = Played(photographs.Failed)
    monkeypatch.setattr(photographs, "Workers", lambda others: played)
    photographs.main(arguments(tmp_path, "--device", "cuda", "--set", "network.depth=2"))
    verbs = [verb for verb, _ in played.commands]
    assert verbs[:2] == ["encode", "encode"]
    assert set(verbs) == {"encode", "train", "evaluate", "sweep", "fit-solver", "diagnose", "sample"}
    group = typer.main.get_command(app)
    for verb, rest in played.commands:
        _, command, _ = group.resolve_command(None, [verb, *rest])
        known = {option for parameter in command.params for option in parameter.opts}
        assert {part for part in rest if part.startswith("--")} <= known, verb
        assert rest[-2:] == ["--device", "cuda"]
    steps = [part for verb, rest in played.commands if verb == "train" for part in rest if "training.steps" in part]
    assert steps == ["training.steps=40", "training.steps=20", "training.steps=10"]
    assert len(list((tmp_path / "out").glob("*.png"))) == 6


def test_a_part_that_fails_is_named_and_the_others_go_on(photographs, monkeypatch, tmp_path, capsys):
    played = Played(photographs.Failed, fails_at="fit-solver")
    monkeypatch.setattr(photographs, "Workers", lambda others: played)
    with pytest.raises(SystemExit, match="failed: solvers; the logs are in"):
        photographs.main(arguments(tmp_path, "--parts", "solvers,copies,grids"))
    assert "failed: fit-solver: out of ideas" in capsys.readouterr().out
    assert [verb for verb, _ in played.commands] == ["fit-solver", "diagnose"] + ["sample"] * 6
    with pytest.raises(SystemExit, match="there is no part 'moon'; there are encode, train_labelled, train_unlabelled"):
        photographs.main(arguments(tmp_path, "--parts", "moon"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_part_waits_for_what_it_needs(photographs, monkeypatch, tmp_path, device):
    """And trainings for each other, while a GPU measures what is trained."""
    begun, ended = [], []

    def part(name, after):
        def do(study):
            begun.append((name, [need for need in after if need not in ended]))
            ended.append(name)

        return photographs.Part(do, after)

    parts = {name: part(name, one.after) for name, one in photographs.PARTS.items()}
    monkeypatch.setattr(photographs, "PARTS", parts)
    photographs.main(arguments(tmp_path, "--device", device))
    assert sorted(begun) == sorted((name, []) for name in parts)
    if device == "cpu":
        assert [name for name, _ in begun] == list(parts)
