"""Conditions and their null values: built in one way, dropped independently, refused if the model lacks them."""

import csv
import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from latentflow.columns import CONDITIONS_OF_IMAGES, Column
from latentflow.errors import ConfigError
from latentflow.model.conditioning import CONDITION_KINDS, CONDITION_NAMES, ColumnCondition, Conditioning, NamedColumn
from latentflow.randomness import ImageRandom
from latentflow.shapes import Condition

ANIMALS = Conditioning(class_names=["cat", "dog", "owl"], label_dropout=0.25)
ALL = Conditioning(
    class_names=["cat", "dog", "owl"],
    label_dropout=0.25,
    inpainting=True,
    inpainting_dropout=0.5,
    map_class_names=["sky", "sea"],
    map_palette=[(0, 0, 255), (0, 255, 0)],
    map_dropout=0.1,
    input_channels=5,
    input_dropout=0.2,
)
LATENTS = (4, 3, 2)  # channels, height, width
FIELDS = {
    "label": ["labels"],
    "inpainting": ["masked_latents", "mask"],
    "semantic_map": ["class_fractions"],
    "input": ["input"],
}
NULLS = {"labels": 3, "masked_latents": 0, "mask": 1, "class_fractions": 0, "input": 0}


def given(num_images: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every condition of `ALL` for some images; no value is null."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"masked_latents": LATENTS, "mask": (1, 3, 2), "class_fractions": (2, 3, 2), "input": (5, 3, 2)}
    drawn = {name: 0.1 + 0.8 * torch.rand(num_images, *shape, generator=generator) for name, shape in shapes.items()}
    return {"labels": torch.randint(3, (num_images,), generator=generator), **drawn}


def is_null(condition: Condition, name: str) -> torch.Tensor:
    """Which images have the null value of a field: [B] bool."""
    return (getattr(condition, name) == NULLS[name]).reshape(len(condition.labels), -1).all(1)


def test_every_field_of_a_condition_belongs_to_one_kind_or_describes_a_variant():
    assert tuple(kind.name for kind in CONDITION_KINDS if kind is not NamedColumn) == CONDITION_NAMES
    assert set(CONDITION_NAMES) <= set(CONDITIONS_OF_IMAGES)
    owned = [field for kind in CONDITION_KINDS for field in kind.fields]
    others = ["augmentation", "span", "guidance"]  # of a variant, and of a student
    assert sorted([*owned, *others]) == sorted(field.name for field in dataclasses.fields(Condition))
    for kind in ALL.kinds.values():
        assert kind.dropout_key in Conditioning.model_fields
        assert len(kind.fields) == len(kind.nulls) == len(kind.shapes((2, *LATENTS)))


def test_required_conditions_are_always_given():
    never = ALL.model_copy(update={"inpainting_dropout": 0.0, "map_dropout": 0.0, "input_dropout": 0.0})
    assert never.required == ["inpainting", "semantic_map", "input"]
    assert never.with_required(["label"]) == list(CONDITION_NAMES)
    assert never.with_required(["label"], among=["label", "inpainting"]) == ["label", "inpainting"]
    assert ALL.with_required(["semantic_map"]) == ["semantic_map"]
    never.require_all(["semantic_map", "inpainting", "input"])
    with pytest.raises(ConfigError, match=r"requires the condition inpainting: .*inpainting_dropout = 0; .* and --map"):
        never.require_all(["semantic_map"])
    with pytest.raises(ConfigError, match=r"requires the condition semantic_map: .*map_dropout = 0; give a map"):
        never.require_all(["inpainting"])
    with pytest.raises(
        ConfigError, match=r"requires the condition input: .*input_dropout = 0; .*`latentflow translate`"
    ):
        never.require_all(["inpainting", "semantic_map"])


def test_the_null_label_is_the_index_after_the_last_class():
    assert ANIMALS.null_label == 3
    built = ANIMALS.build((2, *LATENTS), "cpu")
    assert built.names == ["labels"]
    assert built.labels.tolist() == [3, 3]


def test_what_is_given_is_taken_and_the_rest_is_null():
    full, nothing = ALL.build((2, *LATENTS), "cpu", Condition(**given(2))), ALL.build((2, *LATENTS), "cpu")
    assert full.names == nothing.names == list(NULLS)
    for name, value in given(2).items():
        assert torch.equal(getattr(full, name), value)
        null = getattr(nothing, name)
        assert (null.shape, null.dtype) == (value.shape, value.dtype)
        assert (null == NULLS[name]).all()


@pytest.mark.parametrize("name", NULLS)
def test_one_field_may_be_given_without_the_others(name):
    some = given(2)
    built = ALL.build((2, *LATENTS), "cpu", Condition(**{name: some[name]}))
    assert torch.equal(getattr(built, name), some[name])
    assert all(is_null(built, other).all() for other in NULLS if other != name)


def test_fields_get_the_dtype_of_training():
    halves = {name: value.half() if value.is_floating_point() else value.int() for name, value in given(2).items()}
    built = ALL.build((2, *LATENTS), "cpu", Condition(**halves))
    assert [getattr(built, name).dtype for name in built.names] == [torch.int64] + [torch.float32] * 4


@pytest.mark.parametrize(
    ("conditions", "name", "said"),
    [
        (Conditioning(), "labels", "it is unconditional"),
        (ANIMALS, "mask", "not trained with the condition inpainting; it is conditioned on label"),
        (ANIMALS, "masked_latents", "not trained with the condition inpainting; it is conditioned on label"),
        (
            Conditioning(inpainting=True),
            "class_fractions",
            "the condition semantic_map; it is conditioned on inpainting",
        ),
        (ANIMALS, "input", "not trained with the condition input; it is conditioned on label"),
    ],
)
def test_a_condition_that_the_model_does_not_have_is_refused(conditions, name, said):
    with pytest.raises(ConfigError, match=said):
        conditions.build((2, *LATENTS), "cpu", Condition(**{name: given(2)[name]}))


def test_the_numbers_of_variants_are_zero_unless_training_gives_them():
    """They are no condition: nothing drops them, guides by them or asks for them."""
    varied = ALL.model_copy(update={"augmentation": ["zoom", "turn"]})
    assert varied.kinds.keys() == ALL.kinds.keys()
    assert varied.build((2, *LATENTS), "cpu").augmentation.tolist() == [[0, 0], [0, 0]]
    numbers = torch.tensor([[0.5, -1.0], [0.0, 0.25]])
    full = varied.build((2, *LATENTS), "cpu", Condition(**given(2), augmentation=numbers))
    assert torch.equal(full.augmentation, numbers)
    assert torch.equal(varied.without(full, CONDITION_NAMES).augmentation, numbers)
    assert ALL.build((2, *LATENTS), "cpu").augmentation is None
    with pytest.raises(ConfigError, match="trained without augmented variants"):
        ALL.build((2, *LATENTS), "cpu", Condition(augmentation=numbers))


def test_require_and_can_guide():
    dropout = [("label", 0.25), ("inpainting", 0.5), ("semantic_map", 0.1), ("input", 0.2)]
    assert list(ALL.dropout.items()) == dropout
    for name in CONDITION_NAMES:
        ALL.require(name)
        with pytest.raises(ConfigError, match=f"the condition {name}; it is unconditional"):
            Conditioning().require(name)
    assert ALL.can_guide == list(CONDITION_NAMES)
    assert ALL.model_copy(update={"inpainting_dropout": 0}).can_guide == ["label", "semantic_map", "input"]
    assert Conditioning(class_names=["cat"], label_dropout=0.0, inpainting=True).can_guide == ["inpainting"]
    assert Conditioning().can_guide == []


def test_each_condition_is_dropped_on_its_own_at_its_rate():
    num_images = 4000
    dropped = ALL.draw_dropped(ImageRandom.of_seeds("test", range(num_images)))
    assert list(dropped) == list(CONDITION_NAMES)
    for name, share in ALL.dropout.items():  # standard errors of binomials
        assert abs(dropped[name].double().mean() - share) < 4 * (share * (1 - share) / num_images) ** 0.5
    for one, other in combinations(CONDITION_NAMES, 2):
        together = ALL.dropout[one] * ALL.dropout[other]
        share = (dropped[one] & dropped[other]).double().mean()
        assert abs(share - together) < 4 * (together * (1 - together) / num_images) ** 0.5
    again = ALL.draw_dropped(ImageRandom.of_seeds("test", [17, 5]))
    assert all(torch.equal(again[name], dropped[name][[17, 5]]) for name in dropped)


def test_a_rate_of_zero_drops_nothing_and_draws_as_many_numbers():
    """So that the noise of a run does not depend on what is dropped in it."""
    rates = {f"{name}_dropout": 0.0 for name in ("label", "inpainting", "map", "input")}
    never = ALL.model_copy(update=rates)
    streams = [ImageRandom.of_seeds("test", range(500)) for _ in range(2)]
    assert not any(rows.any() for rows in never.draw_dropped(streams[0]).values())
    ALL.draw_dropped(streams[1])
    assert torch.equal(*(random.normal(2) for random in streams))


@pytest.mark.parametrize("kinds", [[], ["label"], ["inpainting"], ["semantic_map"], ["input"], list(CONDITION_NAMES)])
def test_dropping_puts_nulls_in_those_rows_and_nowhere_else(kinds):
    conditions = ALL.build((4, *LATENTS), "cpu", Condition(**given(4)))
    rows = {kind: torch.arange(4) % (2 + place) == 0 for place, kind in enumerate(kinds)}
    changed = ALL.drop(conditions, rows)
    for kind, names in FIELDS.items():
        expected = rows.get(kind, torch.zeros(4, dtype=torch.bool))
        for name in names:
            assert torch.equal(is_null(changed, name), expected)
            assert torch.equal(getattr(changed, name)[~expected], getattr(conditions, name)[~expected])


def test_without_all_conditions_everything_is_null():
    full, nothing = ALL.build((2, *LATENTS), "cpu", Condition(**given(2))), ALL.build((2, *LATENTS), "cpu")
    twin = ALL.without(full, CONDITION_NAMES)
    assert all(torch.equal(getattr(twin, name), getattr(nothing, name)) for name in NULLS)
    partly = ALL.without(full, ["inpainting"])
    assert is_null(partly, "masked_latents").all()
    assert is_null(partly, "mask").all()
    assert torch.equal(partly.labels, full.labels)
    assert torch.equal(partly.class_fractions, full.class_fractions)
    assert Conditioning().without(Condition(), []) == Condition()


def test_an_unconditional_model_has_empty_conditions():
    nothing = Conditioning()
    assert nothing.build((3, *LATENTS), "cpu").names == []
    assert nothing.draw_dropped(ImageRandom.of_seeds("test", [0])) == {}
    assert nothing.drop(Condition(), {}).names == []


def test_maps_need_a_colour_for_each_class():
    with pytest.raises(ValidationError, match="1 colours for 2 map classes"):
        Conditioning(map_class_names=["sky", "sea"], map_palette=[(0, 0, 0)])
    with pytest.raises(ValidationError, match="given twice: sky"):
        Conditioning(map_class_names=["sky", "sky"], map_palette=[(0, 0, 0), (1, 1, 1)])


@pytest.mark.parametrize(
    ("given", "index"),
    [("dog", 1), (2, 2), ("#0", 0), (" owl ", 2), (" #1 ", 1), (np.int64(1), 1), (torch.tensor(2), 2)],
)
def test_a_class_is_found_by_name_or_index(given, index):
    assert ANIMALS.class_index(given) == index


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("dgo", "did you mean 'dog'"),
        ("Dog", "did you mean 'dog'"),
        (3, "class #3 does not exist; this model has the classes #0 to #2"),
        (-1, "class #-1 does not exist"),
        ("#3", "class #3 does not exist"),
        ("1.5", "no class is named '1.5'"),
        ("2", "no class is named '2'; the class with that index, 'owl', is written '#2'"),
        ("02", "'owl', is written '#2'"),
        ("3", "no class is named '3'; valid: cat, dog, owl"),
        ("", "no class is named ''"),
        (1.0, "class 1.0 is neither a name nor an index"),
        (True, "class True is neither a name nor an index"),
        (None, "class None is neither a name nor an index"),
    ],
)
def test_a_class_that_does_not_exist_is_refused_with_the_nearest(given, message):
    with pytest.raises(ConfigError, match=message):
        ANIMALS.class_index(given)


