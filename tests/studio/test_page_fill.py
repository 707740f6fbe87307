"""Filling holes on the page, as a person does it."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw

from latentflow.errors import DataError
from latentflow.studio.mask_readings import mask_readings
from tests.studio.browser import drop_file
from tests.studio.test_page_draw import downloaded, shown

expect = pytest.importorskip("playwright.sync_api", reason="the tests of the page take playwright").expect

WIDE, HIGH = 60, 40


@pytest.fixture
def photo(tmp_path):
    """A photo with transparency, whose every pixel is another one."""
    pixels = np.random.default_rng(0).integers(0, 256, (HIGH, WIDE, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(file := tmp_path / "photo.png")
    return file


def open_photo(page, file) -> dict[str, float]:
    """Open a photo in Fill; returns where it stands on the screen."""
    page.get_by_role("tab", name="Fill").click()
    shown(page).locator("input[type=file]").first.set_input_files(file)
    stage = shown(page).locator(".over")
    expect(stage).to_be_visible()
    return stage.bounding_box()


def press_fill(page, num: int) -> None:
    shown(page).get_by_label("Images").fill(str(num))
    shown(page).get_by_role("button", name="Fill", exact=True).click()
    expect(shown(page).locator(".gallery img:not(.before)")).to_have_count(num)


def test_a_hole_is_brushed_and_every_other_pixel_is_kept(page, photo):
    """The download has the numbers of the photo, opacity included, wherever the brush did not paint."""
    box = open_photo(page, photo)

    def at(x: float, y: float) -> tuple[float, float]:
        return box["x"] + x * box["width"] / WIDE, box["y"] + y * box["height"] / HIGH

    page.mouse.move(*at(20.5, 15.5))
    page.mouse.down()
    page.mouse.move(*at(35.5, 15.5), steps=5)
    page.mouse.up()
    expect(shown(page).get_by_text("of the photo is to be filled")).to_be_visible()
    press_fill(page, 2)
    shown(page).locator(".gallery .picture").nth(1).click()
    content = downloaded(page, page.get_by_role("button", name="Download"))
    before, after = np.asarray(Image.open(photo)), np.asarray(Image.open(io.BytesIO(content)))
    changed = (before != after).any(2)
    assert changed[15, 20:36].all()  # the way of the brush
    assert not changed[:, :14].any() and not changed[:, 42:].any()
    assert not changed[:8].any() and not changed[23:].any()
    assert 0.02 < changed.mean() < 0.2


def test_tools_and_undo(page, photo):
    """Box, eraser and undo, by what the page says of the share."""
    box = open_photo(page, photo)
    words = shown(page).locator(".below-stage .hint")

    def drag(x0: float, y0: float, x1: float, y1: float) -> None:
        page.mouse.move(box["x"] + x0 * box["width"], box["y"] + y0 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + x1 * box["width"], box["y"] + y1 * box["height"], steps=3)
        page.mouse.up()

    expect(shown(page).get_by_role("button", name="Brush")).to_have_attribute("aria-pressed", "true")
    shown(page).get_by_role("button", name="Box").click()
    expect(shown(page).get_by_role("button", name="Brush")).to_have_attribute("aria-pressed", "false")
    drag(0.001, 0.001, 0.5, 0.999)
    expect(words).to_have_text("50 % of the photo is to be filled")
    drag(0.5, 0.001, 0.999, 0.5)
    expect(words).to_have_text("75 % of the photo is to be filled")
    shown(page).get_by_role("button", name="Undo").click()
    expect(words).to_have_text("50 % of the photo is to be filled")
    shown(page).get_by_role("button", name="Redo").click()
    expect(words).to_have_text("75 % of the photo is to be filled")
    shown(page).get_by_role("button", name="Clear").click()
    expect(words).to_have_text("nothing is painted yet")
    shown(page).get_by_role("button", name="Lasso").click()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + 5, steps=3)
    page.mouse.move(box["x"] + 5, box["y"] + box["height"] - 5, steps=3)
    page.mouse.up()
    expect(words).to_have_text(re.compile("^(49|50) % of"))
    shown(page).get_by_role("button", name="Fill", exact=True).click()
    expect(shown(page).locator(".gallery img:not(.before)")).to_have_count(4)
    shown(page).get_by_label("Before and after").fill("100")
    clip = "getComputedStyle(document.querySelector('#panel-fill .before')).clipPath"
    assert page.evaluate(clip) == "inset(0px 0px 0px calc(0%))" or "0%" in page.evaluate(clip)


def test_a_painted_mask_is_shown_as_it_is_understood(page, photo, tmp_path):
    """Half the size, red and soft on transparent ground: a person chooses what it means."""
    mask = Image.new("RGBA", (WIDE // 2, HIGH // 2), (0, 0, 0, 0))
    ImageDraw.Draw(mask).rectangle((5, 5, 14, 9), fill=(255, 0, 0, 255))
    mask.save(file := tmp_path / "mask <i>.png")
    open_photo(page, photo)
    drop_file(page, file, "#panel-fill [data-takes=mask]")
    expect(shown(page).get_by_text("is understood in one of these ways")).to_be_visible()
    shown(page).locator(".card", has_text="what is opaque is filled").click()
    expect(shown(page).locator(".below-stage .hint")).to_have_text("8 % of the photo is to be filled")
    press_fill(page, 1)
    shown(page).locator(".gallery .picture").first.click()
    content = downloaded(page, page.get_by_role("button", name="Download"))
    changed = (np.asarray(Image.open(photo)) != np.asarray(Image.open(io.BytesIO(content)))).any(2)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (10, 19, 10, 29)


def test_what_cannot_be_filled_is_said_where_it_belongs(page, photo, tmp_path):
    page.get_by_role("tab", name="Fill").click()
    shown(page).get_by_role("button", name="Fill", exact=True).click()
    expect(shown(page).locator(".strip .trouble")).to_contain_text("give a photo first")
    open_photo(page, photo)
    shown(page).get_by_role("button", name="Fill", exact=True).click()
    expect(shown(page).locator(".strip .trouble")).to_contain_text("nothing is painted yet")
    Image.new("L", (30, 30), 255).save(other := tmp_path / "other.png")
    drop_file(page, other, "#panel-fill [data-takes=mask]")
    expect(page.locator("#trouble")).to_contain_text("another shape")


def test_a_photo_that_is_stored_turned_is_filled_upright(page, tmp_path):
    """Of equal sides, so that its size does not say how the mask is turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    pixels = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := tmp_path / "turned.png", exif=exif)
    box = open_photo(page, file)
    shown(page).get_by_role("button", name="Box").click()
    page.mouse.move(box["x"] + 1, box["y"] + 1)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4, steps=2)
    page.mouse.up()
    press_fill(page, 1)
    shown(page).locator(".gallery .picture").first.click()
    content = downloaded(page, page.get_by_role("button", name="Download"))
    upright = np.rot90(pixels, -1)
    changed = (upright != np.asarray(Image.open(io.BytesIO(content)))).any(2)
    assert changed[:10, :10].mean() > 0.9 and not changed[10:].any() and not changed[:, 10:].any()


