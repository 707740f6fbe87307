"""Spatial conditions in the network: what is read where, the paper's map encoder, and that it learns."""

import pytest
import torch
from torch.nn.functional import interpolate, one_hot

from latentflow.data.items import UNLABELLED
from latentflow.data.painting.latent_size import class_counts, shares
from latentflow.networks.dit import DiT, DiTConfig
from latentflow.networks.spatial_encoder import SpatialEncoder, SpatialInputs
from latentflow.shapes import Condition
from tests import tiny

C, K, SIDE = 4, 3, 8


def conditions(num_images: int = 2, *, inpainting: bool = True, maps: bool = True, seed: int = 0) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"masked_latents": (C, inpainting), "mask": (1, inpainting), "class_fractions": (K, maps)}
    return Condition(
        **{
            name: torch.rand(num_images, channels, SIDE, SIDE, generator=generator)
            for name, (channels, is_there) in shapes.items()
            if is_there
        }
    )


def latents(num_images: int = 2) -> torch.Tensor:
    return torch.randn(num_images, C, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inpainting", [False, True])
@pytest.mark.parametrize("maps", [False, True])
def test_channels_are_latents_masked_latents_mask_encoded_map(inpainting, maps):
    inputs = SpatialInputs(C, inpainting=inpainting, num_map_classes=K if maps else 0)
    condition, x = conditions(inpainting=inpainting, maps=maps), latents()
    expected = [x]
    if inpainting:
        expected += [condition.masked_latents, condition.mask]
    if maps:
        weight = inputs.map_encoder.mix.weight[:, :, 0, 0]  # [C, K]
        expected.append(torch.einsum("ck,bkhw->bchw", weight, condition.class_fractions))
    joined = inputs(x, condition)
    torch.testing.assert_close(joined, torch.cat(expected, 1), rtol=0, atol=1e-6)
    assert joined.shape[1] == inputs.num_channels
    assert inputs.num_channels == C + (C + 1) * inpainting + C * maps


def test_it_is_the_encoder_of_the_paper():
    """A one-hot map, halved three times by a bilinear filter, then a 1x1 convolution; unlabelled pixels are zero."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, K + 1, (2, 8 * SIDE, 8 * SIDE), generator=generator)
    halved = one_hot(maps, K + 1)[..., :K].permute(0, 3, 1, 2).float()
    for _ in range(3):
        halved = interpolate(halved, scale_factor=0.5, mode="bilinear", align_corners=False)
    stored = maps.where(maps < K, UNLABELLED).byte().numpy()
    fractions = shares(torch.stack([class_counts(one, K, 8) for one in stored]), 8)
    torch.testing.assert_close(fractions, halved, rtol=0, atol=1e-6)
    encoder = SpatialEncoder(K, C)
    published = torch.nn.functional.conv2d(halved, encoder.mix.weight)
    torch.testing.assert_close(encoder(fractions), published, rtol=0, atol=1e-6)
    assert published.std() > 0.1


def test_where_no_class_is_named_the_encoding_is_zero():
    encoder = SpatialEncoder(K, C)
    assert encoder(torch.zeros(1, K, 2, 2)).eq(0).all()
    assert [name for name, _ in encoder.named_parameters()] == ["mix.weight"]


@pytest.mark.parametrize(
    ("made", "given", "said"),
    [
        ((True, K), conditions(maps=False), r"class_fractions: this network wants \(2, 3, 8, 8\), got none"),
        ((True, K), conditions(inpainting=False), r"masked_latents: this network wants \(2, 4, 8, 8\), got none"),
        ((False, K), conditions(), r"masked_latents: this network wants none, got \(2, 4, 8, 8\)"),
        ((True, 0), conditions(), r"class_fractions: this network wants none, got \(2, 3, 8, 8\)"),
        ((True, K + 1), conditions(), r"class_fractions: this network wants \(2, 4, 8, 8\), got \(2, 3, 8, 8\)"),
        ((True, K), conditions(3), r"masked_latents: this network wants \(2, 4, 8, 8\), got \(3, 4, 8, 8\)"),
        (
            (True, 0),
            Condition(masked_latents=torch.zeros(2, C, SIDE, SIDE), mask=torch.zeros(2, C, SIDE, SIDE)),
            r"mask: this network wants \(2, 1, 8, 8\), got \(2, 4, 8, 8\)",
        ),
    ],
)
def test_a_field_that_is_missing_unexpected_or_of_another_shape(made, given, said):
    inputs = SpatialInputs(C, inpainting=made[0], num_map_classes=made[1])
    with pytest.raises(ValueError, match=said):
        inputs(latents(), given)


def test_fields_take_the_dtype_of_the_latents():
    inputs = SpatialInputs(C, inpainting=True, num_map_classes=K).double()
    assert inputs(latents().double(), conditions()).dtype == torch.float64


SIZES = tiny.RECIPE["network"]


def dit(**facts) -> DiT:
    return DiT(DiTConfig(**SIZES), in_channels=C, out_channels=C, **facts)


def test_a_network_with_all_conditions_has_the_shape_of_its_latents():
    network = tiny.randomise(dit(num_classes=2, inpainting=True, num_map_classes=K))
    condition = conditions()
    condition = Condition(torch.tensor([0, 2]), condition.masked_latents, condition.mask, condition.class_fractions)
    velocity = network(latents(), torch.tensor([0.2, 0.7]), condition)
    assert velocity.shape == (2, C, SIDE, SIDE)
    assert network.patch_embedding.in_channels == 3 * C + 1


@pytest.mark.parametrize("field", ["masked_latents", "mask", "class_fractions"])
def test_every_field_has_a_say_and_only_in_its_own_image(field):
    network = tiny.randomise(dit(inpainting=True, num_map_classes=K)).requires_grad_(False)
    condition, other = conditions(), conditions(seed=5)
    swapped = {name: getattr(condition, name).clone() for name in condition.names}
    swapped[field][1] = getattr(other, field)[1]
    time = torch.tensor([0.2, 0.7])
    one, changed = network(latents(), time, condition), network(latents(), time, Condition(**swapped))
    torch.testing.assert_close(one[0], changed[0], rtol=0, atol=1e-6)
    assert (one[1] - changed[1]).abs().max() > 0.01


def test_gradients_reach_the_map_encoder():
    network = tiny.randomise(dit(num_map_classes=K))
    network(latents(), torch.tensor([0.2, 0.7]), conditions(inpainting=False)).square().mean().backward()
    gradient = network.spatial.map_encoder.mix.weight.grad
    assert (gradient.abs() > 1e-6).all()


def test_a_fresh_encoder_has_vectors_as_long_as_latents():
    torch.manual_seed(0)
    weight = dit(num_map_classes=100).spatial.map_encoder.mix.weight
    assert weight.shape == (C, 100, 1, 1)
    assert abs(weight.std().item() - 1) < 0.1
