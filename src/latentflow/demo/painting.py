"""The demo's stages of painting: held-out maps and holes, by the one network, and what each condition is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentflow.autoencoder import to_unit_range
from latentflow.data.items import ImageItem
from latentflow.data.painting.latent_size import class_counts, hide, hole_counts, shares
from latentflow.data.painting.masks import draw_mask
from latentflow.data.painting.semantic_maps import colour_map
from latentflow.data.sources.synthetic import SyntheticShapes
from latentflow.demo.figures import DemoFigures
from latentflow.demo.recognition import recover_map
from latentflow.model.conditioning import ConditionName
from latentflow.model.flow_model import FlowModel
from latentflow.randomness import derive_seed
from latentflow.runtime import Runtime
from latentflow.sampling.contact_sheet import save_grid
from latentflow.sampling.drawing import make_drawing
from latentflow.sampling.frame import Frame
from latentflow.sampling.pipeline import Given, draw_all
from latentflow.sampling.request import SampleRequest
from latentflow.sampling.samples import Samples
from latentflow.training.held_out import condition_sets, held_out_images, held_out_loss

HELD_OUT_SEED = 20240612  # of real images that neither the autoencoder nor the velocity network was trained on
NUM_COLUMNS = 12
_BATCH = 64


def paint_maps(figures: DemoFigures, out: Path, runtime: Runtime) -> dict[str, Any]:
    """Paint held-out semantic maps at several guidance scales, and recover them from the pictures."""
    model, items = FlowModel.from_pretrained(out / "run", runtime=runtime), _held_out(figures)
    maps, real = [item.semantic_map for item in items], _pixels([item.pixels for item in items])
    palette, factor = model.config.conditioning.map_palette, model.config.autoencoder.factor
    counts = [class_counts(semantic_map, len(palette), factor) for semantic_map in maps]
    given = Given(class_fractions=shares(torch.stack(counts), factor))
    coloured = _pixels([colour_map(semantic_map, palette) for semantic_map in maps])
    runs, rows = [], [coloured[:NUM_COLUMNS]]
    for scale in figures.scale.painting_scales:
        samples = _draw(model, len(items), ["semantic_map"], given, guidance=scale)
        evaluations = samples.mean_evaluations
        runs.append({"scale": scale, "evaluations": evaluations, "iou": mean_iou(maps, samples.pixels)})
        rows.append(samples.pixels[:NUM_COLUMNS])
    save_grid(out / "samples" / "maps.png", torch.cat([*rows, real[:NUM_COLUMNS]]), min(NUM_COLUMNS, len(items)))
    return {
        "num_images": len(items),
        "real_iou": mean_iou(maps, real),
        "reconstructed_iou": mean_iou(maps, model.autoencoder.reconstruct(real)),
        "runs": runs,
    }


def fill_holes(figures: DemoFigures, out: Path, runtime: Runtime) -> dict[str, Any]:
    """Fill holes in held-out images: told the known part, told nothing, and in two ways without training for it."""
    model, items = FlowModel.from_pretrained(out / "run", runtime=runtime), _held_out(figures)
    size, factor, rules = model.config.image_size, model.config.autoencoder.factor, model.config.masks
    pictures = [item.pixels for item in items]
    holes = [draw_mask(rules, size, size, derive_seed("demo", "hole", n)) for n in range(len(items))]
    hidden = _pixels([hide(picture, hole) for picture, hole in zip(pictures, holes, strict=True)])
    real, inside = _pixels(pictures), torch.from_numpy(np.stack(holes))[:, None] > 0
    mask = shares(torch.stack([hole_counts(hole, factor) for hole in holes]), factor)
    known = model.encode(to_unit_range(hidden)).cpu()
    told = Given(masked_latents=known, mask=mask)
    replaced = Given(latents=known, hole=(mask > 0).float())

    ways = [
        (f"told the known part, guidance {scale:g}", ["inpainting"], told, scale)
        for scale in figures.scale.painting_scales
    ]
    ways += [("replaced along the path", [], replaced, 1.0), ("told nothing", [], Given(), 1.0)]
    runs, rows = [], [real[:NUM_COLUMNS], hidden[:NUM_COLUMNS]]
    for name, conditions, given, scale in ways:
        samples = _draw(model, len(items), conditions, given, guidance=scale)
        filled = _pasted(samples.pixels, pictures, holes)
        evaluations = samples.mean_evaluations
        runs.append({"name": name, "evaluations": evaluations, **_errors(filled, real, inside)})
        rows.append(filled[:NUM_COLUMNS])
    outside = (~inside).float()
    mean_colour = (real * outside).sum((2, 3), keepdim=True) / outside.sum((2, 3), keepdim=True)
    flat = torch.where(inside, mean_colour.round().byte(), real)
    runs.append({"name": "mean colour of the known part", "evaluations": 0, **_errors(flat, real, inside)})
    save_grid(out / "samples" / "holes.png", torch.cat(rows), min(NUM_COLUMNS, len(items)))
    return {"num_images": len(items), "share": inside.float().mean().item(), "runs": runs}


def compare_losses(figures: DemoFigures, out: Path, runtime: Runtime) -> dict[str, Any]:
    """The loss on held-out images, told nothing, each condition alone, and everything."""
    model, num_draws = FlowModel.from_pretrained(out / "run", runtime=runtime), figures.scale.num_draws
    images = held_out_images(model, f"synthetic:{num_draws}:{HELD_OUT_SEED}")
    runs = []
    for told in condition_sets(model.config.conditioning):
        result = held_out_loss(model, images, told, num_draws=num_draws, batch_size=_BATCH)
        runs.append({"told": told, "loss": result.loss, "standard_error": result.standard_error})
    return {"num_draws": num_draws, "runs": runs}


def mean_iou(maps: Sequence[np.ndarray], pictures: Tensor) -> float:
    """How well maps are recovered from pictures [B, 3, S, S] uint8: the mean over maps of the mean over their classes
    of intersection over union."""
    values = []
    for wanted, picture in zip(maps, pictures, strict=True):
        found = recover_map(picture.permute(1, 2, 0).numpy())
        pairs = [(wanted == index, found == index) for index in np.unique(wanted)]
        values.append(np.mean([(one & other).sum() / (one | other).sum() for one, other in pairs]))
    return float(np.mean(values))


def _held_out(figures: DemoFigures) -> list[ImageItem]:
    return list(SyntheticShapes(figures.scale.num_painted, figures.recipe.data.image_size, HELD_OUT_SEED))


def _draw(model: FlowModel, num: int, told: list[ConditionName], given: Given, *, guidance: float) -> Samples:
    request = make_drawing(model, SampleRequest(num=num, classes=[], guidance=guidance), told=told)
    return draw_all(model, request, given, batch_size=_BATCH)


def _pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures [S, S, 3] uint8 => [B, 3, S, S] uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _pasted(drawn: Tensor, pictures: Sequence[np.ndarray], holes: Sequence[np.ndarray]) -> Tensor:
    """Pictures [S, S, 3] with their holes filled from `drawn` [B, 3, S, S], as `inpaint` does it: [B, 3, S, S]."""
    frame = Frame((0, 0, *drawn.shape[:1:-1]), tuple(drawn.shape[2:]))
    fills = drawn.permute(0, 2, 3, 1).numpy()
    return _pixels([frame.paste(*one, feather=0) for one in zip(fills, pictures, holes, strict=True)])


def _errors(filled: Tensor, real: Tensor, inside: Tensor) -> dict[str, float | int]:
    difference = filled.double() - real.double()
    holes = inside.expand_as(difference)
    return {
        "rmse": difference[holes].square().mean().sqrt().item(),
        "known_changed": int((difference[~holes] != 0).sum()),
    }
