"""Values of named conditions: as they are written, as a network gets them, and in pictures."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.errors import ConfigError
from latentflow.model.conditioning import ColumnCondition, Conditioning
from latentflow.sampling.drawing import Drawing, make_drawing
from latentflow.sampling.named_conditions import condition_rows, ends_of, resolve_conditions
from latentflow.sampling.pipeline import Given, draw_all
from latentflow.sampling.request import SampleRequest
from tests import tiny
from tests.sampling.test_pipeline import same_pictures

VIEWS, TAGS = ["frontal", "lateral", "Doe, Jane"], ["edema", "nodule", "effusion"]
COLUMNS = [
    ColumnCondition(name="view", kind="label", class_names=VIEWS, images_per_class=[3, 2, 1]),
    ColumnCondition(name="tags", kind="labels", class_names=TAGS, images_per_class=[2, 2, 0]),
    ColumnCondition(name="age", kind="number", mean=50, deviation=20, low=18, high=95),
]
KNOWN = Conditioning(class_names=["cat", "dog"], columns=COLUMNS)


@pytest.fixture(scope="module")
def model(kl) -> LatentFlow:
    return tiny.model(kl, time_scale=20.0, conditioning={"columns": COLUMNS})


def resolved(num: int = 1, **asked):
    return resolve_conditions(KNOWN, asked, num)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("view", "lateral", "lateral"),
        ("view", "#1", "lateral"),
        ("view", 1, "lateral"),
        ("view", "Doe, Jane", "Doe, Jane"),
        ("view", '"Doe, Jane"', "Doe, Jane"),
        ("tags", "edema", ["edema"]),
        ("tags", "nodule,edema", ["edema", "nodule"]),
        ("tags", {"nodule", "edema"}, ["edema", "nodule"]),
        ("tags", ["nodule", "edema", "edema"], ["edema", "nodule"]),
        ("tags", {0}, ["edema"]),
        ("tags", "", []),
        ("tags", set(), []),
        ("age", "63", 63.0),
        ("age", 63, 63.0),
        ("age", "6.3e1", 63.0),
    ],
)
def test_one_value(name, given, value):
    assert resolved(3, **{name: given}) == {name: [value] * 3}


@pytest.mark.parametrize(
    ("name", "given", "values"),
    [
        ("view", "frontal,lateral", ["frontal", "lateral", "frontal"]),
        ("view", ["lateral", None], ["lateral", None, "lateral"]),
        ("view", 'lateral,"Doe, Jane",none', ["lateral", "Doe, Jane", None]),
        ("tags", "edema;nodule,edema;", [["edema"], ["edema", "nodule"], []]),
        ("tags", [{"edema"}, set(), None], [["edema"], [], None]),
        ("age", "20,40", [20.0, 40.0, 20.0]),
        ("age", [20, None, 60], [20.0, None, 60.0]),
    ],
)
def test_several_values_are_cycled_over_the_images(name, given, values):
    assert resolved(3, **{name: given}) == {name: values}


def test_none_is_not_given_unless_a_class_is_called_so():
    for name in ("view", "tags", "age"):
        for given in ("none", None, "#none", [None, None]):
            assert resolved(2, **{name: given}) == {}
    called = Conditioning(columns=[ColumnCondition(name="view", kind="label", class_names=["none", "some"])])
    assert resolve_conditions(called, {"view": "none"}, 1) == {"view": ["none"]}
    assert resolve_conditions(called, {"view": "#none"}, 1) == {}


def test_conditions_stand_in_the_order_of_the_model():
    assert list(resolved(age=63, view="lateral")) == ["view", "age"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"agee": 3}, "conditions agee: the model was not trained with it; did you mean 'age'?"),
        ({"label": "cat"}, "conditions label: this condition is not given by a value; give --classes"),
        ({"view": "latral"}, "conditions view=latral: no class is named 'latral'; did you mean 'lateral'?"),
        ({"view": "#3"}, "view=#3: class #3 does not exist"),
        ({"tags": "edema,nodul"}, "tags=edema,nodul: no class is named 'nodul'; did you mean 'nodule'?"),
        ({"tags": "effusion"}, "no training image was of 'effusion'; give another"),
        ({"tags": 0.5}, "tags=0.5: class 0.5 is neither a name nor an index"),
        ({"age": "old"}, "age=old: 'old' is not a number; give a finite one, such as 50"),
        ({"age": "nan"}, "'nan' is not a number"),
        ({"age": float("inf")}, "inf is not a number"),
        ({"age": True}, "True is not a number"),
        ({"age": []}, "age=[]: there is no value in it; give one, or 'none'"),
        ({"view": ""}, "there is no value in it"),
    ],
)
def test_what_is_refused(asked, message):
    with pytest.raises(ConfigError) as error:
        resolve_conditions(KNOWN, asked, 2)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_without_columns_says_so():
    with pytest.raises(ConfigError, match="age: the model was not trained with it; this model has no named conditions"):
        resolve_conditions(Conditioning(class_names=["cat"]), {"age": 3}, 1)


def test_a_number_outside_the_trained_range_is_announced(caplog):
    resolved(age="17,18,95")
    assert "condition age = 17 lies outside 18 to 95, the range of the training images" in caplog.text
    caplog.clear()
    resolved(age="18,95")
    assert not caplog.text


def test_rows_hold_null_where_nothing_is_given():
    rows = condition_rows(KNOWN, {"age": [63.0, None], "tags": [["edema", "effusion"], []]}, 2)
    assert rows.tolist() == [[3, 1, 0, 1, 0, 63, 0], [3, 0, 0, 0, 0, 0, 1]]
    assert condition_rows(Conditioning(), {}, 2) is None


def test_ends_are_one_value_or_two():
    assert ends_of(KNOWN, {"age": "20,60", "view": "lateral"}, most=2) == {
        "age": (20, 60),
        "view": ("lateral", "lateral"),
    }
    with pytest.raises(ConfigError, match="age=20,60: 2 values; give one value"):
        ends_of(KNOWN, {"age": "20,60"}, most=1)
    with pytest.raises(ConfigError, match="3 values; give one value, or two: from and to"):
        ends_of(KNOWN, {"age": "20,40,60"}, most=2)
    with pytest.raises(ConfigError, match="it is known at one end only"):
        ends_of(KNOWN, {"age": "20,none"}, most=2)


def drawn(model, num=3, **request):
    return model.sample(num=num, steps=3, seed=7, classes=["apple"], **request)


def test_a_picture_depends_on_each_of_its_conditions_and_not_on_its_batch(model):
    asked = {"view": ["frontal", "lateral", None], "tags": [{"edema"}, set(), None], "age": [20, 40, 60]}
    whole = drawn(model, conditions=asked, guidance=2.0)
    same_pictures(drawn(model, conditions=asked, guidance=2.0, batch_size=1), whole)
    for name, value in (("view", "lateral"), ("tags", {"nodule"}), ("age", 90)):
        other = drawn(model, conditions={**asked, name: value}, guidance=2.0)
        assert not torch.allclose(other.latents[0], whole.latents[0], atol=1e-4)


def test_null_values_are_what_is_not_given(model):
    same_pictures(drawn(model, conditions={"age": "none", "view": None}), drawn(model))


def test_the_columns_of_real_images_take_the_place_of_values(model):
    asked = {"view": "lateral", "age": [20, 40, 60]}
    drawing = make_drawing(model, SampleRequest(num=3, conditions=asked, seed=7))
    rows = condition_rows(model.config.conditioning, drawing.conditions, 3)
    told = drawing.model_copy(update={"conditions": {}})
    same_pictures(draw_all(model, told, Given(columns=rows)), draw_all(model, drawing))


def test_guidance_acts_on_the_conditions_that_are_chosen(model):
    asked = {"age": 63, "view": "lateral"}
    by = {
        given: drawn(model, conditions=asked, guidance=3.0, guided_by=[*given]).latents
        for given in (("age",), ("view",), ("age", "view"), ("label",))
    }
    for place, one in enumerate(by.values()):
        for other in list(by.values())[place + 1 :]:
            assert not torch.allclose(one, other, atol=1e-4)
    default = drawn(model, conditions=asked, guidance=3.0)
    assert default.drawing.told == ["label", "view", "age"]
    every = drawn(model, conditions=asked, guidance=3.0, guided_by=["label", "view", "age"])
    assert torch.equal(default.latents, every.latents)
    with pytest.raises(ConfigError, match="guided by tags, which is not given"):
        drawn(model, conditions=asked, guidance=3.0, guided_by=["tags"])
    with pytest.raises(ConfigError, match="guided by 'agee': no such condition; did you mean 'age'"):
        drawn(model, conditions=asked, guidance=3.0, guided_by=["agee"])


def test_a_condition_without_dropout_is_required(kl):
    columns = [COLUMNS[2].model_copy(update={"dropout": 0.0})]
    strict = tiny.model(kl, conditioning={"columns": columns})
    with pytest.raises(ConfigError, match=r"requires the condition age: .* give --condition age=VALUE"):
        strict.sample(num=2)
    with pytest.raises(ConfigError, match="requires the condition age"):
        strict.sample(num=2, conditions={"age": [63, None]})
    assert strict.sample(num=1, conditions={"age": 63}).drawing.told == ["label", "age"]


def test_a_png_holds_its_conditions_and_can_be_made_again(model, tmp_path):
    whole = drawn(model, conditions={"view": ["frontal", "lateral"], "tags": "nodule,edema", "age": "20,none,60"})
    for row, file in enumerate(whole.save(tmp_path)):
        with Image.open(file) as image:
            stored = json.loads(image.text["latentflow"])
        assert stored["conditions"] == {
            "view": [["frontal", "lateral", "frontal"][row]],
            "tags": [["edema", "nodule"]],
            "age": [[20.0, None, 60.0][row]],
        }
        again = Drawing.model_validate({key: stored[key] for key in Drawing.model_fields if key in stored})
        torch.testing.assert_close(draw_all(model, again).latents[0], whole.latents[row], rtol=0, atol=1e-4)
        asked = drawn(model, num=1, conditions=stored["conditions"])
        assert asked.drawing.conditions == {k: v for k, v in stored["conditions"].items() if v != [None]}


def test_a_picture_without_named_conditions_is_written_as_before(model, tmp_path):
    (file,) = drawn(model, num=1).save(tmp_path)
    with Image.open(file) as image:
        assert "conditions" not in json.loads(image.text["latentflow"])


def test_frames_between_two_numbers(model):
    frames = model.interpolate(seeds=(3, 3), classes=["apple"], conditions={"age": "20,60", "tags": "edema"}, num=5)
    assert frames.drawing.conditions == {"tags": [["edema"]] * 5, "age": [20.0, 30.0, 40.0, 50.0, 60.0]}
    one = model.sample(num=1, seed=3, classes=["apple"], conditions={"age": 30, "tags": "edema"})
    torch.testing.assert_close(frames.latents[1], one.latents[0], rtol=0, atol=1e-4)
    assert len(frames.latents.flatten(1).unique(dim=0)) == 5


def test_frames_between_two_labels_blend_velocities(model):
    frames = model.interpolate(seeds=(3, 3), classes=["apple"], conditions={"view": "frontal,lateral"}, num=3)
    ends = [
        model.sample(num=1, seed=3, classes=["apple"], conditions={"view": view}) for view in ("frontal", "lateral")
    ]
    for end, place in zip(ends, (0, 2), strict=True):
        torch.testing.assert_close(frames.latents[place], end.latents[0], rtol=0, atol=1e-4)
    assert frames.drawing.blends[1].conditions == {"view": "lateral"}
    assert int(frames.evaluations[0]) == 2 * int(ends[0].evaluations[0])


def test_frames_are_guided_by_conditions_alone(kl):
    """Also where these are all that a model has, or where it cannot do without them."""
    columns = [COLUMNS[0], COLUMNS[1], COLUMNS[2].model_copy(update={"dropout": 0.0})]
    unlabelled = tiny.model(kl, class_names=(), conditioning={"columns": columns})
    asked = {"view": "frontal,lateral", "tags": "edema;edema,nodule", "age": "20,60"}
    frames = unlabelled.interpolate(seeds=(3, 8), conditions=asked, guidance=2.0, num=3)
    assert frames.drawing.told == ["view", "tags", "age"]
    assert frames.drawing.blends[0].conditions == {"view": "lateral", "tags": ["edema", "nodule"]}
    assert frames.drawing.conditions["age"] == [20.0, 40.0, 60.0]


def test_variations_keep_the_conditions(model):
    assert model.vary(seed=3, num=2, conditions={"age": 30}).drawing.conditions == {"age": [30.0, 30.0]}
    with pytest.raises(ConfigError, match="2 values; give one value"):
        model.vary(seed=3, conditions={"age": "20,60"})


def test_an_inversion_is_undone_under_its_conditions(model):
    picture = Image.new("RGB", (tiny.IMAGE_SIZE,) * 2, (200, 60, 30))
    inversion = model.invert(picture, conditions={"age": 30, "view": "lateral"}, solver="rk4", steps=20)
    assert inversion.drawing.conditions == {"view": ["lateral"], "age": [30.0]}
    assert inversion.round_trip(model).latent_error < 0.01
