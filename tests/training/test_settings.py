"""Recipes: unknown keys, overrides, YAML, and what may change when a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from latentflow.errors import ConfigError
from latentflow.training.config import MAY_CHANGE_ON_RESUME, RECIPES, Recipe, load_recipe, recipe_names
from latentflow.training.settings import differences, load_settings, to_yaml
from tests import tiny


@pytest.fixture
def load(tmp_path):
    """A recipe of this YAML text and these overrides."""
    file = tmp_path / "mine.yaml"

    def run(text: str, *overrides: str) -> Recipe:
        file.write_text(text, encoding="utf-8")
        return load_recipe(file, overrides)

    return run


def refusal(load, *given: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*given)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_empty_file_is_the_default(load):
    assert load("") == Recipe()


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("trainig: {}", "trainig", "training"),
        ("training: {batchsize: 3}", "training.batchsize", "batch_size"),
        ("optimizer: {learning_rat: 3}", "optimizer.learning_rat", "learning_rate"),
        ("data: {flips: true}", "data.flips", "flip"),
        ("times: {distribtion: uniform}", "times.distribtion", "distribution"),
        ("sampling: {solvr: heun}", "sampling.solvr", "solver"),
        ("network: {name: DiT-S/2, depht: 3}", "depht", "depth"),
        ("path: {kind: linear, sigma_mn: 0}", "path.sigma_mn", "sigma_min"),
    ],
)
def test_unknown_keys_name_the_nearest(load, text, key, suggestion):
    message = refusal(load, text)
    assert repr(key) in message
    assert f"did you mean {suggestion!r}?" in message


@pytest.mark.parametrize("override", ["training.batchsize=3", "trainin.batch_size=3", "network.depht=3"])
def test_unknown_keys_in_overrides(load, override):
    assert "did you mean" in refusal(load, "", override)


def test_overrides_reach_any_depth_and_read_as_yaml(load):
    recipe = load(
        "training: {steps: 5}\nnetwork: {name: DiT-S/2}",
        "training.batch_size=6",
        "training.micro_batch_size=null",
        "optimizer.learning_rate=3e-4",
        "optimizer.betas=[0.9, 0.95]",
        "data.flip=false",
        "data.path=a=b",
        "sampling.guidance_interval=[0.1, 0.9]",
        "network.depth=3",
        "out=runs/x",
    )
    assert recipe.training.steps == 5
    assert recipe.training.batch_size == 6
    assert recipe.training.micro_batch_size is None
    assert recipe.optimizer.learning_rate == 3e-4
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.data.flip is False
    assert recipe.data.path == "a=b"
    assert recipe.sampling.guidance_interval == (0.1, 0.9)
    assert (recipe.network.depth, recipe.network.hidden_size) == (3, 384)
    assert recipe.out == "runs/x"


def test_the_last_override_wins(load):
    assert load("", "training.steps=3", "training.steps=4").training.steps == 4


@pytest.mark.parametrize("override", ["steps", "=3", "training.steps.more=1", "training.steps=[1"])
def test_malformed_overrides(load, override):
    assert override.partition("=")[0] in refusal(load, "training: {steps: 3}", override)


@pytest.mark.parametrize("text", ["training: [", "a: b: c", "\ttraining: {}", "- a\n- b", "just words"])
def test_text_that_is_no_mapping(load, text):
    assert "mine" in refusal(load, text)


def test_yaml_cannot_run_code(load, tmp_path):
    target = tmp_path / "exploded"
    refusal(load, f"out: !!python/object/apply:os.mkdir ['{target}']")
    refusal(load, "", f"out=!!python/object/apply:os.mkdir ['{target}']")
    assert not target.exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps=0", "training.steps = 0"),
        ("training.steps=many", "training.steps = 'many'"),
        ("training.precision=fp8", "training.precision = 'fp8'"),
        ("conditioning.label_dropout=1", "conditioning.label_dropout = 1"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate = -1"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm = 0"),
        ("training=3", "training = 3"),
        ("network.name=DiT-Q/2", "DiT-Q/2"),
    ],
)
def test_values_that_do_not_fit_are_named(load, override, said):
    assert said in refusal(load, "", override)


def test_a_missing_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'cifar10_64'\?"):
        load_recipe("cifar_64")


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_of_the_package(name):
    recipe = load_recipe(name)
    assert recipe.description
    assert load_settings(Recipe, RECIPES / f"{name}.yaml") == recipe


def test_yaml_round_trip(tmp_path):
    recipe = tiny.recipe(data={"path": "bilder/ä b"}, out="läufe/1", optimizer={"clip_norm": None})
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


def test_differences():
    old, new = tiny.recipe(), tiny.recipe(training={"steps": 11, "seed": 5}, sampling={"steps": 9})
    assert differences(old, old) == []
    assert differences(old, new) == [
        "sampling.steps: 2, now 9",
        "training.seed: 0, now 5",
        "training.steps: 10, now 11",
    ]
    assert differences(old, new, free=MAY_CHANGE_ON_RESUME) == ["training.seed: 0, now 5"]


def test_what_may_change_exists():
    valid = set(Recipe.model_fields)
    for key in MAY_CHANGE_ON_RESUME:
        section, _, entry = key.partition(".")
        assert section in valid
        assert not entry or entry in type(getattr(Recipe(), section)).model_fields


# Unions of sections, chosen by their kind


class Round(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["round"] = "round"
    radius: float = 1.0


class Square(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["square"] = "square"
    side: int = 1
    corner: Round = Round()


class Drawing(BaseModel):
    model_config = ConfigDict(extra="forbid")
    shape: Annotated[Round | Square, Field(discriminator="kind")] = Round()


@pytest.fixture
def drawing(tmp_path):
    file = tmp_path / "drawing.yaml"

    def run(text: str, *overrides: str) -> Drawing:
        file.write_text(text)
        return load_settings(Drawing, Path(file), overrides)

    return run


def test_union_sections(drawing):
    assert drawing("shape: {kind: square, side: 3}").shape == Square(side=3)
    assert drawing("", "shape.kind=square", "shape.corner.radius=2").shape.corner.radius == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shape: {kind: square, sde: 3}", ("sde", "did you mean 'side'?")),
        ("shape: {kind: round, sde: 3}", ("sde", "valid: kind, radius")),
        ("shape: {kind: square, corner: {radus: 3}}", ("radus", "did you mean 'radius'?")),
        ("shape: {kind: square, side: long}", ("shape", "side", "long")),
        ("shape: {kind: oval}", ("shape", "oval", "round", "square")),
    ],
)
def test_union_sections_refuse_what_their_kind_has_not(drawing, text, said):
    message = refusal(drawing, text)
    for words in said:
        assert words in message
