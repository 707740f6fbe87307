"""Pictures become files: PNGs that any reader takes, written while others are drawn, whole or not at all."""

from __future__ import annotations

import io
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow import artifacts
from latentflow.errors import ArtifactError
from latentflow.sampling import samples as samples_module
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.png import encode_png
from latentflow.sampling.samples import PictureWriter, Samples

RANDOM = np.random.default_rng(0)
NAMES = ["a.png", "b.png", "c.png"]


def some(num: int = 3) -> Samples:
    """Pictures of noise of 8 x 8 pixels."""
    pixels = torch.from_numpy(RANDOM.integers(0, 256, (num, 3, 8, 8), dtype=np.uint8))
    request = Drawing(seeds=list(range(num)))
    return Samples(pixels, torch.zeros(num, 4, 4, 4), torch.full((num,), 7), request)


def names_in(folder) -> list[str]:
    """All of them, those of temporary files included."""
    return sorted(path.name for path in folder.iterdir())


# PNG


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 3 + y, x + 5 * y, (x * y) // 7], -1).astype(np.uint8)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((1, 1, 3), np.uint8),
        np.full((5, 1, 3), 255, np.uint8),
        RANDOM.integers(0, 256, (1, 9, 3), dtype=np.uint8),
        RANDOM.integers(0, 256, (33, 17, 3), dtype=np.uint8),
        smooth(64, 48),
        np.ascontiguousarray(smooth(40, 40).transpose(1, 0, 2))[:, ::-1],
        np.repeat(RANDOM.integers(0, 256, (40, 1, 3), dtype=np.uint8), 300, 1),
    ],
    ids=["one pixel", "one column", "one row", "noise", "smooth", "strided", "stripes"],
)
def test_a_png_holds_its_pixels_and_its_text(pixels):
    content = encode_png(pixels, {"latentflow": '{"seeds": [1]}', "other": "x" * 5000})
    with Image.open(io.BytesIO(content)) as image:
        image.verify()
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.mode, image.info.get("interlace")) == ("PNG", "RGB", None)
        assert np.array_equal(np.asarray(image), pixels)
        assert image.text == {"latentflow": '{"seeds": [1]}', "other": "x" * 5000}


def test_a_png_is_as_small_as_that_of_pillow():
    for pixels in (smooth(256, 256), RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)):
        usual = io.BytesIO()
        Image.fromarray(pixels).save(usual, format="PNG", compress_type=3)
        assert len(encode_png(pixels, {})) <= 1.03 * len(usual.getvalue())


def test_a_picture_of_another_form_is_left_to_pillow(tmp_path):
    made = Samples(**{**vars(some(1)), "finish": lambda pixels: Image.fromarray(pixels).convert("L")})
    (file,) = made.save_as(tmp_path / "gray.png")
    with Image.open(file) as image:
        assert image.mode == "L"
        assert '"evaluations": 7' in image.text["latentflow"]


# Writing


def test_pictures_are_written_while_others_are_drawn(tmp_path, monkeypatch):
    """`write` returns at once, until two batches wait; nothing else of them is held."""
    gate, write = threading.Event(), samples_module._write
    monkeypatch.setattr(samples_module, "_write", lambda *given: gate.wait(60) and write(*given))
    with PictureWriter() as writer:
        for batch in range(2):
            writer.write(some(), [tmp_path / f"{batch}{name}" for name in NAMES])
        assert names_in(tmp_path) == []
        third = threading.Thread(target=writer.write, args=(some(), [tmp_path / f"2{name}" for name in NAMES]))
        third.start()
        third.join(0.2)
        assert third.is_alive()  # it waits for the first batch
        gate.set()
        third.join(60)
        assert {"0a.png", "0b.png", "0c.png"} <= set(names_in(tmp_path))
    assert names_in(tmp_path) == [f"{batch}{name}" for batch in range(3) for name in NAMES]


def test_some_rows_of_a_batch(tmp_path):
    made = some()
    with PictureWriter() as writer:
        writer.write(made, [tmp_path / "a.png", tmp_path / "c.png"], [0, 2])
    for name, row in (("a.png", 0), ("c.png", 2)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), made.pixels[row].permute(1, 2, 0))


@pytest.mark.parametrize("batches", [1, 3])
def test_an_error_in_a_thread_reaches_the_caller(tmp_path, batches):
    """At the end, or as soon as another batch waits; files that were whole stay, and nothing else does."""
    (tmp_path / "b.png").mkdir()  # in the way

    def write_all():
        with PictureWriter() as writer:
            for batch in range(batches):
                writer.write(some(), [tmp_path / (f"{batch}.png" if name != "b.png" else name) for name in NAMES])

    with pytest.raises(ArtifactError, match=r"cannot write .*b\.png"):
        write_all()
    assert not [name for name in names_in(tmp_path) if ".tmp" in name]


def test_work_that_is_broken_off_leaves_whole_files_only(tmp_path, monkeypatch):
    """Ctrl-C while pictures wait to be written: those that are being written are finished, others never begin."""
    write = samples_module._write
    monkeypatch.setattr(samples_module, "_write", lambda *given: time.sleep(0.05) or write(*given))

    def draw():
        with PictureWriter() as writer:
            writer.write(some(100), [tmp_path / f"{number:03}.png" for number in range(100)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw()
    found = names_in(tmp_path)
    assert len(found) < 50
    for name in found:
        with Image.open(tmp_path / name) as image:
            image.load()


def test_files_are_synced_and_the_folder_once(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(artifacts, "sync", lambda path: synced.append(path))
    monkeypatch.setattr(samples_module, "sync", lambda path: synced.append(path))
    some().save(tmp_path)
    assert synced.count(tmp_path) == 1
    assert len(synced) == 4
