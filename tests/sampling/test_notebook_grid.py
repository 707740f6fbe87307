"""Drawn pictures in a notebook: what they show, in one line, as a PNG and as HTML."""

from __future__ import annotations

import io
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.sampling.drawing import Blend, Drawing
from latentflow.sampling.notebook_grid import MOST_SHOWN
from latentflow.sampling.samples import Samples

UGLY = '<script>alert("1")</script>'


def samples(num: int = 4, side: int = 8, names: tuple[str, ...] = ("cat", "dog"), **drawing) -> Samples:
    """Pictures of noise, of all classes in turn."""
    labels = {"labels": [row % len(names) for row in range(num)], "told": ["label"]} if names else {}
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num, 3, side, side), dtype=np.uint8))
    own = Drawing(**{"seeds": list(range(3, 3 + num)), **labels, **drawing})
    return Samples(pixels, torch.zeros(num, 4, 4, 4), torch.full((num,), 7), own, class_names=names)


class Seen(HTMLParser):
    """Tags, texts and attributes of HTML."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.texts, self.attributes = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append(dict(attributes))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def pictures(self) -> list[np.ndarray]:
        """What its images hold."""
        sources = [one["src"].removeprefix("data:image/png;base64,") for one in self.attributes if "src" in one]
        return [np.asarray(Image.open(io.BytesIO(b64decode(source)))) for source in sources]


def test_a_line_says_what_was_drawn():
    assert repr(samples()) == "Samples(4 images of 8 x 8 pixels: cat, dog; seeds 3 to 6)"
    assert repr(samples(1, names=())) == "Samples(1 image of 8 x 8 pixels; seed 3)"
    assert repr(samples(0)) == "Samples(0 images)"
    many = samples(300, names=tuple(f"class {number}\n" for number in range(300)))
    assert len(repr(many)) < 160
    assert "\n" not in repr(many)


def test_frames_between_two_classes_say_where_they_are():
    blends = [Blend(seed=seed, weight=weight, label=1) for seed, weight in ((5, 0.0), (5, 1 / 3))]
    made = samples(2, labels=[0, 0], seeds=[3, 3], blends=blends)
    assert made.captions == ["cat to dog at 0", "cat to dog at 0.333"]
    assert "seed 3 to 5 at 0.333" in made._repr_html_()


@pytest.mark.parametrize("names", [("cat", "dog"), ()])
def test_the_png_is_the_contact_sheet(names):
    sheet = Image.open(io.BytesIO(samples(4, 64, names)._repr_png_()))
    assert sheet.format == "PNG"
    columns = 2 if names else 4
    assert sheet.width == columns * 66 - 2
    assert sheet.height > 4 // columns * 64


def test_the_html_has_every_picture_with_its_captions():
    made = samples(4)
    seen = Seen(made._repr_html_())
    assert all(np.array_equal(a, b) for a, b in zip(seen.pictures, made.arrays, strict=True))
    assert [text for text in seen.texts if text in ("cat", "dog")] == ["cat", "dog"] * 2
    assert "seed 6" in seen.texts


def test_names_of_classes_are_text():
    seen = Seen(samples(2, names=(UGLY, '" onerror="x'))._repr_html_())
    assert UGLY in seen.texts
    assert set(seen.tags) == {"div", "figure", "img", "figcaption", "br"}
    assert {name for one in seen.attributes for name in one} == {"alt", "src", "style"}


def test_large_pictures_are_shrunk_and_many_are_cut():
    seen = Seen(samples(MOST_SHOWN + 5, names=())._repr_html_())
    assert len(seen.pictures) == MOST_SHOWN
    assert "and 5 more" in seen.texts
    large = samples(1, 600)
    assert Seen(large._repr_html_()).pictures[0].shape == (512, 512, 3)
    assert Image.open(io.BytesIO(large._repr_png_())).width == 512


def test_nothing_is_shown_of_nothing():
    assert samples(0)._repr_html_() is None
    assert samples(0)._repr_png_() is None
