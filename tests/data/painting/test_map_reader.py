import io
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.data.items import UNLABELLED
from latentflow.data.painting.map_reader import read_map
from latentflow.data.painting.semantic_maps import UNLABELLED_COLOUR, MapClasses, colour_map, default_palette
from latentflow.data.pictures.orientation import Photo
from latentflow.errors import DataError

TOWN = MapClasses(("sky", "road", "tree", "car"), ((128, 128, 128), (128, 64, 128), (128, 128, 0), (64, 0, 128)))
PLAIN = MapClasses(TOWN.names)
GRAY = MapClasses(("back", "edge", "thing"), ((0, 0, 0), (128, 128, 128), (255, 255, 255)))
DARK = MapClasses(("thing", "back"), ((255, 0, 0), (0, 0, 0)))
PAIR = MapClasses(("back", "thing"))


def a_map(height: int = 9, width: int = 7, seed: int = 0, unlabelled: bool = True, num: int = 4) -> np.ndarray:
    semantic_map = np.random.default_rng(seed).integers(0, num, (height, width), np.uint8)
    if unlabelled:
        semantic_map[2, 3] = UNLABELLED
    return semantic_map


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(message: str):
    return pytest.raises(DataError, match=f"^{re.escape(message)}$")


def refusal(file: bytes | Image.Image, classes: MapClasses = TOWN, photo: Photo | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_map(file, classes, name="m", photo=photo)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def followed(remedy: str, file: bytes | Image.Image) -> bytes:
    """What a message advises, as a PNG file."""
    image = file if isinstance(file, Image.Image) else Image.open(io.BytesIO(file))
    return encoded(eval(remedy, {"map": image, "Image": Image, "numpy": np}))


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, as programs that make files small write it; Pillow cannot."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    planes = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = [b"\0" + np.packbits(row.reshape(-1)).tobytes() for row in planes]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def with_palette(places: np.ndarray, colours: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(places.astype(np.uint8)).convert("P")
    image.putdata(places.reshape(-1).tolist())
    image.putpalette([value for colour in colours for value in colour])
    return image


def reordered(pixels: np.ndarray, extra: int = 0) -> Image.Image:
    """RGB [H, W, 3] with a palette of its colours, the commonest last, behind `extra` others that are not used."""
    packed = pixels.astype(np.int64) @ np.array([65536, 256, 1])
    colours, places, counts = np.unique(packed, return_inverse=True, return_counts=True)
    order = counts.argsort(kind="stable")
    palette = [(7, 9, 11)] * extra + [(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in colours[order]]
    return with_palette(order.argsort()[places].reshape(pixels.shape[:2]) + extra, palette)


# Colours, in whatever they are packed

SEEN = colour_map(a_map(), TOWN.palette)
CONTAINERS = {
    "RGB PNG": encoded(Image.fromarray(SEEN)),
    "RGBA PNG": encoded(Image.fromarray(SEEN).convert("RGBA")),
    "RGB TIFF": encoded(Image.fromarray(SEEN), "TIFF"),
    "compressed TIFF": encoded(Image.fromarray(SEEN), "TIFF", compression="tiff_lzw"),
    "BMP": encoded(Image.fromarray(SEEN), "BMP"),
    "PPM": encoded(Image.fromarray(SEEN), "PPM"),
    "WebP": encoded(Image.fromarray(SEEN), "WEBP", lossless=True),
    "palette in another order": encoded(reordered(SEEN)),
    "palette of 4 bits": encoded(reordered(SEEN), bits=4),
    "unused colours in front": encoded(reordered(SEEN, extra=3)),
    "unused colours in front, all places beyond the classes": encoded(reordered(SEEN, extra=100)),
    "an unused transparent place": encoded(reordered(SEEN, extra=1), transparency=0),
    "all places opaque": encoded(reordered(SEEN), transparency=b"\xff" * 5),
    "quantised": encoded(Image.fromarray(SEEN).quantize(16)),
    "adaptive palette": encoded(Image.fromarray(SEEN).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)),
    "GIF": encoded(reordered(SEEN), "GIF"),
    "palette BMP": encoded(reordered(SEEN), "BMP"),
    "palette TIFF": encoded(reordered(SEEN), "TIFF"),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_same_colours_are_the_same_map_in_any_container(container):
    read = read_map(CONTAINERS[container], TOWN)
    assert read.dtype == np.uint8 and np.array_equal(read, a_map())


def test_the_classes_own_palette_agrees_with_its_places():
    semantic_map = a_map(unlabelled=False)
    assert np.array_equal(read_map(with_palette(semantic_map, list(TOWN.palette)), TOWN), semantic_map)


def test_colours_of_classes_that_have_none_are_those_of_pascal_voc(caplog, monkeypatch):
    monkeypatch.setattr("latentflow.console._printed", set())
    seen = colour_map(a_map(unlabelled=False), PLAIN.palette)
    assert np.array_equal(read_map(encoded(reordered(seen)), PLAIN), a_map(unlabelled=False))
    assert "the colours of the classes in another order, so it is read by colour" in caplog.text


def test_every_colour_of_a_full_palette_is_found():
    classes = MapClasses(tuple(map(str, range(255))))
    semantic_map = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(read_map(Image.fromarray(colour_map(semantic_map, classes.palette)), classes), semantic_map)


def test_class_of_the_unlabelled_colour_is_a_class():
    classes = MapClasses(("a", "b"), ((0, 0, 0), UNLABELLED_COLOUR))
    assert read_map(Image.new("RGB", (2, 1), UNLABELLED_COLOUR), classes).tolist() == [[1, 1]]


# Numbers, in whatever they are packed

NUMBERS = a_map()
GRAYS = {
    "PNG": encoded(Image.fromarray(NUMBERS)),
    "gray with alpha": encoded(Image.fromarray(NUMBERS).convert("LA")),
    "16 bits": encoded(Image.fromarray(NUMBERS.astype(np.uint16))),
    "16 bits, TIFF": encoded(Image.fromarray(NUMBERS.astype(np.uint16)), "TIFF"),
    "32 bits, TIFF": encoded(Image.fromarray(NUMBERS.astype(np.int32)), "TIFF"),
    "TIFF": encoded(Image.fromarray(NUMBERS), "TIFF", compression="tiff_adobe_deflate"),
    "BMP": encoded(Image.fromarray(NUMBERS), "BMP"),
    "PGM": encoded(Image.fromarray(NUMBERS), "PPM"),
    "GIF": encoded(Image.fromarray(NUMBERS), "GIF"),
    "WebP": encoded(Image.fromarray(NUMBERS).convert("RGB"), "WEBP", lossless=True),
    "RGB, as OpenCV saves what it read": encoded(Image.fromarray(NUMBERS).convert("RGB")),
    "gray ramp as palette": encoded(Image.fromarray(NUMBERS).convert("P")),
    "grays as palette in another order": encoded(reordered(NUMBERS[..., None].repeat(3, 2))),
    "palette of Pascal VOC": encoded(with_palette(NUMBERS, [*default_palette(255), UNLABELLED_COLOUR])),
    "foreign palette": encoded(with_palette(NUMBERS, [(index, 200, 255 - index) for index in range(256)])),
    "foreign palette with a transparent place": encoded(
        with_palette(NUMBERS, [(index, 200, 255 - index) for index in range(256)]), transparency=0
    ),
}


@pytest.mark.parametrize("container", GRAYS)
@pytest.mark.parametrize("classes", [TOWN, PLAIN], ids=["own colours", "no colours"])
def test_same_numbers_are_the_same_map_in_any_container(container, classes):
    read = read_map(GRAYS[container], classes)
    assert read.dtype == np.uint8 and np.array_equal(read, NUMBERS)


def test_paths_and_pictures_in_memory(tmp_path):
    (tmp_path / "map.png").write_bytes(GRAYS["PNG"])
    for file in (tmp_path / "map.png", str(tmp_path / "map.png"), Image.fromarray(NUMBERS)):
        assert np.array_equal(read_map(file, TOWN), NUMBERS)


@pytest.mark.parametrize("bits, most", [(1, 2), (2, 4), (4, 16)])
def test_few_bits_are_not_stretched(bits, most):
    values = np.arange(5 * 7).reshape(5, 7) % most
    classes = MapClasses(tuple(map(str, range(most))))
    assert read_map(grey_png(values, bits), classes).tolist() == values.tolist()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_places_in_a_palette_are_classes_where_its_colours_are_not(bits):
    semantic_map = a_map(unlabelled=False)
    image = with_palette(semantic_map, [(7, 7, 7)] * 3 + [(9, 9, 9)])
    for classes in (TOWN, PLAIN):
        assert np.array_equal(read_map(encoded(image, bits=bits), classes), semantic_map)


def test_a_foreign_palette_is_noticed_once(caplog, monkeypatch):
    monkeypatch.setattr("latentflow.console._printed", set())
    for _ in range(2):
        read_map(GRAYS["foreign palette"], TOWN, name="m")
    assert [record.message for record in caplog.records] == [
        "m: its palette has other colours than the classes, so it is read by place, like other such maps: place 0 "
        "of the palette is class 0, and so on"
    ]
    caplog.clear()
    read_map(GRAYS["foreign palette"], PLAIN)
    assert not caplog.records


# Gray colours


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(colour_map(a_map(num=3, unlabelled=False), GRAY.palette)),
        Image.fromarray(colour_map(a_map(num=3, unlabelled=False), GRAY.palette)).convert("L"),
        reordered(colour_map(a_map(num=3, unlabelled=False), GRAY.palette)),
        Image.fromarray(a_map(num=3, unlabelled=False)),
    ],
    ids=["RGB", "gray", "palette", "numbers"],
)
def test_gray_colours_of_classes(image):
    assert np.array_equal(read_map(encoded(image), GRAY), a_map(num=3, unlabelled=False))


