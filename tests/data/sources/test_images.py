import io
import multiprocessing
import os
import pickle
import re
import shutil
import socket
import struct
import sys
import unicodedata
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow import ledger
from latentflow.data import prefetch
from latentflow.data.items import UNLABELLED, ImageItem, ImageSource
from latentflow.data.painting.semantic_maps import MapClasses, colour_map, default_palette
from latentflow.data.pictures.colour import to_rgb
from latentflow.data.pictures.crop import center_crop, crop_map, cut_by
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.pictures.orientation import turned
from latentflow.data.sources import readable as checks
from latentflow.data.sources.images import open_images
from latentflow.data.sources.readable import readable
from latentflow.data.sources.stored import ImageFiles
from latentflow.data.stores import files as store_files
from latentflow.errors import DataError
from latentflow.sizes import Size

RED, WHITE = (255, 0, 0), (255, 255, 255)


def save(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (10, 8), RED)).save(path, **options)
    return path


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pack(folder: Path, archive: Path, wrapper: str = "") -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*"), reverse=True):
            file.write(path, wrapper + path.relative_to(folder).as_posix())
    return archive


def names(source: ImageSource) -> list[str]:
    return [item.name for item in source]


def one(tmp_path: Path, image: Image.Image, suffix: str = ".png", size: int = 8, **options) -> np.ndarray:
    """The pixels of an image after a trip through a file."""
    save(tmp_path / "one" / f"image{suffix}", image, **options)
    return open_images(tmp_path / "one", size)[0].pixels


@pytest.fixture
def labelled(tmp_path) -> Path:
    folder = tmp_path / "labelled"
    for i, name in enumerate(["dog/b.png", "dog/deep/er/a.png", "cat/z.PNG", "cat/y.png", "emu/x.png"]):
        save(folder / name, picture(i))
    (folder / "dog" / "notes.txt").write_text("not an image")
    (folder / "empty class").mkdir()
    return folder


# Layout


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


@pytest.fixture
def bare(monkeypatch):
    """Without the libraries that read HEIC and DICOM."""
    monkeypatch.setattr(store_files, "has_library", lambda name: False)


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


# What is not read


@pytest.mark.usefixtures("bare")
def test_pictures_that_are_not_read_are_counted_by_suffix_with_a_remedy_that_works(tmp_path, caplog):
    save(tmp_path / "a.jpg")
    jpeg = (tmp_path / "a.jpg").read_bytes()
    strange = ["noext", "photo.jpg_large", "photo.jpg.download", "IMG.JPG ", "shot.scr"]
    for name in strange:
        (tmp_path / name).write_bytes(jpeg)
    for name in ("1.HEIC", "2.heic", "3.nef", "4.jxl", "5.psd", "6.svg", "notes.txt", "LICENSE", "list.csv"):
        (tmp_path / name).write_bytes(b"something else")
    assert names(open_images(tmp_path, 8)) == ["a.jpg"]
    said, rename, convert = caplog.text, "(rename them to end in .jpg)", "(save them as JPEG or PNG)"
    install = f"{convert[:-1]}, or install latentflow[data])"
    assert f"11 files are skipped: 1 without suffix {rename}, 1 .download {rename}, 2 .heic {install}, " in said
    assert f"1 '.jpg ' {rename}, 1 .jpg_large {rename}, 1 .jxl {convert}, 1 .nef {convert}" in said
    assert ".txt" not in said and "LICENSE" not in said
    for name in strange:
        (tmp_path / name).rename(tmp_path / f"{name}.jpg")
    assert len(open_images(tmp_path, 8, strict=True)) == 6


@pytest.mark.usefixtures("bare")
def test_a_folder_of_nothing_but_unread_pictures_says_so(tmp_path):
    (tmp_path / "1.heic").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"no images in .*, but 1 .heic \(save them as .*, or install .*\); latentflow reads"
    ):
        open_images(tmp_path, 8)
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as file:
        file.writestr("inner.zip", b"PK")
    with pytest.raises(DataError, match=r"no images in .*outer.zip, but 1 .zip \(unpack them\)"):
        open_images(tmp_path / "outer.zip", 8)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("classes", [["cat"], ["cat", "dog"]])
def test_a_class_without_an_image_that_is_read_is_refused(tmp_path, classes, packed):
    for name in classes:
        save(tmp_path / "in" / name / "1.png")
    (tmp_path / "in" / "bird").mkdir()
    (tmp_path / "in" / "bird" / "1.HEIC").write_bytes(b"x")
    path = pack(tmp_path / "in", tmp_path / "in.zip") if packed else tmp_path / "in"
    with pytest.raises(DataError, match=r"no image in the folder bird can be read: 1 .heic \(save them as JPEG"):
        open_images(path, 8)
    save(tmp_path / "in" / "bird" / "1.jpg")
    assert open_images(tmp_path / "in", 8).class_names == ("bird", *classes)


def test_empty_folders_are_noticed(labelled, caplog):
    open_images(labelled, 8)
    assert "folders without images are not classes (empty class)" in caplog.text


# Names


