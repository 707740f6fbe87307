"""`latentflow train` with conditions of space: what cannot be had is refused, before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.commands.train import prepare
from latentflow.commands.train import train as train_command
from latentflow.data.sources.images import open_images
from latentflow.data.sources.listed import list_files
from latentflow.data.sources.stored import ImageFiles
from latentflow.data.stores.files import FolderStore
from latentflow.errors import ArtifactError, ConfigError, DataError, LatentFlowError
from latentflow.model.guide_reference import GuideReference
from latentflow.plans import changed_values
from latentflow.sizes import Size
from latentflow.training import fitting, velocity_run
from latentflow.training.config import Recipe, load_recipe
from latentflow.training.fitting import with_values
from latentflow.training.loop import micro_batches
from latentflow.training.memory import bytes_per_image, state_bytes
from tests import tiny
from tests.processes import run_here
from tests.tiny import write_cache


@pytest.fixture
def refused(tmp_path, kl_folder):
    """Trains, and makes sure that it is refused with these words and that nothing was written."""

    def run(kind: type[LatentFlowError], *words: str, **given) -> None:
        recipe = tiny.recipe(**{"autoencoder": kl_folder, **given}, out=tmp_path / "run")
        with pytest.raises(kind) as caught:
            train_command(recipe, runtime=tiny.CPU)
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
    assert train_command(with_images, runtime=tiny.CPU).outcome.finished
    write_cache(open_images(images, tiny.IMAGE_SIZE), kl, tmp_path / "cache", mask_variants=2)
    from_cache = tiny.recipe(**given, data={"path": tmp_path / "cache"}, out=tmp_path / "two")
    assert train_command(from_cache, runtime=tiny.CPU).outcome.finished


@pytest.mark.parametrize(
    ("sampling", "dropout", "said"),
    [
        ({"guided_by": ["label"]}, {"label_dropout": 0}, "guided by label"),
        ({"guided_by": ["inpainting"]}, {}, "guided by inpainting"),
    ],
)
def test_previews_guided_by_what_was_never_dropped(refused, segmented, sampling, dropout, said):
    given = {"sampling": {"guidance": 2.0, **sampling}, "conditioning": {"semantic_map": True, **dropout}}
    refused(ConfigError, said, "was not trained", data={"path": segmented}, **given)


# What the data decide


@pytest.fixture
def flat(tmp_path, kl) -> Path:
    """A latent cache of 9 unlabelled images without mirrored ones."""
    folder = tiny.write_images(tmp_path / "flat", classes=(), per_class=9)
    write_cache(open_images(folder, tiny.IMAGE_SIZE), kl, tmp_path / "flat_cache")
    return tmp_path / "flat_cache"


@pytest.fixture
def own(tmp_path, capsys, monkeypatch):
    """`latentflow train own_images` of some data into `tmp_path`/run."""
    return lambda path, *args: run_here(
        ("train", "own_images", f"data.path={path}", f"out={tmp_path / 'run'}", "--device", "cpu", *args),
        capsys,
        monkeypatch,
    )


def test_a_cache_decides_size_mirroring_and_autoencoder(cache, flat, kl_folder, tmp_path):
    for folder, flip in ((cache, True), (flat, False)):
        recipe = prepare(Recipe.model_validate({**OPEN, "data": {"path": str(folder)}, "out": "x"}), tiny.CPU).recipe
        assert (recipe.data.image_size, recipe.data.flip) == ((tiny.IMAGE_SIZE, tiny.IMAGE_SIZE), flip)
        assert recipe.autoencoder == str(kl_folder)


OPEN = {key: value for key, value in tiny.RECIPE.items() if key != "data"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": {"image_size": 32}}, "set data.image_size=16"),
        ({"data": {"flip": True}}, "set data.flip=false"),
        ({"autoencoder": "shapes"}, "use the former"),
    ],
)
def test_what_is_set_must_agree_with_the_cache(flat, given, said):
    recipe = {**OPEN, **given, "data": {"path": str(flat), **given.get("data", {})}, "out": "x"}
    with pytest.raises(LatentFlowError, match=said):
        prepare(Recipe.model_validate(recipe), tiny.CPU)


@pytest.mark.parametrize("labelled", [True, False])
def test_own_images_are_trained_by_their_recipe(own, cache, flat, tmp_path, labelled):
    result = own(cache if labelled else flat, "training.steps=2")
    assert result.code == 0, result.err
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert recipe.sampling.guidance == (1.5 if labelled else 1.0)
    assert recipe.training.batch_size == (16 if labelled else 8)
    assert not recipe.fit
    assert f"for {18 if labelled else 9} images on a CPU" in result.out


def test_resuming_does_not_fit_again(own, flat, cache, tmp_path, monkeypatch):
    assert own(flat, "training.steps=2").code == 0
    before = load_recipe(tmp_path / "run" / "recipe.yaml")
    monkeypatch.setattr(
        velocity_run, "memory_of_process", lambda runtime: 1
    )  # another machine would be fitted otherwise
    monkeypatch.setattr(fitting, "SAFE_PER_IMAGE", 1)
    result = own(flat, "training.steps=3")
    assert result.code == 0, result.err
    after = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert changed_values(before.model_dump(mode="json"), after.model_dump(mode="json")) == {"training.steps": (2, 3)}
    assert own(cache).code == 2  # other images


def test_the_recipe_of_a_run_is_one(own, flat, tmp_path, capsys, monkeypatch):
    """What was fitted stands in recipe.yaml: training by that file goes on with the run."""
    assert own(flat, "training.steps=2").code == 0
    again = run_here(("train", tmp_path / "run" / "recipe.yaml", "--device", "cpu"), capsys, monkeypatch)
    assert again.code == 0, again.err
    assert "going on after step 2" in again.out


def test_guidance_without_labels_names_its_remedy(flat, tmp_path, kl_folder):
    recipe = Recipe.model_validate(
        {**OPEN, "data": {"path": str(flat)}, "out": str(tmp_path / "run"), "sampling": {"guidance": 2.0}}
    )
    with pytest.raises(ConfigError, match=r"sampling\.guidance = 2.*has no labels.*add sampling\.guidance=1$"):
        prepare(recipe, tiny.CPU)
    prepare(with_values(recipe, {"sampling.guidance": 1.0}), tiny.CPU)  # the remedy
    guided = recipe.sampling.model_copy(update={"guide": GuideReference(model="@1/8")})  # which needs no condition
    prepare(with_values(recipe, {"sampling": guided}), tiny.CPU)


def test_fewer_images_at_a_time_where_memory_is_short(flat, tmp_path, monkeypatch):
    recipe = Recipe.model_validate({**OPEN, "data": {"path": str(flat)}, "out": str(tmp_path / "run")})
    roomy = prepare(recipe, tiny.CPU)
    num_parameters = sum(parameter.numel() for parameter in roomy.model.network.parameters())
    per_image = bytes_per_image(recipe.network, 8, half=False)
    free = round((state_bytes(num_parameters) + 1.5 * per_image) / 0.9)
    monkeypatch.setattr(velocity_run, "free_memory", lambda device: free)
    with pytest.raises(ConfigError, match=r"use training\.micro_batch_size=1") as caught:
        prepare(with_values(recipe, {"training.batch_size": 64}), tiny.CPU)
    assert "GiB are free" in str(caught.value)
    remedy = with_values(recipe, {"training.batch_size": 64, "training.micro_batch_size": 1})
    assert micro_batches(prepare(remedy, tiny.CPU).recipe.training, tiny.CPU).number == 64
    monkeypatch.setattr(velocity_run, "free_memory", lambda device: 1000)
    with pytest.raises(ConfigError, match="choose a smaller network"):
        prepare(recipe, tiny.CPU)


def test_own_images_can_be_trained_for_export(own, flat, tmp_path, capsys, monkeypatch):
    """As the README says."""
    small = ("network.depth=1", "network.hidden_size=32", "network.num_heads=2", "training.steps=1")
    assert own(flat, "network.name=DiT-B/2", "network.time_scale=1", *small).code == 0
    exported = run_here(("export", tmp_path / "run", "--out", tmp_path / "exported"), capsys, monkeypatch)
    assert exported.code == 0, exported.err


def test_images_of_each_class_are_counted_in_a_cache(tmp_path, cache, images, kl_folder):
    for number, path in enumerate((cache, images)):
        given = {"autoencoder": kl_folder, "out": tmp_path / str(number), "data": {"path": path}}
        assert prepare(tiny.recipe(**given), tiny.CPU).model.config.training.images_per_class == [6, 6, 6]


def test_a_run_inside_of_its_data(tmp_path, images, kl_folder):
    folder = shutil.copytree(images, tmp_path / "own")
    (tmp_path / "alias").symlink_to(folder)
    before = tiny.tree(folder)
    for out in (folder / "run", tmp_path / "alias" / "run"):
        recipe = tiny.recipe(autoencoder=kl_folder, data={"path": folder}, out=out)
        with pytest.raises(ArtifactError, match=r"lies inside .*own and would become part of it"):
            train_command(recipe, runtime=tiny.CPU)
    assert tiny.tree(folder) == before


def test_a_run_notices_other_bytes_of_the_same_size(tmp_path, kl_folder):
    folder = tmp_path / "in"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    for n, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{n}.bmp")
    given = {"autoencoder": kl_folder, "data": {"path": folder, "image_size": 16}, "out": tmp_path / "run"}
    train_command(tiny.recipe(**given), runtime=tiny.CPU)
    Image.fromarray(255 - pixels[3]).save(folder / "3.bmp")
    with pytest.raises(ConfigError, match=r"was trained on other images .* restore them or choose another out"):
        train_command(tiny.recipe(**given), runtime=tiny.CPU)
    Image.fromarray(pixels[3]).save(folder / "3.bmp")
    train_command(tiny.recipe(**given), runtime=tiny.CPU)


def test_a_class_of_broken_images(refused, tmp_path, images, kl_folder):
    folder = shutil.copytree(images, tmp_path / "own")
    for file in (folder / "berry").iterdir():
        file.write_bytes(b"<html>404")
    words = ("has no readable image of 1 of its classes (berry); berry/0.png: ", "set data.labels=false")
    refused(DataError, *words, data={"path": folder})
    shutil.rmtree(folder / "berry")
    prepare(tiny.recipe(autoencoder=kl_folder, data={"path": folder}, out=tmp_path / "run"), tiny.CPU)


def test_a_class_that_an_old_cache_has_no_image_of(refused, tmp_path, images, kl):
    class First(ImageFiles):
        """The first images of a folder, all of one class, as earlier versions took them."""

        def __len__(self) -> int:
            return 5

        def _unsaid_class(self, index: int) -> str:
            return ""

    write_cache(First(list_files(FolderStore(images)), Size.of(tiny.IMAGE_SIZE)), kl, tmp_path / "cache")
    words = ("has no readable image of 2 of its classes (berry, cherry); encode it again",)
    refused(DataError, *words, data={"path": tmp_path / "cache"})
