import multiprocessing
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import ipc

from latentflow.data.stores import arrow
from latentflow.data.stores.arrow import ArrowStore
from latentflow.errors import DataError

CONTENTS = [bytes([65 + row]) * (row + 1) for row in range(10)]
TABLE = pa.table({"image": [{"bytes": one, "path": f"{one[:1].decode()}.png"} for one in CONTENTS], "age": range(10)})


@pytest.fixture(params=["parquet", "stream", "file"])
def store(request, tmp_path) -> ArrowStore:
    """Two files of five rows; those of parquet in groups of two."""
    files = [tmp_path / f"{number}.{'parquet' if request.param == 'parquet' else 'arrow'}" for number in (0, 1)]
    for number, file in enumerate(files):
        part = TABLE.slice(5 * number, 5)
        if request.param == "parquet":
            pq.write_table(part, file, row_group_size=2)
            continue
        with (ipc.new_stream if request.param == "stream" else ipc.new_file)(str(file), part.schema) as writer:
            writer.write_table(part)
    store = ArrowStore(tmp_path, files)
    assert store.image_columns() == ["image"]
    store.take_images("image")
    return store


def test_rows_are_counted_over_files(store):
    assert len(store) == 10
    assert [store.read(str(row)) for row in (9, 0, 5, 4, 1)] == [CONTENTS[row] for row in (9, 0, 5, 4, 1)]
    assert store.stored_paths() == [f"{one[:1].decode()}.png" for one in CONTENTS]
    assert store.column("age") == list(range(10))
    assert store.held_bytes("3") == 0


def test_contents_are_size_and_checksum(store, monkeypatch):
    wanted = [f"{len(one)}:{zlib.crc32(one):08x}" for one in CONTENTS]
    assert store.contents(["7", "0"]) == [wanted[7], wanted[0]]
    assert store.contents([str(row) for row in range(10)]) == wanted


def _second(store: ArrowStore) -> bytes:
    return store.read("1")


def test_any_thread_or_process_reads(store, monkeypatch):
    monkeypatch.setattr(arrow, "_MOST_HELD", 1)  # every group evicts the one before
    monkeypatch.setattr(arrow, "_MOST_OPEN", 1)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(store.read, map(str, range(10)), chunksize=1)) == CONTENTS
    assert pickle.loads(pickle.dumps(store)).read("6") == CONTENTS[6]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_second, [store]) == CONTENTS[1]
    assert store.read("1") == CONTENTS[1]


def test_which_columns_hold_images(tmp_path):
    def columns(**cells) -> list[str]:
        pq.write_table(pa.table(cells), tmp_path / "t.parquet")
        return ArrowStore(tmp_path, [tmp_path / "t.parquet"]).image_columns()

    assert columns(image=[b"x"], age=[1], name=["a"]) == ["image"]
    assert columns(image=pa.array([b"x"], pa.large_binary()), box=[{"x": 1}]) == ["image"]
    assert columns(a=[{"bytes": b"x"}], b=[b"y"]) == ["a", "b"]
    assert columns(age=[1], tags=[["x"]]) == []


def test_rows_without_an_image(tmp_path):
    cells = [{"bytes": b"x", "path": None}, {"bytes": None, "path": "/home/me/a.png"}, None]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "t.parquet")
    store = ArrowStore(tmp_path, [tmp_path / "t.parquet"])
    store.take_images("image")
    with pytest.raises(ValueError, match=r"its row holds the path /home/me/a.png and not the image"):
        store.read("1")
    with pytest.raises(ValueError, match="its row holds no image"):
        store.read("2")
    assert store.contents(["0", "1", "2"]) == ["1:8cdc1683", "unreadable", "unreadable"]


def test_files_that_cannot_be_read(tmp_path):
    good = tmp_path / "good.parquet"
    pq.write_table(TABLE, good)
    broken = {"text.parquet": b"no parquet", "empty.parquet": b"", "cut.parquet": good.read_bytes()[:-9]}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} cannot be read \(.*\); copy it again") as error:
            ArrowStore(tmp_path, [tmp_path / name])
        assert "\n" not in str(error.value)
    (tmp_path / "text.arrow").write_bytes(b"no arrow at all, but longer")
    with pytest.raises(DataError, match=r"text.arrow cannot be read"):
        ArrowStore(tmp_path, [tmp_path / "text.arrow"])
    pq.write_table(TABLE.slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="has no rows"):
        ArrowStore(tmp_path, [tmp_path / "none.parquet"])
    pq.write_table(TABLE.drop_columns("age"), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other.parquet has other columns than .*good.parquet"):
        ArrowStore(tmp_path, [good, tmp_path / "other.parquet"])


def test_damage_inside_is_found_when_it_is_read(tmp_path):
    file = Path(tmp_path / "t.parquet")
    pq.write_table(pa.table({"image": [bytes([row]) * 5000 for row in range(4)]}), file, compression="gzip")
    content = bytearray(file.read_bytes())
    content[40:80] = bytes(40)
    file.write_bytes(content)
    store = ArrowStore(tmp_path, [file])
    store.take_images("image")
    with pytest.raises(DataError, match=r"t.parquet cannot be read"):
        store.read("0")
