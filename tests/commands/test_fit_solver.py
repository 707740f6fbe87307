"""`latentflow fit-solver` on a tiny model, and drawing with what it stores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from latentflow import locks
from latentflow.api import LatentFlow
from latentflow.artifacts import read_json, write_json
from latentflow.commands.fit_solver import fit_solver
from latentflow.errors import ArtifactError, ConfigError
from latentflow.evaluation.sweep_rules import combinations
from latentflow.model.fitted_solvers import SOLVERS_FILE
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.pipeline import draw_all
from latentflow.sampling.request import FitSolverRequest, SampleRequest
from tests import tiny
from tests.processes import run_here

FEW = {"evaluations": [4], "num": 8, "held_out": 8, "reference_steps": 24}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, deterministic) -> Path:
    """A model folder with a solver of 4 evaluations, for guidance 2."""
    folder = tmp_path_factory.mktemp("fitted") / "model"
    tiny.model(deterministic, guidance=2.0, steps=3, time_scale=1.0).save_pretrained(folder)
    (check,) = fit_solver(FitSolverRequest(model=folder, **FEW), batch_size=8, runtime=tiny.CPU)
    assert check.is_kept and check.error < min(check.others.values())
    return folder


@pytest.fixture
def copied(fitted, tmp_path, deterministic) -> Path:
    """A copy of it, to change."""
    LatentFlow.from_pretrained(fitted, device="cpu").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def name_of(folder: Path) -> str:
    """The solver's name with its hash."""
    return LatentFlow.from_pretrained(folder, device="cpu").fitted_solver("fitted-4")[0]


def test_it_ends_nearer_to_a_fine_solution_with_as_many_calls(fitted):
    model = LatentFlow.from_pretrained(fitted, device="cpu")
    fine = model.sample(num=6, seed=50, solver="rk4", steps=50).latents
    by_fit, by_ab2 = (
        model.sample(num=6, seed=50, solver=solver, steps=steps) for solver, steps in (("fitted-4", None), ("ab2", 3))
    )
    assert by_fit.evaluations.tolist() == by_ab2.evaluations.tolist() == [2 * 4] * 6
    assert (by_fit.latents - fine).norm() < (by_ab2.latents - fine).norm()


def test_the_drawing_says_which_solver_it_was(fitted):
    model = LatentFlow.from_pretrained(fitted, device="cpu")
    sampling = make_drawing(model, SampleRequest(num=1, solver="fitted-4")).sampling
    assert (sampling.solver, sampling.steps, sampling.shift) == (name_of(fitted), 4, 1.0)
    whole = {name: value for name, value in sampling.model_dump().items() if value is not None}
    again = make_drawing(model, SampleRequest(num=1, **whole))
    assert again.sampling == sampling
    assert torch.equal(draw_all(model, again).latents, model.sample(num=1, solver="fitted-4").latents)


def test_a_repeated_command_fits_only_what_is_missing(copied):
    before = read_json(copied / SOLVERS_FILE)
    request = FitSolverRequest(model=copied, **{**FEW, "evaluations": [3, 4]})
    added, there = fit_solver(request, batch_size=8, runtime=tiny.CPU)
    assert (added.name, there.name, there.rounds) == ("fitted-3", "fitted-4", 0)
    after = read_json(copied / SOLVERS_FILE)
    assert after["weights"] == before["weights"]
    assert after["solvers"]["fitted-4"] == before["solvers"]["fitted-4"]
    assert set(after["solvers"]) == {"fitted-3", "fitted-4"} if added.is_kept else {"fitted-4"}


def test_two_at_once_would_lose_what_one_of_them_found(copied, monkeypatch):
    """Each writes all solvers that it knows."""
    monkeypatch.setattr(locks, "_WAIT_SECONDS", 0.0)
    with locks.only_writer(copied), pytest.raises(ArtifactError, match="is being written by process"):
        fit_solver(FitSolverRequest(model=copied, **FEW), runtime=tiny.CPU)


def test_what_is_no_better_is_not_stored(fitted, tmp_path, deterministic, monkeypatch):
    tiny.model(deterministic).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("latentflow.sampling.fit_solvers._errors_of_others", lambda *given: {"ab2": 0.0})
    (check,) = fit_solver(FitSolverRequest(model=tmp_path / "model", **FEW), batch_size=8, runtime=tiny.CPU)
    assert not check.is_kept and check.best_other == "ab2"
    assert not (tmp_path / "model" / SOLVERS_FILE).exists()


