"""WebDataset archives."""

import json
from pathlib import Path

import pytest

from latentflow.columns import Column
from latentflow.data.sources.images import open_images
from latentflow.data.sources.webdataset import stem_and_extension
from latentflow.data.table_options import TableOptions
from latentflow.errors import DataError
from tests import tiny
from tests.data.stores.test_tar import packed


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[bytes]:
    folder = tiny.write_images(tmp_path_factory.mktemp("flat"), classes=(), per_class=6)
    return [file.read_bytes() for file in sorted(folder.iterdir())]


def members(pictures: list[bytes], **more: dict[str, bytes]) -> dict[str, bytes]:
    found = {}
    for number, picture in enumerate(pictures):
        found[f"{number:04}.png"] = picture
        found[f"{number:04}.cls"] = b"%d\n" % (number % 2)
        record = {"age": 10 * number, "tags": ["x"] if number else [], "box": {"x": 1}, "note": f"n{number}"}
        found[f"{number:04}.json"] = json.dumps(record).encode()
    return found


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("07.jpg", ("07", "jpg")),
        ("a.b/07.seg.PNG", ("a.b/07", "seg.png")),
        ("dogs/07", ("dogs/07", "")),
    ],
)
def test_stems_end_at_the_first_dot(name, parts):
    assert stem_and_extension(name) == parts


def test_classes_and_columns_of_samples(pictures, tmp_path):
    file = packed(tmp_path / "shard.tar", members(pictures))
    source = open_images(file, 16)
    assert source.class_names == ("0", "1") and [source.label(row) for row in range(6)] == [0, 1, 0, 1, 0, 1]
    assert source.name(5) == "0005.png" and source.description == "6 images in 2 classes from shard.tar"
    chosen = TableOptions(label_column="note", columns=["age:number", "tags", "cls:label"])
    source = open_images(file, 16, table=chosen)
    assert source.columns == (
        Column("age", "number"),
        Column("tags", "labels", ("x",)),
        Column("cls", "label", ("0", "1")),
    )
    assert source.values(0) == (0.0, frozenset(), 0) and source.values(3) == (30.0, frozenset({0}), 1)
    assert source.class_names[source.label(4)] == "n4"
    with pytest.raises(DataError, match="no column 'agee', which --columns names; did you mean 'age'"):
        open_images(file, 16, table=TableOptions(columns=["agee"]))


def test_shards_that_each_count_from_zero(pictures, tmp_path):
    """Each archive has a sample 0000."""
    for number in (0, 1):
        packed(tmp_path / f"shard-{number}.tar", members(pictures[3 * number :][:3]))
    for place in (tmp_path, tmp_path / "shard-*.tar", tmp_path / "shard-{0..1}.tar"):
        source = open_images(place, 16)
        assert [source.name(row) for row in (0, 3)] == ["shard-0/0000.png", "shard-1/0000.png"]
        assert source.class_names == ("0", "1") and len(source) == 6


def test_splits_of_shards(pictures, tmp_path):
    for split in ("train", "val"):
        packed(tmp_path / f"{split}-0000.tar", members(pictures[:2]))
    with pytest.raises(DataError, match=r"holds the splits train, val: give one of them, such as .*/train-\*.tar"):
        open_images(tmp_path, 16)


def test_samples_without_image_or_facts(pictures, tmp_path):
    some = members(pictures)
    del some["0002.png"]
    file = packed(tmp_path / "a.tar", some)
    with pytest.raises(
        DataError, match=r"a.tar: 1 samples have no image \(0002\); leave them out with --allow-missing"
    ):
        open_images(file, 16)
    assert len(open_images(file, 16, table=TableOptions(allow_missing=True))) == 5
    some = members(pictures)
    del some["0002.cls"]
    with pytest.raises(DataError, match="sample 0002: the column 'cls' is empty"):
        open_images(packed(tmp_path / "b.tar", some), 16)
    some["0001.json"] = b"{"
    with pytest.raises(DataError, match=r"b.tar: 0001.json is not JSON"):
        open_images(packed(tmp_path / "b.tar", some), 16, table=TableOptions(columns=["age"]))


def test_samples_of_several_images(pictures, tmp_path):
    pairs = {f"{n}.{kind}.png": pictures[2 * n + (kind == "after")] for n in range(3) for kind in ("before", "after")}
    file = packed(tmp_path / "a.tar", {**pairs, **{f"{n}.txt": b"a red dog" for n in range(3)}})
    with pytest.raises(
        DataError, match=r"the sample 0 has several images \(after.png, before.png\); name the extension"
    ):
        open_images(file, 16)
    source = open_images(file, 16, table=TableOptions(file_column="Before.png"))
    assert [source.name(row) for row in range(3)] == ["0.before.png", "1.before.png", "2.before.png"]
    with pytest.raises(DataError, match=r"no image has the extension 'befor.png'; did you mean 'before.png'"):
        open_images(file, 16, table=TableOptions(file_column="befor.png"))


def test_an_archive_without_facts_is_a_folder(pictures, tmp_path):
    folders = {f"{'ab'[n % 2]}/{n}.png": picture for n, picture in enumerate(pictures)}
    source = open_images(packed(tmp_path / "a.tar", folders), 16)
    assert source.class_names == ("a", "b") and source.name(0) == "a/0.png"
    described = {**folders, **{f"{'ab'[n % 2]}/{n}.json": b'{"caption": "x"}' for n in range(6)}}
    source = open_images(packed(tmp_path / "b.tar", described), 16)  # whose columns nobody asks for
    assert source.class_names == ("a", "b") and source.columns == ()
    table = "file,label\n" + "".join(f"{name},x\n" for name in folders)
    source = open_images(packed(tmp_path / "c.tar", {**folders, "labels.csv": table.encode()}), 16)
    assert source.class_names == ("a", "b")
    chosen = TableOptions(label_column="label")
    assert open_images(tmp_path / "c.tar", 16, table=chosen).class_names == ("x",)
    (tmp_path / "two").mkdir()
    packed(tmp_path / "two" / "1.tar", folders)
    packed(tmp_path / "two" / "2.tar", folders)
    with pytest.raises(DataError, match=r"two of its archives hold a/0.png; rename or remove one of them"):
        open_images(tmp_path / "two", 16)


def test_files_of_other_kinds(tmp_path: Path, pictures):
    packed(tmp_path / "a.tar", {"a.txt": b"x"})
    with pytest.raises(DataError, match=r"no images in .*a.tar; it has 1 other files, such as a.txt"):
        open_images(tmp_path / "a.tar", 16)
    (tmp_path / "b.txt").touch()
    with pytest.raises(
        DataError, match=r"stands for a.tar, b.txt; it should stand for .parquet or .arrow files, or for"
    ):
        open_images(tmp_path / "{a.tar,b.txt}", 16)
