"""The demo's stages of the other conditions: semantic maps, holes, and what each condition contributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentflow.autoencoder import to_unit_range
from latentflow.data.painting.latent_size import class_counts, hide, hole_counts, shares
from latentflow.data.painting.masks import draw_mask
from latentflow.data.painting.semantic_maps import colour_map
from latentflow.demo.judging import mean_iou
from latentflow.demo.workshop import BATCH, HELD_OUT_SEED, Workshop, as_tensor
from latentflow.randomness import derive_seed
from latentflow.sampling.frame import Frame
from latentflow.sampling.pipeline import Given
from latentflow.training.held_out import condition_sets, held_out_loss, images_for

NUM_COLUMNS = 12
"""Pictures in a row of a contact sheet."""


def paint_maps(work: Workshop) -> dict[str, Any]:
    """Draw from held-out semantic maps at several guidance scales, and recover the maps from the samples."""
    scale, config = work.figures.scale, work.model.config
    items = list(work.held_out(scale.num_painted))
    maps, real = [item.semantic_map for item in items], as_tensor([item.pixels for item in items])
    palette, factor = config.conditioning.map_palette, config.autoencoder.factor
    counts = [class_counts(semantic_map, len(palette), factor) for semantic_map in maps]
    given = Given(class_fractions=shares(torch.stack(counts), factor))
    runs, rows = [], [as_tensor([colour_map(semantic_map, palette) for semantic_map in maps])]
    for guidance in scale.painting_scales:
        samples = work.draw(len(items), given, ["semantic_map"], classes=[], guidance=guidance)
        iou = mean_iou(maps, samples.pixels)
        runs.append({"scale": guidance, "evaluations": samples.mean_evaluations, "iou": iou})
        rows.append(samples.pixels)
    work.save_sheet("maps", [row[:NUM_COLUMNS] for row in (*rows, real)])
    return {
        "num_images": len(items),
        "real_iou": mean_iou(maps, real),
        "reconstructed_iou": mean_iou(maps, work.model.autoencoder.reconstruct(real)),
        "runs": runs,
    }


def fill_holes(work: Workshop) -> dict[str, Any]:
    """Fill holes in held-out images: conditioned on the known part, unconditional, and without any training for it."""
    scale, config = work.figures.scale, work.model.config
    pictures = [item.pixels for item in work.held_out(scale.num_painted)]
    size, factor, num = config.image_size, config.autoencoder.factor, len(pictures)
    holes = [draw_mask(config.masks, *size, derive_seed("demo", "hole", n)) for n in range(num)]
    hidden = as_tensor([hide(picture, hole) for picture, hole in zip(pictures, holes, strict=True)])
    real, inside = as_tensor(pictures), torch.from_numpy(np.stack(holes))[:, None] > 0
    mask = shares(torch.stack([hole_counts(hole, factor) for hole in holes]), factor)
    known = work.model.encode(to_unit_range(hidden)).cpu()
    condition = Given(masked_latents=known, mask=mask)
    imposed = Given(latents=known, hole=(mask > 0).float())

    ways = [(f"told the known part, guidance {s:g}", ["inpainting"], condition, s) for s in scale.painting_scales]
    ways += [("replaced along the path", [], imposed, 1.0), ("told nothing", [], Given(), 1.0)]
    runs, rows = [], [real, hidden]
    for name, conditions, given, guidance in ways:
        samples = work.draw(num, given, conditions, classes=[], guidance=guidance)
        filled = _pasted(samples.pixels, pictures, holes)
        runs.append({"name": name, "evaluations": samples.mean_evaluations, **_errors(filled, real, inside)})
        rows.append(filled)
    flat = torch.where(inside, _mean_colour(real, ~inside), real)
    runs.append({"name": "mean colour of the known part", "evaluations": 0, **_errors(flat, real, inside)})
    work.save_sheet("holes", [row[:NUM_COLUMNS] for row in rows])
    return {"num_images": num, "share": inside.float().mean().item(), "runs": runs}


def compare_losses(work: Workshop) -> dict[str, Any]:
    """The loss on held-out images: unconditional, with each condition, and with all of them."""
    num_draws = work.figures.scale.num_draws
    images = images_for(work.model, f"synthetic:{num_draws}:{HELD_OUT_SEED}")
    runs = []
    for conditions in condition_sets(work.model.config.conditioning):
        result = held_out_loss(work.model, images, conditions, num_draws=num_draws, batch_size=BATCH)
        runs.append({"told": conditions, "loss": result.loss, "standard_error": result.standard_error})
    return {"num_draws": num_draws, "runs": runs}


def _pasted(drawn: Tensor, pictures: Sequence[np.ndarray], holes: Sequence[np.ndarray]) -> Tensor:
    """Pictures [S, S, 3] with their holes filled from `drawn` [B, 3, S, S], as `inpaint` does it: [B, 3, S, S]."""
    frame = Frame((0, 0, *drawn.shape[:1:-1]), tuple(drawn.shape[2:]))
    fills = drawn.permute(0, 2, 3, 1).numpy()
    return as_tensor([frame.paste(*one, feather=0) for one in zip(fills, pictures, holes, strict=True)])


def _mean_colour(pixels: Tensor, where: Tensor) -> Tensor:
    """The mean of pixels [B, 3, S, S] over `where` [B, 1, S, S] bool: [B, 3, 1, 1] uint8."""
    weights = where.float()
    return ((pixels * weights).sum((2, 3), keepdim=True) / weights.sum((2, 3), keepdim=True)).round().byte()


def _errors(filled: Tensor, real: Tensor, inside: Tensor) -> dict[str, float | int]:
    """The RMSE inside the holes, and the number of values outside them that changed."""
    difference = filled.double() - real.double()
    holes = inside.expand_as(difference)
    return {
        "rmse": difference[holes].square().mean().sqrt().item(),
        "known_changed": int((difference[~holes] != 0).sum()),
    }
