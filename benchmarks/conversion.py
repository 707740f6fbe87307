"""Every published experiment at full size, from a checkpoint file to pictures.

For each a file with the right names and shapes and random values is written, converted, loaded again and drawn from.
Half of the files have the prefix that several GPUs leave. The autoencoder is a small one of factor 8.

    python benchmarks/conversion.py [EXPERIMENT ...]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from measuring import RESULTS, setup, write_results

from latentflow import LatentFlow
from latentflow.commands.convert import convert
from latentflow.convert.families.lfm import EXPERIMENTS
from latentflow.convert.request import ConvertRequest

STEPS = 2


def write_checkpoint(name: str, file: Path, *, prefix: str, seed: int = 0) -> int:
    """A state_dict of an experiment with random values; returns the number of published parameters."""
    architecture = EXPERIMENTS[name].architecture()
    generator = torch.Generator().manual_seed(seed)
    shapes = architecture.keys.foreign_shapes(architecture.empty().state_dict())
    weights = {f"{prefix}{key}": 0.02 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    weights |= {f"{prefix}{c.theirs}": c.value for c in architecture.keys.constants}
    torch.save(weights, file)
    positions = sum(c.value.numel() for c in architecture.keys.constants if c.theirs == "pos_embed")
    return sum(shape.numel() for shape in shapes.values()) + positions


def small_autoencoder(folder: Path) -> Path:
    """An untrained autoencoder of factor 8 and 4 channels."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        layers_per_block=1,
        mid_block_add_attention=False,
        scaling_factor=0.18215,
    ).save_pretrained(folder)
    return folder


def draw(model: LatentFlow) -> torch.Tensor:
    """One picture in two steps, through the verb that the model is for."""
    side = model.config.image_size.width  # published models draw squares
    request = {"num": 1, "solver": "euler", "steps": STEPS}
    if model.config.conditioning.inpainting:
        hole = np.zeros((side, side), np.uint8)
        hole[side // 4 : side // 2, side // 4 : side // 2] = 255
        return model.inpaint(np.full((side, side, 3), 90, np.uint8), hole, **request).pixels
    if model.config.conditioning.num_map_classes:
        return model.mask_to_image(np.zeros((side, side), np.uint8), **request).pixels
    return model.sample(**request).pixels


def measure(name: str, folder: Path, autoencoder: Path, *, prefix: str) -> dict[str, object]:
    """One experiment from file to picture."""
    file, out = folder / "model.pth", folder / name
    published = write_checkpoint(name, file, prefix=prefix)
    result = convert(ConvertRequest(family="lfm", checkpoint=file, experiment=name, autoencoder=autoencoder), out)
    model = LatentFlow.from_pretrained(out)
    began = time.perf_counter()
    pixels = draw(model)
    seconds = time.perf_counter() - began
    assert pixels.shape == (1, 3, *model.config.image_size)
    return {
        "prefix": prefix,
        "published_parameters": published,
        "parameters": result.num_parameters,
        "gigabytes": round(file.stat().st_size / 1e9, 2),
        "convert_seconds": round(result.seconds, 1),
        "draw_seconds": round(seconds, 1),
        "guidance": model.config.sampling.guidance,
        "self_check": result.check.verdict,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", default=RESULTS)
    arguments = parser.parse_args()
    setup("cpu", arguments.threads)
    names = arguments.experiments
    results = {}
    with tempfile.TemporaryDirectory() as place:
        autoencoder = small_autoencoder(Path(place) / "autoencoder")
        for index, name in enumerate(names):
            with tempfile.TemporaryDirectory() as folder:
                results[name] = measure(name, Path(folder), autoencoder, prefix="module." if index % 2 else "")
            print(name, results[name], flush=True)
    write_results("conversion", torch.device("cpu"), {"steps": STEPS, "experiments": results}, arguments.out)


if __name__ == "__main__":
    main()
