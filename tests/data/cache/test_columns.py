"""Named columns in a latent cache: what is read back is what the source gives, from files, memory and images alike."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from latentflow.artifacts import sha256_file
from latentflow.commands.info import describe
from latentflow.data.batches import TrainingImages
from latentflow.data.cache.reader import LatentCache
from latentflow.data.column_tensors import rows_of
from latentflow.data.sources.images import open_images
from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.errors import ArtifactError, DataError
from tests import tiny
from tests.tiny import write_cache

NUM = 20
NAMES = ["traits", "size", "shape"]


class Patchy(SyntheticShapes):
    """Not every value is known, and one can be corrected."""

    corrected = None

    def values(self, index):
        known = super().values(index)
        if index == self.corrected:
            return (0, *known[1:])
        return tuple(None if (index + place) % 7 == 0 else value for place, value in enumerate(known))


@pytest.fixture(scope="module")
def source() -> SyntheticShapes:
    return Patchy(NUM, tiny.IMAGE_SIZE, columns=open_images("synthetic:1:0:all", 8).columns)


@pytest.fixture(scope="module")
def cached(source, kl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns") / "cache"
    write_cache(source, kl, folder, shard_size=8, num_workers=0)
    return folder


def expected(source, images: TrainingImages, positions) -> torch.Tensor:
    numbers = [[column.name for column in source.columns].index(name) for name in NAMES]
    values = [source.values(index) for index in images.indices_at(positions).tolist()]
    return rows_of([source.columns[n] for n in numbers], [[one[n] for n in numbers] for one in values])


def test_cache_memory_and_images_give_the_same_columns(source, cached):
    read = partial(TrainingImages, seed=3, flip=False, columns=NAMES)
    from_images, from_cache, held_cache, held_images = (
        read(source), read(LatentCache(cached)), read(LatentCache(cached)), read(source)
    )  # fmt: skip
    for held in (held_cache, held_images):
        held.hold(torch.device("cpu"))
    positions = range(5, 50)
    wanted = expected(source, from_images, positions)
    assert wanted.shape == (45, 4 + 2 + 1)
    for images in (from_images, from_cache, held_cache, held_images):
        assert [column.name for column in images.columns] == NAMES
        found = images.at(positions).columns
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)
    pairs = zip(from_images.column_values(), from_cache.column_values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_without_columns_nothing_of_them_is_read(cached):
    images = TrainingImages(LatentCache(cached), seed=3, flip=False)
    assert images.at(range(4)).columns is None
    assert images.cached_tensors == ["moments", "labels"]


def test_info_names_the_columns(cached):
    assert describe(cached)["columns"][2:4] == ["traits (labels of 3 classes)", "size (number)"]


def test_a_corrected_value_encodes_its_shard_again_and_the_others_stay(source, kl, tmp_path):
    folder = tmp_path / "cache"
    write_cache(source, kl, folder, shard_size=8, num_workers=0)
    files = sorted(folder.glob("shard-*.safetensors"))
    before = [sha256_file(file) for file in files]

    class Corrected(Patchy):
        corrected = 17

    write_cache(Corrected(NUM, tiny.IMAGE_SIZE, columns=source.columns), kl, folder, shard_size=8, num_workers=0)
    changed = [sha256_file(file) != was for file, was in zip(files, before, strict=True)]
    assert changed == [False, False, True]
    assert int(LatentCache(folder).column_values(0, [17])[0]) == 0


def test_other_columns_are_another_cache(source, cached, kl):
    with pytest.raises(ArtifactError, match="columns"):
        write_cache(replace(source, columns=source.columns[:2]), kl, cached, shard_size=8, num_workers=0)


def test_a_value_that_its_column_cannot_have_is_refused(source, kl, tmp_path):
    class Wrong(SyntheticShapes):
        def values(self, index):
            return (4, *super().values(index)[1:])

    wrong = Wrong(2, tiny.IMAGE_SIZE, columns=source.columns)
    with pytest.raises(
        DataError, match="synthetic/000000: column shape has the value 4, which is not an index below 4"
    ):
        write_cache(wrong, kl, tmp_path / "cache", num_workers=0)
