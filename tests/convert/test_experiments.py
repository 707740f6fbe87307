"""All fourteen published experiments: their sizes in full, and in small the whole way from a file to a picture.

No published weights are at hand here. Files of the published names and of random values take their place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentflow.api import LatentFlow
from latentflow.artifacts import read_tensors
from latentflow.commands.convert import ConvertResult, convert
from latentflow.convert.architecture import Architecture
from latentflow.convert.families.lfm import EXPERIMENTS
from latentflow.convert.families.registry import architecture
from latentflow.convert.foreign_file import read_checkpoint
from latentflow.convert.published import imagenet_synsets, published
from latentflow.convert.request import ConvertRequest
from latentflow.errors import ArtifactError
from latentflow.model.flow_model import WEIGHTS_FILE
from latentflow.networks import dit
from tests import tiny
from tests.convert import foreign

EVERY = pytest.mark.parametrize("name", EXPERIMENTS)

MILLIONS = {
    "celeb256_f8_adm": 153.1,
    "ffhq_f8_adm": 406.4,
    "bed_f8_adm": 406.4,
    "church_f8_adm": 356.1,
    "imnet_f8_adm": 407.4,
    "imnet_f8_ditb2": 130.5,
    "celeb_f8_dit": 457.1,
    "ffhq_f8_dit": 457.1,
    "bed_f8_dit": 457.1,
    "church_f8_dit": 457.1,
    "celeb512_f8_adm": 352.2,
    "celeb1024_f8_adm": 531.8,
    "inpainting_kl": 356.1,
    "semantic_kl": 356.1,
}
"""Parameters of the published classes, frozen positions included; without the encoder of semantic maps."""

GUIDANCE = {"imnet_f8_adm": 1.25, "imnet_f8_ditb2": 1.5}
SCALE = 0.18215
IMAGE_SIZE = 256


def built(name: str) -> Architecture:
    """The network of an experiment."""
    return architecture("lfm", EXPERIMENTS[name].flags, **EXPERIMENTS[name].task)


@EVERY
def test_number_of_parameters(name):
    network = built(name)
    shapes = network.keys.foreign_shapes(network.empty().state_dict())
    total = sum(shape.numel() for shape in shapes.values())
    total += sum(constant.value.numel() for constant in network.keys.constants if constant.theirs == "pos_embed")
    assert total / 1e6 == pytest.approx(MILLIONS[name], abs=0.0500001)


def test_the_table_is_complete():
    assert EXPERIMENTS.keys() == MILLIONS.keys()


def test_what_the_attention_flag_means():
    """One flag, 16 8, two meanings: factors in guided-diffusion's network, sizes of maps in EDM's."""
    assert built("church_f8_adm").network.attention_factors == (8,)
    assert built("ffhq_f8_adm").network.attention_factors == (2, 4, 8)
    assert built("celeb512_f8_adm").network.attention_factors == (16, 8)
    assert built("celeb1024_f8_adm").network.attention_factors == (8, 16)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    """The first stage in small: factor 8, 4 channels."""
    folder = tmp_path_factory.mktemp("autoencoders") / "f8"
    foreign.vae().save_pretrained(folder)
    return folder


@pytest.fixture
def small(monkeypatch, tmp_path, autoencoder):
    """Convert a file of an experiment whose network is small: small(name, prefix) => result, its folder, weights."""
    for size in ("DiT-B/2", "DiT-L/2"):
        monkeypatch.setitem(dit.NAMES, size, {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2})

    def run(name: str, prefix: str) -> tuple[ConvertResult, Path, dict[str, torch.Tensor]]:
        options: dict[str, Any] = {"image_size": IMAGE_SIZE}
        if "dit" not in name:
            options |= {"nf": 32, "num_res_blocks": 1}
        weights = foreign.draw(published("lfm", options, experiment=name).architecture)
        file = foreign.save(weights, tmp_path / "model.pth", prefix=prefix)
        request = ConvertRequest(
            family="lfm",
            checkpoint=file,
            experiment=name,
            options=[f"{key}={value}" for key, value in options.items() if key != "image_size"],
            image_size=IMAGE_SIZE,
            autoencoder=autoencoder,
        )
        return convert(request, tmp_path / "model", runtime=tiny.CPU), tmp_path / "model", weights

    return run


def draw(model: LatentFlow) -> torch.Tensor:
    """One image, with every condition of the model."""
    preset = {"num": 1, "steps": 2, "solver": "euler"}
    gradient = np.linspace(0, 255, IMAGE_SIZE).astype(np.uint8)
    if model.config.conditioning.inpainting:
        picture = np.stack([np.broadcast_to(gradient, (IMAGE_SIZE, IMAGE_SIZE))] * 3, -1)
        hole = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
        hole[64:128, 64:192] = 1
        return model.inpaint(picture, hole, **preset).pixels
    if model.config.conditioning.num_map_classes:
        return model.mask_to_image(np.broadcast_to(gradient // 14, (IMAGE_SIZE, IMAGE_SIZE)).copy(), **preset).pixels
    return model.sample(**preset).pixels


@EVERY
def test_from_a_file_to_a_picture(name, small, tmp_path):
    result, folder, weights = small(name, "module.")
    known = EXPERIMENTS[name]

    reloaded = LatentFlow.from_pretrained(folder, device="cpu")
    config = reloaded.config
    pixels = draw(reloaded)
    assert pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert pixels.float().std() > 0

    architecture = published(
        "lfm",
        {"nf": 32, "num_res_blocks": 1} if "dit" not in name else {},
        experiment=name,
        image_size=IMAGE_SIZE,
    ).architecture
    plain = read_checkpoint(foreign.save(weights, tmp_path / "plain.pth"))
    expected = architecture.load(plain.weights).state_dict()
    kept = read_tensors(folder / WEIGHTS_FILE)
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[key], expected[key]) for key in expected)
    there_again = architecture.keys.theirs(reloaded.network.state_dict())
    moved = [key for rule in architecture.keys.rules if rule.exact_back for key in rule.theirs]
    assert all(torch.equal(there_again[key], weights[key]) for key in moved)

    assert result.num_parameters == sum(tensor.numel() for tensor in expected.values())
    assert (config.image_size, config.latent_shape) == ((IMAGE_SIZE, IMAGE_SIZE), (4, 32, 32))
    assert config.normalisation.scale == [SCALE] * 4
    assert config.normalisation.shift == [0.0] * 4
    assert (config.path.kind, config.prediction.kind) == ("linear", "velocity")
    assert (config.sampling.solver, config.sampling.rtol, config.sampling.atol) == ("dopri5", 1e-5, 1e-5)
    assert config.sampling.guidance == GUIDANCE.get(name, 1.0)
    assert config.sampling.guided_channels is None
    conditioning = config.conditioning
    assert conditioning.class_names == (imagenet_synsets() if name.startswith("imnet") else [])
    assert conditioning.label_dropout == (0.1 if name.startswith("imnet") else 0.0)
    assert conditioning.can_guide == (["label"] if name.startswith("imnet") else [])
    assert conditioning.inpainting == (name == "inpainting_kl")
    assert conditioning.map_class_names == list(known.map_class_names)
    assert len(conditioning.map_class_names) == (19 if name == "semantic_kl" else 0)
    assert config.training.num_images == known.num_images
    assert config.training.data == f"{known.data} (LFM's {name})"

    notes = " ".join(result.notes)
    assert ("JPEG" in notes) == (known.fid is not None)
    assert known.fid is None or f"published FID {known.fid}" in notes
    assert ("null label may be untrained" in notes) == (name == "imnet_f8_adm")
    assert ("random initialisation" in notes) == (name == "semantic_kl")


@pytest.mark.parametrize("name", ["ffhq_f8_dit", "celeb256_f8_adm"])
def test_a_file_without_prefixes(name, small):
    result, folder, _ = small(name, "")
    assert result.part == ""
    assert read_tensors(folder / WEIGHTS_FILE).keys() == result.model.network.state_dict().keys()


def test_files_of_another_experiment(small, tmp_path, autoencoder):
    _, _, weights = small("celeb_f8_dit", "")
    file = foreign.save(weights, tmp_path / "other.pth")
    with pytest.raises(ArtifactError, match=r"other\.pth is not a checkpoint of this network: it lacks"):
        request = ConvertRequest(family="lfm", checkpoint=file, experiment="celeb256_f8_adm", autoencoder=autoencoder)
        convert(request, tmp_path / "other")
    assert not (tmp_path / "other").exists()
