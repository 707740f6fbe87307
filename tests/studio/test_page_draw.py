"""Drawing on the page, as a person does it."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from latentflow.sampling.picture_file import read_facts
from latentflow.studio.page_models import PageModels
from tests import tiny
from tests.studio.browser import drop_file
from tests.studio.conftest import STRANGE

expect = pytest.importorskip("playwright.sync_api", reason="the tests of the page take playwright").expect


def shown(page):
    """The panel of the tab that is shown."""
    return page.locator("[role=tabpanel]:not([hidden])")


def draw(page, num: int) -> None:
    shown(page).get_by_label("Images").fill(str(num))
    shown(page).get_by_role("button", name="Draw", exact=True).click()
    expect(shown(page).locator(".gallery img")).to_have_count(num)


def downloaded(page, button) -> bytes:
    with page.expect_download() as waiting:
        button.click()
    return waiting.value.path().read_bytes()


def test_drawn_pictures_are_those_of_the_library(page, studio):
    """Class, seed and number as chosen; the file that is downloaded is what `LatentFlow.sample` draws."""
    shown(page).get_by_label("cherry").check()
    shown(page).get_by_label("Seed", exact=True).fill("7")
    draw(page, 3)
    expect(page.get_by_text("cherry, seed 9")).to_be_visible()
    shown(page).locator(".gallery .picture").nth(2).click()
    content = downloaded(page, page.get_by_role("button", name="Download"))
    facts = read_facts(content)
    assert (facts["seeds"], facts["class_name"], facts["evaluations"]) == ([9], "cherry", 4)
    drawn = studio.models.open(studio.all).sample(num=3, seed=7, classes="cherry", batch_size=4)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), drawn.arrays[2])


def test_a_dropped_picture_restores_its_request(page, studio, tmp_path):
    model = studio.models.open(studio.all)
    asked = {"seed": 11, "classes": ["apple"], "solver": "heun", "steps": 3, "guidance": 1.5}
    (file,) = model.sample(num=1, conditions={"age": 63, "view": "lateral"}, **asked).save(tmp_path)
    drop_file(page, file)
    expect(shown(page).get_by_label("Seed", exact=True)).to_have_value("11")
    expect(shown(page).get_by_label("Solver")).to_have_value("heun")
    expect(shown(page).get_by_label("Steps")).to_have_value("3")
    expect(shown(page).get_by_role("textbox", name="age")).to_have_value("63")
    expect(shown(page).get_by_label("lateral")).to_be_checked()
    shown(page).get_by_role("button", name="Draw", exact=True).click()
    shown(page).locator(".gallery .picture").first.click()
    content = downloaded(page, page.get_by_role("button", name="Download"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(Image.open(file)))


def test_a_dropped_picture_is_drawn_with_the_guide_of_then(page, studio, kl, tmp_path):
    """The guide is restored with the hash of its weights: one that was trained on is refused."""
    tiny.model(kl, seed=7).save_pretrained(tmp_path / "guide")
    model = studio.models.open(studio.all)
    (file,) = model.sample(num=1, seed=11, guidance=2, guide=str(tmp_path / "guide")).save(tmp_path)
    drop_file(page, file)
    expect(shown(page).get_by_label("Seed", exact=True)).to_have_value("11")
    shown(page).get_by_role("button", name="Draw", exact=True).click()
    shown(page).locator(".gallery .picture").first.click()
    content = downloaded(page, page.get_by_role("button", name="Download"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(Image.open(file)))
    page.get_by_role("button", name="Close").click()
    tiny.model(kl, seed=8).save_pretrained(tmp_path / "guide")
    model.guides.clear()  # as another start of the studio
    shown(page).get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator("body")).to_contain_text("not " + read_facts(file.read_bytes())["sampling"]["guide"]["weights"])
    shown(page).get_by_text("More settings").click()
    guide = shown(page).get_by_label("Guide away from the model")
    guide.fill("")
    guide.fill(str(tmp_path / "guide"))  # typed again: as it is now
    shown(page).get_by_role("button", name="Draw", exact=True).click()
    shown(page).locator(".gallery .picture").first.click()
    content = downloaded(page, page.get_by_role("button", name="Download"))
    assert not np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(Image.open(file)))


def test_a_picture_of_another_model_restores_its_class_by_name(page, kl, tmp_path):
    """The model is not here, and of this one the class has another place."""
    stranger = tiny.model(kl, class_names=("cherry", "date"), seed=9)
    (file,) = stranger.sample(num=1, seed=12, classes=["cherry"]).save(tmp_path)
    drop_file(page, file)
    expect(page.locator("#trouble")).to_contain_text("whose weights none of the opened models has")
    expect(shown(page).get_by_label("Seed", exact=True)).to_have_value("12")
    expect(shown(page).get_by_label("cherry")).to_be_checked()
    expect(shown(page).get_by_label("apple")).not_to_be_checked()


def test_a_picture_finds_its_model_by_name(studio, tmp_path):
    """Of several that the page was opened with, none of which is loaded yet."""
    models = PageModels([studio.other, studio.all], tiny.CPU)
    weights = studio.models.open(studio.all).weights_hash[:12]
    assert models.with_weights(weights) is None
    assert models.with_weights(weights, studio.other) is None  # it has other weights
    assert models.with_weights(weights, studio.all) == studio.all
    assert models.with_weights(weights) == studio.all
    assert models.with_weights("", studio.all) is None


def test_names_are_text(page):
    """The class whose name is HTML is shown as its name everywhere; the fixture looks for what its script would do."""
    shown(page).get_by_label(STRANGE).check()
    draw(page, 1)
    expect(page.locator("figcaption", has_text=STRANGE)).to_be_visible()
    shown(page).locator(".gallery .picture").first.click()
    expect(page.locator("dialog dd", has_text=STRANGE)).to_be_visible()


def test_vary_and_more_like_this_seed(page):
    draw(page, 2)
    shown(page).locator(".gallery .picture").nth(1).click()
    page.get_by_role("button", name="Vary").click()
    expect(shown(page).locator(".gallery img")).to_have_count(8)
    shown(page).locator(".gallery .picture").nth(3).click()
    page.get_by_role("button", name="Close").click()
    draw(page, 2)
    shown(page).locator(".gallery .picture").nth(1).click()
    page.get_by_role("button", name="More like this seed").click()
    expect(shown(page).get_by_label("Seed", exact=True)).to_have_value("1")
    expect(shown(page).get_by_label("locked")).to_be_checked()


def test_unlocked_seeds_move_on(page):
    shown(page).get_by_label("locked").uncheck()
    draw(page, 2)
    expect(shown(page).get_by_label("Seed", exact=True)).to_have_value("2")


def test_refusals_stand_where_they_belong(page):
    """What a model cannot do is said before anything is drawn, in the words of the command line."""
    shown(page).get_by_role("textbox", name="age").fill("old")
    expect(shown(page).locator(".cost")).to_contain_text("'old' is not a number")
    shown(page).get_by_role("button", name="Draw", exact=True).click()
    expect(shown(page).locator(".strip .trouble")).to_contain_text("'old' is not a number")


def test_a_long_job_is_stopped(page):
    """Within a batch of four pictures, of 20,000 network calls each; a slow browser may find the first one drawn."""
    shown(page).get_by_label("Steps").fill("10000")
    shown(page).get_by_role("button", name="Draw", exact=True).click()
    expect(shown(page).locator(".strip progress")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(shown(page).locator(".strip .words")).to_have_text(re.compile("stopped after [04] of 8"))
    shown(page).get_by_label("Steps").fill("2")
    draw(page, 1)


def test_a_wrong_upload_is_one_line(page, tmp_path):
    file = tmp_path / "notes<b>.png"
    file.write_bytes(b"not a picture at all")
    drop_file(page, file)
    expect(page.locator("#trouble")).to_contain_text("cannot be used")
    Image.new("RGB", (8, 8)).save(plain := tmp_path / "plain.png")
    drop_file(page, plain)
    expect(page.locator("#trouble")).to_contain_text("no request in it")


def test_the_other_model_can_be_chosen(page, studio):
    page.get_by_label("Model", exact=True).select_option(studio.other)
    expect(shown(page).get_by_role("textbox", name="age")).to_have_count(0)
    draw(page, 1)
