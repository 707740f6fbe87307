"""Painting semantic maps on the page, as a person does it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from latentflow.data.painting.map_reader import read_map
from latentflow.data.painting.semantic_maps import MapClasses
from tests import tiny
from tests.studio.test_page_draw import downloaded, shown

expect = pytest.importorskip("playwright.sync_api", reason="the tests of the page take playwright").expect

SIDE = tiny.IMAGE_SIZE
CLASSES = MapClasses(tiny.MAP_CLASSES, tiny.MAP_PALETTE)


def open_map(page):
    page.get_by_role("tab", name="Paint a map").click()
    stage = shown(page).locator(".over")
    expect(stage).to_be_visible()
    return stage


def drag(page, stage, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one corner of the map's pixels to another."""
    box = stage.bounding_box()
    page.mouse.move(box["x"] + start[0] * box["width"] / SIDE, box["y"] + start[1] * box["height"] / SIDE)
    page.mouse.down()
    page.mouse.move(box["x"] + end[0] * box["width"] / SIDE, box["y"] + end[1] * box["height"] / SIDE, steps=4)
    page.mouse.up()


def saved(page) -> np.ndarray:
    content = downloaded(page, shown(page).get_by_role("button", name="Save the map"))
    return read_map(content, CLASSES)


def test_a_map_is_painted_saved_and_drawn(page, studio):
    """The saved map has the classes that were painted; its pictures are those of the library for that file."""
    stage = open_map(page)
    shown(page).get_by_label("road").check()
    shown(page).get_by_role("button", name="Box").click()
    drag(page, stage, (0, 8.02), (16, 16))
    shown(page).get_by_label("tree").check()
    drag(page, stage, (4.02, 2.02), (8, 10))
    expected = np.zeros((SIDE, SIDE), np.uint8)
    expected[8:] = 1
    expected[2:10, 4:8] = 2
    assert np.array_equal(saved(page), expected)
    shown(page).get_by_label("Images").fill("2")
    shown(page).get_by_role("button", name="Draw", exact=True).click()
    expect(shown(page).locator(".gallery img")).to_have_count(2)
    shown(page).locator(".gallery .picture").nth(1).click()
    content = downloaded(page, page.get_by_role("button", name="Download"))
    drawn = studio.models.open(studio.all).mask_to_image(expected, num=2, seed=0)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), drawn.arrays[1])


def test_bucket_eraser_and_undo(page):
    stage = open_map(page)
    shown(page).get_by_role("button", name="Bucket").click()
    shown(page).get_by_label("tree").check()
    drag(page, stage, (3.5, 3.5), (3.5, 3.5))
    assert (saved(page) == 2).all()
    shown(page).get_by_role("button", name="Undo").click()
    assert (saved(page) == 0).all()
    shown(page).get_by_role("button", name="Eraser").click()
    shown(page).get_by_label("Brush size").fill("1")
    drag(page, stage, (5.5, 5.5), (5.5, 5.5))
    found = saved(page)
    assert found[5, 5] == 255 and (found != 0).sum() == 1


def test_a_map_of_indices_is_loaded(page, tmp_path):
    """A gray PNG of class indices, larger than the model's images."""
    map_ = np.random.default_rng(0).integers(0, 3, (24, 20), dtype=np.uint8)
    Image.fromarray(map_).save(file := tmp_path / "map.png")
    open_map(page)
    shown(page).locator("[data-takes=map] input").set_input_files(file)
    expect(shown(page).locator("canvas.paint")).to_have_attribute("width", "20")
    assert np.array_equal(saved(page), map_)


def test_a_map_of_other_classes_is_refused(page, tmp_path):
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(file := tmp_path / "other.png")
    open_map(page)
    shown(page).locator("[data-takes=map] input").set_input_files(file)
    expect(page.locator("#trouble")).to_contain_text("other.png")
    expect(page.locator("#trouble")).to_contain_text("9")


def test_a_map_is_painted_by_keyboard(page):
    """Arrow keys and Space on the map."""
    stage = open_map(page)
    shown(page).get_by_label("Brush size").fill("1")
    stage.focus()
    for _ in range(2):
        page.keyboard.press("Space")
        page.keyboard.press("Shift+ArrowRight")
    found = saved(page)
    assert np.argwhere(found == 1).tolist() == [[8, 8], [8, 9]]
    stage.focus()
    page.keyboard.press("z")
    assert np.argwhere(saved(page) == 1).tolist() == [[8, 8]]


def test_a_model_without_maps_says_so(page, studio):
    page.get_by_label("Model", exact=True).select_option(studio.other)
    page.get_by_role("tab", name="Paint a map").click()
    expect(shown(page).get_by_text("was not trained with semantic maps")).to_be_visible()
