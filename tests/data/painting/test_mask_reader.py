import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from latentflow.data.painting.mask_reader import read_mask
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.painting.masks import draw_mask
from latentflow.data.pictures.orientation import Photo
from latentflow.errors import DataError

HOLE = np.zeros((6, 10), np.uint8)
HOLE[1:4, 2:9] = 1


def save(path: Path, image: Image.Image | np.ndarray, **options) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def palette(colours: list[int], **info) -> Image.Image:
    image = Image.fromarray(HOLE).convert("P")
    image.putdata(HOLE.ravel().tolist())
    image.putpalette(colours)
    image.info.update(info)
    return image


def refusal(mask: object, photo: Photo | None = None) -> str:
    """The message with which a mask is refused, on one line."""
    with pytest.raises(DataError) as caught:
        read_mask(mask, photo)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def followed(remedy: str, mask: Path | Image.Image | np.ndarray) -> np.ndarray:
    """The mask that a message's advice makes, through a file."""
    image = mask if isinstance(mask, np.ndarray | Image.Image) else Image.open(mask)
    made = eval(remedy, {"mask": image, "Image": Image, "numpy": np})
    path = Path(os.environ["PYTEST_CURRENT_TEST"].split("::")[0]).name  # a name in the current folder
    made.save(f"{path}.png")
    return read_mask(f"{path}.png")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("latentflow.console._printed", set())


# Black and white

ACCEPTED = {
    "1 bit": Image.fromarray(HOLE.astype(bool)),
    "gray": Image.fromarray(HOLE * 255),
    "gray 0 and 1": Image.fromarray(HOLE),
    "16 bits": Image.fromarray(HOLE.astype(np.uint16) * 65535),
    "16 bits, 0 and 255": Image.fromarray(HOLE.astype(np.uint16) * 255),
    "16 bits, 0 and 1": Image.fromarray(HOLE.astype(np.uint16)),
    "palette": palette([0, 0, 0, 255, 255, 255]),
    "palette, white first": palette([255, 255, 255, 0, 0, 0]),
    "palette with an opaque entry": palette([0, 0, 0, 255, 255, 255], transparency=b"\xff\xff"),
    "palette with an unused clear entry": palette([0, 0, 0, 255, 255, 255, 9, 9, 9], transparency=2),
    "RGB": Image.fromarray(HOLE * 255).convert("RGB"),
    "RGB 0 and 1": Image.fromarray(HOLE).convert("RGB"),
    "RGBA": Image.fromarray(HOLE * 255).convert("RGBA"),
    "gray with alpha": Image.fromarray(HOLE * 255).convert("LA"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_black_and_white_is_read_in_any_mode(tmp_path, name):
    expected = 1 - HOLE if "white first" in name else HOLE
    path = save(tmp_path / "mask.png", ACCEPTED[name])
    for file in (path, str(path), ACCEPTED[name], Image.open(path)):
        mask = read_mask(file, Photo(6, 10))
        assert mask.dtype == np.uint8 and np.array_equal(mask, expected)
    mask[:] = 0  # writable


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX", "PA", "RGBa"])
def test_black_and_white_is_read_in_rare_modes(mode):
    if mode == "PA":
        image = ACCEPTED["palette"].convert("PA")
    else:
        image = (ACCEPTED["RGBA"] if mode == "RGBa" else ACCEPTED["RGB"]).convert(mode)
    assert np.array_equal(read_mask(image), HOLE)


@pytest.mark.parametrize("values", [HOLE.astype(np.float32), HOLE * np.float32(255), HOLE.astype(np.int32) * 65535])
def test_deep_tiffs_are_read(tmp_path, values):
    assert np.array_equal(read_mask(save(tmp_path / "mask.tiff", values)), HOLE)


@pytest.mark.parametrize("suffix", ["bmp", "gif", "tif", "webp", "pgm", "tga", "jp2", "jpg"])
def test_formats(tmp_path, suffix):
    hole = HOLE.repeat(16, 0).repeat(16, 1)
    options = {"quality": 90} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    assert np.array_equal(read_mask(save(tmp_path / f"mask.{suffix}", hole * 255, **options)), hole)


def test_drawn_masks_survive_a_file(tmp_path):
    for seed in range(5):
        mask = draw_mask(MaskRules(), 40, 24, seed)
        path = save(tmp_path / f"{seed}.png", mask * 255)
        assert np.array_equal(read_mask(path, Photo(*mask.shape)), mask)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    path = save(tmp_path / "mask.png", HOLE * 255, exif=exif)
    assert np.array_equal(read_mask(path), np.rot90(HOLE, -1))
    for photo in (Photo(10, 6), Photo(10, 6, 6)):
        assert np.array_equal(read_mask(path, photo), np.rot90(HOLE, -1))


def test_masks_of_stored_pixels_are_turned_with_their_photo(tmp_path):
    path = save(tmp_path / "mask.png", HOLE * 255)
    for mask in (path, HOLE, Image.open(path)):
        assert np.array_equal(read_mask(mask, Photo(10, 6, 8)), np.rot90(HOLE))
    assert "may match its image as shown or as stored" in refusal(path, Photo(6, 10, 3))


# Arrays and tensors


@pytest.mark.parametrize(
    "mask",
    [
        HOLE.astype(bool),
        HOLE,
        HOLE * 255,
        HOLE.astype(np.int64),
        HOLE.astype(np.int64) * 255,
        HOLE.astype(np.uint16) * 65535,
        HOLE.astype(np.float32),
        HOLE.astype(np.float64) * 255,
        HOLE[None],
        HOLE[..., None],
        HOLE[None, None],
        (HOLE * 255)[..., None].repeat(3, 2),
        torch.from_numpy(HOLE),
        torch.from_numpy(HOLE).bool(),
        torch.from_numpy(HOLE)[None, None].bfloat16(),
        torch.from_numpy(HOLE).float().requires_grad_(),
    ],
)
def test_arrays_and_tensors(mask):
    read = read_mask(mask, Photo(6, 10))
    assert read.dtype == np.uint8 and np.array_equal(read, HOLE)


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.where(HOLE, np.nan, 0.0), "the mask has 21 non-finite pixels; give 0 to 1"),
        (HOLE.astype(float) - 1, "the mask has the value -1; a mask is 0 to 1, 0 to 255 or 0 to 65535"),
        (HOLE.astype(np.int32) * 70000, "the mask has the value 70000; a mask is 0 to 1, 0 to 255 or 0 to 65535"),
        (HOLE * 1j, "the mask is an array of complex128; give a file, a Pillow image, or an array of numbers"),
        (HOLE.tolist(), "the mask is of the type list; give a file, a Pillow image, or an array of numbers"),
        (None, "the mask is of the type NoneType; give a file, a Pillow image, or an array of numbers"),
        (np.zeros((6, 10, 4), np.uint8), "the mask is an array of shape [6, 10, 4]; give [height, width]"),
        (np.zeros(6), "the mask is an array of shape [6]; give [height, width]"),
        (np.zeros((0, 6)), "the mask is an array of shape [0, 6]; give [height, width]"),
        (HOLE * 0, "the mask is all black, so nothing would be repainted; make white what is to be repainted"),
    ],
)
def test_arrays_that_are_no_masks(mask, message):
    assert refusal(mask) == message


