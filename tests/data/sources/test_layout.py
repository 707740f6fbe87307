"""Which files of a folder are images, and which folders are classes, splits or maps."""

import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.data.items import ImageSource
from latentflow.data.pictures.crop import center_crop
from latentflow.data.sources.images import open_images
from latentflow.data.sources.readable import readable
from latentflow.errors import DataError
from tests.data.sources.pictured import names, pack, picture, save


def test_class_folders_become_sorted_labels(labelled):
    source = open_images(labelled, 16)
    assert isinstance(source, ImageSource)
    assert source.class_names == ("cat", "dog", "emu")
    assert names(source) == ["cat/y.png", "cat/z.PNG", "dog/b.png", "dog/deep/er/a.png", "emu/x.png"]
    assert [item.label for item in source] == [0, 0, 1, 1, 2]
    assert source.description == f"5 images in 3 classes from {labelled.name}"
    assert np.array_equal(source[0].pixels, center_crop(picture(3), 16))
    assert source[0].semantic_map is None and source.map_class_names == source.map_palette == ()


def test_flat_folder_is_unlabelled(tmp_path):
    for name in ("b.png", "a.jpg"):
        save(tmp_path / name)
    (tmp_path / "no images here").mkdir()
    source = open_images(str(tmp_path), 8)
    assert source.class_names == () and names(source) == ["a.jpg", "b.png"]
    assert source[0].label is None
    assert source.description == f"2 images from {tmp_path.name}"


@pytest.mark.parametrize("wrapper", ["train", "data/train"])
def test_single_sub_folder_is_descended_into(tmp_path, wrapper):
    for name in ("cat/1.png", "dog/1.png"):
        save(tmp_path / wrapper / name)
    source = open_images(tmp_path, 8)
    assert source.class_names == ("cat", "dog")
    assert names(source) == ["cat/1.png", "dog/1.png"]
    assert source.fingerprint() == open_images(tmp_path / wrapper, 8).fingerprint()


def test_a_prefix_of_names_is_no_wrapper(tmp_path):
    for name in ("class1/1.png", "class12/1.png"):
        save(tmp_path / name)
    assert open_images(tmp_path, 8).class_names == ("class1", "class12")


def test_images_next_to_class_folders_are_refused(labelled):
    save(labelled / "loose.png")
    with pytest.raises(DataError, match=r"1 images next to 3 sub-folders with images \(cat, dog, emu\): put every"):
        open_images(labelled, 8)


def test_splits_are_not_taken_for_classes(tmp_path):
    for name in ("train/cat/1.png", "test/cat/1.png"):
        save(tmp_path / name)
    with pytest.raises(DataError, match="holds the splits test, train, not classes: give one of them"):
        open_images(tmp_path, 8)


