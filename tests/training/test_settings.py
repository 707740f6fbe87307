"""Recipes: unknown keys, overrides, YAML, and what may change when a run is resumed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from latentflow.errors import ConfigError
from latentflow.plans import changed_values
from latentflow.training import first_stage
from latentflow.training.config import CHANGES, RECIPES, Recipe, load_recipe, recipe_names
from latentflow.training.first_stage import AutoencoderRecipe
from latentflow.training.settings import keys_of, load_settings, to_yaml
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


def test_overrides_reach_any_depth(load):
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


@pytest.mark.parametrize("override", ["steps", "=3", "training.steps.more=1", "training.steps=[1"])
def test_malformed_overrides(load, override):
    assert override.partition("=")[0] in refusal(load, "training: {steps: 3}", override)


@pytest.mark.parametrize("text", ["training: [", "a: b: c", "\ttraining: {}", "- a\n- b", "just words"])
def test_text_that_is_no_mapping(load, text):
    assert "mine" in refusal(load, text)


def test_yaml_cannot_run_code(load, tmp_path):
    target = tmp_path / "exploded"
    refusal(load, f"out: !!python/object/apply:os.mkdir ['{target}']")
    refusal(load, "", f"optimizer.betas=[!!python/object/apply:os.mkdir ['{target}']]")
    assert load("", f"out=!!python/object/apply:os.mkdir ['{target}']").out.startswith("!!python")
    assert not target.exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps=0", "training.steps = 0"),
        ("training.steps=1000000001", "training.steps = 1000000001"),
        ("training.batch_size=1e9", "training.batch_size = 1000000000"),
        ("training.seed=-1", "training.seed = -1"),
        ("data.image_size=32768", "data.image_size = '32768'"),
        ("data.num_workers=1000", "data.num_workers = 1000"),
        ("optimizer.betas=0.9,1", "optimizer.betas.1 = 1.0"),
        ("optimizer.betas=0.9", "optimizer.betas needs 2 values, not 1; write them as [..., ...]"),
        ("optimizer.betas=0.9,0.99,0.999", "optimizer.betas needs 2 values, not 3"),
        ("times.std=0", "times.std = 0"),
        ("times.shift=1e5", "times.shift = 100000"),
        ("training.steps=many", "training.steps = 'many'"),
        ("training.precision=fp8", "training.precision = 'fp8'"),
        ("conditioning.label_dropout=1", "conditioning.label_dropout = 1"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate = -1"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm = 0"),
        ("training=3", "training = '3'"),
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
    changed = {"training": {"steps": 11, "seed": 5}, "sampling": {"steps": 9}}
    old, new = (tiny.recipe(**given).model_dump(mode="json") for given in ({}, changed))
    assert changed_values(old, old) == {}
    assert changed_values(old, new) == {"sampling.steps": (2, 9), "training.seed": (0, 5), "training.steps": (10, 11)}


@pytest.mark.parametrize("recipe", [Recipe(), AutoencoderRecipe()], ids=["train", "train-autoencoder"])
def test_what_the_rules_of_change_name_exists(recipe):
    rules = {Recipe: CHANGES, AutoencoderRecipe: first_stage.CHANGES}[type(recipe)]
    assert {*rules.free, *rules.fixed} <= set(keys_of(recipe))


# One notation: the field says what a value is

WORDS = """
    # = a=b @home *new &a no yes on off true null ~ Null 2024 2024-05-01 007 010 0x10 1:30 1e5 1_000 .nan -.inf
    [a] it's 'quoted' back\\slash %TAG !tag | > ... ` ä/ö 猫 🐈 \x1b[2J
