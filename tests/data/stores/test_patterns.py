import pytest

from latentflow.data.stores.patterns import braces_expanded, expanded, is_pattern
from latentflow.errors import DataError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a.tar", ["a.tar"]),
        ("{0008..0010}.tar", ["0008.tar", "0009.tar", "0010.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("x{1..1}{,y}", ["x1", "x1y"]),
        ("{a}.tar", ["{a}.tar"]),
    ],
)
def test_braces(text, found):
    assert braces_expanded(text) == found


@pytest.mark.parametrize("text", ["{5..3}.tar", "{0..1000000000}.tar"])
def test_too_many_or_none(text):
    with pytest.raises(DataError, match=r"stands for [\d,]+ files; write fewer"):
        braces_expanded(text)


def test_files_of_a_pattern(tmp_path):
    for name in ("b-2.x", "b-1.x", "b-10.x", "c.x", "[odd].x"):
        (tmp_path / name).touch()
    (tmp_path / "b-folder.x").mkdir()

    def names(pattern: str) -> list[str]:
        return [file.name for file in expanded(tmp_path / pattern)]

    assert names("b-*.x") == ["b-1.x", "b-10.x", "b-2.x"]
    assert names("b-{2,1}.x") == ["b-2.x", "b-1.x"]
    assert is_pattern(tmp_path / "b-*.x") and is_pattern(tmp_path / "b-{1..2}.x")
    assert not is_pattern(tmp_path / "c.x") and not is_pattern(tmp_path / "[odd].x")  # a file that is there
    with pytest.raises(DataError, match=r"names .*b-3.x, which is not there"):
        names("b-{1..3}.x")
    with pytest.raises(DataError, match=r"no file is called like .*z\*"):
        names("z*")