@pytest.mark.parametrize(
    ("given", "indices"),
    [
        ("cat", [0]),
        (2, [2]),
        (["owl", "cat", "owl"], [2, 0, 2]),
        (("#2", "#0"), [2, 0]),
        ([2, "#0"], [2, 0]),
        (range(2), [0, 1]),
        (torch.tensor([2, 1]), [2, 1]),
        ([], []),
        ("none", []),
        (["none"], []),
        ("#none", []),
    ],
)
def test_a_text_is_one_class_and_a_list_is_all_names_or_all_indices(given, indices):
    assert ANIMALS.class_indices(given) == indices


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cat", "#2"], "the classes 'cat' and '#2' in one list; give all by name, or all by index"),
        ([2, "cat"], "the classes 'cat' and '#2' in one list"),
        (["cat", "none"], "no class is named 'none'"),
        ("cat,dog", "no class is named 'cat,dog'"),
    ],
)
def test_names_and_indices_are_never_mixed(given, message):
    with pytest.raises(ConfigError, match=message):
        ANIMALS.class_indices(given)


def test_a_name_is_compared_composed_and_a_class_may_look_like_a_notation():
    odd = Conditioning(class_names=["#1", "none", "Zu\u0308rich", "Doe, Jane", " padded"])
    assert odd.class_indices("#1") == [0]
    assert odd.class_indices(["#2", "#3"]) == [2, 3]
    assert odd.class_indices(["#1", "none"]) == [0, 1]  # both are names
    assert (odd.class_indices("none"), odd.class_indices("#none")) == ([1], [])
    assert odd.class_indices(["Z\u00fcrich", "Doe, Jane", " padded"]) == [2, 3, 4]
    with pytest.raises(ConfigError, match="'#1' and '#4' in one list"):
        odd.class_indices(["#1", "#4"])


