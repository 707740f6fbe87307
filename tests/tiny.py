"""The smallest things that are still whole: autoencoders, images, recipes and models that take milliseconds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from latentflow.api import LatentFlow
from latentflow.artifacts import atomic_file
from latentflow.autoencoder import Autoencoder
from latentflow.data.cache import writer
from latentflow.data.cache.schema import CacheIndex
from latentflow.data.items import UNLABELLED, ImageSource
from latentflow.data.painting.input_rules import InputRules
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.painting.semantic_maps import MapClasses
from latentflow.data.request import CacheOptions
from latentflow.flow.path import LinearPath
from latentflow.model.adapter import AdapterBase
from latentflow.model.conditioning import Conditioning
from latentflow.model.config import AUTOENCODER_FOLDER, AutoencoderRecord, ModelConfig, SamplingPreset
from latentflow.model.flow_model import FlowModel
from latentflow.model.student_record import StudentRecord
from latentflow.model.surgery import graft, grafted_config
from latentflow.networks.dit import DiTConfig
from latentflow.networks.low_rank import FACTOR_B, add_low_rank
from latentflow.pixel_format import RGB, PixelFormat
from latentflow.runtime import Runtime
from latentflow.training.config import Recipe

CPU = Runtime(torch.device("cpu"))


def write_cache(source: ImageSource, autoencoder: Autoencoder, folder: Path, **options: Any) -> CacheIndex | None:
    """`writer.write_cache`, with the fields of `CacheOptions` among the others."""
    others = {name: options.pop(name) for name in ("masks", "runtime", "on_images", "on_kept") if name in options}
    return writer.write_cache(source, autoencoder, folder, CacheOptions(**options), **others)


def one_of_two(rank: int) -> Runtime:
    """A process of two, as far as sharing goes; they do not meet."""
    return Runtime(CPU.device, rank, world=2)


LARGE_RECIPE = "imnet_f8_ditb2"
"""For what is planned or refused before anything runs."""

CLASSES = ("apple", "berry", "cherry")
IMAGES_PER_CLASS = 6
NUM_IMAGES = len(CLASSES) * IMAGES_PER_CLASS
IMAGE_SIZE = 16
FACTOR = 2

MAP_CLASSES = ("sky", "road", "tree")
MAP_PALETTE = ((70, 130, 180), (128, 64, 128), (107, 142, 35))
SPATIAL: dict[str, Any] = {
    "inpainting": True,
    "map_class_names": list(MAP_CLASSES),
    "map_palette": list(MAP_PALETTE),
}
"""Of `Conditioning`: every condition but labels."""

RECIPE: dict[str, Any] = {
    "data": {"image_size": IMAGE_SIZE, "flip": False},
    "network": {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2},
    "optimizer": {"learning_rate": 1e-3},
    "training": {
        "steps": 10,
        "batch_size": 4,
        "precision": "fp32",
        "ema_decay": 0.9,
        "log_every": 1,
        "checkpoint_every": 100,
        "keep_at": [],
        "preview_every": 0,
    },
    "sampling": {"solver": "euler", "steps": 2},
}


def kl(seed: int = 0, **config: Any):
    """A variational autoencoder of factor 2 and 4 channels, weights drawn from `seed`."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    given = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "layers_per_block": 1,
        "mid_block_add_attention": False,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
    }
    return AutoencoderKL(**{**given, **config})


