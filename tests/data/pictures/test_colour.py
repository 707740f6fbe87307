"""Any picture as upright 8-bit sRGB: profiles, transparency, depth, and the modes of Pillow."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

from latentflow import console
from latentflow.data.pictures.colour import to_rgb
from latentflow.data.pictures.crop import center_crop
from latentflow.data.pictures.decode import BrokenImage, open_image
from latentflow.data.pictures.user_picture import read_picture
from latentflow.data.sources.images import open_images
from tests.profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    PROPHOTO,
    SRGB,
    cmyk_profile,
    gray_profile,
    linear_to_srgb,
    rgb_profile,
    rgb_table_profile,
    stored_in,
)

SPACES = {"p3": (DISPLAY_P3, 2.2), "adobe": (ADOBE_RGB, 2.2), "prophoto": (PROPHOTO, 1.8), "linear": (SRGB, 1.0)}
COLOURS = np.random.default_rng(0).integers(40, 216, (24, 24, 3), np.uint8)


@pytest.fixture(autouse=True)
def fresh_notices(monkeypatch):
    monkeypatch.setattr(console, "_printed", set())


@pytest.fixture
def notices():
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("latentflow").addHandler(handler)
    yield said
    logging.getLogger("latentflow").removeHandler(handler)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {kind}")
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(file: bytes, name: str = "a.png") -> np.ndarray:
    with open_image(file, name) as image:
        rgb = to_rgb(image, name)
    assert (rgb.mode, rgb.info) == ("RGB", {})
    return np.asarray(rgb)


def off(pixels: np.ndarray, expected) -> int:
    """The largest difference in levels."""
    return int(np.abs(pixels.astype(int) - np.asarray(expected, int)).max())


# Colour profiles


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP", "AVIF"])
def test_profiles_become_srgb(space, kind):
    """Against colours computed here, from the primaries and curves; 8 bits of a wide or linear space cost levels."""
    primaries, gamma = SPACES[space]
    seen = COLOURS if kind in ("PNG", "TIFF") else np.full_like(COLOURS, (70, 150, 110))
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    stored = Image.fromarray(stored_in(primaries, gamma, seen))
    file = encoded(stored, kind, icc_profile=rgb_profile(primaries, gamma), **options.get(kind, {}))
    assert off(np.asarray(stored), seen) > 15
    assert off(read(file), seen) <= 6
    assert np.abs(read(file) - seen.astype(int)).mean() < (1 if kind in ("PNG", "TIFF") else 4)


def test_profiles_count_alike_for_sets_and_for_single_pictures(tmp_path):
    stored = Image.fromarray(stored_in(DISPLAY_P3, 2.2, COLOURS))
    stored.save(tmp_path / "a.png", icc_profile=rgb_profile(DISPLAY_P3, 2.2))
    shown = read((tmp_path / "a.png").read_bytes())
    assert np.array_equal(open_images(tmp_path, 24)[0].pixels, shown)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "a.png").planes[0]), shown)
    again = to_rgb(read_picture(tmp_path / "a.png").planes[0])
    assert np.array_equal(np.asarray(again), shown)  # nothing is done twice
    with Image.open(tmp_path / "a.png") as image:  # a user's own image, which stays as it is
        assert np.array_equal(np.asarray(to_rgb(image)), shown)
        assert image.info["icc_profile"] and np.array_equal(np.asarray(image), np.asarray(stored))


@pytest.mark.parametrize(
    "profile",
    [rgb_profile(SRGB, None), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()],
    ids=["1024 points", "formula"],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_srgb_profile_changes_no_bit(profile, mode):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)).convert(mode)
    assert np.array_equal(read(encoded(image, icc_profile=profile)), read(encoded(image)))


def test_profile_that_is_a_table():
    """The corners of a space whose red and blue are swapped, and whose colours are dull."""
    corners = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, 1, 0)]

    def corner(r, g, b):
        return np.array([0.7 * b, 0.8 * g, 0.6 * r]) if (r, g, b) != (1, 1, 1) else np.ones(3)

    image = Image.fromarray(255 * np.array([corners], np.uint8))
    pixels = read(encoded(image, icc_profile=rgb_table_profile(corner)))[0]
    assert off(pixels, [np.rint(255 * corner(*full)) for full in corners]) <= 12  # 8 bits of Lab


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def saying(pixels: np.ndarray, *chunks: bytes, **options) -> bytes:
    """A PNG with more chunks behind its header."""
    png = encoded(Image.fromarray(pixels), **options)
    return png[:33] + b"".join(chunks) + png[33:]


P3_CORNERS = chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))
SRGB_CORNERS = chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
GAMMA = {gamma: chunk(b"gAMA", struct.pack(">I", round(100000 / gamma))) for gamma in (1.0, 1.8, 2.2)}


@pytest.mark.parametrize(
    "chunks, primaries, gamma",
    [
        ([chunk(b"cICP", bytes([12, 13, 0, 1]))], DISPLAY_P3, None),
        ([chunk(b"cICP", bytes([12, 8, 0, 1]))], DISPLAY_P3, 1.0),
        ([P3_CORNERS], DISPLAY_P3, None),
        ([GAMMA[2.2], P3_CORNERS], DISPLAY_P3, None),
        ([GAMMA[1.0], SRGB_CORNERS], SRGB, 1.0),
        ([GAMMA[1.8]], SRGB, 1.8),
    ],
    ids=["cICP P3", "cICP linear P3", "cHRM P3", "gAMA and cHRM P3", "gAMA linear", "gAMA alone"],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_what_a_png_says_without_a_profile(chunks, primaries, gamma, bits):
    stored = stored_in(primaries, gamma, COLOURS)
    if bits == 8:
        assert off(read(saying(stored, *chunks)), COLOURS) <= 6 and off(stored, COLOURS) > 15
    else:
        parts = [(part[4:8], part[8:-4]) for part in chunks]
        assert off(read(deep_png(stored.astype(int) * 257, *parts)), COLOURS) <= 6


@pytest.mark.parametrize(
    "chunks",
    [
        [GAMMA[2.2]],
        [GAMMA[2.2], SRGB_CORNERS],
        [chunk(b"sRGB", b"\0"), GAMMA[1.0], P3_CORNERS],
        [chunk(b"cICP", bytes([1, 13, 0, 1])), GAMMA[1.0]],
        [chunk(b"gAMA", bytes(4))],
        [chunk(b"cHRM", bytes(32))],
        [chunk(b"cHRM", struct.pack(">8I", *[33333] * 8))],
        [chunk(b"cHRM", b"\xff" * 32), chunk(b"gAMA", b"\0\0\0\1")],
        [chunk(b"cICP", b"")],
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_says_srgb_or_nothing_that_makes_sense_changes_no_bit(chunks, mode):
    pixels = np.asarray(Image.fromarray(COLOURS).convert(mode))
    assert np.array_equal(read(saying(pixels, *chunks)), read(encoded(Image.fromarray(pixels))))


def test_a_profile_counts_more_than_gamma_and_less_than_cicp():
    stored, p3 = stored_in(ADOBE_RGB, 2.2, COLOURS), chunk(b"cICP", bytes([12, 13, 0, 1]))
    profile = rgb_profile(ADOBE_RGB, 2.2)
    assert off(read(saying(stored, GAMMA[1.0], icc_profile=profile)), COLOURS) <= 3
    assert off(read(saying(stored_in(DISPLAY_P3, None, COLOURS), p3, icc_profile=profile)), COLOURS) <= 3


def test_light_of_hdr_is_said_once(notices):
    for name in ("a.png", "b.png"):
        assert np.array_equal(read(saying(COLOURS, chunk(b"cICP", bytes([9, 16, 0, 1]))), name), COLOURS)
    assert notices == ["a.png is HDR, which is not read correctly; save such files as 8-bit sRGB"]


@pytest.mark.parametrize("space, index, is_adobe", [(65535, "R03", True), (2, "R98", True), (1, "R98", False)])
def test_a_camera_says_adobe_rgb_in_exif(space, index, is_adobe):
    exif = Image.Exif()
    exif[0x8769] = {0xA001: space, 0xA005: {1: index}}
    seen = np.full_like(COLOURS, (70, 150, 110))
    stored = stored_in(ADOBE_RGB, 563 / 256, seen)
    pixels = read(encoded(Image.fromarray(stored), "JPEG", quality=100, exif=exif))
    assert off(pixels, seen if is_adobe else stored) <= 3


def test_profile_of_gray():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    seen = 255 * linear_to_srgb((ramp / 255) ** 1.8)
    file = encoded(Image.fromarray(ramp), icc_profile=gray_profile(1.8))
    assert off(read(file), np.rint(seen)[..., None]) <= 1
    assert np.ptp(read(file), axis=2).max() == 0
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    seen = 255 * linear_to_srgb((deep / 65535) ** 1.8)
    assert off(read(encoded(Image.fromarray(deep), icc_profile=gray_profile(1.8))), np.rint(seen)[..., None]) <= 2


def test_gray_with_the_profile_of_a_colour_space():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    seen = 255 * linear_to_srgb((ramp / 255) ** 1.8)
    assert off(read(encoded(Image.fromarray(ramp), icc_profile=rgb_profile(PROPHOTO, 1.8))), seen[..., None]) <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
def test_transparency_is_laid_on_white_after_the_profile(mode):
    """White is the white of sRGB, and half of a colour is half of what it looks like."""
    seen = np.full((8, 8, 3), (70, 150, 110), np.uint8) if mode != "LA" else np.full((8, 8, 3), 110, np.uint8)
    stored = Image.fromarray(stored_in(ADOBE_RGB, 2.2, seen))
    profile = rgb_profile(ADOBE_RGB, 2.2)
    if mode in ("RGBA", "LA"):
        stored = stored.convert(mode)
        stored.putalpha(128)
        expected = np.rint(seen * (128 / 255) + 255 * (127 / 255))
        assert off(read(encoded(stored, icc_profile=profile)), expected) <= 3
    else:
        colour = stored.getpixel((0, 0))
        stored.putpixel((3, 2), (1, 2, 3))
        if mode == "P":
            stored = stored.convert("P", palette=Image.Palette.ADAPTIVE)
            colour = stored.getpixel((0, 0))
        pixels = read(encoded(stored, icc_profile=profile, transparency=colour))
        assert (pixels[0] == 255).all() and (pixels[2, 3] < 30).all()


def test_inks_by_their_profile(notices):
    """A printer whose inks are weak: its full cyan is a pale blue, and its black a gray."""

    def corner(c, m, y, k):
        return np.array([1 - 0.6 * c, 1 - 0.5 * m, 1 - 0.4 * y]) * (1 - 0.7 * k)

    profile = cmyk_profile(corner)
    inks = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 0, 0), (1, 0, 0, 1)]
    image = Image.new("CMYK", (len(inks) * 16, 16))
    for place, ink in enumerate(inks):
        image.paste(tuple(255 * share for share in ink), (16 * place, 0, 16 * place + 16, 16))
    for kind in ("TIFF", "JPEG"):  # Adobe's JPEG holds inks upside down
        pixels = read(encoded(image, kind, icc_profile=profile, **({"quality": 100} if kind == "JPEG" else {})))
        for place, ink in enumerate(inks):
            expected = 255 * corner(*ink)
            assert off(pixels[8, 16 * place + 8], np.rint(expected)) <= 6, (kind, ink)
    assert notices == []


def test_inks_without_a_profile_are_said_once(notices):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for name in ("a.jpg", "b.jpg"):
        pixels = read(encoded(image, "JPEG", quality=100), name)
        assert off(pixels, (255, 0, 0)) <= 3
    (said,) = notices
    assert said.startswith(
        "a.jpg is CMYK without a colour profile, and its colours are a guess; convert such files to "
    )


@pytest.mark.parametrize(
    "profile, why",
    [
        (b"garbage", "cannot open profile from string"),
        (rgb_profile(DISPLAY_P3, 2.2)[:200], ""),
        (bytes(500), "cannot open profile"),
        (gray_profile(2.2), "it is for gray, and the picture is RGB"),
        (cmyk_profile(lambda *_: np.ones(3)), "it is for CMYK, and the picture is RGB"),
    ],
)
def test_profiles_that_cannot_be_used_are_passed_over_and_said_once(notices, profile, why):
    file = encoded(Image.fromarray(COLOURS), icc_profile=profile)
    for name in ("a.png", "b.png"):
        assert np.array_equal(read(file, name), COLOURS)
    (said,) = notices
    assert said.startswith(f"the colour profile of a.png cannot be used ({why}")


def test_threads_share_profiles():
    files = [
        encoded(Image.fromarray(stored_in(*SPACES[space], COLOURS)), icc_profile=rgb_profile(*SPACES[space]))
        for space in ("p3", "adobe", "prophoto")
    ] * 16
    alone = [read(file) for file in files[:3]] * 16
    with ThreadPoolExecutor(8) as pool:
        assert all(map(np.array_equal, pool.map(read, files), alone))


# Depth

REMEDY = "Image.fromarray(np.rint(np.asarray(image) * (65535 / {})).astype(np.uint16))"


def gray(values, dtype=np.uint16) -> Image.Image:
    return Image.fromarray(np.asarray(values, dtype))


@pytest.mark.parametrize(
    "image, kind, bits, top, white",
    [
        (gray(np.arange(4096).reshape(64, 64)), "PNG", 16, 4095, 4095),
        (gray(np.arange(1000).reshape(25, 40)), "TIFF", 16, 999, 1023),
        (gray(np.arange(256).reshape(16, 16)), "PNG", 16, 255, 255),
        (gray(np.arange(8192).reshape(64, 128)), "JPEG2000", 16, 8191, 16383),
        (gray(np.arange(256).reshape(16, 16), np.int32), "TIFF", 32, 255, 255),
        (gray(np.arange(32768).reshape(128, 256), np.int32), "TIFF", 32, 32767, 32767),
    ],
    ids=["12 bits", "10 bits", "8 bits", "13 bits, so 14", "int32", "15 bits in int32"],
)
def test_numbers_that_use_little_of_their_range_are_said_once_with_a_remedy_that_works(
    notices, image, kind, bits, top, white
):
    file = encoded(image, kind, **({"irreversible": False} if kind == "JPEG2000" else {}))
    dark = read(file, "a")
    read(file, "b")
    (said,) = notices
    remedy = REMEDY.format(white)
    assert said == (
        f"a holds {bits}-bit numbers, of which 65535 is white, and its largest is {top}; if {white} is white there, "
        f"scale all such files first and save them as PNG, in Pillow {remedy}"
    )
    assert off(dark, np.rint(np.asarray(image) / 257)[..., None]) == 0
    with open_image(file) as opened:
        scaled = eval(remedy, {"Image": Image, "np": np, "image": opened})
    console._printed.clear()
    expected = np.rint(np.asarray(image, float) * 255 / white)[..., None]
    assert off(read(encoded(scaled)), expected) <= 1
    assert len(notices) == 1


def test_numbers_of_each_width_are_said_once(notices):
    for image in (gray([[0, 255]], np.int32), gray([[0, 4095]]), gray([[0, 999]]), gray([[0, 70]], np.int32)):
        read(encoded(image, "TIFF"))
    assert [said.partition(", of")[0] for said in notices] == [
        "a.png holds 32-bit numbers",
        "a.png holds 16-bit numbers",
    ]


@pytest.mark.parametrize("values", [[[0, 8192]], [[0, 65535]], [[0, 0]]])
def test_numbers_that_use_their_range_are_no_news(notices, values):
    assert np.array_equal(read(encoded(gray(values)))[..., 0], np.rint(np.array(values) / 257))
    assert notices == []


def test_numbers_of_32_bits_that_use_16_need_no_scaling(notices):
    assert read(encoded(gray([[0, 65526]], np.int32), "TIFF"))[0, 1, 0] == 255
    assert notices == []


def deep_png(values: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits a channel from [H, W, channels] numbers, which Pillow cannot write."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_sixteen_bits_keep_their_upper_half(notices, channels):
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, channels))
    values[..., 3:] = 65535
    assert np.array_equal(read(deep_png(values)), values[..., :3] >> 8)
    assert notices == []


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_twelve_bits_are_said_once(notices, channels):
    values = np.random.default_rng(0).integers(0, 4096, (8, 8, channels))
    values[0, 0], values[..., 3:] = 4095, 65535
    for name in ("a.png", "b.png"):
        read(deep_png(values), name)
    (said,) = notices
    assert said.startswith(
        "a.png holds 16-bit colours, of which 65535 is white, and its largest is about 3855; if less"
    )


def test_transparent_number_of_sixteen_bits_is_laid_on_white():
    values = np.full((8, 8, 1), 30000)
    values[2, 3] = 12345
    pixels = read(deep_png(values, (b"tRNS", struct.pack(">H", 12345))))
    assert (pixels[2, 3] == 255).all() and (np.delete(pixels.reshape(-1, 3), 19, 0) == 117).all()


def test_gray_with_alpha_of_sixteen_bits():
    values = np.full((4, 4, 2), 65535 // 5)
    values[..., 0] = 0
    assert off(read(deep_png(values)), 204) <= 1


def test_sixteen_bits_in_either_order_of_bytes():
    values = np.arange(0, 65536, 256).reshape(16, 16)
    for order in ("<", ">"):
        header, tags = (b"II*\0" if order == "<" else b"MM\0*"), [(256, 16), (257, 16), (258, 16), (259, 1), (262, 1)]
        tags += [(273, 8 + 2 + 12 * 9 + 4), (277, 1), (278, 16), (279, 512)]
        entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
        file = header + struct.pack(f"{order}IH", 8, 9) + entries + bytes(4) + values.astype(f"{order}u2").tobytes()
        assert np.array_equal(read(file)[..., 0], np.rint(values / 257))


def test_sixteen_bits_whose_zero_is_white():
    values = np.arange(0, 65536, 256).reshape(16, 16)
    buffer = io.BytesIO()
    gray(values).save(buffer, "TIFF", tiffinfo={262: 0})
    with open_image(buffer.getvalue()) as image:
        assert image.tag_v2[262] == 0
    assert np.array_equal(read(buffer.getvalue())[..., 0], 255 - np.rint(values / 257))


@pytest.mark.parametrize("mode, value", [("F", 0.5), ("I", 70000), ("I", -1)])
def test_numbers_without_a_white_are_refused(mode, value):
    with pytest.raises(BrokenImage, match=r"pixels of mode . have no defined white; save it as 8 or 16 bits a channel"):
        read(encoded(Image.new(mode, (8, 8), value), "TIFF"))


# Modes


@pytest.mark.parametrize(
    "mode, colour, seen",
    [
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
        ("L", 90, (90, 90, 90)),
        ("LA", (0, 51), (204, 204, 204)),
        ("La", (0, 51), (204, 204, 204)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("RGBa", (51, 0, 0, 51), (255, 204, 204)),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
        ("CMYK", (0, 0, 0, 155), (100, 100, 100)),
        ("YCbCr", (100, 128, 128), (100, 100, 100)),
        ("LAB", (128, 128, 128), (119, 119, 119)),
        ("HSV", (0, 255, 200), (200, 0, 0)),
        ("I;16", 32768, (128, 128, 128)),
        ("I;16B", 32768, (128, 128, 128)),
    ],
)
def test_modes_in_memory(mode, colour, seen):
    assert off(np.asarray(to_rgb(Image.new(mode, (4, 4), colour))), seen) <= 1


def test_palette_with_alpha_of_every_colour():
    image = Image.new("P", (4, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 10, 20, 30])
    image.putdata([0, 1, 2, 3])
    pixels = read(encoded(image, transparency=bytes([0, 51, 255])))
    assert pixels.tolist() == [[[255, 255, 255], [204, 255, 204], [0, 0, 255], [10, 20, 30]]]
    image = image.convert("PA")
    image.putalpha(51)
    assert np.asarray(to_rgb(image)).tolist()[0][:2] == [[255, 204, 204], [204, 255, 204]]


@pytest.mark.parametrize("mode, clear, other", [("L", 7, 90), ("1", 0, 1), ("RGB", (7, 7, 7), (90, 90, 90))])
def test_one_transparent_colour(mode, clear, other):
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), other)
    pixels = read(encoded(image, transparency=clear))
    assert pixels.tolist() == [[[255] * 3, [90] * 3 if mode != "1" else [255] * 3]]


# More pictures than one


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG", "AVIF"])
def test_of_several_pictures_the_first_is_read_and_said_once(notices, kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    for name in ("a", "b"):
        assert off(read(file, name), (250, 0, 0)) <= 3
    assert notices == ["a holds several pictures; the first is read"]


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG", "MPO", "JPEG"])
def test_of_one_picture_nothing_is_said(notices, kind):
    image = Image.new("RGB", (16, 16), (250, 0, 0))
    more = {"save_all": True, "append_images": [image.resize((8, 8))]} if kind == "MPO" else {}
    assert off(read(encoded(image, kind, **more)), (250, 0, 0)) <= 6
    assert notices == []


def test_damaged_second_frame_does_not_matter():
    frames = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (32, 32), np.uint8)) for n in range(2)]
    file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    first = read(encoded(frames[0], "GIF"))
    for end in range(len(file) // 2 + 20, len(file), 97):
        assert np.array_equal(read(file[:end] + b"\xff" * 50), first)


def test_ordinary_pictures_are_what_pillow_makes_of_them():
    """No rule of colours touches a picture without a profile."""
    image = Image.fromarray(COLOURS)
    for mode in ("RGB", "L", "P", "1"):
        stored = image.convert(mode)
        assert np.array_equal(read(encoded(stored)), np.asarray(stored.convert("RGB")))
    with open_image(encoded(image, "JPEG")) as opened:
        expected = center_crop(opened.convert("RGB"), 16)
        assert np.array_equal(center_crop(to_rgb(opened), 16), expected)


def test_a_band_that_is_marked_as_alpha_is_noticed(notices):
    values = np.random.default_rng(0).integers(20, 230, (16, 16, 4), np.uint8)
    read(encoded(Image.fromarray(values), "TIFF"), "tile.tif")
    assert len(notices) == 1 and "tile.tif" in notices[0] and "--pixels bands" in notices[0]
    values[:, :8, 3], values[:, 8:, 3] = 0, 255
    console._printed.clear()
    read(encoded(Image.fromarray(values), "TIFF"), "cut_out.tif")
    assert len(notices) == 1
