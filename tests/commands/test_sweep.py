"""`latentflow sweep`: the command on tiny models, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from latentflow import locks
from latentflow.api import LatentFlow
from latentflow.artifacts import read_json
from latentflow.commands.fit_solver import fit_solver
from latentflow.commands.sweep import sweep
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, DataError
from latentflow.evaluation.drawn_set import ImageSet
from latentflow.evaluation.request import SweepRequest
from latentflow.evaluation.sweep import _ceiling
from latentflow.evaluation.sweep_rules import Ceiling
from latentflow.metrics.class_judge import ClassJudge
from latentflow.metrics.features.extractors import RandomFeatures
from latentflow.metrics.scores import frechet_distance
from latentflow.metrics.statistics import FeatureStatistics
from latentflow.metrics.stored_statistics import Provenance, Reference
from latentflow.model.config import SamplingPreset
from latentflow.model.flow_model import read_config
from latentflow.pages.sweep import verdict
from latentflow.sampling.request import FitSolverRequest
from latentflow.sizes import Size
from tests import tiny
from tests.processes import Result, run_here


@pytest.fixture(scope="module")
def models(tmp_path_factory, deterministic) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tiny.model(deterministic).save_pretrained(folder / "classes")
    tiny.model(deterministic, class_names=()).save_pretrained(folder / "nothing")
    return {name: folder / name for name in ("classes", "nothing")}


@pytest.fixture(scope="module")
def small(models, images, tmp_path_factory) -> Callable[..., object]:
    """A sweep of two candidates with a few images."""

    def run(model: str = "classes", data: object = images, **given: object):
        out = given.pop("out", None) or tmp_path_factory.mktemp("sweeps") / "out"
        options = {"num": 8, "solvers": ["euler"], "steps": [1, 2], "guidance": [1.0], **given}
        return sweep(SweepRequest(model=models.get(model, model), data=data, out=out, **options), tiny.CPU)

    return run


@pytest.fixture
def command(capsys, monkeypatch, models, images, tmp_path) -> Callable[..., Result]:
    """Run `latentflow sweep` on a model with a few images of few candidates, by default."""

    def run(model: str = "classes", *args: object) -> Result:
        given = {"--data": images, "--num": 8, "--solvers": "euler", "--steps": "1,2", "--guidance": "1"}
        given |= {"--out": tmp_path / "out", "--device": "cpu"}
        own = {name: value for name, value in given.items() if name not in args}
        return run_here(
            ["sweep", models.get(model, model), *(x for pair in own.items() for x in pair), *args], capsys, monkeypatch
        )

    return run


def test_distances_are_those_of_the_images(small, models, images):
    result = small(num=12)
    extractor, source = RandomFeatures(), open_images(images, tiny.IMAGE_SIZE)
    real = torch.stack([torch.from_numpy(source[i].pixels.copy()).permute(2, 0, 1) for i in range(len(source))])
    flow = LatentFlow.from_pretrained(models["classes"], runtime=tiny.CPU)
    drawn = flow.sample(num=12, solver="euler", steps=2, guidance=1.0)
    exact = frechet_distance(FeatureStatistics.of(extractor(drawn.pixels)), FeatureStatistics.of(extractor(real)))
    assert result.final.measured["euler-2"].distance == pytest.approx(exact, rel=1e-4)
    assert result.final.measured["euler-2"].evaluations == [2] * 12


def test_a_sweep_writes_json_picture_and_a_page_without_links(command, tmp_path):
    result = command("classes", "--guidance", "1,2", "--intervals", "0:1,0.1:0.6")
    assert result.code == 0, result.err
    assert "biased upward at this sample size" in result.err
    out = tmp_path / "out"
    found = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert SweepRequest(**found["request"]).guidance == [1.0, 2.0]
    assert [c["name"] for c in found["candidates"][:1]] == ["euler-1"]
    assert {c["name"] for c in found["candidates"]} == {
        *("euler-1", "euler-2", "euler-1_g2", "euler-2_g2", "euler-1_g2_i0.1-0.6", "euler-2_g2_i0.1-0.6")
    }
    costs = {c["name"]: c["evaluations"] for c in found["candidates"]}
    assert (costs["euler-2"], costs["euler-2_g2"], costs["euler-2_g2_i0.1-0.6"]) == (2, 4, 3)
    assert list(costs.values()) == sorted(costs.values())
    page = (out / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|src=", page)
    assert all(name in page for name in costs)
    picture = (out / "sweep.svg").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"]*", picture) == ["http://www.w3.org/2000/svg"]
    assert "Pareto front" in picture


def test_repeating_draws_nothing_and_ends_the_same(small, monkeypatch, tmp_path):
    first = small(out=tmp_path / "out")
    monkeypatch.setattr(ImageSet, "draw", lambda *args, **given: pytest.fail("drawn again"))
    monkeypatch.setattr(RandomFeatures, "__call__", lambda *args: pytest.fail("computed again"))
    again = small(out=tmp_path / "out")
    assert again.final == first.final
    assert (again.best, again.marks, again.new) == (first.best, first.marks, first.new)


def test_halving_under_a_budget(small, tmp_path):
    """Eight candidates of 32 images, then four of 64."""
    result = small(num=64, steps=[1, 2, 3, 4, 5, 6, 7, 8], budget=1e6, out=tmp_path / "out")
    assert [one.num for one in result.rounds] == [32, 64]
    assert [len(one.measured) for one in result.rounds] == [8, 4]
    assert result.final is result.rounds[1]
    assert result.best is None  # 64 images
    page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert "32 images each, 8 presets" in page


def test_a_spent_budget_is_an_error_and_nothing_is_written_to_the_model(command, models, tmp_path):
    before = read_config(models["nothing"])
    result = command("nothing", "--budget", "1e-9")
    assert result.code == 2
    assert "was spent before a candidate was measured" in result.err
    assert read_config(models["nothing"]) == before


def test_other_settings_do_not_mix(command, tmp_path):
    assert command().code == 0
    result = command("classes", "--num", "7")
    assert result.code == 2
    assert "holds a sweep with other settings (sizes: [8], now [7])" in result.err
    result = command("classes", "--num", "8", "--seed", "3", "--batch-size", "2", "--steps", "1,2,3")
    assert "batch_size: 32, now 2" in result.err
    assert "more); choose another --out" in result.err
    assert command("nothing").code == 2


def test_an_undecided_sweep_writes_nothing_and_reports_it_everywhere(command, deterministic, tmp_path):
    folder = tmp_path / "model"
    tiny.model(deterministic).save_pretrained(folder)
    before = tiny.tree(folder)
    for args, said in ((("--write",), True), ((), False)):
        result = command(folder, *args)
        assert result.code == 0, result.err
        out = " ".join(result.out.split())
        assert "best preset undecided" in out
        assert "BEST" not in out
        assert ("Nothing was written" in out) is said
        found = json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))
        assert (found["decided"], found["best"], found["new_preset"], found["written"]) == (False, None, None, False)
        assert ("Nothing was written: the model keeps its preset." in found["verdict"]) is said
        page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
        assert ("Nothing was written" in page) is said
        assert "No best preset yet" in page
        assert "--write" not in page
    assert tiny.tree(folder) == before


def test_what_is_advised_decides(command, models, tmp_path):
    """Eight images decide nothing; the number that is advised, in the same folder, does."""
    out = command("classes", "--budget", "1000").out
    advised = re.search(r"repeat the command with (--num \d+) (--budget \d+) to go on", " ".join(out.split()))
    assert advised, out
    before = [file.read_bytes() for file in sorted((tmp_path / "out" / "candidates").glob("*.safetensors"))]
    result = command("classes", *advised[1].split(), *advised[2].split())
    assert result.code == 0, result.err
    assert "is the cheapest preset that is as good as any other" in " ".join(result.out.split())
    found = json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))
    assert found["decided"]
    assert found["best"] in {candidate["name"] for candidate in found["candidates"]}
    assert found["num"] > 8
    assert len(before) == 2
    page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert "repeat the command with --write" in page


def test_write_changes_the_preset_and_nothing_else(command, deterministic, tmp_path):
    folder = tmp_path / "model"
    tiny.model(deterministic, solver="rk4", steps=7, rtol=0.25, guided_channels=2).save_pretrained(folder)
    others, before = tiny.tree(folder), read_json(folder / "config.json")
    result = command(folder, "--write", "--steps", "3", "--guidance", "2", "--intervals", "0.1:0.5")
    assert result.code == 0, result.err
    assert "rk4, 7 steps, guidance 1" in result.out
    assert "euler, 3 steps, guidance 2, between 0.1 and 0.5" in result.out
    after = read_json(folder / "config.json")
    assert {**after, "sampling": None} == {**before, "sampling": None}
    assert read_config(folder).sampling == SamplingPreset(
        solver="euler", steps=3, guidance=2.0, guidance_interval=(0.1, 0.5), rtol=0.25, guided_channels=2
    )
    changed = {name for name, digest in tiny.tree(folder).items() if others[name] != digest}
    assert changed == {"config.json", "README.md"}
    assert "| sampling preset | euler, 3 steps, guidance 2, between 0.1 and 0.5 |" in (folder / "README.md").read_text(
        encoding="utf-8"
    )
    # the preset is no part of the plan: the same command goes on
    assert command(folder, "--write", "--steps", "3", "--guidance", "2", "--intervals", "0.1:0.5").code == 0


def test_write_to_a_hub_id_is_refused_before_anything(command, tmp_path):
    result = command("someone/streets", "--write")
    assert result.code == 2
    assert "someone/streets is not a folder here" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        ("classes", ["--solvers", "huen"], "did you mean 'heun'"),
        ("nothing", ["--guidance", "1,2"], "the model is unconditional"),
        ("classes", ["--budget", "0"], "--budget 0 s: give more than 0"),
        ("classes", ["--steps", ""], "no candidates"),
        ("classes", ["--steps", "four"], "--steps 'four' is not a list of numbers"),
        ("classes", ["--intervals", "0.5"], "--intervals '0.5' is not a list of intervals like 0:1,0.1:0.8"),
        ("classes", ["--guidance", "2", "--intervals", "0.8:0.1"], "--intervals (0.8, 0.1): give two times"),
        ("classes", ["--features", "rnadom"], "did you mean 'random'"),
        ("classes", ["--num", "1"], "--num 1: give a whole number from 2 to 1,000,000"),
        ("classes", ["--margin", "1"], "margin 1"),
        ("classes", ["--data", "nowhere"], "nowhere"),
        ("nowhere", [], "nowhere"),
    ],
)
def test_bad_input_costs_one_line_and_leaves_nothing(command, tmp_path, model, args, message):
    result = command(model, *args)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_reference_of_another_size_or_kind_is_refused(small, cache, tmp_path):
    extractor = RandomFeatures()
    made = Provenance(
        data="some",
        fingerprint="",
        image_size=32,
        resize="",
        feature_name="random",
        feature_hash=extractor.hash,
    )
    statistics = FeatureStatistics.of(torch.randn(8, extractor.dim, generator=torch.Generator().manual_seed(0)))
    file = tmp_path / "reference.safetensors"
    Reference(statistics, made).save(file)
    with pytest.raises(DataError, match="of images of 32 pixels, and the images to score have 16"):
        small(data=file)
    Reference(statistics, made.model_copy(update={"image_size": Size(16, 16), "feature_hash": "other"})).save(file)
    with pytest.raises(DataError, match="scores would be meaningless"):
        small(data=file)
    Reference(statistics, made.model_copy(update={"image_size": Size(16, 16)})).save(file)
    assert small(data=file, steps=[1]).best == "euler-1"
    with pytest.raises(DataError, match="is a latent cache"):
        small(data=cache)


def test_a_folder_with_something_else_is_not_touched(small, tmp_path):
    (tmp_path / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"is not empty \(letter\.txt, .*does not hold a sweep"):
        small(out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_a_single_preset_is_not_said_to_be_compared(small):
    found = verdict(small(steps=[1]))
    assert found[0] == "euler-1 is the only preset that was measured; there is nothing to compare it with."


def test_guides_are_compared_and_written(tmp_path, deterministic, images):
    """The weights of a guide are in the plan; a preset that is written names it, and draws with it."""
    run = tmp_path / "run"
    tiny.model(deterministic, class_names=()).save_pretrained(run / "model")
    early = tiny.model(deterministic, class_names=(), seed=4)
    early.save_pretrained(run / "checkpoints" / "step-00000004" / "model")
    given = {"solvers": ["euler"], "steps": [2], "guidance": [2.0], "num": 100, "margin": 0.9}
    request = SweepRequest(model=run, data=images, out=tmp_path / "out", guides=["@4"], write=True, **given)
    result = sweep(request, tiny.CPU)
    guide = {"model": "@4", "weights": early.weights_hash[:12]}
    assert result.presets == {
        "euler-2_g2_by-4": {
            "solver": "euler",
            "guidance": 2.0,
            "guidance_interval": (0.0, 1.0),
            "steps": 2,
            "shift": 1.0,
            "guide": guide,
        }
    }
    assert read_config(run / "model").sampling.guide.model_dump() == guide
    drawn = LatentFlow.from_pretrained(run, device="cpu").sample(num=1)
    assert drawn.drawing.sampling.guide.model_dump() == guide
    assert "--guide @4" in (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert sweep(request, tiny.CPU).seconds_per_image == result.seconds_per_image
    with pytest.raises(ArtifactError, match="no snapshot of step 5"):
        sweep(request.model_copy(update={"guides": ["@5"], "out": tmp_path / "other"}), tiny.CPU)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("named", ["run", "run/model"])
def test_a_model_in_training_is_swept_but_not_written(tmp_path, deterministic, images, monkeypatch, named):
    """Its training would write its own preset over the new one; the sweep says so before it measures."""
    monkeypatch.setattr(locks, "_WAIT_SECONDS", 0.0)
    tiny.model(deterministic).save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "checkpoints").mkdir()
    given = {"data": images, "solvers": ["euler"], "steps": [2], "guidance": [1.0], "num": 100}
    asked = SweepRequest(model=tmp_path / named, out=tmp_path / "out", **given)
    with locks.only_writer(tmp_path / "run"):
        with pytest.raises(ArtifactError, match="is being written by process"):
            sweep(asked.model_copy(update={"write": True}), tiny.CPU)
        with pytest.raises(ArtifactError, match="is being written by process"):
            fit_solver(FitSolverRequest(model=str(tmp_path / named)), runtime=tiny.CPU)
        assert not (tmp_path / "out").exists()
        sweep(asked, tiny.CPU)
    with pytest.raises(ArtifactError, match="is the folder of the model; choose another one"):
        sweep(asked.model_copy(update={"write": True, "out": tmp_path / "run"}), tiny.CPU)
    sweep(asked.model_copy(update={"write": True}), tiny.CPU)
    assert read_config(tmp_path / "run" / "model").sampling.steps == 2


def test_a_preset_with_another_guide_draws_what_was_measured(tmp_path, deterministic, images):
    """The conditions that guided by the null condition are not taken from the guide."""
    tiny.model(deterministic, guidance=3.0, guided_by=["label"]).save_pretrained(tmp_path / "model")
    tiny.model(deterministic, seed=4).save_pretrained(tmp_path / "guide")
    how = {"solver": "euler", "steps": 2, "guidance": 2.0}
    before = LatentFlow.from_pretrained(tmp_path / "model", device="cpu")
    measured = before.sample(num=2, guide=tmp_path / "guide", **how)
    given = {"solvers": ["euler"], "steps": [2], "guidance": [2.0], "num": 100, "guides": [str(tmp_path / "guide")]}
    sweep(SweepRequest(model=tmp_path / "model", data=images, out=tmp_path / "out", write=True, **given), tiny.CPU)
    drawn = LatentFlow.from_pretrained(tmp_path / "model", device="cpu").sample(num=2)
    assert drawn.drawing.sampling == measured.drawing.sampling
    assert torch.equal(drawn.pixels, measured.pixels)


@pytest.mark.parametrize(("named", "accuracy"), [([], 0.7), (["age"], 0.85)])
def test_the_ceiling_is_that_of_the_classes_that_are_drawn(deterministic, named, accuracy):
    """Two classes in turn, of three; with named columns, those of real images, most of which were of the easy one."""
    flow = tiny.model(deterministic)
    counts = flow.config.training.model_copy(update={"images_per_class": [9, 0, 1]})
    flow.config = flow.config.model_copy(update={"training": counts})
    none = torch.zeros(0)
    judge = ClassJudge(none, none, none, none, none, torch.tensor([0.9, 0.1, 0.5]), 0.85, 0.9, 100)
    assert _ceiling(SimpleNamespace(flow=flow, plan=SimpleNamespace(named=named)), judge) == Ceiling(
        pytest.approx(accuracy), 100
    )
