"""Preview grids of a training run with conditions of space."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.autoencoder import to_uint8
from latentflow.commands.preview import map_pictures, preview_request, save_preview
from latentflow.data.batches import SpatialData, TrainingImages
from latentflow.data.images import open_images
from latentflow.data.latent_cache import LatentCache
from latentflow.data.masks import MaskRules
from latentflow.data.semantic_maps import UNLABELLED_COLOUR
from latentflow.sampling.pipeline import Given, draw_all
from latentflow.sampling.request import SampleRequest, check_request
from tests import tiny

COLUMNS, GAP = 8, 2
MAPS = {key: tiny.SPATIAL[key] for key in ("map_class_names", "map_palette")}


@pytest.fixture
def images(segmented) -> TrainingImages:
    spatial = SpatialData(tiny.FACTOR, holes=MaskRules(), maps=True)
    return TrainingImages(open_images(segmented, tiny.IMAGE_SIZE), seed=0, flip=True, spatial=spatial)


def preview(model, images, file) -> list[torch.Tensor]:
    """The rows of a preview grid, each [8, 3, S, S]."""
    save_preview(model, model.network.state_dict(), images, file)
    sheet = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    size, step = tiny.IMAGE_SIZE, tiny.IMAGE_SIZE + GAP
    num_rows, remainder = divmod(sheet.shape[1] + GAP, step)
    assert (remainder, sheet.shape[2]) == (0, COLUMNS * step - GAP)
    cells = [
        [sheet[:, row * step : row * step + size, n * step : n * step + size] for n in range(COLUMNS)]
        for row in range(num_rows)
    ]
    return [torch.stack(row) for row in cells]


@pytest.mark.parametrize(
    ("given", "num_rows"),
    [
        ({"conditioning": tiny.SPATIAL}, 7),  # images, without holes, maps; told label, known part, map, all
        ({"conditioning": tiny.SPATIAL, "class_names": ()}, 6),
        ({"conditioning": MAPS}, 5),
        ({"conditioning": MAPS, "class_names": ()}, 3),  # told the map is told all
        ({"conditioning": {"inpainting": True}, "class_names": ()}, 3),
    ],
)
def test_a_row_for_everything_that_is_told(kl, images, tmp_path, given, num_rows):
    model = tiny.model(kl, **given)
    check_request(model, preview_request(model))
    assert len(preview(model, images, tmp_path / "grid.png")) == num_rows


def test_what_the_rows_show(kl, images, tmp_path):
    model = tiny.model(kl, conditioning=tiny.SPATIAL)
    rows = preview(model, images, tmp_path / "grid.png")
    batch = images.__getitems__(range(COLUMNS))
    unit = batch.pixels / 127.5 - 1
    assert torch.equal(rows[0], to_uint8(model.decode(model.encode(unit))))
    known = model.encode(batch.known_pixels / 127.5 - 1)
    assert torch.equal(rows[1], to_uint8(model.decode(known)))
    assert torch.equal(rows[2], map_pictures(batch.class_fractions, list(tiny.MAP_PALETTE), tiny.IMAGE_SIZE))
    parts = {
        "label": {},
        "inpainting": {"masked_latents": known, "mask": batch.mask},
        "semantic_map": {"class_fractions": batch.class_fractions},
    }
    for row, told in zip(rows[3:], [["label"], ["inpainting"], ["semantic_map"], list(parts)], strict=True):
        labels = batch.labels.tolist() if "label" in told else []
        request = SampleRequest(seeds=range(COLUMNS), labels=labels, told=told, sampling=model.config.sampling)
        given = Given(**{key: value for name in told for key, value in parts[name].items()})
        drawn = draw_all(model, request, given, batch_size=COLUMNS)
        assert torch.equal(row, drawn.pixels), told


def test_the_preview_of_a_cache_shows_its_holes(kl, segmented_cache, tmp_path):
    cache = LatentCache(segmented_cache)
    spatial = SpatialData(tiny.FACTOR, holes=cache.plan.masks, cached_holes=True, maps=True)
    images = TrainingImages(cache, seed=0, flip=True, spatial=spatial)
    model = tiny.model(kl, conditioning=tiny.SPATIAL)
    rows, batch = preview(model, images, tmp_path / "grid.png"), images.at(range(COLUMNS)).to("cpu")
    assert torch.equal(rows[0], to_uint8(model.decode(model.latents(batch.moments))))
    assert torch.equal(rows[1], to_uint8(model.decode(model.latents(batch.known_moments))))
    assert len(rows) == 7


@pytest.mark.parametrize(
    ("given", "num_rows"),
    [
        ({"guidance": 2.0}, 7),
        ({"guidance": 2.0, "guided_by": ["label"]}, 7),
        ({"guidance": 2.0, "guided_by": ["inpainting", "semantic_map"]}, 7),
        ({"guidance": 2.0, "label_dropout": 0.0}, 7),
        ({"guidance": 2.0, "conditioning": {**tiny.SPATIAL, "map_dropout": 0.0}}, 7),
    ],
    ids=["by all", "by label", "by space", "label never dropped", "map never dropped"],
)
def test_a_preset_with_guidance_never_stops_a_run(kl, images, tmp_path, given, num_rows):
    """Each row is guided by what of the preset it is told."""
    model = tiny.model(kl, **{"conditioning": tiny.SPATIAL, **given})
    check_request(model, preview_request(model))  # all that is asked before training
    assert len(preview(model, images, tmp_path / "grid.png")) == num_rows


def test_maps_are_shown_in_the_colours_of_their_classes():
    """The commonest class of a latent pixel; where that is none, the colour of unlabelled pixels."""
    fractions = torch.zeros(1, 3, 2, 2)
    fractions[0, 1, 0, 0] = 1
    fractions[0, :, 0, 1] = torch.tensor([0.2, 0.3, 0.5])
    fractions[0, 0, 1, 0] = 0.25  # three quarters are unlabelled
    pictures = map_pictures(fractions, list(tiny.MAP_PALETTE), 4)
    assert pictures.dtype == torch.uint8
    corners = [tuple(pictures[0, :, row, column].tolist()) for row in (0, 3) for column in (1, 3)]
    assert corners == [tiny.MAP_PALETTE[1], tiny.MAP_PALETTE[2], UNLABELLED_COLOUR, UNLABELLED_COLOUR]