def test_white_is_a_class_where_a_class_is_white():
    assert read_map(Image.fromarray(np.array([[0, 255]], np.uint8)), GRAY).tolist() == [[0, 2]]
    assert read_map(Image.fromarray(np.array([[1, 255]], np.uint8)), GRAY).tolist() == [[1, UNLABELLED]]
    assert read_map(encoded(Image.fromarray(np.array([[False, True]]))), GRAY).tolist() == [[0, 2]]


def test_gray_that_may_be_a_number_or_a_colour_is_refused_with_remedies_that_work():
    image = Image.fromarray(np.zeros((2, 3), np.uint8))
    message = refusal(image, DARK)
    assert message.startswith("m: gray 0 may be class 0 'thing' by its number or class 1 'back' by its colour; ")
    colours, numbers = re.search(r"in Pillow (map.*?); if the numbers do, (.*)$", message).groups()
    assert read_map(followed(colours, image), DARK).tolist() == [[1] * 3] * 2
    assert read_map(followed(numbers, image), DARK).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_black_and_white_of_two_classes_is_refused_with_a_remedy_that_works(mode):
    mask = a_map(num=2, unlabelled=False)
    image = Image.fromarray(mask * 255).convert(mode)
    message = refusal(image, PAIR)
    assert message.startswith("m: 255 means unlabelled, and of the classes it has no other than 0; if white is class 1")
    remedy = re.search(r"in Pillow (map.*?\)); if", message)[1]
    assert np.array_equal(read_map(followed(remedy, image), PAIR), mask)
    for clear in (Image.fromarray(mask.astype(bool)), with_palette(mask, [(0, 0, 0), (255, 255, 255)])):
        assert np.array_equal(read_map(encoded(clear), PAIR), mask)


