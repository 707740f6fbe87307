"""Named columns of the data as conditions of a model: what is measured, what is refused, and training on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from latentflow.columns import Column, places_of
from latentflow.commands.train import train
from latentflow.data.batches import TrainingImages
from latentflow.data.column_tensors import stored_values
from latentflow.data.sources.synthetic import COLUMNS as COLUMNS_OF_SHAPES
from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.errors import ConfigError
from latentflow.flow.times import TrainingTimes
from latentflow.model.conditioning import ColumnCondition
from latentflow.model.flow_model import WEIGHTS_FILE, FlowModel, read_config
from latentflow.training.config import ConditioningConfig
from latentflow.training.data_columns import chosen_columns, measured_columns
from latentflow.training.step import training_step
from tests import tiny

VIEW, TAGS, AGE = (
    Column("view", "label", ("frontal", "lateral", "other")),
    Column("tags", "labels", ("edema", "nodule")),
    Column("age", "number"),
)


def chosen(of=(VIEW, TAGS, AGE), **recipe) -> list[ColumnCondition]:
    return chosen_columns(ConditioningConfig(**recipe), of, "scans")


@dataclass
class Values:
    """The columns of some training images."""

    columns: dict[Column, list]

    def column_values(self) -> list[torch.Tensor]:
        return [stored_values(column, values) for column, values in self.columns.items()]


def measured(column: Column, *values) -> ColumnCondition:
    (one,) = measured_columns(chosen([column]), Values({column: list(values)}))
    return one


def test_all_columns_unless_some_are_named():
    assert [one.name for one in chosen()] == ["view", "tags", "age"]
    assert [one.name for one in chosen(columns=["age", "view"])] == ["age", "view"]
    assert chosen(columns=[]) == []
    assert [one.column for one in chosen()] == [VIEW, TAGS, AGE]


def test_each_column_may_have_a_dropout_of_its_own():
    found = chosen(columns=["age:0.25", "view"], column_dropout=0.2)
    assert {one.name: one.dropout for one in found} == {"age": 0.25, "view": 0.2}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["agee"], "scans has no column 'agee'; did you mean 'age'?"),
        (["age", "age:0.3"], "age is given twice"),
        (["age:1.5"], "'age:1.5': the dropout of a column is at least 0 and below 1"),
        (["age:many"], "scans has no column 'age:many'"),
    ],
)
def test_columns_that_cannot_be_chosen(columns, message):
    with pytest.raises(ConfigError) as error:
        chosen(columns=columns)
    assert message in str(error.value)


def test_a_number_is_measured_where_it_is_known():
    one = measured(AGE, 20, None, 40.0, 60)
    assert (one.mean, one.low, one.high) == (40, 20, 60)
    assert one.deviation == pytest.approx((800 / 3) ** 0.5)


def test_classes_are_counted_where_they_are_known():
    assert measured(VIEW, 0, None, 2, 0).images_per_class == [2, 0, 1]
    assert measured(TAGS, frozenset({0}), None, frozenset({0, 1}), frozenset()).images_per_class == [2, 1]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (AGE, (None, None), "column age: it is not known of any training image; leave it out"),
        (VIEW, (None, None), "column view: it is not known of any training image; leave it out"),
        (TAGS, (None, None), "column tags: it is not known of any training image; leave it out"),
        (AGE, (5, 5, None), "column age: all of its numbers are 5, so nothing can be learned from it; leave it out"),
        (AGE, (1.7e9, 1.7e9 + 1000), "hardly differ, so nothing can be learned from it; leave it out"),
    ],
)
def test_columns_of_which_nothing_can_be_learned(column, values, message):
    with pytest.raises(ConfigError) as error:
        measured(column, *values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


COLUMNS = ["size:0.3", "shape", "traits"]


@pytest.fixture
def trained(kl_folder, tmp_path):
    """Trains on synthetic shapes with their columns; returns the run folder."""

    def run(name: str, *, source: str = "synthetic:24:0:size,traits,shape", **training) -> Path:
        data = {"path": source, "image_size": tiny.IMAGE_SIZE}
        made = tiny.recipe(
            data=data,
            conditioning={"columns": COLUMNS},
            training={"steps": 6, "checkpoint_every": 3, **training},
            autoencoder=kl_folder,
            out=tmp_path / name,
        )
        train(made)
        return tmp_path / name

    return run


def test_a_model_stores_what_is_known_of_its_columns(trained):
    run = trained("run")
    conditioning = read_config(run / "model").conditioning
    assert conditioning.dropout == {"label": 0.1, "size": 0.3, "shape": 0.1, "traits": 0.1}
    assert conditioning.can_guide == ["label", "size", "shape", "traits"]
    size, shape, _ = conditioning.columns
    assert 24 < size.low < size.mean < size.high < 36
    assert shape.images_per_class == [6, 6, 6, 6]


def test_training_changes_the_embeddings_of_the_columns(trained):
    first, last = (FlowModel.from_pretrained(trained(f"{n}", steps=n)).network.column_embedding for n in (1, 6))
    for before, after in zip(first.parameters(), last.parameters(), strict=True):
        assert not torch.equal(before, after)


def test_resume_is_exact(trained):
    trained("parts", steps=4)
    weights = [trained(name) / "model" / WEIGHTS_FILE for name in ("parts", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_interrupted_run_refuses_other_values(trained):
    trained("run", steps=3)
    with pytest.raises(ConfigError, match="was trained on other images"):
        trained("run", source="synthetic:24:0:traits,size,shape")


def test_the_condition_of_a_step_is_the_columns_of_its_images(kl):
    """Without dropout the network sees every value; a condition that is not given is null for every image."""
    columns = chosen(SyntheticShapes(1, columns=COLUMNS_OF_SHAPES).columns, column_dropout=0.0)
    model = tiny.model(kl, class_names=(), conditioning={"columns": columns})
    source = SyntheticShapes(8, tiny.IMAGE_SIZE, columns=COLUMNS_OF_SHAPES)
    images = TrainingImages(source, seed=1, flip=False, columns=[one.name for one in columns])
    seen = []

    def network(x, t, condition):
        seen.append(condition.columns)
        return x

    step = partial(training_step, model, network, images.at(range(8)), times=TrainingTimes(), batch_size=8, seed=1)
    step()
    step(conditions=["size"])
    assert torch.equal(seen[0], images.at(range(8)).columns)
    size = places_of([one.column.row for one in columns])[[one.name for one in columns].index("size")]
    assert torch.equal(seen[1][:, size], seen[0][:, size])
    null = model.config.conditioning.build((8, 4, 8, 8), "cpu").columns
    others = [number for number in range(null.shape[1]) if number not in range(size.start, size.stop)]
    assert torch.equal(seen[1][:, others], null[:, others])
