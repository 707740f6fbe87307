"""`latentflow encode` of what the paper's experiments read: the first images of an LMDB environment."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from latentflow import cli
from latentflow.autoencoder import Autoencoder, to_uint8, to_unit_range
from latentflow.commands.encode import EncodeResult
from latentflow.commands.encode import encode as encode_command
from latentflow.commands.look import look
from latentflow.commands.train import train
from latentflow.data.batches import TrainingImages
from latentflow.data.cache.reader import LatentCache
from latentflow.data.painting.semantic_maps import colour_map
from latentflow.data.pictures.variants import draw_variants, variants_of
from latentflow.data.pixel_choice import PixelChoice
from latentflow.data.request import EncodeRequest
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.sampling.contact_sheet import _LINE
from tests import tiny
from tests.data.pictures.stored_files import png16, ramp

SIDE = tiny.IMAGE_SIZE
NUM_IMAGES = 24


def encode(data: str | Path, out: Path, **options: Any) -> EncodeResult:
    return encode_command(EncodeRequest(data=data, **options), out)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def faces(tmp_path_factory, pixels) -> str:
    """Raw pictures under the keys "0" to "23"."""
    path = str(tmp_path_factory.mktemp("data") / "train.lmdb")
    with lmdb.open(path, map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for number, picture in enumerate(pixels):
            transaction.put(str(number).encode(), picture.tobytes())
    return path


def run(*arguments: object, monkeypatch) -> int:
    """The exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["latentflow", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code or 0


def test_first_images_end_up_in_the_cache_in_order(faces, pixels, kl_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "cache"
    options = ("--autoencoder", kl_folder, "--image-size", SIDE, "--dtype", "float32", "--shard-size", 8)
    assert run("encode", faces, *options, "--first", 13, "--out", out, "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 13
    cache = LatentCache(out)
    assert cache.names() == [str(number) for number in range(13)]
    assert cache.plan.source == f"first 13 of 24 images from {Path(faces).name}" and cache.plan.num_source_images == 13
    given = to_unit_range(torch.from_numpy(pixels[:13]).permute(0, 3, 1, 2))
    expected = Autoencoder.from_pretrained(kl_folder).encode(given)
    # the encoder differs by rounding in batches of another shape
    assert torch.allclose(cache.moments(range(13), [False] * 13), expected, rtol=0, atol=1e-5)


def test_another_number_of_images_needs_another_cache(faces, kl_folder, tmp_path):
    encode(faces, tmp_path, autoencoder=kl_folder, image_size=SIDE, first=3)
    before = tiny.tree(tmp_path)
    encode(faces, tmp_path, autoencoder=kl_folder, image_size=SIDE, first=3)
    for first in (4, None):
        with pytest.raises(
            ArtifactError, match=r"was created with other images: since then \d+ added .*choose another --out"
        ):
            encode(faces, tmp_path, autoencoder=kl_folder, image_size=SIDE, first=first)
    assert tiny.tree(tmp_path) == before


def test_a_cache_that_was_begun_without_looking_at_profiles_is_not_gone_on_with(faces, kl_folder, tmp_path):
    encode(faces, tmp_path, autoencoder=kl_folder, image_size=SIDE, first=3)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan.pop("pixel_rules") == "srgb"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(
        ArtifactError, match=r'other settings \(pixel_rules: "profiles ignored", now "srgb"\); choose another'
    ):
        encode(faces, tmp_path, autoencoder=kl_folder, image_size=SIDE, first=3)


@pytest.mark.parametrize(
    ("first", "message"), [(0, "--first 0: give a whole number of at least 1"), (25, "has 24 images; give at most 24")]
)
def test_impossible_numbers_write_nothing(faces, kl_folder, tmp_path, monkeypatch, capsys, first, message):
    out = tmp_path / "cache"
    options = ("--autoencoder", kl_folder, "--image-size", SIDE, "--out", out)
    assert run("encode", faces, *options, "--first", first, monkeypatch=monkeypatch) == DataError.exit_code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_training_reads_an_environment_without_a_cache(faces, kl_folder, tmp_path):
    recipe = tiny.recipe(
        data={"path": faces, "num_workers": 2}, autoencoder=kl_folder, out=tmp_path / "run", training={"steps": 2}
    )
    result = train(recipe, runtime=tiny.CPU)
    assert result.broken == [] and (tmp_path / "run").is_dir()


# A look before encoding


def sheet(out: Path) -> np.ndarray:
    return np.asarray(Image.open(out.with_name(f"{out.name}.png")).convert("RGB"))


def test_a_look_shows_squares_and_what_comes_back_and_encodes_nothing(images, kl_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "cache"
    options = ("--autoencoder", kl_folder, "--image-size", SIDE, "--look", 4, "--out", out, "--json")
    assert run("encode", images, *options, monkeypatch=monkeypatch) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["images"] == 4 and said["sheet"] == str(tmp_path / "cache.png")
    assert "leaves out 17% on average, 17% at most" in said["cut away"]  # of 24 x 20 pixels
    assert [file.name for file in tmp_path.iterdir()] == ["cache.png"]
    source, shown = open_images(images, SIDE), sheet(out)[_LINE:]  # one row has its captions above
    rows = [0, 4, 9, 13]  # evenly over 18 images of three classes
    for number, row in enumerate(rows):
        left = 2 * number * (4 * SIDE + 2)  # enlarged four times; each image takes two places
        tile = shown[: 4 * SIDE, left : left + 4 * SIDE][::4, ::4]
        assert np.array_equal(tile, source[row].pixels)
        given_back = shown[: 4 * SIDE, left + 4 * SIDE + 2 : left + 8 * SIDE + 2]
        assert given_back.std() > 0
        assert not np.array_equal(given_back[::4, ::4], source[row].pixels)


def test_a_look_shows_maps(segmented, kl_folder, tmp_path, monkeypatch):
    out = tmp_path / "cache"
    options = ("--autoencoder", kl_folder, "--image-size", SIDE, "--look", 2, "--out", out)
    assert run("encode", segmented, *options, monkeypatch=monkeypatch) == 0
    item = open_images(segmented, SIDE)[0]
    tile = sheet(out)[_LINE:][: 4 * SIDE, 4 * SIDE + 2 : 8 * SIDE + 2][::4, ::4]
    assert np.array_equal(tile, colour_map(item.semantic_map, tiny.MAP_PALETTE))


def test_a_look_shows_variants(segmented, kl_folder, tmp_path, monkeypatch):
    out = tmp_path / "cache"
    options = ("--autoencoder", kl_folder, "--image-size", SIDE, "--look", 2, "--variants", 3, "--out", out)
    assert run("encode", segmented, *options, monkeypatch=monkeypatch) == 0
    item = open_images(segmented, SIDE)[0]
    left = 2 * (4 * SIDE + 2)  # after the image and its map
    tile = sheet(out)[_LINE:][: 4 * SIDE, left : left + 4 * SIDE][::4, ::4]
    pixels = to_unit_range(torch.from_numpy(item.pixels.copy()).permute(2, 0, 1)[None])
    shown = to_uint8(variants_of(pixels, draw_variants([0], 1)[0]))[0].permute(1, 2, 0)
    assert np.array_equal(tile, shown.numpy())
    assert not np.array_equal(tile, item.pixels)


def test_a_look_passes_over_what_is_broken(images, kl_folder, tmp_path):
    own = shutil.copytree(images, tmp_path / "own")
    for number in range(6):
        (own / "apple" / f"{number}.png").write_bytes(b"no image")
    request = EncodeRequest(data=own, autoencoder=kl_folder, image_size=SIDE)
    seen = look(request, tmp_path / "sheet.png", num=18, runtime=tiny.CPU)
    assert seen.sheet == tmp_path / "sheet.png"
    assert len(seen.names) == 12 and not any(name.startswith("apple") for name in seen.names)


@pytest.mark.parametrize("num", [0, -1, 65])
def test_a_look_at_nothing_or_too_much_is_refused(images, kl_folder, tmp_path, num):
    with pytest.raises(ConfigError, match=f"--look {num}: a sheet has 1 to 64 images"):
        look(EncodeRequest(data=images, autoencoder=kl_folder, image_size=SIDE), tmp_path / "cache", num=num)
    assert list(tmp_path.iterdir()) == []


def test_a_look_at_buckets_shows_every_shape(kl_folder, tmp_path):
    photos = tiny.write_mixed(tmp_path / "photos")
    request = EncodeRequest(data=photos, autoencoder=kl_folder, image_size=16, buckets=True)
    seen = look(request, tmp_path / "sheet", num=20, runtime=tiny.CPU)
    shapes = [name.rpartition("_")[2] for name in seen.names]
    assert shapes == ["wide.png"] * 9 + ["tall.png"] * 5 + ["square.png"] * 6
    whole = look(request.model_copy(update={"buckets": False}), tmp_path / "square", num=20, runtime=tiny.CPU)
    assert sum(seen.cut) < sum(whole.cut)
    wide, square = (Image.open(one.sheet).size for one in (seen, whole))
    assert wide > square


def test_a_dry_run_counts_the_images_of_each_bucket(kl_folder, tmp_path, monkeypatch, capsys):
    photos = tiny.write_mixed(tmp_path / "photos")
    command = ["encode", photos, "--autoencoder", kl_folder, "--image-size", 16, "--out", tmp_path / "cache"]
    before = tiny.tree(tmp_path)
    assert run(*command, "--dry-run", "--buckets", monkeypatch=monkeypatch) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("bucket 20x12 9 images; the crop leaves out 10% of a picture", "bucket 16 6 images; the crop"):
        assert words in shown
    assert run(*command, "--dry-run", "--bucket-step", 8, monkeypatch=monkeypatch) == 2
    assert "bucket_step 8 has no effect" in (said := capsys.readouterr().err) or "--bucket-step 8 has no" in said
    assert tiny.tree(tmp_path) == before


def test_a_dry_run_counts_and_writes_nothing(images, kl_folder, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(images, tmp_path / "photos")
    shutil.copy(folder / "apple" / "0.png", folder / "berry" / "again.png")
    (folder / "apple" / "broken.png").write_bytes(b"")
    files = sorted(folder.rglob("*.png"))
    rows = [f"{file.relative_to(folder)},{file.stem if file.stem.isdigit() else ''}" for file in files]
    (folder / "labels.csv").write_text("\n".join(["file,age", *rows]), encoding="utf-8")
    before = tiny.tree(tmp_path)
    command = ["encode", folder, "--autoencoder", kl_folder, "--image-size", SIDE, "--out", tmp_path / "cache"]
    assert run(*command, "--dry-run", "--columns", "age:number", "--json", monkeypatch=monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_images"] == 19 and found["columns"]["age"]["greatest"] == 5
    assert found["duplicates"] == [["apple/0.png", "berry/again.png"]] and found["contradictory"] == []
    assert run(*command, "--dry-run", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr()
    for words in ("apple: 6; berry: 7; cherry: 6", "1 images repeat another: apple/0.png = berry/again.png"):
        assert words in " ".join(shown.out.split())
    assert "would be left out: apple/broken.png: it is empty (0 bytes)" in shown.err
    assert tiny.tree(tmp_path) == before
    assert run(*command, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().err
    assert "1 images repeat another, byte for byte (such as apple/0.png, berry/again.png)" in said


def test_16_bits_keep_their_range_through_cache_training_and_a_second_call(tmp_path, kl):
    """What was chosen at first stays: also when a broken image of the set is repaired."""
    (tmp_path / "scans").mkdir()
    for number in range(8):
        (tmp_path / "scans" / f"{number}.png").write_bytes(png16(ramp(1, "uint16", 4095 - number)))
    whole = (tmp_path / "scans" / "3.png").read_bytes()
    (tmp_path / "scans" / "3.png").write_bytes(whole[:60])
    kl.save_pretrained(tmp_path / "kl")
    options = {"autoencoder": str(tmp_path / "kl"), "image_size": 12, "flips": True, "mask_variants": 2, "variants": 0}
    first = encode(tmp_path / "scans", tmp_path / "cache", **options).index
    found = first.plan.pixel_format
    assert (found.title, found.low, found.high) == (
        "16-bit gray, 0 to 4095 (least and greatest of 8 images)",
        [0],
        [4095],
    )
    assert (first.num_images, len(first.broken), first.clipped) == (7, 1, 0)
    (tmp_path / "scans" / "3.png").write_bytes(png16(ramp(1, "uint16", 8000)))
    second = encode(tmp_path / "scans", tmp_path / "cache", **options)
    assert second.is_new and second.index.num_images == 8
    assert second.index.plan.pixel_format == found
    assert 0 < second.index.clipped < 1 / 8  # of the repaired one alone
    with pytest.raises(ArtifactError, match="pixel_format"):
        encode(tmp_path / "scans", tmp_path / "cache", value_range="full", **options)
    source = open_images(tmp_path / "scans", 12, pixels=found)
    pixels = torch.from_numpy(np.stack([item.pixels for item in source])).permute(0, 3, 1, 2)
    expected = kl.encode(found.to_unit(pixels))
    stored = LatentCache(tmp_path / "cache")
    assert torch.allclose(stored.moments(range(8)).float(), expected, rtol=2**-11, atol=1e-5)
    mirrored = kl.encode(found.to_unit(pixels).flip(-1))
    assert torch.allclose(stored.moments(range(8), [True] * 8).float(), mirrored, rtol=2**-11, atol=1e-5)


@pytest.mark.parametrize("held", [False, True])
def test_training_images_of_16_bits_are_those_of_the_source(tmp_path, held):
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(png16(ramp(1, "uint16", 60_000 + number)))
    source = open_images(tmp_path, 12, pixels=PixelChoice())
    images = TrainingImages(source, seed=0, flip=True)
    if held:
        images.hold(torch.device("cpu"))
    batch, as_it_is = images.at(range(6)), []
    assert batch.pixels.dtype == torch.uint16
    for row, index in enumerate(batch.indices.tolist()):
        own, pixels = batch.pixels[row, 0].numpy(), source[index].pixels[..., 0]
        as_it_is.append(np.array_equal(own, pixels))
        assert as_it_is[-1] or np.array_equal(own, pixels[:, ::-1])
    assert 0 < sum(as_it_is) < 6
