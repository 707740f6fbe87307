"""Sources as a whole: what cannot be opened, broken files, fingerprints."""

import os
import pickle
import shutil
import struct
import zipfile
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from latentflow import ledger
from latentflow.data import prefetch
from latentflow.data.items import ImageItem
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.sources import readable as checks
from latentflow.data.sources.images import open_images
from latentflow.data.sources.readable import readable
from latentflow.data.sources.stored import ImageFiles
from latentflow.data.stores import files as store_files
from latentflow.errors import DataError
from tests.data.sources.pictured import picture, save

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
