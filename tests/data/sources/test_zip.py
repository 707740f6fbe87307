"""Zip archives read as folders are, by threads and processes."""

import io
import multiprocessing
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from latentflow.data.items import ImageSource
from latentflow.data.pictures.crop import center_crop
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.sources.images import open_images
from tests.data.sources.pictured import names, pack, picture, save


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
