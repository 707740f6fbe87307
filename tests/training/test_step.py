"""A training step: the conditions that the network gets, and that sampling gives the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentflow.api import LatentFlow
from latentflow.autoencoder import to_unit_range
from latentflow.data import batches
from latentflow.data.batches import Batch, SpatialData, TrainingImages
from latentflow.data.cache.reader import LatentCache
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.painting.masks import draw_mask
from latentflow.data.sources.images import open_images
from latentflow.flow.times import TrainingTimes
from latentflow.networks.align_head import add_align_head
from latentflow.randomness import ImageRandom
from latentflow.shapes import Condition
from latentflow.training.log import LossBins
from latentflow.training.step import StepResult, training_step
from tests import tiny
from tests.dispatch import watched

EVERYTHING = ("label", "inpainting", "semantic_map")
NULLS = {"labels": 3, "masked_latents": 0, "mask": 1, "class_fractions": 0}
FIELDS = {"label": ("labels",), "inpainting": ("masked_latents", "mask"), "semantic_map": ("class_fractions",)}


@pytest.fixture(scope="module")
def model(kl) -> LatentFlow:
    return tiny.model(kl, conditioning=tiny.SPATIAL)


@dataclass
class Heard:
    """A network that records its inputs."""

    network: torch.nn.Module
    calls: list[tuple[Tensor, Tensor, Condition]] = field(default_factory=list)

    def __call__(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.calls.append((latents, time, condition))
        return self.network(latents, time, condition)

    @property
    def condition(self) -> Condition:
        """That of the one call."""
        ((_, _, condition),) = self.calls
        return condition


def step(model: LatentFlow, images: TrainingImages, positions: list[int], **options) -> tuple[StepResult, Heard]:
    heard = Heard(model.network)
    given = {"times": TrainingTimes(), "batch_size": 12, "seed": 7, **options}
    return training_step(model, heard, images.__getitems__(positions), **given), heard


def stream(source, *, flip: bool = True, **spatial) -> TrainingImages:
    return TrainingImages(source, seed=3, flip=flip, spatial=SpatialData(tiny.FACTOR, maps=True, **spatial))


@pytest.fixture
def pictures(segmented):
    return open_images(segmented, tiny.IMAGE_SIZE)


def same(one: Condition, other: Condition, *names: str) -> None:
    for name in names:
        torch.testing.assert_close(getattr(one, name), getattr(other, name)[:1], rtol=0, atol=1e-6, msg=name)


def test_training_and_sampling_tell_the_network_the_same(model, pictures, monkeypatch):
    """One picture, one mask, one map: in a training step, in `inpaint` and in `mask_to_image`."""
    holes = []
    monkeypatch.setattr(batches, "draw_mask", lambda *of: holes.append(draw_mask(*of)) or holes[-1])
    images = stream(pictures, flip=False, holes=MaskRules())
    (index,) = images.indices_at([4])
    item = pictures[index]
    _, trained = step(model, images, [4], conditions=EVERYTHING)
    (hole,) = holes
    assert trained.condition.labels.tolist() == [item.label]

    filling, painting = Heard(model.network), Heard(model.network)
    label = pictures.class_names[item.label]
    with monkeypatch.context() as patched:
        patched.setattr(model, "velocity", filling)
        white = Image.fromarray(hole * np.uint8(255))
        shown = {"semantic_map": Image.fromarray(item.semantic_map), "classes": [label]}
        model.inpaint(Image.fromarray(item.pixels), white, fit="whole", num=2, steps=1, **shown)
        patched.setattr(model, "velocity", painting)
        model.mask_to_image(item.semantic_map, num=2, steps=1, classes=[label])
    same(trained.condition, filling.condition, "labels", "masked_latents", "mask", "class_fractions")
    same(trained.condition, painting.condition, "labels", "class_fractions")
    _, from_images = step(model, images, [4], conditions=["label", "semantic_map"])
    same(from_images.condition, painting.condition, "labels", "masked_latents", "mask", "class_fractions")
    assert trained.condition.masked_latents.std() > 0.05
    assert 0 < trained.condition.mask.mean() < 1


@pytest.mark.parametrize("source", ["images", "cache"])
def test_each_image_has_the_conditions_that_are_not_dropped(model, pictures, segmented_cache, source):
    """Dropped rows are null, the others equal those of a step without dropout; labels are those of the images."""
    images = stream(pictures, holes=MaskRules())
    if source == "cache":
        images = stream(LatentCache(segmented_cache), cached_holes=True)
    positions = list(range(48))
    _, heard = step(model, images, positions)
    _, whole = step(model, images, positions, conditions=EVERYTHING)
    random = ImageRandom.at(7, "step", positions)
    random.uniform(), random.normal(4, 8, 8), random.normal(4, 8, 8)  # time, posterior, noise
    dropped = model.config.conditioning.draw_dropped(random)
    for kind, names in FIELDS.items():
        assert 0 < dropped[kind].sum() < 16
        for name in names:
            given, full = getattr(heard.condition, name), getattr(whole.condition, name)
            assert (given[dropped[kind]] == NULLS[name]).all()
            # an encoder differs by rounding in batches of another shape
            torch.testing.assert_close(given[~dropped[kind]], full[~dropped[kind]], rtol=0, atol=1e-5)
    assert torch.equal(whole.condition.labels, images.__getitems__(positions).labels)


def test_every_image_has_the_given_conditions(model, pictures):
    """Time, data and noise stay as they are."""
    images, positions = stream(pictures, holes=MaskRules()), list(range(4))
    results = {
        conditions: step(model, images, positions, conditions=conditions)
        for conditions in ((), ("inpainting",), EVERYTHING)
    }
    for conditions, (result, heard) in results.items():
        assert torch.equal(result.time, results[()][0].time)
        assert torch.equal(heard.calls[0][0], results[()][1].calls[0][0])
        for kind, names in FIELDS.items():
            for name in names:
                is_null = (getattr(heard.condition, name) == NULLS[name]).reshape(4, -1).all(1)
                assert is_null.tolist() == [kind not in conditions] * 4, (kind, name, conditions)
    assert not torch.equal(results[()][0].loss, results[EVERYTHING][0].loss)


def test_known_pixels_and_moments_give_the_same_latents(model, pictures, segmented_cache):
    """The mode of the posterior, normalised, whether encoded in the step or beforehand."""
    cache = LatentCache(segmented_cache)
    images = stream(cache, cached_holes=True)
    batch = images.at([2, 9]).to("cpu")
    _, heard = step(model, images, [2, 9], conditions=EVERYTHING)
    expected = (batch.known_moments[:, :4] - 0.1) * 0.5  # the autoencoder's shift and scaling factors
    torch.testing.assert_close(heard.condition.masked_latents, expected)
    fresh = stream(pictures, holes=MaskRules())
    _, heard = step(model, fresh, [2, 9], conditions=EVERYTHING)
    hidden = fresh.__getitems__([2, 9]).known_pixels
    mode = model.autoencoder.encode(to_unit_range(hidden))[:, :4]
    torch.testing.assert_close(heard.condition.masked_latents, (mode - 0.1) * 0.5)


def test_a_head_adds_its_loss(model, pictures):
    """Weighted, with the same velocities, times and latents, and the mean of what the log shows of both."""
    images, positions, aligned = stream(pictures), [2, 9, 4], add_align_head(model.network, 1, seed=0)
    batch = images.__getitems__(positions)
    given = {"times": TrainingTimes(), "batch_size": 12, "seed": 7}
    plain = training_step(model, model.network, batch, **given)
    both = training_step(model, aligned, batch, **given, align_weight=0.5)
    assert plain.align_loss is None and torch.equal(plain.loss, plain.velocity_loss)
    assert torch.equal(both.velocity_loss, plain.loss) and torch.equal(both.time, plain.time)
    torch.testing.assert_close(both.loss, both.velocity_loss + 0.5 * both.align_loss)
    shown = {}
    for name, result in (("plain", plain), ("both", both)):
        losses = LossBins(torch.device("cpu"))
        losses.add(result)
        shown[name] = losses.means(lambda tensor: tensor)
    assert shown["both"]["align_loss"] == pytest.approx(both.align_loss.mean().item())
    assert shown["plain"] == {key: value for key, value in shown["both"].items() if key != "align_loss"}


def test_an_image_has_its_own_step_whatever_the_batch(model, pictures):
    images = stream(pictures, holes=MaskRules())
    whole = step(model, images, list(range(12)))[0].loss
    single = torch.cat([step(model, images, [position])[0].loss for position in range(12)])
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=0)


@pytest.mark.parametrize("conditioning", [tiny.SPATIAL, None], ids=["all conditions", "labels"])
@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("positions_on", ["cpu", "meta"])
def test_a_step_never_waits_for_the_device(kl, conditioning, stratified, positions_on):
    """Forwards and backwards, on a device that cannot be read back; positions are there if the step is a CUDA graph."""
    model = tiny.model(kl, **({"conditioning": conditioning} if conditioning else {}))
    shape = model.config.latent_shape
    with torch.device("meta"):
        moments = torch.zeros(6, 2 * shape[0], *shape[1:])
        batch = Batch(
            positions=torch.arange(12, 18, device=positions_on),
            indices=torch.arange(6, device="cpu"),
            labels=torch.zeros(6, dtype=torch.int64),
            moments=moments,
            mask=torch.zeros(6, 1, *shape[1:]) if conditioning else None,
            known_moments=moments.clone() if conditioning else None,
            class_fractions=torch.zeros(6, 3, *shape[1:]) if conditioning else None,
        )
    model = LatentFlow(model.config, model.network.to("meta").train().requires_grad_(), model.autoencoder)
    times = TrainingTimes(distribution="logit_normal", stratified=stratified)
    losses = LossBins(torch.device("meta"))

    def step() -> None:
        result = training_step(model, model.network, batch, times=times, batch_size=6, seed=0)
        result.loss.mean().backward()
        losses.add(result)

    step()  # constants travel to the device once
    with watched() as waits:
        step()
    assert waits == []


def test_dropout_is_repeatable_and_leaves_the_generators_of_the_caller(kl, pictures):
    model = tiny.model(kl, conditioning=tiny.SPATIAL)
    model.network.blocks.append(torch.nn.Dropout(0.5))
    drop = model.network.blocks[-1]

    def network(latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return drop(torch.ones_like(latents))

    def loss(first: int) -> Tensor:
        batch = stream(pictures, holes=MaskRules()).__getitems__(range(first, first + 4))
        return training_step(model, network, batch, times=TrainingTimes(), batch_size=4, seed=0).loss

    model.network.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again = loss(0), loss(0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, again)
