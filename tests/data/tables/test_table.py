import math

import pytest

from latentflow.columns import Column
from latentflow.data.tables.table import ImageTable, columns_of, label_column, labels_of
from latentflow.errors import DataError

PATIENTS = ImageTable(
    "patients.csv",
    {
        "file": ["a.png", "b.png", "c.png", "d.png"],
        "age": ["63", "", "7.5", "nan"],
        "view": ["lateral", "frontal", "", "lateral"],
        "findings": ["nodule|effusion", "", "effusion", "nodule; mass"],
        "site": ["10", "9", "10", "9"],
    },
    lambda row: f"line {row + 2}",
)


def test_columns_are_read_by_kind():
    columns, values = columns_of(PATIENTS, ["age:number", "view:label", "findings:labels"])
    assert columns == (
        Column("age", "number"),
        Column("view", "label", ("frontal", "lateral")),
        Column("findings", "labels", ("effusion", "mass", "nodule")),
    )
    assert values[0] == [63.0, None, 7.5, None] and isinstance(values[0][0], float)
    assert values[1] == [1, 0, None, 1]
    assert values[2] == [frozenset({0, 2}), None, frozenset({0}), frozenset({1, 2})]


def test_kinds_follow_from_the_cells():
    table = ImageTable(
        "t", {"a": [1, 2.5, None], "b": [["x"], [], None], "c": ["1", "two", ""], "d": [True, False, None]}
    )
    columns, values = columns_of(table, ["a", "b", "c", "d"])
    assert [column.kind for column in columns] == ["number", "labels", "label", "label"]
    assert values[0] == [1.0, 2.5, None]
    assert values[1] == [frozenset({0}), frozenset(), None]  # an empty list is known: none of them
    assert columns[2].class_names == ("1", "two") and columns[3].class_names == ("false", "true")


def test_what_the_file_says_comes_first():
    table = ImageTable("t", {"a": ["1", "2"]}, kinds={"a": "label"})
    assert columns_of(table, ["a"])[0] == (Column("a", "label", ("1", "2")),)
    assert columns_of(table, ["a:number"])[0] == (Column("a", "number"),)


def test_labels_are_sorted_by_name_as_folders_are():
    class_names, labels = labels_of(PATIENTS, "site")
    assert class_names == ("10", "9") and labels.tolist() == [0, 1, 0, 1] and labels.dtype == "int32"
    assert labels_of(ImageTable("t", {"a": [3, 3.0, "3"]}), "a")[0] == ("3",)


def test_the_column_of_labels_is_found_by_its_name():
    cells = {"file": ["a"], "Class": ["x"], "label": ["y"], "age": ["1"]}
    assert label_column(ImageTable("t", cells), None) == "label"
    assert label_column(ImageTable("t", cells), None, columns=["label"]) == "Class"
    assert label_column(ImageTable("t", cells), "age") == "age"
    assert label_column(PATIENTS, None) is None
    stated = ImageTable(
        "t", {"label": [1], "breed": ["pug"]}, kinds={"label": "number", "breed": "label"}, classes={"breed": ("pug",)}
    )
    assert label_column(stated, None) == "breed"


def test_rows_can_be_taken_in_another_order():
    some = PATIENTS.taken([3, 0])
    assert some.cells["age"] == ["nan", "63"] and some.place(0) == "line 5"


def test_classes_without_an_image_are_named(caplog):
    table = ImageTable("t", {"a": ["x", "x"]}, kinds={"a": "label"}, classes={"a": ("x", "ghost")})
    assert labels_of(table, "a")[0] == ("x",)
    assert "1 classes of the column 'a' have no image and are left out (ghost)" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("agee", "has no column 'agee', which --columns names; did you mean 'age'?"),
        ("age:numbr", "unknown kind 'numbr'; did you mean 'number'?"),
        ("view:number", "patients.csv, line 2: the column 'view' holds 'lateral', which is not a finite number"),
    ],
)
def test_columns_that_cannot_be_read(wanted, words):
    with pytest.raises(DataError) as error:
        columns_of(PATIENTS, [wanted])
    assert words in str(error.value)


@pytest.mark.parametrize("cell", [math.inf, "-inf", "1e999"])
def test_infinite_numbers_are_refused(cell):
    with pytest.raises(DataError, match=r"row 0: the column 'a' holds .* not a finite number"):
        columns_of(ImageTable("t", {"a": [cell]}), ["a:number"])


def test_a_row_without_its_class_is_refused():
    with pytest.raises(DataError, match=r"line 4: the column 'view' is empty; .* --columns view:label"):
        labels_of(PATIENTS, "view")
    with pytest.raises(DataError, match=r"row 0: the column 'a' holds \['x', 'y'\], .* --columns a:labels"):
        labels_of(ImageTable("t", {"a": [["x", "y"]]}), "a")
    with pytest.raises(DataError, match="--label-column names; did you mean 'view'"):
        labels_of(PATIENTS, "vieww")


def test_known_classes_tell_the_column():
    cells = {"file": ["a", "b"], "label": ["x", "y"], "breed": ["pug", "pug"], "other": ["", "pug"]}
    assert label_column(ImageTable("t", cells), None, known=["beagle", "pug"]) == "breed"
    assert label_column(ImageTable("t", cells), "label", known=["pug"]) == "label"
    assert label_column(ImageTable("t", cells), None, columns=["breed"], known=["pug"]) == "label"
