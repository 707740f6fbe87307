"""Preview grids of a training run: samples of the EMA weights, with fixed seeds and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentflow.autoencoder import to_uint8
from latentflow.console import notice
from latentflow.data.batches import TrainingImages
from latentflow.data.painting.input_pixels import unit_inputs
from latentflow.data.painting.semantic_maps import colour_map
from latentflow.data.pictures.shown import as_colours, as_shown
from latentflow.errors import NonFiniteError
from latentflow.flow.solvers import expected_evaluations, is_adaptive
from latentflow.model.config import ModelConfig, SamplingPreset
from latentflow.model.flow_model import FlowModel
from latentflow.networks.running import borrowed_weights
from latentflow.runtime import Precision, Runtime
from latentflow.sampling.contact_sheet import on_white, save_grid
from latentflow.sampling.drawing import Drawing
from latentflow.sampling.pipeline import Given, draw
from latentflow.shapes import Condition
from latentflow.sizes import Size

MOST_EVALUATIONS = 50
"""Network calls per picture, without guidance; a preset that takes more is replaced by `_QUICK`."""

_QUICK = {"solver": "heun", "steps": 25}
_PER_CLASS, _MOST_IMAGES, _COLUMNS = 4, 40, 8


def preview_drawing(config: ModelConfig, precision: Precision = "fp32") -> Drawing:
    """The drawing of a preview: one row per class, or with other conditions one column per training image."""
    conditioning = config.conditioning
    others = [name for name in conditioning.dropout if name != "label"]
    shown = config.seen_classes[: _MOST_IMAGES // _PER_CLASS]
    labels = [label for label in shown for _ in range(_PER_CLASS)]
    num_images = len(labels) or _PER_CLASS**2
    if others:
        labels, num_images = shown[:1] * _COLUMNS, _COLUMNS
    return Drawing(
        task="preview",
        seeds=list(range(num_images)),
        labels=labels,
        told=[name for name in conditioning.kinds if labels or name != "label"],
        sampling=_affordable(config.sampling),
        precision=precision,
    )


def save_preview(
    model: FlowModel,
    weights: Mapping[str, Tensor],
    images: TrainingImages,
    file: Path,
    runtime: Runtime,
    batch_size: int,
) -> None:
    """Draw a fixed grid from `weights` in eval mode; the seeds are always 0, 1, 2, ...

    Every process draws its share, and the first one writes. With conditions besides the label, the rows are the first
    training images, their spatial conditions, and the samples given each condition by itself (with those that the model
    requires; named columns count as one) and given all of them. A model of several sizes shows the four most frequent
    ones, or with such conditions one.

    Args:
        weights: what the network draws with; afterwards it has its own weights again, bit for bit.
        batch_size: images that a process draws together, as many as it trains on at a time.

    Raises:
        NonFiniteError: a picture is not finite; in every process.
    """
    with borrowed_weights(model.network, weights):
        rows, columns, captions = _rows(model, images, runtime, batch_size)
    if runtime.is_main:
        save_grid(file, torch.cat(rows), columns, captions=captions)


def _rows(
    model: FlowModel, images: TrainingImages, runtime: Runtime, batch_size: int
) -> tuple[list[Tensor], int, list[str]]:
    """The pictures of a grid, [N, 3, H, W] uint8 each, the number of its columns, and the captions."""
    drawing, conditioning = preview_drawing(model.config, model.runtime.precision), model.config.conditioning
    if set(drawing.told) <= {"label"}:
        pictures = _of_all_sizes(model, drawing, runtime, batch_size)
        return [pictures], _PER_CLASS, [conditioning.class_names[label] for label in drawing.labels]
    shown = images.parts(range(len(drawing.seeds)))[0]  # of one size
    size = model.config.sizes[images.bucket_at(shown)]
    drawing = drawing.at(slice(len(shown))).model_copy(update={"image_size": size})
    batch = images.at(shown, augmented=False).to(model.device)
    moments = model.moments(batch.pixels) if batch.moments is None else batch.moments
    rows = [_shown(model, model.latents(moments))]
    given: dict[str, Tensor] = {}
    if "inpainting" in drawing.told:
        cached = batch.known_pixels is None
        known = batch.known_moments if cached else model.moments(batch.known_pixels)
        given |= {"masked_latents": model.latents(known), "mask": batch.mask}
        rows.append(_shown(model, given["masked_latents"]))
    if "semantic_map" in drawing.told:
        given["class_fractions"] = batch.class_fractions
        rows.append(map_pictures(batch.class_fractions, conditioning.map_palette, size))
    if "input" in drawing.told:
        in_pixels = batch.input_moments is None
        given["input"] = model.paired_input(batch.inputs) if in_pixels else model.latents(batch.input_moments)
        if in_pixels:
            rows.append(input_pictures(unit_inputs(batch.inputs, model.config.input_format).cpu(), size))
        else:
            rows.append(model.pixels(given["input"]).cpu())
    if drawing.labels:
        drawing = drawing.model_copy(update={"labels": batch.labels.tolist()})
    columns = [one.name for one in conditioning.columns]
    if columns:
        given["columns"] = batch.columns
    groups = [[name] for name in drawing.told if name not in columns] + ([columns] if columns else [])
    singly = [conditioning.with_required(group, among=drawing.told) for group in groups]
    for chosen in [*singly, drawing.told] if len(groups) > 1 else [drawing.told]:
        labels = drawing.labels if "label" in chosen else []
        kept = {field: given[field] for name in chosen for field in conditioning.kinds[name].fields if field in given}
        if missing := [name for name in columns if name not in chosen]:
            kept["columns"] = conditioning.without(Condition(columns=batch.columns), missing).columns
        guiding = drawing.sampling.guided_by or chosen
        able = [name for name in guiding if name in chosen and name in conditioning.can_guide]
        guidance = {"guided_by": able} if able else {"guided_by": None, "guidance": 1.0}
        sampling = drawing.sampling.model_copy(update=guidance)
        part = drawing.model_copy(update={"told": chosen, "labels": labels, "sampling": sampling})
        rows.append(_drawn(model, part, Given(**kept), runtime, batch_size))
    return rows, len(drawing.seeds), []


def _shown(model: FlowModel, latents: Tensor) -> Tensor:
    """Decoded latents as they are shown, [B, 3, H, W] uint8 on the CPU."""
    return as_shown(model.pixels(latents).cpu(), model.config.pixel_format)


def _of_all_sizes(model: FlowModel, drawing: Drawing, runtime: Runtime, batch_size: int) -> Tensor:
    """The pictures of a drawing, column by column in another of the model's most frequent sizes, on white."""
    buckets = sorted(model.config.buckets, key=lambda bucket: -bucket.num_images)
    sizes = [bucket.size for bucket in buckets[:_PER_CLASS]] or [model.config.image_size]
    if len(sizes) == 1:
        return _drawn(model, drawing, Given(), runtime, batch_size)
    columns = [
        drawing.at(slice(column, None, _PER_CLASS)).model_copy(update={"image_size": sizes[column % len(sizes)]})
        for column in range(_PER_CLASS)
    ]
    drawn = [_drawn(model, column, Given(), runtime, batch_size) for column in columns]
    largest = Size(max(size.height for size in sizes), max(size.width for size in sizes))
    return torch.stack([on_white(pictures, largest) for pictures in drawn], dim=1).flatten(0, 1)