def deterministic(seed: int = 0, **config: Any):
    """An AutoencoderTiny of factor 2 and 4 channels."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(seed)
    given = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
        "latent_channels": 4,
    }
    return AutoencoderTiny(**{**given, **config})


def deep_compression(seed: int = 0, **config: Any):
    """An AutoencoderDC of factor 4 and 4 channels."""
    from diffusers import AutoencoderDC

    torch.manual_seed(seed)
    blocks, channels, layers = ("ResBlock",) * 3, (8, 8, 16), (1, 1, 1)
    given = {
        "latent_channels": 4,
        "attention_head_dim": 8,
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": channels,
        "decoder_block_out_channels": channels,
        "encoder_layers_per_block": layers,
        "decoder_layers_per_block": layers,
        "encoder_qkv_multiscales": ((),) * 3,
        "decoder_qkv_multiscales": ((),) * 3,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "stride_conv",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.4,
    }
    return AutoencoderDC(**{**given, **config})


def write_images(folder: Path, *, classes: tuple[str, ...] = CLASSES, per_class: int = IMAGES_PER_CLASS) -> Path:
    """A class folder each with pictures of 20 x 24 pixels, no two alike; without `classes`, one flat folder."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(classes or ("",)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            coarse[..., label] |= 128
            picture = Image.fromarray(coarse).resize((24, 20), Image.Resampling.BICUBIC)
            picture.save(folder / name / f"{number}.png")
    return folder


