"""What is passed over and said, and names in any encoding."""

import os
import re
import struct
import sys
import unicodedata
import zipfile
import zlib

import pytest

from latentflow.data.sources.images import open_images
from latentflow.errors import DataError
from tests.data.sources.pictured import names, pack, picture, save

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
