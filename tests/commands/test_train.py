"""`latentflow train` with conditions of space: what cannot be had is refused, before anything is written."""

from __future__ import annotations

import shutil

import pytest

from latentflow.commands.train import train as train_command
from latentflow.data.cache_writer import write_cache
from latentflow.data.images import open_images
from latentflow.errors import ConfigError, DataError, LatentFlowError
from tests import tiny


@pytest.fixture
def refused(tmp_path, kl_folder):
    """Trains, and makes sure that it is refused with these words and that nothing was written."""

    def run(kind: type[LatentFlowError], *words: str, **given) -> None:
        recipe = tiny.recipe(**{"autoencoder": kl_folder, **given}, out=tmp_path / "run")
        with pytest.raises(kind) as caught:
            train_command(recipe, cpu=True)
        assert "\n" not in str(caught.value)
        for part in words:
            assert part in str(caught.value)
        assert not (tmp_path / "run").exists()

    return run


@pytest.mark.parametrize("of", ["images", "cache"])
def test_maps_that_the_data_have_not(refused, images, cache, of):
    path = {"images": images, "cache": cache}[of]
    words = (str(path), "has no semantic maps", "masks/", "classes.json", "or set it to false")
    refused(ConfigError, *words, data={"path": path}, conditioning={"semantic_map": True})


def test_holes_that_the_cache_has_not(refused, cache):
    words = ("conditioning.inpainting = true", "no images with holes", "data.images", "--mask-variants")
    refused(ConfigError, *words, data={"path": cache}, conditioning={"inpainting": True})


def test_images_that_are_not_those_of_the_cache(refused, tmp_path, cache, segmented):
    words = ("data.images", str(segmented), "are not the images", str(cache))
    refused(DataError, *words, data={"path": cache, "images": segmented}, conditioning={"inpainting": True})
    fewer = tiny.write_images(tmp_path / "fewer", per_class=5)
    refused(DataError, *words[:1], data={"path": cache, "images": fewer}, conditioning={"inpainting": True})


def test_images_that_are_nowhere(refused, cache):
    given = {"data": {"path": cache, "images": "nowhere-at-all"}, "conditioning": {"inpainting": True}}
    refused(DataError, "nowhere-at-all", **given)


def test_the_remedies_help(refused, tmp_path, images, cache, kl, kl_folder):
    """The two that the message about missing holes names."""
    moved = shutil.copytree(images, tmp_path / "moved")
    given = {"autoencoder": kl_folder, "conditioning": {"inpainting": True}, "training": {"steps": 1}}
    with_images = tiny.recipe(**given, data={"path": cache, "images": moved}, out=tmp_path / "one")
    assert train_command(with_images, cpu=True).outcome.finished
    write_cache(open_images(images, tiny.IMAGE_SIZE), kl, tmp_path / "cache", mask_variants=2)
    from_cache = tiny.recipe(**given, data={"path": tmp_path / "cache"}, out=tmp_path / "two")
    assert train_command(from_cache, cpu=True).outcome.finished


@pytest.mark.parametrize(
    ("sampling", "dropout", "said"),
    [
        ({"guided_by": ["label"]}, {"label_dropout": 0}, "guided by label"),
        ({"guided_by": ["inpainting"]}, {}, "guided by inpainting"),
    ],
)
def test_previews_guided_by_what_was_never_dropped(refused, segmented, sampling, dropout, said):
    given = {"sampling": {"guidance": 2.0, **sampling}, "conditioning": {"semantic_map": True, **dropout}}
    refused(ConfigError, said, "never trained", data={"path": segmented}, **given)