# Gray


def test_a_soft_mask_means_the_same_in_every_form(tmp_path, caplog):
    drawn = Image.new("L", (60, 40))
    ImageDraw.Draw(drawn).rectangle((10, 10, 40, 30), fill=255)
    soft = np.asarray(drawn.filter(ImageFilter.GaussianBlur(6)))
    expected = soft >= 128
    deep = soft.astype(np.uint16) * 257
    forms = [soft, soft / 255, (soft / 255).astype(np.float32), deep, torch.from_numpy(soft / 255)]
    forms += [Image.fromarray(soft), Image.fromarray(soft).convert("RGB"), Image.fromarray((soft / 255).astype("f4"))]
    forms += [save(tmp_path / "8.png", soft), save(tmp_path / "16.png", deep)]
    forms += [save(tmp_path / "float.tif", soft / np.float32(255))]
    for form in forms:
        assert np.array_equal(read_mask(form), expected)
    assert [record.message for record in caplog.records] == [
        "the mask has gray pixels, as soft brushes and JPEG leave them: those of at least half white are repainted, "
        "the others preserved; the same goes for all masks"
    ]


def test_near_black_and_near_white(caplog):
    assert np.array_equal(read_mask(HOLE * 249 + 5), HOLE)
    assert np.array_equal(read_mask(HOLE * 128 + 127), HOLE)


ONE_SIDED = [(HOLE * 3, 0), (HOLE.astype(np.uint16) * 4095, 0), (HOLE * 55 + 200, 200), (HOLE + 1, 1)]


@pytest.mark.parametrize(
    "values, least, form",
    [
        (values, least, form)
        for values, least in [*ONE_SIDED, (HOLE.astype(np.float32) * 0.2, 0)]
        for form in ("array", "file", "RGB")
        if form != "RGB" or values.dtype == np.uint8
    ],
)
def test_masks_on_one_side_of_half_are_refused_with_a_remedy_that_works(tmp_path, values, least, form):
    image = Image.fromarray(values)
    mask = values if form == "array" else image if form == "file" else image.convert("RGB")
    message = refusal(mask)
    assert "than half white" in message and f" > {least}" in message
    assert np.array_equal(followed(message.partition("in Pillow ")[2], mask), HOLE)


