"""The probe of converted networks, on one whose every answer is known: the flow of smooth Gaussian data.

With data ~ N(mean, K) along rows and columns of the latents and x_t = (1 - t) data + t noise, x_t is Gaussian with the
covariance S = (1 - t)^2 K + t^2 in each eigenvector of K, and the velocity of the best network is

    v(x, t) = -mean + (t - (1 - t) K) / S (x - (1 - t) mean).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from latentflow.api import LatentFlow
from latentflow.convert.selfcheck import SelfCheck, check_flow
from latentflow.errors import ArtifactError
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.shapes import Condition, per_image
from tests import tiny

SIDE = tiny.IMAGE_SIZE // tiny.FACTOR


class SmoothData(nn.Module):
    """The exact velocity for data of unit variance whose neighbours correlate by `correlation`.

    Args:
        sign: of the velocity.
        turned: its time is 1 - t.
        mean: of the data, by label where there are labels.
    """

    def __init__(self, correlation: float = 0.8, sign: int = 1, turned: bool = False, mean: float = 0.5):
        super().__init__()
        self.sign, self.turned, self.mean = sign, turned, mean
        place = torch.arange(SIDE)
        self.row_variances, self.axes = torch.linalg.eigh(
            (correlation ** (place[:, None] - place).abs()).double()
        )  # K is the product of one such matrix for rows and one for columns
        self.where = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        t = per_image(1 - time if self.turned else time, latents).double()
        labels = torch.zeros(len(latents)) if condition.labels is None else condition.labels
        mean = self.mean * (1 + per_image(labels, latents))
        k = self.row_variances[:, None] * self.row_variances
        gain = (t - (1 - t) * k) / ((1 - t) ** 2 * k + t**2)
        x = latents.double() - (1 - t) * mean
        x = self.axes @ (gain * (self.axes.T @ x @ self.axes)) @ self.axes.T
        return (self.sign * (x - mean)).to(latents.dtype)


class Answers(nn.Module):
    """A network that returns function(latents, time, condition)."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.where = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.function(latents, time, condition)


@pytest.fixture
def model(kl):
    """A model around a network: model(network, classes, path)."""

    def build(network: nn.Module, class_names: tuple[str, ...] = (), path=None) -> LatentFlow:
        config = tiny.model(kl, class_names=class_names).config
        config = config.model_copy(update={"path": path or LinearPath(sigma_min=0)})
        return LatentFlow(config, network, kl)

    return build