def write_segmented(folder: Path, *, classes: tuple[str, ...] = CLASSES, per_class: int = 4) -> Path:
    """The pictures of `write_images` with semantic maps of blocks, thin lines and unlabelled pixels."""
    write_images(folder / "images", classes=classes, per_class=per_class)
    generator = np.random.default_rng(1)
    for name in classes or ("",):
        (folder / "masks" / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            semantic_map = np.kron(generator.choice([0, 1, 2, UNLABELLED], (5, 6)), np.ones((4, 4))).astype(np.uint8)
            semantic_map[generator.integers(20)] = 2
            semantic_map[:, generator.integers(24)] = 1
            Image.fromarray(semantic_map).save(folder / "masks" / name / f"{number}.png")
    MapClasses(MAP_CLASSES, MAP_PALETTE).write(folder / "classes.json")
    return folder


def write_paired(folder: Path, *, per_class: int = 4) -> Path:
    """The pictures of `write_images` with paired inputs: negatives of half their size, as JPEG files."""
    write_images(folder / "images", per_class=per_class)
    for file in sorted((folder / "images").rglob("*.png")):
        place = folder / "inputs" / file.relative_to(folder / "images").with_suffix(".jpg")
        place.parent.mkdir(parents=True, exist_ok=True)
        negative = 255 - np.asarray(Image.open(file))
        Image.fromarray(negative).resize((12, 10), Image.Resampling.BOX).save(place, quality=95)
    return folder


MIXED = {"wide": (36, 24), "tall": (20, 32), "square": (24, 24)}
"""Width and height of the pictures of `write_mixed`."""


def write_mixed(folder: Path) -> Path:
    """Pictures of two classes: 9 wide, 4 tall and 6 square ones, and a tall one that is stored on its side."""
    generator = np.random.default_rng(0)
    for number, shape in enumerate(["wide"] * 9 + ["tall"] * 4 + ["square"] * 6):
        width, height = MIXED[shape]
        place = folder / CLASSES[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
        picture.save(place / f"{number:02d}_{shape}.png")
    turned, exif = Image.fromarray(generator.integers(0, 256, (20, 32, 3), np.uint8)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned.save(folder / CLASSES[0] / "99_tall.png", exif=exif)
    return folder


def recipe(**given: Any) -> Recipe:
    """The tiny recipe with some values changed: recipe(data={"path": ...}, training={"steps": 4}, out=...)."""
    values: dict[str, Any] = {**RECIPE}
    for key, value in given.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        if key in ("out", "autoencoder"):
            values[key] = str(value)
    for key in values["data"].keys() & {"path", "images"}:
        values["data"] = {**values["data"], key: str(values["data"][key])}
    return Recipe.model_validate(values)


def randomise(network: torch.nn.Module, *, seed: int = 0, scale: float = 1.0) -> torch.nn.Module:
    """Draw every weight, those that start at zero included, so that the field is far from trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / fan_in**0.5)
    return network


def model(
    autoencoder: Autoencoder,
    *,
    class_names: tuple[str, ...] = CLASSES,
    label_dropout: float = 0.1,
    seed: int = 0,
    scale: float = 1.0,
    time_scale: float = 1000.0,
    conditioning: Mapping[str, Any] = MappingProxyType({}),
    inputs: InputRules | None = None,
    input_channels: int = 3,
    pixel_format: PixelFormat = RGB,
    **sampling: Any,
) -> LatentFlow:
    """A model with random weights, ready to be sampled; the larger `time_scale`, the faster its field changes.

    `conditioning` holds the conditions other than labels, for example `SPATIAL`; `inputs` are the rules of paired
    inputs.
    """
    if inputs is not None:
        formats = (PixelFormat(channels=input_channels), PixelFormat())
        inputs = inputs.resolved(*formats)
        channels = inputs.network_channels(*formats, autoencoder.factor, autoencoder.num_channels)
        conditioning = {**conditioning, "input_channels": channels}
    config = ModelConfig(
        image_size=IMAGE_SIZE,
        pixel_format=pixel_format,
        network=DiTConfig(**RECIPE["network"], time_scale=time_scale),
        path=LinearPath(),
        conditioning=Conditioning(class_names=list(class_names), label_dropout=label_dropout, **conditioning),
        masks=MaskRules() if conditioning.get("inpainting") else None,
        inputs=inputs,
        input_format=PixelFormat(channels=input_channels) if inputs else None,
        autoencoder=AutoencoderRecord(
            reference=AUTOENCODER_FOLDER,
            content_hash=autoencoder.content_hash,
            factor=autoencoder.factor,
            num_channels=autoencoder.num_channels,
        ),
        normalisation=autoencoder.normalisation,
        sampling=SamplingPreset(**{**RECIPE["sampling"], **sampling}),
    )
    network = randomise(config.build_network(), seed=seed, scale=scale)
    return LatentFlow(config, network.eval().requires_grad_(False), autoencoder)


def student(teacher: LatentFlow, *, seed: int | None = None, **sampling: Any) -> LatentFlow:
    """A student of a model that begins as the model; with a `seed`, one that has learned something."""
    record = StudentRecord(teacher="teacher", weights=teacher.weights_hash)
    preset = SamplingPreset(**{"solver": "jumps", "steps": 4, **sampling})
    config = teacher.config.model_copy(update={"student": record, "sampling": preset})
    network = config.build_network()
    network.load_state_dict(teacher.network.state_dict(), strict=False)
    if seed is not None:
        randomise(network.jump_embedding, seed=seed)
    return LatentFlow(config, network.eval().requires_grad_(False), teacher.autoencoder)


def finetuned(base: Path, class_names: tuple[str, ...] = CLASSES) -> FlowModel:
    """A model that was finetuned by low rank on other classes, as far as its weights say."""
    source = FlowModel.from_pretrained(base)
    conditioning = source.config.conditioning.model_copy(update={"class_names": list(class_names)})
    config = grafted_config(source.config, source.config.model_copy(update={"conditioning": conditioning}))
    begun = graft(source.config, source.network.state_dict(), config, {})
    network = config.build_network()
    network.load_state_dict(begun.weights)
    add_low_rank(network, 3, alpha=6.0, also=begun.made)
    model = FlowModel(config, network, source.autoencoder)
    start = {name: begun.weights[name].clone() for name in begun.made}
    model.adapted_from = AdapterBase(str(base), source.weights_hash, start)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(FACTOR_B) or name in begun.made:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, hidden ones but locks included, with a hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if ".lock" not in path.name
    }


def leave_half_written(file: Path) -> None:
    """Begin to write `file` in a process that is killed."""
    child = os.fork()
    if child == 0:
        with atomic_file(file) as temporary:
            temporary.write_bytes(b"half")
            os._exit(9)
    os.waitpid(child, 0)
