"""The hash of a model's weights follows the weights."""

from __future__ import annotations

import pytest
import torch

from latentflow import LatentFlow

from .. import tiny


@pytest.fixture
def folder(kl, tmp_path):
    tiny.model(kl).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _change(network: torch.nn.Module) -> None:
    with torch.no_grad():
        next(network.parameters()).add_(1.0)


def test_changed_weights_have_another_hash(folder):
    model = LatentFlow.from_pretrained(folder, device="cpu")
    before = model.weights_hash
    assert model.weights_hash == before == LatentFlow.from_pretrained(folder, device="cpu").weights_hash
    _change(model.network)
    assert model.weights_hash != before


def test_weights_loaded_under_inference_mode_are_hashed_again(folder):
    """Inference tensors do not count their versions, so that a kept hash would be old."""
    with torch.inference_mode():
        model = LatentFlow.from_pretrained(folder, device="cpu")
        assert any(parameter.is_inference() for parameter in model.network.parameters())
        before = model.weights_hash
        _change(model.network)
        assert model.weights_hash != before
