"""Images that a table describes."""

import shutil
import zipfile
from pathlib import Path

import pytest
from pydantic import ValidationError

from latentflow.columns import Column
from latentflow.data.sources.images import open_images
from latentflow.data.table_options import TableOptions
from latentflow.errors import DataError
from tests import tiny

ROWS = [("cherry", 2), ("apple", 0), ("berry", 1), ("apple", 3), ("cherry", 0), ("berry", 4)]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Class folders, and a table of some of their images that says the same classes."""
    folder = tmp_path / "photos"
    tiny.write_images(folder, per_class=5)
    keep = {f"{name}/{number}.png" for name, number in ROWS}
    for file in folder.rglob("*.png"):
        if file.relative_to(folder).as_posix() not in keep:
            file.unlink()
    return folder


def table(folder: Path, header: str, *rows: str, name: str = "labels.csv") -> Path:
    (folder / name).write_text("\n".join([header, *rows]), encoding="utf-8")
    return folder / name


def described(folder: Path) -> Path:
    rows = (f"{name}/{number}.png,{name},{number or ''}" for name, number in ROWS)
    return table(folder, "file,species,age", *rows)


def options(**given) -> TableOptions:
    return TableOptions(**given)


def records(source) -> list:
    return [
        (item.name, item.label, item.pixels.tobytes(), source.contents()[row], source.values(row))
        for row, item in enumerate(source)
    ]


def test_a_table_of_the_folders_classes_gives_what_the_folders_give(photos):
    folders = open_images(photos, 16)
    tabled = open_images(described(photos), 16, table=options(label_column="species"))
    assert tabled.class_names == folders.class_names == ("apple", "berry", "cherry")
    assert records(tabled) == records(folders)
    assert tabled.fingerprint() == folders.fingerprint()
    assert tabled.description == folders.description


def test_columns_come_with_their_images(photos):
    source = open_images(described(photos), 16, table=options(columns=["age:number", "species:label"]))
    assert source.columns == (Column("age", "number"), Column("species", "label", ("apple", "berry", "cherry")))
    assert source.class_names == () and source[0].label is None
    known = {source.name(row): source.values(row) for row in range(len(source))}
    assert known == {f"{name}/{n}.png": (float(n) if n else None, "abc".index(name[0])) for name, n in ROWS}


def test_the_first_of_each_class_keep_label_and_columns(photos):
    chosen = options(columns=["age:number"], label_column="species")
    source = open_images(described(photos), 16, first=3, table=chosen)
    assert [(source.name(row), source.label(row), source.values(row)) for row in range(3)] == [
        ("apple/0.png", 0, (None,)),
        ("berry/1.png", 1, (1.0,)),
        ("cherry/0.png", 2, (None,)),
    ]


def test_another_class_or_value_is_another_source(photos):
    first = open_images(described(photos), 16, table=options(label_column="species", columns=["age"]))
    text = (photos / "labels.csv").read_text(encoding="utf-8")
    for old, new in (("apple/3.png,apple", "apple/3.png,berry"), ("apple/3.png,apple,3", "apple/3.png,apple,4")):
        (photos / "labels.csv").write_text(text.replace(old, new), encoding="utf-8")
        other = open_images(photos, 16, table=options(label_column="species", columns=["age"]))
        assert other.fingerprint() != first.fingerprint()
        assert [other.name(row) for row in range(6)] == [first.name(row) for row in range(6)]


def test_a_flat_folder_gets_its_classes_from_a_table(tmp_path):
    tiny.write_images(tmp_path / "flat", classes=(), per_class=4)
    names = sorted(file.name for file in (tmp_path / "flat").iterdir())
    table(tmp_path / "flat", "id\tkind", *(f"{name[:-4]}\t{'ab'[i % 2]}" for i, name in enumerate(names)), name="t.tsv")
    source = open_images(tmp_path / "flat", 16, table=options(label_column="kind"))
    assert source.class_names == ("a", "b")
    assert [source.label(row) for row in range(len(source))] == [i % 2 for i in range(len(names))]
    assert source.contents()[0].endswith(" class a")


def test_a_table_in_a_zip(photos, tmp_path):
    described(photos)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in photos.rglob("*.*"):
            archive.write(file, f"wrapped/{file.relative_to(photos)}")
    chosen = options(label_column="species", columns=["age:number"])
    packed, unpacked = open_images(tmp_path / "photos.zip", 16, table=chosen), open_images(photos, 16, table=chosen)
    assert records(packed) == records(unpacked)


def test_a_table_beside_other_folders(photos, tmp_path):
    """As on Kaggle: the table is of train/, and test/ has images without rows."""
    whole = tmp_path / "whole"
    shutil.copytree(photos, whole / "train")
    shutil.copytree(photos / "apple", whole / "test")
    table(whole, "id,label", *(f"{name}/{number},{name}" for name, number in ROWS), name="train.csv")
    source = open_images(whole / "train.csv", 16)
    assert source.name(0) == "train/apple/0.png" and len(source) == len(ROWS) and source.class_names[0] == "apple"


def test_a_table_gives_labels_next_to_maps(tmp_path):
    tiny.write_segmented(tmp_path / "scenes")
    plain = open_images(tmp_path / "scenes", 16)
    names = [plain.name(row) for row in range(len(plain))]
    table(tmp_path / "scenes", "file,label", *(f"{name},{'xy'[i % 2]}" for i, name in reversed(list(enumerate(names)))))
    source = open_images(tmp_path / "scenes" / "labels.csv", 16)
    assert source.map_class_names == plain.map_class_names
    for row in range(len(plain)):
        assert source.name(row) == names[row] and source.label(row) == row % 2
        assert (source[row].semantic_map == plain[row].semantic_map).all()
    table(tmp_path / "scenes", "file,label", f"{names[0]},x")
    with pytest.raises(DataError, match=f"{len(names) - 1} images have no row .*; add the rows$"):
        open_images(tmp_path / "scenes" / "labels.csv", 16, table=options(allow_missing=True))


def test_a_table_beside_images_is_noticed(photos, caplog):
    table(photos, "a,b", "1,2", name="other.csv")
    described(photos)
    assert open_images(photos, 16).columns == ()
    assert caplog.text.count("labels.csv describes these images, and is not used") == 1
    assert "add --label-column species or --columns species,age (it has species, age)" in caplog.text
    assert "other.csv" not in caplog.text


def test_missing_rows_and_files(photos, caplog):
    path = described(photos)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("apple/3.png,apple,3\n", ""), encoding="utf-8")
    with pytest.raises(DataError, match=r"labels.csv: 1 images have no row \(apple/3.png\); .*--allow-missing"):
        open_images(path, 16)
    assert len(open_images(path, 16, table=options(allow_missing=True))) == 5
    assert "1 images have no row (apple/3.png) and are left out" in caplog.text
    path.write_text(text, encoding="utf-8")
    (photos / "apple" / "3.png").unlink()
    with pytest.raises(DataError, match=r"labels.csv: 1 rows name no file \(apple/3.png in line 5\)"):
        open_images(path, 16)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"label_column": "specie"}, "no column 'specie', which --label-column names; did you mean 'species'"),
        ({"columns": ["agee:number"]}, "no column 'agee', which --columns names; did you mean 'age'"),
        ({"columns": ["species:number"]}, "holds 'cherry', which is not a finite number"),
        ({"file_column": "fil"}, "no column 'fil', which --file-column names; did you mean 'file'"),
        ({"file_column": "species"}, "no row names a file in its column 'species'"),
        ({"columns": ["age", "age"]}, "two columns are called 'age'"),
    ],
)
def test_columns_that_are_not_there(photos, given, words):
    with pytest.raises(DataError) as error:
        open_images(described(photos), 16, table=options(**given))
    assert words in str(error.value)


def test_which_table(photos, tmp_path):
    with pytest.raises(DataError, match="photos has no table of its images"):
        open_images(photos, 16, table=options(label_column="species"))
    described(photos)
    table(photos, "file,x", "a.png,1", name="more.jsonl")
    with pytest.raises(DataError, match=r"has 2 tables \(labels.csv, more.jsonl\); give one of them as DATA"):
        open_images(photos, 16, table=options(label_column="species"))
    with pytest.raises(DataError, match="synthetic has no table"):
        open_images("synthetic", 16, table=options(label_column="species"))


def test_kinds_are_checked_with_the_request():
    with pytest.raises(ValidationError, match="unknown kind 'numbr' of 'age'; did you mean 'number'"):
        options(columns=["age:numbr"])
