"""Inpainting: the known part stays to the bit, the hole hides what it covers, the model sees what it learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from latentflow.api import LatentFlow
from latentflow.autoencoder import to_uint8
from latentflow.data.batches import SpatialData, TrainingImages
from latentflow.data.items import UNLABELLED
from latentflow.data.painting.latent_size import HOLE_GRAY, class_counts, shares
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.painting.masks import draw_mask
from latentflow.data.painting.semantic_maps import colour_map
from latentflow.data.pictures.colour import to_rgb
from latentflow.data.pictures.orientation import turned
from latentflow.data.sources.images import open_images
from latentflow.errors import ConfigError, DataError
from latentflow.flow.solvers import is_adaptive
from latentflow.flow.times import TrainingTimes
from latentflow.model.conditioning import CONDITION_NAMES
from latentflow.randomness import derive_seed
from latentflow.sampling.frame import Frame, choose_frame
from latentflow.sampling.inpaint import inpaint
from latentflow.sampling.request import Fit, InpaintRequest, Method
from latentflow.shapes import Condition
from latentflow.training.step import training_step
from tests import tiny
from tests.profiles import DISPLAY_P3, rgb_profile

SIZE = tiny.IMAGE_SIZE
MULTIPLE = tiny.FACTOR * tiny.RECIPE["network"]["patch_size"]
TOLD = {"condition": ["inpainting"], "replacement": []}


class Attentive(LatentFlow):
    """A model that records its condition."""

    def velocity(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.conditions.append(condition)
        return super().velocity(latents, time, condition)


@pytest.fixture(scope="module")
def model(kl) -> Attentive:
    """A model conditioned on labels, the known part, and maps."""
    made = tiny.model(kl, conditioning=tiny.SPATIAL, time_scale=20.0)
    attentive = Attentive(made.config, made.network, made.autoencoder)
    attentive.conditions = []
    return attentive


@pytest.fixture(scope="module")
def plain(kl) -> LatentFlow:
    """A model conditioned on labels only."""
    return tiny.model(kl, time_scale=20.0)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image without two equal neighbours."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def scene(height: int, width: int) -> np.ndarray:
    """A smooth image."""
    rows, columns = np.mgrid[:height, :width]
    channels = 60 + 120 * rows / height, 200 - 100 * columns / width, 90 + 60 * (rows + columns) / (height + width)
    return np.stack(channels, -1).astype(np.uint8)


def box(height: int, width: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def middle(height: int, width: int) -> np.ndarray:
    """A hole of about a third of each side."""
    return box(height, width, height // 3, width // 3, max(2 * height // 3, 1), max(2 * width // 3, 1))


def pixels_of(samples) -> np.ndarray:
    return samples.pixels.permute(0, 2, 3, 1).numpy()


def images_of(*arrays: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(array) for array in arrays]


# What is known stays


def alpha_of(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(5).choice([0, 90, 255], size).astype(np.uint8)


FORMS = {
    "RGB": ("RGB", lambda rgb: Image.fromarray(rgb)),
    "RGBA": ("RGBA", lambda rgb: Image.fromarray(np.dstack([rgb, alpha_of(rgb.shape[:2])]))),
    "gray": ("L", lambda rgb: Image.fromarray(rgb[..., 0])),
    "gray and alpha": ("LA", lambda rgb: Image.fromarray(np.dstack([rgb[..., 0], alpha_of(rgb.shape[:2])]))),
    "16-bit gray": ("I;16", lambda rgb: Image.fromarray(rgb[..., 0].astype(np.uint16) * 256 + rgb[..., 1])),
    "palette": ("RGB", lambda rgb: Image.fromarray(rgb).quantize(16)),
    "1 bit": ("L", lambda rgb: Image.fromarray(rgb[..., 0] > 99)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("profile", [None, rgb_profile(DISPLAY_P3, 2.2)], ids=["sRGB", "Display P3"])
@pytest.mark.parametrize("feather", [0, 3])
def test_files_keep_the_form_of_the_image_and_its_known_numbers(model, tmp_path, form, profile, feather):
    mode, make = FORMS[form]
    image, mask = make(scene(23, 41)), middle(23, 41)
    image.save(tmp_path / "in.png", icc_profile=profile)
    result = model.inpaint(tmp_path / "in.png", mask, feather=feather, num=2)
    seen = np.asarray(to_rgb(Image.open(tmp_path / "in.png")))
    assert (pixels_of(result) == seen)[:, mask == 0].all()  # in memory: 8-bit sRGB, on white
    for row, file in enumerate(result.save_as(tmp_path / "out.png")):
        with Image.open(file) as saved:
            assert (saved.mode, saved.info.get("icc_profile")) == (mode, profile)
            numbers, expected = np.asarray(saved), np.asarray(image.convert(mode) if mode != "I;16" else image)
            assert np.array_equal(numbers[mask == 0], expected[mask == 0])
            if saved.mode.endswith("A"):
                assert (numbers[..., -1][mask == 1] == 255).all()
            shown = np.asarray(to_rgb(saved)).astype(int)
        painted = pixels_of(result)[row]
        if mode in ("RGB", "RGBA"):
            assert np.abs(shown - painted)[mask == 1].max() <= (4 if profile else 0)
        else:
            gray = np.asarray(Image.fromarray(painted).convert("L"))
            assert np.abs(shown - gray[..., None])[mask == 1].max() <= (2 if profile else 0)


@pytest.mark.parametrize(
    "image, kind, conditions",
    [
        (Image.new("CMYK", (41, 23), (9, 80, 120, 30)), "JPEG", "its CMYK colours"),
        (Image.new("RGB", (41, 23), (9, 80, 120)), "PNG", ""),
    ],
)
def test_what_a_png_cannot_keep_is_announced(model, tmp_path, caplog, monkeypatch, image, kind, conditions):
    monkeypatch.setattr("latentflow.console._printed", set())
    image.save(tmp_path / "in", kind)
    model.inpaint(tmp_path / "in", middle(23, 41))
    messages = [record.message for record in caplog.records if "does not keep" in record.message]
    assert messages == ([f"the result does not keep all of {tmp_path / 'in'}: {conditions}"] if conditions else [])


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_turned_photos_with_masks_and_maps_of_either_kind(model, tmp_path, turn, suffix):
    """Masks and maps of the upright picture and of the stored pixels, by size or by an orientation of their own."""
    exif = Image.Exif()
    exif[0x0112] = turn
    stored, hole = scene(20, 32), box(20, 32, 4, 6, 9, 20)
    indices = np.random.default_rng(0).integers(0, 3, (20, 32), np.uint8)
    options = {"tiffinfo": {0x0112: turn}} if suffix == "tif" else {"exif": exif}
    Image.fromarray(stored).save(tmp_path / f"in.{suffix}", **options)
    seen = np.asarray(to_rgb(Image.open(tmp_path / f"in.{suffix}")))
    results = []
    for kind in ("stored", "upright"):
        exif[0x0112] = turn if kind == "stored" else 1
        own = {"exif": exif} if turn in (2, 3, 4) else {}
        pictures = {"mask": hole * 255, "map": indices}
        for name, pixels in pictures.items():
            pixels = turned(pixels, turn) if kind == "upright" else pixels
            Image.fromarray(pixels).save(tmp_path / f"{name}.png", **own)
        result = model.inpaint(tmp_path / f"in.{suffix}", tmp_path / "mask.png", semantic_map=tmp_path / "map.png")
        changed = (pixels_of(result)[0] != seen).any(-1)
        assert not changed[turned(hole, turn) == 0].any() and changed[turned(hole, turn) == 1].mean() > 0.5
        (file,) = result.save_as(tmp_path / "out.png")
        with Image.open(file) as saved:
            assert 0x0112 not in saved.getexif() and np.array_equal(np.asarray(saved), pixels_of(result)[0])
        results.append(result.pixels)
    assert torch.equal(*results)


def test_what_fits_a_turned_photo_both_ways_is_refused(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(scene(20, 32)).save(tmp_path / "in.png", exif=exif)
    hole, either = box(20, 32, 4, 6, 9, 20), box(20, 32, 4, 6, 16, 26)
    with pytest.raises(DataError, match=r"the mask may match its image as shown or .* orientation 3\)"):
        model.inpaint(tmp_path / "in.png", hole)
    with pytest.raises(DataError, match="the semantic map may match its image as shown or"):
        model.inpaint(tmp_path / "in.png", either, semantic_map=hole)


SIZES = [(9, 7), (16, 16), (20, 16), (23, 41), (48, 48), (44, 36), (20, 52)]


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("feather", [0, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_known_pixels_stay_to_the_bit(model, size, feather, method):
    image, mask = picture(*size), middle(*size)
    fits = ["window", "whole"] + (["native"] if size[0] % MULTIPLE == size[1] % MULTIPLE == 0 else [])
    for fit in fits:
        result = model.inpaint(image, mask, fit=fit, feather=feather, method=method, num=2)
        assert result.pixels.dtype == torch.uint8
        filled = pixels_of(result)
        assert filled.shape == (2, *size, 3)
        assert (filled == image)[:, mask == 0].all()
        assert (filled != image)[:, mask == 1].mean() > 0.5


@settings(max_examples=25, deadline=None)
@given(height=st.integers(4, 50), width=st.integers(4, 50), seed=st.integers(0, 10**6), feather=st.integers(0, 5))
def test_known_pixels_stay_for_any_hole(model, height, width, seed, feather):
    mask = draw_mask(MaskRules(most_share=0.5), height, width, seed)
    image = picture(height, width, seed)
    try:
        result = model.inpaint(image, mask, feather=feather)
    except DataError as error:  # of few pixels with holes all over, nothing may be left
        assert "the mask covers the whole image" in str(error)
        return
    assert (pixels_of(result)[0] == image)[mask == 0].all()


def test_what_was_drawn_is_pasted_where_nothing_is_scaled(model):
    image, mask = picture(SIZE, SIZE), middle(SIZE, SIZE)
    result = model.inpaint(image, mask)
    drawn = to_uint8(model.decode(result.latents))[0].permute(1, 2, 0).numpy()
    assert (pixels_of(result)[0] == np.where(mask[..., None] == 1, drawn, image)).all()
    assert result.drawing.image_size == (SIZE, SIZE)


def test_replacement_follows_the_path_to_the_known_image(plain):
    """At its end, where sigma_min = 1e-5 of the noise is left, latents outside the hole are those of the image."""
    image, mask = picture(24, 24), box(24, 24, 6, 8, 14, 18)
    frame = choose_frame(plain, mask, "native")
    seen, _ = frame.cut(image, mask)
    result = plain.inpaint(image, mask, fit="native")
    known = plain.encode(torch.from_numpy(seen).permute(2, 0, 1)[None] / 127.5 - 1)
    outside = torch.ones(12, 12, dtype=torch.bool)
    outside[3:7, 4:9] = False
    torch.testing.assert_close(result.latents[0][:, outside], known[0][:, outside], atol=1e-4, rtol=0)
    assert ((result.latents - known).abs().amax(1)[0] > 1e-2)[~outside].all()


# What the model sees


@settings(max_examples=200, deadline=None)
@given(data=st.data(), height=st.integers(2, 90), width=st.integers(2, 90))
def test_the_window_is_a_square_around_the_hole(plain, data, height, width):
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    mask = box(height, width, top, left, bottom, right)
    if mask.all():
        return
    frame, shorter, extent = choose_frame(plain, mask), min(height, width), max(bottom - top, right - left)
    x0, y0, x1, y1 = frame.box
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    assert x0 <= left < right <= x1
    assert y0 <= top < bottom <= y1
    sides_seen = (x0 == 0 or x0 < left, y0 == 0 or y0 < top, x1 == width or x1 > right, y1 == height or y1 > bottom)
    assert all(sides_seen), "what adjoins the hole is seen"
    assert not mask[y0:y1, x0:x1].all()
    if frame.size == (SIZE, SIZE) and x1 - x0 == y1 - y0:
        assert x1 - x0 == min(max(2 * extent, SIZE), shorter)
    else:
        assert extent >= shorter - 1
        assert frame.box == (0, 0, width, height)
        with pytest.raises(ConfigError, match="whole"):
            choose_frame(plain, mask, "window")


@pytest.mark.parametrize(
    ("size", "hole", "frame"),
    [
        ((100, 150), (40, 60, 44, 64), (54, 34, 70, 50)),  # a small hole: the training size, not scaled
        ((100, 150), (40, 60, 60, 64), (42, 30, 82, 70)),  # as much context as hole
        ((100, 150), (99, 149, 100, 150), (134, 84, 150, 100)),  # one pixel in the corner
        ((100, 150), (0, 10, 80, 90), (0, 0, 100, 100)),  # no more room than the image's height
        ((100, 150), (0, 70, 100, 90), (30, 0, 130, 100)),  # as tall as the image
        ((10, 12), (4, 4, 6, 6), (0, 0, 10, 10)),  # an image that is less than the training size
    ],
)
def test_windows(plain, size, hole, frame):
    assert choose_frame(plain, box(*size, *hole)) == Frame(frame, (SIZE, SIZE))


@pytest.mark.parametrize(
    "hole",
    [
        (40, 0, 60, 150),  # as wide as the image
        (0, 20, 100, 120),  # a square as tall as the image
        (40, 20, 60, 120),  # a square would end where the hole ends
        (40, 20, 60, 119),
    ],
)
def test_a_hole_that_leaves_no_window_room_is_seen_with_the_whole_image(plain, hole):
    mask = box(100, 150, *hole)
    assert choose_frame(plain, mask) == Frame((0, 0, 150, 100), (16, 24))
    with pytest.raises(ConfigError, match="fit 'window'"):
        choose_frame(plain, mask, "window")


@given(height=st.integers(2, 300), width=st.integers(2, 300))
@settings(max_examples=60, deadline=None)
def test_the_whole_image_is_seen_in_multiples_near_its_shape(plain, height, width):
    frame = choose_frame(plain, box(height, width, 0, 0, 1, 1), "whole")
    assert frame.box == (0, 0, width, height)
    assert min(frame.size) == SIZE
    for side, seen in zip((height, width), frame.size, strict=True):
        assert seen % MULTIPLE == 0
        assert abs(seen - SIZE * side / min(height, width)) <= MULTIPLE / 2


def test_native_is_the_image_as_it_is(plain):
    assert choose_frame(plain, middle(20, 28), "native") == Frame((0, 0, 28, 20), (20, 28))
    with pytest.raises(ConfigError, match=r"27 x 20 pixels .* multiples of 4; resize to 28 x 20"):
        choose_frame(plain, middle(20, 27), "native")


def test_no_thin_stroke_vanishes():
    """Every single pixel of a row, at every size that a row may be scaled to; row i has its hole at column i."""
    for width in [*range(1, 40), 134, 136, 137, 480]:  # 134, 136, 137: where a filter in floating point loses one
        image, holes = np.zeros((width, width, 3), np.uint8), np.eye(width, dtype=np.uint8)
        for seen_width in (4, 16, 48, 80, 96):
            _, seen = Frame((0, 0, width, width), (width, seen_width)).cut(image, holes)
            columns = np.arange(width)[:, None]
            first, behind = columns * seen_width // width, -(-(columns + 1) * seen_width // width)
            wanted = (np.arange(seen_width) >= first) & (np.arange(seen_width) < behind)
            assert (seen == wanted).all(), (width, seen_width)
            assert seen.any(1).all()


def test_a_hairline_on_a_large_image_is_part_of_the_mask(model):
    image, mask = picture(300, 300), np.zeros((300, 300), np.uint8)
    np.fill_diagonal(mask, 1)
    mask[200, :] = 1
    model.conditions.clear()
    result = model.inpaint(image, mask)
    assert (pixels_of(result)[0] == image)[mask == 0].all()
    conditions = model.conditions[0].mask[0, 0]
    assert (conditions.diagonal() > 0).all()
    assert (conditions[200 * 8 // 300] > 0).all()


def test_scaling_keeps_plain_colours_plain():
    """Neither gray of the hole nor ringing around it: colours are weighted by what is known."""
    colour = np.array([250, 3, 128], np.uint8)
    image = np.broadcast_to(colour, (45, 37, 3)).copy()
    for seed in range(10):
        mask = draw_mask(MaskRules(), 45, 37, seed)
        for size in ((16, 16), (12, 40), (90, 80), (45, 37)):
            seen, hole = Frame((0, 0, 37, 45), size).cut(np.where(mask[..., None] == 1, 77, image), mask)
            assert (seen[hole == 0] == colour).all()
            assert (seen[hole == 1] == HOLE_GRAY).all()


def test_scaling_is_bicubic_far_from_the_hole():
    image, mask = picture(40, 60), box(40, 60, 0, 0, 4, 4)
    seen, _ = Frame((0, 0, 60, 40), (16, 24)).cut(image, mask)
    plain = np.asarray(Image.fromarray(image).resize((24, 16), Image.Resampling.BICUBIC)).astype(int)
    assert abs(seen.astype(int) - plain)[8:, 8:].max() <= 1  # rounded once, and not after each axis


def test_the_condition_is_that_of_training(model, segmented):
    """The batch that training would make of the same image, hole and map; equal to the bit."""
    source, rules, seed = open_images(segmented, SIZE), MaskRules(), 5
    spatial = SpatialData(factor=tiny.FACTOR, holes=rules, maps=True)
    stream = TrainingImages(source, seed=seed, flip=False, spatial=spatial)
    for position in range(4):
        batch = stream.__getitems__([position])
        in_training = []

        def network(x, t, condition, seen=in_training):
            seen.append(condition)
            return torch.zeros_like(x)

        training_step(
            model,
            network,
            batch,
            times=TrainingTimes(),
            batch_size=1,
            seed=seed,
            conditions=CONDITION_NAMES,
        )
        item = source[int(batch.indices[0])]
        mask = draw_mask(rules, SIZE, SIZE, derive_seed(seed, "mask", position))
        model.conditions.clear()
        model.inpaint(item.pixels, mask, classes=[item.label], semantic_map=item.semantic_map, fit="native")
        assert in_training[0].names == ["labels", "masked_latents", "mask", "class_fractions"]
        for name in in_training[0].names:
            assert torch.equal(getattr(model.conditions[0], name), getattr(in_training[0], name)), name


def test_the_map_is_seen_through_the_same_frame(model):
    """Each class of the map stands where its colour stands in the image."""
    height, width = 60, 100
    indices = np.full((height, width), UNLABELLED, np.uint8)
    indices[:, 30:60], indices[20:40, 60:] = 1, 2
    mask = box(height, width, 25, 45, 35, 60)
    for fit in ("window", "whole"):
        frame = choose_frame(model, mask, fit)
        left, top, right, bottom = frame.box
        rows = (top + (np.arange(frame.size[0]) + 0.5) * (bottom - top) / frame.size[0]).astype(int)
        columns = (left + (np.arange(frame.size[1]) + 0.5) * (right - left) / frame.size[1]).astype(int)
        wanted = shares(class_counts(indices[rows][:, columns], 3, tiny.FACTOR), tiny.FACTOR)
        for given_map in (indices, Image.fromarray(indices), Image.fromarray(colour_map(indices, tiny.MAP_PALETTE))):
            model.conditions.clear()
            model.inpaint(scene(height, width), mask, fit=fit, semantic_map=given_map)
            assert torch.equal(model.conditions[0].class_fractions[0], wanted)
        assert wanted.sum(0).min() == 0  # unlabelled pixels


# Nothing of what the hole covers is used


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("feather", [0, 4])
@pytest.mark.parametrize("size", [(16, 16), (40, 40), (13, 11), (37, 90), (44, 36)], ids=str)
def test_the_hole_hides_what_it_covers(model, size, feather, method):
    image, other, mask = picture(*size), picture(*size, seed=1), middle(*size)
    other = np.where(mask[..., None] == 1, other, image)
    assert (image != other)[mask == 1].mean() > 0.9
    fits = [fit for fit in get_args(Fit) if fit != "native" or size[0] % MULTIPLE == size[1] % MULTIPLE == 0]
    for fit in fits:
        results = [model.inpaint(x, mask, fit=fit, feather=feather, method=method) for x in (image, other)]
        assert torch.equal(results[0].pixels, results[1].pixels)
        assert torch.equal(results[0].latents, results[1].latents)


# Feather


def across_the_border(image: np.ndarray) -> float:
    """Mean difference of neighbours across the border of `middle(48, 48)`."""
    x = image.astype(float)
    pairs = [(x[16, 16:32], x[15, 16:32]), (x[31, 16:32], x[32, 16:32])]
    pairs += [(x[16:32, 16], x[16:32, 15]), (x[16:32, 31], x[16:32, 32])]
    return float(np.mean([abs(inside - outside).mean() for inside, outside in pairs]))


@pytest.mark.parametrize("method", get_args(Method))
def test_feather_closes_the_seam_and_stays_in_its_band(model, method):
    image, mask, feather = scene(48, 48), middle(48, 48), 5
    sharp, soft = (pixels_of(model.inpaint(image, mask, method=method, feather=f))[0] for f in (0, feather))
    assert across_the_border(image) < 4
    assert across_the_border(soft) < 0.8 * across_the_border(sharp)  # random weights draw noise, which stays
    deep = box(48, 48, 16 + feather, 16 + feather, 32 - feather, 32 - feather)
    assert (soft == sharp)[deep == 1].all()
    ring = box(48, 48, 17, 17, 31, 31) == 0
    assert (soft != sharp)[ring & (mask == 1)].mean() > 0.5


@pytest.mark.parametrize("feather", [1, 2, 3, 7, 8])
def test_the_band_is_as_wide_as_it_is_called(feather):
    """A hole to the right of column 19, in a picture that came out 100 levels too bright."""
    image, mask = np.full((30, 50, 3), 50, np.uint8), box(30, 50, 0, 20, 30, 50)
    pasted = Frame((0, 0, 50, 30), (30, 50)).paste(image + 100, image, mask, feather)
    assert (pasted == pasted[:1, :, :1]).all()
    row = pasted[0, :, 0].astype(int)
    assert (row[:20] == 50).all()
    assert (row[20 + feather :] == 150).all()
    assert (row[20 : 20 + feather] < 150).all()
    assert (np.diff(row) >= 0).all()
    assert row[20] - 50 <= 100 / (feather + 1) ** 0.5


def test_a_right_picture_needs_no_feather():
    """Where the known part comes out as it is, the hole stays as it was painted."""
    image, mask = picture(30, 50), middle(30, 50)
    drawn = np.where(mask[..., None] == 1, picture(30, 50, seed=1), image)
    frame = Frame((0, 0, 50, 30), (30, 50))
    assert (frame.paste(drawn, image, mask, 6) == drawn).all()


def test_feather_looks_at_nothing_outside_the_frame():
    """What lies there was not painted, so it says nothing of how far the colours are off."""
    image, mask = picture(40, 60), box(40, 60, 10, 10, 20, 20)
    other = picture(40, 60, seed=1)
    other[5:25, 5:25] = image[5:25, 5:25]
    frame, drawn = Frame((5, 5, 25, 25), (20, 20)), scene(20, 20)
    first, second = (frame.paste(drawn, x, mask, 9) for x in (image, other))
    assert (first == second)[mask == 1].all()


# Seeds


def test_seeds_differ_inside_the_hole_and_do_not_depend_on_the_batch(model):
    image, mask = picture(30, 22), middle(30, 22)
    together = model.inpaint(image, mask, num=5, seed=3, batch_size=2)
    assert together.drawing.seeds == [3, 4, 5, 6, 7]
    filled = pixels_of(together)
    for first in range(5):
        for second in range(first):
            assert (filled[first] != filled[second])[mask == 1].mean() > 0.5
    for row in range(5):
        alone = model.inpaint(image, mask, seed=3 + row)
        torch.testing.assert_close(alone.latents[0], together.latents[row], atol=1e-5, rtol=1e-5)
        assert abs(pixels_of(alone)[0].astype(int) - filled[row].astype(int)).max() <= 1


def test_progress_is_reported(plain):
    seen = []
    inpaint(plain, picture(16, 16), middle(16, 16), InpaintRequest(num=5), batch_size=2, on_images=seen.append)
    assert seen == [2, 2, 1]


# Files and memory


def test_paths_pictures_and_arrays_are_the_same(model, tmp_path):
    image, mask, indices = picture(20, 26), middle(20, 26), np.full((20, 26), 2, np.uint8)
    files = [tmp_path / name for name in ("image.png", "mask.png", "map.png")]
    for array, file in zip((image, mask * 255, indices), files, strict=True):
        Image.fromarray(array).save(file)
    known, hole, semantic_map = images_of(image, mask * 255, indices)
    ways = [
        (files[0], files[1], files[2]),
        (str(files[0]), str(files[1]), str(files[2])),
        (known, hole, semantic_map),
        (image, mask, indices),
        (image, mask > 0, indices.astype(np.int64)),
        (known.convert("RGBA"), hole.convert("1"), Image.fromarray(colour_map(indices, tiny.MAP_PALETTE))),
    ]
    results = [model.inpaint(*way[:2], semantic_map=way[2], num=2, feather=2).pixels for way in ways]
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_a_rotated_photograph_comes_out_upright(model):
    upright, mask = picture(20, 30), middle(20, 30)
    turned = Image.fromarray(np.rot90(upright).copy())
    turned.getexif()[0x0112] = 6  # to be turned clockwise
    assert torch.equal(model.inpaint(turned, mask).pixels, model.inpaint(upright, mask).pixels)


def test_what_the_png_says_draws_it_again(model, tmp_path):
    image, mask = tmp_path / "photo.png", tmp_path / "hole.png"
    Image.fromarray(picture(26, 34)).save(image)
    Image.fromarray(middle(26, 34) * 255).save(mask)
    asked = {"classes": ["berry"], "seed": 7, "feather": 2, "guidance": 2.0, "guided_by": ["inpainting"], "steps": 3}
    samples = model.inpaint(image, mask, num=2, **asked)
    first, second = samples.save_as(tmp_path / "out" / "filled.png")
    assert [file.name for file in (first, second)] == [
        "filled_berry_seed-00000007.png",
        "filled_berry_seed-00000008.png",
    ]
    said = json.loads(Image.open(second).text["latentflow"])
    assert (said["task"], said["seeds"], said["labels"], said["class_name"]) == ("inpaint", [8], [1], "berry")
    assert said["told"] == ["label", "inpainting"]
    assert said["evaluations"] == 6
    assert said["image_size"] == [SIZE, SIZE]
    inputs = said["inputs"]
    assert inputs["method"] == "condition"
    assert inputs["feather"] == "2"
    assert tuple(map(int, inputs["frame"].split())) == choose_frame(model, middle(26, 34)).box
    for name, file in (("image", image), ("mask", mask)):
        assert inputs[name].startswith(f"{file.name} sha256:")
    assert inputs["image"].split(":")[1] != inputs["mask"].split(":")[1]

    again = model.inpaint(
        *(tmp_path / inputs[name].split()[0] for name in ("image", "mask")),
        classes=said["labels"],
        seed=said["seeds"][0],
        feather=int(inputs["feather"]),
        method=inputs["method"],
        **said["sampling"],
    )
    difference = np.asarray(again.images[0]).astype(int) - np.asarray(Image.open(second))
    assert abs(difference).max() <= 1  # in a batch of another size
    twice = model.inpaint(image, mask, num=2, **asked)
    assert torch.equal(twice.pixels, samples.pixels)


# Guidance


@pytest.mark.parametrize("guided_by", ["inpainting", "label", "semantic_map"])
def test_guidance_by_each_condition(model, guided_by):
    image, mask = picture(16, 16), middle(16, 16)
    conditions = {"classes": ["apple"], "semantic_map": np.ones((16, 16), np.uint8)}
    plain = model.inpaint(image, mask, **conditions)
    model.conditions.clear()
    guided = model.inpaint(image, mask, **conditions, guidance=3.0, guided_by=[guided_by])
    assert plain.evaluations.tolist() == [2]
    assert guided.evaluations.tolist() == [4]
    assert (plain.pixels != guided.pixels).any()
    both = model.conditions[0]  # conditioned and its null twin, in one batch
    fields = {"label": "labels", "inpainting": "mask", "semantic_map": "class_fractions"}
    for name, field in fields.items():
        first, second = getattr(both, field)
        assert torch.equal(first, second) == (name != guided_by)


def test_guidance_on_all_conditions_and_on_none(model, plain):
    image, mask = picture(16, 16), middle(16, 16)
    assert model.inpaint(image, mask, guidance=2.0).evaluations.tolist() == [4]
    for refused, message in [
        ({"guidance": 2.0, "guided_by": ["semantic_map"]}, "not given"),
        ({"guidance": 2.0, "guided_by": ["label"]}, "not given"),
        ({"guidance": 2.0, "method": "replacement"}, "no condition is given"),
        ({"guidance": 2.0, "method": "replacement", "guided_by": ["inpainting"]}, "not given"),
    ]:
        with pytest.raises(ConfigError, match=message):
            model.inpaint(image, mask, **refused)
    with pytest.raises(ConfigError, match="was not trained"):
        plain.inpaint(image, mask, guidance=2.0, guided_by=["inpainting"])
    assert plain.inpaint(image, mask, classes=["apple"], guidance=2.0).evaluations.tolist() == [4]


@pytest.mark.parametrize("solver", ["heun", "ab2", "dopri5"])
@pytest.mark.parametrize("method", get_args(Method))
def test_solvers(model, method, solver):
    pace = {"rtol": 1e-3, "atol": 1e-3} if is_adaptive(solver) else {}
    result = model.inpaint(scene(20, 20), middle(20, 20), method=method, solver=solver, num=2, **pace)
    assert (result.evaluations > 2).all()
    assert result.drawing.told == TOLD[method]


# Bad input


def test_a_model_without_the_condition(plain):
    image, mask = picture(16, 16), middle(16, 16)
    assert plain.inpaint(image, mask).drawing.inputs["method"] == "replacement"
    with pytest.raises(ConfigError, match="not trained with the condition inpainting"):
        plain.inpaint(image, mask, method="condition")
    with pytest.raises(ConfigError, match="not trained with the condition semantic_map"):
        plain.inpaint(image, mask, semantic_map=mask)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"method": "conditon"}, "method 'conditon': give 'condition' or 'replacement'"),
        ({"method": "magic"}, "method 'magic': give 'condition' or 'replacement'"),
        ({"fit": "windows"}, "fit 'windows': give 'window', 'whole' or 'native'"),
        ({"fit": ""}, "give 'window', 'whole' or 'native'"),
        ({"feather": -1}, "feather -1"),
        ({"num": 0}, "number of images 0"),
        ({"classes": ["kiwi"]}, "kiwi"),
        ({"solver": "huen"}, "heun"),
    ],
)
def test_requests_that_are_refused(model, request_, message):
    model.conditions.clear()
    with pytest.raises(ConfigError, match=message):
        model.inpaint(picture(16, 16), middle(16, 16), **request_)
    assert not model.conditions


@pytest.mark.parametrize(
    ("image", "mask", "semantic_map", "message"),
    [
        (picture(16, 16), middle(16, 18), None, "18 x 16"),
        (picture(16, 16), np.zeros((16, 16)), None, "all black"),
        (picture(16, 16), np.ones((16, 16)), None, "all white"),
        (picture(16, 16), np.ones((16, 16, 2)), None, r"\[16, 16, 2\]"),
        (picture(16, 16), Image.new("L", (16, 16), 90), None, "darker than half white"),
        (picture(1, 16), box(1, 16, 0, 3, 1, 5), None, "smaller than one latent pixel"),
        (picture(16, 16).astype(np.float64), middle(16, 16), None, r"\[height, width, 3\] uint8"),
        (Image.fromarray(np.ones((16, 16), np.float32)), middle(16, 16), None, "mode F have no defined white"),
        (picture(16, 16), middle(16, 16), np.zeros((16, 20), np.uint8), "20 x 16"),
        (picture(16, 16), middle(16, 16), np.full((16, 16), 3), "class 3"),
        (picture(16, 16), middle(16, 16), Image.new("RGB", (16, 16), (1, 2, 3)), "belongs to no class"),
    ],
)
def test_images_masks_and_maps_that_are_refused(model, image, mask, semantic_map, message):
    model.conditions.clear()
    with pytest.raises(DataError, match=message):
        model.inpaint(image, mask, semantic_map=semantic_map)
    assert not model.conditions


def test_a_hole_that_leaves_nothing_at_the_size_the_model_sees(model):
    grid = np.ones((160, 160), np.uint8)
    grid[::10, ::10] = 0
    with pytest.raises(DataError, match=r"at 16 x 16 pixels.*the mask covers the whole image"):
        model.inpaint(picture(160, 160), grid)
    result = model.inpaint(picture(160, 160), grid, fit="native")
    assert (pixels_of(result)[0] == picture(160, 160))[grid == 0].all()
    comb = np.zeros((16, 16), np.uint8)
    comb[:, ::2] = 1  # a hole in every latent pixel: known to a model that sees fractions, and to no other
    assert model.inpaint(picture(16, 16), comb).drawing.told == ["inpainting"]
    with pytest.raises(DataError, match="the mask covers the whole image"):
        model.inpaint(picture(16, 16), comb, method="replacement")


def test_a_model_that_never_learned_to_paint_without_a_hole(kl):
    only = tiny.model(kl, conditioning={"inpainting": True, "inpainting_dropout": 0.0})
    image, mask = picture(16, 16), middle(16, 16)
    assert only.inpaint(image, mask).drawing.told == ["inpainting"]
    with pytest.raises(ConfigError, match="latentflow inpaint"):
        only.sample(num=1)
    with pytest.raises(ConfigError, match=r"_dropout = 0"):
        only.inpaint(image, mask, guidance=2.0)


def test_a_missing_file(model, tmp_path):
    Path(tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match="does not exist"):
        model.inpaint(tmp_path / "none.png", middle(16, 16))
    with pytest.raises(DataError, match="does not exist"):
        model.inpaint(picture(16, 16), tmp_path / "none.png")
    with pytest.raises(DataError, match="no image that Pillow can read"):
        model.inpaint(tmp_path / "text.png", middle(16, 16))
