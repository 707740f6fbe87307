"""Images that a model paints over real ones: filled holes, painted semantic maps, and translated inputs.

Legend: B and N images, H and W height and width of the model's images, K classes of the semantic map.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentflow.artifacts import sha256_file
from latentflow.data.items import ImageSource, stack_pixels
from latentflow.data.painting.input_pixels import at_image_size, stack_inputs, unit_inputs
from latentflow.data.painting.latent_size import class_counts, hide, hole_counts, mask_input, shares
from latentflow.data.painting.mask_rules import MaskPolicy, MaskRules
from latentflow.data.painting.masks import check_masks, draw_mask, mask_files
from latentflow.data.pictures.shown import as_levels, as_shown
from latentflow.errors import ConfigError, DataError, nearest
from latentflow.evaluation.drawn_set import drawn_columns, model_plan
from latentflow.evaluation.read_images import read_batches, require_readable
from latentflow.evaluation.request import EvaluationRequest
from latentflow.evaluation.shards import Columns, Work, compute_in_shards
from latentflow.metrics.evaluation_report import Score
from latentflow.metrics.features.extractors import FeatureExtractor
from latentflow.metrics.pairs import PairJudge, confusion, iou
from latentflow.model.config import require_same_format
from latentflow.model.flow_model import FlowModel
from latentflow.randomness import derive_seed
from latentflow.sampling.captured_calls import calls_for
from latentflow.sampling.drawing import Drawing, make_drawing
from latentflow.sampling.pipeline import Given
from latentflow.sampling.request import SampleRequest
from latentflow.sampling.samples import Samples
from latentflow.sizes import Size

_POLICIES = get_args(MaskPolicy)
_WINDOW = 11  # pixels, of SSIM

Segmenter = Callable[[Tensor], Tensor]
"""uint8 images [B, 3, H, W], as they are shown => class indices [B, H, W]."""


@dataclass(frozen=True)
class Painting:
    """How images are painted over real ones, checked before anything is computed.

    Attributes:
        drawing: of the first image; image i has its seed plus i.
        own_labels: whether the label of each image is that of its real one; otherwise it is unconditional.
        rules: which holes are drawn; None: the task is to paint semantic maps or to translate.
        segmenter: segments pictures into maps; None: mean IoU is not wanted.
        judge: measures the pairs.
        inputs: holes or segmenter, for the report.
    """

    drawing: Drawing
    own_labels: bool
    rules: MaskRules | None = None
    segmenter: Segmenter | None = None
    judge: PairJudge = field(default_factory=PairJudge)
    inputs: dict[str, str] = field(default_factory=dict)


def plan_painting(model: FlowModel, source: ImageSource, request: EvaluationRequest, judge: PairJudge) -> Painting:
    """Check that a model can paint over the images of a source, and how.

    Raises:
        ConfigError, DataError: something in the request does not exist, or does not fit model and images.
    """
    conditioning, task = model.config.conditioning, request.task
    own_labels = request.labels == "data" and conditioning.num_classes > 0
    if own_labels:
        require_same_classes(model, source)
    replacing = task == "inpaint" and not conditioning.inpainting
    given = ["inpainting"] if task == "inpaint" and not replacing else []
    if task == "mask-to-image" or "semantic_map" in conditioning.required:
        conditioning.require("semantic_map")
        if list(source.map_class_names) != conditioning.map_class_names:
            found = ", ".join(source.map_class_names) or "none"
            raise ConfigError(
                f"the images have the map classes {found}; the model knows {conditioning.map_class_names}"
            )
        given.append("semantic_map")
    if task == "translate" or "input" in conditioning.required:
        conditioning.require("input")
        require_same_format(model.config, source.input_format, request.data)
        given.append("input")
    asked = {"classes": [0] if own_labels else [], "image_size": request.image_size, **request.preset()}
    first = SampleRequest(num=1, seed=request.seed, **asked)
    drawing = make_drawing(model, first, task=task, conditions=given)
    if task == "translate":
        rules = model.config.inputs
        if (asked := [name for name in request.wanted if name.endswith("-input")]) and not compares_inputs(model):
            raise ConfigError(f"{asked[0]}: inputs of {model.config.input_format.title} cannot be compared with images")
        return Painting(drawing, own_labels, judge=judge, inputs={"inputs": rules.title})
    if task == "mask-to-image":
        name = request.segmenter
        if name is None:
            return Painting(drawing, own_labels)
        return Painting(drawing, own_labels, segmenter=_segmenter(name), inputs={"segmenter": name})
    rules = _rules(model, request.masks)
    check_masks(rules, *source.image_size)
    return Painting(drawing, own_labels, rules=rules, judge=judge, inputs={"holes": _described(rules)})


def require_same_classes(model: FlowModel, source: ImageSource) -> None:
    """Refuse labels that would mean other classes.

    Raises:
        ConfigError: the images have other classes than the model.
    """
    known, found = model.config.conditioning.class_names, list(source.class_names)
    if found != known:
        raise ConfigError(f"the images have the classes {found or 'none'}, but the model knows {known}")


def painted(
    model: FlowModel,
    painting: Painting,
    source: ImageSource,
    rows: Sequence[int],
    extractor: FeatureExtractor,
    work: Work,
) -> Columns:
    """Paint over real images, and compare each with its real one. Hole and noise of image i depend on i only.

    Returns:
        The columns of `drawn_columns`, and labels [N]; for holes psnr, ssim, psnr-hole and ssim-hole [N]; for inputs
        those of `pair_values`; for maps with a segmenter the counts of `confusion`, [any, K, K], of the painted and of
        the real images.
    """

    calls = calls_for(model.device, painting.drawing)

    def compute(places: range) -> Columns:
        read = read_batches(source, [rows[place] for place in places], len(places))
        items = [require_readable(found) for batch in read for _, found in batch]
        seed = painting.drawing.seeds[0]
        labels = [item.label for item in items] if painting.own_labels else []
        drawing = painting.drawing.model_copy(update={"seeds": [seed + place for place in places], "labels": labels})
        real = stack_pixels([item.pixels for item in items])
        maps = [item.semantic_map for item in items]
        holes = _holes(painting, source.image_size, [int(rows[place]) for place in places])

        def finish(samples: Samples, part: slice) -> tuple[Tensor, Columns]:
            drawn, own = samples.pixels, real[part]
            if painting.drawing.task == "translate":
                return drawn, pair_values(model, drawn, own, inputs[part], painting.judge)
            if painting.rules is None:
                return drawn, _confusions(painting.segmenter, drawn, own, maps[part], model)
            filled = _pasted(drawn, own, holes[part])
            return filled, hole_values(filled, own, holes[part], judge=painting.judge)

        inputs = None
        if "input" in painting.drawing.told:
            inputs = stack_inputs([item.input for item in items], source.input_format)
        given = _given(model, painting, real, holes, maps, inputs)
        columns = drawn_columns(model, drawing, given, extractor, work, calls, finish)
        return columns | {"labels": torch.tensor(labels or [-1] * len(items))}

    plan = {
        **model_plan(model, painting.drawing),
        "data": source.fingerprint(),
        "features": extractor.hash,
        "own_labels": painting.own_labels,
        "pairs": painting.judge.key,
        **painting.inputs,
    }
    return compute_in_shards(len(rows), compute, plan=plan, work=work)


def _holes(painting: Painting, size: Size, rows: Sequence[int]) -> list[np.ndarray]:
    """The hole of each image, [H, W]; none if the task has none."""
    if painting.rules is None:
        return []
    return [draw_mask(painting.rules, *size, derive_seed("evaluate", "hole", row)) for row in rows]


def map_scores(columns: Columns) -> dict[str, Score]:
    """Mean IoU of painted maps, and the mean IoU of the real images themselves as its limit."""
    reached, limit = iou(columns["confusion"].sum(0)), iou(columns["real_confusion"].sum(0))
    return {"miou": Score(label="mean IoU of maps", value=reached.mean, limit=limit.mean)}


def hole_values(filled: Tensor, real: Tensor, holes: Sequence[np.ndarray], *, judge: PairJudge) -> Columns:
    """The values of `judge` for the whole image, and PSNR and SSIM in the hole: [B] each.

    Images are [B, P, H, W], stored values in the format of the judge, holes [H, W].

    Outside the hole images are bit-identical, so a window that does not touch it has an SSIM of 1: the mean over the
    windows that do follows from the mean over all.
    """
    inside = torch.from_numpy(np.stack(holes))[:, None] > 0
    values = judge(filled, real)
    levels, others = (as_levels(x, judge.pixel_format) for x in (filled, real))
    squares = (levels - others).square() * inside
    count = filled.shape[1] * inside.flatten(1).sum(1)
    values["psnr-hole"] = 10 * torch.log10(255**2 * count / squares.flatten(1).sum(1).clamp(min=1))
    if "ssim" in values:
        touching = F.max_pool2d(inside.double(), _WINDOW, stride=1).flatten(1).mean(1)
        values["ssim-hole"] = 1 - (1 - values["ssim"]) / touching
    return values


def compares_inputs(model: FlowModel) -> bool:
    """Whether the inputs of a model can be compared with its images, pixel by pixel."""
    inputs = model.config.input_format
    return inputs is not None and inputs.channels in (1, model.config.pixel_format.channels)


def pair_values(model: FlowModel, drawn: Tensor, real: Tensor, inputs: Tensor, judge: PairJudge) -> Columns:
    """The values of `judge` for drawn images and their real ones, [B, P, S, S]: [B] each.

    Next to each name stand name-limit, that of the real image after encoding and decoding; and name-input, that of the
    input enlarged by bicubic interpolation, where an input has one channel or those of an image.
    """
    config = model.config
    values = judge(drawn, real)
    limit = torch.cat(
        [model.autoencoder.reconstruct(part, config.pixel_format) for part in model.autoencoder.slices(real)]
    )
    values |= {f"{name}-limit": found for name, found in judge(limit, real).items()}
    if not compares_inputs(model):
        return values
    enlarged = at_image_size(unit_inputs(inputs, config.input_format), config.inputs.shrinking, real.shape[1])
    picture = config.pixel_format.from_unit(enlarged)
    return values | {f"{name}-input": found for name, found in judge(picture, real).items()}


def _given(
    model: FlowModel,
    painting: Painting,
    real: Tensor,
    holes: Sequence[np.ndarray],
    maps: Sequence[np.ndarray | None],
    inputs: Tensor | None,
) -> Given:
    """The conditions of the images of a shard."""
    conditions, factor = painting.drawing.told, model.config.autoencoder.factor
    given: dict[str, Tensor] = {}
    if inputs is not None:
        given["input"] = model.paired_input(inputs.to(model.device)).cpu()
    if "semantic_map" in conditions:
        num_classes = model.config.conditioning.num_map_classes
        given["class_fractions"] = shares(torch.stack([class_counts(one, num_classes, factor) for one in maps]), factor)
    if holes:
        told_as = painting.rules.told_as
        pictures = real.permute(0, 2, 3, 1).numpy()
        pixel_format = model.config.pixel_format
        hidden = stack_pixels([hide(*pair, told_as, pixel_format) for pair in zip(pictures, holes, strict=True)])
        share = shares(torch.stack([hole_counts(hole, factor, told_as) for hole in holes]), factor)
        parts = model.autoencoder.slices(hidden)
        known = torch.cat([model.latents(model.moments(part.to(model.device))).cpu() for part in parts])
        if "inpainting" in conditions:
            given |= {"masked_latents": known, "mask": mask_input(share, told_as)}
        else:
            given |= {"latents": known, "hole": (share > 0).float()}
    return Given(**given)


def _pasted(drawn: Tensor, real: Tensor, holes: Sequence[np.ndarray]) -> Tensor:
    """Real images with their holes filled from drawn ones, by the rule of `latentflow inpaint`: [B, P, H, W]."""
    inside = torch.from_numpy(np.stack(holes))[:, None] > 0
    return torch.where(inside, drawn, real)


def _confusions(
    segmenter: Segmenter | None, pixels: Tensor, real: Tensor, maps: Sequence[np.ndarray], model: FlowModel
) -> Columns:
    if segmenter is None:
        return {}
    true, num_classes = torch.from_numpy(np.stack(maps)), model.config.conditioning.num_map_classes
    counts = {}
    for name, images in (("confusion", pixels), ("real_confusion", real)):
        shown = as_shown(images, model.config.pixel_format)
        found = torch.as_tensor(segmenter(shown.to(model.device))).cpu()
        if found.is_floating_point() or found.shape != true.shape:
            raise DataError(
                f"the segmenter returned {found.dtype} of shape {list(found.shape)}; class indices of shape "
                f"{list(true.shape)} are needed"
            )
        counts[name] = confusion(found, true, num_classes)[None]
    return counts


def _rules(model: FlowModel, masks: str | None) -> MaskRules:
    learned = model.config.masks or MaskRules()
    if masks is None:
        return learned
    if masks in _POLICIES:
        return MaskRules(policy=masks, told_as=learned.told_as)
    if not Path(masks).is_dir():
        raise ConfigError(f"masks {masks!r} is neither a folder nor a policy: {nearest(masks, _POLICIES)}")
    return MaskRules(folder=masks, told_as=learned.told_as)


def _described(rules: MaskRules) -> str:
    """The holes in words: equal texts mean equal holes."""
    if rules.folder:
        digest = hashlib.sha256("".join(sha256_file(file) for file in mask_files(rules.folder)).encode())
        return f"files sha256:{digest.hexdigest()[:12]}"
    shape = rules.model_dump(exclude={"folder", "told_as", "policy"})
    return ", ".join([rules.policy, *(f"{key} {value:.4g}" for key, value in shape.items())])


def _segmenter(name: str) -> Segmenter:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"segmenter {name!r}: {error}; write package.module:function, on PYTHONPATH") from error
    if not callable(found):
        raise ConfigError(f"segmenter {name!r} is not a function")
    return found
