"""Edits of images that need no training.

    image-to-image   latents z => x_s = alpha(s) z + sigma(s) noise => z', from time s, the strength (arXiv 2108.01073)
    interpolation    noise on the great circle between two seeds, v = (1 - w) v_a + w v_b between two classes
    variation        the noise of one seed, rotated a little towards other seeds

The fourth edit, finding the noise of an image, is `latentflow.sampling.inversion`.

Legend: B images, C latent channels, h and w latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from latentflow.errors import ConfigError
from latentflow.model.conditioning import Conditioning
from latentflow.model.flow_model import FlowModel
from latentflow.randomness import derive_seed
from latentflow.sampling.drawing import Blend, Drawing, check_drawing, make_drawing
from latentflow.sampling.inputs import ImageInput, at_most_one, encode_input, other_size, read_input
from latentflow.sampling.named_conditions import NamedValue, ends_of
from latentflow.sampling.pipeline import Given, Prepared, draw_all, draw_prepared
from latentflow.sampling.request import (
    ImageToImageRequest,
    InterpolateRequest,
    SampleRequest,
    SamplingRequest,
    VaryRequest,
)
from latentflow.sampling.samples import Samples


def image_to_image(
    model: FlowModel,
    image: ImageInput,
    request: ImageToImageRequest | None = None,
    *,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Samples:
    """Redraw one image, once for each seed: add noise to it, and integrate back from there.

    Args:
        image: of any size; its middle, of the shape of the training images, is scaled to their size.
        request: a fixed-step solver takes all its steps between t = strength and 0.

    Raises:
        ConfigError, DataError: before anything is computed.
    """
    prepared = prepare_image_to_image(model, image, request)
    return draw_prepared(model, prepared, batch_size=batch_size, on_images=on_images)


def prepare_image_to_image(model: FlowModel, image: ImageInput, request: ImageToImageRequest | None = None) -> Prepared:
    """Check what `image_to_image` is to draw."""
    request = request or ImageToImageRequest()
    pixels, inputs = read_input(model, image)
    size = other_size(model, pixels)
    drawing = make_drawing(
        model, request, task="image-to-image", inputs=inputs, start=request.strength, image_size=size
    )
    return Prepared(drawing, lambda: Given(latents=encode_input(model, pixels)))


def interpolate(
    model: FlowModel,
    request: InterpolateRequest | None = None,
    *,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Samples:
    """Draw the frames between two seeds; see `interpolation`."""
    drawing = interpolation(model, request or InterpolateRequest())
    return draw_all(model, drawing, batch_size=batch_size, on_images=on_images)


def interpolation(model: FlowModel, request: InterpolateRequest) -> Drawing:
    """The frames from one seed to another, and from one class to another, including both ends.

    Without classes, the ends are the pictures that `sample` draws for the two seeds. A named condition that is a number
    changes from frame to frame; of labels the velocities are blended, as of classes.

    Raises:
        ConfigError: before anything is computed.
    """
    num, (first, last) = request.num, request.seeds
    weights = [frame / (num - 1) for frame in range(num)]
    conditions, towards = _between(model.config.conditioning, request, weights)
    given = {"task": "interpolate", "conditions": {name: values[:1] for name, values in conditions.items()}}
    if request.classes is None:
        ends = [_one_picture(model, seed, None, request, **given) for seed in request.seeds]
        labels = [end.labels[0] for end in ends if end.labels]
    else:
        labels = model.config.conditioning.class_indices(request.classes)
        if len(labels) > 2:
            raise ConfigError(f"{len(labels)} classes; give none, one for all frames, or two: from and to")
        ends = [_one_picture(model, seed, labels[:1], request, **given) for seed in request.seeds]
    other = labels[1] if len(set(labels)) == 2 else None
    blends = [Blend(seed=last, weight=weight, label=other, conditions=towards) for weight in weights]
    frames = {"seeds": [first] * num, "labels": ends[0].labels * num, "conditions": conditions, "blends": blends}
    drawing = Drawing.model_validate({**dict(ends[0]), **frames})
    check_drawing(model, drawing)
    return drawing


def _between(
    conditioning: Conditioning, request: InterpolateRequest, weights: Sequence[float]
) -> tuple[dict[str, list[NamedValue]], dict[str, NamedValue]]:
    """The named conditions of each frame, and those that labels are blended towards.

    Raises:
        RequestError: a condition has more than two values, or only one of the two ends is given.
    """
    ends = ends_of(conditioning, request.conditions, most=2)
    frames: dict[str, list[NamedValue]] = {}
    towards: dict[str, NamedValue] = {}
    for name, (start, end) in ends.items():
        if isinstance(start, float) and isinstance(end, float):
            frames[name] = [start + weight * (end - start) for weight in weights]
            continue
        frames[name] = [start] * len(weights)
        if end != start:
            towards[name] = end
    return frames, towards


def vary(
    model: FlowModel,
    request: VaryRequest | None = None,
    *,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Samples:
    """Draw variations of the picture of one seed; see `variations`."""
    _, near = variations(model, request or VaryRequest())
    return draw_all(model, near, batch_size=batch_size, on_images=on_images)


def variations(model: FlowModel, request: VaryRequest) -> tuple[Drawing, Drawing]:
    """The picture that `sample` draws for a seed, and variations of it.

    The noise of a variation is rotated by `amount` times 90 degrees from that of the seed towards that of another seed.

    Raises:
        ConfigError: before anything is computed.
    """
    classes, num = at_most_one(model, request.classes), request.num
    ends_of(model.config.conditioning, request.conditions, most=1)
    original = _one_picture(model, request.seed, classes, request, task="sample", conditions=request.conditions)
    blends = [Blend(seed=variation_seed(request.seed, n), weight=request.amount) for n in range(num)]
    conditions = {name: values * num for name, values in original.conditions.items()}
    near = {"seeds": original.seeds * num, "labels": original.labels * num, "conditions": conditions, "blends": blends}
    return original, Drawing.model_validate({**dict(original), **near, "task": "vary"})


def _one_picture(
    model: FlowModel,
    seed: int,
    classes: list[int] | None,
    request: SamplingRequest,
    *,
    task: str,
    conditions: dict[str, Any] | None = None,
) -> Drawing:
    """The picture of one seed, sampled as the request says."""
    asked = SampleRequest(num=1, seed=seed, classes=classes, conditions=conditions, **request.preset())
    return make_drawing(model, asked, task=task)


def variation_seed(seed: int, number: int) -> int:
    """The seed that variation `number` (0, 1, ...) of `seed` is rotated towards: a number below 2^32."""
    return derive_seed("vary", seed, number) % 2**32
