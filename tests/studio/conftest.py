"""One browser, one server and one model with every condition, for all tests of the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from latentflow.data.painting.input_rules import InputRules
from latentflow.model.conditioning import ColumnCondition
from tests import tiny
from tests.studio.browser import WAIT, chromium, served

STRANGE = '<img src=x onerror="document.body.dataset.broken=1">'
"""A class whose name would be a script, did it enter a page as HTML."""

COLUMNS = [
    ColumnCondition(name="age", kind="number", dropout=0.1, mean=40.0, deviation=10.0, low=18.0, high=90.0),
    ColumnCondition(name="view", kind="label", class_names=["frontal", "lateral"], dropout=0.1),
]


@pytest.fixture(scope="session")
def all_conditions(tmp_path_factory, kl) -> Path:
    """The folder of a model with classes, named conditions, maps and holes."""
    folder = tmp_path_factory.mktemp("models") / "all"
    conditioning = {**tiny.SPATIAL, "inpainting_dropout": 0.9, "map_dropout": 0.9, "columns": COLUMNS}
    names = ("apple", STRANGE, "cherry")
    tiny.model(kl, class_names=names, conditioning=conditioning, guidance=2.0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory, kl) -> Path:
    """The folder of another model, of the same classes and without other conditions."""
    folder = tmp_path_factory.mktemp("models") / "other"
    tiny.model(kl, class_names=("apple", STRANGE, "cherry"), seed=5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharp(tmp_path_factory, kl) -> Path:
    """The folder of a model that draws from small images, and from nothing else."""
    folder = tmp_path_factory.mktemp("models") / "sharp"
    conditioning = {"input_dropout": 0.0}
    tiny.model(kl, inputs=InputRules(origin="shrink:4"), conditioning=conditioning).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, other_model) -> Path:
    """The folder of a run half way, with a model."""
    folder = tmp_path_factory.mktemp("runs") / "half"
    shutil.copytree(other_model, folder / "model")
    write_run(folder, steps=2000, logged=20)
    return folder


@pytest.fixture(scope="session")
def dead_run(tmp_path_factory, other_model) -> Path:
    """The folder of a run whose model lacks most of its weights."""
    folder = tmp_path_factory.mktemp("runs") / "dead"
    shutil.copytree(other_model, folder / "model")
    weights = folder / "model" / "velocity.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    write_run(folder, steps=100, logged=0)
    return folder


def write_run(folder: Path, *, steps: int, logged: int) -> None:
    """The files of a run that logs every 50 steps, with falling losses."""
    recipe = f"description: a run <b>of</b> tests\ntraining: {{steps: {steps}, batch_size: 8}}\n"
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (folder / "environment.json").write_text('{"device": "cpu"}', encoding="utf-8")
    lines = []
    for number in range(1, logged + 1):
        bins = {f"{n / 10:.1f}-{(n + 1) / 10:.1f}": 1 / number + n / 10 for n in range(10)}
        line = {"step": 50 * number, "loss": 1 + 1 / number, "loss_by_time": bins, "images_per_second": 40.0}
        lines.append(line | ({"held_out_loss": 1.1 + 1 / number} if number % 5 == 0 else {}))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    (folder / "samples").mkdir()
    for step in range(500, 50 * logged + 1, 500):
        Image.new("RGB", (32, 32), (step % 256, 90, 30)).save(folder / "samples" / f"step-{step:08d}.png")


@pytest.fixture(scope="session")
def studio(all_conditions, other_model, sharp, run, dead_run) -> Iterator[SimpleNamespace]:
    """A page that is served: its `address`, its `models`, and the names of those."""
    pytest.importorskip("uvicorn", reason="the page takes the extra studio")
    from latentflow.studio.page_app import opened_page
    from latentflow.studio.page_models import PageModels

    names = {"all": all_conditions, "other": other_model, "sharp": sharp, "run": run, "dead": dead_run}
    names = {name: str(place) for name, place in names.items()}
    models = PageModels(list(names.values()), tiny.CPU)
    with opened_page(models) as (app, _), served(app) as address:
        yield SimpleNamespace(address=address, models=models, **names)


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """Chromium, started once."""
    api = pytest.importorskip("playwright.sync_api", reason="the tests of the page take playwright")
    place = chromium()
    api.expect.set_options(timeout=WAIT)
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser, studio) -> Iterator[object]:
    """The page in a browser of its own, at 1280 x 900 pixels; a script that fails fails the test."""
    yield from opened(browser, studio.address)


def opened(browser, address: str, **context: object) -> Iterator[object]:
    """A page in a new context; afterwards no script has failed, and nothing was asked of another machine."""
    own = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "accept_downloads": True, **context})
    page, failed, asked = own.new_page(), [], []
    page.set_default_timeout(WAIT)
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.locator("body[data-ready]").wait_for()
    yield page
    assert failed == []
    assert [url for url in asked if not url.startswith((address, "blob:", "data:"))] == []
    assert page.locator("body[data-broken]").count() == 0
    own.close()
