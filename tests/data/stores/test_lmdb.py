"""Environments that are really written with lmdb: what is read back is what was written, to the bit."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import sys
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from latentflow import ledger
from latentflow.data.batches import StreamPositions, TrainingImages, stream_batches
from latentflow.data.items import ImageSource
from latentflow.data.pictures.crop import center_crop
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.sources.images import open_images
from latentflow.data.sources.readable import readable
from latentflow.errors import DataError

PAGE = 4096
SIDE = 16


def write(path: Path, entries: Iterable[tuple[bytes, bytes]], **options) -> Path:
    with lmdb.open(str(path), map_size=1 << 26, **options) as environment, environment.begin(write=True) as transaction:
        for key, value in entries:
            transaction.put(key, value)
    return path


def picture(seed: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def encoded(seed: int, suffix: str = "webp", width: int = 20, height: int = SIDE) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, suffix)
    return buffer.getvalue()


def decoded(file: bytes, size: int = SIDE) -> np.ndarray:
    return center_crop(Image.open(io.BytesIO(file)).convert("RGB"), size)


def names(source: ImageSource) -> list[str]:
    return [item.name for item in source]


@pytest.fixture
def numbered(tmp_path) -> Path:
    """Twelve raw pictures, as NVAE stores CelebA-HQ and FFHQ; picture i has seed i."""
    return write(tmp_path / "train.lmdb", ((str(i).encode(), picture(i).tobytes()) for i in range(12)))


@pytest.fixture
def scenes(tmp_path) -> Path:
    """Forty encoded pictures under keys that look like hashes, as LSUN has them."""
    return write(tmp_path / "church_train_lmdb", ((b"%040x" % (i * 7919**9), encoded(i)) for i in range(40)))


# Layouts and their order


def test_raw_pixels_come_back_to_the_bit_in_the_order_of_numbers(numbered):
    source = open_images(numbered, SIDE)
    assert isinstance(source, ImageSource)
    assert names(source) == [source.name(i) for i in range(12)] == [str(i) for i in range(12)]
    for i, item in enumerate(source):
        assert item.pixels.dtype == np.uint8 and np.array_equal(item.pixels, picture(i))
        assert item.label is None and item.semantic_map is None
    assert source.class_names == source.map_class_names == source.map_palette == ()
    assert source.description == f"12 images from {numbered.name}"


def test_raw_pixels_are_resized_by_the_rule_of_all_sources(numbered):
    expected = center_crop(Image.fromarray(picture(3)), 8)
    assert np.array_equal(open_images(numbered, 8)[3].pixels, expected)


def test_raw_pictures_may_differ_in_size(tmp_path):
    write(tmp_path / "e", ((str(i).encode(), picture(i, side).tobytes()) for i, side in enumerate((16, 8, 32))))
    source = open_images(tmp_path / "e", 8)
    for i, side in enumerate((16, 8, 32)):
        assert np.array_equal(source[i].pixels, center_crop(Image.fromarray(picture(i, side)), 8))


def test_raw_pixels_that_begin_like_a_file_stay_pixels(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(picture(0, 8)).save(buffer, "bmp")
    disguised = buffer.getvalue() + bytes(3 * SIDE * SIDE - len(buffer.getvalue()))
    write(tmp_path / "e", [(b"0", disguised), (b"1", picture(1).tobytes())])
    assert open_images(tmp_path / "e", SIDE)[0].pixels.tobytes() == disguised


@pytest.mark.parametrize("suffix", ["webp", "jpeg", "png"])
def test_encoded_values_are_decoded_in_the_order_of_the_database(tmp_path, suffix):
    keys = [b"ff9", b"0a", b"10", b"b7/x", b"2", b"0A"]
    write(tmp_path / "e", ((key, encoded(i, suffix)) for i, key in enumerate(keys)))
    source = open_images(tmp_path / "e", SIDE)
    assert names(source) == ["0A", "0a", "10", "2", "b7/x", "ff9"]
    for item in source:
        assert np.array_equal(item.pixels, decoded(encoded(keys.index(item.name.encode()), suffix)))


def test_encoded_values_under_numbers_keep_the_order_of_numbers(tmp_path):
    write(tmp_path / "e", ((str(i).encode(), encoded(i, "png")) for i in range(11)))
    source = open_images(tmp_path / "e", SIDE)
    assert names(source) == [str(i) for i in range(11)]
    assert all(np.array_equal(source[i].pixels, decoded(encoded(i, "png"))) for i in range(11))


def test_keys_that_are_no_text_have_names_without_doubles(tmp_path):
    keys = [b"\x00\xff", b"%00%FF", b"a b~", "\u00e9".encode()]
    write(tmp_path / "e", ((key, encoded(0)) for key in keys))
    assert sorted(names(open_images(tmp_path / "e", 8))) == sorted(["%00%FF", "%2500%25FF", "a b~", "%C3%A9"])


@pytest.mark.parametrize("name", ["faces.lmdb", "faces.mdb", "folder/data.mdb"])
def test_environment_in_a_single_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    write(tmp_path / name, ((str(i).encode(), picture(i).tobytes()) for i in range(3)), subdir=False)
    assert np.array_equal(open_images(tmp_path / name, SIDE)[2].pixels, picture(2))


# The first images


def test_first_of_numbers_are_the_smallest_numbers(numbered):
    source = open_images(numbered, SIDE, first=3)
    assert len(source) == 3 and names(source) == ["0", "1", "2"]
    assert source.description == f"first 3 of 12 images from {numbered.name}"
    with pytest.raises(IndexError):
        source[3]


def test_first_of_keys_are_those_of_the_database(scenes):
    everything, source = open_images(scenes, SIDE), open_images(scenes, SIDE, first=25)
    assert names(source) == names(everything)[:25]
    assert all(np.array_equal(source[i].pixels, everything[i].pixels) for i in range(25))


def test_listing_stops_at_the_first_images_that_are_wanted(tmp_path):
    keys, value = [b"key %05d" % i for i in range(2000)], encoded(0)
    data = write(tmp_path / "e", ((key, value) for key in keys)) / "data.mdb"
    content = bytearray(data.read_bytes())
    assert content.count(keys[-1]) == 1
    last_leaf = content.index(keys[-1]) // PAGE * PAGE
    content[last_leaf : last_leaf + PAGE] = b"\xff" * PAGE
    data.write_bytes(content)
    assert names(open_images(tmp_path / "e", 8, first=30)) == [key.decode() for key in keys[:30]]
    with pytest.raises(DataError, match=r"e is a damaged LMDB environment \(.*\); copy it again"):
        open_images(tmp_path / "e", 8)


@pytest.mark.parametrize("first", [0, -2])
def test_first_must_be_positive(numbered, first):
    with pytest.raises(DataError, match=f"first must be at least 1 image, got {first}; leave it out for all 12"):
        open_images(numbered, SIDE, first=first)


def test_first_must_be_there(numbered):
    assert len(open_images(numbered, SIDE, first=12)) == 12
    with pytest.raises(DataError, match=r"first = 13, but .*train.lmdb has 12 images; give at most 12"):
        open_images(numbered, SIDE, first=13)


# Fingerprints


def test_fingerprint_is_that_of_the_content_wherever_it_lies(numbered, tmp_path):
    entries = [(str(i).encode(), picture(i).tobytes()) for i in reversed(range(12))]
    other = open_images(write(tmp_path / "elsewhere", entries), 8)
    assert other.fingerprint() == open_images(numbered, SIDE).fingerprint()
    fewer = open_images(write(tmp_path / "fewer", entries[-5:]), SIDE)
    assert fewer.fingerprint() == open_images(numbered, SIDE, first=5).fingerprint() != other.fingerprint()


def test_fingerprint_follows_keys_and_values(tmp_path):
    sets = [[(b"0", 0), (b"1", 1)], [(b"0", 0), (b"1", 2)], [(b"0", 0), (b"2", 1)], [(b"0", 0)]]
    found = set()
    for n, entries in enumerate(sets):
        write(tmp_path / f"{n}", ((key, picture(seed).tobytes()) for key, seed in entries))
        found.add(open_images(tmp_path / f"{n}", SIDE).fingerprint())
    assert len(found) == len(sets)


def test_fingerprint_reads_every_value_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_UNSETTLED_SECONDS", -1.0)
    for name, changed in (("a", None), ("b", 97)):
        write(tmp_path / name, ((b"%d" % n, picture(n if n != changed else 999).tobytes()) for n in range(200)))
    before = open_images(tmp_path / "a", SIDE)
    assert before.fingerprint() != open_images(tmp_path / "b", SIDE).fingerprint()
    assert before.contents()[3] == f"{3 * SIDE * SIDE}:{zlib.crc32(picture(3).tobytes()):08x}"
    monkeypatch.setattr(zlib, "crc32", None)
    assert list(open_images(tmp_path / "a", SIDE).contents()) == list(before.contents())


# Threads and processes


def test_many_threads_read_one_environment(numbered):
    source = pickle.loads(pickle.dumps(open_images(numbered, SIDE)))  # not open yet: all threads open it at once
    with ThreadPoolExecutor(8) as pool:
        items = list(pool.map(lambda i: source[i % 12], range(300)))
    assert all(np.array_equal(item.pixels, picture(i % 12)) for i, item in enumerate(items))


def test_one_environment_can_be_opened_twice(numbered, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(numbered, target_is_directory=True)
    sources = [open_images(numbered, SIDE), open_images(numbered, SIDE, first=2), open_images(link, SIDE)]
    assert all(np.array_equal(source[1].pixels, picture(1)) for source in sources)


def test_an_environment_that_nothing_holds_is_closed(numbered):
    source = open_images(numbered, SIDE)
    del source
    with lmdb.open(str(numbered), readonly=True, lock=False) as environment:  # refused, were it still open
        assert environment.stat()["entries"] == 12


def _read_all(sources: list[ImageSource], queue) -> None:
    handles = {id(source._store._handle) for source in sources if source._store._handle}
    pixels = [[item.pixels.tobytes() for item in source] for source in sources]
    queue.put((pixels, bool(handles & {id(source._store._handle) for source in sources})))


@pytest.mark.parametrize(("method", "num_processes"), [("fork", 3), ("spawn", 1)])
def test_processes_read_through_handles_of_their_own(numbered, method, num_processes):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    sources = [open_images(numbered, SIDE), open_images(numbered, SIDE, first=2)]
    expected = [[item.pixels.tobytes() for item in source] for source in sources]  # open when the processes begin
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    processes = [context.Process(target=_read_all, args=(sources, queue)) for _ in range(num_processes)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [(expected, False)] * num_processes
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sources[0][0].pixels.tobytes() == expected[0][0]  # the children closed nothing here


def test_workers_of_a_data_loader_read_what_this_process_reads(numbered):
    images = TrainingImages(open_images(numbered, SIDE), seed=0, flip=False)
    images.source[0]
    batches = stream_batches(images, StreamPositions(0, 4, 4, 0, 1), num_workers=2, pin_memory=False)
    for _ in range(6):  # two epochs
        batch = next(batches)
        expected = np.stack([picture(int(index)) for index in batch.indices])
        assert torch.equal(batch.pixels, torch.from_numpy(expected).permute(0, 3, 1, 2))
    del batches


# What cannot be read


def test_values_of_another_kind_are_broken_images(tmp_path):
    raw = [(str(i).encode(), picture(i).tobytes()) for i in range(4)]
    raw[1] = (b"1", bytes(1000))
    source = open_images(write(tmp_path / "raw", raw), SIDE)
    kept, broken = readable(source)
    assert kept == [0, 2, 3]
    assert str(broken[0]) == "cannot read the image 1: its 1000 bytes are not a square of RGB pixels (3 x side x side)"

    files = [(str(i).encode(), encoded(i)) for i in range(4)]
    files[0], files[2] = (b"0", b"no picture"), (b"2", encoded(2)[:100])
    source = open_images(write(tmp_path / "files", files), SIDE)
    assert [error.name for error in readable(source)[1]] == ["0", "2"]
    with pytest.raises(BrokenImage, match="cannot read the image 0: its content is no image that Pillow can read"):
        source[0]
    with pytest.raises(DataError, match=r"files: cannot read the image 0: .* \(and 1 more\)"):
        open_images(tmp_path / "files", SIDE, strict=True)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (pickle.dumps((b"picture", 3)), "a pickled object, which latentflow does not load: it could run any code"),
        (bytes(3 * 100 * 50), "of 15000 bytes, is neither"),
        (bytes(3 * 2 * 2), "of 12 bytes, is neither"),
        (b"", "of 0 bytes, is neither"),
    ],
)
def test_environment_without_pictures_is_refused(tmp_path, value, what):
    write(tmp_path / "e", ((b"%d" % i, value) for i in range(20)))
    with pytest.raises(DataError, match=r"e has no values that are image files \(JPEG, .*\) or square RGB") as refused:
        open_images(tmp_path / "e", 8)
    assert what in str(refused.value) and "b'0'" in str(refused.value) and "\n" not in str(refused.value)


class _Trap:
    def __reduce__(self):
        return (os.mkdir, ("sprung",))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "e", [(b"0", encoded(0)), (b"1", pickle.dumps(_Trap()))])
    assert [error.name for error in readable(open_images(tmp_path / "e", 8))[1]] == ["1"]
    assert not (tmp_path / "sprung").exists()


def test_empty_environment_is_refused(tmp_path):
    with pytest.raises(DataError, match="e is an empty LMDB environment"):
        open_images(write(tmp_path / "e", []), 8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", r"is not a readable LMDB environment \(.*\); copy it again"),
        (lambda content: content[:100], r"is not a readable LMDB environment \(.*MDB_INVALID.*\); copy it again"),
        (lambda content: bytes(len(content)), r"is not a readable LMDB environment \(.*MDB_INVALID.*\)"),
        (lambda content: content[: 3 * PAGE], r"is cut short: 12288 bytes of \d+; copy it again"),
        (lambda content: content[:-1], r"is cut short: \d+ bytes of \d+; copy it again"),
        (lambda content: content[: 2 * PAGE].ljust(len(content), b"\0"), r"is a damaged LMDB environment \(.*\)"),
    ],
)
def test_damaged_environments_are_refused(scenes, damage, message):
    data = scenes / "data.mdb"
    data.write_bytes(damage(data.read_bytes()))
    with pytest.raises(DataError, match=f"church_train_lmdb {message}") as refused:
        open_images(scenes, 8)
    assert "\n" not in str(refused.value)


def test_folder_of_environments_names_them(numbered, tmp_path):
    write(tmp_path / "validation.lmdb", [(b"0", picture(0).tobytes())])
    with pytest.raises(DataError) as refused:
        open_images(tmp_path, SIDE)
    assert str(refused.value) == (
        f"{tmp_path} holds LMDB environments (train.lmdb, validation.lmdb), not images: "
        f"give one of them, such as {numbered}"
    )


def test_zipped_environment_must_be_unpacked(scenes, tmp_path):
    with zipfile.ZipFile(tmp_path / "church.zip", "w") as file:
        file.write(scenes / "data.mdb", "church_train_lmdb/data.mdb")
    with pytest.raises(DataError, match=r"\(church_train_lmdb\), not images: unpack it and give one of them"):
        open_images(tmp_path / "church.zip", SIDE)


def test_missing_library_is_named(numbered, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match=r"train.lmdb is an LMDB environment.*pip install latentflow\[data\]"):
        open_images(numbered, SIDE)
