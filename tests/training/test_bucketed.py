"""Training on buckets: the same weights however a run is interrupted and shared, and what such a model draws."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.artifacts import read_tensors
from latentflow.commands.encode import encode
from latentflow.commands.loss import loss
from latentflow.commands.train import train as train_command
from latentflow.data.buckets import Bucket
from latentflow.data.cache.reader import LatentCache
from latentflow.data.request import EncodeRequest
from latentflow.errors import ConfigError
from latentflow.requests import RequestError
from latentflow.sizes import Size
from latentflow.training.checkpoint import newest_checkpoint
from latentflow.training.fresh_model import require_fitting_sizes
from latentflow.training.log import read_metrics
from latentflow.training.request import LossRequest
from latentflow.training.settings import to_yaml
from tests import processes, tiny

SIZES = [Size(12, 20), Size(20, 12), Size(16, 16)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return tiny.write_mixed(tmp_path_factory.mktemp("mixed") / "photos")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, photos, kl_folder) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "mixed"
    request = EncodeRequest(
        data=photos, autoencoder=kl_folder, image_size=16, buckets=True, flips=True, mask_variants=1, shard_size=4
    )
    encode(request, folder, runtime=tiny.CPU)
    return folder


@pytest.fixture
def recipe(cache, kl_folder, tmp_path):
    def make(name: str, **given):
        return tiny.recipe(
            **{
                **given,
                "data": {"path": cache, "image_size": "20x12", "flip": True, "held_out": 0, **given.get("data", {})},
                "training": {"steps": 12, "batch_size": 4, "checkpoint_every": 5, **given.get("training", {})},
            },
            autoencoder=kl_folder,
            out=tmp_path / name,
        )

    return make


@pytest.fixture
def train(recipe):
    def run(name: str, **given) -> Path:
        return train_command(recipe(name, **given), runtime=tiny.CPU).run

    return run


def final(run: Path) -> dict[str, bytes]:
    """The newest checkpoint, byte by byte."""
    return {file.name: file.read_bytes() for file in newest_checkpoint(run).iterdir()}


def test_encoding_keeps_the_shapes_of_images(cache, photos):
    plan = LatentCache(cache).plan
    assert plan.sizes == SIZES and plan.moments_shape == (8, 6, 10)
    stored = json.loads((cache / "plan.json").read_text(encoding="utf-8"))["buckets"]
    assert stored == [
        {"size": "20x12", "num_images": 9},
        {"size": "12x20", "num_images": 5},
        {"size": 16, "num_images": 6},
    ]


def test_a_run_in_parts_ends_in_the_same_weights(train):
    whole = train("whole")
    for steps in (3, 8):
        train("parts", training={"steps": steps})
    assert final(train("parts")) == final(whole)
    read = train("read", data={"resident": False})
    assert final(read) == final(train("held", data={"resident": True})) == final(whole)


def test_a_killed_run_ends_in_the_same_weights(recipe, train, tmp_path):
    file, run, log = tmp_path / "recipe.yaml", tmp_path / "killed", tmp_path / "log"
    file.write_text(to_yaml(recipe("killed", training={"steps": 100_000})), encoding="utf-8")
    process = processes.start(("train", file, "--device", "cpu"), log)
    processes.wait_until(lambda: newest_checkpoint(run) is not None, process)
    process.join(random.uniform(0, 0.1))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    ended = {"training": {"steps": read_metrics(run)[-1]["step"] + 3}}
    assert final(train("killed", **ended)) == final(train("whole", **ended))


def test_two_processes_equal_one(recipe, train, tmp_path):
    one, file = train("one"), tmp_path / "two.yaml"
    file.write_text(to_yaml(recipe("two")), encoding="utf-8")
    workers = processes.start_processes(("train", file, "--device", "cpu"), tmp_path / "log", 2)
    for rank, worker in enumerate(workers):
        log = tmp_path / f"log.{rank}"
        assert processes.finish(worker, log) == 0, log.read_text()
    for name in ("network", "ema"):
        here, there = (read_tensors(newest_checkpoint(run) / f"{name}.safetensors") for run in (one, tmp_path / "two"))
        for key, value in here.items():
            torch.testing.assert_close(there[key], value, rtol=0, atol=1e-5, msg=f"{name} {key}")


def test_another_batch_size_would_be_another_order(recipe, train):
    train("run")
    other = recipe("run", training={"steps": 14, "batch_size": 8})
    with pytest.raises(ConfigError, match=r"batch_size = 8, but the run began with 4.*its buckets.*restore it"):
        train_command(other, allow_change=["training.batch_size"], runtime=tiny.CPU)


def test_buckets_that_the_network_cannot_take(recipe, kl):
    with pytest.raises(ConfigError, match="latents of 10 x 6 do not fit"):
        train_command(recipe("run", network={"patch_size": 4}), runtime=tiny.CPU)
    buckets = [Bucket(size=size, num_images=3) for size in (16, "18x14", "20x12")]
    config = tiny.model(kl).config.model_copy(update={"buckets": buckets})
    with pytest.raises(ConfigError, match=r"multiples of 4 pixels.*buckets of 18x14; encode.*--bucket-step 4"):
        require_fitting_sizes(config)


# The model


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache, kl_folder) -> Path:
    """A run of a model for holes, with held-out images and previews."""
    out = tmp_path_factory.mktemp("runs") / "mixed"
    recipe = tiny.recipe(
        data={"path": cache, "image_size": "20x12", "held_out": 0.2},
        training={"steps": 2, "batch_size": 4, "preview_every": 2},
        autoencoder=kl_folder,
        out=out,
    )
    train_command(recipe, runtime=tiny.CPU)
    return out


@pytest.fixture(scope="module")
def model(run) -> LatentFlow:
    return LatentFlow.from_pretrained(run, runtime=tiny.CPU)


def test_a_model_knows_its_sizes(model, run):
    config = model.config
    assert (config.image_size, config.sizes) == (SIZES[0], SIZES)
    assert sum(bucket.num_images for bucket in config.buckets) == config.training.num_images < 20
    assert read_metrics(run)[-1]["held_out_loss"] > 0
    assert "20 x 12" in (run / "model" / "README.md").read_text(encoding="utf-8")


def test_samples_have_the_size_that_is_asked_for(model):
    usual, tall = model.sample(num=2, seed=3), model.sample(num=2, seed=3, image_size="12x20")
    assert usual.pixels.shape == (2, 3, 12, 20) and usual.drawing.image_size is None
    assert tall.pixels.shape == (2, 3, 20, 12) and tall.drawing.image_size == SIZES[1]
    one = model.sample(num=1, seed=4, image_size=SIZES[1])
    assert torch.allclose(one.latents, tall.latents[1:], atol=1e-5)
    noise = torch.randn(1, 4, 10, 6, generator=torch.Generator().manual_seed(0))
    assert model.sample(num=1, noise=noise, image_size="12x20").pixels.shape == (1, 3, 20, 12)
    with pytest.raises(RequestError, match=r"image_size 12x24: the model was not trained.*: 12x20, 16, 20x12"):
        model.sample(num=1, image_size="12x24")


def test_pictures_are_taken_to_the_nearest_size(model):
    for shape, size in (((90, 40), (12, 20)), ((40, 90), (20, 12)), ((50, 50), (16, 16))):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), np.uint8))
        assert model.image_to_image(picture).pixels.shape[2:] == size
        hole = np.zeros(shape[::-1], np.uint8)
        hole[20:24, 20:24] = 1
        assert model.inpaint(picture, hole).drawing.image_size == size
    turned, exif = Image.new("RGB", (90, 40)), Image.Exif()
    exif[274] = 6
    turned.info["exif"] = exif.tobytes()
    assert model.image_to_image(turned).pixels.shape[2:] == (20, 12)


def test_previews_show_the_sizes(run):
    with Image.open(run / "samples" / "step-00000002.png") as preview:
        assert preview.width >= 4 * 20 + 3 * 2
        shown = np.asarray(preview.convert("RGB"))
    assert (shown == 255).all(2).mean() > 0.2  # what is narrower or lower than the largest one stands on white


@pytest.mark.parametrize("of", ["cache", "photos"])
def test_the_loss_of_a_cache_and_of_its_images_agree(of, model, run, cache, photos):
    measured = loss(run, LossRequest(data=str(cache), num=64), runtime=tiny.CPU)
    other = loss(run, LossRequest(data=str({"cache": cache, "photos": photos}[of]), num=64), runtime=tiny.CPU)
    assert [one.loss for one in other] == pytest.approx([one.loss for one in measured], rel=1e-3)


# What is measured, and what is said


@pytest.fixture
def command(capsys, monkeypatch):
    """`latentflow ARGS`; what it prints as JSON, or the one line of its error."""

    def run(*args: object):
        result = processes.run_here(args, capsys, monkeypatch)
        return json.loads(result.out) if result.code == 0 else result.error

    return run


@pytest.mark.parametrize(("size", "num"), [("20x12", 9), ("12x20", 5), ("16", 6)])
def test_scores_compare_with_the_images_of_the_same_shape(command, run, photos, tmp_path, size, num):
    fast = (
        "--features",
        "random",
        "--metrics",
        "fd",
        "--num",
        6,
        "--resamples",
        0,
        "--out",
        tmp_path / "a.json",
        "--json",
    )
    protocol = command("evaluate", run, "--data", photos, "--image-size", size, *fast)["protocol"]
    assert str(protocol["image_size"]) == str(protocol["reference"]["image_size"]) == size
    assert protocol["reference"]["num_images"] == num


def test_holes_are_filled_in_images_of_the_same_shape(command, run, photos, tmp_path):
    fast = ("--features", "random", "--metrics", "psnr-hole", "--out", tmp_path / "a.json", "--json")
    report = command("evaluate", run, "--task", "inpaint", "--data", photos, "--image-size", "12x20", *fast)
    assert (report["protocol"]["image_size"], report["protocol"]["num_images"]) == ("12x20", 5)


def test_a_part_of_the_images_of_a_run_has_shapes_too(command, run, model, photos, tmp_path):
    given = ("--task", "inpaint", "--features", "random", "--metrics", "psnr-hole", "--split", "training", "--json")
    for bucket in model.config.buckets:
        options = (*given, "--data", photos, "--image-size", bucket.size, "--out", tmp_path / f"{bucket.size}.json")
        assert command("evaluate", run, *options)["protocol"]["num_images"] == bucket.num_images


def test_options_that_do_not_fit_are_refused(command, run, photos, kl_folder, tmp_path):
    said = command("evaluate", run, "--data", photos, "--image-size", "64x64", "--features", "random")
    assert "--image-size 64: the model was not trained on it; give one of its sizes: 20x12" in said
    said = command("sample", run, "--image-size", "24x24", "--out", tmp_path / "drawn")
    assert "--image-size 24: the model was not trained on it; give one of its sizes:" in said
    encoded = ("encode", photos, "--autoencoder", kl_folder, "--image-size", 16, "--out", tmp_path / "cache")
    assert "--bucket-step 4 has no effect without --buckets; remove it" in command(*encoded, "--bucket-step", 4)
    assert "--bucket-step 3: give a multiple of 2" in command(*encoded, "--buckets", "--bucket-step", 3)
    said = command("encode", "synthetic:20", *encoded[2:], "--buckets")
    assert "have one size; leave out --buckets" in said
    assert not list(tmp_path.iterdir())


def test_commands_name_the_sizes(command, cache, run, photos, kl_folder, tmp_path):
    plan = command("plan", run / "recipe.yaml", "--device-memory", 8, "--device-tflops", 1, "--json")
    assert plan["latents"] == [4, 6, 10]
    sizes = {"20x12": 9, "12x20": 5, "16": 6}
    assert command("info", cache, "--json")["sizes"] == sizes
    assert command("info", run, "--json")["sizes"].keys() == sizes.keys()
    out = ("--image-size", 16, "--buckets", "--out", tmp_path / "cache", "--json")
    assert command("encode", photos, "--autoencoder", kl_folder, *out)["sizes"] == sizes
    drawn = command("sample", run, "--num", 2, "--image-size", "12x20", "--out", tmp_path / "drawn", "--json")
    assert drawn
    with Image.open(sorted((tmp_path / "drawn").glob("*.png"))[0]) as picture:
        assert (picture.width, picture.height) in ((12, 20), (26, 20))  # a picture, or the sheet of both
