"""Image files, opened: which are read, which are refused and why, and what all of them together may take."""

from __future__ import annotations

import ast
import io
import os
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import latentflow
from latentflow.data.pictures import decode
from latentflow.data.pictures.decode import (
    BrokenImage,
    most_bytes,
    most_pixels,
    open_image,
    orientation,
    read_file,
    upright,
)
from latentflow.data.sources.images import open_images
from latentflow.data.sources.readable import readable
from latentflow.errors import ConfigError

SOURCE = Path(latentflow.__file__).parent


def picture(width: int = 20, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(file: bytes | str | Path, name: str | None = None) -> str:
    with pytest.raises(BrokenImage) as caught, open_image(file, name) as image:
        image.load()
    return caught.value.reason


def broken(folder: Path) -> dict[str, str]:
    """What is wrong with the images of a folder or an archive."""
    return {error.name: error.reason for error in readable(open_images(folder, 8))[1]}


def pixels(file: bytes | str | Path, name: str | None = None) -> np.ndarray:
    with open_image(file, name) as image:
        return np.asarray(image)


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def with_chunks(png: bytes, *chunks: bytes, last: bool = False) -> bytes:
    """A PNG with more chunks behind its header, or before its end."""
    place = len(png) - 12 if last else 33
    return png[:place] + b"".join(chunks) + png[place:]


def bomb(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_nothing_else_hands_files_to_pillow():
    """Nobody calls `Image.open`, or one of Pillow's plugins, but the module that knows what may be opened."""
    for file in SOURCE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        opening = {call for call in calls if call.endswith(("Image.open", "ImageFile.Parser", "ImagePlugin.open"))}
        assert opening == ({"Image.open"} if file == SOURCE / "data" / "pictures" / "decode.py" else set()), file


# Formats


@pytest.mark.parametrize(
    "kind, suffix",
    [
        ("PNG", ".jpg"),
        ("JPEG", ".png"),
        ("WEBP", ".png"),
        ("BMP", ".png"),
        ("TIFF", ".png"),
        ("GIF", ".png"),
        ("PPM", ".png"),
        ("JPEG2000", ".png"),
        ("AVIF", ".png"),
        ("TGA", ".tga"),
    ],
)
def test_formats_are_known_by_their_content(tmp_path, kind, suffix):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {kind}")
    file = tmp_path / f"a{suffix}"
    file.write_bytes(encoded(picture(), kind))
    assert pixels(file).shape[:2] == pixels(file.read_bytes(), file.name).shape[:2] == (16, 20)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 16\n%%EndComments\n0 0 moveto\nshowpage\n"
STRANGERS = {
    "EPS or PostScript": EPS,
    "EPS": b"\xc5\xd0\xd3\xc6" + bytes(26) + EPS,
    "PDF": b"%PDF-1.4\n",
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "EMF": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(60),
    "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="20" height="16"/>',
    "a Windows icon": encoded(picture(), "ICO"),
    "a Photoshop document": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 16, 20, 8, 3) + bytes(20),
    "DDS": encoded(picture(), "DDS"),
    "FITS": b"SIMPLE  =                    T" + bytes(2850),
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(40),
    "JPEG XL": b"\xff\x0a" + bytes(40),
    "a web page": b"<!DOCTYPE html>\n<html><body>404</body></html>",
    "a Git LFS pointer and not yet the file": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("what", STRANGERS)
@pytest.mark.parametrize("name", ["a.jpg", "a.tif", "a.tga"])
def test_other_formats_are_named_and_never_opened(tmp_path, monkeypatch, what, name):
    """EPS above all: Pillow would start Ghostscript for it."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    content = STRANGERS[what]
    assert refusal(content, name).startswith(f"its content is {what}, which is not read: ")
    (tmp_path / name).write_bytes(content)
    assert set(broken(tmp_path)) == {name} and f"its content is {what}, which is not read: " in broken(tmp_path)[name]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, content)
    assert "which is not read" in broken(tmp_path / "a.zip")[name]


def test_what_is_no_image_at_all(tmp_path):
    assert refusal(b"") == "it is empty (0 bytes)"
    assert refusal(b"hello", "a.png") == "its content is no image that Pillow can read"
    assert refusal(bytes(5000)) == "its content is zeros, as after a failed copy: copy it again"
    # Nearly anything could be a TGA, which has no mark at its beginning.
    tga = encoded(picture(), "TGA")
    assert refusal(tga, "a.png") == "its content is no image that Pillow can read"
    assert np.array_equal(pixels(tga, "a.TGA"), np.asarray(picture()))


# Files


def test_files_that_may_never_end_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    assert refusal(tmp_path / "pipe.png") == "it is a pipe; give an image file"
    assert refusal(tmp_path / "zero.png") == "it is no regular file; give an image file"
    assert refusal(tmp_path / "folder.png") == "it is a folder; give an image file"
    assert refusal(tmp_path / "none.png") == "No such file or directory"
    picture().save(tmp_path / "whole.png")
    assert len(open_images(tmp_path, 8, strict=True)) == 1  # the others are no images, whatever their names
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert refusal(tmp_path / "loop.png") == "Too many levels of symbolic links"


def test_links_to_images_are_followed(tmp_path):
    (tmp_path / "a.bin").write_bytes(encoded(picture()))
    (tmp_path / "a.png").symlink_to("a.bin")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(picture()))


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    (tmp_path / "a.png").chmod(0)
    assert refusal(tmp_path / "a.png") == "Permission denied"


def test_file_larger_than_a_picture_may_be(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", "1000")
    file = tmp_path / "a.bmp"
    file.write_bytes(encoded(picture(), "BMP") + bytes(4001))
    message = refusal(file)
    assert message == refusal(file.read_bytes())
    assert (
        message == "its 5,015 bytes are more than 4,000; make it smaller, or allow more with LATENTFLOW_MAX_PIXELS=1254"
    )
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", message.rpartition("=")[2])
    assert np.array_equal(pixels(file), np.asarray(picture()))


def test_huge_sparse_file_is_refused_without_being_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(1 << 40)
    assert "its 1,099,511,627,776 bytes are more than 1,073,741,824" in refusal(tmp_path / "a.png")
    with pytest.raises(ValueError, match="bytes are more than"):
        read_file(tmp_path / "a.png")


# Pixels


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [20000, 50000])  # below and above what Pillow itself refuses
def test_bombs_are_refused_by_their_header(side):
    wanted = f"its {side * side:,} pixels are more than 268,435,456; make it smaller, or allow more with "
    assert refusal(bomb(side, side)) == f"{wanted}LATENTFLOW_MAX_PIXELS={side * side}"


def test_bombs_inside_an_image_are_refused_with_the_same_words():
    """The frame of a GIF, and a tile of a TIFF, may be larger than the picture says it is."""
    gif = bytearray(encoded(Image.new("L", (8, 8)), "GIF"))
    place = gif.index(b",")
    gif[place + 5 : place + 9] = struct.pack("<HH", 60000, 60000)
    assert refusal(bytes(gif)).startswith("its 3,600,000,000 pixels are more than 268,435,456; make it smaller, or ")


def test_photograph_of_two_hundred_megapixels_is_within_the_limit():
    with open_image(bomb(16320, 12240)) as image:
        assert image.size == (16320, 12240)


def test_the_limit_is_raised_as_the_message_says(monkeypatch):
    file = encoded(picture())
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", "319")
    message = refusal(file)
    assert message == "its 320 pixels are more than 319; make it smaller, or allow more with LATENTFLOW_MAX_PIXELS=320"
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", message.rpartition("=")[2])
    assert np.array_equal(pixels(file), np.asarray(picture()))


@pytest.mark.parametrize("text", ["many", "-1", "0", "1e9", "²"])
def test_a_limit_that_is_no_number(tmp_path, monkeypatch, text):
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", text)
    said = f"LATENTFLOW_MAX_PIXELS='{text}' is not a whole number above 0; unset it for "
    with pytest.raises(ConfigError, match=said):
        open_images(tmp_path, 8)
    with pytest.raises(ConfigError, match=said):
        pixels(tmp_path / "a.png")
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", "")
    assert most_pixels() == 1 << 28 and most_bytes() == 1 << 30


def test_other_code_keeps_at_least_its_own_limit(monkeypatch):
    for limit, afterwards in ((None, None), (1 << 40, 1 << 40), (1000, 1 << 28)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        pixels(encoded(picture()))
        assert afterwards == Image.MAX_IMAGE_PIXELS


def test_threads_decode_no_more_pixels_at_once_than_one_picture_may_have(monkeypatch):
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", str(2 * 320))
    file, lock, most, now = encoded(picture()), threading.Lock(), 0, 0
    both = threading.Barrier(2, timeout=30)

    def read() -> None:
        nonlocal most, now
        with open_image(file):
            with lock:
                now += 1
                most = max(most, now)
            both.wait()  # so long two are open: more of them never were, fewer would wait for ever
            with lock:
                now -= 1

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most, now) == (2, 0) and not both.broken


def test_a_thread_never_waits_for_itself(monkeypatch):
    file = encoded(picture())
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", "320")
    with open_image(file) as image, open_image(file) as other:
        assert np.array_equal(np.asarray(image), np.asarray(other))
    with pytest.raises(BrokenImage), open_image(file):
        raise ValueError("what fails in the context gives its pixels back")
    assert pixels(file).shape == (16, 20, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_does_not_wait_for_its_parents_threads(monkeypatch):
    monkeypatch.setenv("LATENTFLOW_MAX_PIXELS", "320")
    file = encoded(picture())
    opened, done = threading.Event(), threading.Event()

    def hold() -> None:
        with open_image(file):
            opened.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    opened.wait(30)
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if decode._pixels._held == 0 and pixels(file).shape == (16, 20, 3) else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    done.set()
    thread.join()


def test_memory_of_many_threads_is_that_of_few_pictures(tmp_path):
    """Eight threads, each with a file of 48 MB, the picture's 64 MB and a copy of them, would take 1.4 GB."""
    Image.new("RGB", (4000, 4000), (10, 20, 30)).save(tmp_path / "0.bmp")
    for index in range(1, 8):
        (tmp_path / f"{index}.bmp").symlink_to("0.bmp")
    code = (
        "import resource, sys; from latentflow.data.sources.images import open_images\n"
        "from latentflow.data.sources.readable import readable\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); kept, broken = readable(open_images(sys.argv[1], 8)); print(len(kept), peak() - before)"
    )
    env = {**os.environ, "LATENTFLOW_MAX_PIXELS": "16000000"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, check=True)
    count, kilobytes = map(int, done.stdout.split())
    assert count == 8 and kilobytes < 500_000


# What a PNG carries


def text_chunk(kind: bytes, content: bytes) -> bytes:
    if kind == b"tEXt":
        return chunk(kind, b"workflow\0" + content)
    if kind == b"zTXt":
        return chunk(kind, b"workflow\0\0" + zlib.compress(content))
    return chunk(kind, b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(content))


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_texts_do_not_decide_whether_a_png_is_read(kind, last, count):
    large = text_chunk(kind, b"x" * (3 << 20))
    png = with_chunks(encoded(picture()), *[large] * count, last=last)
    assert np.array_equal(pixels(png), np.asarray(picture()))


def test_bomb_of_texts_is_never_unpacked():
    packer = zlib.compressobj(9)
    stream = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(300)), packer.flush()])
    png = with_chunks(encoded(picture()), *[chunk(b"zTXt", b"workflow\0\0" + stream)] * 4)
    assert len(png) < 2 << 20
    with open_image(png) as image:
        assert np.array_equal(np.asarray(image), np.asarray(picture())) and "workflow" not in image.text