def test_white_in_one_bit_is_refused_where_it_may_be_unlabelled():
    mask = a_map(num=2, unlabelled=False)
    image = Image.fromarray(mask.astype(bool))
    message = refusal(image)
    as_class, as_unlabelled = re.search(r"in Pillow (map.*?) for class 1, (map.*?) for 255$", message).groups()
    assert np.array_equal(read_map(followed(as_class, image), TOWN), mask)
    assert np.array_equal(read_map(followed(as_unlabelled, image), TOWN), np.where(mask, UNLABELLED, 0))


def test_white_in_a_palette_is_refused_where_it_may_be_unlabelled():
    mask = a_map(num=2, unlabelled=False)
    image = with_palette(mask, [(0, 0, 0), (255, 255, 255)])
    message = refusal(image)
    places, grays = re.search(r"in Pillow (Image.*?), or the grays, (.*)$", message).groups()
    assert np.array_equal(read_map(followed(places, image), TOWN), mask)
    assert np.array_equal(read_map(followed(grays, image), TOWN), np.where(mask, UNLABELLED, 0))


# A palette that is neither


def test_a_palette_with_some_colours_of_classes_is_refused_with_remedies_that_work():
    semantic_map = a_map(unlabelled=False)
    foreign = [(128, 64, 128), (0, 0, 142), (70, 70, 70), (107, 142, 35)]  # class 1's colour at place 0
    image = with_palette(semantic_map, foreign)
    message = refusal(image)
    assert message.startswith(
        "m: its palette has (128, 64, 128) at place 0, the colour of class 1 'road', but also (0, 0, 142), the colour "
        "of no class; if the places are the classes, save them as gray, in Pillow "
    )
    places, colours = re.search(r"in Pillow (Image.*?); if the colours are, save (map.*?) and", message).groups()
    assert np.array_equal(read_map(followed(places, image), TOWN), semantic_map)
    assert "belongs to no class; the nearest is" in refusal(followed(colours, image))