class _Unflagged(zipfile.ZipInfo):
    """A member whose name is bytes of any encoding, without the flag that says UTF-8."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode("cp437"), 0


def store_member(file: zipfile.ZipFile, name: bytes, data: bytes, system: int = 3) -> None:
    member = _Unflagged(name.decode("cp437"))
    member.create_system = system
    file.writestr(member, data)


@pytest.mark.parametrize("name", ["café", "cafe\u0301", "日本", "ñandú"])
def test_zip_names_without_the_utf_8_flag_equal_those_of_the_folder(tmp_path, name):
    save(tmp_path / "in" / name / "é.png", picture(0))
    save(tmp_path / "in" / "the" / "1.png", picture(1))
    folder = open_images(tmp_path / "in", 8)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for path in sorted((tmp_path / "in").rglob("*.png")):
            store_member(file, os.fsencode(path.relative_to(tmp_path / "in")), path.read_bytes())
    archive = open_images(tmp_path / "a.zip", 8)
    assert archive.class_names == folder.class_names and names(archive) == names(folder)
    assert unicodedata.normalize("NFC", name) in folder.class_names
    assert archive.fingerprint() == folder.fingerprint()


def test_names_that_are_not_utf_8_are_latin_1_and_in_a_zip_of_dos_code_page_437(tmp_path):
    try:
        (tmp_path / "in" / os.fsdecode(b"caf\xe9")).mkdir(parents=True)
    except OSError:
        pytest.skip("this file system only takes UTF-8")
    file = save(tmp_path / "x.png")
    (tmp_path / "in" / os.fsdecode(b"caf\xe9") / "1.png").write_bytes(file.read_bytes())
    save(tmp_path / "in" / "the" / "1.png")
    folder = open_images(tmp_path / "in", 8, strict=True)
    assert folder.class_names == ("café", "the") and len(set(folder.contents())) == 1
    for system, byte in ((3, b"\xe9"), (0, b"\x82")):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            store_member(archive, b"caf" + byte + b"/1.png", file.read_bytes(), system)
            store_member(archive, b"the/1.png", file.read_bytes(), system)
        assert open_images(tmp_path / "a.zip", 8, strict=True).class_names == ("café", "the")


def test_guessed_encodings_are_said_with_a_remedy_that_works(tmp_path, caplog):
    file = save(tmp_path / "x.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        store_member(archive, "猫/1.png".encode("cp932"), file.read_bytes(), 0)
        store_member(archive, b"the/1.png", file.read_bytes(), 0)
    open_images(tmp_path / "a.zip", 8)
    assert "1 names are not UTF-8, and their encoding is guessed" in caplog.text
    remedy = re.search(r"in Python 3.11 (.*), and give DST", caplog.text)[1]
    if sys.version_info >= (3, 11):
        eval(remedy.replace("DST", str(tmp_path / "DST")), {"zipfile": zipfile})
        assert open_images(tmp_path / "DST", 8).class_names == ("the", "猫")


@pytest.mark.parametrize("valid", [True, False])
def test_unicode_names_next_to_those_in_a_code_page_are_read(tmp_path, valid):
    file, raw = save(tmp_path / "x.png"), "猫/1.png".encode("cp932")
    crc = zlib.crc32(raw) if valid else 0
    field = b"\1" + crc.to_bytes(4, "little") + "猫/1.png".encode()
    member = _Unflagged(raw.decode("cp437"))
    member.create_system, member.extra = 0, struct.pack("<HH", 0x7075, len(field)) + field
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(member, file.read_bytes())
        store_member(archive, b"the/1.png", file.read_bytes(), 0)
    source = open_images(tmp_path / "a.zip", 8, strict=True)
    assert ("猫" in source.class_names) == valid and len(source.class_names) == 2


def test_names_that_become_equal_are_refused(tmp_path):
    save(tmp_path / "café.png")
    try:
        save(tmp_path / "cafe\u0301.png")
    except OSError:
        pytest.skip("this file system cannot hold both")
    with pytest.raises(
        DataError, match=r"holds café.png in two ways of writing the same letters; rename or remove one"
    ):
        open_images(tmp_path, 8)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("a.png", b"1")
        file.writestr("a.png", b"2")
    with pytest.raises(DataError, match=r"a.zip holds a.png twice; rename or remove one of them"):
        open_images(tmp_path / "a.zip", 8)


def test_zip_members_that_lead_out_are_noticed(tmp_path, caplog):
    png = save(tmp_path / "x.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("in/a.png", "../b.png", "in/../../c.png", "/in/d.png"):
            file.writestr(name, png)
    assert names(open_images(tmp_path / "a.zip", 8)) == ["a.png", "d.png"]
    assert "2 members with paths outside the archive are skipped (../b.png)" in caplog.text


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "elsewhere" / "1.png")
    save(tmp_path / "data" / "cat" / "1.png")
    try:
        (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data", target_is_directory=True)
    except OSError:
        pytest.skip("this file system has no symbolic links")
    assert names(open_images(tmp_path / "data", 8)) == ["cat/1.png", "dog/1.png"]


@pytest.mark.parametrize("index", [-1, 5])
def test_names_need_no_decoding(labelled, index):
    source = open_images(labelled, 16)
    listed = names(source)
    for path in labelled.rglob("*.png"):
        path.write_bytes(b"")
    assert [source.name(i) for i in range(5)] == listed
    with pytest.raises(IndexError):
        source.name(index)


# Semantic maps

TOWN = MapClasses(("sky", "road", "tree"), ((128, 128, 128), (128, 64, 128), (128, 128, 0)))


def semantic_map(seed: int, width: int = 20, height: int = 16) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, len(TOWN), (height, width), np.uint8)
    values[3:6, 8:12] = UNLABELLED
    return values


@pytest.fixture
def mapped(tmp_path) -> Path:
    """Images in two class folders with maps as indices, in a palette's place, and in colours."""
    folder = tmp_path / "mapped"
    for i, name in enumerate(["town/a", "town/b", "wood/deep/c"]):
        save(folder / "images" / f"{name}.{('jpg', 'png', 'PNG')[i]}", picture(i))
        values = semantic_map(i)
        image = Image.fromarray(colour_map(values, TOWN.palette) if i == 2 else values)
        if i == 1:
            image = Image.new("P", (20, 16))
            image.putpalette([100] * 768)
            image.putdata(values.reshape(-1).tolist())
        save(folder / "masks" / f"{name}.png", image)
    TOWN.write(folder / "classes.json")
    return folder