def _drawn(model: FlowModel, drawing: Drawing, given: Given, runtime: Runtime, batch_size: int) -> Tensor:
    """The pictures of a drawing as they are shown, [N, 3, H, W] uint8 on the CPU in every process.

    Each process draws a share.
    """
    places = range(len(drawing.seeds))
    own = slice(runtime.rank, None, runtime.world)
    size = drawing.image_size or model.config.image_size
    pixels, error = torch.empty(0, 3, *size, dtype=torch.uint8), None
    try:
        parts = draw(model, drawing.at(own), given.at(own), batch_size=batch_size) if runtime.share(places) else ()
        pixels = torch.cat([pixels, *(samples.shown for samples in parts)])
    except Exception as caught:  # the others wait for this process all the same
        error = caught
    if runtime.sum(torch.tensor([float(error is not None)])) > 0:
        raise error or NonFiniteError("another process could not draw its part of a preview")
    order = [place for rank in range(runtime.world) for place in places[rank :: runtime.world]]
    return runtime.gather(pixels)[torch.tensor(order).argsort()]


def _affordable(sampling: SamplingPreset) -> SamplingPreset:
    """The preset, or a quick one in place of a preset that takes too long; this is announced once."""
    if sampling.guide is not None:
        notice("previews are drawn without guidance: the guide of the preset may not be there yet")
        sampling = sampling.model_copy(update={"guide": None, "guidance": 1.0, "guided_by": None})
    adaptive, most = is_adaptive(sampling.solver), MOST_EVALUATIONS
    if not adaptive and expected_evaluations(sampling.solver, sampling.steps, sampling.rtol) <= most:
        return sampling
    pace = f"tolerance {sampling.rtol:g}" if adaptive else f"{sampling.steps} steps"
    notice(
        f"previews are drawn by heun in 25 steps, since {sampling.solver} with {pace} takes "
        + ("a number of network calls that is not known beforehand" if adaptive else f"more than {most} network calls")
        + "; the model keeps its preset"
    )
    return sampling.model_copy(update=_QUICK)


def input_pictures(inputs: Tensor, image_size: Size) -> Tensor:
    """Inputs [B, c, H / N, W / N] in [-1, 1] as pictures [B, 3, H, W] uint8: the first three channels, or one as gray.

    Pixels are enlarged as squares.
    """
    coloured = to_uint8(as_colours(inputs))
    return torch.nn.functional.interpolate(coloured, size=tuple(image_size), mode="nearest")


def map_pictures(class_fractions: Tensor, palette: list[tuple[int, int, int]], image_size: Size) -> Tensor:
    """The most frequent class of each latent pixel in its colour: [B, K, h, w] => [B, 3, H, W] uint8."""
    unlabelled = 1 - class_fractions.sum(1, keepdim=True)  # as class K, which has no colour
    indices = torch.cat([class_fractions, unlabelled], 1).argmax(1).byte().cpu().numpy()
    coloured = np.stack([colour_map(one, palette) for one in indices])
    pixels = torch.from_numpy(coloured).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(pixels, size=tuple(image_size), mode="nearest")