@pytest.mark.parametrize("given", [b"cat", ["cat", None], [None, 1], ["cat", b"dog"], [["cat"]], 1.0, True])
def test_a_class_is_a_text_or_a_whole_number(given):
    with pytest.raises(ConfigError, match="is neither a name nor an index; give a text or a whole number"):
        ANIMALS.class_indices(given)


@pytest.mark.parametrize("given", [{"cat", "dog"}, frozenset({0})])
def test_classes_have_an_order(given):
    with pytest.raises(ConfigError, match="a set has no order; give a list"):
        ANIMALS.class_indices(given)


@pytest.mark.parametrize("name", ["tench, Tinca tinca", 'a "b", c', '"quoted"'])
def test_a_name_is_shown_as_a_list_asks_for_it(name):
    """What the message shows, copied into --classes, asks for that class."""
    model = Conditioning(class_names=["cat", name, "007"])
    with pytest.raises(ConfigError, match="no class is named") as refused:
        model.class_indices(name.split(",")[:1] if "," in name else ["xyz"])
    shown = next(csv.reader([str(refused.value).rsplit(": ", 1)[1]], skipinitialspace=True, strict=True))
    assert name in shown
    assert 1 in model.class_indices(shown)


def test_an_unconditional_model_has_no_class_to_ask_for():
    with pytest.raises(ConfigError, match="class 'cat': this model has no classes; leave the classes out"):
        Conditioning().class_index("cat")