def test_images_and_maps_are_paired_by_path(mapped):
    source = open_images(mapped, 16, strict=True)
    assert isinstance(source, ImageSource)
    assert names(source) == ["town/a.jpg", "town/b.png", "wood/deep/c.PNG"]
    assert source.class_names == ("town", "wood") and [item.label for item in source] == [0, 0, 1]
    assert source.map_class_names == TOWN.names and source.map_palette == TOWN.palette
    assert source.description == f"3 images in 2 classes with semantic maps of 3 classes from {mapped.name}"
    for i, item in enumerate(source):
        assert item.semantic_map.dtype == np.uint8
        assert np.array_equal(item.semantic_map, crop_map(semantic_map(i), 16))
        assert (item.semantic_map == UNLABELLED).sum() == 12
    assert np.array_equal(source[1].pixels, center_crop(picture(1), 16))


@pytest.mark.parametrize("wrapper", ["", "data/town/"])
def test_zip_of_maps_equals_folder(mapped, tmp_path, wrapper):
    folder, archive = open_images(mapped, 12), open_images(pack(mapped, tmp_path / "a.zip", wrapper), 12)
    assert archive.fingerprint() == folder.fingerprint()
    for a, b in zip(archive, folder, strict=True):
        assert (a.name, a.label) == (b.name, b.label)
        assert np.array_equal(a.pixels, b.pixels) and np.array_equal(a.semantic_map, b.semantic_map)
    copy = pickle.loads(pickle.dumps(archive))
    assert np.array_equal(copy[0].semantic_map, folder[0].semantic_map)


@pytest.mark.parametrize("inner", ["", "only/one/"])
def test_maps_without_labels(tmp_path, inner):
    for i in range(2):
        save(tmp_path / "images" / f"{inner}{i}.png", picture(i))
        save(tmp_path / "masks" / f"{inner}{i}.png", Image.fromarray(semantic_map(i)))
    (tmp_path / "classes.json").write_text('["sky", "road", "tree"]')
    source = open_images(tmp_path, 16)
    assert source.class_names == () and names(source) == ["0.png", "1.png"] and source[0].label is None
    assert source.map_palette == default_palette(3)
    assert source.description == f"2 images with semantic maps of 3 classes from {tmp_path.name}"
    assert np.array_equal(source[1].semantic_map, crop_map(semantic_map(1), 16))


def test_map_that_is_the_painted_image_is_aligned_with_it(tmp_path):
    painted = Image.fromarray(colour_map(np.kron(np.eye(3, dtype=np.uint8), np.ones((31, 43), np.uint8)), TOWN.palette))
    save(tmp_path / "images/a.png", painted)
    save(tmp_path / "masks/a.png", painted)
    TOWN.write(tmp_path / "classes.json")
    item = open_images(tmp_path, 24)[0]
    wrong = np.abs(item.pixels.astype(int) - colour_map(item.semantic_map, TOWN.palette)).max(-1) > 20
    inner = np.ones_like(wrong)
    edges = [tuple(np.argwhere(np.diff(item.semantic_map.astype(int), axis=axis))) for axis in (0, 1)]
    for row, column in (edge for both in edges for edge in both):
        inner[max(row - 1, 0) : row + 3, max(column - 1, 0) : column + 3] = False
    assert inner.mean() > 0.5 and not wrong[inner].any()


def test_maps_without_classes_are_refused_with_an_example(mapped):
    (mapped / "classes.json").unlink()
    with pytest.raises(DataError, match=r"images/ and masks/ but no classes.json, .* for example \["):
        open_images(mapped, 16)
    (mapped / "classes.json").write_text("[]")
    with pytest.raises(DataError, match=r"mapped: classes.json: 0 classes of semantic maps; there must be 1 to 255"):
        open_images(mapped, 16)


