"""Pictures of any pixel format become files: what is stored, what is shown, and where the metadata is."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from latentflow.autoencoder import Autoencoder
from latentflow.commands.inpaint import inpaint
from latentflow.commands.invert import invert
from latentflow.commands.sample import sample
from latentflow.data.pictures.crop import center_crop
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.pictures.shown import as_levels, as_shown
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.sampling import picture_content
from latentflow.sampling.picture_content import decode_picture, encode_picture, require_suffix, usual_suffix
from latentflow.sampling.picture_file import read_facts, read_head
from latentflow.sampling.pipeline import Given
from latentflow.sampling.png import encode_png
from latentflow.sampling.preview import _drawn, preview_drawing
from latentflow.sampling.request import InpaintRequest, InvertRequest, SampleRequest
from tests import tiny

GRAY16 = PixelFormat(channels=1, dtype="uint16", low=[0], high=[4095], rule="given")
BANDS = PixelFormat(channels=4, dtype="uint8")
FORMATS = {
    "gray 8": PixelFormat(channels=1),
    "gray 16": GRAY16,
    "gray alpha 8": PixelFormat(mode="gray-alpha"),
    "gray alpha 16": PixelFormat(mode="gray-alpha", dtype="uint16"),
    "rgb 8": RGB,
    "rgb 16": PixelFormat(dtype="uint16"),
    "rgba 8": PixelFormat(mode="rgba"),
    "rgba 16": PixelFormat(mode="rgba", dtype="uint16"),
    "2 bands": PixelFormat(channels=2),
    "4 bands": BANDS,
    "7 bands 16": PixelFormat(channels=7, dtype="uint16"),
    "gray float": PixelFormat(channels=1, dtype="float32"),
    "rgb float": PixelFormat(dtype="float32"),
    "5 bands float": PixelFormat(channels=5, dtype="float32", low=[-1], high=[3]),
}
FACTS = {"drawn_by": {"model": "a"}, "seeds": [3]}


def values(pixel_format: PixelFormat, height: int = 9, width: int = 13) -> np.ndarray:
    random, shape = np.random.default_rng(0), (height, width, pixel_format.channels)
    if pixel_format.dtype == "float32":
        return random.normal(size=shape).astype(np.float32)
    top = np.iinfo(pixel_format.dtype).max
    return random.integers(0, top, shape, endpoint=True, dtype=pixel_format.dtype)


def content(pixel_format: PixelFormat, suffix: str) -> bytes:
    return encode_picture(values(pixel_format), pixel_format, json.dumps(FACTS), suffix)


@pytest.fixture(params=FORMATS)
def pixel_format(request) -> PixelFormat:
    return FORMATS[request.param]


def test_a_tiff_holds_every_format_and_its_metadata(pixel_format):
    written = content(pixel_format, ".tiff")
    assert np.array_equal(decode_picture(written, "a"), values(pixel_format))
    assert read_head(written, decode=True) == ((13, 9), FACTS)
    with tifffile.TiffFile(io.BytesIO(written)) as file:
        (page,) = file.pages
        assert page.samplesperpixel == pixel_format.channels
        assert page.photometric.name == ("RGB" if pixel_format.mode in ("rgb", "rgba") else "MINISBLACK")
        assert [mark.name for mark in page.extrasamples][-1:] == (
            ["UNASSALPHA"] if pixel_format.has_alpha else ["UNSPECIFIED"] if pixel_format.mode == "bands" else []
        )


def test_an_array_holds_every_format(pixel_format):
    assert np.array_equal(np.load(io.BytesIO(content(pixel_format, ".npy"))), values(pixel_format))


def test_a_png_holds_gray_and_colours_of_8_and_16_bits(pixel_format):
    if usual_suffix(pixel_format) == ".tiff":
        with pytest.raises(ConfigError, match=r"PNG does not hold .*; use .tiff or .npy"):
            require_suffix(".png", pixel_format)
        assert pixel_format.mode == "bands" or pixel_format.dtype == "float32"
        return
    written, stored = content(pixel_format, ".png"), values(pixel_format)
    assert read_head(written, decode=True) == ((13, 9), FACTS)
    assert np.array_equal(decode_picture(written, "a"), stored)
    with Image.open(io.BytesIO(written)) as image:
        wanted = {"gray": "I;16" if pixel_format.dtype == "uint16" else "L", "rgb": "RGB", "rgba": "RGBA"}
        assert image.mode == wanted.get(pixel_format.mode, "RGBA" if pixel_format.dtype == "uint16" else "LA")


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_a_damaged_file_is_named(suffix):
    with pytest.raises(BrokenImage):
        read_head(content(RGB, suffix)[:80], "cut", decode=True)


def test_files_that_cannot_be_written():
    require_suffix(".TIFF", BANDS)
    with pytest.raises(ConfigError, match=r"not written as '.tif8'; did you mean '.tif"):
        require_suffix(".tif8", RGB)


def test_without_tifffile_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(picture_content, "find_spec", lambda name: None)
    require_suffix(".png", GRAY16)
    with pytest.raises(ConfigError, match=r"pip install 'latentflow\[data\]', or use .npy"):
        require_suffix(".tiff", BANDS)
    with pytest.raises(ConfigError, match=r"or use .png"):
        require_suffix(".tiff", GRAY16)


# What is shown


def test_the_range_of_a_format_is_shown_from_black_to_white():
    pixels = torch.tensor([0, 1000, 4095, 60000]).to(torch.uint16)[None, None, None]
    assert as_shown(pixels, GRAY16).tolist() == [[[[0, 62, 255, 255]]] * 3]
    pixels = torch.tensor([[10, 20, 30, 200]], dtype=torch.uint8)[:, :, None, None]
    assert as_shown(pixels, BANDS).flatten().tolist() == [10, 20, 30]
    assert as_shown(pixels[:, :2], PixelFormat(channels=2)).flatten().tolist() == [10, 10, 10]
    assert as_shown(pixels, PixelFormat(mode="rgba")).flatten().tolist() == [
        round(value * 200 / 255 + 55) for value in (10, 20, 30)
    ]
    assert as_shown(pixels[:, :3], RGB) is not pixels
    assert torch.equal(as_shown(pixels[:, :3], RGB), pixels[:, :3])


def test_levels_are_those_of_8_bits():
    every = torch.arange(256, dtype=torch.uint8)[None, None, None].expand(1, 3, 1, 256)
    assert torch.equal(as_levels(every, RGB), every.double())
    ends = torch.tensor([[[[0, 4095]], [[100, 300]]]]).to(torch.uint16)
    two = PixelFormat(channels=2, dtype="uint16", low=[0, 100], high=[4095, 300])
    assert as_levels(ends, two).tolist() == [[[[0.0, 255.0]], [[0.0, 255.0]]]]


# What models draw


@pytest.fixture(scope="module")
def models(tmp_path_factory, kl):
    """A model of each format; gray ones have the autoencoder for colours."""
    folder = tmp_path_factory.mktemp("models")
    four = Autoencoder(tiny.kl(in_channels=4, out_channels=4), "four")
    made = {"gray 16": (kl, GRAY16), "4 bands": (four, BANDS), "gray 8": (kl, PixelFormat(channels=1))}
    for name, (autoencoder, pixel_format) in made.items():
        model = tiny.model(autoencoder, pixel_format=pixel_format)
        model.save_pretrained(folder / name)
    return {name: type(model).from_pretrained(folder / name, runtime=tiny.CPU) for name in made}


def test_samples_have_the_stored_values(models):
    drawn = models["gray 16"].sample(num=2, seed=4)
    assert (drawn.pixels.dtype, drawn.pixels.shape) == (torch.uint16, (2, 1, 16, 16))
    unit = models["gray 16"].autoencoder.decode(models["gray 16"].config.normalisation.restore(drawn.latents))
    wanted = ((unit.mean(1) + 1) * 4095 / 2).round()
    assert torch.equal(drawn.pixels[:, 0].float(), wanted)
    assert [array.shape for array in drawn.arrays] == [(16, 16, 1)] * 2
    assert drawn.arrays[0].dtype == np.uint16
    assert [image.mode for image in drawn.images] == ["RGB"] * 2


@pytest.mark.parametrize(("name", "suffix"), [("gray 16", ".png"), ("gray 8", ".png"), ("4 bands", ".tiff")])
def test_a_folder_of_samples_is_written_shown_and_completed(models, name, suffix, tmp_path):
    model = models[name]
    folder, request = tmp_path / "out", SampleRequest(num=5, seed=1)
    drawn = model.sample(num=5, seed=1, batch_size=2)
    result = sample(model.reference, request, folder, batch_size=2, runtime=tiny.CPU)
    assert [file.suffix for file in result.files] == [suffix] * 5
    for file, array in zip(result.files, drawn.arrays, strict=True):
        assert np.array_equal(decode_picture(file.read_bytes(), file.name), array)
        facts = read_facts(str(file))
        assert PixelFormat(**facts["drawn_by"]["pixel_format"]) == model.config.pixel_format
    with Image.open(result.grid) as grid:
        shown, sheet = drawn.shown[0].permute(1, 2, 0).numpy(), np.asarray(grid)
        places = [(y, x) for y in range(40) for x in range(40)]
        assert any(np.array_equal(sheet[y : y + 64 : 4, x : x + 64 : 4], shown) for y, x in places)
    before = tiny.tree(folder)
    result.files[1].unlink()
    result.files[2].write_bytes(result.files[2].read_bytes()[:100])
    assert sample(model.reference, request, folder, batch_size=2, runtime=tiny.CPU).kept == 3
    assert tiny.tree(folder) == before
    with pytest.raises(ArtifactError, match="holds 5 pictures that are not of this request"):
        sample(model.reference, SampleRequest(num=5, seed=1, steps=3), folder, runtime=tiny.CPU)


def test_samples_are_saved_as_the_suffix_says(models, tmp_path):
    drawn = models["4 bands"].sample(num=2, seed=0)
    assert [file.suffix for file in drawn.save(tmp_path / "folder")] == [".tiff"] * 2
    files = drawn.save_as(tmp_path / "x.npy")
    assert [file.suffix for file in files] == [".npy"] * 2
    assert np.array_equal(np.load(files[1]), drawn.arrays[1])
    with pytest.raises(ConfigError, match="PNG does not hold 8-bit 4 bands"):
        drawn.save_as(tmp_path / "x.png")


def test_previews_show_any_format(models):
    model = models["gray 16"]
    pictures = _drawn(model, preview_drawing(model.config), Given(), tiny.CPU, 8)
    assert pictures.dtype == torch.uint8
    assert pictures.shape[1:] == (3, 16, 16)
    assert torch.equal(pictures[:, 0], pictures[:, 2])


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    """A 16-bit gray picture of 12 significant bits."""
    rows, columns = np.mgrid[:20, :24]
    file = tmp_path_factory.mktemp("scans") / "scan.png"
    file.write_bytes(encode_png((rows * 100 + columns * 90).astype(np.uint16)[..., None], {}))
    return file


def test_pictures_to_start_from_are_read_in_the_format(models, scan, images, tmp_path):
    model = models["gray 16"]
    inversion = model.invert(scan)
    stored = decode_picture(scan.read_bytes(), "scan")
    wanted = center_crop(Image.fromarray(stored[..., 0].astype(np.float32)), 16).round()
    assert np.array_equal(inversion.pixels[0, 0].numpy(), wanted)
    drawn = model.image_to_image(scan, num=2, strength=0.05)
    assert (drawn.pixels.dtype, drawn.pixels.shape) == (torch.uint16, (2, 1, 16, 16))
    in_memory = model.image_to_image(Image.fromarray(stored[..., 0]), num=2, strength=0.05)
    assert torch.equal(in_memory.pixels, drawn.pixels)
    with pytest.raises(DataError, match="it has 8 bits, and the others 16"):
        model.image_to_image(next(images.rglob("*.png")))
    invert(model.reference, scan, InvertRequest(steps=2), tmp_path / "inverted", runtime=tiny.CPU)
    assert sorted(file.name for file in (tmp_path / "inverted").glob("*.png")) == [
        "autoencoder.png",
        "input.png",
        "round_trip.png",
    ]


@pytest.mark.parametrize("feather", [0, 3])
def test_holes_are_filled_in_the_format_and_all_else_stays(models, scan, tmp_path, feather):
    model, stored = models["gray 16"], decode_picture(scan.read_bytes(), "scan")
    stored[3, 5] = 60_000  # above the range, which is clipped for the model and kept in the picture
    brighter = tmp_path / "scan.png"
    brighter.write_bytes(encode_png(stored, {}))
    hole = np.zeros((20, 24), np.uint8)
    hole[6:12, 8:15] = 255
    filled = model.inpaint(brighter, hole, num=2, feather=feather)
    assert (filled.pixels.dtype, filled.pixels.shape) == (torch.uint16, (2, 1, 20, 24))
    for array in filled.arrays:
        assert np.array_equal(array[hole == 0], stored[hole == 0])
        assert (array[hole > 0] != stored[hole > 0]).mean() > 0.5
    by_array = model.inpaint(stored, hole, num=2, feather=feather)
    assert torch.equal(by_array.pixels, filled.pixels)
    (file,) = model.inpaint(brighter, hole, feather=feather).save_as(tmp_path / "filled.png")
    assert np.array_equal(decode_picture(file.read_bytes(), "filled")[hole == 0], stored[hole == 0])
    with pytest.raises(DataError, match=r"an array \[20, 24, 1\] of uint8; give \[height, width, 1\] uint16"):
        model.inpaint(stored.astype(np.uint8), hole)


def test_a_hole_in_bands_is_filled_in_all_of_them(models):
    bands, hole = values(BANDS, 20, 24), np.zeros((20, 24), np.uint8)
    hole[6:12, 8:15] = 255
    (array,) = models["4 bands"].inpaint(bands, hole).arrays
    assert np.array_equal(array[hole == 0], bands[hole == 0])
    assert ((array != bands)[hole > 0].mean(0) > 0.5).all()


def test_a_filled_picture_of_8_bit_colours_is_a_png(kl, images, tmp_path):
    tiny.model(kl).save_pretrained(tmp_path / "model")
    Image.fromarray(np.eye(20, 24, dtype=np.uint8) * 255).save(tmp_path / "hole.png")
    given = (tmp_path / "model", next(images.rglob("*.png")), tmp_path / "hole.png", InpaintRequest())
    with pytest.raises(ConfigError, match=r"filled.tiff must end in .png"):
        inpaint(*given, tmp_path / "filled.tiff", runtime=tiny.CPU)
    assert inpaint(*given, tmp_path / "filled.png", runtime=tiny.CPU).files == [tmp_path / "filled.png"]
