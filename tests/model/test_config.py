"""A model folder from a stranger: whatever its config claims is bounded, and must agree with the weights next to it."""

from __future__ import annotations

import copy
import json
import math
import resource
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from latentflow.api import LatentFlow
from latentflow.artifacts import read_tensors, write_tensors
from latentflow.errors import ArtifactError, LatentFlowError
from latentflow.model.config import ModelConfig
from latentflow.model.flow_model import CONFIG_FILE, WEIGHTS_FILE, read_config
from latentflow.networks.unet import UNetConfig
from tests import tiny
from tests.processes import run_here

FREE = ("class_names", "map_class_names", "map_palette", "dropout", "masks", "reference")
"""What may be changed by hand: names and colours, and what matters in training alone."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, kl) -> dict[str, Path]:
    """A transformer with all conditions, and a U-Net with labels."""
    made = {"dit": tiny.model(kl, conditioning=tiny.SPATIAL), "unet": tiny.model(kl)}
    unet = UNetConfig(
        channels=8, multipliers=[1, 2], blocks_per_level=1, attention_factors=[2], num_heads=2, norm_groups=4
    )
    config = made["unet"].config.model_copy(update={"network": unet})
    made["unet"] = LatentFlow(config, config.build_network(), kl)
    folders = {name: tmp_path_factory.mktemp("models") / name for name in made}
    for name, model in made.items():
        model.save_pretrained(folders[name])
    return folders


def fields_of(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every place in a config, sections and lists included, with what stands there."""
    if path:
        yield path, value
    for key, inner in value.items() if isinstance(value, dict) else []:
        yield from fields_of(inner, (*path, key))


def hostile(value: Any) -> list[Any]:
    """What could stand in the place of `value`, each wrong in its own way."""
    if isinstance(value, bool):
        return ["perhaps", 2, {}, math.nan]
    if isinstance(value, int):
        return [10**9, 10**30, 2**15, -1, 0, 1.5, math.nan, "much", [value], {}]
    if isinstance(value, float):
        return [math.nan, math.inf, -math.inf, -1.0, 1e308, 10**400, "much", [value], {}]
    if isinstance(value, str):
        return ["x" * 10**6, "", 5, ["x"], {"x": 1}, "../../../etc/passwd", "\u0000\x1b[31m"]
    if isinstance(value, list):
        return [value[:-1], [*value, *value], [math.nan] * len(value), [-1] * len(value), "x", 5, [[[value]]], {}]
    if isinstance(value, dict):
        return [[], "x", 5, {"no_such_key": 1}, {**value, "no_such_key": 1}]
    return [10**9, -1, "x", [], {}, math.nan]


def changed(config: dict, path: tuple, value: Any) -> dict:
    config = copy.deepcopy(config)
    section = config
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return config


def cases() -> list[tuple[str, tuple]]:
    """(network, place in its config), for the ids of the tests: one test tries all values of one place."""
    network = {"dit": ["depth", "hidden_size", "num_heads", "patch_size", "mlp_ratio", "time_scale", "variant"]}
    network["dit"] += ["position", "mlp", "norm", "qk_norm", "value_residual", "kind", "name"]
    network["unet"] = list(UNetConfig.model_fields)
    top = ["format_version", "image_size", "network", "prediction", "path", "conditioning", "masks", "autoencoder"]
    top += ["normalisation", "sampling", "training"]
    return [(kind, ("network", key)) for kind, keys in network.items() for key in keys] + [
        ("dit", (key,)) for key in top
    ]