def test_masks_with_nothing_to_paint_are_refused(tmp_path):
    path = save(tmp_path / "mask.png", HOLE * 0)
    assert refusal(path) == (
        f"the mask {path} is all black, so nothing would be repainted; make white what is to be repainted"
    )
    assert refusal(np.full((6, 10), 77)).endswith("77 to 77 of 255, and white is repainted; make it black and white")


@pytest.mark.parametrize("white", [1, 255])
def test_masks_that_keep_nothing_are_refused(tmp_path, white):
    path = save(tmp_path / "mask.png", np.full((6, 10), white, np.uint8))
    message = refusal(path)
    assert message.startswith(f"the mask {path} is all white, so nothing of the image would be kept; make black")
    assert message.endswith("latentflow sample")


# Colours and transparency


def drawn_in(hole: tuple[int, ...], background: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (160, 96), background)
    ImageDraw.Draw(image).rectangle((32, 16, 95, 63), fill=hole)
    return image


COLOURED = {
    "red on black": drawn_in((255, 0, 0), (0, 0, 0)),
    "dark blue on black": drawn_in((0, 0, 40), (0, 0, 0)),
    "green on white": drawn_in((0, 255, 0), (255, 255, 255)),
    "gray on magenta": drawn_in((90, 90, 90), (255, 0, 255)),
    "white on green": drawn_in((255, 255, 255), (0, 128, 0)),
    "Pascal VOC": drawn_in((128, 0, 0), (0, 0, 0)).quantize(2),
    "RGBA": drawn_in((255, 0, 0, 255), (0, 0, 0, 255), "RGBA"),
    "palette with a clear entry that is not used": drawn_in((255, 0, 0), (0, 0, 0)).quantize(2),
}
COLOURED["palette with a clear entry that is not used"].info["transparency"] = 7


@pytest.mark.parametrize("name", COLOURED)
@pytest.mark.parametrize("kind", ["png", "jpg", "in memory"])
def test_coloured_masks_are_refused_with_a_remedy_that_works(tmp_path, name, kind):
    image = COLOURED[name]
    expected = np.asarray(drawn_in((1,), (0,), "L"))
    if kind == "jpg" and name != "dark blue on black":
        mask = save(tmp_path / "mask.jpg", image.convert("RGB"), quality=90)
    else:
        mask = image if kind == "in memory" else save(tmp_path / "mask.png", image)
    message = refusal(mask)
    assert " coloured pixels, such as RGB (" in message and "a mask is black (known) and white (repainted" in message
    made = followed(re.search(r"in Pillow (Image.*)$", message)[1], mask)
    assert (made != expected).mean() <= (0.02 if kind == "jpg" else 0)  # JPEG moves edges of colour


def test_several_classes_in_colours():
    image = drawn_in((128, 0, 0), (0, 0, 0))
    ImageDraw.Draw(image).rectangle((120, 70, 140, 90), fill=(0, 64, 0))
    message = refusal(image)
    made = followed(message.partition("in Pillow ")[2], image)
    assert np.array_equal(made, np.asarray(image).any(2))


def test_a_colour_on_a_photograph_is_refused_with_a_remedy_that_works(tmp_path):
    photo = np.random.default_rng(0).integers(0, 250, (96, 160, 3), np.uint8)
    photo[0, :3] = 0
    expected = np.asarray(drawn_in((1,), (0,), "L"))
    photo[expected == 1] = (255, 0, 255)
    for share in (expected == 1, (expected == 1) & (np.arange(160) < 40)):  # 20 %, 3 %
        marked = np.where(share[..., None], np.uint8([255, 0, 255]), np.where(photo == 255, 0, photo))
        path = save(tmp_path / "mask.png", marked)
        message = refusal(path)
        assert "to repaint where it is (255, 0, 255), in Pillow" in message
        assert np.array_equal(followed(message.partition("in Pillow ")[2], path), share)


def test_photographs_are_distinguished_from_masks(tmp_path):
    path = save(tmp_path / "photo.png", np.random.default_rng(0).integers(0, 256, (96, 160, 3), np.uint8))
    assert refusal(path).endswith("it looks like a photograph; give the image first and the mask second")


def test_coloured_arrays():
    mask = np.asarray(COLOURED["red on black"])
    message = refusal(mask)
    assert np.array_equal(followed(message.partition("in Pillow ")[2], mask), mask[..., 0] > 0)


