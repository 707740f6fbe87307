"""Preview grids of a training run with conditions of space."""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.autoencoder import to_uint8
from latentflow.data.batches import SpatialData, TrainingImages
from latentflow.data.cache.reader import LatentCache
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.painting.semantic_maps import UNLABELLED_COLOUR
from latentflow.data.sources.images import open_images
from latentflow.errors import NonFiniteError
from latentflow.model.conditioning import ColumnCondition
from latentflow.runtime import Runtime
from latentflow.sampling import preview as preview_module
from latentflow.sampling.drawing import Drawing, check_drawing
from latentflow.sampling.pipeline import Given, draw, draw_all
from latentflow.sampling.preview import map_pictures, preview_drawing, save_preview
from latentflow.shapes import Condition
from latentflow.sizes import Size
from tests import tiny

COLUMNS, GAP = 8, 2
MAPS = {key: tiny.SPATIAL[key] for key in ("map_class_names", "map_palette")}


@pytest.fixture
def images(segmented) -> TrainingImages:
    spatial = SpatialData(tiny.FACTOR, holes=MaskRules(), maps=True)
    return TrainingImages(open_images(segmented, tiny.IMAGE_SIZE), seed=0, flip=True, spatial=spatial)


def preview(model, images, file) -> list[torch.Tensor]:
    """The rows of a preview grid, each [8, 3, S, S]."""
    save_preview(model, model.network.state_dict(), images, file, model.runtime, COLUMNS)
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
        (
            {"conditioning": tiny.SPATIAL},
            7,
        ),  # images, without holes, maps; samples given the label, known part, map, all
        ({"conditioning": tiny.SPATIAL, "class_names": ()}, 6),
        ({"conditioning": MAPS}, 5),
        ({"conditioning": MAPS, "class_names": ()}, 3),  # given the map is given everything
        ({"conditioning": {"inpainting": True}, "class_names": ()}, 3),
    ],
)
def test_a_row_for_each_set_of_conditions(kl, images, tmp_path, given, num_rows):
    model = tiny.model(kl, **given)
    check_drawing(model, preview_drawing(model.config, model.runtime.precision))
    assert len(preview(model, images, tmp_path / "grid.png")) == num_rows


def test_what_the_rows_show(kl, images, tmp_path):
    model = tiny.model(kl, conditioning=tiny.SPATIAL)
    rows = preview(model, images, tmp_path / "grid.png")
    batch = images.__getitems__(range(COLUMNS))
    unit = batch.pixels / 127.5 - 1
    assert torch.equal(rows[0], to_uint8(model.decode(model.encode(unit))))
    known = model.encode(batch.known_pixels / 127.5 - 1)
    assert torch.equal(rows[1], to_uint8(model.decode(known)))
    assert torch.equal(rows[2], map_pictures(batch.class_fractions, list(tiny.MAP_PALETTE), Size.of(tiny.IMAGE_SIZE)))
    parts = {
        "label": {},
        "inpainting": {"masked_latents": known, "mask": batch.mask},
        "semantic_map": {"class_fractions": batch.class_fractions},
    }
    for row, conditions in zip(rows[3:], [["label"], ["inpainting"], ["semantic_map"], list(parts)], strict=True):
        labels = batch.labels.tolist() if "label" in conditions else []
        request = Drawing(seeds=range(COLUMNS), labels=labels, told=conditions, sampling=model.config.sampling)
        given = Given(**{key: value for name in conditions for key, value in parts[name].items()})
        drawn = draw_all(model, request, given, batch_size=COLUMNS)
        assert torch.equal(row, drawn.pixels), conditions


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
    """Each row is guided on those conditions of the preset that it is given."""
    model = tiny.model(kl, **{"conditioning": tiny.SPATIAL, **given})
    check_drawing(model, preview_drawing(model.config, model.runtime.precision))  # all that is asked before training
    assert len(preview(model, images, tmp_path / "grid.png")) == num_rows


def test_maps_are_shown_in_the_colours_of_their_classes():
    """The commonest class of a latent pixel; where that is none, the colour of unlabelled pixels."""
    fractions = torch.zeros(1, 3, 2, 2)
    fractions[0, 1, 0, 0] = 1
    fractions[0, :, 0, 1] = torch.tensor([0.2, 0.3, 0.5])
    fractions[0, 0, 1, 0] = 0.25  # three quarters are unlabelled
    pictures = map_pictures(fractions, list(tiny.MAP_PALETTE), Size.of(4))
    assert pictures.dtype == torch.uint8
    corners = [tuple(pictures[0, :, row, column].tolist()) for row in (0, 3) for column in (1, 3)]
    assert corners == [tiny.MAP_PALETTE[1], tiny.MAP_PALETTE[2], UNLABELLED_COLOUR, UNLABELLED_COLOUR]


