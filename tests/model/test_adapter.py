"""Adapters: base and adapter are the finetuned model to the bit, a strength goes from one to the other, and what does
not belong together is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentflow.api import LatentFlow
from latentflow.artifacts import open_tensors, read_tensors, write_json, write_tensors
from latentflow.commands.info import describe
from latentflow.commands.merge import merge
from latentflow.commands.push import push
from latentflow.errors import ArtifactError, ConfigError
from latentflow.model.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from latentflow.model.adapter_name import AdaptedName, adapted_name, split_adapted
from latentflow.model.flow_model import FlowModel, config_of, find_model, open_adapter
from latentflow.requests import RequestError
from latentflow.sampling.picture_file import read_facts
from latentflow.shapes import Condition
from tests import tiny

NEW_CLASSES = ("cherry", "date", "apple", "elder")


def velocity(model: FlowModel, labels: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(labels), 4, 8, 8, generator=generator)
    with torch.no_grad():
        return model.velocity(latents, torch.linspace(0.1, 0.9, len(labels)), Condition(torch.tensor(labels)))


@pytest.fixture(scope="module")
def base(kl, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny.model(kl).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def same(base) -> Path:
    """A finetuned model of the same classes."""
    folder = base.parent / "same"
    tiny.finetuned(base, tiny.CLASSES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(base) -> Path:
    """A finetuned model of other classes."""
    folder = base.parent / "other"
    tiny.finetuned(base, NEW_CLASSES).save_pretrained(folder)
    return folder


@pytest.fixture(params=["same", "other"])
def tuned(request) -> Path:
    return request.getfixturevalue(request.param)


def test_base_and_adapter_are_the_finetuned_model(base, tuned):
    whole = LatentFlow.from_pretrained(tuned)
    for adapter in (tuned, tuned / "adapter"):
        both = LatentFlow.from_pretrained(base, adapter=adapter)
        assert both.config == whole.config
        found = both.network.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.network.state_dict().items())
        assert both.weights_hash == whole.weights_hash
        assert both.reference == f"{base}+{adapter}"
    labels = list(range(len(whole.config.conditioning.class_names) + 1))
    assert not torch.equal(velocity(whole, labels[:4]), velocity(LatentFlow.from_pretrained(base), [0, 1, 2, 3]))


def test_strength_0_is_the_base(base, same, other):
    own = LatentFlow.from_pretrained(base)
    none = LatentFlow.from_pretrained(base, adapter=same, adapter_strength=0)
    assert none.weights_hash == own.weights_hash
    none = LatentFlow.from_pretrained(base, adapter=other, adapter_strength=0.0)
    shared = [0, 2, 4], [2, 0, 3]  # cherry, apple and no label, in the order of each
    assert torch.equal(velocity(none, shared[0]), velocity(own, shared[1]))


def test_a_base_of_half_precision_on_disk(kl, base, tmp_path):
    """It is made wide before anything is added, as when it was finetuned."""
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base" / "velocity.safetensors"
    with open_tensors(file) as opened:
        config = {"config": opened.metadata()["config"]}
    write_tensors(file, {name: tensor.half() for name, tensor in read_tensors(file).items()}, config)
    tiny.finetuned(tmp_path / "base", NEW_CLASSES).save_pretrained(tmp_path / "tuned")
    both = LatentFlow.from_pretrained(tmp_path / "base", adapter=tmp_path / "tuned")
    assert both.weights_hash == LatentFlow.from_pretrained(tmp_path / "tuned").weights_hash


def test_strengths_between_are_between(base, other):
    zero, half, one = (
        LatentFlow.from_pretrained(base, adapter=other, adapter_strength=strength).network.state_dict()
        for strength in (0, 0.5, 1)
    )
    for name in one:
        torch.testing.assert_close(half[name], (zero[name] + one[name]) / 2, rtol=0, atol=1e-6)
    assert sum(not torch.equal(zero[name], one[name]) for name in one) > 10


def test_merged_and_unmerged_compute_the_same(base, other):
    unmerged = tiny.finetuned(base, NEW_CLASSES)
    labels = [0, 1, 2, 3, 4]
    expected = velocity(unmerged, labels)
    assert (velocity(LatentFlow.from_pretrained(other), labels) - expected).norm() < 2e-6 * expected.norm()


def test_merge_writes_a_plain_model_folder(base, other, tmp_path):
    merge(base, tmp_path / "merged", adapter=other, adapter_strength=0.7)
    merged, both = (LatentFlow.from_pretrained(name) for name in (tmp_path / "merged", f"{base}+{other}:0.7"))
    assert merged.weights_hash == both.weights_hash and merged.config == both.config
    assert tiny.tree(tmp_path / "merged").keys() == tiny.tree(base).keys()
    with pytest.raises(ConfigError, match="none is given; add --adapter"):
        merge(base, tmp_path / "again")
    with pytest.raises(ArtifactError, match="is not empty"):
        merge(base, tmp_path / "merged", adapter=other)


def test_an_adapter_is_small_and_in_the_layout_of_peft(base, other):
    record = json.loads((other / "adapter" / ADAPTER_CONFIG).read_text())
    assert {"peft_type": "LORA", "r": 3, "lora_alpha": 6.0, "bias": "none"}.items() <= record.items()
    assert record["base_weights"] == FlowModel.from_pretrained(base).weights_hash
    assert record["whole_tensors"] == ["label_embedding.weight"]
    assert record["modules_to_save"] == ["label_embedding"]
    tensors = read_tensors(other / "adapter" / ADAPTER_WEIGHTS)
    for layer in record["target_modules"]:
        a, b = (tensors[f"base_model.model.{layer}.lora_{factor}.weight"] for factor in "AB")
        assert a.shape[0] == b.shape[1] == 3
    label = "label_embedding.weight"
    assert len(tensors) == 2 * len(record["target_modules"]) + 2
    assert tensors[f"base_model.model.{label}"].shape == tensors[f"start.{label}"].shape == (5, 32)


def test_pictures_say_with_which_adapter_they_were_drawn(base, other, tmp_path):
    name = f"{base}+{other}:0.7"
    model = LatentFlow.from_pretrained(base, adapter=other, adapter_strength=0.7)
    samples = model.sample(num=1, classes=["date"], seed=3)
    samples.save(tmp_path)
    (file,) = tmp_path.glob("date*.png")
    facts = read_facts(str(file))
    assert facts["drawn_by"]["model"] == name and facts["drawn_by"]["weights"] == model.weights_hash[:12]
    again = LatentFlow.from_pretrained(facts["drawn_by"]["model"]).sample(num=1, classes=["date"], seed=3)
    assert torch.equal(again.pixels, samples.pixels)


def test_info_says_what_an_adapter_is(base, other):
    facts = describe(other / "adapter")
    assert facts["base"] == str(base) and facts["rank"] == 3 and facts["scale"] == 2.0
    assert facts["classes"] == list(NEW_CLASSES) and facts["layers"] == 14
    assert describe(other)["adapter"] == str(other / "adapter") and describe(base)["adapter"] == "none"


def test_an_adapter_guides_its_base(base, other):
    model = LatentFlow.from_pretrained(base)
    guided = model.sample(num=1, classes=["apple"], guidance=1.5, guide=f"{base}+{other}")
    assert not torch.equal(guided.pixels, model.sample(num=1, classes=["apple"], guidance=1.5).pixels)


# What is refused ------------------------------------------------------------------------------------------------


def test_another_base(kl, base, other, tmp_path):
    tiny.model(kl, seed=1).save_pretrained(tmp_path / "another")
    with pytest.raises(ArtifactError, match=rf"is an adapter of {base}, whose .* but those of .*another have"):
        LatentFlow.from_pretrained(tmp_path / "another", adapter=other)
    with pytest.raises(ArtifactError, match="give the model that it was trained on"):
        LatentFlow.from_pretrained(other, adapter=other)  # merged already


@pytest.mark.parametrize("strength", [math.nan, math.inf, -0.5, 11, True, "much"])
def test_strengths_that_are_none(base, other, strength):
    with pytest.raises(RequestError, match=r"adapter_strength .*: give a number from 0 to 10"):
        LatentFlow.from_pretrained(base, adapter=other, adapter_strength=strength)


def test_adapters_given_twice_or_not_at_all(base, other, same):
    with pytest.raises(RequestError, match="names an adapter already; give one"):
        LatentFlow.from_pretrained(f"{base}+{other}", adapter=same)
    with pytest.raises(RequestError, match=r"adapter_strength 0\.5 has no effect without an adapter"):
        LatentFlow.from_pretrained(base, adapter_strength=0.5)
    with pytest.raises(ArtifactError, match=r"holds no adapter: it has no adapter_config\.json"):
        LatentFlow.from_pretrained(base, adapter=base)
    with pytest.raises(ArtifactError, match="does not exist; give the folder of an adapter"):
        LatentFlow.from_pretrained(base, adapter=base.parent / "nowhere")
    with pytest.raises(ArtifactError, match="is a file; an adapter is a folder"):
        LatentFlow.from_pretrained(base, adapter=other / "adapter" / ADAPTER_WEIGHTS)
    with pytest.raises(ArtifactError, match=rf"is an adapter of {base}; give that model, and --adapter"):
        LatentFlow.from_pretrained(other / "adapter")


def broken(other: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in (other / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def refused(base: Path, adapter: Path, words: str) -> None:
    with pytest.raises(ArtifactError, match=words) as found:
        LatentFlow.from_pretrained(base, adapter=adapter)
    assert str(adapter) in str(found.value) and "\n" not in str(found.value)


def test_broken_adapters(base, other, tmp_path):
    for number, name in enumerate((ADAPTER_WEIGHTS, "config.json")):
        adapter = broken(other, tmp_path / f"without-{number}")
        (adapter / name).unlink()
        refused(base, adapter, rf"{name} (does not exist|is missing)|no such file|cannot read")
    adapter = broken(other, tmp_path / "cut")
    (adapter / ADAPTER_WEIGHTS).write_bytes((adapter / ADAPTER_WEIGHTS).read_bytes()[:-100])
    refused(base, adapter, "damaged|truncated")
    adapter = broken(other, tmp_path / "turned")
    content = bytearray((adapter / ADAPTER_WEIGHTS).read_bytes())
    content[-1] ^= 1
    (adapter / ADAPTER_WEIGHTS).write_bytes(content)
    refused(base, adapter, "damaged")
    adapter = broken(other, tmp_path / "not json")
    (adapter / ADAPTER_CONFIG).write_text("{")
    refused(base, adapter, "JSON|json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("start.label_embedding.weight"), r"'start\.label_embedding\.weight' is missing"),
        (lambda tensors: tensors.update(new=torch.zeros(1)), r"'new' is unknown"),
        (lambda tensors: tensors["base_model.model.label_embedding.weight"].fill_(math.nan), "not finite"),
        (
            lambda tensors: tensors.update({"base_model.model.blocks.0.mlp.up.lora_A.weight": torch.zeros(2, 32)}),
            r"up\.lora_A\.weight has shape \[2, 32\]",
        ),
    ],
    ids=["missing", "unknown", "not finite", "another rank"],
)
def test_tensors_that_do_not_fit(base, other, tmp_path, change, words):
    adapter = broken(other, tmp_path / "adapter")
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    refused(base, adapter, words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("base_weights", None, "base_weights is missing"),
        ("peft_type", "LOHA", "peft_type = 'LOHA'"),
        ("use_dora", True, "use_dora = True"),
        ("r", 0, "r = 0"),
        ("target_modules", ["blocks.9.mlp.up"], "is unknown"),
    ],
)
def test_foreign_adapters(base, other, tmp_path, key, value, words):
    adapter = broken(other, tmp_path / "adapter")
    record = json.loads((adapter / ADAPTER_CONFIG).read_text())
    record[key] = value
    write_json(adapter / ADAPTER_CONFIG, {name: one for name, one in record.items() if one is not None})
    refused(base, adapter, words)


def test_what_peft_adds_is_ignored(base, other, tmp_path):
    adapter = broken(other, tmp_path / "adapter")
    record = json.loads((adapter / ADAPTER_CONFIG).read_text())
    write_json(adapter / ADAPTER_CONFIG, {**record, "layers_pattern": None, "megatron_core": "megatron.core"})
    assert LatentFlow.from_pretrained(base, adapter=adapter).reference == f"{base}+{adapter}"


# Names ----------------------------------------------------------------------------------------------------------


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "a+b", "c+d"):
        Path(folder).mkdir()
    assert split_adapted("a") is None and split_adapted("a+b") is None and split_adapted("me/x@v2") is None
    assert split_adapted("a+c") == AdaptedName("a", "c")
    assert split_adapted("a+c+d:0.25") == AdaptedName("a", "c+d", 0.25)
    assert split_adapted("a+b+c+d") == AdaptedName("a", "b+c+d"), "the first part that exists"
    assert split_adapted("me/x@v2+me/y:0") == AdaptedName("me/x@v2", "me/y", 0.0)
    assert split_adapted("a+odd:name") == AdaptedName("a", "odd:name")
    for text in ("a+c:0.123456789", "a+c", "a+c:0", "a+c:1.5"):
        assert str(split_adapted(text)) == text
    assert adapted_name("a+c:0.5", None, 0.25) == AdaptedName("a", "c", 0.25)
    assert adapted_name("a", None) is None
    with pytest.raises(RequestError, match="give a number from 0 to 10"):
        split_adapted("a+c:12")


def test_what_takes_a_folder_is_refused(base, other):
    name = f"{base}+{other}"
    with pytest.raises(ArtifactError, match=rf"has no folder; make one: latentflow merge {base} --adapter {other}"):
        find_model(name)
    assert config_of(name) == open_adapter(other).config
    with pytest.raises((ArtifactError, ConfigError)):
        push(name, "me/model")
