"""Runs on the page: what their files say, also while they are written."""

from __future__ import annotations

import json
import os
import socket

import pytest

from latentflow.errors import ArtifactError
from latentflow.studio.page_app import opened_page
from latentflow.studio.page_models import PageModels
from latentflow.studio.run_view import MOST_POINTS, preview_file, run_facts
from tests import tiny
from tests.studio.browser import served
from tests.studio.conftest import opened, write_run
from tests.studio.test_page_draw import shown

expect = pytest.importorskip("playwright.sync_api", reason="the tests of the page take playwright").expect


def tiles(page) -> dict[str, str]:
    parts = shown(page).locator(".tiles div").all()
    return {part.locator("dt").inner_text(): part.locator("dd").inner_text() for part in parts}


def test_a_run_is_shown(page, studio):
    page.get_by_role("tab", name="Runs").click()
    expect(shown(page).locator(".tiles div")).to_have_count(8)
    found = tiles(page)
    assert found["step"] == "1,000 / 2,000"
    assert found["state"] == "stopped"
    assert found["loss"] == "1.05"
    assert found["held-out loss"] == "1.15"
    assert found["time left"] == "about 3 min 20 s"  # 1000 steps of 8 images at 40 images per second
    expect(shown(page).get_by_text("a run <b>of</b> tests")).to_be_visible()
    expect(shown(page).locator("svg.chart polyline")).to_have_count(5)  # loss, held-out loss; three by time
    shown(page).get_by_label("Preview by step").fill("0")
    expect(shown(page).locator(".film img")).to_have_attribute("alt", "step 500")
    width = "document.querySelector('.film img').naturalWidth"
    page.wait_for_timeout(200)
    assert page.evaluate(width) == 32


def test_the_newest_model_is_opened(page, studio):
    page.get_by_role("tab", name="Runs").click()
    shown(page).get_by_role("button", name="Open its newest model in Draw").click()
    expect(page.get_by_label("Model", exact=True)).to_have_value(studio.run)
    expect(page.get_by_role("tab", name="Draw")).to_have_attribute("aria-selected", "true")


def test_a_run_without_a_model_yet_is_watched(browser, tmp_path):
    write_run(tmp_path, steps=1000, logged=3)
    with opened_page(PageModels([str(tmp_path)], tiny.CPU)) as (app, _), served(app) as address:
        pages = opened(browser, address)
        page = next(pages)
        expect(page.locator("#trouble")).to_contain_text("there is no model yet")
        expect(shown(page).locator(".tiles div")).to_have_count(7)
        assert tiles(page)["step"] == "150 / 1,000"
        expect(shown(page).get_by_role("button", name="Open its newest model")).to_be_disabled()
        next(pages, None)


def test_a_dead_model_is_one_line_and_the_other_stays(page, studio):
    page.get_by_label("Model", exact=True).select_option(studio.dead)
    expect(page.locator("#trouble")).to_contain_text("velocity.safetensors")
    expect(page.get_by_label("Model", exact=True)).to_have_value(studio.all)
    shown(page).get_by_role("button", name="Draw", exact=True).click()
    expect(shown(page).locator(".gallery img")).to_have_count(8)


@pytest.fixture
def long_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder, steps=100_000, logged=1500)
    return folder


def test_long_curves_are_thinned_and_keep_their_ends(long_run):
    facts = run_facts(long_run)
    assert len(facts["loss"]) <= MOST_POINTS
    assert facts["loss"][-1][0] == 75_000
    mean = sum(value for _, value in facts["loss"]) / len(facts["loss"])
    assert mean == pytest.approx(1 + sum(1 / n for n in range(1, 1501)) / 1500, rel=1e-6)
    assert [one["step"] for one in facts["by_time"]] == [7500, 30_000, 75_000]
    assert len(facts["by_time"][0]["points"]) == 10


def test_a_line_that_is_being_written_is_left_out(long_run):
    whole = run_facts(long_run)
    with (long_run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 75050, "lo')
    assert run_facts(long_run) == whole
    with (long_run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('ss": null, "images_per_second": 40.0}\n')  # a loss that was not finite
    facts = run_facts(long_run)
    assert facts["step"] == 75_050 and facts["loss"] == whole["loss"]


def test_whether_a_run_trains_is_seen_by_its_lock(long_run):
    assert run_facts(long_run)["state"] == "stopped"
    lock = long_run / ".lock.0"
    lock.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
    facts = run_facts(long_run)
    assert facts["state"] == "training"
    assert facts["memory"] is None or facts["memory"] > 10 * 2**20
    lock.write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}), encoding="utf-8")
    assert run_facts(long_run)["state"] == "stopped"  # that process has gone
    lock.write_text(json.dumps({"pid": 2**22 + 1, "host": "another"}), encoding="utf-8")
    assert (run_facts(long_run)["state"], run_facts(long_run)["memory"]) == ("training", None)


def test_looking_at_a_run_changes_nothing(long_run):
    before = tiny.tree(long_run)
    run_facts(long_run)
    preview_file(long_run, 500)
    assert tiny.tree(long_run) == before
    with pytest.raises(ArtifactError, match="no preview of step 7"):
        preview_file(long_run, 7)
    with pytest.raises(ArtifactError, match=r"is .* a run folder"):
        run_facts(long_run / "samples")
