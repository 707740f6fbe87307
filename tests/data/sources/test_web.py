"""Images from addresses and from the hub, each served by this machine."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentflow.data.sources.hub_files import HubDataset, chosen_shards
from latentflow.data.sources.images import open_images
from latentflow.data.table_options import TableOptions
from latentflow.errors import ArtifactError, DataError
from tests import tiny
from tests.data.stores.test_download import FileServer, server  # noqa: F401 - a fixture
from tests.test_hub import FakeHub, Repo, go_offline, home, hub  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("data") / "photos", per_class=2)


def parquet(photos: Path, pattern: str = "*.png") -> bytes:
    files = sorted(photos.rglob(pattern))
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    to = io.BytesIO()
    pq.write_table(pa.table({"image": images, "label": [file.parent.name for file in files]}), to)
    return to.getvalue()


def shard(photos: Path, pattern: str) -> bytes:
    to = io.BytesIO()
    with tarfile.open(fileobj=to, mode="w") as archive:
        for file in sorted(photos.rglob(pattern)):
            archive.add(file, f"{file.parent.name}/{file.name}")
            fact = json.dumps({"label": file.parent.name}).encode()
            member = tarfile.TarInfo(f"{file.parent.name}/{file.stem}.json")
            member.size = len(fact)
            archive.addfile(member, io.BytesIO(fact))
    return to.getvalue()


def records(source) -> list:
    return [(item.name, item.label, item.pixels.tobytes(), source.contents()[row]) for row, item in enumerate(source)]


# Addresses


def test_shards_of_an_address(photos, server: FileServer):  # noqa: F811
    server.files = {f"/set/s-{number:02}.tar": shard(photos, f"{number}.png") for number in range(2)}
    source, folders = open_images(f"{server.url}/set/s-{{00..01}}.tar", 16), open_images(photos, 16)
    assert records(source) == records(folders) and source.fingerprint() == folders.fingerprint()
    assert source.description == "6 images in 3 classes from s-{00..01}.tar"
    server.files = {}
    assert len(open_images(f"{server.url}/set/s-{{00..01}}.tar", 16, first=3)) == 3
    assert len(server.asked) == 2


def test_one_file_of_an_address(photos, server: FileServer):  # noqa: F811
    server.files = {"/a.parquet": parquet(photos)}
    assert records(open_images(f"{server.url}/a.parquet?key=1", 16)) == records(open_images(photos, 16))


def test_addresses_that_are_not_read(server: FileServer):  # noqa: F811
    with pytest.raises(DataError, match=r"page.html cannot be read; give the address of .tar, .parquet or .zip files"):
        open_images(f"{server.url}/page.html", 16)
    with pytest.raises(DataError, match=r"s-0.tar cannot be read \(404"):
        open_images(f"{server.url}/s-{{0..3}}.tar", 16)


# The hub


@pytest.fixture
def repo(hub: FakeHub) -> dict[str, bytes]:  # noqa: F811
    """The files of the data set me/flowers."""
    hub.repos["datasets/me/flowers"] = Repo()
    return hub.repos["datasets/me/flowers"].branches["main"][-1]


def test_a_data_set_of_parquet(photos, repo, hub, go_offline):  # noqa: F811
    repo["data/train-00000-of-00002.parquet"] = parquet(photos, "0.png")
    repo["data/train-00001-of-00002.parquet"] = parquet(photos, "1.png")
    repo["data/test-00000-of-00001.parquet"] = parquet(photos, "1.png")
    source, folders = open_images("hf:me/flowers", 16), open_images(photos, 16)
    assert records(source) == records(folders) and source.fingerprint() == folders.fingerprint()
    assert source.description == "6 images in 3 classes from flowers"
    assert len([path for command, path in hub.requests if command == "GET" and path.endswith(".parquet")]) == 2
    assert len(open_images("hf:me/flowers:test", 16)) == 3
    go_offline()
    assert len(open_images("hf:me/flowers@main:test", 16)) == 3
    with pytest.raises(ArtifactError, match="HF_HUB_OFFLINE is set"):
        open_images("hf:me/trees", 16)


def test_what_the_hub_has_converted(photos, repo, hub):  # noqa: F811
    repo["flowers.py"] = b"a script, which nobody runs"
    converted = {"small/train/0000.parquet": parquet(photos, "0.png"), "large/train/0000.parquet": parquet(photos)}
    hub.repos["datasets/me/flowers"].branches["refs/convert/parquet"] = [converted]
    assert len(open_images("hf:me/flowers/small", 16)) == 3
    with pytest.raises(DataError, match="has the configurations large, small; name one of them: hf:me/flowers/NAME"):
        open_images("hf:me/flowers", 16)


def test_a_data_set_of_shards_or_of_images(photos, repo):
    for file in photos.rglob("*.png"):
        repo[file.relative_to(photos).as_posix()] = file.read_bytes()
    assert records(open_images("hf:me/flowers", 16)) == records(open_images(photos, 16))
    chosen = TableOptions(label_column="label")
    repo["train-0.tar"] = shard(photos, "*.png")
    assert records(open_images("hf:me/flowers", 16, table=chosen)) == records(open_images(photos, 16))


def test_data_sets_that_cannot_be_read(repo):
    repo["notes.txt"] = b"x"
    for written in ("hf:me/flowers", "hf:me/flowers@main"):
        with pytest.raises(DataError, match="holds no parquet, tar archives or images"):
            open_images(written, 16)
    with pytest.raises(ArtifactError, match="has no revision 'v9'"):
        open_images("hf:me/flowers@v9", 16)
    with pytest.raises(ArtifactError, match=r"/datasets/me/flower does not exist or is private"):
        open_images("hf:me/flower", 16)
    with pytest.raises(DataError, match="hf:flowers is not a data set like hf:owner/name"):
        open_images("hf:flowers", 16)


@pytest.mark.parametrize(
    ("text", "revision", "config", "split"),
    [
        ("me/flowers", None, None, None),
        ("me/flowers:test", None, None, "test"),
        ("me/flowers@v1.0/large:test", "v1.0", "large", "test"),
        ("me/flowers/large", None, "large", None),
    ],
)
def test_what_is_asked_for(text, revision, config, split):
    asked = HubDataset.parse(text)
    assert (asked.source.repo, asked.source.revision, asked.config, asked.split) == (
        "me/flowers",
        revision,
        config,
        split,
    )


NAMES = ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", "data/odd_name-0-of-1.parquet"]


@pytest.mark.parametrize(
    ("names", "text", "chosen"),
    [
        (NAMES, "me/x", NAMES[:1]),
        (NAMES, "me/x:odd_name", NAMES[2:]),
        (["default/train/0000.parquet", "default/test/0000.parquet"], "me/x:test", ["default/test/0000.parquet"]),
        (["a.parquet", "b.parquet"], "me/x", ["a.parquet", "b.parquet"]),
        (["train/0.parquet", "test/0.parquet"], "me/x", ["train/0.parquet"]),
        (["cats/test-0-of-1.parquet"], "me/x", ["cats/test-0-of-1.parquet"]),
    ],
)
def test_which_shards(names, text, chosen):
    assert chosen_shards(names, HubDataset.parse(text), "x") == chosen


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("me/x:tran", "x has no split 'tran'; did you mean 'train'"),
        ("me/x/big", "x has no configuration 'big'"),
    ],
)
def test_shards_that_are_not_there(text, words):
    with pytest.raises(DataError, match=words):
        chosen_shards(NAMES, HubDataset.parse(text), "x")
