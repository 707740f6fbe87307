"""File names of pictures: the class's name, safe on every file system, and no two alike."""

from __future__ import annotations

import unicodedata

import pytest

from latentflow.sampling.drawing import Blend, Drawing
from latentflow.sampling.naming import file_names, picture_caption, picture_facts, picture_name

NAMES = ("cat", "dog", "and/or", "owl")


@pytest.mark.parametrize(
    ("of", "name"),
    [
        ({"labels": [1]}, "dog_seed-00000017.png"),
        ({"labels": [2]}, "and_or~2_seed-00000017.png"),
        ({}, "seed-00000017.png"),
        ({"blends": [Blend(seed=18, weight=0.25)]}, "seed-00000017_to-seed-00000018_at-0.250.png"),
        (
            {"labels": [1], "blends": [Blend(seed=17, weight=0.5, label=3)]},
            "dog_seed-00000017_to-owl_at-0.500.png",
        ),
    ],
)
def test_a_picture_is_called_by_class_and_seed(of, name):
    conditions = ["label"] if "labels" in of else []
    assert picture_name(Drawing(seeds=[17], told=conditions, **of), NAMES) == name


def test_a_picture_says_its_classes_by_name():
    request = Drawing(seeds=[17], labels=[2], told=["label"], blends=[Blend(seed=17, weight=0.5, label=3)])
    facts = picture_facts(request, NAMES, {"model": "m"})
    assert (facts["class_name"], facts["to_class_name"], facts["drawn_by"]) == ("and/or", "owl", {"model": "m"})
    assert Drawing.model_validate({name: facts[name] for name in Drawing.model_fields if name in facts}) == request


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("Blåbär 3", "Blåbär 3"),
        ("猫", "猫"),
        ("#3", "#3"),
        ("Doe, Jane", "Doe, Jane"),
        ("v1.5", "v1.5"),
        ("../../etc", "__.._etc~0"),
        (".hidden", "_hidden~0"),
        ("-rf", "_rf~0"),
        ("end. ", "end~0"),
        ("a\\b:c*d?", "a_b_c_d_~0"),
        ("line\nbreak\x1b[2J", "line_break_[2J~0"),
        ("latin\udce9", "latin_~0"),
        ("CON", "_CON~0"),
        ("nul.txt", "_nul.txt~0"),
        ("console", "console"),
        ("", "_~0"),
        ("cat~1", "cat~1~0"),
        (unicodedata.normalize("NFD", "Zürich"), "Zürich~0"),
    ],
)
def test_a_class_becomes_a_file_name(name, safe, tmp_path):
    (found,) = file_names((name,))
    assert found == safe
    (tmp_path / f"{found}_seed-0.png").touch()
    assert [file.name for file in tmp_path.iterdir()] == [f"{found}_seed-0.png"]


def test_file_names_never_collide():
    names = ("Cat", "cat", "dog", "a/b", "a:b", "a_b", "x~3", "STRASSE", "straße")
    found = file_names(names)
    assert found == ("Cat~0", "cat~1", "dog", "a_b~3", "a_b~4", "a_b~5", "x~3~6", "STRASSE~7", "straße~8")
    assert len({name.casefold() for name in found}) == len(names)


def test_long_names_stay_short_and_whole():
    long = ("é" * 200 + "a", "é" * 200 + "b")
    found = file_names(long)
    assert len(set(found)) == 2
    blends = [Blend(seed=2**62, weight=1, label=1)]
    request = Drawing(seeds=[2**63 - 1], labels=[0], told=["label"], blends=blends)
    assert len(picture_name(request, long).encode()) <= 255


def test_a_caption_names_classes_and_conditions():
    conditions = {"age": [63.0], "view": ["lateral"], "tags": [["edema", "nodule"]], "finding": [[]], "dose": [None]}
    told = ["label", *conditions]
    drawing = Drawing(seeds=[1], labels=[3], told=told, conditions=conditions)
    assert picture_caption(drawing, NAMES) == "owl, age 63, view lateral, tags edema + nodule, finding empty"
    assert picture_caption(Drawing(seeds=[1]), NAMES) == ""