def test_class_names_must_differ():
    with pytest.raises(ValidationError, match="given twice: cat"):
        Conditioning(class_names=["cat", "dog", "cat"])


def test_a_text_is_a_name_where_classes_are_called_by_numbers():
    """Folders 1, 0, 2 are the classes of index 0, 1, 2."""
    digits = Conditioning(class_names=["1", "0", "2"])
    assert digits.class_indices([0, 1, 2]) == digits.class_indices(["#0", "#1", "#2"]) == [0, 1, 2]
    assert digits.class_indices(["0", "1", "2"]) == [1, 0, 2]


COLUMNS = [
    ColumnCondition(name="view", kind="label", class_names=["frontal", "lateral"], dropout=0.25),
    ColumnCondition(name="tags", kind="labels", class_names=["a", "b", "c"], dropout=0.5),
    ColumnCondition(name="age", kind="number", dropout=0.0),
]
WITH_COLUMNS = ALL.model_copy(update={"columns": COLUMNS})
ROWS = torch.tensor([[1.0, 1, 0, 1, 0, 63, 0], [0, 0, 0, 0, 0, 40, 0]])
NULL_ROW = [2, 0, 0, 0, 1, 0, 1]
NULL_OF = {"view": [0], "tags": [1, 2, 3, 4], "age": [5, 6]}


