"""The edits on the command line: files, figures, and bad input that costs one line and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.artifacts import read_tensors
from latentflow.sampling.edits import variation_seed
from latentflow.sampling.inversion import ROUND_TRIPS
from tests import tiny
from tests.processes import Result, run_here


@pytest.fixture
def command(capsys, monkeypatch):
    """Run `latentflow ARGS` on the CPU in this process."""
    return lambda *args: run_here((*args, "--device", "cpu"), capsys, monkeypatch)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, kl) -> Path:
    """A model whose preset asks for guidance."""
    folder = tmp_path_factory.mktemp("models") / "fruit"
    tiny.model(kl, time_scale=20.0, guidance=2.0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A picture of 40 x 30 pixels."""
    file = tmp_path_factory.mktemp("photos") / "photo.png"
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC).save(file)
    return file


def metadata(file: Path) -> dict:
    """The metadata of a PNG."""
    with Image.open(file) as image:
        assert image.size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
        return json.loads(image.text["latentflow"])


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_image_to_image_into_one_file(command, model_folder, photo, tmp_path):
    out = tmp_path / "new" / "picture.png"
    result = command("image-to-image", model_folder, photo, "--strength", 0.4, "--classes", "berry", "--out", out)
    assert result.code == 0, result.err
    assert names(out.parent) == ["picture.png"]
    request = metadata(out)
    assert (request["task"], request["start"], request["class_name"]) == ("image-to-image", 0.4, "berry")
    assert request["inputs"]["image"].startswith("photo.png sha256:")


def test_image_to_image_into_several_files(command, model_folder, photo, tmp_path):
    options = ("--num", 2, "--seed", 7, "--classes", "none", "--out", tmp_path / "new.png", "--json")
    result = command("image-to-image", model_folder, photo, *options)
    assert result.code == 0, result.err
    assert names(tmp_path) == ["new_seed-00000007.png", "new_seed-00000008.png"]
    report = json.loads(result.out)
    assert report["evaluations per image"] == 2  # two Euler steps, and nothing that guidance could strengthen
    assert metadata(tmp_path / "new_seed-00000007.png")["sampling"]["guidance"] == 1


def test_interpolate(command, model_folder, tmp_path):
    options = ("--seeds", "3,8", "--classes", "berry, apple", "--num", 3, "--out", tmp_path / "frames", "--json")
    result = command("interpolate", model_folder, *options)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert (report["frames"], report["evaluations per image"]) == (3, 8)  # two Euler steps, guided, for two classes
    files = [f"berry_seed-00000003_to-apple_to-seed-00000008_at-{at}.png" for at in ("0.000", "0.500", "1.000")]
    assert names(tmp_path / "frames") == [*files, "grid.png"]
    assert metadata(tmp_path / "frames" / files[1])["blends"] == [{"seed": 8, "weight": 0.5, "label": 0}]
    assert Image.open(report["grid"]).size == (3 * tiny.IMAGE_SIZE + 4, tiny.IMAGE_SIZE)


def test_vary(command, model_folder, tmp_path):
    options = ("--seed", 5, "--classes", "berry", "--num", 2, "--amount", 0, "--out", tmp_path / "near", "--json")
    result = command("vary", model_folder, *options)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    original = tmp_path / "near" / "berry_seed-00000005.png"
    files = [f"berry_seed-00000005_to-seed-{variation_seed(5, number):08d}_at-0.000.png" for number in (0, 1)]
    assert report["original"] == str(original)
    assert names(tmp_path / "near") == sorted([original.name, *files, "grid.png"])
    own, varied = (np.array(Image.open(original.with_name(name))).astype(int) for name in (original.name, files[1]))
    assert np.abs(own - varied).max() <= 1
    grid = np.array(Image.open(report["grid"])).astype(int)
    assert grid.shape[1] == 3 * tiny.IMAGE_SIZE + 4
    assert np.abs(grid[:, : tiny.IMAGE_SIZE] - own).max() == 0


def test_invert(command, model_folder, photo, tmp_path):
    options = ("--classes", "berry", "--solver", "heun", "--steps", 20, "--out", tmp_path / "inverted", "--json")
    result = command("invert", model_folder, photo, *options)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert names(tmp_path / "inverted") == ["autoencoder.png", "input.png", "noise.safetensors", "round_trip.png"]
    assert (report["evaluations there"], report["evaluations back"]) == (40, 40)
    assert report["relative latent error"] < 0.05
    assert report["table"] == []
    tensors = read_tensors(tmp_path / "inverted" / "noise.safetensors")
    model = LatentFlow.from_pretrained(model_folder, device="cpu")
    again = model.sample(noise=tensors["noise"], classes=["berry"], guidance=1, solver="heun", steps=20)
    pixels = np.array(Image.open(tmp_path / "inverted" / "round_trip.png")).astype(int)
    assert np.abs(np.array(again.images[0]).astype(int) - pixels).max() <= 1
    assert metadata(tmp_path / "inverted" / "round_trip.png")["inputs"].keys() == {"image", "noise"}
    shown = np.array(Image.open(tmp_path / "inverted" / "input.png"))
    assert torch.equal(torch.from_numpy(shown).permute(2, 0, 1)[None], model.invert(photo).pixels)


