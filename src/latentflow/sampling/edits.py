"""Edits of images that need no training.

    image-to-image   latents z => x_s = alpha(s) z + sigma(s) noise => z', from time s, the strength (arXiv 2108.01073)
    interpolation    noise on the great circle between two seeds, v = (1 - w) v_a + w v_b between two classes
    variation        the noise of one seed, rotated a little towards other seeds

The fourth edit, finding the noise of an image, is `latentflow.sampling.inversion`.

Legend: B images, C latent channels, h and w latent height and width, S side of the square images in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from latentflow.errors import ConfigError
from latentflow.model.class_names import ClassList
from latentflow.model.flow_model import FlowModel
from latentflow.randomness import derive_seed
from latentflow.sampling.drawing import Blend, Drawing, check_drawing, make_drawing, require_count
from latentflow.sampling.inputs import ImageInput, at_most_one, encode_input, read_input
from latentflow.sampling.pipeline import Given, draw_all
from latentflow.sampling.request import SampleRequest
from latentflow.sampling.samples import Samples

MOST_FRAMES = 10_000


def image_to_image(
    model: FlowModel,
    image: ImageInput,
    *,
    strength: float = 0.6,
    num: int = 1,
    classes: ClassList | None = None,
    seed: int = 0,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda num_images: None,
    **preset: Any,
) -> Samples:
    """Redraw one image, once for each of `num` seeds: add noise to it, and integrate back from there.

    Args:
        image: of any size; its square middle is scaled to the size of the training images.
        strength: the time in (0, 1] to start from; 1: nothing is left of the image. A fixed-step solver takes all its
            steps between there and 0.
        classes: as for `make_drawing`; None: no label.
        preset: fields of `SamplingPreset`.

    Raises:
        ConfigError, DataError: before anything is computed.
    """
    if not 0 < strength <= 1:
        raise ConfigError(
            f"strength {strength:g}: it must be above 0, the image itself, and at most 1, where nothing is left of it; "
            "0.6 is usual"
        )
    pixels, inputs = read_input(model, image)
    request = make_drawing(
        model,
        SampleRequest(num=num, classes=classes, seed=seed, **preset),
        task="image-to-image",
        inputs=inputs,
        start=strength,
    )
    return draw_all(
        model, request, Given(latents=encode_input(model, pixels)), batch_size=batch_size, on_images=on_images
    )


def interpolate(
    model: FlowModel,
    *,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda num_images: None,
    **request: Any,
) -> Samples:
    """Draw the frames between two seeds; the request is that of `interpolation`."""
    return draw_all(model, interpolation(model, **request), batch_size=batch_size, on_images=on_images)


def interpolation(
    model: FlowModel,
    *,
    seeds: Sequence[int] = (0, 1),
    num: int = 9,
    classes: ClassList | None = None,
    **preset: Any,
) -> Drawing:
    """The request of `num` frames from one seed to another, and from one class to another, both ends included.

    Args:
        seeds: from, to; the same seed twice to change only the class.
        num: at least 2.
        classes: one for all frames, or two: from, to; []: no label; None: those of the two seeds, so that the ends are
            the pictures that `sample` draws for them.
        preset: fields of `SamplingPreset`.

    Raises:
        ConfigError: before anything is computed.
    """
    if len(seeds) != 2:
        raise ConfigError(f"{len(seeds)} seeds; an interpolation needs two, from and to")
    require_count("number of frames", num, 2, MOST_FRAMES, "the two ends are two of them")
    if classes is None:
        ends = [make_drawing(model, SampleRequest(num=1, seed=seed, **preset), task="interpolate") for seed in seeds]
        labels = [end.labels[0] for end in ends if end.labels]
    else:
        labels = model.config.conditioning.class_indices(classes)
        if len(labels) > 2:
            raise ConfigError(f"{len(labels)} classes; give none, one for all frames, or two: from and to")
        asked = [SampleRequest(num=1, classes=labels[:1], seed=seed, **preset) for seed in seeds]
        ends = [make_drawing(model, request, task="interpolate") for request in asked]
    other = labels[1] if len(set(labels)) == 2 else None
    blends = [Blend(seed=seeds[1], weight=frame / (num - 1), label=other) for frame in range(num)]
    update = {"seeds": [seeds[0]] * num, "labels": ends[0].labels * num, "blends": blends}
    request = ends[0].model_copy(update=update)
    check_drawing(model, request)
    return request


def vary(
    model: FlowModel,
    *,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda num_images: None,
    **request: Any,
) -> Samples:
    """Draw variations of the picture of one seed; the request is that of `variations`."""
    return draw_all(model, variations(model, **request), batch_size=batch_size, on_images=on_images)


def variations(
    model: FlowModel,
    *,
    seed: int = 0,
    num: int = 8,
    amount: float = 0.3,
    classes: ClassList | None = None,
    **preset: Any,
) -> Drawing:
    """The request of `num` variations of the picture that `sample` draws for a seed.

    Args:
        amount: how far the noise is rotated towards that of another seed, in [0, 1]: by `amount` times 90 degrees.
            0: the picture itself; 1: unrelated pictures.
        classes: one; []: no label; None: that of the seed, as in `sample`.
        preset: fields of `SamplingPreset`.

    Raises:
        ConfigError: before anything is computed.
    """
    if not 0 <= amount <= 1:
        raise ConfigError(f"amount {amount:g}: it must be from 0 (the picture itself) to 1 (unrelated pictures)")
    require_count("number of variations", num, 1, MOST_FRAMES)
    original = make_drawing(
        model, SampleRequest(num=1, classes=at_most_one(model, classes), seed=seed, **preset), task="vary"
    )
    blends = [Blend(seed=variation_seed(seed, number), weight=amount) for number in range(num)]
    return original.model_copy(update={"seeds": [seed] * num, "labels": original.labels * num, "blends": blends})


def variation_seed(seed: int, number: int) -> int:
    """The seed that variation `number` (0, 1, ...) of `seed` is rotated towards: a number below 2^32."""
    return derive_seed("vary", seed, number) % 2**32