class Together(Runtime):
    """One of several processes that are called one after another, the first one last."""

    gathered: ClassVar[list[torch.Tensor]] = []

    def sum(self, tensor):
        return tensor

    def gather(self, tensor):
        self.gathered.append(tensor)
        return torch.cat(self.gathered[::-1]) if self.is_main else torch.cat([tensor] * self.world)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_seeds(kl, images, tmp_path, world, monkeypatch):
    """Each draws its own; together they make the grid of one process, which the first one writes."""
    model = tiny.model(kl)
    alone, shared = tmp_path / "alone.png", tmp_path / "shared.png"
    save_preview(model, model.network.state_dict(), images, alone, model.runtime, 4)
    drawn = []

    def draws(model, part, *given, **options):
        drawn.append(part.seeds)
        return draw(model, part, *given, **options)

    monkeypatch.setattr(preview_module, "draw", draws)
    Together.gathered = []
    for rank in reversed(range(world)):
        assert not shared.exists()
        save_preview(model, model.network.state_dict(), images, shared, Together(model.device, rank, world), 4)
    assert sorted(seed for seeds in drawn for seed in seeds) == list(range(12))
    assert max(map(len, drawn)) <= -(-12 // world)
    difference = np.array(Image.open(shared)).astype(int) - np.array(Image.open(alone))
    assert np.abs(difference).max() <= 1  # the rounding of other batches


def test_what_goes_wrong_in_one_process_ends_all(kl, images, tmp_path, monkeypatch):
    model = tiny.model(kl)
    monkeypatch.setattr(Together, "sum", lambda self, tensor: tensor + 1)
    Together.gathered = []
    with pytest.raises(NonFiniteError, match="another process could not draw"):
        save_preview(model, model.network.state_dict(), images, tmp_path / "grid.png", Together(model.device, 1, 2), 4)


@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_come_back_to_the_bit(kl, images, tmp_path, fails, monkeypatch):
    """What is drawn is drawn by the average, in eval mode; afterwards training goes on with what it had."""
    model, other = tiny.model(kl), tiny.model(kl, seed=1)
    model.network.train().requires_grad_()
    model.network.final_norm = torch.nn.BatchNorm1d(3).eval()  # a module of another mode, and buffers
    average = other.network.state_dict() | {
        name: tensor + 1 for name, tensor in model.network.state_dict().items() if "final_norm" in name
    }
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.network.state_dict().items()}
    drawn = {}

    def draws(model, request, given, **options):
        drawn["like"] = all(torch.equal(x, average[name]) for name, x in model.network.state_dict().items())
        drawn["training"] = any(module.training for module in model.network.modules())
        if fails:
            raise NonFiniteError("no picture")
        return draw(model, request, given, **options)

    monkeypatch.setattr(preview_module, "draw", draws)
    with pytest.raises(NonFiniteError, match="no picture") if fails else nullcontext():
        save_preview(model, average, images, tmp_path / "grid.png", model.runtime, 4)
    assert drawn == {"like": True, "training": False}
    assert (tmp_path / "grid.png").exists() != fails
    after = model.network.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert places == {name: tensor.data_ptr() for name, tensor in after.items()}
    assert model.network.training
    assert not model.network.final_norm.training
    assert all(parameter.requires_grad for parameter in model.network.parameters())


@pytest.mark.parametrize(
    ("preset", "drawn_by"),
    [
        ({"solver": "heun", "steps": 25}, ("heun", 25)),
        ({"solver": "euler", "steps": 50}, ("euler", 50)),
        ({"solver": "ab2", "steps": 30}, ("ab2", 30)),
        ({"solver": "rk4", "steps": 13}, ("heun", 25)),
        ({"solver": "euler", "steps": 51}, ("heun", 25)),
        ({"solver": "dopri5"}, ("heun", 25)),
        ({"solver": "bosh3", "rtol": 1e-2}, ("heun", 25)),
    ],
)
def test_a_preset_that_takes_long_is_not_previewed(kl, preset, drawn_by, caplog):
    """A run must not wait for its previews; once it is said that pictures will be drawn otherwise."""
    model = tiny.model(kl, guidance=2.0, shift=2.0, **preset)
    for _ in range(2):
        sampling = preview_drawing(model.config).sampling
    assert (sampling.solver, sampling.steps) == drawn_by
    assert (sampling.guidance, sampling.shift) == (2.0, 2.0)
    is_told = drawn_by != (preset["solver"], preset.get("steps"))
    assert caplog.text.count("previews are drawn by heun in 25 steps, since") == is_told


def test_a_preview_is_drawn_in_batches_of_training(kl, images, tmp_path, monkeypatch):
    model, sizes = tiny.model(kl), []
    network = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda x, *rest: sizes.append(len(x)) or network(x, *rest))
    save_preview(model, model.network.state_dict(), images, tmp_path / "grid.png", model.runtime, 5)
    assert set(sizes) == {5, 2}


def test_named_columns_are_those_of_the_training_images(kl, tmp_path):
    """Images; samples given the label, the columns, and both."""
    source = open_images("synthetic:24:0:size,traits", tiny.IMAGE_SIZE)
    images = TrainingImages(source, seed=0, flip=False, columns=["size", "traits"])
    columns = [
        ColumnCondition(name="size", kind="number", mean=30, deviation=3, dropout=0.0),
        ColumnCondition(name="traits", kind="labels", class_names=list(source.columns[1].class_names)),
    ]
    model = tiny.model(kl, class_names=source.class_names, conditioning={"columns": columns})
    rows, batch = preview(model, images, tmp_path / "grid.png"), images.at(range(COLUMNS))
    assert len(rows) == 4
    nothing = model.config.conditioning.without(Condition(columns=batch.columns), ["traits"]).columns
    for row, told, given in (
        (rows[1], ["label", "size"], nothing),  # the size was never dropped, so it is always given
        (rows[2], ["size", "traits"], batch.columns),
        (rows[3], ["label", "size", "traits"], batch.columns),
    ):
        labels = batch.labels.tolist() if "label" in told else []
        request = Drawing(seeds=range(COLUMNS), labels=labels, told=told, sampling=model.config.sampling)
        drawn = draw_all(model, request, Given(columns=given), batch_size=COLUMNS)
        assert torch.equal(row, drawn.pixels), told
