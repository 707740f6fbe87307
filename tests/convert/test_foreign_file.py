"""Foreign files: weights out of whatever they are wrapped in, and nothing else; no code in a file ever runs."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from latentflow.convert.foreign_file import PREFIXES, WRAPPERS, Checkpoint, read_checkpoint
from latentflow.errors import ArtifactError

WEIGHTS = {
    "conv.weight": torch.arange(6.0).reshape(2, 3),
    "conv.bias": torch.tensor([1.0, -1.0]),
    "counter": torch.tensor(3),
}
OTHERS = {key: tensor + 1 for key, tensor in WEIGHTS.items()}


def prefixed(start: str, weights: dict[str, torch.Tensor] = WEIGHTS) -> dict[str, torch.Tensor]:
    return {start + key: tensor for key, tensor in weights.items()}


def saved(content: object, folder: Path, name: str = "model_475.pth", **how: object) -> Path:
    torch.save(content, folder / name, **how)
    return folder / name


def holds(found: Checkpoint, expected: dict[str, torch.Tensor] = WEIGHTS) -> bool:
    return found.weights.keys() == expected.keys() and all(torch.equal(found.weights[k], expected[k]) for k in expected)


def refusal(file: Path, **how: object) -> str:
    """The one line about a file that cannot be used."""
    with pytest.raises(ArtifactError) as caught:
        read_checkpoint(file, **how)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message


# What weights come in


@pytest.mark.parametrize("start", ["", *PREFIXES, "module._orig_mod.", "_orig_mod.module.", "module.model."])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_plain_weights(tmp_path, start, zipped):
    file = saved(prefixed(start), tmp_path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(file)
    assert holds(found)
    assert (found.part, found.options, found.origin) == ("", {}, str(file))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({**prefixed("ema_model."), **prefixed("model.", OTHERS)}, "ema_model"),
        ({**prefixed("model.diffusion_model."), **prefixed("first_stage_model.", OTHERS)}, "model.diffusion_model"),
        (
            {"state_dict": {**prefixed("model.diffusion_model."), "betas": torch.ones(3)}},
            "state_dict, model.diffusion_model",
        ),
        ({"model": prefixed("module.", OTHERS), "ema_model": prefixed("_fsdp_wrapped_module.")}, "ema_model"),
        ({"params": OTHERS, "params_ema": WEIGHTS}, "params_ema"),
    ],
)
def test_the_network_among_other_weights(tmp_path, content, part):
    """The averaged one where there are two of it."""
    found = read_checkpoint(saved(content, tmp_path))
    assert holds(found)
    assert found.part == part


def test_a_prefix_on_some_keys_alone(tmp_path):
    message = refusal(saved({**prefixed("module."), "conv.scale": torch.ones(1)}, tmp_path))
    assert "'module.conv.weight' has the prefix 'module.', but 'conv.scale' does not" in message


def test_safetensors(tmp_path):
    save_file(prefixed("module."), tmp_path / "model.safetensors")
    assert holds(read_checkpoint(tmp_path / "model.safetensors"))


def test_training_state_of_lfm(tmp_path):
    """content.pth, as accelerate's run writes it: optimiser and scheduler are passed over."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-4)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500, eta_min=1e-5)
    content = {
        "epoch": 475,
        "global_step": 400_000,
        "args": Namespace(
            exp="ffhq_f8_dit", model_type="DiT-L/2", ch_mult=[1, 2], dropout=0.0, resume=False, ckpt=None
        ),
        "model_dict": prefixed("module."),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    found = read_checkpoint(saved(content, tmp_path, "content.pth"))
    assert holds(found)
    assert found.part == "model_dict"
    assert found.options["model_type"] == "DiT-L/2"
    assert found.options["ch_mult"] == [1, 2]


def test_training_state_of_sit_and_dit(tmp_path):
    """The averaged weights are what their samples were drawn with."""
    content = {"model": OTHERS, "ema": WEIGHTS, "opt": {"state": {}}, "args": Namespace(model="SiT-XL/2")}
    found = read_checkpoint(saved(content, tmp_path, "0400000.pt"))
    assert holds(found)
    assert (found.part, found.options) == ("ema", {"model": "SiT-XL/2"})


@pytest.mark.parametrize("part", WRAPPERS)
def test_other_wrappers(tmp_path, part):
    found = read_checkpoint(saved({"step": 3, part: prefixed("module."), "args": {"nf": 32}}, tmp_path))
    assert holds(found)
    assert (found.part, found.options) == (part, {"nf": 32})


def test_config_beside_the_file(tmp_path):
    (tmp_path / "config.yaml").write_text("model_type: adm\nnf: 128\nch_mult: [1, 2]\n", encoding="utf-8")
    file = saved(WEIGHTS, tmp_path)
    assert read_checkpoint(file).options == {"model_type": "adm", "nf": 128, "ch_mult": [1, 2]}
    with_args = saved({"model": WEIGHTS, "args": Namespace(nf=32)}, tmp_path, "content.pth")
    assert read_checkpoint(with_args).options == {"nf": 32}


@pytest.mark.parametrize(
    "text", [b"a: [1", b"- 1\n- 2\n", b"\xff\xfe\x00", b"!!python/object/apply:os.system ['ls']\n"]
)
def test_config_that_is_of_no_use(tmp_path, text):
    (tmp_path / "config.yaml").write_bytes(text)
    found = read_checkpoint(saved(WEIGHTS, tmp_path))
    assert holds(found)
    assert found.options == {}


def test_encoder_of_maps(tmp_path):
    encoder = {"channel_mapper.weight": torch.ones(4, 5, 1, 1)}
    expected = {**WEIGHTS, "cond_stage_model.channel_mapper.weight": torch.ones(4, 5, 1, 1)}
    content = {"model_dict": WEIGHTS, "cond_stage_model_dict": prefixed("module.", encoder)}
    assert holds(read_checkpoint(saved(content, tmp_path, "content.pth")), expected)

    apart = saved(prefixed("module.", encoder), tmp_path, "cond_stage_model.pth")
    assert holds(read_checkpoint(saved(WEIGHTS, tmp_path), encoder=apart), expected)
    assert holds(read_checkpoint(saved(WEIGHTS, tmp_path)))
    with pytest.raises(ArtifactError, match=r"nowhere\.pth does not exist"):
        read_checkpoint(saved(WEIGHTS, tmp_path), encoder=tmp_path / "nowhere.pth")


# What is no checkpoint


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "holds a list, not a state_dict"),
        (torch.ones(2), "holds a Tensor, not a state_dict"),
        ({}, "is empty"),
        ({"model": {}}, "is empty"),
        ({"epoch": 3, "weights": WEIGHTS}, "has 'epoch', which is not a named tensor"),
        ({"model": {**WEIGHTS, "args": 3}}, "has 'args', which is not a named tensor"),
        ({"w": torch.ones(2, 2).to_sparse()}, "'w' is not a dense tensor"),
    ],
)
def test_no_weights(tmp_path, content, said):
    assert said in refusal(saved(content, tmp_path))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_truncated(tmp_path, zipped, share):
    file = saved({"w": torch.randn(100, 100)}, tmp_path, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    assert "truncated" in refusal(file)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>\n",
        b"PK\x03\x04" * 9,
    ],
    ids=["empty", "html", "zip magic"],
)
def test_files_of_another_kind(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    assert re.search("truncated,? or not a", refusal(file))


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_folders_and_files_that_are_not_there(tmp_path, name):
    assert "does not exist" in refusal(tmp_path / name)
    (tmp_path / name).mkdir()
    refusal(tmp_path / name)


def test_truncated_safetensors(tmp_path):
    save_file({"w": torch.randn(100, 100)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refusal(tmp_path / "model.safetensors")


# Files full of code


class Runs:
    """Unpickled, it calls `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.fixture(params=["os.system", "subprocess", "exec", "eval in a list"])
def code(request, tmp_path_factory):
    """An object that leaves a trace when it is unpickled; the test fails if it ever does."""
    trace = tmp_path_factory.mktemp("traces") / "ran"
    touch = f"open({str(trace)!r}, 'w').close()"
    harmful = {
        "os.system": Runs(os.system, f"touch {shlex.quote(str(trace))}"),
        "subprocess": Runs(subprocess.check_call, ["touch", str(trace)]),
        "exec": Runs(exec, touch),
        "eval in a list": [1, [Runs(eval, touch)]],
    }[request.param]
    pickle.loads(pickle.dumps(harmful))
    assert trace.exists(), "the code is a dud"
    trace.unlink()
    yield harmful
    assert not trace.exists(), "code in a file was run"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_file_of_torch(tmp_path, code, zipped):
    message = refusal(saved({**WEIGHTS, "w": code}, tmp_path, _use_new_zipfile_serialization=zipped))
    assert "would run " in message


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_beside_and_inside_the_weights(tmp_path, code, zipped):
    how = {"_use_new_zipfile_serialization": zipped}
    assert "would run " in refusal(saved({"model_dict": {**WEIGHTS, "deep": {"er": [code]}}}, tmp_path, **how))
    assert "would run " in refusal(saved({"model_dict": WEIGHTS, "optimizer": code}, tmp_path, **how))
    assert "would run " in refusal(saved({"model": WEIGHTS, "args": Namespace(exp=code)}, tmp_path, **how))


@pytest.mark.parametrize("name", ["model.pkl", "model.pth", "model.pt", "model.safetensors"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_pickle(tmp_path, code, name, protocol):
    file = tmp_path / name
    file.write_bytes(pickle.dumps({"model": code}, protocol=protocol))
    refusal(file)


def test_code_in_the_file_of_the_encoder(tmp_path, code):
    encoder = saved({"channel_mapper.weight": code}, tmp_path, "encoder.pth")
    with pytest.raises(ArtifactError, match=r"encoder\.pth would run "):
        read_checkpoint(saved(WEIGHTS, tmp_path), encoder=encoder)


class _Loud(torch.nn.Linear):
    """A network that records when it is unpickled."""

    woken: ClassVar[list[str]] = []

    def __setstate__(self, state):
        self.woken.append("network")
        super().__setstate__(state)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_whole_network(tmp_path, wrapped):
    network = _Loud(2, 2)
    pickle.loads(pickle.dumps(network))
    assert _Loud.woken, "the network is a dud"
    _Loud.woken.clear()
    message = refusal(saved({"ema": network} if wrapped else network, tmp_path))
    assert "_Loud" in message
    assert "state_dict" in message
    assert not _Loud.woken
    assert "torch.nn.modules.linear.Linear" in refusal(saved(torch.nn.Linear(2, 2), tmp_path))
