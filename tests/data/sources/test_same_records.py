"""Whatever images are read from, the latent cache is the same, byte for byte."""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentflow.data.sources.images import open_images
from latentflow.data.table_options import TableOptions
from tests import tiny
from tests.tiny import write_cache


def as_zip(photos: Path, place: Path) -> Path:
    with zipfile.ZipFile(place / "photos.zip", "w") as archive:
        for file in photos.rglob("*.png"):
            archive.write(file, file.relative_to(photos))
    return place / "photos.zip"


def as_table(photos: Path, place: Path) -> Path:
    files = sorted(photos.rglob("*.png"), reverse=True)
    shutil.copytree(photos, place / "photos")
    rows = [f"{file.relative_to(photos)},{file.parent.name}" for file in files]
    (place / "photos" / "labels.csv").write_text("\n".join(["file,label", *rows]), encoding="utf-8")
    return place / "photos" / "labels.csv"


def as_parquet(photos: Path, place: Path) -> Path:
    files = sorted(photos.rglob("*.png"), key=lambda file: file.name)
    table = pa.table(
        {
            "image": [{"bytes": file.read_bytes(), "path": str(file.relative_to(photos))} for file in files],
            "label": [file.parent.name for file in files],
        }
    )
    pq.write_table(table, place / "photos.parquet", row_group_size=4)
    return place / "photos.parquet"


def as_saved(photos: Path, place: Path) -> Path:
    datasets.disable_progress_bars()
    files = sorted(photos.rglob("*.png"), key=lambda file: file.name)
    names = sorted({file.parent.name for file in files})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names[::-1])})
    cells = {"image": list(map(str, files)), "label": [names[::-1].index(file.parent.name) for file in files]}
    datasets.Dataset.from_dict(cells, features=features).save_to_disk(place / "photos", num_shards=3)
    return place / "photos"


def as_archives(photos: Path, place: Path) -> Path:
    """The shards of a WebDataset."""
    (place / "photos").mkdir()
    files = sorted(photos.rglob("*.png"), key=lambda file: file.name)
    for number in range(2):
        with tarfile.open(place / "photos" / f"train-{number:04}.tar", "w") as archive:
            for file in files[number::2]:
                stem = file.relative_to(photos).with_suffix("")
                archive.add(file, f"./{stem}.png")
                add_file(archive, f"./{stem}.json", json.dumps({"label": file.parent.name}).encode())
    return place / "photos" / "train-{0000..0001}.tar"


def as_packed_folders(photos: Path, place: Path) -> Path:
    """A plain archive of class folders."""
    with tarfile.open(place / "photos.tar", "w") as archive:
        archive.add(photos, "photos")
    return place / "photos.tar"


def add_file(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


FORMS = {"zip": as_zip, "table": as_table, "parquet": as_parquet, "saved by datasets": as_saved}
FORMS |= {"WebDataset": as_archives, "tar": as_packed_folders}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("data") / "photos", per_class=5)


def encoded(place: Path, kl, out: Path, **options) -> dict[str, bytes]:
    """Every file of the cache of the images at `place`; it does not say where they were."""
    source = open_images(place, tiny.IMAGE_SIZE, table=TableOptions())
    write_cache(source, kl, out, shard_size=4, **options)
    where = source.description.rpartition(" from ")[2].encode()
    return {file.name: file.read_bytes().replace(b"from " + where, b"from X") for file in out.iterdir()}


@pytest.fixture(scope="module")
def of_folder(photos, kl, tmp_path_factory) -> dict[str, bytes]:
    return encoded(photos, kl, tmp_path_factory.mktemp("cache") / "folder")


@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS)
def test_the_cache_is_that_of_the_folder(photos, of_folder, kl, tmp_path, write: Callable[[Path, Path], Path]):
    found = encoded(write(photos, tmp_path), kl, tmp_path / "cache")
    assert _sealed_apart(found) == _sealed_apart(of_folder)
    assert len([name for name in found if name.endswith(".safetensors")]) == 4


@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS)
def test_killed_and_resumed_it_is_the_same(photos, of_folder, kl, tmp_path, write: Callable[[Path, Path], Path]):
    place, calls = write(photos, tmp_path), []

    def die(num_images: int) -> None:
        calls.append(num_images)
        if len(calls) == 2:
            raise KeyError("killed here")

    with pytest.raises(KeyError):
        encoded(place, kl, tmp_path / "cache", on_images=die)
    kept: list[int] = []
    found = encoded(place, kl, tmp_path / "cache", on_kept=kept.append)
    assert kept and _sealed_apart(found) == _sealed_apart(of_folder)


def _sealed_apart(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files, without the checksum of the index, which covers the name of the place."""
    index = files["index.json"]
    start = index.rindex(b'"checksum"')
    return {**files, "index.json": index[:start]}
