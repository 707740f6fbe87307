"""One folder, one request: completed where it was left, never mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.commands.interpolate import interpolate
from latentflow.commands.invert import invert
from latentflow.commands.sample import sample
from latentflow.commands.vary import vary
from latentflow.errors import ArtifactError
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.picture_folder import PictureFolder
from latentflow.sampling.request import InterpolateRequest, InvertRequest, SampleRequest, VaryRequest
from tests import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory, kl) -> Path:
    """Two models that differ in their weights alone."""
    folder = tmp_path_factory.mktemp("models")
    for number in (0, 1):
        tiny.model(kl, seed=number, time_scale=20.0).save_pretrained(folder / str(number) / "fruit")
    return folder


@pytest.fixture
def draw(models):
    def drawn(out, number=0, runtime=tiny.CPU, batch_size=16, **request):
        return sample(
            models / str(number) / "fruit", SampleRequest(**request), out, batch_size=batch_size, runtime=runtime
        )

    return drawn


def test_a_repeated_request_draws_only_what_is_missing(draw, tmp_path):
    whole = draw(tmp_path / "whole", num=7, batch_size=3)
    assert (len(whole.files), whole.kept) == (7, 0)
    before = tiny.tree(tmp_path / "whole")
    draw(tmp_path / "parts", num=7, batch_size=3)
    for lost in (1, 2, 5):
        (tmp_path / "parts" / whole.files[lost].name).unlink()
    (tmp_path / "parts" / whole.files[6].name).write_bytes(b"cut short")
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "parts").glob("*seed*")}
    again = draw(tmp_path / "parts", num=7, batch_size=3)
    assert (again.kept, again.evaluations) == (3, whole.evaluations)
    assert tiny.tree(tmp_path / "parts") == before
    for kept in (0, 3, 4):
        name = whole.files[kept].name
        assert (tmp_path / "parts" / name).stat().st_mtime_ns == times[name]
    (tmp_path / "parts" / "grid.png").unlink()
    assert draw(tmp_path / "parts", num=7, batch_size=3).kept == 7
    assert tiny.tree(tmp_path / "parts") == before


def test_a_picture_with_a_flipped_bit_is_drawn_again(draw, tmp_path):
    (file,) = draw(tmp_path, num=1, batch_size=1).files
    whole = file.read_bytes()
    pixels = whole.index(b"IDAT") + 4
    for place in range(pixels, len(whole) - 24, 37):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert draw(tmp_path, num=1, batch_size=1).kept == 0, place
        assert file.read_bytes() == whole


def test_more_of_the_same_request_may_be_drawn(draw, tmp_path):
    draw(tmp_path, num=4, batch_size=4)
    assert draw(tmp_path, num=8, batch_size=4).kept == 4


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"number": 1}, "weights"),
        ({"guidance": 2.0}, "guidance 1.0, not 2.0"),
        ({"solver": "heun"}, "solver euler, not heun"),
        ({"steps": 3}, "steps 2, not 3"),
        ({"runtime": tiny.CPU.with_precision("bf16")}, "precision fp32, not bf16"),
        ({"seed": 100}, "another seed or class"),
        ({"classes": "apple"}, "berry_seed-00000001.png (another seed or class)"),
        ({"classes": "none"}, "told ['label'], not []"),
        ({"num": 3}, "holds a picture that is not of this request: apple_seed-00000003.png"),
    ],
)
def test_pictures_of_another_request_are_refused(draw, tmp_path, other, said):
    draw(tmp_path, num=4)
    before = tiny.tree(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        draw(tmp_path, **{"num": 4, **other})
    assert said in str(caught.value)
    assert "give another --out" in str(caught.value)
    assert tiny.tree(tmp_path) == before
    draw(tmp_path / "another", **{"num": 4, **other})


def test_class_folders_of_a_person_are_refused_and_folders_of_ours_are_not(draw, tmp_path):
    draw(tmp_path / "drawn" / "apples", num=1, classes="apple")
    (tmp_path / "drawn" / "notes").mkdir()
    draw(tmp_path / "drawn", num=2)
    Image.new("RGB", (16, 16)).save(tmp_path / "drawn" / "notes" / "holiday.jpg")
    before = tiny.tree(tmp_path)
    with pytest.raises(ArtifactError, match=r"folders of other pictures \(notes/holiday.jpg\); give another --out"):
        draw(tmp_path / "drawn", num=2)
    assert tiny.tree(tmp_path) == before


@pytest.mark.parametrize("name", ["holiday.jpg", "apple_seed-00000000.png", "gridlock.png"])
def test_pictures_of_a_person_are_refused(draw, tmp_path, name):
    Image.new("RGB", (16, 16)).save(tmp_path / name)
    before = tiny.tree(tmp_path)
    with pytest.raises(ArtifactError, match=f"{name} .not drawn by this program"):
        draw(tmp_path, num=2)
    assert tiny.tree(tmp_path) == before


def test_what_is_no_picture_is_of_no_concern(draw, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "grid.png").write_bytes(b"old")
    (tmp_path / ".hidden.png").write_bytes(b"half")
    tiny.write_images(tmp_path / "photos")
    assert len(draw(tmp_path, num=2).files) == 2


def test_a_folder_by_another_name_holds_the_same_model(models, tmp_path, monkeypatch):
    sample(models / "0" / "fruit", SampleRequest(num=2), tmp_path, runtime=tiny.CPU)
    monkeypatch.chdir(models / "0")
    assert sample("fruit", SampleRequest(num=2), tmp_path, runtime=tiny.CPU).kept == 2


def test_the_original_of_variations_is_the_picture_of_sample(models, draw, tmp_path):
    for seed in (0, 5):
        near = vary(models / "0" / "fruit", VaryRequest(seed=seed, num=2), tmp_path / f"near{seed}", runtime=tiny.CPU)
        drawn = draw(tmp_path / f"drawn{seed}", seed=seed, num=1).files[0]
        assert near.files[0].name == drawn.name
        assert near.files[0].read_bytes() == drawn.read_bytes()
    among_others = draw(tmp_path / "many", num=6, batch_size=1).files[5]
    assert among_others.read_bytes() == drawn.read_bytes()


@pytest.mark.parametrize(("verb", "asked"), [(interpolate, InterpolateRequest), (vary, VaryRequest)])
def test_edits_complete_and_never_mix(verb, asked, models, tmp_path):
    model, out = models / "0" / "fruit", tmp_path / "out"
    first = verb(model, asked(num=3), out, runtime=tiny.CPU)
    before = tiny.tree(out)
    first.files[1].unlink()
    verb(model, asked(num=3), out, runtime=tiny.CPU)
    assert tiny.tree(out) == before
    with pytest.raises(ArtifactError, match="not of this request"):
        verb(models / "1" / "fruit", asked(num=3), out, runtime=tiny.CPU)
    with pytest.raises(ArtifactError, match="not of this request"):
        sample(model, SampleRequest(num=3), out, runtime=tiny.CPU)
    assert tiny.tree(out) == before


def test_an_inversion_keeps_its_folder(models, tmp_path):
    model, photo, other = models / "0" / "fruit", tmp_path / "photo.png", tmp_path / "other.png"
    Image.radial_gradient("L").resize((16, 16)).save(photo)
    Image.linear_gradient("L").resize((16, 16)).save(other)
    invert(model, photo, InvertRequest(), tmp_path / "inverted", runtime=tiny.CPU)
    before = tiny.tree(tmp_path / "inverted")
    invert(model, photo, InvertRequest(), tmp_path / "inverted", runtime=tiny.CPU)
    assert tiny.tree(tmp_path / "inverted") == before
    with pytest.raises(ArtifactError, match=r"of photo\.png"):
        invert(model, other, InvertRequest(), tmp_path / "inverted", runtime=tiny.CPU)
    with pytest.raises(ArtifactError, match="not part of an inversion"):
        invert(model, photo, InvertRequest(), tmp_path, runtime=tiny.CPU)


def test_each_picture_names_the_weights(models, draw, tmp_path):
    file = draw(tmp_path, num=1).files[0]
    flow = LatentFlow.from_pretrained(models / "0" / "fruit", runtime=tiny.CPU)
    with Image.open(file) as image:
        facts = json.loads(image.text["latentflow"])
    assert facts["drawn_by"]["weights"] == flow.weights_hash[:12]
    PictureFolder(flow, tmp_path, make_drawing(flow, SampleRequest(num=1)))
    other = LatentFlow.from_pretrained(models / "1" / "fruit", runtime=tiny.CPU)
    assert other.weights_hash != flow.weights_hash


def test_the_grid_shows_the_first_64(draw, tmp_path):
    result = draw(tmp_path, num=66, batch_size=66)
    with Image.open(result.grid) as grid:
        assert grid.size == (3 * 64 + 4, 15 + 22 * 66 - 2)  # one column per class, named above it, enlarged four times