def test_images_without_map_and_maps_without_image_are_named(mapped):
    for i in range(4):
        save(mapped / f"images/town/new{i}.png")
    with pytest.raises(
        DataError,
        match=r"mapped: 4 images have no map \(town/new0.png, town/new1.png, town/new2.png, ...\); an image a/x.jpg",
    ):
        open_images(mapped, 16)
    for i in range(1, 4):
        (mapped / f"images/town/new{i}.png").unlink()
    (mapped / "images/town/a.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 images have no map \(town/new0.png\); 1 maps have no image \(town/a.png\); an image"
    ):
        open_images(mapped, 16)


@pytest.mark.parametrize("top, kind", [("images", "images"), ("masks", "maps")])
def test_two_files_for_one_place_are_refused(mapped, top, kind):
    save(mapped / top / "town" / "a.bmp")
    with pytest.raises(DataError, match=rf"mapped: {kind} town/a.\w+ and town/a.\w+ differ in their suffix only; re"):
        open_images(mapped, 16)


def test_names_are_paired_however_their_accents_are_written(tmp_path):
    for one, other in (("caf\xe9", "cafe\u0301"), ("\u304b\u3099", "\u304c"), ("plain", "plain")):
        save(tmp_path / f"images/{one}.png", picture(0))
        save(tmp_path / f"masks/{other}.png", Image.fromarray(semantic_map(0)))
    TOWN.write(tmp_path / "classes.json")
    assert len(readable(open_images(tmp_path, 16))[0]) == 3
    save(tmp_path / "masks/caf\xe9.png", Image.fromarray(semantic_map(1)))
    with pytest.raises(DataError, match=r"holds masks/café.png in two ways of writing the same letters; rename"):
        open_images(tmp_path, 16)


def test_images_next_to_images_and_maps_are_refused(mapped):
    save(mapped / "previews" / "a.png")
    with pytest.raises(DataError, match=r"images/ and masks/, and other images as well \(previews\): move those"):
        open_images(mapped, 16)


def test_splits_of_maps_are_sent_to_prepare(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / "images" / split / "a.png")
        save(tmp_path / "masks" / split / "a.png")
    with pytest.raises(DataError) as caught:
        open_images(tmp_path, 8)
    remedy = f"run `latentflow prepare camvid {tmp_path} --out DST` and give DST/train"
    assert str(caught.value) == f"{tmp_path} holds the splits train, val, not classes: {remedy}"


def test_broken_maps_make_broken_images(mapped):
    values = semantic_map(0)
    values[0, :3] = 3
    save(mapped / "masks/town/a.png", Image.fromarray(values))
    save(mapped / "masks/town/b.png", Image.fromarray(semantic_map(1, 10, 8)))
    (mapped / "masks/wood/deep/c.png").write_bytes(b"no image")
    save(mapped / "images/town/d.png", picture(4))
    save(mapped / "masks/town/d.png", Image.fromarray(semantic_map(4)))
    source = open_images(mapped, 16)
    kept, broken = readable(source)
    assert [source.name(i) for i in kept] == ["town/d.png"]
    assert [str(error) for error in broken] == [
        "cannot read the image town/a.jpg: its map masks/town/a.png: class 3 in 3 pixels, "
        "but there are 3 classes, 0 to 2; 255 means unlabelled",
        "cannot read the image town/b.png: its map masks/town/b.png has 10 x 8 pixels (width x height), "
        "its image 20 x 16: resize the map with nearest neighbour, in Pillow map.resize((20, 16), "
        "Image.Resampling.NEAREST)",
        "cannot read the image wood/deep/c.PNG: its map masks/wood/deep/c.png: it cannot be read (its content is no "
        "image that Pillow can read); save the map again, as a PNG",
    ]
    with pytest.raises(DataError, match=r"mapped: cannot read the image town/a.jpg: its map .* \(and 2 more\); repair"):
        open_images(mapped, 16, strict=True)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_maps_of_turned_images_may_be_of_the_stored_pixels_or_of_the_upright_ones(tmp_path, suffix, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"tiffinfo": {0x0112: turn}} if suffix == "tif" else {"exif": exif}
    stored = semantic_map(0)
    save(tmp_path / f"images/a.{suffix}", picture(0), **options)
    TOWN.write(tmp_path / "classes.json")
    exif[0x0112] = 1
    for pixels, own in ((stored, {}), (turned(stored, turn), {}), (turned(stored, turn), {"exif": exif})):
        save(tmp_path / "masks/a.png", Image.fromarray(pixels), **own)
        source = open_images(tmp_path, 16)
        if turn in (2, 3, 4) and not own:
            with pytest.raises(BrokenImage, match=rf"may match its image as shown .* orientation {turn}\)"):
                source[0]
        else:
            assert np.array_equal(source[0].semantic_map, crop_map(turned(stored, turn), 16))


def test_fingerprint_follows_maps_and_classes(mapped):
    prints = [open_images(mapped, 16).fingerprint(), open_images(mapped / "images", 16).fingerprint()]
    with (mapped / "masks/town/a.png").open("ab") as file:
        file.write(b"x")
    prints.append(open_images(mapped, 16).fingerprint())
    (mapped / "masks/town/b.png").rename(mapped / "masks/town/b.PNG")
    prints.append(open_images(mapped, 16).fingerprint())
    MapClasses(TOWN.names).write(mapped / "classes.json")
    prints.append(open_images(mapped, 16).fingerprint())
    MapClasses(("sky", "road", "bush")).write(mapped / "classes.json")
    prints.append(open_images(mapped, 16).fingerprint())
    assert len(set(prints)) == 6
    (mapped / "classes.json").write_text('["sky","road","bush"]')  # the same classes, written otherwise
    assert open_images(mapped, 16).fingerprint() == prints[-1]