def test_many_small_texts_are_read_up_to_what_pillow_takes():
    png = with_chunks(encoded(picture()), *[text_chunk(b"zTXt", b"x" * (1 << 20))] * 70)
    assert np.array_equal(pixels(png), np.asarray(picture()))


@pytest.mark.parametrize(
    "kind", [b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"zzZz"]
)
def test_damaged_extras_of_a_png_do_not_matter(kind):
    for content in (chunk(kind, b"damaged", crc=1), chunk(kind, b"\0\0\0\0", crc=1)):
        assert np.array_equal(pixels(with_chunks(encoded(picture()), content)), np.asarray(picture()))


def test_texts_of_usual_size_stay(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("latentflow", '{"seed": 3}')
    info.add_itxt("title", "Größe", zip=True)
    with open_image(encoded(picture(), pnginfo=info)) as image:
        assert image.text == {"latentflow": '{"seed": 3}', "title": "Größe"}


def test_large_profile_of_a_png_is_kept():
    profile = np.random.default_rng(0).bytes(2 << 20)
    with open_image(encoded(picture(), icc_profile=profile)) as image:
        assert image.info["icc_profile"] == profile
        assert np.array_equal(np.asarray(image), np.asarray(picture()))


# Damage


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_files_cut_short_are_broken(kind, share):
    whole = encoded(picture(64, 64), kind)
    assert refusal(whole[: int(len(whole) * share)])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_says_nothing():
    png = encoded(picture())
    for exif in (
        b"",
        b"MM\0*",
        b"garbage" * 9,
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0",
    ):
        with open_image(with_chunks(png, chunk(b"eXIf", exif))) as image:
            assert orientation(image) == 1
            assert np.array_equal(np.asarray(upright(image)), np.asarray(picture()))


# Orientation

TURNED = {  # the stored pixels of what is to be seen as `a`
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("turn", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_of_every_format_is_read_and_undone(turn, kind):
    seen = np.asarray(picture())
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    file = encoded(Image.fromarray(np.ascontiguousarray(TURNED[turn](seen))), kind, exif=exif, **options)
    with open_image(file) as image:
        assert orientation(image) == turn
        shown = np.asarray(upright(image))
    assert np.abs(shown.astype(int) - seen).max() <= (40 if kind == "JPEG" else 0)
    assert np.abs(shown.astype(int) - seen).mean() <= (4 if kind == "JPEG" else 0)
