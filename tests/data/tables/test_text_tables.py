import pytest

from latentflow.data.tables.text_tables import is_text_table, read_text_table
from latentflow.errors import DataError

CELLS = {"file": ["a.png", "b, c.png"], "age": ["63", ""]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'file,age\na.png,63\n"b, c.png",\n'),
        ("t.csv", '\ufefffile , age\r\na.png,63\r\n\r\n"b, c.png",'),
        ("T.CSV", "file;age\na.png;63\nb, c.png;\n"),
        ("t.csv", "file\tage\na.png\t63\nb, c.png\t\n"),
        ("t.tsv", "file\tage\na.png\t63\nb, c.png\t\n"),
    ],
)
def test_separated_cells(name, text):
    table = read_text_table(text.encode(), name)
    assert table.cells == CELLS


def test_lines_of_json():
    text = '{"file": "a.png", "age": 63, "box": {"x": 1}}\n\n{"file": "b.png", "tags": ["x"]}\r\n'
    table = read_text_table(text.encode(), "t.jsonl")
    assert table.cells == {"file": ["a.png", "b.png"], "age": [63, None], "tags": [None, ["x"]]}
    assert [table.place(row) for row in (0, 1)] == ["line 1", "line 3"]


def test_rows_know_their_line():
    table = read_text_table(b'file,note\na.png,"two\nlines"\n\nb.png,x\n', "t.csv")
    assert [table.place(row) for row in (0, 1)] == ["line 3", "line 5"]


def test_columns_without_a_name_get_a_number():
    assert list(read_text_table(b",file\n0,a.png\n", "t.csv").cells) == ["column 1", "file"]


def test_suffixes():
    assert [is_text_table(name) for name in ("a.csv", "b/A.TSV", "c.jsonl", "d.json", "csv", "e.txt")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"", "t.csv is empty"),
        ("t.csv", b"file,age\n", "has a header and no rows"),
        ("t.csv", b"file,age\na.png\n", "line 2: 1 cells, but the header has 2"),
        ("t.csv", b"file,age\na.png,1\nb.png,1,5\n", "line 3: 3 cells, but the header has 2"),
        ("t.csv", b"file,file\na,b\n", "two columns are called 'file'"),
        ("t.csv", b'file,age\n"a.png,1\n', "line 2: unexpected end of data"),
        ("t.csv", b"file,name\na.png,x\nb.png,caf\xe9\n", "line 3: this is not UTF-8"),
        ("t.jsonl", b'{"file": "a.png"}\n{"file": \n', "line 2: this is not JSON"),
        ("t.jsonl", b'["a.png"]\n', "line 1: this is no object"),
        ("t.jsonl", b"\n", "has no rows"),
        ("t.jsonl", b"[" * 100_000, "line 1: this is not JSON"),
    ],
)
def test_broken_tables(name, content, words):
    with pytest.raises(DataError) as error:
        read_text_table(content, name)
    assert words in str(error.value) and "\n" not in str(error.value)