@pytest.mark.parametrize(
    "folders",
    [
        ["train2017", "val2017", "test2017"],
        ["Train", "cat"],
        ["training_set", "test_set"],
        ["train-00", "train-01"],
        ["val_2014", "a", "b"],
        ["test1", "train"],
        ["unlabeled2017", "dog"],
        ["holdout", "dev"],
        ["trainA", "trainB", "testA", "testB"],
        ["imagesTr", "imagesTs"],
        ["test", "x"],
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_folders_named_as_splits_are_no_classes(tmp_path, folders, packed):
    for name in folders:
        save(tmp_path / "in" / name / "1.png")
    path = pack(tmp_path / "in", tmp_path / "in.zip") if packed else tmp_path / "in"
    with pytest.raises(DataError, match=r"holds the splits .*, not classes: give one of them, such as ") as refused:
        open_images(path, 8)
    given = str(refused.value).partition("such as ")[2].partition(",")[0]
    assert open_images(Path(given.replace(".zip", "")), 8).class_names == ()
    if "rename it" in str(refused.value):
        old, new = re.search(r"if (\S+) is a class .* to (\S+)$", str(refused.value)).groups()
        (tmp_path / "in" / old).rename(tmp_path / "in" / new)
        assert new in open_images(tmp_path / "in", 8).class_names


@pytest.mark.parametrize(
    ("pictures", "maps"),
    [
        ("JPEGImages", "SegmentationClass"),
        ("images", "labels"),
        ("leftImg8bit", "gtFine"),
        ("imgs", "ground_truth"),
        ("Images", "Masks"),
        ("image", "SegmentationClassPNG"),
        ("rgb", "annotations"),
    ],
)
def test_pictures_and_their_maps_are_no_classes(tmp_path, pictures, maps):
    top = tmp_path / "set" / "VOC2012"
    save(top / pictures / "1.jpg", picture(0))
    save(top / maps / "1.png", Image.fromarray(np.zeros((40, 40), np.uint8)))
    save(top / "SegmentationObject" / "1.png", picture(0))
    with pytest.raises(DataError, match=f"holds pictures and their maps .*{pictures}, unpacked") as refused:
        open_images(tmp_path, 8)
    source = open_images(str(refused.value).partition("give ")[2].partition(",")[0], 8)
    assert source.class_names == () and len(source) == 1
    shutil.rmtree(top / "SegmentationObject")
    (top / pictures).rename(top / "images_")
    (top / maps).rename(top / "masks")
    (top / "images_").rename(top / "images")
    (top / "classes.json").write_text('["a", "b"]')
    assert open_images(tmp_path, 8).map_class_names == ("a", "b")


def test_classes_may_be_named_like_pictures_or_like_maps(tmp_path):
    for folder in ("labels", "bottles"):
        save(tmp_path / "a" / folder / "1.png")
    for folder in ("photos", "drawings"):
        save(tmp_path / "b" / folder / "1.png")
    assert open_images(tmp_path / "a", 8).class_names == ("bottles", "labels")
    assert open_images(tmp_path / "b", 8).class_names == ("drawings", "photos")


def test_splits_inside_classes_are_said(tmp_path, caplog):
    for name in ("cat/train/1.png", "cat/val/2.png", "dog/train/1.png", "dog/val/2.png"):
        save(tmp_path / name)
    assert open_images(tmp_path, 8).class_names == ("cat", "dog")
    assert "the splits train, val inside the class folders are merged into one set" in caplog.text


@pytest.mark.usefixtures("bare")
def test_pictures_next_to_those_with_maps_are_noticed(mapped, caplog):
    (mapped / "images" / "IMG_1.HEIC").write_bytes(b"")
    assert open_images(mapped, 16).map_class_names
    assert "1 files are skipped: 1 .heic (save them as JPEG or PNG, or install latentflow[data])" in caplog.text


@pytest.mark.usefixtures("bare")
def test_maps_in_a_format_that_is_not_read_are_named(tmp_path):
    save(tmp_path / "images" / "1.png")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "1.heic").write_bytes(b"")
    (tmp_path / "classes.json").write_text('["a", "b"]')
    with pytest.raises(
        DataError,
        match=r"images in both that are read \(1 \.heic \(save them as .*, or install latentflow\[data\]\)\)",
    ):
        open_images(tmp_path, 8)


@pytest.mark.parametrize("name", ["trainer", "devil", "valley", "test tube", "evaluate", "trainstation"])
def test_classes_that_begin_like_a_split(tmp_path, name):
    for folder in (name, "other"):
        save(tmp_path / folder / "1.png")
    assert open_images(tmp_path, 8).class_names == tuple(sorted([name, "other"]))


def test_imagenet_is_its_train_folder(tmp_path):
    pixels = Image.fromarray(np.asarray(picture(0)))
    top = tmp_path / "imagenet" / "train"
    save(top / "n02119789" / "n02119789_1.JPEG", pixels, format="JPEG")
    save(top / "n01440764" / "n01440764_10026.JPEG", pixels.convert("CMYK"), format="JPEG")
    save(top / "n01440764" / "n01440764_10027.JPEG", pixels, format="PNG")  # ImageNet has one: n02105855_2933.JPEG
    save(tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG", pixels, format="JPEG")
    source = open_images(top, 16)
    assert source.class_names == ("n01440764", "n02119789")
    assert [(item.name, item.label) for item in source] == [
        ("n01440764/n01440764_10026.JPEG", 0),
        ("n01440764/n01440764_10027.JPEG", 0),
        ("n02119789/n02119789_1.JPEG", 1),
    ]
    assert np.array_equal(source[1].pixels, center_crop(pixels, 16))
    with Image.open(top / "n01440764" / "n01440764_10026.JPEG") as cmyk:
        assert cmyk.mode == "CMYK"
        assert np.array_equal(source[0].pixels, center_crop(cmyk.convert("RGB"), 16))
    with pytest.raises(DataError) as refused:
        open_images(tmp_path / "imagenet", 16)
    assert str(refused.value) == (
        f"{tmp_path / 'imagenet'} holds the splits train, val, not classes: give one of them, such as {top}, "
        "unpacked if need be"
    )


def test_the_remedy_for_splits_is_below_what_wraps_them(tmp_path):
    for name in ("train/n1/1.JPEG", "train/n2/1.JPEG", "val/1.JPEG", "test/1.JPEG"):
        save(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / name)
    train = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "train"
    with pytest.raises(DataError, match=f"holds the splits test, train, val, .* such as {train}, unpacked"):
        open_images(tmp_path, 8)
    assert open_images(train, 8).class_names == ("n1", "n2")


def test_hidden_and_system_files_are_passed_over(tmp_path):
    save(tmp_path / "a.png")
    for name in ("__MACOSX/a.png", "._a.png", ".cache/b.png", "Thumbs.db"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    assert names(open_images(tmp_path, 8)) == ["a.png"]
    assert names(open_images(pack(tmp_path, tmp_path.with_suffix(".zip")), 8)) == ["a.png"]


@pytest.mark.parametrize(
    "clutter",
    [
        "@eaDir",
        ".thumbnails",
        "$RECYCLE.BIN",
        "lost+found",
        "#recycle",
        "System Volume Information",
        ".AppleDouble",
        "__MACOSX",
        "LOST+FOUND",
        "#snapshot",
    ],
)
def test_what_systems_leave_behind_is_no_class(labelled, tmp_path, clutter):
    before = open_images(labelled, 8)
    save(labelled / clutter / "cat" / "1.png")
    save(labelled / "cat" / clutter / "y.png" / "SYNOPHOTO_THUMB_M.jpg")
    save(labelled / "cat" / "._y.png")
    (labelled / "cat" / "Thumbs.db").write_bytes(b"x")
    for path in (labelled, pack(labelled, tmp_path / "a.zip")):
        source = open_images(path, 8)
        assert names(source) == names(before) and source.class_names == before.class_names
        assert source.fingerprint() == before.fingerprint()


def test_only_regular_files_are_opened(tmp_path, caplog, monkeypatch):
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "d.png").symlink_to("d.png")
    with socket.socket(socket.AF_UNIX) as endpoint:
        monkeypatch.chdir(tmp_path)  # as the paths of sockets must be short
        endpoint.bind("e.png")
        source = open_images(tmp_path, 8)
    assert [source.name(i) for i in range(len(source))] == ["a.png", "d.png"]
    assert len(source.contents()) == 2 and [error.name for error in readable(source)[1]] == ["d.png"]
    assert "3 pipes, sockets, devices or looping links are skipped (b.png, ...)" in caplog.text
