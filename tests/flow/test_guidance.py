"""Classifier-free guidance on a network whose answer is known."""

import pytest
import torch

from latentflow.errors import ConfigError
from latentflow.flow.guidance import ConditionedVelocity, Guide
from latentflow.flow.solvers import integrate
from latentflow.flow.times import sampling_times
from latentflow.shapes import Condition

NULL = 9


class Network:
    """velocity = label * x + time, and a record of the batches it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, latents, time, condition):
        assert len(latents) == len(time) == len(condition.labels)
        self.calls.append((latents, time, condition.labels))
        return condition.labels[:, None, None, None] * latents + time[:, None, None, None]


X = torch.arange(1.0, 13.0).reshape(3, 4, 1, 1)
LABELS = torch.tensor([1, 2, 3])
TIME = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)


def guided(scale, interval=(0.0, 1.0)):
    network = Network()
    null = Condition(labels=torch.full((3,), NULL))
    return network, ConditionedVelocity(network, Condition(labels=LABELS), null, scale, interval)


def velocity_of(labels):
    return labels[:, None, None, None] * X + TIME.float()[:, None, None, None]


@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_formula_on_all_channels_in_one_doubled_batch(scale):
    network, velocity = guided(scale)
    v_cond, v_null = velocity_of(LABELS), velocity_of(torch.full((3,), NULL))
    torch.testing.assert_close(velocity(X, TIME), v_null + scale * (v_cond - v_null))
    ((latents, time, labels),) = network.calls
    assert torch.equal(latents, torch.cat([X, X]))
    assert torch.equal(time, torch.cat([TIME, TIME]).float())
    assert labels.tolist() == [1, 2, 3, NULL, NULL, NULL]
    assert velocity.evaluations.tolist() == [2, 2, 2]


@pytest.mark.parametrize(("scale", "conditions"), [(1.0, LABELS), (0.0, torch.full((3,), NULL))])
def test_scales_one_and_zero_call_the_network_once(scale, conditions):
    network, velocity = guided(scale)
    assert torch.equal(velocity(X, TIME), velocity_of(conditions))
    ((latents, _, labels),) = network.calls
    assert torch.equal(latents, X)
    assert torch.equal(labels, conditions)
    assert velocity.evaluations.tolist() == [1, 1, 1]


def test_interval_is_decided_per_image_and_only_those_inside_are_doubled():
    network, velocity = guided(2.0, interval=(0.4, 0.8))
    v_cond, v_null = velocity_of(LABELS), velocity_of(torch.full((3,), NULL))
    expected = torch.cat([v_cond[:1], v_null[1:] + 2 * (v_cond - v_null)[1:]])
    torch.testing.assert_close(velocity(X, TIME), expected)
    ((latents, time, labels),) = network.calls
    assert torch.equal(latents, torch.cat([X, X[1:]]))
    assert torch.equal(time, torch.cat([TIME, TIME[1:]]).float())
    assert labels.tolist() == [1, 2, 3, NULL, NULL]
    assert velocity.evaluations.tolist() == [1, 2, 2]


def test_scale_zero_in_an_interval():
    network, velocity = guided(0.0, interval=(0.4, 0.6))
    assert torch.equal(velocity(X, TIME), velocity_of(torch.tensor([1, NULL, 3])))
    assert len(network.calls) == 1
    assert velocity.evaluations.tolist() == [1, 1, 1]


def test_no_image_inside_the_interval():
    network, velocity = guided(3.0, interval=(0.0, 0.1))
    assert torch.equal(velocity(X, TIME), velocity_of(LABELS))
    assert len(network.calls[0][0]) == 3


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_selection_is_the_same_velocity_and_adds_to_the_same_counts(rows):
    _, velocity = guided(2.0, interval=(0.5, 1.0))
    whole = velocity(X, TIME)
    selection = velocity.select(rows)
    assert torch.equal(selection(X[rows], TIME[rows]), whole[rows])
    assert velocity.evaluations.tolist() == [2, 2, 4]
    last = selection.select(torch.tensor([0]))
    image = rows[0].item() if rows.dtype != torch.bool else 0
    last(X[image : image + 1], TIME[image : image + 1])
    assert velocity.evaluations.tolist() == ([2, 2, 6] if image == 2 else [3, 2, 4])
    assert torch.equal(selection.evaluations, velocity.evaluations)


def test_model_without_labels():
    velocity = ConditionedVelocity(lambda x, t, condition: 2 * x, Condition())
    assert torch.equal(velocity(X, TIME), 2 * X)
    assert torch.equal(velocity.select(torch.tensor([1]))(X[1:2], TIME[1:2]), 2 * X[1:2])
    assert velocity.evaluations.tolist() == [1, 2, 1]


def test_latents_keep_their_dtype_and_time_is_float32():
    network, velocity = guided(2.0)
    assert velocity(X.double(), TIME).dtype == torch.float64
    latents, time, _ = network.calls[0]
    assert (latents.dtype, time.dtype) == (torch.float64, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, "-1.0"),
        ({"scale": float("nan")}, "nan"),
        ({"interval": (0.8, 0.2)}, r"0\.8\.\.0\.2"),
        ({"interval": (0.0, 1.5)}, "1.5"),
        ({"scale": 2.0, "null": None}, "null condition"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        ConditionedVelocity(Network(), Condition(labels=LABELS), **({"null": Condition(labels=LABELS)} | options))


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_guidance_on_the_first_channels_only(scale):
    """As the published samples of DiT and SiT were drawn; the other channels are those of the condition."""
    network = Network()
    null = Condition(labels=torch.full((3,), NULL))
    velocity = ConditionedVelocity(network, Condition(labels=LABELS), null, scale, guided_channels=3)
    v_cond, v_null = velocity_of(LABELS), velocity_of(torch.full((3,), NULL))
    expected = torch.cat([(v_null + scale * (v_cond - v_null))[:, :3], v_cond[:, 3:]], dim=1)
    torch.testing.assert_close(velocity(X, TIME), expected)
    assert velocity.evaluations.tolist() == [2, 2, 2]


def test_guided_channels_must_be_there():
    with pytest.raises(ConfigError, match="guided channels: 0; give 1 or more"):
        ConditionedVelocity(Network(), Condition(labels=LABELS), Condition(labels=LABELS), 1.5, guided_channels=0)


# Another network in the place of the null condition


class Other(Network):
    """velocity = 10 label * x - time."""

    def __call__(self, latents, time, condition):
        return 10 * super().__call__(latents, time, condition) - 11 * time[:, None, None, None]


OTHERS = torch.tensor([5, 6, 7])


def guided_by_other(scale, interval=(0.0, 1.0), guided_channels=None, cost=1):
    network, other = Network(), Other()
    guide = Guide(other, Condition(labels=OTHERS), cost)
    velocity = ConditionedVelocity(
        network, Condition(labels=LABELS), None, scale, interval, guided_channels, guide=guide
    )
    return network, other, velocity


def velocity_of_other(labels):
    return 10 * labels[:, None, None, None] * X - TIME.float()[:, None, None, None]


@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_formula_with_a_guide_under_its_own_condition(scale):
    network, other, velocity = guided_by_other(scale)
    v, v_guide = velocity_of(LABELS), velocity_of_other(OTHERS)
    torch.testing.assert_close(velocity(X, TIME), v_guide + scale * (v - v_guide))
    assert [labels.tolist() for _, _, labels in network.calls] == [LABELS.tolist()]
    assert [labels.tolist() for _, _, labels in other.calls] == [OTHERS.tolist()]
    assert velocity.evaluations.tolist() == [2, 2, 2]
    assert velocity.evaluations.dtype == torch.int64


@pytest.mark.parametrize(("scale", "calls"), [(1.0, (1, 0)), (0.0, (0, 1))])
def test_scales_one_and_zero_call_one_of_the_two(scale, calls):
    network, other, velocity = guided_by_other(scale, cost=0.25)
    wanted = velocity_of(LABELS) if scale == 1 else velocity_of_other(OTHERS)
    torch.testing.assert_close(velocity(X, TIME), wanted)
    assert (len(network.calls), len(other.calls)) == calls
    assert velocity.evaluations.tolist() == [calls[0] + 0.25 * calls[1]] * 3


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_a_guide_is_called_for_the_images_inside_the_interval(scale):
    """Each image has its own time; what a call of the guide costs is counted for these."""
    network, other, velocity = guided_by_other(scale, interval=(0.4, 0.8), cost=0.25)
    v, v_guide = velocity_of(LABELS), velocity_of_other(OTHERS)
    expected = torch.cat([v[:1], (v_guide + scale * (v - v_guide))[1:]])
    torch.testing.assert_close(velocity(X, TIME), expected)
    assert [labels.tolist() for _, _, labels in other.calls] == [[6, 7]]
    assert [labels.tolist() for _, _, labels in network.calls] == [[1, 2, 3] if scale else [1]]
    assert velocity.evaluations.tolist() == [1, *[1.25 if scale else 0.25] * 2]


def test_a_guide_is_not_called_outside_the_interval():
    network, other, velocity = guided_by_other(2.0, interval=(0.9, 1.0))
    assert torch.equal(velocity(X, TIME), velocity_of(LABELS))
    assert (len(network.calls), len(other.calls)) == (1, 0)


def test_selected_images_keep_their_guide_and_their_channels():
    _, other, velocity = guided_by_other(3.0, guided_channels=1, cost=0.5)
    rows = torch.tensor([2, 0])
    v, v_guide = velocity_of(LABELS), velocity_of_other(OTHERS)
    expected = torch.cat([(v_guide + 3 * (v - v_guide))[:, :1], v[:, 1:]], dim=1)
    torch.testing.assert_close(velocity.select(rows)(X[rows], TIME[rows]), expected[rows])
    assert other.calls[0][2].tolist() == [7, 5]
    assert velocity.evaluations.tolist() == [1.5, 0, 1.5]


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("wide", [1.5, 0.8])
def test_guided_gaussian_has_the_variance_of_the_closed_form(scale, wide):
    """From N(0, a^2), guided away from N(0, b^2), come samples of N(0, (a^s b^(1 - s))^2).

    On the linear path x_t has variance r^2 = (1 - t)^2 a^2 + t^2, and v = x r' / r: the velocities are linear, so the
    logarithm of the scale is integrated from log 1 to s log a + (1 - s) log b.
    """

    def gaussian(std):
        def velocity(x, time, condition):
            t = time.double().reshape(-1, 1, 1, 1)
            return x * (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)

        return velocity

    narrow, nothing = 0.6, Condition()
    velocity = ConditionedVelocity(gaussian(narrow), nothing, scale=scale, guide=Guide(gaussian(wide), nothing))
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    found = integrate(velocity, x, sampling_times(50), solver="rk4").x
    torch.testing.assert_close(found, x * narrow**scale * wide ** (1 - scale), rtol=1e-5, atol=0)
