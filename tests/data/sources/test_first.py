"""The first images of a source."""

import numpy as np
import pytest

from latentflow.data.sources.images import open_images
from latentflow.errors import DataError
from tests.data.sources.pictured import names, pack, picture, save


@pytest.mark.parametrize("packed", [False, True])
def test_first_images_are_taken_evenly_from_the_classes(labelled, tmp_path, packed):
    save(labelled / "dog" / "a.png", picture(9))
    path = pack(labelled, tmp_path / "labelled.zip") if packed else labelled
    everything = {item.name: item for item in open_images(path, 16)}
    for first, wanted in (
        (3, ["cat/y.png", "dog/a.png", "emu/x.png"]),
        (4, ["cat/y.png", "cat/z.PNG", "dog/a.png", "emu/x.png"]),
        (5, ["cat/y.png", "cat/z.PNG", "dog/a.png", "dog/b.png", "emu/x.png"]),
    ):
        source = open_images(path, 16, first=first)
        assert names(source) == wanted and source.class_names == ("cat", "dog", "emu")
        for index, item in enumerate(source):
            same = everything[item.name]
            assert item.label == same.label == source.label(index) and np.array_equal(item.pixels, same.pixels)
        assert source.description == f"first {first} of 6 images in 3 classes from {path.name}"
        with pytest.raises(IndexError):
            source[first]
    with pytest.raises(DataError, match="first = 2 of 3 classes; give one for each class, or more"):
        open_images(path, 16, first=2)


def test_first_images_without_classes_are_those_by_name(tmp_path):
    for i in (2, 10, 1):
        save(tmp_path / f"{i}.png", picture(i))
    assert names(open_images(tmp_path, 8, first=2)) == ["1.png", "10.png"]


def test_first_images_have_their_own_maps(mapped):
    source, everything = open_images(mapped, 16, first=2), open_images(mapped, 16)
    assert names(source) == ["town/a.jpg", "wood/deep/c.PNG"]
    for item, same in zip(source, (everything[0], everything[2]), strict=True):
        assert np.array_equal(item.semantic_map, same.semantic_map)


def test_fingerprint_of_first_images_is_that_of_a_folder_of_them(labelled):
    found = {first: open_images(labelled, 8, first=first).fingerprint() for first in (3, 4, 5)}
    assert len(set(found.values())) == 3
    assert found[5] == open_images(labelled, 8).fingerprint()
    (labelled / "dog" / "deep" / "er" / "a.png").unlink()
    assert found[4] == open_images(labelled, 8).fingerprint()


def test_strict_looks_at_the_first_images_only(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", picture(i))
    (tmp_path / "9.png").write_bytes(b"broken")
    assert len(open_images(tmp_path, 8, first=3, strict=True)) == 3
    with pytest.raises(DataError, match=r"9.png"):
        open_images(tmp_path, 8, strict=True)


def test_first_of_the_built_in_dataset_is_a_smaller_one():
    source = open_images("synthetic:40:3", 16, first=4)
    assert source.fingerprint() == open_images("synthetic:4:3", 16).fingerprint() and len(source) == 4


@pytest.mark.parametrize("where", ["folder", "synthetic:5"])
def test_first_must_be_there(labelled, where):
    path = labelled if where == "folder" else where
    for first in (0, -1):
        with pytest.raises(DataError, match=f"first must be at least 1 image, got {first}; leave it out for all 5"):
            open_images(path, 8, first=first)
    with pytest.raises(DataError, match=f"first = 6, but {path} has 5 images; give at most 5"):
        open_images(path, 8, first=6)