@pytest.mark.parametrize("damage", ["member", "encrypted"])
def test_damaged_classes_in_a_zip_are_named(mapped, tmp_path, damage):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(pack(mapped, tmp_path / "whole.zip")) as whole, zipfile.ZipFile(archive, "w") as file:
        for member in whole.namelist():
            file.writestr(member, whole.read(member))
    data = bytearray(archive.read_bytes())
    if damage == "member":
        data[data.index(b'"names"') + 2] ^= 0xFF
    else:
        data[data.rindex(b"classes.json") - 46 + 8] |= 1  # the flag in the central directory
    archive.write_bytes(data)
    said = r"classes.json cannot be read \(.*\); it should hold \[" if damage == "member" else "is encrypted"
    with pytest.raises(DataError, match=rf"a.zip:? {said}"):
        open_images(archive, 16)


# Zip archives


@pytest.mark.parametrize("wrapper", ["", "labelled/", "./"])
def test_zip_equals_folder_item_for_item(labelled, tmp_path, wrapper):
    folder = open_images(labelled, 12)
    archive = open_images(pack(labelled, tmp_path / "labelled.ZIP", wrapper), 12)
    assert archive.class_names == folder.class_names
    assert archive.fingerprint() == folder.fingerprint()
    assert len(archive) == len(folder) == 5
    for a, b in zip(archive, folder, strict=True):
        assert (a.name, a.label) == (b.name, b.label)
        assert np.array_equal(a.pixels, b.pixels)


