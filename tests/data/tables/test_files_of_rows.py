import pytest

from latentflow.data.tables.files_of_rows import FileNames, file_column, files_of_rows
from latentflow.data.tables.table import ImageTable
from latentflow.errors import DataError

FILES = FileNames(["train/cat/a.jpg", "train/dog/a.jpg", "train/dog/b.png", "test/7.png"])


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        ("train/cat/a.jpg", ["train/cat/a.jpg"]),
        ("./train/cat/../cat/a.jpg", ["train/cat/a.jpg"]),
        (r"train\cat\a.jpg", ["train/cat/a.jpg"]),
        ("/train/cat/a.jpg", ["train/cat/a.jpg"]),
        ("cat/a", ["train/cat/a.jpg"]),
        (" b.png ", ["train/dog/b.png"]),
        ("b", ["train/dog/b.png"]),
        (7, ["test/7.png"]),
        ("a.jpg", ["train/cat/a.jpg", "train/dog/a.jpg"]),
        ("at/a.jpg", []),
        ("c.png", []),
        ("", []),
        (None, []),
        (["b.png"], []),
    ],
)
def test_a_file_is_found_by_its_path_its_end_or_its_stem(cell, found):
    assert FILES.matching(cell) == found


def test_the_column_of_files():
    by_name = ImageTable("t", {"id": ["b"], "Image": ["b.png"]})
    assert file_column(by_name, FILES, None) == "Image"
    assert file_column(by_name, FILES, "id") == "id"
    by_cells = ImageTable("t", {"age": ["63"], "id": ["b"]})
    assert file_column(by_cells, FILES, None) == "id"
    assert file_column(ImageTable("t", {"file_name": ["gone.png"]}), FILES, None) == "file_name"
    assert file_column(ImageTable("t", {"age": ["63"]}), FILES, None) is None
    with pytest.raises(DataError, match="no column 'imge', which --file-column names; did you mean 'Image'"):
        file_column(by_name, FILES, "imge")


def test_rows_pair_up_with_files():
    table = ImageTable("t", {"file": ["7", "b.png", "cat/a"]})
    assert files_of_rows(table, "file", FILES, allow_missing=False) == (
        [0, 1, 2],
        ["test/7.png", "train/dog/b.png", "train/cat/a.jpg"],
    )


def test_rows_without_a_file(caplog):
    table = ImageTable("t", {"file": ["b.png", "gone.png", ""]}, lambda row: f"line {row + 2}")
    with pytest.raises(
        DataError, match=r"t: 2 rows name no file \(gone.png in line 3, nothing in line 4\); .*--allow-missing"
    ):
        files_of_rows(table, "file", FILES, allow_missing=False)
    assert files_of_rows(table, "file", FILES, allow_missing=True) == ([0], ["train/dog/b.png"])
    assert "t: 2 rows name no file (gone.png in line 3, nothing in line 4) and are left out" in caplog.text


def test_a_column_that_names_no_file_at_all():
    with pytest.raises(DataError, match=r"no row names a file in its column 'file' \(x, y\)"):
        files_of_rows(ImageTable("t", {"file": ["x", "y"]}), "file", FILES, allow_missing=True)


def test_ambiguous_and_doubled_rows():
    with pytest.raises(DataError, match=r"row 0: a.jpg could be train/cat/a.jpg, train/dog/a.jpg; write the path"):
        files_of_rows(ImageTable("t", {"file": ["a.jpg"]}), "file", FILES, allow_missing=True)
    with pytest.raises(DataError, match=r"t: row 0 and row 2 both name train/dog/b.png; remove one"):
        files_of_rows(ImageTable("t", {"file": ["b", "7", "b.png"]}), "file", FILES, allow_missing=True)