"""
HOSTILE = [
    *WORDS.split(),
    *("photos #2", "photos: cats", "{a: 1}", "!!str x", "- a", "? a", "--- ", 'say "hi"', "", " "),
    *(" leading", "trailing ", "two  spaces", "tab\there", "line\nbreak", "a\u2028b", "a\x85b"),
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_taken_as_it_stands(load, tmp_path, text):
    recipe = load("", f"data.path={text}", f"description={text}", f"autoencoder={text}")
    assert (recipe.data.path, recipe.description, recipe.autoencoder) == (text, text, text)
    file = tmp_path / "written.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


@pytest.mark.parametrize("text", ["no", "2024", "007", "2024-05-01", "1:30", "null", "~", "1e5", "a#b", "a=b"])
def test_a_file_means_the_same(load, text):
    assert load(f"data: {{path: {text}}}").data.path == text
    assert load(f"data:\n  path: {text}\n").data.path == text


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.seed", "010", 10),
        ("training.seed", "+7", 7),
        ("training.seed", " 7 ", 7),
        ("training.steps", "1e5", 100_000),
        ("training.steps", "1.5E3", 1500),
        ("training.steps", "10.0", 10),
        ("training.steps", "100_000", 100_000),
        ("optimizer.learning_rate", "1e-3", 0.001),
        ("optimizer.learning_rate", ".5", 0.5),
        ("optimizer.learning_rate", "010", 10.0),
        ("optimizer.learning_rate", "1_000", 1000.0),
        ("optimizer.betas", "0.9,0.99", (0.9, 0.99)),
        ("optimizer.betas", "0.9, 0.99", (0.9, 0.99)),
        ("optimizer.betas", "[0.9, 0.99]", (0.9, 0.99)),
        ("optimizer.clip_norm", "null", None),
        ("optimizer.clip_norm", "~", None),
        ("optimizer.clip_norm", "2", 2.0),
        ("training.micro_batch_size", "", None),
        ("data.flip", "true", True),
        ("data.flip", "False", False),
        ("training.precision", "fp32", "fp32"),
        ("sampling.guided_by", "label,inpainting", ["label", "inpainting"]),
        ("sampling.guided_by", "[label]", ["label"]),
        ("sampling.guided_by", "label", ["label"]),
        ("sampling.guided_by", "null", None),
    ],
)
def test_values_by_the_type_of_their_field(load, key, text, value):
    section, entry = key.split(".")
    for recipe in (load("", f"{key}={text}"), load(f"{section}:\n  {entry}: {text}\n")):
        found = getattr(getattr(recipe, section), entry)
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "texts", "said"),
    [
        ("training.steps", "1:30 0x10 0o7 0b1 1.5 ten 1_0 1__000 _1 １０ null", "is not a whole number"),
        ("training.steps", f"1e400 1e999999999 {'9' * 40}", "too large"),
        ("optimizer.learning_rate", "nan inf .inf 1,5 1e 0.1f", "is not a number"),
        ("optimizer.learning_rate", "1e400 1e-400", "too large or too small"),
        ("data.flip", "yes no on off 1 0 y null", "is not true or false"),
        ("optimizer.betas", "0.9, a,b", "is not a number"),
        ("optimizer.betas", "[0.9,[0.99]]", "write one value"),
        ("network", "[1] DiT-S/2 null", "a section; set its keys"),
        ("training", "{steps:3} {steps", "line|training"),
        ("data.path.more", "x", "data.path is a value"),
        ("training..steps", "3", "key=value"),
        ("data.path", "a\0b", "zero byte"),
        ("data.path", "caf\udce9", "UTF-8"),
        ("network.kind", "oval", "unknown kind 'oval'"),
    ],
)
def test_values_of_another_type_are_refused(load, key, texts, said):
    for text in texts.split():
        assert re.search(said, refusal(load, "", f"{key}={text}"))


@pytest.mark.parametrize("key", ["training.steps", "optimizer.learning_rate", "training.compile", "training.precision"])
def test_an_empty_value_is_no_number(load, key):
    assert key in refusal(load, "", f"{key}=")


def test_an_empty_section_has_its_defaults(load):
    assert load("training:\n  # steps: 3\nnetwork:\n  name: DiT-S/2\n") == Recipe()
    assert load("training:\n", "training.steps=3").training.steps == 3


def test_a_key_stands_once(load):
    first, second = "optimizer: {warmup_steps: 500", "optimizer: {weight_decay: 0.01}"
    message = refusal(load, f"out: x\n{first}}}\ntraining: {{steps: 10}}\n{second}\n")
    assert "line 4: 'optimizer' is set again, after line 2" in message
    assert load(f"out: x\n{first}, weight_decay: 0.01}}\ntraining: {{steps: 10}}").optimizer.weight_decay == 0.01


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training:\n  steps: 3\n  batch_size: 4\n  steps: 5", "line 4: 'steps'"),
        ("training: {steps: 3, steps: 3}", "line 1: 'steps' is set again, after the same line"),
        ("network: {name: DiT-S/2}\n'network': {name: DiT-B/2}", "line 2: 'network'"),
        ("a: &x {steps: 1}\ntraining:\n  <<: *x", "line 3: *x is a reference"),
        ("training: &x {steps: 1}\noptimizer: *x", "line 2: *x is a reference"),
        ("training: {<<: {steps: 1}}", "training.<<"),
        ("out: *new", "line 1: *new is a reference"),
        ("out: @home", "line 1: found character '@'"),
        ("out: `x", "line 1"),
        ("out: photos: cats", "line 1: mapping values are not allowed here"),
        ("out: !!str 5", "is a tag"),
        ("out: !mine 5", "is a tag"),
        ("out: a\n--- \nout: b", "more than one YAML document"),
        ("? [a]\n: b", "a key must be a word"),
        ("out: [a, b]", "out is a list"),
        ("out: {a: b}", "out is a section"),
        ("training:\n\tsteps: 3", "indent with spaces"),
        ("out: " + "x" * 5000, "out = 'xxxxxxxxxxxxxxxxxxxx'... has 5,000 characters"),
        ("out: " + "[" * 3000 + "]" * 3000, "nested more than 16 deep"),
        ("out: " + "{a: " * 3000 + "}" * 3000, "nested more than 16 deep"),
        ("x: " + "a" * 100_000, "longer than 100,000 bytes"),
    ],
)
def test_yaml_that_is_refused(load, text, said):
    assert said in refusal(load, text)


def test_quotes_make_special_signs_text(load):
    """The remedy that the messages name."""
    assert load("out: '*new'").out == "*new"
    assert load("out: '@home'").out == "@home"
    assert load("out: 'photos: cats'").out == "photos: cats"


def test_a_small_file_stays_small(load):
    """A billion laughs."""
    lines = ["a0: &a0 [lol, lol]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    assert "is a reference" in refusal(load, "\n".join(lines))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"out: caf\xe9", "not text in UTF-8"),
        ("out: a".encode("utf-16"), "not text in UTF-8"),
        (b"\x80\x04\x95", "not text in UTF-8"),
        (b"out: a\x00b", "special characters are not allowed"),
        (b"out: a\x1bb", "special characters are not allowed"),
    ],
)
def test_bytes_that_are_no_yaml(tmp_path, data, said):
    file = tmp_path / "mine.yaml"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=said):
        load_recipe(file)


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfout: a\n", b"out: a\r\ndata: {flip: false}\r\n", b"# none\nout: a"])
def test_how_editors_write_text(tmp_path, data):
    file = tmp_path / "mine.yaml"
    file.write_bytes(data)
    assert load_recipe(file).out == "a"


def test_places_that_are_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name in (".", "pipe.yaml", "endless.yaml", "loop.yaml", "absent.yaml", "x" * 300, "a\0b"):
        with pytest.raises(ConfigError, match="no recipe"):
            load_recipe(tmp_path / name)


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.steps=3", "training.steps=4"),
        ("training.steps=3", "training.steps=3"),
        ("network={name: DiT-S/2}", "network.depth=3"),
        ("network.depth=3", "network={name: DiT-S/2}"),
    ],
)
def test_an_override_stands_once(load, overrides):
    message = refusal(load, "", *overrides)
    assert all(override in message for override in overrides)
    assert "set the same key" in message


def test_another_kind_of_network_by_overrides(load):
    text = "network: {depth: 2, hidden_size: 64, num_heads: 2, patch_size: 2}"
    changed = load(text, "network.channels=32", "network.multipliers=1,2", "network.kind=unet").network
    assert (changed.kind, changed.channels, changed.multipliers) == ("unet", 32, (1, 2))
    assert load(text, "network.kind=dit").network.depth == 2
    sizes = load("", "network={kind: unet, channels: 64, multipliers: [1, 2], attention_sizes: [8], latent_size: 16}")
    assert sizes.network.attention_factors == (2,)
    by_keys = ("network.attention_sizes=8", "network.latent_size=16", "network.kind=unet")
    assert load("", *by_keys, "network.channels=64", "network.multipliers=1,2").network == sizes.network


def test_another_kind_of_optimizer_keeps_the_keys_of_both(load):
    text = "optimizer: {learning_rate: 0.003, warmup_steps: 100, schedule: cosine, orthogonalise_every: 2, kind: muon}"
    muon = load(text).optimizer
    assert load(text.replace(", orthogonalise_every: 2, kind: muon", ""), "optimizer.kind=muon").optimizer == (
        muon.model_copy(update={"orthogonalise_every": 1})
    )
    assert load(text, "optimizer.kind=adamw", "optimizer.orthogonalise_every=1").optimizer == (
        muon.model_copy(update={"kind": "adamw", "orthogonalise_every": 1})
    )


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
