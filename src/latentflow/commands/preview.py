"""Preview grids of a training run: what the averaged weights draw, on fixed seeds and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentflow.autoencoder import to_uint8, to_unit_range
from latentflow.commands.grid import save_grid
from latentflow.conditioning import CONDITION_FIELDS
from latentflow.data.batches import TrainingImages
from latentflow.data.semantic_maps import colour_map
from latentflow.latent_flow import LatentFlow
from latentflow.sampling.pipeline import Given, draw_all
from latentflow.sampling.request import SampleRequest

_PER_CLASS, _MOST_IMAGES, _COLUMNS = 4, 40, 8


def preview_request(model: LatentFlow) -> SampleRequest:
    """The request of a preview: rows are classes, or, with spatial conditions, columns are training images."""
    conditioning = model.config.conditioning
    spatial = [name for name in conditioning.dropout if name != "label"]
    shown = model.config.seen_classes[: _MOST_IMAGES // _PER_CLASS]
    labels = [label for label in shown for _ in range(_PER_CLASS)]
    num_images = len(labels) or _PER_CLASS**2
    if spatial:
        labels, num_images = shown[:1] * _COLUMNS, _COLUMNS
    return SampleRequest(
        task="preview",
        seeds=list(range(num_images)),
        labels=labels,
        told=[*(["label"] if labels else []), *spatial],
        sampling=model.config.sampling,
    )


def save_preview(model: LatentFlow, weights: Mapping[str, Tensor], images: TrainingImages, file: Path) -> None:
    """Draw a fixed grid from `weights` in eval mode; the seeds are 0, 1, 2, ... each time.

    With spatial conditions its rows are the first training images, what the model is told of them, and what it draws
    told each condition alone (where it can do without the others) and all of them.
    """
    network = model.config.build_network().to(model.device)
    network.load_state_dict(dict(weights))
    frozen = LatentFlow(model.config, network.eval().requires_grad_(False), model.autoencoder)
    request = preview_request(model)
    if "inpainting" not in request.told and "semantic_map" not in request.told:
        pixels = draw_all(frozen, request, batch_size=len(request.seeds)).pixels
        names = [model.config.conditioning.class_names[label] for label in request.labels]
        save_grid(file, pixels, _PER_CLASS, captions=names)
        return
    batch = images.__getitems__(range(len(request.seeds))).to(model.device)
    moments = model.autoencoder.encode(to_unit_range(batch.pixels)) if batch.moments is None else batch.moments
    rows = [to_uint8(model.decode(model.latents(moments))).cpu()]
    given: dict[str, Tensor] = {}
    if "inpainting" in request.told:
        cached = batch.known_pixels is None
        known = batch.known_moments if cached else model.autoencoder.encode(to_unit_range(batch.known_pixels))
        given |= {"masked_latents": model.latents(known), "mask": batch.mask}
        rows.append(to_uint8(model.decode(given["masked_latents"])).cpu())
    if "semantic_map" in request.told:
        given["class_fractions"] = batch.class_fractions
        rows.append(map_pictures(batch.class_fractions, model.config.conditioning.map_palette, model.config.image_size))
    if request.labels:
        request = request.model_copy(update={"labels": batch.labels.tolist()})
    conditioning = model.config.conditioning
    needed = [name for name, share in conditioning.dropout.items() if share == 0]
    alone = [[name for name in request.told if name == chosen or name in needed] for chosen in request.told]
    for told in [*alone, request.told] if len(request.told) > 1 else [request.told]:
        labels = request.labels if "label" in told else []
        kept = {field: given[field] for name in told for field in CONDITION_FIELDS[name] if field in given}
        able = [name for name in request.sampling.guided_by or told if name in told and name in conditioning.can_guide]
        guidance = {"guided_by": able} if able else {"guided_by": None, "guidance": 1.0}
        sampling = request.sampling.model_copy(update=guidance)
        part = request.model_copy(update={"told": told, "labels": labels, "sampling": sampling})
        rows.append(draw_all(frozen, part, Given(**kept), batch_size=len(part.seeds)).pixels)
    save_grid(file, torch.cat(rows), len(request.seeds))


def map_pictures(class_fractions: Tensor, palette: list[tuple[int, int, int]], image_size: int) -> Tensor:
    """The commonest class of each latent pixel in its colour: [B, K, h, w] => [B, 3, S, S] uint8."""
    unlabelled = 1 - class_fractions.sum(1, keepdim=True)  # as class K, which has no colour
    indices = torch.cat([class_fractions, unlabelled], 1).argmax(1).byte().cpu().numpy()
    coloured = np.stack([colour_map(one, palette) for one in indices])
    pixels = torch.from_numpy(coloured).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(pixels, size=(image_size, image_size), mode="nearest")
