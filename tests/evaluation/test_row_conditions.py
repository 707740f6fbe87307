"""Evaluation under the conditions of real images: which ones, in which order, and from which tables."""

from __future__ import annotations

import csv
import shutil

import pytest
import torch

from latentflow.columns import Column
from latentflow.data.sources.images import open_images, table_with
from latentflow.errors import ConfigError, DataError
from latentflow.evaluation import drawn_set
from latentflow.evaluation.real_images import reference_features
from latentflow.evaluation.request import EvaluationRequest
from latentflow.evaluation.shards import Work
from latentflow.evaluation.subject import Drawn
from latentflow.metrics.features.extractors import RandomFeatures
from latentflow.model.conditioning import ColumnCondition, Conditioning
from latentflow.sampling.named_conditions import condition_rows
from latentflow.sampling.row_conditions import require_known_columns, row_conditions
from tests import tiny

SHAPES = "synthetic:12:0:size,shape,traits"
NAMED = open_images(SHAPES, 8).columns


def conditions() -> list[ColumnCondition]:
    """Those of a model that knows more classes, in another order."""
    _, shape, traits = NAMED
    return [
        ColumnCondition(name="shape", kind="label", class_names=["star", *reversed(shape.class_names)]),
        ColumnCondition(name="traits", kind="labels", class_names=["tall", *traits.class_names]),
        ColumnCondition(name="size", kind="number", mean=30, deviation=3),
    ]


CONDITIONING = Conditioning(columns=conditions())


def test_every_real_image_gives_its_conditions_once():
    source, labels = open_images(SHAPES, 8), torch.arange(12)
    rows = row_conditions(CONDITIONING, source, range(12), labels, seed=3)
    places = rows.places(range(24))
    assert sorted(places[:12].tolist()) == sorted(places[12:].tolist()) == list(range(12))
    assert places[:12].tolist() != list(range(12))
    assert torch.equal(rows.places([7, 20]), places[[7, 20]])
    assert not torch.equal(row_conditions(CONDITIONING, source, range(12), labels, seed=4).places(range(24)), places)


def test_values_are_taken_by_name():
    source = open_images(SHAPES, 8)
    rows = row_conditions(CONDITIONING, source, [5, 2], None, seed=0)
    _, shape, traits = NAMED
    for row, image in zip(rows.columns, (5, 2), strict=True):
        values = source.values(image)
        named = {
            "shape": [shape.class_names[values[1]]],
            "traits": [[traits.class_names[index] for index in sorted(values[2])]],
            "size": [values[0]],
        }
        assert torch.equal(row, condition_rows(CONDITIONING, named, 1)[0])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([ColumnCondition(name="sise", kind="number")], r"no column 'sise', .* \(did you mean 'size'"),
        ([ColumnCondition(name="size", kind="label", class_names=["a"])], "the column size holds number, not label"),
        (
            [ColumnCondition(name="shape", kind="label", class_names=["circle"])],
            "does not know 'square' of the column shape",
        ),
    ],
)
def test_images_that_do_not_have_the_columns(columns, message):
    with pytest.raises(ConfigError, match=message):
        require_known_columns(Conditioning(columns=columns), open_images(SHAPES, 8))


@pytest.fixture(scope="module")
def model_folder(kl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    tiny.model(kl, class_names=(), conditioning={"columns": conditions()}).save_pretrained(folder)
    return folder


def evaluated(model_folder, data=SHAPES, **changes) -> Drawn:
    request = EvaluationRequest(model=str(model_folder), data=str(data), features="random", num=8, **changes)
    return Drawn(request, tiny.CPU)


def drawn_columns(subject, monkeypatch) -> torch.Tensor:
    """The named conditions of the images that are drawn."""
    seen = []
    draw = drawn_set.draw

    def record(model, drawing, given, **options):
        seen.append(given.columns)
        assert drawing.told == ["shape", "traits", "size"]
        return draw(model, drawing, given, **options)

    monkeypatch.setattr(drawn_set, "draw", record)
    extractor = RandomFeatures()
    reference = reference_features(subject.real, extractor, Work())
    subject.columns(extractor, reference, Work())
    return torch.cat(seen)


def test_a_model_with_named_conditions_is_drawn_under_those_of_real_images(model_folder, monkeypatch):
    subject = evaluated(model_folder, seed=5)
    assert subject.labels == "rows"
    found = drawn_columns(subject, monkeypatch)
    expected = row_conditions(CONDITIONING, open_images(SHAPES, 8), range(12), None, seed=5)
    assert torch.equal(found, expected.columns[expected.places(range(8))])


def test_without_named_conditions_if_that_is_asked_for(model_folder):
    subject = evaluated(model_folder, data="synthetic:12", labels="balanced")
    assert (subject.labels, subject._set.drawing.told) == ("none", [])
    with pytest.raises(ConfigError, match=r"have no column 'shape'.*--labels balanced"):
        evaluated(model_folder, data="synthetic:12")


def test_a_required_condition_takes_those_of_real_images(kl, tmp_path):
    columns = [one.model_copy(update={"dropout": 0.0}) for one in conditions()]
    tiny.model(kl, class_names=(), conditioning={"columns": columns}).save_pretrained(tmp_path / "model")
    assert evaluated(tmp_path / "model").labels == "rows"
    with pytest.raises(ConfigError, match="requires the condition shape, which only labels 'rows' give"):
        evaluated(tmp_path / "model", labels="balanced")


@pytest.fixture
def table(images, tmp_path):
    """A table of the images of the class folders, with their ages and a class."""
    folder = tmp_path / "photos"
    shutil.copytree(images, folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "fruit", "age"])
        writer.writerows([name, name.partition("/")[0], "" if row == 1 else row] for row, name in enumerate(names))
    return folder


def test_a_table_is_read_for_the_columns_of_the_model(kl, table, tmp_path):
    columns = [ColumnCondition(name="age", kind="number")]
    tiny.model(kl, conditioning={"columns": columns}).save_pretrained(tmp_path / "model")
    subject = evaluated(tmp_path / "model", table, label_column="fruit")
    assert (subject.labels, subject.class_names) == ("rows", list(tiny.CLASSES))
    values = [subject.real.source.values(row) for row in range(4)]
    assert values == [(0,), (None,), (2,), (3,)]
    with pytest.raises(DataError, match="agee"):
        open_images(table, 8, table=table_with(table, [Column("agee", "number")]))


def test_images_without_a_table_have_their_own_columns():
    assert table_with(SHAPES, NAMED).columns is None
    assert table_with("scans", NAMED).columns == ["size:number", "shape:label", "traits:labels"]