def test_zip_packed_on_windows(tmp_path):
    buffer = io.BytesIO()
    picture(0).save(buffer, "png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("cat\\1.png", "dog\\1.png"):
            file.writestr(zipfile.ZipInfo(name), buffer.getvalue())
    source = open_images(tmp_path / "a.zip", 8)
    assert source.class_names == ("cat", "dog") and names(source) == ["cat/1.png", "dog/1.png"]


@pytest.fixture
def many(tmp_path):
    folder = tmp_path / "many"
    for i in range(60):
        save(folder / f"{i:02d}.png", picture(i))
    return open_images(pack(folder, tmp_path / "many.zip"), 16)


def test_zip_is_read_by_many_threads(many):
    with ThreadPoolExecutor(8) as pool:
        items = list(pool.map(lambda i: many[i % 60], range(300)))
    assert all(np.array_equal(item.pixels, center_crop(picture(i % 60), 16)) for i, item in enumerate(items))


def _read_all(source: ImageSource, queue) -> None:
    queue.put([source[i].pixels.tobytes() for i in range(len(source))])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_zip_is_read_by_forked_processes(many):
    expected = [item.pixels.tobytes() for item in many]  # the archive is open when the processes fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_read_all, args=(many, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [expected] * 3
    for process in processes:
        process.join()


def test_open_zip_can_be_sent_to_another_process(many):
    first = many[0]
    copy = pickle.loads(pickle.dumps(many))
    assert np.array_equal(copy[0].pixels, first.pixels) and len(copy) == 60


def test_damaged_zip_member_is_a_broken_image(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.write(save(tmp_path / "x.bmp", picture(0)), "x.bmp")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[400] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(BrokenImage, match=r"x.bmp: Bad CRC-32"):
        open_images(tmp_path / "a.zip", 8)[0]


def test_zip_member_that_unpacks_to_too_much_is_a_broken_image(many, monkeypatch):
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", "400")
    with pytest.raises(
        BrokenImage, match=r"00.png: its [\d,]+ bytes are more than 400; .* LATENTFLOW_MAX_PIXELS=(\d+)"
    ) as no:
        many[0]
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", str(no.value).rpartition("=")[2])
    assert many[0].name == "00.png"


# The first images


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


# What cannot be opened


def test_bad_places_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(DataError, match=r"cannot open .*missing: No such file.*give a folder of images, a .zip file"):
        open_images(tmp_path / "missing", 8)
    with pytest.raises(DataError, match=f"no images in {tmp_path}; latentflow reads .png, .apng, .jpg"):
        open_images(tmp_path, 8)
    (tmp_path / "table.csv").write_text("1,2\n3,4")
    with pytest.raises(DataError, match=r"no images in .*; it has 1 other files, such as table.csv; latentflow reads"):
        open_images(tmp_path, 8)
    with pytest.raises(DataError, match=r"no images in .*; it has 1 other files, such as table.csv; latentflow reads"):
        open_images(tmp_path / "table.csv", 8)
    (tmp_path / "notes.txt").write_text("1,2")
    with pytest.raises(DataError, match=r"notes.txt is a single file; give its folder, the folder it unpacks to"):
        open_images(tmp_path / "notes.txt", 8)
    (tmp_path / "bad.zip").write_bytes(b"PK and then nonsense")
    with pytest.raises(DataError, match=r"bad.zip is not a readable zip archive .*; pack or copy it again"):
        open_images(tmp_path / "bad.zip", 8)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(DataError, match=r"no images in .*empty.zip"):
        open_images(tmp_path / "empty.zip", 8)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder_is_refused(tmp_path):
    save(tmp_path / "locked" / "a.png")
    (tmp_path / "locked").chmod(0)
    try:
        with pytest.raises(DataError, match=r"cannot list .*locked: Permission denied"):
            open_images(tmp_path, 8)
    finally:
        (tmp_path / "locked").chmod(0o700)


@pytest.mark.parametrize("size", [0, -3])
def test_image_size_must_be_positive(tmp_path, size):
    with pytest.raises(DataError, match=f"image_size must be at least 1 pixel, got {size}"):
        open_images(tmp_path, size)


def test_index_outside_the_source(labelled):
    source = open_images(labelled, 8)
    for index in (-1, 5):
        with pytest.raises(IndexError):
            source[index]


# The built-in dataset


@pytest.mark.parametrize("text, count, seed", [("synthetic", 6000, 0), ("synthetic:7", 7, 0), ("synthetic:7:3", 7, 3)])
def test_synthetic_sources(text, count, seed):
    source = open_images(text, 16, strict=count < 10)
    assert (len(source), source.seed, source.image_size) == (count, seed, (16, 16))
    assert isinstance(source[0], ImageItem)


@pytest.mark.parametrize("text", ["synthetic:", "synthetic:many", "synthetic:1:2:size:3", "synthetic:1:"])
def test_misspelt_synthetic_sources(text):
    with pytest.raises(DataError, match=f"cannot understand '{text}'; write synthetic, synthetic:COUNT, synthetic"):
        open_images(text, 16)


# Broken files


@pytest.fixture
def partly_broken(tmp_path) -> Path:
    folder = tmp_path / "broken"
    save(folder / "a good.png")
    save(folder / "b cut.jpg", picture(0, 64, 64))
    (folder / "b cut.jpg").write_bytes((folder / "b cut.jpg").read_bytes()[:900])
    (folder / "c text.png").write_text("hello")
    (folder / "d nothing.webp").write_bytes(b"")
    save(folder / "e good.gif")
    return folder


def test_readable_keeps_the_good_and_names_the_broken(partly_broken):
    source = open_images(partly_broken, 8)
    kept, broken = readable(source)
    assert kept == [0, 4]
    assert [error.name for error in broken] == ["b cut.jpg", "c text.png", "d nothing.webp"]
    assert "truncated" in broken[0].reason
    assert str(broken[1]) == "cannot read the image c text.png: its content is no image that Pillow can read"


def test_processes_that_look_for_broken_images_find_the_same(partly_broken, monkeypatch):
    """And what they find is remembered, also where the command is ended before all was looked at."""
    source = open_images(partly_broken, 8)
    kept, broken = readable(open_images(shutil.copytree(partly_broken, partly_broken.with_name("copy")), 8))
    monkeypatch.setattr(prefetch, "what_pays", lambda dataset, batches, how: replace(how, num_workers=2))
    monkeypatch.setattr(checks, "_CHECKED_TOGETHER", 2)
    monkeypatch.setattr(checks, "_SAVED_TOGETHER", 1)

    @contextmanager
    def killed_after_the_second(what, number):
        def on_images(count: int) -> None:
            seen.append(count)
            if len(seen) == 2:
                raise KeyboardInterrupt

        yield on_images

    seen: list[int] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checks, "image_progress", killed_after_the_second)
        readable(source)
    numbers = []
    monkeypatch.setattr(checks, "image_progress", lambda what, number: numbers.append(number) or nullcontext(print))
    found = readable(source)
    assert found[0] == kept and [str(error) for error in found[1]] == [str(error) for error in broken]
    assert numbers == [1]  # of five


def test_what_can_be_read_is_remembered_until_it_changes(partly_broken, monkeypatch):
    source = open_images(partly_broken, 8)
    kept, broken = readable(source)
    monkeypatch.setattr(ImageFiles, "__getitem__", None)
    again = open_images(partly_broken, 8)
    assert readable(again)[0] == kept and [str(error) for error in readable(again)[1]] == [str(e) for e in broken]
    monkeypatch.undo()
    name = broken[0].name
    save(partly_broken / f"new{Path(name).suffix}", picture(1), format="PNG")
    (partly_broken / f"new{Path(name).suffix}").replace(partly_broken / name)
    looked_at = []
    decode = ImageFiles.__getitem__
    monkeypatch.setattr(ImageFiles, "__getitem__", lambda self, index: looked_at.append(index) or decode(self, index))
    healed = open_images(partly_broken, 8)
    assert len(readable(healed)[1]) == len(broken) - 1
    assert [healed.name(index) for index in looked_at] == [name]
    looked_at.clear()
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", "1000000")
    readable(healed)
    assert len(looked_at) == len(healed)  # other rules


def test_strict_refuses_a_source_with_broken_files(partly_broken):
    with pytest.raises(
        DataError, match=r"broken: cannot read the image b cut.jpg: .* \(and 2 more\); repair or remove"
    ):
        open_images(partly_broken, 8, strict=True)
    for name in ("b cut.jpg", "c text.png", "d nothing.webp"):
        (partly_broken / name).unlink()
    assert len(open_images(partly_broken, 8, strict=True)) == 2


def test_file_that_vanishes_is_a_broken_image(labelled):
    source = open_images(labelled, 8)
    (labelled / "emu" / "x.png").unlink()
    with pytest.raises(BrokenImage, match=r"emu/x.png: .*No such file"):
        source[4]


def test_broken_image_survives_a_trip_between_processes():
    error = pickle.loads(pickle.dumps(BrokenImage("a.png", "cut short")))
    assert isinstance(error, DataError) and (error.name, error.reason) == ("a.png", "cut short")


def test_decompression_bomb_is_a_broken_image(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(BrokenImage, match=r"bomb.png: its 2,500,000,000 pixels are more than 268,435,456; make it sm"):
        open_images(tmp_path, 8)[0]


# Fingerprint


def test_fingerprint_follows_names_and_contents(labelled):
    before = open_images(labelled, 8).fingerprint()
    assert open_images(labelled, 16).fingerprint() == before
    (labelled / "dog" / "b.png").rename(labelled / "dog" / "c.png")
    renamed = open_images(labelled, 8).fingerprint()
    with (labelled / "dog" / "c.png").open("ab") as file:
        file.write(b"x")
    assert len({before, renamed, open_images(labelled, 8).fingerprint()}) == 3


@pytest.mark.parametrize("suffix", [".bmp", ".ppm", ".tif"])
def test_fingerprint_notices_other_bytes_of_the_same_size_and_time(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(ledger, "_UNSETTLED_SECONDS", -1.0)
    file = save(tmp_path / "a" / f"a{suffix}", picture(0))
    before, status = open_images(tmp_path / "a", 8).fingerprint(), file.stat()
    save(file, picture(1))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    after = open_images(tmp_path / "a", 8)
    assert after.fingerprint() != before
    assert list(after.contents()) == [f"{status.st_size}:{zlib.crc32(file.read_bytes()):08x}"]


def test_contents_are_read_once_as_long_as_they_do_not_change(labelled, monkeypatch):
    monkeypatch.setattr(ledger, "_UNSETTLED_SECONDS", -1.0)
    before = list(open_images(labelled, 8).contents())
    monkeypatch.setattr(zlib, "crc32", None)
    assert list(open_images(labelled, 8).contents()) == before


def test_contents_of_many_files_are_in_their_order(tmp_path, monkeypatch):
    """Some of which are remembered from before, and all of which are read in parts."""
    monkeypatch.setattr(ledger, "_UNSETTLED_SECONDS", -1.0)
    monkeypatch.setattr(store_files, "_READ_TOGETHER", 3)
    monkeypatch.setattr(store_files, "_SAVED_TOGETHER", 7)
    for some in (range(0, 24, 2), range(24)):
        for number in some:
            save(tmp_path / f"{number:02d}.png", picture(number))
        files = sorted(tmp_path.glob("*.png"))
        expected = [f"{file.stat().st_size}:{zlib.crc32(file.read_bytes()):08x}" for file in files]
        assert list(open_images(tmp_path, 8).contents()) == expected
        assert len(set(expected)) == len(files)


def test_contents_of_what_cannot_be_read(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "c.png").mkdir()
    assert open_images(tmp_path, 8).contents()[1:] == ["unreadable"]


# The crop


def test_crop_of_the_right_size_is_the_image_itself():
    image = picture(0, 32, 32)
    assert np.array_equal(center_crop(image, 32), np.asarray(image))


def test_crop_cuts_the_middle_of_a_wide_and_a_tall_image():
    wide, tall = picture(0, 13, 8), picture(1, 8, 12)
    assert np.array_equal(center_crop(wide, 8), np.asarray(wide)[:, 2:10])
    assert np.array_equal(center_crop(tall, 8), np.asarray(tall)[2:10])


@pytest.mark.parametrize(("size", "wanted"), [((20, 8), np.s_[:, 4:16]), ((12, 14), np.s_[3:11]), ((12, 8), np.s_[:])])
def test_crop_takes_the_largest_part_of_any_shape(size, wanted):
    """Pictures that are as high, or as wide, as a crop of 12 x 8 pixels need no scaling; their maps are cut alike."""
    image = picture(0, *size)
    assert np.array_equal(center_crop(image, Size(8, 12)), np.asarray(image)[wanted])
    assert np.array_equal(crop_map(np.asarray(image)[..., 0], Size(8, 12)), np.asarray(image)[wanted][..., 0])
    doubled = Image.fromarray(np.asarray(image).repeat(2, 0).repeat(2, 1))
    assert np.array_equal(center_crop(doubled, Size(8, 12)), np.asarray(image)[wanted])
    assert cut_by(*size, Size(8, 12)) == pytest.approx(1 - 96 / (size[0] * size[1]))


@pytest.mark.parametrize("factor", [2, 4])
def test_crop_halves_with_a_box_filter(factor):
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    blocks = small.repeat(factor, 0).repeat(factor, 1)
    assert np.array_equal(center_crop(Image.fromarray(blocks), 8), small)


def test_crop_averages_two_by_two_pixels():
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[1, 0], pixels[1, 1] = 40, 80, 120, 200
    assert center_crop(Image.fromarray(pixels), 2)[..., 0].tolist() == [[110, 0], [0, 0]]


def test_crop_follows_the_rule_step_by_step_at_odd_sizes():
    image = picture(2, 151, 67)
    halved = image.resize((75, 33), Image.Resampling.BOX)  # 67 >= 2 * 32, and 33 is less
    resized = halved.resize((round(75 * 32 / 33), 32), Image.Resampling.BICUBIC)
    assert resized.width == 73
    assert np.array_equal(center_crop(image, 32), np.asarray(resized)[:, 20:52])


def test_crop_enlarges_a_small_image_bicubically():
    image = picture(3, 32, 32)
    assert np.array_equal(center_crop(image, 64), np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)))


def test_crop_of_a_strip_shows_its_middle():
    ramp = np.repeat(np.linspace(0, 255, 500).astype(np.uint8)[:, None, None], 3, 2)
    pixels = center_crop(Image.fromarray(ramp), 64)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels.astype(int) - 127).max() <= 1


