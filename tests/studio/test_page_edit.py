"""Editing and comparing on the page, as a person does it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from latentflow import LatentFlow
from latentflow.model.guide_reference import GuideReference
from latentflow.sampling.picture_file import read_facts
from latentflow.studio.page_models import PageModels
from latentflow.studio.restored import restored_request
from tests import tiny
from tests.studio.browser import drop_file
from tests.studio.test_page_draw import downloaded, draw, shown

expect = pytest.importorskip("playwright.sync_api", reason="the tests of the page take playwright").expect


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := tmp_path / "image.png")
    return file


def open_edit(page, mode: str | None = None):
    page.get_by_role("tab", name="Edit").click()
    if mode:
        shown(page).get_by_label(mode).check()


def picture(page, number: int) -> bytes:
    shown(page).locator(".gallery .picture").nth(number).click()
    content = downloaded(page, page.get_by_role("button", name="Download"))
    page.get_by_role("button", name="Close").click()
    return content


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_an_image_is_redrawn(page, studio, image):
    open_edit(page)
    shown(page).get_by_role("button", name="Draw", exact=True).click()
    expect(shown(page).locator(".strip .trouble")).to_contain_text("give an image first")
    drop_file(page, image)  # anywhere: a picture without a request goes to the tab that is shown
    expect(shown(page).get_by_text("image.png, 20 x 24")).to_be_visible()
    shown(page).get_by_label("Strength as a number").fill("0.35")
    shown(page).get_by_role("button", name="Draw", exact=True).click()
    expect(shown(page).locator(".gallery img")).to_have_count(4)
    drawn = studio.models.open(studio.all).image_to_image(image, strength=0.35, num=4, batch_size=4)
    content = picture(page, 2)
    assert np.array_equal(pixels_of(content), drawn.arrays[2])
    drop_file(page, _file(image.parent / "again.png", content))
    expect(shown(page).get_by_label("Strength as a number")).to_have_value("0.35")
    expect(page.locator("#trouble")).to_contain_text("it was drawn from image image.png, which has to be given again")


def _file(file, content: bytes):
    file.write_bytes(content)
    return file


def test_frames_between_two_seeds_and_classes(page, studio):
    open_edit(page, "Between two seeds or classes")
    shown(page).get_by_label("cherry").check()
    shown(page).get_by_label("apple").check()
    shown(page).get_by_label("Frames").fill("5")
    shown(page).get_by_role("button", name="Draw", exact=True).click()
    expect(shown(page).locator(".gallery img")).to_have_count(5)
    shown(page).get_by_label("Frame", exact=True).fill("3")
    expect(shown(page).locator(".cinema figcaption")).to_contain_text("cherry to apple at 0.75")
    model = studio.models.open(studio.all)
    drawn = model.interpolate(seeds=(3, 8), classes=["cherry", "apple"], num=5, batch_size=4)
    assert np.array_equal(pixels_of(picture(page, 3)), drawn.arrays[3])


def test_an_image_is_inverted_and_drawn_as_another_class(page, studio, image):
    open_edit(page, "Invert an image")
    shown(page).locator("input[type=file]").first.set_input_files(image)
    shown(page).get_by_label("Steps").fill("4")
    shown(page).get_by_role("button", name="Invert", exact=True).click()
    expect(shown(page).locator(".numbers")).to_contain_text("PSNR of the autoencoder")
    model = studio.models.open(studio.all)
    found = model.invert(image, solver="heun", steps=4)
    trip = found.round_trip(model)
    assert np.array_equal(pixels_of(picture(page, 0)), trip.samples.arrays[0])
    expect(shown(page).locator(".numbers")).to_contain_text(f"{trip.image_psnr:.2f}"[:4])
    shown(page).locator(".numbers").get_by_label("cherry").check()
    shown(page).locator(".numbers").get_by_role("button", name="Draw").click()
    expect(shown(page).locator(".gallery img")).to_have_count(2)
    again = model.sample(noise=found.noise, classes="cherry", guidance=1, solver="heun", steps=4)
    assert np.array_equal(pixels_of(picture(page, 1)), again.arrays[0])


def test_a_model_of_paired_images_draws_from_one(page, studio, tmp_path):
    """Without an image it says what it needs; with one it draws what the library draws."""
    page.get_by_label("Model", exact=True).select_option(studio.sharp)
    expect(page.locator("#panel-draw .cost")).to_contain_text("input")
    open_edit(page, "Draw from a paired image")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := tmp_path / "small.png")
    shown(page).locator("input[type=file]").first.set_input_files(file)
    shown(page).get_by_label("Images").fill("2")
    shown(page).get_by_role("button", name="Draw", exact=True).click()
    expect(shown(page).locator(".gallery img")).to_have_count(2)
    drawn = studio.models.open(studio.sharp).translate(file, num=2)
    assert np.array_equal(pixels_of(picture(page, 1)), drawn.arrays[1])


def test_a_picture_is_used_as_input(page):
    draw(page, 1)
    shown(page).locator(".gallery .picture").first.click()
    page.get_by_role("button", name="Use as input").click()
    expect(shown(page).get_by_text("apple_seed-00000000.png, 16 x 16")).to_be_visible()
    page.get_by_role("tab", name="Fill").click()
    expect(shown(page).locator("canvas.paint")).to_have_attribute("width", "16")


def test_two_models_draw_the_same_seeds(page, studio):
    """Time and evaluations stand under each; a solver of one row leaves the other as it is."""
    page.get_by_role("tab", name="Compare").click()
    rows = shown(page).locator(".side")
    expect(rows).to_have_count(2)
    expect(rows.nth(1).get_by_label("Model of this row")).to_have_value(studio.other)
    rows.nth(1).locator("summary").first.click()
    rows.nth(1).get_by_label("Steps").fill("3")
    shown(page).get_by_label("Images").fill("2")
    shown(page).get_by_role("button", name="Draw all rows").click()
    expect(shown(page).locator(".gallery img")).to_have_count(4)
    expect(rows.nth(0).locator(".cost")).to_contain_text("4 evaluations and")  # two steps with guidance
    expect(rows.nth(1).locator(".cost")).to_contain_text("3 evaluations and")
    rows.nth(1).locator(".gallery .picture").nth(1).click()
    content = downloaded(page, page.get_by_role("button", name="Download"))
    drawn = studio.models.open(studio.other).sample(num=2, steps=3, batch_size=4)
    assert np.array_equal(pixels_of(content), drawn.arrays[1])


def test_rows_come_and_go(page):
    page.get_by_role("tab", name="Compare").click()
    for _ in range(2):
        shown(page).get_by_role("button", name="Add a row").click()
    expect(shown(page).locator(".side")).to_have_count(4)
    expect(shown(page).get_by_role("button", name="Add a row")).to_be_hidden()
    shown(page).get_by_role("button", name="Remove").first.click()
    expect(shown(page).locator(".side")).to_have_count(3)


def request_of(samples, row: int) -> dict:
    return restored_request(read_facts(samples.png(row)))


def test_requests_are_restored_from_metadata(studio):
    """Drawing what was restored gives the picture again."""
    model = studio.models.open(studio.all)
    given = {"solver": "heun", "steps": 3, "guidance": 1.5, "guidance_interval": (0.2, 0.9), "conditions": {"age": 63}}
    near = model.vary(seed=4, amount=0.2, num=3, **given)
    found = request_of(near, 2)
    assert (found["task"], found["request"]["num"], found["request"]["amount"]) == ("vary", 3, 0.2)
    assert np.array_equal(model.vary(**found["request"]).arrays[2], near.arrays[2])
    between = model.interpolate(seeds=(1, 2), classes=["apple", "cherry"], num=5, conditions={"view": "lateral"})
    found = request_of(between, 1)
    assert found["request"]["seeds"] == [1, 2] and found["request"]["num"] == 9
    assert np.array_equal(model.interpolate(**found["request"]).arrays[2], between.arrays[1])
    drawn = model.sample(num=1, seed=9, classes=[])
    assert request_of(drawn, 0)["request"]["classes"] == []
    assert np.array_equal(model.sample(**request_of(drawn, 0)["request"]).arrays[0], drawn.arrays[0])


def test_a_picture_without_a_guide_stays_without_one(kl):
    """Although the preset of its model names one."""
    guided = tiny.model(kl, guidance=2.0)
    preset = guided.config.sampling.model_copy(update={"guide": GuideReference(model="@1/8")})
    config = guided.config.model_copy(update={"sampling": preset})
    drawn = LatentFlow(config, guided.network, kl).sample(num=1, guide="none")
    found = request_of(drawn, 0)["request"]
    assert found["guide"] == "none"
    assert np.array_equal(LatentFlow(config, guided.network, kl).sample(**found).arrays[0], drawn.arrays[0])


def test_models_with_adapters_are_compared(other_model, tmp_path):
    """A model, the same with an adapter, and with half of it: three choices, three pictures."""
    tiny.finetuned(other_model, ("apple", "berry")).save_pretrained(tmp_path / "tuned")
    names = [str(other_model), *(f"{other_model}+{tmp_path / 'tuned'}{strength}" for strength in ("", ":0.5"))]
    models = PageModels(names, tiny.CPU)
    assert [one.key for one in models.choices()] == names
    drawn = [models.open(name).sample(num=1, classes="apple").arrays[0] for name in names]
    assert not any(np.array_equal(drawn[one], drawn[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