def test_invert_with_a_table(command, model_folder, photo, tmp_path, monkeypatch):
    from latentflow.sampling import inversion

    monkeypatch.setattr(inversion, "ROUND_TRIPS", ROUND_TRIPS[::8])
    monkeypatch.setattr(inversion, "REFERENCE", {"solver": "rk4", "steps": 8})
    options = ("invert", model_folder, photo, "--table", "--out", tmp_path / "inverted")
    table = json.loads(command(*options, "--json").out)["table"]
    assert [(row["solver"], row["steps"], row["tolerance"]) for row in table] == [
        ("euler", 8, None),
        ("rk4", 2, None),
        ("dopri5", None, 0.01),
    ]
    text = command(*options).out
    for setting in ("euler, 8 steps", "rk4, 2 steps", "dopri5, tolerance 0.01"):
        assert setting in text


def test_sample_can_be_unconditional_too(command, model_folder, tmp_path):
    result = command("sample", model_folder, "--num", 1, "--classes", "none", "--out", tmp_path)
    assert result.code == 0, result.err
    assert names(tmp_path) == ["grid.png", "seed-00000000.png"]


# Bad input


def refused(result: Result, *said: str) -> None:
    assert result.code == 2, result
    assert result.error.startswith("latentflow: ")
    for words in said:
        assert words in result.error


def write(file: Path, what: str) -> Path:
    """A file that is no usable image."""
    if what == "text":
        file.write_text("no image")
    elif what == "cut":
        noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:1000])
    elif what == "speck":
        Image.new("RGB", (1, 30)).save(file)
    elif what == "strip":
        Image.new("RGB", (1_000_000, 2)).save(file)
    elif what == "folder":
        file.mkdir()
    return file


@pytest.mark.parametrize("verb", ["image-to-image", "invert"])
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", "does not exist"),
        ("folder", "is a folder"),
        ("text", "no image"),
        ("cut", "cannot read"),
        ("speck", "latent pixel"),
        ("strip", "long and thin"),
    ],
)
def test_images_that_cannot_be_used(command, model_folder, tmp_path, verb, what, said):
    file = write(tmp_path / "given.png", what)
    before = tiny.tree(tmp_path)
    refused(command(verb, model_folder, file, "--out", tmp_path / "out.png"), said)
    assert tiny.tree(tmp_path) == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("image-to-image", "PHOTO", "--strength", "0"), "strength 0"),
        (("image-to-image", "PHOTO", "--strength", "1.5"), "strength 1.5"),
        (("image-to-image", "PHOTO", "--classes", "aple"), "did you mean 'apple'?"),
        (("image-to-image", "PHOTO", "--num", "0"), "from 1 to"),
        (("image-to-image", "PHOTO", "--guidance", "2"), "use guidance 1"),
        (("interpolate", "--seeds", "3"), "--seeds '3'"),
        (("interpolate", "--seeds", "3,4,5"), "--seeds '3,4,5'"),
        (("interpolate", "--seeds", "3,x"), "--seeds '3,x'"),
        (("interpolate", "--seeds", "3,4.5"), "--seeds '3,4.5'"),
        (("interpolate", "--classes", "apple,berry,cherry"), "3 classes"),
        (("interpolate", "--classes", "apple,bery"), "did you mean 'berry'?"),
        (("interpolate", "--num", "1"), "from 2 to"),
        (("interpolate", "--solver", "huen"), "did you mean 'heun'?"),
        (("vary", "--amount", "2"), "amount 2"),
        (("vary", "--classes", "#3"), "classes #0 to #2"),
        (("vary", "--classes", "apple,berry"), "2 classes"),
        (("vary", "--num", "0"), "from 1 to"),
        (("invert", "PHOTO", "--classes", "aple"), "did you mean 'apple'?"),
        (("invert", "PHOTO", "--steps", "0"), "steps"),
    ],
)
def test_values_that_cannot_be_drawn(command, model_folder, photo, tmp_path, args, said):
    verb, *options = (photo if arg == "PHOTO" else arg for arg in args)
    out = tmp_path / ("out.png" if verb == "image-to-image" else "out")
    refused(command(verb, model_folder, *options, "--out", out), said)
    assert names(tmp_path) == []


@pytest.mark.parametrize("verb", ["image-to-image", "interpolate", "vary", "invert"])
def test_output_that_cannot_be_written(command, model_folder, photo, tmp_path, verb):
    (tmp_path / "file.txt").write_text("a regular file")
    image = (photo,) if verb in ("image-to-image", "invert") else ()
    refused(command(verb, model_folder, *image, "--out", tmp_path / "file.txt" / "below.png"), "file.txt is a file")
    assert names(tmp_path) == ["file.txt"]