@pytest.fixture
def read(photo, tmp_path):
    """The readings of a mask, by title."""

    def of(mask: Image.Image) -> dict[str, np.ndarray]:
        mask.save(tmp_path / "mask.png")
        return {one.title: one.hole for one in mask_readings(tmp_path / "mask.png", photo)}

    return of


def test_a_black_and_white_mask_means_white_first(read):
    mask = np.zeros((HIGH, WIDE), np.uint8)
    mask[5:20, 5:25] = 255
    found = read(Image.fromarray(mask))
    assert list(found) == ["what is white is filled", "what is black is filled"]
    assert np.array_equal(found["what is white is filled"], mask // 255)
    assert np.array_equal(found["what is black is filled"], 1 - mask // 255)


def test_a_soft_mask_is_halved(read):
    ramp = np.tile(np.linspace(0, 255, WIDE).astype(np.uint8), (HIGH, 1))
    (title, hole), *_ = read(Image.fromarray(ramp)).items()
    assert title == "what is white is filled (gray of at least half white counts as white)"
    assert np.array_equal(hole, (ramp >= 128).astype(np.uint8))


def test_paint_over_a_copy_of_the_photo_is_found(read, photo):
    pixels = np.asarray(Image.open(photo).convert("RGB")).copy()
    pixels[10:20, 10:30] = (255, 0, 255)
    (title, hole), *_ = read(Image.fromarray(pixels)).items()
    assert title == "what was painted over the photo is filled"
    assert hole[10:20, 10:30].mean() > 0.95 and not hole[:10].any() and not hole[20:].any()


def test_masks_that_mean_nothing_are_refused(read):
    with pytest.raises(DataError, match="of one colour"):
        read(Image.new("L", (WIDE, HIGH), 0))
    with pytest.raises(DataError, match="another shape"):
        read(Image.new("L", (HIGH, WIDE), 0))