def test_the_network_of_these_tests_flows_exactly():
    """Unit white noise arrives with the covariance K: the field of the tests is the one it claims to be."""
    network = SmoothData(mean=0.3)
    x = torch.randn(2, 4, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = 400
    end = x
    for step in range(steps):
        t, h = 1 - step / steps, -1 / steps
        middle = end + h / 2 * network(end, torch.full((2,), t).double(), Condition())
        end = end + h * network(middle, torch.full((2,), t + h / 2).double(), Condition())
    k = (network.row_variances[:, None] * network.row_variances).sqrt()
    expected = 0.3 + network.axes @ (k * (network.axes.T @ x @ network.axes)) @ network.axes.T
    torch.testing.assert_close(end, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_a_trained_network(model, mean):
    found = check_flow(model(SmoothData(mean=mean)))
    assert found.flows
    assert found.slope == pytest.approx(1, abs=0.1)
    assert found.smoothness > 0.4
    assert 0.5 < found.deviation < 1.5
    assert found.ignored == []
    assert found.verdict.startswith("flows from noise to images: slope +")


def test_the_slope_is_that_of_the_velocity_along_the_noise(model):
    """Without a mean the velocity at t = 1 is the noise itself."""
    assert check_flow(model(SmoothData(mean=0))).slope == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_the_sign_is_flipped(model, correlation):
    """SiT's weights, which flow from noise at 0 to data at 1, with only the sign of LFM."""
    with pytest.raises(ArtifactError, match=r"against the noise \(slope -\d\.\d\d\): its sign or its time"):
        check_flow(model(SmoothData(correlation, sign=-1)))


def test_time_is_reversed(model):
    """At its t = 0 the velocity is noise' - x, whose slope along x is -1."""
    with pytest.raises(ArtifactError, match="sign or its time is reversed"):
        check_flow(model(SmoothData(turned=True)))


def test_sign_and_time_are_reversed(model):
    """Both at once pass for a velocity at t = 1, but lead to no image."""
    found = check_flow(model(SmoothData(sign=-1, turned=True)))
    assert found.slope == pytest.approx(1, abs=0.3)
    assert not found.flows
    assert found.verdict.startswith("does not look trained")


def test_white_data_are_no_images(model):
    found = check_flow(model(SmoothData(correlation=0.0)))
    assert abs(found.smoothness) < 0.15
    assert not found.flows


def test_a_network_of_zeros(model):
    found = check_flow(model(Answers(lambda x, t, condition: torch.zeros_like(x))))
    assert found.slope == 0
    assert found.ignored == ["latents", "time"]
    assert not found.flows
    assert "does not depend on latents, time" in found.verdict


def test_random_weights(kl):
    found = check_flow(tiny.model(kl), [0, 2])
    assert not found.flows
    assert found.ignored == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_output_that_is_not_finite(model, value):
    with pytest.raises(ArtifactError, match="not finite; its weights are damaged"):
        check_flow(model(Answers(lambda x, t, condition: x * value)))


def test_output_that_is_not_finite_on_the_way(model):
    exact = SmoothData()
    found = check_flow(
        model(Answers(lambda x, t, condition: exact(x, t, condition) / per_image((t > 0.3).to(x.dtype), x)))
    )
    assert not found.flows
    assert found.verdict.startswith("does not look trained")


def test_a_network_that_ignores_labels(model):
    classes = ("apple", "berry", "cherry")
    conditional = check_flow(model(SmoothData(mean=0.2), classes), [0, 2])
    assert conditional.ignored == []
    assert conditional.flows
    exact = SmoothData(mean=0.2)
    unconditional = check_flow(model(Answers(lambda x, t, _: exact(x, t, Condition())), classes), [0, 2])
    assert unconditional.ignored == ["label"]
    assert not unconditional.flows
    assert unconditional.verdict.endswith("; the output does not depend on label")


def test_a_network_that_ignores_time(model):
    exact = SmoothData()
    found = check_flow(model(Answers(lambda x, t, condition: exact(x, torch.ones_like(t), condition))))
    assert found.ignored == ["time"]
    assert not found.flows


def test_one_label_has_no_other(model):
    """A model of one class: there are no two labels to compare."""
    exact = SmoothData()
    found = check_flow(model(Answers(lambda x, t, condition: exact(x, t, Condition())), ("apple",)), [0, 0])
    assert found.ignored == []


def test_paths_that_are_not_straight_have_no_slope(model):
    found = check_flow(model(SmoothData(), path=CosinePath()))
    assert found.slope is None
    assert found.verdict.partition(": ")[2].startswith("neighbours correlate")


@pytest.mark.parametrize(
    ("change", "flows"),
    [
        ({}, True),
        ({"slope": None}, True),
        ({"slope": 0.5}, False),
        ({"slope": 1.4}, False),
        ({"smoothness": 0.05}, False),
        ({"deviation": 0.1}, False),
        ({"deviation": 9.0}, False),
        ({"deviation": math.nan}, False),
        ({"smoothness": math.nan}, False),
        ({"ignored": ["label"]}, False),
    ],
)
def test_what_counts_as_flowing(change, flows):
    found = SelfCheck(**{"slope": 1.0, "smoothness": 0.6, "deviation": 1.0, "ignored": [], **change})
    assert found.flows == flows