def test_other_weights_make_it_stale(copied):
    stored = read_json(copied / SOLVERS_FILE)
    write_json(copied / SOLVERS_FILE, {**stored, "weights": "0" * 64})
    model = LatentFlow.from_pretrained(copied, device="cpu")
    with pytest.raises(
        ConfigError, match="fitted-4 was fitted to other weights than the model has; run `latentflow fit"
    ):
        model.sample(num=1, solver="fitted-4")


def test_weights_that_replace_the_networks_take_no_solver_along(fitted, tmp_path):
    model = LatentFlow.from_pretrained(fitted, device="cpu")
    model.save_pretrained(tmp_path / "model", weights=model.network.state_dict())
    assert not (tmp_path / "model" / SOLVERS_FILE).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "fitted-9"}, "has no solver fitted-9; it has fitted-4; for this one run `latentflow fit-solver"),
        ({"solver": "fitted-4@01234567"}, "the model's fitted-4 is now "),
        ({"solver": "fitted-4", "steps": 8}, "steps 8 has no effect with fitted-4"),
        ({"solver": "fitted-4", "rtol": 1e-3}, "rtol 0.001 has no effect"),
        ({"solver": "fitted-4", "shift": 2.0}, "shift 2.0 has no effect"),
        ({"solver": "fitted-x"}, "unknown solver 'fitted-x'"),
    ],
)
def test_refuses_what_it_cannot_draw(fitted, options, message):
    model = LatentFlow.from_pretrained(fitted, device="cpu")
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        model.sample(num=1, **options)


def test_only_from_noise_to_data(fitted, images):
    model = LatentFlow.from_pretrained(fitted, device="cpu")
    picture = next(Path(images).rglob("*.png"))
    with pytest.raises(ConfigError, match=r"solver fitted-4@.*image-to-image starts at t = 0.5; use heun or ab2"):
        model.image_to_image(picture, strength=0.5, solver="fitted-4")
    with pytest.raises(ConfigError, match=r"solver fitted-4@.*invert goes from data to noise"):
        model.invert(picture, solver="fitted-4")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evaluations": [6, 30], "reference_steps": 24}, "30 evaluations are more than the 24 steps of the reference"),
        ({"evaluations": [1]}, "evaluations"),
        ({"evaluations": []}, "at least one number"),
        ({"guidance": -1.0}, "guidance"),
    ],
)
def test_refuses_requests(values, message):
    with pytest.raises(ConfigError, match=message):
        FitSolverRequest(model="model", **values)


def test_refuses_models_that_are_not_here():
    with pytest.raises(ArtifactError, match="not a folder here; solvers are stored in a model folder"):
        fit_solver(FitSolverRequest(model="somebody/model"))


def test_a_damaged_file_is_refused(copied):
    stored = read_json(copied / SOLVERS_FILE)
    stored["solvers"]["fitted-4"]["times"][1] = 2.0
    write_json(copied / SOLVERS_FILE, stored)
    with pytest.raises(ArtifactError, match=r"does not hold fitted solvers .*times must fall from 1 to 0"):
        LatentFlow.from_pretrained(copied, device="cpu")


def test_a_sweep_takes_its_times_as_given():
    candidates = combinations(
        solvers=["ab2", "fitted-4"],
        steps=[4, 8],
        tolerances=[],
        guidances=[1.0],
        intervals=[(0.0, 1.0)],
        shifts=[1.0, 2.0],
    )
    assert [name for name in candidates if name.startswith("fitted")] == ["fitted-4"]
    assert candidates["fitted-4"]["steps"] == 4


def test_command(copied, capsys, monkeypatch, tmp_path):
    given = ["--num", 8, "--held-out", 8, "--reference-steps", 24, "--device", "cpu", "--json"]
    result = run_here(["fit-solver", copied, "--evaluations", "4", *given], capsys, monkeypatch)
    assert result.code == 0, result.err
    assert json.loads(result.out)["fitted-4"]["rounds"] == 0
    too_many = run_here(["fit-solver", copied, "--evaluations", "40", *given], capsys, monkeypatch)
    assert too_many.code == 2
    assert "40 evaluations are more than the 24 steps" in too_many.err
    drawn = ["sample", copied, "--num", 1, "--solver", "fitted-4", "--device", "cpu", "--out", tmp_path / "out"]
    assert run_here(drawn, capsys, monkeypatch).code == 0
