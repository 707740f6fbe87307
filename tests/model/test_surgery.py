"""Before finetuning, the new network computes what the source computes, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow.autoencoder import LatentNormalisation
from latentflow.data.painting.input_rules import InputRules
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.errors import ConfigError
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.model.conditioning import ColumnCondition, Conditioning
from latentflow.model.config import AutoencoderRecord, ModelConfig
from latentflow.model.surgery import graft, grafted_config, label_rows
from latentflow.networks.dit import DiTConfig
from latentflow.networks.unet import UNetConfig
from latentflow.networks.velocity_network import DenoiserPrediction, NoisePrediction, VelocityPrediction
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.shapes import Condition
from latentflow.weights import filled
from tests import tiny

_SIZES = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2}
_UNET = {"channels": 16, "multipliers": [1, 2], "blocks_per_level": 1, "norm_groups": 4}
NETWORKS: dict[str, Any] = {
    "dit": DiTConfig(**_SIZES),
    "dit-patch-1": DiTConfig(**{**_SIZES, "patch_size": 1}),
    "modern": DiTConfig(**_SIZES, variant="modern", value_residual=True),
    "adm": UNetConfig(**_UNET, attention_factors=[2]),
    "dhariwal": UNetConfig(**_UNET, variant="dhariwal", head_channels=8, attention_factors=[2]),
    "ddpm++": UNetConfig(**_UNET, variant="ddpm++", attention_factors=[2]),
    "ncsn++": UNetConfig(**_UNET, variant="ncsn++"),
}
PREDICTIONS = {
    "velocity": (VelocityPrediction(), LinearPath()),
    "noise": (NoisePrediction(), CosinePath()),
    "edm": (DenoiserPrediction(), LinearPath(sigma_min=0)),
}
AGE = ColumnCondition(name="age", kind="number", mean=50.0, deviation=20.0)
VIEW = ColumnCondition(name="view", kind="label", class_names=["front", "side"])
TAGS = ColumnCondition(name="tags", kind="labels", class_names=["a", "b", "c"])
MAPS = {"map_class_names": list(tiny.MAP_CLASSES), "map_palette": list(tiny.MAP_PALETTE)}
CLASSES = {"class_names": ["cat", "dog", "owl"]}


def config(
    network: Any = NETWORKS["dit"], prediction: str = "velocity", *, size: int = 16, **conditions: Any
) -> ModelConfig:
    """A model of latents 4 x size/2 x size/2."""
    has_input, kind, path = "input_channels" in conditions, *PREDICTIONS[prediction]
    return ModelConfig(
        image_size=size,
        network=network,
        prediction=kind,
        path=path,
        conditioning=Conditioning(**conditions),
        masks=MaskRules() if conditions.get("inpainting") else None,
        inputs=InputRules(origin="gray", form="pixels") if has_input else None,
        input_format=PixelFormat(channels=1) if has_input else None,
        pixel_format=RGB,
        autoencoder=AutoencoderRecord(reference="x/y", content_hash="0" * 64, factor=2, num_channels=4),
        normalisation=LatentNormalisation(shift=[0.0] * 4, scale=[1.0] * 4),
    )


def source_of(config: ModelConfig) -> tuple[ModelConfig, dict[str, Tensor]]:
    return config, tiny.randomise(config.build_network()).eval().state_dict()


def grafted(source: tuple[ModelConfig, dict[str, Tensor]], wanted: ModelConfig, **class_from: str):
    """The new model's config and network, and the names of its new weights."""
    before, weights = source
    now = grafted_config(before, wanted)
    result = graft(before, weights, now, class_from)
    return now, filled(now.build_network, result.weights, "source").eval(), result.made