def test_strip_that_would_fill_the_memory_is_broken(tmp_path):
    save(tmp_path / "strip.png", Image.new("L", (1, 60000)))
    with pytest.raises(BrokenImage, match="1 x 60000 pixels are too long and thin for 64 x 64"):
        open_images(tmp_path, 64)[0]


# Formats and modes


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".webp", ".bmp", ".tif", ".TIFF", ".gif", ".ppm"])
def test_common_formats_in_either_case(tmp_path, suffix):
    pixels = one(tmp_path, Image.new("RGB", (10, 9), (200, 60, 30)), suffix)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - (200, 60, 30)).max() <= 4


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    pixels = one(tmp_path, frames[0], ".gif", save_all=True, append_images=frames[1:])
    assert (pixels == RED).all()


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 8), RED)
    image.paste((0, 0, 255), (0, 0, 8, 8))  # stored with blue at the left ...
    exif = Image.Exif()
    exif[0x0112] = 6  # ... to be shown turned clockwise, with blue at the top
    save(tmp_path / "a.png", image, exif=exif)
    upright = np.asarray(to_rgb(Image.open(tmp_path / "a.png")))
    assert upright.shape == (16, 8, 3)
    assert (upright[:8] == (0, 0, 255)).all() and (upright[8:] == RED).all()


