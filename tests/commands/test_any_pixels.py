"""Images of other pixel formats, from the first stage to scores: four bands, and gray of 12 significant bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from latentflow.artifacts import read_json
from latentflow.autoencoder import Autoencoder
from latentflow.commands.encode import encode
from latentflow.data.cache.reader import LatentCache
from latentflow.data.request import EncodeRequest
from latentflow.pixel_format import PixelFormat
from latentflow.training.settings import to_yaml
from tests import tiny
from tests.processes import run_here
from tests.training.test_first_stage import recipe as autoencoder_recipe

NUM = 24
FORMATS = {
    "bands": PixelFormat(channels=4, dtype="uint8"),
    "scans": PixelFormat(channels=1, dtype="uint16", low=[0], high=[4095], rule="the least and the greatest value"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """`bands`: reflectances in four bands; `scans`: gray pictures of 12 significant bits."""
    folder, random = tmp_path_factory.mktemp("pixels"), np.random.default_rng(0)
    for name in FORMATS:
        (folder / name).mkdir()
    for number in range(NUM):
        coarse = np.kron(random.integers(0, 256, (4, 4, 4)), np.ones((4, 4, 1))).astype(np.uint8)
        coarse[..., 3] = (coarse[..., 0] // 2 + coarse[..., 1].astype(int) // 2).astype(np.uint8)
        tifffile.imwrite(folder / "bands" / f"{number:02}.tif", coarse, photometric="minisblack", planarconfig="contig")
        gray = np.kron(random.integers(0, 4096, (4, 4)), np.ones((4, 4))).astype(np.uint16)
        gray[0, :2] = 0, 4095
        tifffile.imwrite(folder / "scans" / f"{number:02}.tif", gray)
    return folder


@pytest.fixture
def command(capsys, monkeypatch):
    def run(*args):
        result = run_here([*args, "--device", "cpu"], capsys, monkeypatch)
        assert result.code == 0, result.err
        return result.out

    return run


@pytest.mark.parametrize("name", FORMATS)
def test_from_the_first_stage_to_scores(name, data, command, tmp_path):
    wanted, photos = FORMATS[name], data / name
    first = autoencoder_recipe(
        tmp_path / "stage", data={"path": str(photos), "pixels": "bands" if name == "bands" else "auto"}
    )
    (tmp_path / "stage.yaml").write_text(to_yaml(first), encoding="utf-8")
    said = command("train-autoencoder", tmp_path / "stage.yaml", "training.steps=2")
    assert wanted.title.split(",")[0] in said
    stage = tmp_path / "stage" / "autoencoder"
    assert Autoencoder.from_pretrained(stage).pixel_channels == wanted.channels
    report = read_json(tmp_path / "stage" / "metrics" / "report.json")
    assert len(report["channel_psnr"]) == wanted.channels
    assert min(report["channel_psnr"]) - 1e-9 <= report["psnr"] <= max(report["channel_psnr"]) + 1e-9
    stated = read_json(tmp_path / "stage" / "images.json")["pixel_format"]
    assert stated["dtype"] == wanted.dtype and read_json(stage / "pixel_format.json") == stated

    command("encode", photos, "--autoencoder", stage, "--image-size", 16, "--out", tmp_path / "cache")
    assert read_json(tmp_path / "cache" / "plan.json")["pixel_format"] == stated  # the autoencoder's
    training = {"steps": 2, "preview_every": 2}
    run = tiny.recipe(data={"path": tmp_path / "cache"}, training=training, autoencoder=stage, out=tmp_path / "r")
    (tmp_path / "run.yaml").write_text(to_yaml(run), encoding="utf-8")
    command("train", tmp_path / "run.yaml")
    assert (tmp_path / "r" / "samples" / "step-00000002.png").is_file()
    command("sample", tmp_path / "r", "--num", 4, "--out", tmp_path / "drawn")
    files = sorted(tmp_path.glob("drawn/seed*"))
    assert [file.suffix for file in files] == [".tiff" if name == "bands" else ".png"] * 4

    scored = ["--data", photos, "--features", "random"]
    command("evaluate", tmp_path / "r", *scored, "--num", 4, "--metrics", "fid", "--out", tmp_path / "scores")
    command("evaluate", tmp_path / "drawn", *scored, "--num", 4, "--metrics", "fid", "--out", tmp_path / "files")
    fid = [read_json(tmp_path / out / "report.json")["scores"]["fd"]["value"] for out in ("scores", "files")]
    assert fid[0] == pytest.approx(fid[1], rel=1e-3)
    floor = [*scored, "--reconstruction", "--image-size", 16, "--num", 16, "--metrics", "psnr,ssim"]
    command("evaluate", stage, *floor, "--out", tmp_path / "floor")


def test_a_model_of_bands_is_diagnosed(tmp_path, data, command):
    four = Autoencoder(tiny.kl(in_channels=4, out_channels=4), "four")
    tiny.model(four, class_names=(), pixel_format=FORMATS["bands"]).save_pretrained(tmp_path / "model")
    asked = ["--data", data / "bands", "--num", 8, "--features", "random"]
    command("diagnose", tmp_path / "model", *asked, "--out", tmp_path / "page")
    assert (tmp_path / "page" / "page.html").is_file()


def test_a_resumed_first_stage_keeps_its_range(data, tmp_path, command):
    """The range of the values was measured when it began; it is not measured again."""
    first = autoencoder_recipe(tmp_path / "stage", data={"path": str(data / "scans")}, training={"steps": 2})
    (tmp_path / "stage.yaml").write_text(to_yaml(first), encoding="utf-8")
    command("train-autoencoder", tmp_path / "stage.yaml", "training.steps=1")
    before = read_json(tmp_path / "stage" / "images.json")
    command("train-autoencoder", tmp_path / "stage.yaml")
    assert read_json(tmp_path / "stage" / "images.json") == before
    assert (before["pixel_format"]["low"], before["pixel_format"]["high"]) == ([0], [4095])


def test_an_autoencoder_of_other_channels_is_refused(data, tmp_path, capsys, monkeypatch, kl_folder):
    scored = ["evaluate", kl_folder, "--reconstruction", "--data", data / "bands", "--image-size", 16]
    result = run_here([*scored, "--features", "random", "--out", tmp_path / "out"], capsys, monkeypatch)
    assert result.code == 2
    assert "images of 4 channels, but" in result.error
    assert not (tmp_path / "out").exists()


def test_another_format_than_that_of_the_autoencoder_is_noticed(data, tmp_path, caplog):
    gray = Autoencoder(tiny.kl(in_channels=1, out_channels=1), "gray")
    gray.pixel_format = FORMATS["scans"]
    gray.save_pretrained(tmp_path / "gray")
    assert Autoencoder.from_pretrained(tmp_path / "gray").pixel_format == FORMATS["scans"]
    asked = {"data": data / "scans", "autoencoder": tmp_path / "gray", "image_size": 16}
    encode(EncodeRequest(**asked), tmp_path / "own", runtime=tiny.CPU)
    assert LatentCache(tmp_path / "own").pixel_format == FORMATS["scans"] and "was trained on" not in caplog.text
    encode(EncodeRequest(**asked, value_range="full"), tmp_path / "other", runtime=tiny.CPU)
    assert f"was trained on {FORMATS['scans'].title}, and these images are read as 16-bit gray:" in caplog.text


def test_a_damaged_pixel_format_is_refused(data, tmp_path, capsys, monkeypatch, kl_folder):
    shutil.copytree(kl_folder, tmp_path / "own")
    (tmp_path / "own" / "pixel_format.json").write_text('{"channels": 0}', encoding="utf-8")
    asked = ["encode", data / "scans", "--autoencoder", tmp_path / "own", "--image-size", 16]
    result = run_here([*asked, "--out", tmp_path / "cache"], capsys, monkeypatch)
    assert result.code == 2 and "pixel_format.json describes no pixel format; restore the original" in result.error
    assert not (tmp_path / "cache").exists()


def test_buckets_of_16_bits_are_drawn_at_their_size_and_depth(tmp_path, command):
    """Gray pictures of two shapes: encoded, trained on for two steps, drawn."""
    photos, random = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(12):
        height, width = (24, 40) if number % 3 else (40, 24)
        scan = random.integers(0, 4096, (height, width)).astype(np.uint16)
        scan[0, :2] = 0, 4095
        tifffile.imwrite(photos / f"{number:02}.tif", scan)
    gray = Autoencoder(tiny.kl(in_channels=1, out_channels=1), "gray")
    gray.save_pretrained(tmp_path / "gray")
    cache = tmp_path / "cache"
    command("encode", photos, "--autoencoder", tmp_path / "gray", "--image-size", 16, "--buckets", "--out", cache)
    plan = read_json(cache / "plan.json")
    assert plan["buckets"] == [{"size": "20x12", "num_images": 8}, {"size": "12x20", "num_images": 4}]
    assert (plan["pixel_format"]["dtype"], plan["pixel_format"]["high"]) == ("uint16", [4095])

    data = {"path": cache, "image_size": "20x12", "held_out": 0}
    training = {"steps": 2, "batch_size": 4, "preview_every": 2}
    run = tiny.recipe(data=data, training=training, autoencoder=tmp_path / "gray", out=tmp_path / "run")
    (tmp_path / "run.yaml").write_text(to_yaml(run), encoding="utf-8")
    command("train", tmp_path / "run.yaml")
    for name, size in (("wide", (20, 12)), ("tall", (12, 20))):
        asked = ["--image-size", f"{size[0]}x{size[1]}", "--num", 2]
        command("sample", tmp_path / "run", *asked, "--out", tmp_path / name)
        for file in sorted((tmp_path / name).glob("seed*")):
            with Image.open(file) as picture:
                assert (picture.format, picture.mode, picture.size) == ("PNG", "I;16", size)
                assert 256 < np.asarray(picture).max() <= 4095
