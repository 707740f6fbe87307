"""What every velocity network refuses."""

import pytest
import torch

from latentflow.networks.base import check_inputs
from latentflow.networks.dit import DiTConfig
from latentflow.networks.unet import UNetConfig
from latentflow.networks.velocity_network import VelocityPrediction, build_network
from latentflow.shapes import Condition
from tests import tiny

FACTS = {"channels": 4, "multiple": 4, "num_classes": 3}


@pytest.mark.parametrize(
    ("shape", "labels", "num_classes"),
    [
        ((2, 4, 8, 8), None, 0),
        ((2, 4, 4, 12), [0, 3], 3),  # 3 is the null label
        ((1, 4, 16, 8), [2], 3),
        ((0, 4, 4, 4), [], 3),
    ],
)
def test_what_fits_passes(shape, labels, num_classes):
    labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
    facts = {**FACTS, "num_classes": num_classes}
    assert check_inputs(torch.zeros(shape), torch.zeros(shape[0]), labels, **facts) is None


@pytest.mark.parametrize(
    ("shape", "time_shape", "message"),
    [
        ((2, 4, 6, 8), (2,), "latents of 6 x 8 do not fit this network: height and width must be multiples of 4"),
        ((2, 4, 8, 9), (2,), "latents of 8 x 9 do not fit this network: height and width must be multiples of 4"),
        ((2, 3, 8, 8), (2,), r"expected latents \[B, 4, H, W\], got \[2, 3, 8, 8\]"),
        ((4, 8, 8), (4,), r"expected latents \[B, 4, H, W\], got \[4, 8, 8\]"),
        ((2, 4, 8, 8), (), r"expected one time per image, shape \[2\], got \[\]"),
        ((2, 4, 8, 8), (1,), r"expected one time per image, shape \[2\], got \[1\]"),
        ((2, 4, 8, 8), (2, 1), r"expected one time per image, shape \[2\], got \[2, 1\]"),
    ],
)
def test_shapes_that_do_not_fit(shape, time_shape, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(torch.zeros(shape), torch.zeros(time_shape), torch.zeros(2, dtype=torch.int64), **FACTS)


@pytest.mark.parametrize(
    ("num_classes", "labels", "message"),
    [
        (0, [1, 0], r"labels \[1, 0\] given to a network without labels"),
        (3, None, r"labels are missing; a network of 3 classes needs one per image \(3 is the null label\)"),
        (3, [0, 4], "label 4 is out of range: 0 to 2, or 3 for the null label"),
        (3, [-1, 0], "label -1 is out of range"),
        (3, [0], r"expected one label per image, shape \[2\], got \[1\]"),
        (3, [[0], [1]], r"expected one label per image, shape \[2\], got \[2, 1\]"),
    ],
)
def test_labels_that_do_not_fit(num_classes, labels, message):
    labels = None if labels is None else torch.tensor(labels)
    facts = {**FACTS, "num_classes": num_classes}
    with pytest.raises(ValueError, match=message):
        check_inputs(torch.zeros(2, 4, 8, 8), torch.zeros(2), labels, **facts)


def test_the_range_is_looked_at_on_the_cpu_only():
    # A device that computes by itself would have to be waited for.
    facts = {**FACTS, "num_classes": 3}
    labels = torch.full((2,), 9)
    with pytest.raises(ValueError, match="label 9 is out of range"):
        check_inputs(torch.zeros(2, 4, 8, 8), torch.zeros(2), labels, **facts)
    check_inputs(torch.zeros(2, 4, 8, 8), torch.zeros(2), labels.to("meta"), **facts)


# Numbers of augmented variants

NETWORKS = {
    "dit": DiTConfig(depth=1, hidden_size=32, num_heads=2, patch_size=2),
    **{
        variant: UNetConfig(channels=8, multipliers=[1, 2], blocks_per_level=1, norm_groups=4, variant=variant)
        for variant in ("adm", "ddpm++")
    },
}
NUMBERS = torch.tensor([[0.5, -1.0, 0.0], [0.0, 0.25, 1.0]])


def network_of(name: str, num_augmentations: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_network(NETWORKS[name], VelocityPrediction(), channels=4, num_augmentations=num_augmentations)


def velocity(network: torch.nn.Module, numbers: torch.Tensor | None) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network(latents, torch.tensor([0.3, 0.8]), Condition(augmentation=numbers))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_new_input_of_numbers_draws_nothing_and_changes_nothing(name):
    """The same seed gives the same network, which ignores the numbers until it learns."""
    with_input, without = network_of(name, 3), network_of(name, 0)
    (own,) = with_input.state_dict().keys() - without.state_dict().keys()
    assert not with_input.state_dict()[own].any()
    for key, weight in without.state_dict().items():
        assert torch.equal(with_input.state_dict()[key], weight), key
    with torch.no_grad():
        for network in (with_input, without):
            for key, weight in network.named_parameters():  # those that start at zero, too
                if key != own:
                    weight.copy_(torch.linspace(-0.3, 0.3, weight.numel()).reshape(weight.shape))
    assert torch.equal(velocity(with_input, NUMBERS), velocity(without, None))


@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_that_are_zero_add_exactly_nothing(name):
    network = tiny.randomise(network_of(name, 3))
    (own,) = (weight for key, weight in network.named_parameters() if "augmentation" in key)
    at_zero, elsewhere = velocity(network, torch.zeros(2, 3)), velocity(network, NUMBERS)
    assert (at_zero - elsewhere).abs().amax((1, 2, 3)).min() > 1e-3
    torch.nn.init.constant_(own, 7.0)
    assert torch.equal(velocity(network, torch.zeros(2, 3)), at_zero)
    assert not torch.equal(velocity(network, NUMBERS), elsewhere)


@pytest.mark.parametrize(
    ("number", "given", "said"),
    [
        (3, None, r"condition.augmentation: this network wants \(2, 3\), got none"),
        (3, torch.zeros(2, 2), r"this network wants \(2, 3\), got \(2, 2\)"),
        (3, torch.zeros(1, 3), r"this network wants \(2, 3\), got \(1, 3\)"),
        (0, torch.zeros(2, 3), r"this network wants none, got \(2, 3\)"),
    ],
)
def test_numbers_that_do_not_fit(number, given, said):
    with pytest.raises(ValueError, match=said):
        velocity(network_of("dit", number), given)