def test_sixteen_bit_grey_is_scaled_from_its_full_range(tmp_path):
    values = np.zeros((8, 8), np.uint16)
    values[0, :5] = (0, 257, 32768, 65278, 65535)
    for suffix in (".png", ".tif", ".pgm"):
        pixels = one(tmp_path / suffix, Image.fromarray(values), suffix)
        assert pixels[0, :5].tolist() == [[0] * 3, [1] * 3, [128] * 3, [254] * 3, [255] * 3], suffix


def test_numbers_without_a_white_are_refused(tmp_path):
    for mode, value in (("F", 0.5), ("I", 70000), ("I", -1)):
        save(tmp_path / "a.tif", Image.new(mode, (8, 8), value))
        with pytest.raises(BrokenImage, match=f"pixels of mode {mode} have no defined white; save it as 8 or 16 bits"):
            open_images(tmp_path, 8)[0]


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (*RED, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    image.putpixel((7, 0), (0, 0, 0, 51))  # a fifth of black on white
    pixels = one(tmp_path, image)
    assert (pixels[:, :4] == WHITE).all() and (pixels[1:, 4:] == RED).all()
    assert pixels[0, 7].tolist() == [204] * 3


def test_transparent_palette_and_grey(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, *RED])
    palette.paste(0, (0, 0, 4, 8))
    pixels = one(tmp_path / "p", palette, transparency=0)
    assert (pixels[:, :4] == WHITE).all() and (pixels[:, 4:] == RED).all()
    assert (one(tmp_path / "opaque", palette)[:, :4] == (0, 0, 255)).all()
    assert (one(tmp_path / "la", Image.new("LA", (8, 8), (0, 51))) == 204).all()


@pytest.mark.parametrize("mode, value, expected", [("L", 90, 90), ("1", 1, 255), ("CMYK", (0, 0, 0, 155), 100)])
def test_other_modes(tmp_path, mode, value, expected):
    pixels = one(tmp_path, Image.new(mode, (8, 8), value), ".tif")
    assert (pixels == expected).all()


def test_mixed_sizes_come_out_alike(tmp_path):
    for i, (width, height) in enumerate([(10, 10), (100, 30), (7, 300), (1, 1)]):
        save(tmp_path / f"{i}.png", picture(i, width, height))
    assert {item.pixels.shape for item in open_images(tmp_path, 24)} == {(24, 24, 3)}


def test_classes_without_masks_are_no_plain_images(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "classes.json").write_text('["sky", "road"]')
    with pytest.raises(DataError, match=r"has a classes\.json, but not images/ and masks/ with images in both"):
        open_images(tmp_path, 8)
