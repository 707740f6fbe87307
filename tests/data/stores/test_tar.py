import gzip
import io
import pickle
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latentflow.data.stores import tar
from latentflow.data.stores.tar import TarStore
from latentflow.errors import DataError


def packed(path: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


CONTENTS = {f"{'deep/' * 30}{number}.txt": bytes([number]) * (600 * number) for number in range(9)}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_where_they_lie(tmp_path, kind):
    members = CONTENTS if kind != tarfile.USTAR_FORMAT else {name[-90:].lstrip("/"): c for name, c in CONTENTS.items()}
    store = TarStore(tmp_path, [packed(tmp_path / "a.tar", members, kind)])
    files = store.files()
    assert {name: store.read(file.path) for name, file in files.items()} == members
    paths = [file.path for file in files.values()]
    assert store.contents(paths) == [f"{len(one)}:{zlib.crc32(one):08x}" for one in members.values()]
    assert store.contents(paths[::-2]) == store.contents(paths)[::-2]
    assert [store.held_bytes(path) for path in paths] == [len(one) for one in members.values()]
    assert store.mark(paths[8]) == members[list(members)[8]][:4096]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(pickle.loads(pickle.dumps(store)).read, paths)) == list(members.values())


def test_what_is_listed(tmp_path):
    members = {
        "./cat/a.png": b"1",
        "cat/.hidden.png": b"2",
        "__MACOSX/cat/a.png": b"3",
        "cat/Thumbs.db": b"4",
        "../outside.png": b"5",
        "cafe\u0301/b.png": b"6",
    }
    file = packed(tmp_path / "a.tar", members)
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    listing = TarStore(tmp_path, [file]).listing()
    assert list(listing.files) == ["cat/a.png", "caf\xe9/b.png"] and listing.folders == ["caf\xe9", "cat"]


def test_names_in_two_archives_get_that_of_the_archive(tmp_path):
    files = [packed(tmp_path / f"{n}.tar", {"a.png": b"x" * n, f"{n}.png": b"y"}) for n in (1, 2)]
    store = TarStore(tmp_path, files)
    listing = store.listing()
    assert list(listing.files) == ["1/a.png", "2/a.png", "1/1.png", "2/2.png"] and store.doubled == "a.png"
    assert store.read(listing.files["2/a.png"].path) == b"xx"
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match=r"holds a.png twice; remove one of them"):
        TarStore(tmp_path, [tmp_path / "twice.tar"]).listing()


def test_the_listing_is_remembered(tmp_path, monkeypatch):
    file = packed(tmp_path / "a.tar", {"a.png": b"1"})
    monkeypatch.setattr("latentflow.ledger._UNSETTLED_SECONDS", -1)
    before = TarStore(tmp_path, [file]).listing()
    monkeypatch.setattr(tar, "_members_of", None)
    assert TarStore(tmp_path, [file]).listing() == before
    monkeypatch.undo()
    packed(file, {"b.png": b"1"})
    assert list(TarStore(tmp_path, [file]).listing().files) == ["b.png"]


def test_archives_that_cannot_be_read(tmp_path):
    good = packed(tmp_path / "good.tar", {"a.png": bytes(5000)})
    (tmp_path / "cut.tar").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "gz.tar").write_bytes(gzip.compress(good.read_bytes()))
    (tmp_path / "text.tar").write_bytes(b"no archive")
    (tmp_path / "empty.tar").write_bytes(b"")
    for name, words in {
        "cut": "cut.tar (is cut short: it ends inside of a.png|.*unexpected end of data)",
        "gz": "gz.tar is compressed, .*; unpack it: gunzip",
        "text": "text.tar is not a readable tar archive",
        "empty": "empty.tar is not a readable tar archive",
        "gone": "gone.tar cannot be read",
    }.items():
        with pytest.raises(DataError, match=words):
            TarStore(tmp_path, [tmp_path / f"{name}.tar"]).listing()


def test_an_archive_that_is_cut_later(tmp_path):
    file = packed(tmp_path / "a.tar", {"a.png": bytes(5000)})
    store = TarStore(tmp_path, [file])
    (found,) = store.files().values()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="its archive is cut short"):
        store.read(found.path)
