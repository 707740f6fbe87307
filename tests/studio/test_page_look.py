"""How the page looks and is reached: narrow, dark, by keyboard alone."""

from __future__ import annotations

import pytest

from tests.studio.conftest import opened
from tests.studio.test_page_draw import shown

expect = pytest.importorskip("playwright.sync_api", reason="the tests of the page take playwright").expect

TABS = ("Draw", "Fill", "Paint a map", "Edit", "Compare", "Runs")

CONTRASTS = """() => {
    const light = ([r, g, b]) => {
        const linear = [r, g, b].map((v) => (v <= 10 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const known = {};
    const rgba = (text) => known[text] ||= read(text);
    const read = (text) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = text;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!own || !element.checkVisibility() || element.matches(":disabled, option, script, noscript")) continue;
        let under = element, ground = [255, 255, 255, 0];
        for (; under && ground[3] < 255; under = under.parentElement) {
            ground = rgba(getComputedStyle(under).backgroundColor);
        }
        const [one, other] = [light(rgba(getComputedStyle(element).color)), light(ground)].sort((a, b) => b - a);
        found.push([(one + 0.05) / (other + 0.05), element.tagName + ": " + element.textContent.trim().slice(0, 40)]);
    }
    return found;
}"""


@pytest.fixture
def phone(browser, studio):
    """The page on a telephone of 390 pixels."""
    yield from opened(browser, studio.address, viewport={"width": 390, "height": 844})


@pytest.mark.parametrize("tab", TABS)
def test_nothing_is_wider_than_a_telephone(phone, tab):
    phone.get_by_role("tab", name=tab).click()
    expect(shown(phone)).to_be_visible()
    assert phone.evaluate("document.scrollingElement.scrollWidth") <= 390
    wide = """[...document.querySelectorAll("body *")].filter((one) => one.checkVisibility()
        && one.getBoundingClientRect().right > 391 && !one.closest(".chips, .gallery, pre"))
        .map((one) => one.outerHTML.slice(0, 80))"""
    assert phone.evaluate(wide) == []


def test_pictures_and_their_requests_fit_a_telephone(phone):
    shown(phone).get_by_role("button", name="Draw", exact=True).click()
    expect(shown(phone).locator(".gallery img")).to_have_count(8)
    shown(phone).locator(".gallery .picture").first.click()
    expect(phone.locator("dialog dd").first).to_be_visible()
    box = phone.locator("dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert phone.evaluate("document.scrollingElement.scrollWidth") <= 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser, studio, scheme):
    """Every text has a contrast of 4.5 to what is below it, as WCAG 2.1 AA asks, in both colour schemes."""
    pages = opened(browser, studio.address, color_scheme=scheme)
    page = next(pages)
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        found = page.evaluate(CONTRASTS)
        assert len(found) > 8
        assert [text for contrast, text in found if contrast < 4.5] == [], tab
    next(pages, None)


def test_the_colours_can_be_chosen(page):
    page.get_by_label("Colours").select_option("dark")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(20, 24, 29)"
    page.reload()
    page.locator("body[data-ready]").wait_for()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(20, 24, 29)"


def focused(page) -> str:
    return page.evaluate(
        "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent.trim()"
    )


def press_until(page, key: str, reached: str, most: int = 60) -> None:
    for _ in range(most):
        page.keyboard.press(key)
        if focused(page).startswith(reached):
            return
    raise AssertionError(f"{key} does not lead to {reached}")


def test_a_picture_is_drawn_and_seen_by_keyboard_alone(page):
    """From the address bar to a picture's request and back, without a mouse."""
    press_until(page, "Tab", "Draw")
    page.keyboard.press("ArrowRight")
    assert focused(page) == "Fill"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # the first chip: no class
    press_until(page, "Tab", "Draw")
    page.keyboard.press("Enter")
    expect(shown(page).locator(".gallery img")).to_have_count(8)
    expect(shown(page).locator("figcaption").first).to_have_text("seed 0")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("dialog")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.locator("dialog dd").first).not_to_have_text("0")
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_be_hidden()


@pytest.mark.parametrize("tab", TABS)
def test_every_control_has_a_name(page, tab):
    page.get_by_role("tab", name=tab).click()
    nameless = """[...document.querySelector("[role=tabpanel]:not([hidden])").querySelectorAll(
        "input, select, button, [tabindex]")].filter((one) => {
        const named = one.getAttribute("aria-label") || one.labels?.length || one.textContent.trim() || one.title;
        return one.checkVisibility() && !named;
    }).map((one) => one.outerHTML)"""
    assert page.evaluate(nameless) == []
