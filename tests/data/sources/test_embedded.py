"""Images in the rows of parquet, and in what the library `datasets` writes."""

import zlib
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentflow.columns import Column
from latentflow.data.sources.images import open_images
from latentflow.data.table_options import TableOptions
from latentflow.errors import DataError
from tests import tiny

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cherry", "ghost", "apple", "berry"]),  # neither sorted nor all there
        "age": datasets.Value("float32"),
        "tags": datasets.Sequence(datasets.ClassLabel(names=["big", "red"])),
        "view": datasets.ClassLabel(names=["front", "back"]),
    }
)


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny.write_images(tmp_path / "photos", per_class=3)


def rows_of(folder: Path) -> datasets.Dataset:
    """The images of class folders as `datasets` holds them, in another order."""
    files = sorted(folder.rglob("*.png"), key=lambda file: (file.name, file.parent.name))
    names = FEATURES["label"].names
    cells = {
        "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "label": [names.index(file.parent.name) for file in files],
        "age": [None if file.stem == "0" else float(file.stem) for file in files],
        "tags": [[] if file.stem == "0" else [1] for file in files],
        "view": [int(file.stem) - 1 for file in files],
    }
    return datasets.Dataset.from_dict(cells, features=FEATURES)


def records(source) -> list:
    return [(item.name, item.label, item.pixels.tobytes(), source.contents()[row]) for row, item in enumerate(source)]


@pytest.mark.parametrize("form", ["parquet", "parquet folder", "saved", "plain parquet"])
def test_rows_give_what_the_folders_give(folder, tmp_path, form):
    rows, place = rows_of(folder), tmp_path / "out" / "photos"
    place.parent.mkdir()
    if form == "saved":
        rows.save_to_disk(place, num_shards=2)
        (place / "cache-123.arrow").write_bytes(b"a leftover of datasets")
    elif form == "parquet folder":
        (place / "data").mkdir(parents=True)
        for number in (0, 1):
            rows.shard(2, number).to_parquet(place / "data" / f"train-0000{number}-of-00002.parquet")
    elif form == "parquet":
        rows.to_parquet(place.with_suffix(".parquet"))
        place = place.with_suffix(".parquet")
    else:  # written by somebody who does not know of `datasets`
        cells = rows.with_format("arrow")[:]
        names = pa.array([FEATURES["label"].names[label] for label in cells.column("label").to_pylist()])
        image = pa.array([cell["bytes"] for cell in cells.column("image").to_pylist()])
        file = pa.array([cell["path"] for cell in cells.column("image").to_pylist()])
        place.mkdir()
        pq.write_table(pa.table({"file_name": file, "image": image, "label": names}), place / "x.parquet")
    source, folders = open_images(place, 16), open_images(folder, 16)
    assert source.class_names == folders.class_names == ("apple", "berry", "cherry")
    assert records(source) == records(folders)
    assert source.fingerprint() == folders.fingerprint()


def test_features_are_understood(folder, tmp_path, caplog):
    rows_of(folder).save_to_disk(tmp_path / "saved")
    source = open_images(tmp_path / "saved", 16, table=TableOptions(columns=["age", "tags", "view"]))
    assert source.columns == (
        Column("age", "number"),
        Column("tags", "labels", ("red",)),
        Column("view", "label", ("back", "front")),
    )
    found = {source.name(row): source.values(row) for row in range(len(source))}
    assert found["apple/0.png"] == (None, frozenset(), None)  # an index of -1 is not known
    assert found["cherry/2.png"] == (2.0, frozenset({0}), 0)
    assert "the classes are those of the column 'label'; --label-column names another" in caplog.text
    assert "1 classes of the column 'label' have no image and are left out (ghost)" in caplog.text


def test_images_without_a_name_are_numbered(folder, tmp_path):
    cells = rows_of(folder).with_format("arrow")[:]
    images = [cell["bytes"] for cell in cells.column("image").to_pylist()]
    pq.write_table(pa.table({"img": images * 2, "label": [7, 10] * 9}), tmp_path / "t.parquet")
    source = open_images(tmp_path / "t.parquet", 16)
    assert [source.name(row) for row in (0, 17)] == ["00", "17"] and source.class_names == ("10", "7")
    assert source.contents()[0].endswith(" class 7")
    assert len(open_images(tmp_path / "t.parquet", 16, first=5)) == 5


def test_columns_of_images(folder, tmp_path):
    image = (folder / "apple" / "0.png").read_bytes()
    mask = (folder / "apple" / "1.png").read_bytes()
    pq.write_table(pa.table({"mask": [mask], "image": [image]}), tmp_path / "usual.parquet")
    assert list(open_images(tmp_path / "usual.parquet", 16).contents()) == [_content(folder / "apple" / "0.png")]
    masks = open_images(tmp_path / "usual.parquet", 16, table=TableOptions(file_column="mask"))
    assert list(masks.contents()) == [_content(folder / "apple" / "1.png")]
    pq.write_table(pa.table({"before": [mask], "after": [image]}), tmp_path / "two.parquet")
    with pytest.raises(DataError, match="has images in before, after; name one of them with --file-column"):
        open_images(tmp_path / "two.parquet", 16)
    with pytest.raises(DataError, match="--file-column 'befor' holds no images; did you mean 'before'"):
        open_images(tmp_path / "two.parquet", 16, table=TableOptions(file_column="befor"))


def _content(file: Path) -> str:
    return f"{file.stat().st_size}:{zlib.crc32(file.read_bytes()):08x}"


def test_a_parquet_table_that_names_files(folder):
    table = pa.table({"path": ["cherry/1.png", "apple/0"], "label": ["x", "y"], "box": [{"x": 1}, {"x": 2}]})
    pq.write_table(table, folder / "labels.parquet")
    chosen = TableOptions(label_column="label", allow_missing=True)
    for place in (folder / "labels.parquet", folder):
        source = open_images(place, 16, table=chosen)
        assert [(source.name(row), source.label(row)) for row in (0, 1)] == [("apple/0.png", 1), ("cherry/1.png", 0)]


def test_splits_are_not_mixed(folder, tmp_path):
    rows = rows_of(folder)
    (tmp_path / "repo" / "data").mkdir(parents=True)
    for split in ("test", "train"):
        rows.to_parquet(tmp_path / "repo" / "data" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(DataError, match="holds the splits test, train: give one of them") as error:
        open_images(tmp_path / "repo", 16)
    advised = str(error.value).rpartition("such as ")[2]
    assert len(open_images(advised, 16)) == 9
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=f"give one of them, such as {tmp_path}/saved/train$"):
        open_images(tmp_path / "saved", 16)
    assert len(open_images(tmp_path / "saved" / "train", 16)) == 9


def test_broken_rows_are_broken_images(folder, tmp_path):
    cells = [(folder / "apple" / "0.png").read_bytes(), b"<html>404</html>", None]
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), tmp_path / "t.parquet")
    source = open_images(tmp_path / "t.parquet", 16)
    assert source[0].name == "0"
    for row, why in ((1, "a web page"), (2, "its row holds no image")):
        with pytest.raises(DataError, match=why):
            source[row]


def test_patterns_of_other_files(folder):
    with pytest.raises(
        DataError, match=r"stands for 0.png, 1.png, 2.png; it should stand for .parquet or .arrow files, or for"
    ):
        open_images(folder / "apple" / "*.png", 16)