def drawn(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def velocity(config: ModelConfig, network: torch.nn.Module, size: int = 8, **given: Tensor) -> Tensor:
    """At fixed latents and times, under the conditions that are given and null ones for the rest."""
    latents = drawn((3, 4, size, size))
    condition = config.conditioning.build(latents.shape, "cpu", Condition(**given))
    return network(latents, torch.tensor([0.1, 0.5, 0.97]), condition)


def given_of(config: ModelConfig, names: set[str]) -> dict[str, Tensor]:
    """Values of some fields of a model's condition that are not null."""
    conditioning = config.conditioning
    null = conditioning.build((3, 4, 8, 8), "cpu")
    values = {}
    for name in names:
        like = getattr(null, name)
        if like is not None:
            values[name] = torch.arange(3) if name == "labels" else drawn(tuple(like.shape), 2).abs().clamp(max=1)
    if "columns" in values:  # [known number, is unknown], then one class of each
        wide = torch.zeros_like(null.columns)
        for kind, place in (
            (one, one.place) for one in conditioning.kinds.values() if one.dropout_key == "column_dropout"
        ):
            wide[:, place.start] = 1.0 if kind.row.kind != "number" else 37.0
        values["columns"] = wide
    return values


ADDED = {
    "the same": {},
    "a known part": {"inpainting": True},
    "maps": MAPS,
    "inputs": {"input_channels": 4},
    "columns": {"columns": [AGE, VIEW, TAGS]},
    "variants": {"augmentation": ["flip", "turn"]},
    "all of them": {**tiny.SPATIAL, "input_channels": 4, "columns": [TAGS, AGE], "augmentation": ["flip"]},
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("added", ADDED)
def test_added_conditions_change_nothing(network, added):
    source = source_of(config(NETWORKS[network], **CLASSES))
    now, net, made = grafted(source, config(NETWORKS[network], **CLASSES, **ADDED[added]))
    labels = torch.tensor([0, 2, 3])
    before = velocity(source[0], filled(source[0].build_network, source[1], "").eval(), labels=labels)
    given = given_of(now, {"masked_latents", "mask", "class_fractions", "input", "columns", "augmentation"})
    assert torch.equal(velocity(now, net, labels=labels, **given), before)
    assert torch.equal(velocity(now, net, labels=labels), before)
    assert bool(made) is bool(ADDED[added])
    assert before.std() > 0.01


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_classes_begin_with_those_of_the_source(network, prediction):
    source = source_of(config(NETWORKS[network], prediction, **CLASSES))
    before = filled(source[0].build_network, source[1], "").eval()
    names = ["corgi", "dog", "finch"]
    now, net, made = grafted(source, config(NETWORKS[network], class_names=names), corgi="cat", finch="owl")
    rows = torch.tensor([0, 1, 2])
    assert torch.equal(velocity(now, net, labels=rows), velocity(source[0], before, labels=rows))
    assert torch.equal(velocity(now, net), velocity(source[0], before))
    assert now.prediction == source[0].prediction
    assert not made  # the same three rows, by other names
    now, net, made = grafted(source, config(NETWORKS[network], class_names=["finch", "dog"]), finch="owl")
    assert torch.equal(
        velocity(now, net, labels=torch.tensor([0, 1, 2])),
        velocity(source[0], before, labels=torch.tensor([2, 1, 3])),
    )
    assert len(made) == 1 and "label" in next(iter(made))


def test_a_new_class_begins_with_the_mean_of_the_old_ones():
    source = source_of(config(**CLASSES))
    now, net, _ = grafted(source, config(class_names=["finch"]))
    with_mean = dict(source[1])
    table = with_mean["label_embedding.weight"].clone()
    table[0] = table[:3].double().mean(0).float()
    with_mean["label_embedding.weight"] = table
    before = filled(source[0].build_network, with_mean, "").eval()
    zero = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(velocity(now, net, labels=zero), velocity(source[0], before, labels=zero))


def test_classes_without_images_are_no_part_of_the_mean():
    seen = config(**CLASSES)
    training = seen.training.model_copy(update={"images_per_class": [5, 0, 7]})
    assert label_rows(seen.model_copy(update={"training": training}), ["finch", "dog"], {}) == [[0, 2], [1]]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("columns", [[], [VIEW, AGE]], ids=["", "with columns"])
def test_a_model_without_classes_gets_some(network, columns):
    source = source_of(config(NETWORKS[network], columns=columns))
    before = filled(source[0].build_network, source[1], "").eval()
    now, net, _ = grafted(source, config(NETWORKS[network], columns=columns, **CLASSES))
    given = given_of(now, {"columns"})
    after = velocity(now, net, labels=torch.tensor([0, 2, 3]), **given)
    assert torch.equal(after, velocity(source[0], before, **given))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("columns", [[], [VIEW, AGE]], ids=["", "with columns"])
def test_a_model_with_classes_loses_them(network, columns):
    source = source_of(config(NETWORKS[network], columns=columns, **CLASSES))
    before = filled(source[0].build_network, source[1], "").eval()
    now, net, made = grafted(source, config(NETWORKS[network], columns=columns))
    given = given_of(now, {"columns"})
    assert torch.equal(velocity(now, net, **given), velocity(source[0], before, **given))
    assert now.conditioning.constant_embedding and len(made) == 1
    again, net, made = grafted((now, net.state_dict()), config(NETWORKS[network], columns=columns, **CLASSES))
    assert torch.equal(velocity(again, net, labels=torch.arange(3), **given), velocity(source[0], before, **given))
    assert again.conditioning.constant_embedding


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("gone", ["maps", "inputs", "columns", "variants"])
def test_conditions_that_are_taken_away_are_null(network, gone):
    source = source_of(config(NETWORKS[network], **CLASSES, **ADDED[gone]))
    before = filled(source[0].build_network, source[1], "").eval()
    now, net, _ = grafted(source, config(NETWORKS[network], **CLASSES))
    labels = torch.tensor([0, 2, 3])
    assert torch.equal(velocity(now, net, labels=labels), velocity(source[0], before, labels=labels))


def test_known_columns_and_map_classes_keep_their_vectors():
    view = VIEW.model_copy(update={"class_names": ["side", "top"]})
    age = AGE.model_copy(update={"mean": 9.0, "deviation": 3.0})
    maps = {"map_class_names": ["tree", "sea", "road"], "map_palette": list(tiny.MAP_PALETTE)}
    source = source_of(config(columns=[AGE, VIEW], **MAPS))
    before = filled(source[0].build_network, source[1], "").eval()
    now, net, made = grafted(source, config(columns=[view, age], **maps))
    assert (now.conditioning.columns[1].mean, now.conditioning.columns[1].deviation) == (50.0, 20.0)
    assert made == {"column_embedding.parts.0.table", "spatial.map_encoder.mix.weight"} | {
        f"column_embedding.parts.1.{name}"
        for name in ("unknown", "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
    }
    fractions = drawn((3, 3, 8, 8)).softmax(1)
    there, here = fractions.clone(), fractions.clone()
    here[:, 1] = 0  # the sea is new
    there[:, 0], there[:, 1], there[:, 2] = 0, here[:, 2], here[:, 0]
    old = torch.tensor([[30.0, 0.0, 1.0], [60.0, 0.0, 1.0], [0.0, 1.0, 2.0]])  # age, not known, side or not known
    new = torch.stack([old[:, 2] - 1, old[:, 0], old[:, 1]], dim=1)
    new[2, 0] = 2  # "not known" stands behind two classes in both
    after = velocity(now, net, columns=new, class_fractions=here)
    # The classes of maps stand in another order, in which their sum is rounded.
    torch.testing.assert_close(after, velocity(source[0], before, columns=old, class_fractions=there))


@pytest.mark.parametrize("network", NETWORKS)
def test_another_size(network):
    source = source_of(config(NETWORKS[network], **CLASSES))
    before = filled(source[0].build_network, source[1], "").eval()
    now, net, made = grafted(source, config(NETWORKS[network], size=24, **CLASSES))
    assert now.latent_shape == (4, 12, 12) and not made
    assert torch.equal(velocity(now, net, 12), velocity(source[0], before, 12))
    assert torch.equal(velocity(now, net), velocity(source[0], before))


@pytest.mark.parametrize(
    ("before", "wanted", "words"),
    [
        ({"inpainting": True}, {}, "conditioning.inpainting=true"),
        ({"columns": [AGE]}, {"columns": [VIEW.model_copy(update={"name": "age"})]}, "conditioning.columns"),
    ],
)
def test_what_cannot_be(before, wanted, words):
    with pytest.raises(ConfigError, match=words):
        grafted_config(config(**before), config(**wanted))


@pytest.mark.parametrize(
    ("class_from", "words"),
    [
        ({"corgi": "dogs"}, ["no class 'dogs'", "did you mean 'dog'"]),
        ({"corgy": "dog"}, ["no class 'corgy'", "did you mean 'corgi'"]),
    ],
)
def test_classes_that_are_not_there(class_from, words):
    with pytest.raises(ConfigError) as caught:
        label_rows(config(**CLASSES), ["corgi", "finch"], class_from)
    for part in words:
        assert part in str(caught.value)


def test_a_source_without_classes_lends_none():
    with pytest.raises(ConfigError, match="it has no classes"):
        label_rows(config(), ["corgi"], {"corgi": "dog"})
    assert label_rows(config(), ["corgi"], {}) == [[]]