def test_a_smeared_palette_is_refused_like_smeared_colours():
    image = reordered(SEEN, extra=9)
    palette = image.getpalette()
    palette[30:33] = [125, 66, 127]
    image.putpalette(palette)
    assert "the colour (125, 66, 127) at column" in refusal(image)


def test_a_palette_whose_classes_stand_at_their_places_is_read_by_place():
    semantic_map = a_map(unlabelled=False)
    image = with_palette(semantic_map, [TOWN.palette[0], (0, 0, 142), (70, 70, 70), TOWN.palette[3]])
    assert np.array_equal(read_map(image, TOWN), semantic_map)


def test_places_beyond_the_classes_are_refused():
    image = with_palette(a_map(unlabelled=False) + 5, [(index, 200, 0) for index in range(9)])
    assert re.fullmatch(r"m: class 5 in \d+ pixels \(and 3 more unknown classes\), but there are 4 .*", refusal(image))


# Orientation


def test_exif_rotation_is_applied_as_to_images():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    turned = np.rot90(a_map(), -1)
    assert np.array_equal(read_map(encoded(Image.fromarray(a_map()), exif=exif), TOWN), turned)
    assert np.array_equal(read_map(encoded(Image.fromarray(SEEN), exif=exif), TOWN, photo=Photo(7, 9, 6)), turned)


def test_a_map_of_stored_pixels_is_turned_with_its_photo():
    assert np.array_equal(read_map(GRAYS["PNG"], TOWN, photo=Photo(7, 9, 6)), np.rot90(a_map(), -1))
    assert np.array_equal(read_map(GRAYS["PNG"], TOWN, photo=Photo(9, 7, 6)), a_map())


# Refusing what is wrong


@pytest.mark.parametrize("content", [b"", b"no image", encoded(Image.fromarray(a_map(64, 64)))[:100]])
def test_file_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "map.png").write_bytes(content)
    with pytest.raises(DataError, match=r"map.png: it cannot be read \(.*\); save the map again, as a PNG$") as caught:
        read_map(tmp_path / "map.png", TOWN)
    assert "\n" not in str(caught.value)