def erased() -> dict[str, Image.Image]:
    """Masks that are given by their alpha, mostly."""
    return {
        "a hole erased from black": drawn_in((0, 0, 0, 0), (0, 0, 0, 255), "RGBA"),
        "white strokes on nothing": drawn_in((255, 255, 255, 255), (0, 0, 0, 0), "RGBA"),
        "gray with alpha": drawn_in((255, 255), (0, 0), "LA"),
        "soft": drawn_in((255, 0, 0, 200), (0, 0, 0, 0), "RGBA"),
        "palette": Image.fromarray(np.asarray(drawn_in((1,), (0,), "L"))).convert("P"),
    }


@pytest.mark.parametrize("name", erased())
def test_transparency_is_refused_with_remedies_that_work(tmp_path, name):
    mask, hole = erased()[name], np.asarray(drawn_in((1,), (0,), "L"))
    if name == "palette":
        mask.putpalette([0, 0, 0, 255, 255, 255])
    mask = save(tmp_path / "mask.png", mask, **({"transparency": 0} if name == "palette" else {}))
    message = refusal(mask)
    opaque, clear = re.search(r"in Pillow, (mask.*?) if what is opaque is repainted, (mask.*?) if", message).groups()
    drawn = 1 - hole if name == "a hole erased from black" else hole
    assert np.array_equal(followed(opaque, mask), drawn) and np.array_equal(followed(clear, mask), 1 - drawn)
    if name in ("white strokes on nothing", "gray with alpha"):
        assert np.array_equal(followed(re.search(r", or (mask.*) if its colours", message)[1], mask), hole)


@pytest.mark.parametrize("image", [palette([0, 0, 0, 255, 255, 255]), ACCEPTED["gray"]])
def test_a_transparent_colour_is_ambiguous(tmp_path, image):
    path = save(tmp_path / "mask.png", image, transparency=0)
    assert "transparent pixels, which may mean known or repainted" in refusal(path)


def test_a_transparent_deep_gray_is_refused_with_a_remedy_that_works(tmp_path):
    path = save(tmp_path / "mask.png", ACCEPTED["16 bits"], transparency=0)
    message = refusal(path)
    assert np.array_equal(followed(message.partition("in Pillow ")[2], path), HOLE)


# Other sizes


def test_other_sizes_are_refused_with_a_remedy_that_works(tmp_path):
    path = save(tmp_path / "mask.png", HOLE * 255)
    message = refusal(path, Photo(12, 20))
    assert message.startswith(f"the mask {path} has 10 x 6 pixels (width x height), its image 20 x 12: resize")
    made = followed(re.search(r"in Pillow (mask\..*\))$", message)[1], path)
    assert np.array_equal(made, HOLE.repeat(2, 0).repeat(2, 1))
    assert "resize" not in refusal(path, Photo(10, 6))  # height and width swapped


# Files that cannot be read


def test_missing_files_and_folders_are_named(tmp_path):
    path = tmp_path / "none.png"
    assert refusal(path) == f"cannot read the mask {path}: No such file or directory; give a whole PNG file"
    assert refusal(tmp_path).startswith(f"cannot read the mask {tmp_path}: ")


def test_files_that_are_no_images_are_refused(tmp_path):
    path = tmp_path / "mask.png"
    path.write_text("no image")
    reason = "its content is no image that Pillow can read"
    assert refusal(path) == f"cannot read the mask {path}: {reason}; give a whole PNG file"
    path.write_bytes(b"")
    assert refusal(path) == f"cannot read the mask {path}: it is empty (0 bytes); give a whole PNG file"


def test_truncated_files_are_refused(tmp_path):
    path = save(tmp_path / "mask.png", np.random.default_rng(0).integers(0, 2, (64, 64), np.uint8) * 255)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert re.fullmatch(rf"cannot read the mask {path}: .*truncated.*; give a whole PNG file", refusal(path))


def test_masks_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "mask.png", HOLE * 255)
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", "59")
    assert "its 60 pixels are more than 59; make it smaller, or allow more with LATENTFLOW" in refusal(path)


def test_images_without_pixels_are_refused():
    assert refusal(Image.new("L", (0, 4))) == "cannot read the mask in memory: it has no pixels; give a whole PNG file"


def test_of_several_pictures_the_first_is_read(tmp_path):
    other = Image.fromarray(255 - HOLE * 255)
    path = save(tmp_path / "mask.tif", ACCEPTED["gray"], save_all=True, append_images=[other])
    assert np.array_equal(read_mask(path), HOLE)