def test_each_column_is_a_condition_of_its_own_behind_the_others():
    assert list(WITH_COLUMNS.kinds) == [*CONDITION_NAMES, "view", "tags", "age"]
    assert WITH_COLUMNS.dropout == {**ALL.dropout, "view": 0.25, "tags": 0.5, "age": 0.0}
    assert WITH_COLUMNS.required == ["age"]
    assert WITH_COLUMNS.can_guide == [*CONDITION_NAMES, "view", "tags"]
    assert WITH_COLUMNS.with_required(["tags"]) == ["tags", "age"]


def test_columns_do_not_move_the_random_numbers_of_the_other_conditions():
    draws = [
        conditioning.draw_dropped(ImageRandom.at(0, "step", torch.arange(64))) for conditioning in (ALL, WITH_COLUMNS)
    ]
    for name in CONDITION_NAMES:
        assert torch.equal(draws[0][name], draws[1][name])
    assert 0 < draws[1]["tags"].sum() < 64
    assert not draws[1]["age"].any()


def test_columns_that_are_not_given_are_null():
    built = WITH_COLUMNS.build((2, *LATENTS), "cpu", Condition(**given(2)))
    assert built.columns.tolist() == [NULL_ROW] * 2
    assert torch.equal(WITH_COLUMNS.build((2, *LATENTS), "cpu", Condition(columns=ROWS)).columns, ROWS)


@pytest.mark.parametrize("name", NULL_OF)
def test_dropping_a_column_leaves_the_others(name):
    built = WITH_COLUMNS.build((2, *LATENTS), "cpu", Condition(columns=ROWS))
    own = NULL_OF[name]
    expected = ROWS.clone()
    expected[1, own] = torch.tensor(NULL_ROW).float()[own]
    assert torch.equal(WITH_COLUMNS.drop(built, {name: torch.tensor([False, True])}).columns, expected)
    expected[0, own] = expected[1, own]
    assert torch.equal(WITH_COLUMNS.without(built, [name]).columns, expected)
    assert torch.equal(built.columns, ROWS)


def test_columns_of_a_model_without_are_refused():
    with pytest.raises(ConfigError, match="not trained with the condition columns; it is conditioned on label"):
        ANIMALS.build((2, *LATENTS), "cpu", Condition(columns=ROWS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": [COLUMNS[0], COLUMNS[0]]}, "two columns are called 'view'"),
        ({"columns": [{"name": "label", "kind": "number"}]}, "the name of a condition that is no column"),
        ({"columns": [{"name": "view", "kind": "label"}]}, "column view: 0 classes"),
        (
            {"columns": [{"name": "view", "kind": "label", "class_names": ["a"], "images_per_class": [1, 2]}]},
            "2 counts of images for 1 classes",
        ),
        ({"columns": [{"name": "age", "kind": "number", "deviation": 0}]}, "greater than 0"),
    ],
)
def test_columns_that_contradict_themselves(changes, message):
    with pytest.raises(ValidationError, match=message):
        Conditioning(**changes)


def test_data_must_have_the_columns_of_the_model():
    own = [one.column for one in COLUMNS]
    WITH_COLUMNS.require_columns([*own, Column("more", "number")], "scans")
    with pytest.raises(ConfigError, match="scans has no column 'age', which the model was trained with; valid: view"):
        WITH_COLUMNS.require_columns(own[:2], "scans")
    other = Column("view", "label", ("front", "side"))
    with pytest.raises(ConfigError, match=r"the column view is a label \(front, side\), but the model knows a label"):
        WITH_COLUMNS.require_columns([other, *own[1:]], "scans")


def test_descriptions_and_examples_of_columns():
    assert [one.describe() for one in COLUMNS] == ["label: frontal, lateral", "labels: a, b, c", "number"]
    assert [one.example for one in COLUMNS] == ["view=frontal", "tags=a", "age=0"]
    known = COLUMNS[2].model_copy(update={"low": 18.0, "high": 95.5, "mean": 51.27})
    assert (known.describe(), known.example) == ("number, 18 to 95.5", "age=51.3")