def test_file_that_is_missing_is_named(tmp_path):
    file = tmp_path / "map.png"
    with refused(f"{file}: it cannot be read (No such file or directory); save the map again, as a PNG"):
        read_map(file, TOWN)
    with pytest.raises(DataError, match=r"^the semantic map: it cannot be read \(its content is no image"):
        read_map(b"no image", TOWN)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_unknown_class_is_refused(dtype):
    semantic_map = a_map().astype(dtype)
    semantic_map[4, :5] = 37
    with refused("m.png: class 37 in 5 pixels, but there are 4 classes, 0 to 3; 255 means unlabelled"):
        read_map(encoded(Image.fromarray(semantic_map)), TOWN, name="m.png")
    semantic_map[5, 5] = 4
    message = "class 4 in 1 pixel (and 1 more unknown classes), but there are 4 classes, 0 to 3; 255 means unlabelled"
    with refused(f"m.png: {message}"):
        read_map(encoded(Image.fromarray(semantic_map)), TOWN, name="m.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_maps_that_count_otherwise_are_refused_with_remedies_that_work(dtype):
    semantic_map = a_map(unlabelled=False)
    from_one, in_steps = semantic_map + 1, semantic_map * 20
    from_one[0, 0] = 0  # often what says nothing there
    expected = semantic_map.copy()
    expected[0, 0] = UNLABELLED
    for values, result in ((from_one, expected), (in_steps, semantic_map)):
        image = Image.fromarray(values.astype(dtype))
        message = refusal(image)
        assert "255 means unlabelled; if it counts " in message
        assert np.array_equal(read_map(followed(message.partition("in Pillow ")[2], image), TOWN), result)


def test_class_beyond_a_byte_does_not_wrap_around():
    with refused("the semantic map: class 258 in 6 pixels, but there are 4 classes, 0 to 3; 255 means unlabelled"):
        read_map(Image.fromarray(np.full((2, 3), 258, np.uint16)), TOWN)


def test_bytes_spread_over_16_bits_are_refused_with_a_remedy_that_works():
    image = Image.fromarray(a_map(unlabelled=False).astype(np.uint16) * 257)
    message = refusal(encoded(image))
    assert message.startswith("m: its values are multiples of 257, up to 771, as where 8 bits were spread over 16")
    remedy = message.partition("in Pillow ")[2]
    assert np.array_equal(read_map(followed(remedy, image), TOWN), a_map(unlabelled=False))


def test_unknown_colour_is_refused_with_the_nearest_class():
    pixels = colour_map(a_map(unlabelled=False), TOWN.palette)
    pixels[6, 2] = (126, 66, 130)
    message = (
        "the colour (126, 66, 130) at column 2, row 6 belongs to no class; "
        "the nearest is (128, 64, 128), class 1 'road'"
    )
    with refused(f"m.png: {message}"):
        read_map(encoded(Image.fromarray(pixels)), TOWN, name="m.png")


def test_smeared_colours_are_refused():
    resized = Image.fromarray(SEEN).resize((50, 50), Image.Resampling.BICUBIC)
    assert re.search(r"\d+ such colours: was it resized or compressed lossily\?$", refusal(encoded(resized)))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_formats_with_loss_are_refused(kind, mode):
    with io.BytesIO() as probe:
        try:
            Image.new("RGB", (8, 8)).save(probe, kind)
        except (KeyError, OSError):
            pytest.skip(f"this Pillow does not write {kind}")
    message = refusal(encoded(Image.fromarray(a_map(32, 32, unlabelled=False)).convert(mode), kind))
    kind = "lossy WebP" if kind == "WEBP" else kind
    assert message == f"m: {kind} compression blurs class boundaries; save the map as a PNG"


def test_lossy_webp_behind_other_chunks_is_refused():
    image = Image.fromarray(a_map(32, 32, unlabelled=False)).convert("RGB")
    content = encoded(image, "WEBP", lossless=False, exif=b"Exif\0\0odd", icc_profile=b"any")
    assert b"VP8X" in content[:32] and "lossy WebP" in refusal(content)


def test_of_several_pictures_the_first_is_read():
    pages = [Image.fromarray(a_map(seed=seed)) for seed in range(3)]
    content = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(read_map(content, TOWN), a_map())


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_refused(mode):
    image = Image.fromarray(colour_map(a_map(unlabelled=False), TOWN.palette)).convert(mode)
    image.putalpha(Image.fromarray(np.where(np.arange(63).reshape(9, 7) < 3, 254, 255).astype(np.uint8)))
    remedy = 'map.convert("RGBA").convert("RGB")'
    assert refusal(encoded(image)) == f"m: 3 pixels not opaque; save the map without alpha, in Pillow {remedy}"


def test_transparent_colours_are_refused_with_a_remedy_that_works():
    file = encoded(reordered(SEEN), transparency=0)
    message = refusal(file)
    assert re.match(r"m: \d+ pixels? not opaque; ", message)
    assert np.array_equal(read_map(followed(message.partition("in Pillow ")[2], file), TOWN), a_map())
    assert "not opaque" in refusal(encoded(Image.fromarray(SEEN), transparency=TOWN.palette[1]))


@pytest.mark.parametrize("mode", ["F", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_refused_with_a_remedy_that_works(mode):
    image = Image.fromarray(a_map(num=2, unlabelled=False)).convert("RGB" if mode in ("YCbCr", "HSV") else "L")
    image = image.convert(mode)
    message = refusal(image)
    assert message.startswith(f"m: pixels of mode {mode} are neither class indices nor colours; save it with 8 bits")
    assert np.array_equal(
        read_map(followed(message.partition("in Pillow ")[2], image), TOWN), a_map(num=2, unlabelled=False)
    )


CAMVID = Path(__file__).parents[4] / "shared" / "data" / "camvid.zip"


@pytest.mark.skipif(not CAMVID.is_file(), reason="the CamVid pack is not there")
def test_a_map_of_camvid():
    with zipfile.ZipFile(CAMVID) as archive:
        classes = MapClasses.parse(archive.read("classes.json"), "classes.json")
        semantic_map = read_map(archive.read("masks/train/0001TP_006690.png"), classes)
    assert len(classes) == 12 and classes.names[3] == "road"
    assert semantic_map.shape == (360, 480)
    assert np.unique(semantic_map).tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 11]
