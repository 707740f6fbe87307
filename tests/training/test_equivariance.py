"""The equivariance term of a first stage, where its value is known."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from latentflow.randomness import ImageRandom
from latentflow.shapes import shrink
from latentflow.training.equivariance import equivariance_loss, quarter_turned


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def enlarged(latents):
    """A decoder that repeats each latent pixel, which commutes with quarter turns."""
    return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)


def random_of(count):
    return ImageRandom.at(0, "test", range(count))


def test_quarters_are_turned_image_by_image():
    images = normal(5, 2, 3, 3)
    found = quarter_turned(images, torch.tensor([0, 1, 2, 3, 1]))
    assert torch.equal(found[0], images[0])
    assert torch.equal(found[1], torch.stack([torch.rot90(plane) for plane in images[1]]))
    assert torch.equal(found[2], images[2].flip(-1).flip(-2))
    assert torch.equal(quarter_turned(found, torch.tensor([0, 3, 2, 1, 3])), images)


def test_shrinking_keeps_constants_and_the_mean_and_halves_by_a_tent():
    assert torch.allclose(shrink(torch.full((1, 3, 8, 8), 0.7), 3), torch.tensor(0.7))
    images = normal(2, 3, 8, 8)
    assert shrink(images, 8) is images
    line = torch.zeros(1, 1, 8, 8)
    line[..., 3] = 1  # half a pixel from the centre of one pixel of the result, three halves from that of the next
    torch.testing.assert_close(shrink(line, 4)[0, 0, 0], torch.tensor([0.0, 3 / 8, 1 / 8, 0.0]))


def test_an_equivariant_decoder_has_no_error_and_every_transformation_occurs():
    """Constant images and latents stay what they are; flat latents decode to flat images of any side."""
    latents = normal(64, 3, 1, 1).expand(-1, -1, 8, 8)
    seen = []

    def decode(z):
        seen.append(z.shape[-1])
        return enlarged(z)

    error = equivariance_loss(decode, latents, enlarged(latents), random_of(64))
    torch.testing.assert_close(error, torch.zeros(64), rtol=0, atol=1e-5)
    assert seen == [2, 4, 6, 8]


def test_the_error_of_a_decoder_that_does_not_turn():
    """It adds brightness that grows from left to right; in the images this turns with everything else."""
    ramp = torch.arange(16.0) / 16

    def decode(z):
        return enlarged(z) + ramp

    latents = normal(8, 3, 8, 8)
    error = equivariance_loss(decode, latents, decode(latents), FullSize(8))
    ways = [(torch.rot90(ramp.expand(16, 16), turn) - ramp).abs().mean() for turn in range(4)]
    torch.testing.assert_close(error, torch.stack(ways).repeat(2))
    assert ways[2] == 0.5


class FullSize:
    """Random numbers that turn every image and shrink none."""

    def __init__(self, count):
        self.numbers = torch.stack([torch.arange(count) % 4 / 4, torch.full((count,), 0.99)], 1).double()

    def uniform(self, number):
        assert number == 2
        return self.numbers


def test_each_image_keeps_its_place_and_its_transformation_in_any_batch():
    latents, weight = normal(12, 4, 8, 8), normal(3, 4, 3, 3, seed=1)

    def decode(z):
        return enlarged(F.conv2d(z, weight, padding=1))

    pixels = enlarged(latents[:, :3])
    together = equivariance_loss(decode, latents, pixels, random_of(12))
    for place in (0, 5, 11):
        alone = equivariance_loss(
            decode, latents[place : place + 1], pixels[place : place + 1], ImageRandom.at(0, "test", [place])
        )
        torch.testing.assert_close(alone, together[place : place + 1])
    assert together.std() > 0


def test_latents_of_one_pixel_can_only_be_turned():
    latents = normal(6, 3, 1, 1)
    assert equivariance_loss(enlarged, latents, enlarged(latents), random_of(6)).abs().max() == 0
