"""Runs whose images, classes and columns a table describes, and what such models are measured on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentflow.api import LatentFlow
from latentflow.commands.distill import distill
from latentflow.commands.encode import encode
from latentflow.commands.train import train
from latentflow.data.request import EncodeRequest
from latentflow.errors import ConfigError, DataError
from latentflow.evaluation.encoded_images import open_images_for
from latentflow.model.flow_model import FlowModel
from latentflow.training.held_out import images_for
from latentflow.training.student_recipe import StudentRecipe
from tests import tiny

CHOICE = {"label_column": "kind", "columns": ["age:number", "tags:labels"]}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    folder = tiny.write_images(tmp_path_factory.mktemp("data") / "flat", classes=(), per_class=18)
    rows = [f"{n}.png,{'red' if n % 2 else 'blue'},{n if n % 5 else ''},{'a|b' if n % 3 else 'b'}" for n in range(18)]
    (folder / "labels.csv").write_text("\n".join(["file,kind,age,tags", *rows]), encoding="utf-8")
    return folder / "labels.csv"


def recipe(path: Path, kl_folder: Path, out: Path, **data):
    return tiny.recipe(data={"path": path, **data}, autoencoder=kl_folder, training={"steps": 2}, out=out)


@pytest.fixture(scope="module")
def model(table, kl_folder, tmp_path_factory) -> FlowModel:
    """Trained on the images themselves, without a cache."""
    out = tmp_path_factory.mktemp("runs") / "table"
    train(recipe(table, kl_folder, out, **CHOICE), runtime=tiny.CPU)
    return FlowModel.from_pretrained(out / "model")


def test_classes_and_columns_of_the_table_are_those_of_the_model(model):
    conditioning = model.config.conditioning
    assert conditioning.class_names == ["blue", "red"]
    assert [(one.column.name, one.column.kind, one.column.class_names) for one in conditioning.columns] == [
        ("age", "number", ()),
        ("tags", "labels", ("a", "b")),
    ]


def test_a_cache_of_the_table_gives_the_same_conditions(table, model, kl_folder, tmp_path):
    encode(EncodeRequest(data=table, autoencoder=kl_folder, image_size=tiny.IMAGE_SIZE, **CHOICE), tmp_path / "cache")
    train(recipe(tmp_path / "cache", kl_folder, tmp_path / "run"), runtime=tiny.CPU)
    config = FlowModel.from_pretrained(tmp_path / "run" / "model").config
    assert config.conditioning == model.config.conditioning
    with pytest.raises(ConfigError, match=r"data.columns .* are about a table, and .*cache is a latent cache"):
        train(recipe(tmp_path / "cache", kl_folder, tmp_path / "other", columns=["age"]), runtime=tiny.CPU)


def test_a_model_finds_its_classes_and_columns_in_a_table(table, model):
    images = images_for(model, table)
    labels = [images.source.label(row) for row in range(18)]
    assert images.source.class_names == ("blue", "red") and len(set(labels)) == 2
    assert [column.name for column in images.source.columns] == ["age", "tags"]
    assert torch.isfinite(images.column_values()[0]).all()
    assert open_images_for(model, table).class_names == ("blue", "red")


def test_a_student_is_conditioned_on_the_columns_of_its_teacher(table, model, tmp_path):
    given = {"teacher": str(model.reference), "out": str(tmp_path / "run"), "data": {"path": str(table)}}
    training = {**tiny.RECIPE["training"], "steps": 2}
    run = distill(StudentRecipe.model_validate({**given, "training": training}), runtime=tiny.CPU).run
    student = LatentFlow.from_pretrained(run, device="cpu")
    assert student.config.conditioning == model.config.conditioning
    drawn = student.sample(num=2, conditions={"age": [3], "tags": ["a"]}, evaluations=2, guidance=2.0)
    assert drawn.evaluations.tolist() == [2, 2]


def test_columns_that_are_not_there_are_named(table, kl_folder, tmp_path):
    for choice, words in (
        ({"label_column": "knd"}, "no column 'knd', which --label-column names; did you mean 'kind'"),
        ({"columns": ["agee"]}, "no column 'agee', which --columns names; did you mean 'age'"),
    ):
        with pytest.raises(DataError, match=words):
            train(recipe(table, kl_folder, tmp_path / "run", **choice), runtime=tiny.CPU)
    assert not (tmp_path / "run").exists()
