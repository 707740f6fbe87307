"""How far exported ONNX files are from torch: the velocity, by network and conditions.

    python benchmarks/onnx_parity.py --threads 1

Weights are random and none of them is zero, so that every part of the network matters. The error is the largest
difference relative to the largest velocity, over batches of 1, 2, 5 and 8 images, none of which
was traced.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, setup, variational, write_results

from latentflow.autoencoder import Autoencoder
from latentflow.convert.exported import largest_error, random_inputs
from latentflow.convert.onnx.onnx_files import OPSET, export_onnx, opened
from latentflow.flow.path import CosinePath, LinearPath
from latentflow.model.conditioning import Conditioning
from latentflow.model.config import AUTOENCODER_FOLDER, AutoencoderRecord, ModelConfig
from latentflow.model.flow_model import FlowModel
from latentflow.networks.dit import DiTConfig
from latentflow.networks.unet import UNetConfig
from latentflow.networks.velocity_network import DenoiserPrediction, NoisePrediction

CLASSES = {"class_names": [f"class {number}" for number in range(10)]}
MAPS = {
    "map_class_names": [f"region {number}" for number in range(8)],
    "map_palette": [(number, 0, 0) for number in range(8)],
}
EVERYTHING = {
    **CLASSES,
    **MAPS,
    "inpainting": True,
    "columns": [
        {"name": "age", "kind": "number", "mean": 50.0, "deviation": 10.0},
        {"name": "tags", "kind": "labels", "class_names": ["a", "b", "c"]},
    ],
    "augmentation": ["zoom", "turn"],
}
BATCHES = (1, 2, 5, 8)


def cases(depth: int, hidden_size: int) -> dict[str, tuple[DiTConfig | UNetConfig, Mapping[str, Any], dict[str, Any]]]:
    """Network, conditions and other values of each model."""
    size = {"depth": depth, "hidden_size": hidden_size, "num_heads": 4, "patch_size": 2}
    classic, modern = DiTConfig(**size), DiTConfig(**size, variant="modern")
    unet = UNetConfig(
        channels=hidden_size // 4, multipliers=(1, 2), blocks_per_level=1, attention_factors=(2,), norm_groups=8
    )
    return {
        "DiT classic": (classic, {}, {}),
        "DiT classic, classes": (classic, CLASSES, {}),
        "DiT classic, time_scale 1": (classic.model_copy(update={"time_scale": 1.0}), CLASSES, {}),
        "DiT classic, holes": (classic, {**CLASSES, "inpainting": True}, {}),
        "DiT modern": (modern, {}, {}),
        "DiT modern, classes": (modern, CLASSES, {}),
        "DiT modern, maps": (modern, MAPS, {}),
        "DiT modern, every condition": (modern, EVERYTHING, {}),
        "DiT modern, value residual": (modern.model_copy(update={"value_residual": True}), CLASSES, {}),
        "DiT classic, predicts noise": (classic, CLASSES, {"prediction": NoisePrediction(), "path": CosinePath()}),
        "DiT classic, denoises": (
            classic,
            CLASSES,
            {"prediction": DenoiserPrediction(), "path": LinearPath(sigma_min=0)},
        ),
        "U-Net, classes": (unet, CLASSES, {}),
        "U-Net, every condition": (unet, EVERYTHING, {}),
    }


def built(autoencoder: Autoencoder, side: int, case: tuple[Any, Mapping[str, Any], dict[str, Any]]) -> FlowModel:
    """A model with random weights."""
    network, conditions, given = case
    config = ModelConfig(
        image_size=side * autoencoder.factor,
        network=network,
        conditioning=Conditioning(**conditions),
        autoencoder=AutoencoderRecord(
            reference=AUTOENCODER_FOLDER,
            content_hash=autoencoder.content_hash,
            factor=autoencoder.factor,
            num_channels=autoencoder.num_channels,
        ),
        normalisation=autoencoder.normalisation,
        **given,
    )
    module, generator = config.build_network().eval().requires_grad_(False), torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return FlowModel(config, module, autoencoder)


@torch.no_grad()
def measured(model: FlowModel) -> dict[str, float]:
    """The largest relative error of the velocity, and the seconds that its export took."""
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        exported = export_onnx(model, Path(place) / "onnx", only=["velocity"])
        seconds = time.perf_counter() - start
        session = opened(exported.folder / "velocity.onnx")
        names = [one.name for one in session.get_inputs()][2:]

        def pair(num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
            latents, time, condition = random_inputs(model.config, num_images, seed=100 + num_images)
            given = {name: getattr(condition, name).numpy() for name in names}
            (found,) = session.run(None, {"latents": latents.numpy(), "time": time.numpy(), **given})
            return torch.from_numpy(found), model.velocity(latents, time, condition)

        return {"velocity": largest_error(map(pair, BATCHES)), "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Export every model and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of some models")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--latent-size", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", default=RESULTS)
    options = parser.parse_args(arguments)
    setup("cpu", options.threads)
    autoencoder = variational((8, 16), layers_per_block=1, name="untrained")
    results: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, case in cases(options.depth, options.hidden_size).items():
        if options.only and name not in options.only:
            continue
        results[name] = measured(built(autoencoder, options.latent_size, case))
        print(name, results[name], flush=True)
        values = {
            "depth": options.depth,
            "hidden_size": options.hidden_size,
            "latent_size": options.latent_size,
            "opset": OPSET,
            "batches": list(BATCHES),
            "largest_relative_error": {one: found["velocity"] for one, found in results.items()},
            "seconds": {one: found["seconds"] for one, found in results.items()},
        }
        write_results("onnx_parity", torch.device("cpu"), values, options.results)  # what there is is kept
    return values


if __name__ == "__main__":
    main()
