"""Commands that draw or measure under the named conditions of images, with models that cannot do without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentflow.commands.bound import bound
from latentflow.commands.diagnose import diagnose
from latentflow.commands.fit_solver import fit_solver
from latentflow.commands.sweep import sweep
from latentflow.data.sources.images import open_images
from latentflow.errors import ConfigError, DataError
from latentflow.evaluation import drawn_set, model_diagnosis
from latentflow.evaluation.encoded_images import ReferenceLatents, open_images_for
from latentflow.evaluation.measured_bound import data_velocity
from latentflow.evaluation.request import BoundRequest, DiagnoseRequest, SweepRequest
from latentflow.metrics.features.extractors import RandomFeatures
from latentflow.metrics.statistics import FeatureStatistics
from latentflow.metrics.stored_statistics import Provenance, Reference
from latentflow.model.conditioning import ColumnCondition
from latentflow.model.flow_model import read_config
from latentflow.sampling import fit_solvers
from latentflow.sampling.request import FitSolverRequest
from latentflow.sampling.row_conditions import RowConditions, row_conditions
from latentflow.shapes import Condition
from latentflow.sizes import Size
from tests import tiny

SIZE = ColumnCondition(name="size", kind="number", mean=30, deviation=3, dropout=0.0)
SHAPES = "synthetic:24:0:size,traits"
NAMES = open_images(SHAPES, 8).columns[1].class_names
TRAITS = ColumnCondition(name="traits", kind="labels", class_names=["tall", *NAMES])


@pytest.fixture(scope="module")
def models(tmp_path_factory, deterministic) -> dict[str, Path]:
    """One that requires the size and knows traits, and one that can do without either; both without classes."""
    folder = tmp_path_factory.mktemp("models")
    free = SIZE.model_copy(update={"dropout": 0.1})
    for name, columns in (("needs", [SIZE, TRAITS]), ("free", [free, TRAITS])):
        tiny.model(deterministic, class_names=(), conditioning={"columns": columns}).save_pretrained(folder / name)
    return {name: folder / name for name in ("needs", "free")}


def conditions_of_shapes(model: Path) -> RowConditions:
    conditioning = read_config(model).conditioning
    return row_conditions(conditioning, open_images(SHAPES, tiny.IMAGE_SIZE), range(24), None, seed=0)


def recorded(monkeypatch, module) -> list[torch.Tensor]:
    """The columns that each batch of a module is drawn under."""
    seen: list[torch.Tensor] = []
    for name in ("draw", "draw_all"):
        if hasattr(module, name):
            own = getattr(module, name)

            def record(model, drawing, given, own=own, **options):
                seen.append((drawing.told, given.columns))
                return own(model, drawing, given, **options)

            monkeypatch.setattr(module, name, record)
    return seen


def test_sweep_draws_every_candidate_under_the_conditions_of_the_data(models, monkeypatch, tmp_path):
    seen = recorded(monkeypatch, drawn_set)
    asked = {"data": SHAPES, "solvers": ["euler"], "steps": [1, 2], "guidance": [1.0], "batch_size": 32}
    result = sweep(SweepRequest(model=models["needs"], out=tmp_path / "out", num=8, **asked), tiny.CPU)
    assert [told for told, _ in seen] == [["size", "traits"]] * 3  # the first one warms up
    assert torch.equal(seen[1][1], seen[2][1]) and len(seen[1][1]) == 8
    assert result.best is None
    # more images go on with the conditions that come next
    seen.clear()
    sweep(SweepRequest(model=models["needs"], out=tmp_path / "out", num=16, **asked), tiny.CPU)
    seen_whole = recorded(monkeypatch, drawn_set)
    later = seen[-1][1]
    sweep(SweepRequest(model=models["needs"], out=tmp_path / "other", num=16, **asked), tiny.CPU)
    assert torch.equal(seen_whole[-1][1][8:], later)


def test_sweep_guides_named_conditions_by_default(models, tmp_path):
    asked = {"solvers": ["euler"], "steps": [1], "num": 4, "data": SHAPES}
    result = sweep(SweepRequest(model=models["free"], out=tmp_path / "out", **asked), tiny.CPU)
    assert set(result.presets) == {"euler-1", "euler-1_g1.5", "euler-1_g2", "euler-1_g3"}


def test_conditions_that_the_data_do_not_have_are_left_out_or_refused(models, caplog, monkeypatch, images, tmp_path):
    seen = recorded(monkeypatch, drawn_set)
    asked = {"solvers": ["euler"], "steps": [1], "num": 4, "data": images, "guidance": [1.0]}
    sweep(SweepRequest(model=models["free"], out=tmp_path / "out", **asked), tiny.CPU)
    assert {tuple(told) for told, _ in seen} == {()}
    assert "conditions left out: size, traits" in caplog.text
    with pytest.raises(DataError, match="no table"):
        sweep(SweepRequest(model=models["needs"], out=tmp_path / "no", **asked), tiny.CPU)
    assert not (tmp_path / "no").exists()


def test_sweep_against_statistics_has_no_conditions_to_draw(models, tmp_path):
    source, extractor = open_images(SHAPES, tiny.IMAGE_SIZE), RandomFeatures()
    pixels = torch.stack([torch.from_numpy(source[i].pixels.copy()).permute(2, 0, 1) for i in range(24)])
    made = Provenance(
        data="shapes",
        fingerprint="",
        image_size=Size.of(tiny.IMAGE_SIZE),
        resize="",
        feature_name=extractor.name,
        feature_hash=extractor.hash,
    )
    file = tmp_path / "reference.safetensors"
    Reference(FeatureStatistics.of(extractor(pixels)), made).save(file)
    asked = {"solvers": ["euler"], "steps": [1], "num": 4, "data": file}
    assert set(sweep(SweepRequest(model=models["free"], out=tmp_path / "out", **asked), tiny.CPU).presets) == {
        "euler-1"
    }
    with pytest.raises(ConfigError, match="statistics, which have no named conditions; give the images"):
        sweep(SweepRequest(model=models["needs"], out=tmp_path / "no", **asked), tiny.CPU)


def test_a_table_that_has_some_of_the_columns_gives_those(models, kl, images, tmp_path, caplog):
    folder = tiny.write_images(tmp_path / "photos", classes=(), per_class=4)
    (folder / "labels.csv").write_text("file,size\n" + "".join(f"{n}.png,{n}\n" for n in range(4)), encoding="utf-8")
    flow = tiny.model(kl, class_names=(), conditioning={"columns": [SIZE, TRAITS]})
    source = open_images_for(flow, folder)
    assert [source.values(row) for row in range(4)] == [(0,), (1,), (2,), (3,)]
    assert "conditions left out: traits" in caplog.text
    (folder / "labels.csv").write_text("file,traits\n" + "".join(f"{n}.png,left\n" for n in range(4)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no column 'size'.*column_dropout = 0 for size"):
        open_images_for(flow, folder)


def test_diagnose_is_given_the_conditions_of_its_images(models, monkeypatch, tmp_path):
    seen, losses = recorded(monkeypatch, model_diagnosis), []
    own = model_diagnosis.velocity_given

    def record(flow, given, count):
        losses.append(given.columns)
        return own(flow, given, count)

    monkeypatch.setattr(model_diagnosis, "velocity_given", record)
    found = diagnose(DiagnoseRequest(model=models["needs"], data=SHAPES, out=tmp_path / "out", num=8), tiny.CPU)
    assert found.told == "the size and traits of each image"
    ((told, columns),) = seen
    assert told == ["size", "traits"] and columns.shape == (4, 2 + len(NAMES) + 2)
    assert len({tuple(row) for row in torch.cat(losses).tolist()}) > 4


def test_bound_is_given_what_the_model_requires(models, tmp_path):
    small = {"num": 6, "num_data": 12, "points": 4, "bins": 2, "batch_size": 3}
    assert bound(BoundRequest(model=models["needs"], data=SHAPES, **small), tiny.CPU).told == "the size of each image"
    assert bound(BoundRequest(model=models["free"], data=SHAPES, **small), tiny.CPU).told == "nothing"


def test_the_velocity_of_the_data_is_that_of_images_of_equal_conditions(kl):
    flow = tiny.model(kl, class_names=(), conditioning={"columns": [SIZE]})
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = Condition(columns=torch.tensor([[25.0, 0.0], [30.0, 0.0], [25.0, 0.0]]))
    reference = ReferenceLatents(None, [0, 1, 2], latents, given, ("size",))
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.6])
    found = data_velocity(flow, reference, given.select(torch.tensor([1, 0])))(x, time)
    alone = data_velocity(flow, reference.rows(slice(1, 2)), Condition())
    torch.testing.assert_close(found[:1], alone(x[:1], time[:1]))
    alike = reference.rows(torch.tensor([0, 2]))
    torch.testing.assert_close(found[1:], data_velocity(flow, alike, Condition())(x[1:], time[1:]))


def test_solvers_are_fitted_to_the_conditions_of_data(models, monkeypatch):
    few = {"model": models["needs"], "evaluations": [4], "num": 8, "held_out": 8, "reference_steps": 12}
    with pytest.raises(ConfigError, match="data: this model requires the condition size"):
        fit_solver(FitSolverRequest(**few), runtime=tiny.CPU)
    seen, own = [], fit_solvers.conditioned_velocity

    def record(model, drawing, given, *more):
        seen.append((drawing.told, given["columns"]))
        return own(model, drawing, given, *more)

    monkeypatch.setattr(fit_solvers, "conditioned_velocity", record)
    fit_solver(FitSolverRequest(**few, data=SHAPES), batch_size=8, runtime=tiny.CPU)
    assert [told for told, _ in seen] == [["size", "traits"]] * 2
    drawn = torch.cat([columns for _, columns in seen])
    known = {tuple(row) for row in conditions_of_shapes(models["needs"]).columns.tolist()}
    assert {tuple(row) for row in drawn.tolist()} <= known and len(set(map(tuple, drawn.tolist()))) > 8


def test_data_that_change_nothing_are_refused(deterministic, tmp_path):
    tiny.model(deterministic, class_names=()).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="data synthetic has no effect"):
        fit_solver(FitSolverRequest(model=tmp_path / "model", data="synthetic"), runtime=tiny.CPU)
