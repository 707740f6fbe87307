"""Finetuned models guided by the model that they began with (arXiv 2504.01521), before their first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latentflow.api import LatentFlow
from latentflow.model.conditioning import ColumnCondition, Conditioning
from latentflow.model.surgery import graft, grafted_config
from latentflow.weights import filled
from tests import tiny

HOW = {"num": 3, "solver": "euler", "steps": 4, "seed": 5}
OLD = ("pear", "plum")
AGE = ColumnCondition(name="age", kind="number", mean=40.0, deviation=10.0)


@pytest.fixture
def pair(tmp_path, kl):
    """A source in a folder, and a model that begins with it, before its first step."""

    def make(old: tuple[str, ...], new: Conditioning, **class_from: str) -> tuple[Path, LatentFlow]:
        source = tiny.model(kl, class_names=old)
        source.save_pretrained(tmp_path / "source")
        wanted = source.config.model_copy(update={"conditioning": new})
        config = grafted_config(source.config, wanted)
        weights = graft(source.config, source.network.state_dict(), config, class_from).weights
        network = filled(config.build_network, weights, "source").eval().requires_grad_(False)
        LatentFlow(config, network, kl).save_pretrained(tmp_path / "finetuned")
        return tmp_path / "source", LatentFlow.from_pretrained(tmp_path / "finetuned", device="cpu")

    return make


def drawn(model: LatentFlow, **given: Any) -> torch.Tensor:
    return model.sample(**HOW, **given).pixels


def test_by_the_source_it_is_the_guidance_of_the_source(pair):
    """A class that begins as one of the source, away from the source: its guidance by its null label."""
    source, model = pair(OLD, Conditioning(class_names=["quince"]), quince="plum")
    own = LatentFlow.from_pretrained(source, device="cpu")
    found = drawn(model, classes="quince", guidance=3.0, guide=str(source))
    wanted = drawn(own, classes="plum", guidance=3.0)
    torch.testing.assert_close(found.int(), wanted.int(), rtol=0, atol=1)
    assert (found.int() - drawn(model, classes="quince", guidance=1.0).int()).abs().max() > 8


@pytest.mark.parametrize(
    ("old", "new", "given"),
    [
        (OLD, Conditioning(), {}),
        ((), Conditioning(class_names=["quince", "fig"]), {"classes": ["quince"]}),
        ((), Conditioning(columns=[AGE]), {"conditions": {"age": 50}}),
    ],
    ids=["labels taken away", "labels given", "a column given"],
)
def test_what_the_source_draws_itself_is_not_moved(pair, old, new, given):
    source, model = pair(old, new)
    plain = drawn(model, guidance=1.0, **given)
    assert torch.equal(drawn(model, guidance=4.0, guide=str(source), **given), plain)
    assert torch.equal(drawn(LatentFlow.from_pretrained(source, device="cpu"), guidance=1.0, **no_class(old)), plain)


def no_class(old: tuple[str, ...]) -> dict[str, Any]:
    return {"classes": "none"} if old else {}