@pytest.fixture
def stranger(folders, tmp_path) -> Iterator:
    """A copy of a model folder with another config; loading must end soon and take little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def make(name: str, config: dict | str) -> Path:
        folder = tmp_path / "stranger"
        if not folder.exists():
            shutil.copytree(folders[name], folder)
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        return folder

    def too_slow(number, frame):
        raise TimeoutError("this config keeps the program busy")

    previous = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(60)
    yield make
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def refused_or_same(folder: Path, sound: dict, path: tuple, value: Any) -> bool:
    """Whether a changed config is refused in one line; if not, it must not change what is computed."""
    try:
        model = LatentFlow.from_pretrained(folder, device="cpu")
    except LatentFlowError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1500
        return True
    as_before = type(model.config).model_validate(sound)
    free_in = ("sampling", "training")
    free = path[0] in free_in or any(part in str(key) for key in path for part in FREE) or path == ("conditioning",)
    assert free or model.config == as_before, (path, value)
    try:
        sampling = {"steps": 1} if model.config.sampling.steps > 100 else {}
        assert model.sample(1, **sampling).pixels.isfinite().all()
    except LatentFlowError as error:
        assert "\n" not in str(error)
        return True
    return False


@pytest.mark.parametrize(
    ("name", "place"), cases(), ids=lambda value: ".".join(value) if isinstance(value, tuple) else value
)
def test_hostile_configs(folders, stranger, name, place):
    """Some 800 of them."""
    sound = json.loads((folders[name] / CONFIG_FILE).read_text(encoding="utf-8"))
    value = sound
    for key in place:
        value = value[key]
    tried = refusals = 0
    for below, found in [(place, value), *(((*place, *path), found) for path, found in fields_of(value))]:
        for other in hostile(found):
            tried += 1
            refusals += refused_or_same(stranger(name, changed(sound, below, other)), sound, below, other)
    assert tried >= 4
    assert refusals >= 1


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("image_size",), 32_768, "image_size = 32768: give 1 to 16,384 pixels for a side"),
        (("image_size",), 17, "image_size 17 is not a multiple of 4"),
        (("image_size",), 32, "says image_size = 32, but velocity.safetensors was written with 16"),
        (("network", "depth"), 10**6, "network.depth = 1000000: give at most 512"),
        (("network", "depth"), 3, "is missing"),
        (("network", "hidden_size"), 64, "has shape"),
        (("network", "num_heads"), 4, "says network.num_heads = 4, but velocity.safetensors was written with 2"),
        (("network", "time_scale"), 1.0, "says network.time_scale = 1.0"),
        (("path", "sigma_min"), 0.5, "says path.sigma_min = 0.5"),
        (("path",), {"kind": "cosine"}, "says path.kind = cosine"),
        (("conditioning", "class_names"), ["a", "b"], "has shape"),
        (("conditioning", "class_names"), ["a", "a", "b"], "class names must differ; given twice: a"),
        (("conditioning", "map_palette"), [[0, 0, 300]] * 3, "give at most 255"),
        (("conditioning", "map_palette"), [[0, 0, 0]], "1 colours for 3 map classes"),
        (("conditioning", "inpainting"), False, "has shape"),
        (("normalisation", "scale"), [0.5] * 3, "normalisation has 4 and 3 numbers for 4 latent channels"),
        (
            ("normalisation", "scale"),
            [0.5, 0.5, 0.5, 0.0],
            "normalisation.scale.3 = 0.0: give more than 0",
        ),
        (("normalisation", "scale"), [0.25] * 4, "says normalisation.scale = [0.25, 0.25, 0.25, 0.25]"),
        (("autoencoder", "factor"), 4, "says autoencoder.factor = 4"),
        (("autoencoder", "content_hash"), "0" * 64, "says autoencoder.content_hash"),
        (("sampling", "steps"), 10**9, "sampling.steps = 1000000000: give at most 10000"),
        (("sampling", "guided_channels"), 5, "sampling.guided_channels 5: there are 4 channels"),
        (("network", "kind"), "vit", "unknown kind 'vit'"),
        (("network", "no_such"), 1, "unknown network option 'no_such'"),
    ],
)
def test_messages_about_a_wrong_config(folders, stranger, path, value, said):
    sound = json.loads((folders["dit"] / CONFIG_FILE).read_text(encoding="utf-8"))
    with pytest.raises(ArtifactError) as caught:
        LatentFlow.from_pretrained(stranger("dit", changed(sound, path, value)), device="cpu")
    assert said in str(caught.value)
    assert CONFIG_FILE in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "5",
        "[" * 200_000,
        '{"a":' * 5000 + "1" + "}" * 5000,
        '{"image_size": 1' + "0" * 5000 + "}",
    ],
)
def test_what_is_no_config_at_all(stranger, text):
    with pytest.raises(ArtifactError, match=CONFIG_FILE) as caught:
        LatentFlow.from_pretrained(stranger("dit", text), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_config_of_many_megabytes(stranger, monkeypatch):
    monkeypatch.setattr("latentflow.model.flow_model._MOST_CONFIG_BYTES", 1 << 20)
    with pytest.raises(ArtifactError, match="is larger than 1 MiB"):
        read_config(stranger("dit", " " * (2 << 20)))


# Pieces of other models


def test_class_names_may_be_changed_by_hand(folders, stranger):
    sound = json.loads((folders["dit"] / CONFIG_FILE).read_text(encoding="utf-8"))
    folder = stranger("dit", changed(sound, ("conditioning", "class_names"), ["Apfel", "Beere", "Kirsche"]))
    assert LatentFlow.from_pretrained(folder, device="cpu").config.conditioning.class_index("Beere") == 1


def test_weights_without_a_record_of_their_config_load(folders, tmp_path):
    """Those of earlier versions."""
    folder = shutil.copytree(folders["dit"], tmp_path / "old")
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / WEIGHTS_FILE).items()}
    write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "latentflow"})
    assert LatentFlow.from_pretrained(folder, device="cpu").config == read_config(folders["dit"])


@pytest.mark.parametrize("piece", [CONFIG_FILE, WEIGHTS_FILE])
def test_pieces_of_another_model(folders, tmp_path, piece):
    folder = shutil.copytree(folders["dit"], tmp_path / "swapped")
    shutil.copy(folders["unet"] / piece, folder / piece)
    with pytest.raises(ArtifactError, match=f"{WEIGHTS_FILE} does not fit"):
        LatentFlow.from_pretrained(folder, device="cpu")


def test_weights_of_a_like_model_that_computes_otherwise(folders, tmp_path, kl):
    folder = shutil.copytree(folders["dit"], tmp_path / "swapped")
    tiny.model(kl, conditioning=tiny.SPATIAL, time_scale=1.0).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS_FILE, folder)
    with pytest.raises(ArtifactError, match=r"network.time_scale = 1000.0, but .* was written with 1.0"):
        LatentFlow.from_pretrained(folder, device="cpu")


def test_an_autoencoder_of_another_model(folders, deterministic_folder, tmp_path):
    folder = shutil.copytree(folders["dit"], tmp_path / "swapped")
    shutil.rmtree(folder / "autoencoder")
    with pytest.raises(ArtifactError, match="is incomplete: autoencoder/ is missing; copy the whole folder"):
        LatentFlow.from_pretrained(folder, device="cpu")
    shutil.copytree(deterministic_folder, folder / "autoencoder")
    with pytest.raises(ArtifactError, match="restore the original one"):
        LatentFlow.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("piece", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("change", ["missing", "dangling link", "folder", "empty"])
def test_pieces_that_are_no_files(folders, tmp_path, piece, change):
    folder = shutil.copytree(folders["dit"], tmp_path / "changed")
    (folder / piece).unlink()
    if change == "dangling link":
        (folder / piece).symlink_to("nowhere")
    if change == "folder":
        (folder / piece).mkdir()
    if change == "empty":
        (folder / piece).touch()
    with pytest.raises(ArtifactError) as caught:
        LatentFlow.from_pretrained(folder, device="cpu")
    assert piece in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(folders, tmp_path, value):
    folder = shutil.copytree(folders["dit"], tmp_path / "damaged")
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / WEIGHTS_FILE).items()}
    tensors["blocks.0.mlp.up.bias"][3] = value
    write_tensors(folder / WEIGHTS_FILE, tensors)
    with pytest.raises(ArtifactError, match=r"'blocks.0.mlp.up.bias' holds values that are not finite"):
        LatentFlow.from_pretrained(folder, device="cpu")


def test_weights_of_whole_numbers(folders, tmp_path):
    folder = shutil.copytree(folders["dit"], tmp_path / "quantised")
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / WEIGHTS_FILE).items()}
    tensors["blocks.0.mlp.up.bias"] = tensors["blocks.0.mlp.up.bias"].to(torch.int8)
    write_tensors(folder / WEIGHTS_FILE, tensors)
    with pytest.raises(ArtifactError, match=r"holds torch.int8, and torch.float32 is needed"):
        LatentFlow.from_pretrained(folder, device="cpu")


def test_the_command_line_says_it_in_one_line(folders, stranger, capsys, monkeypatch, tmp_path):
    sound = json.loads((folders["dit"] / CONFIG_FILE).read_text(encoding="utf-8"))
    folder = stranger("dit", changed(sound, ("network", "depth"), 10**6))
    for arguments in (["info", folder], ["sample", folder, "--out", tmp_path / "out"]):
        result = run_here(arguments, capsys, monkeypatch)
        assert result.code == 2
        assert "network.depth = 1000000" in result.error
    assert not (tmp_path / "out").exists()


# Threads


def test_eight_threads_load_and_draw_at_once(folders):
    """The pictures are those of one thread, and the process is as before."""
    expected = {
        folder: LatentFlow.from_pretrained(folder, device="cpu").sample(2, seed=3).pixels for folder in folders.values()
    }

    def work(number: int) -> None:
        folder = list(expected)[number % 2]
        model = LatentFlow.from_pretrained(folder, device="cpu")
        assert torch.equal(model.sample(2, seed=3).pixels, expected[folder])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(24)))
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.get_default_device().type == "cpu"


# Named columns


def test_columns_belong_to_the_weights(kl, tmp_path):
    """Their order and the scale of numbers, which the shapes of the weights do not show."""
    one = {"name": "age", "kind": "number", "mean": 50.0, "deviation": 20.0}
    tiny.model(kl, conditioning={"columns": [one, {**one, "name": "dose"}]}).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / CONFIG_FILE
    sound = json.loads(file.read_text(encoding="utf-8"))
    for change in (lambda columns: columns.reverse(), lambda columns: columns[0].update(mean=0.0)):
        config = copy.deepcopy(sound)
        change(config["conditioning"]["columns"])
        file.write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(ArtifactError, match=r"velocity.safetensors was written with"):
            LatentFlow.from_pretrained(tmp_path / "model")
    file.write_text(json.dumps(sound), encoding="utf-8")
    assert LatentFlow.from_pretrained(tmp_path / "model").config.conditioning.columns[1].name == "dose"


def test_a_model_without_columns_is_written_as_before(kl):
    assert "conditioning" not in tiny.model(kl).config.computation


def test_a_preset_guided_by_what_the_model_does_not_have(kl):
    config = tiny.model(kl).config.model_dump()
    config["sampling"]["guided_by"] = ["lable"]
    with pytest.raises(ValidationError, match=r"sampling.guided_by = 'lable': no such condition; did you mean 'label'"):
        ModelConfig.model_validate(config)
