"""`latentflow inpaint` and `latentflow mask-to-image`: files in, files out; bad input leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.data.painting.semantic_maps import colour_map
from tests import tiny
from tests.processes import Result, run_here

SIZE = tiny.IMAGE_SIZE
NOTE = "this model was not trained for inpainting"
MODELS = {
    "all": {"conditioning": tiny.SPATIAL},
    "classes": {},
    "unguided": {"class_names": (), "conditioning": {**tiny.SPATIAL, "inpainting_dropout": 0.0, "map_dropout": 0.0}},
    "holes": {"class_names": (), "conditioning": {"inpainting": True, "inpainting_dropout": 0.0}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, kl) -> dict[str, Path]:
    """Models on disk by their conditions: all, only classes, holes and maps always, holes always."""
    folder = tmp_path_factory.mktemp("models")
    for name, given in MODELS.items():
        tiny.model(kl, time_scale=20.0, **given).save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with an image of 30 x 26 pixels, its mask and its map, and files that are of no use."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (26, 30, 3), dtype=np.uint8)
    mask = np.zeros((26, 30), np.uint8)
    mask[8:17, 10:21] = 255
    indices = np.kron(random.choice([0, 1, 2, 255], (13, 15)), np.ones((2, 2))).astype(np.uint8)
    unknown = indices.copy()
    unknown[3, 4] = 3
    pictures = {
        "image": pixels,
        "mask": mask,
        "map": indices,
        "map_in_colours": colour_map(indices, tiny.MAP_PALETTE),
        "small_mask": mask[:-1],
        "small_map": indices[:, :-2],
        "empty": np.zeros_like(mask),
        "full": np.full_like(mask, 255),
        "coloured": np.stack([mask, 0 * mask, 0 * mask], -1),
        "unknown_class": unknown,
        "unknown_colours": colour_map(indices, tuple((b, r, g) for r, g, b in tiny.MAP_PALETTE)),
        "line": pixels[:1],
        "line_mask": mask[10:11],
        "line_map": indices[:1],
    }
    for name, array in pictures.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    (tmp_path / "half.png").write_bytes((tmp_path / "image.png").read_bytes()[:400])
    return tmp_path


@pytest.fixture
def paint(capsys, monkeypatch, models, place) -> Callable[..., Result]:
    """Run `latentflow VERB MODEL ...`; words that name a file of `place` become its path."""

    def run(verb: str, model: str, *args: object) -> Result:
        paths = [place / f"{arg}.png" if (place / f"{arg}.png").is_file() else arg for arg in args]
        given = [] if "--out" in paths else ["--out", place / "out" / "painted.png"]
        return run_here([verb, models.get(model, model), *paths, *given, "--device", "cpu"], capsys, monkeypatch)

    return run


@pytest.fixture
def leaves_nothing(place, models):
    """No file or folder may appear, vanish or change next to the input or the models."""
    folders = [place, models["all"].parent]
    before = [tiny.tree(folder) for folder in folders]
    yield
    assert [tiny.tree(folder) for folder in folders] == before


def refused(result: Result, *said: str) -> None:
    """One line on stderr which says what was wrong, and exit code 2."""
    assert result.code == 2, result
    assert result.error.startswith("latentflow: ")
    assert not result.out
    for words in said:
        assert words in result.error


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


# Results


def test_inpaint_writes_one_picture_of_the_images_size(paint, place):
    done = paint("inpaint", "all", "image", "mask", "--feather", 3, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["files"] == str(place / "out" / "painted.png")
    assert said["method"] == "condition"
    assert said["seen"] == "22 x 22 pixels from (5, 2), at 16 x 16"
    assert said["evaluations per image"] == 2
    assert NOTE not in done.err
    image, mask, painted = (pixels(place / f"{name}.png") for name in ("image", "mask", "out/painted"))
    assert painted.shape == image.shape
    assert (painted == image)[mask == 0].all()
    assert (painted != image)[mask == 255].any()
    assert [file.name for file in (place / "out").iterdir()] == ["painted.png"]


def test_inpaint_several_seeds_with_a_class_and_a_map(paint, place, models):
    done = paint(
        *("inpaint", "all", "image", "mask", "--map", "map", "--num", 3, "--seed", 4, "--classes", "berry"),
        *("--guidance", 2, "--guided-by", "semantic_map,label", "--fit", "whole", "--batch-size", 3, "--json"),
    )
    assert done.code == 0, done.err
    files = [place / "out" / f"painted_berry_seed-0000000{seed}.png" for seed in (4, 5, 6)]
    assert sorted((place / "out").iterdir()) == files
    said = json.loads(done.out)
    assert said["files"] == ", ".join(map(str, files))
    assert said["evaluations per image"] == 4
    assert said["seen"] == "30 x 26 pixels from (0, 0), at 20 x 16"
    from_python = LatentFlow.from_pretrained(models["all"], device="cpu").inpaint(
        *(place / f"{name}.png" for name in ("image", "mask")),
        semantic_map=place / "map_in_colours.png",
        classes=["berry"],
        num=3,
        seed=4,
        fit="whole",
        guidance=2.0,
        guided_by=["label", "semantic_map"],
    )
    for row, picture in enumerate(from_python.images):
        assert (np.asarray(picture) == pixels(files[row])).all()


@pytest.mark.parametrize(
    ("model", "options", "method", "is_noted"),
    [
        ("classes", (), "replacement", True),
        ("classes", ("--method", "replacement"), "replacement", False),  # asked for: no news
        ("all", (), "condition", False),
        ("all", ("--method", "condition"), "condition", False),
        ("all", ("--method", "replacement"), "replacement", False),
    ],
)
def test_the_note_that_a_model_was_not_trained_for_it(paint, model, options, method, is_noted):
    done = paint("inpaint", model, "image", "mask", *options, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["method"] == method
    assert (NOTE in done.err) == is_noted
    assert len(done.err.splitlines()) == is_noted


def test_mask_to_image(paint, place):
    done = paint("mask-to-image", "all", "map", "--num", 2, "--guidance", 2, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    files = [place / "out" / f"painted_seed-0000000{seed}.png" for seed in (0, 1)]
    assert said["files"] == ", ".join(map(str, files))
    assert said["evaluations per image"] == 4
    assert all(pixels(file).shape == (SIZE, SIZE, 3) for file in files)
    table = paint("mask-to-image", "all", "map_in_colours", "--guidance", 2, "--batch-size", 1)
    assert table.code == 0, table.err
    difference = pixels(place / "out" / "painted.png").astype(int) - pixels(files[0])
    assert abs(difference).max() <= 1  # in a batch of another size


def test_mask_to_image_at_the_maps_own_size(paint, place):
    Image.fromarray(np.ones((20, 28), np.uint8)).save(place / "fitting.png")
    done = paint("mask-to-image", "all", "fitting", "--native")
    assert done.code == 0, done.err
    assert pixels(place / "out" / "painted.png").shape == (20, 28, 3)


def test_an_old_picture_of_ours_is_replaced_and_no_other_file(paint, place):
    assert paint("inpaint", "all", "image", "mask", "--out", str(place / "old.png")).code == 0
    before = pixels(place / "old.png")
    done = paint("inpaint", "all", "image", "mask", "--seed", "3", "--out", str(place / "old.png"))
    assert done.code == 0, done.err
    assert (pixels(place / "old.png") != before).any()
    for content in (b"something else", (place / "image.png").read_bytes()):
        (place / "old.png").write_bytes(content)
        refused = paint("inpaint", "all", "image", "mask", "--out", str(place / "old.png"))
        assert refused.code == 2
        assert "old.png exists and was not drawn by this program, so it stays; choose another --out" in refused.err
        assert (place / "old.png").read_bytes() == content


def test_an_input_is_not_overwritten_by_one_of_several(paint, place):
    assert paint("inpaint", "all", "image", "mask", "--out", str(place / "new.png"), "--num", "2").code == 0
    drawn = sorted(place.glob("new_*.png"))
    own = place / "new_seed-00000000.png"
    assert own in drawn
    before = own.read_bytes()
    refused = paint("inpaint", "all", own.stem, "mask", "--out", str(place / "new.png"), "--num", "2")
    assert refused.code == 2
    assert "is the input itself" in refused.err
    assert own.read_bytes() == before


# Bad input


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("image", "small_mask"), "30 x 25 pixels"),
        (("image", "empty"), "all black"),
        (("image", "full"), "all white"),
        (("image", "coloured"), "coloured pixels"),
        (("image", "text"), "no image that Pillow can read"),
        (("text", "mask"), "no image that Pillow can read"),
        (("half", "mask"), "half.png"),
        (("image", "none.png"), "none.png does not exist"),
        (("none.png", "mask"), "none.png does not exist"),
        (("image", "."), "is a folder"),
        (("line", "line_mask"), "smaller than one latent pixel"),
        (("image", "mask", "--map", "small_map"), "28 x 26"),
        (("image", "mask", "--map", "unknown_class"), "class 3"),
        (("image", "mask", "--map", "unknown_colours"), "belongs to no class"),
        (("image", "mask", "--map", "text"), "no image that Pillow can read"),
        (("image", "mask", "--map", "none.png"), "none.png does not exist"),
    ],
)
def test_inpaint_bad_files(paint, leaves_nothing, files, said):
    refused(paint("inpaint", "all", *files), said)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("all", ("--fit", "windows"), "'windows' is not one of 'window', 'whole', 'native'"),
        ("all", ("--fit", "native"), "resize to 32 x 24"),
        ("all", ("--method", "conditions"), "'conditions' is not one of"),
        ("all", ("--method", "magic"), "'magic' is not one of 'condition', 'replacement'"),
        ("all", ("--feather", "-2"), "feather -2"),
        ("all", ("--num", "0"), "--num 0"),
        ("all", ("--num", "-3"), "--num -3"),
        ("all", ("--guidance", "-1"), "from 0 to 1000"),
        ("all", ("--guidance", "2", "--guided-by", "semantic_map"), "not given"),
        ("all", ("--guidance", "2", "--guided-by", "label"), "not given"),
        ("all", ("--guidance", "2", "--guided-by", "inpaintign"), "did you mean 'inpainting'"),
        ("all", ("--guidance", "2", "--method", "replacement"), "no condition is given"),
        ("all", ("--classes", "kiwi"), "kiwi"),
        ("all", ("--solver", "huen"), "did you mean 'heun'"),
        ("all", ("--steps", "0"), "0"),
        ("classes", ("--method", "condition"), "not trained with the condition inpainting"),
        ("classes", ("--map", "map"), "not trained with the condition semantic_map"),
        ("classes", ("--guidance", "2", "--guided-by", "inpainting"), "was not trained"),
        ("unguided", ("--map", "map", "--guidance", "2"), r"_dropout = 0"),
        ("unguided", ("--map", "map", "--guidance", "2", "--guided-by", "inpainting"), "was not trained"),
        ("unguided", (), "semantic_map"),
        ("holes", ("--method", "replacement"), "inpainting"),
        ("nowhere/near/a/model", (), "nowhere"),
    ],
)
def test_inpaint_bad_requests(paint, leaves_nothing, model, options, said):
    refused(paint("inpaint", model, "image", "mask", *options), said)


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("all", ("unknown_class",), "class 3"),
        ("all", ("unknown_colours",), "belongs to no class"),
        ("all", ("text",), "no image that Pillow can read"),
        ("all", ("none.png",), "none.png does not exist"),
        ("all", (".",), "is a folder"),
        ("all", ("line_map",), "smaller than one latent pixel"),
        ("all", ("map", "--native"), "resize to 32 x 24"),
        ("all", ("map", "--num", "0"), "--num 0"),
        ("all", ("map", "--guidance", "2", "--guided-by", "inpainting"), "not given"),
        ("all", ("map", "--classes", "kiwi"), "kiwi"),
        ("classes", ("map",), "not trained with the condition semantic_map"),
        ("holes", ("map",), "not trained with the condition semantic_map"),
        ("unguided", ("map",), "fill holes"),
    ],
)
def test_mask_to_image_bad_input(paint, leaves_nothing, model, given, said):
    refused(paint("mask-to-image", model, *given), said)


@pytest.mark.parametrize("out", ["text.png/below/painted.png", "/proc/nope/painted.png"])
def test_a_place_that_cannot_be_written(paint, place, leaves_nothing, out):
    for verb, files in (("inpaint", ("image", "mask")), ("mask-to-image", ("map",))):
        refused(paint(verb, "all", *files, "--out", str(place / out)), "cannot")


def test_a_folder_in_the_place_of_the_picture(paint, place):
    (place / "pictures.png").mkdir()
    before = tiny.tree(place)
    for verb, files in (("inpaint", ("image", "mask")), ("mask-to-image", ("map",))):
        refused(paint(verb, "all", *files, "--out", str(place / "pictures.png")), "it is a folder")
        refused(paint(verb, "all", *files, "--out", str(place / "picture.jpg")), "must end in .png")
    assert tiny.tree(place) == before


def test_a_model_that_always_saw_a_known_part_cannot_sample(paint, place, leaves_nothing):
    refused(paint("sample", "holes", "--out", str(place / "samples")), "latentflow inpaint")
    refused(paint("sample", "unguided", "--out", str(place / "samples")), "latentflow inpaint")


def test_an_input_is_never_overwritten(paint, place):
    before = tiny.tree(place)
    refused(paint("inpaint", "all", "image", "mask", "--out", str(place / "image.png")), "would be lost")
    refused(paint("mask-to-image", "all", "map", "--out", str(place / "map.png")), "would be lost")
    assert tiny.tree(place) == before


def test_a_seed_below_zero_is_refused(paint, place):
    before = tiny.tree(place)
    refused(paint("inpaint", "all", "image", "mask", "--out", str(place / "filled.png"), "--seed", "-1"), "--seed -1")
    assert tiny.tree(place) == before
