"""A model as a folder of diffusers: network, scheduler and autoencoder, each loaded by diffusers' own class.

    unet/ or transformer/    the velocity network, in float32
    scheduler/               FlowMatchEulerDiscreteScheduler
    vae/                     the autoencoder
    model.json               what diffusers has no place for: scaling of the latents, class names, null label
    README.md                a program that draws images with diffusers alone

Time and direction are the same here and there: sigma is t, 1 at noise and 0 at data, and the velocity is noise - data.
The scheduler tells the network sigma * num_train_timesteps, so that number is the network's time_scale. What noise a
path leaves on the data (sigma_min) shaped the training alone: drawing follows the velocity in either case.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from latentflow.artifacts import atomic_folder, require_new, write_json, write_text
from latentflow.autoencoder import Autoencoder
from latentflow.convert.diffusers.keys import DiffusersNetwork, diffusers_network
from latentflow.data.painting.latent_size import HOLE_GRAY
from latentflow.errors import ArtifactError
from latentflow.model.config import AUTOENCODER_FOLDER, ModelConfig
from latentflow.model.flow_model import FlowModel
from latentflow.shapes import Condition

LIMIT = 1e-5
"""Largest error that rounding may explain, as a share of the largest velocity."""

SCHEDULER = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        network: the network's folder in it, and the class it is of.
        autoencoder: the class of the autoencoder.
        error: largest difference between the network here and there, as a share of the largest velocity.
    """

    folder: Path
    network: tuple[str, str]
    autoencoder: str
    error: float


@torch.no_grad()
def export_diffusers(model: FlowModel, folder: str | Path) -> Exported:
    """Write a model as a folder of diffusers, once diffusers has computed the same with it.

    Args:
        folder: new or empty.

    Raises:
        ArtifactError: the folder has something in it, no class of diffusers is the same function as the network, or
            what diffusers computes differs after all. Nothing was written.
    """
    import diffusers

    folder = require_new(folder)
    config = model.config
    made = diffusers_network(config)
    network_class = getattr(diffusers, made.class_name)
    # Compared on the CPU: other devices round convolutions to fewer digits, and differently for each memory layout.
    ours = copy.deepcopy(model.network).to("cpu", torch.float32, memory_format=torch.contiguous_format).eval()
    autoencoder_class = type(model.autoencoder.model).__name__
    with atomic_folder(folder) as temporary:
        network = network_class(**made.arguments)
        network.load_state_dict(made.keys.theirs(ours.state_dict()))
        network.save_pretrained(temporary / made.folder)
        scheduler = getattr(diffusers, SCHEDULER)(
            num_train_timesteps=int(config.network.time_scale), shift=config.sampling.shift
        )
        scheduler.save_pretrained(temporary / "scheduler")
        model.autoencoder.save_pretrained(temporary / "vae")
        write_json(temporary / "model.json", _beside(config))
        write_text(temporary / "README.md", _readme(model, made))

        error = _largest_error(
            ours, network_class.from_pretrained(temporary / made.folder, low_cpu_mem_usage=False), config, made
        )
        if not error <= LIMIT:
            raise ArtifactError(
                f"{made.class_name} of diffusers {diffusers.__version__} differs from this model by {error:.1e} of the "
                f"largest velocity, where rounding explains {LIMIT:g}; nothing was written"
            )
        if Autoencoder.from_pretrained(temporary / "vae").content_hash != config.autoencoder.content_hash:
            raise ArtifactError("the autoencoder is not the same once diffusers has saved it; nothing was written")
    return Exported(folder, (made.folder, made.class_name), autoencoder_class, error)


def _beside(config: ModelConfig) -> dict[str, object]:
    told = config.conditioning
    return {
        "image_size": config.image_size,
        "latent_shape": list(config.latent_shape),
        "latent_shift": config.normalisation.shift,
        "latent_scale": config.normalisation.scale,
        "class_names": told.class_names,
        "null_label": told.null_label if told.num_classes else None,
    }


def _largest_error(ours: nn.Module, theirs: nn.Module, config: ModelConfig, made: DiffusersNetwork) -> float:
    """Largest |difference| / largest |velocity|, over times, labels and sizes; 0 where both velocities are zero."""
    differences, velocities = [], []
    for latents, time, condition in _questions(config, made):
        expected = ours(latents, time, condition)
        found = told_by_diffusers(theirs, config, latents, time, condition)
        differences.append((found - expected).abs().max())
        velocities.append(expected.abs().max())
    largest = torch.stack(velocities).max().clamp(min=torch.finfo(torch.float32).tiny)
    return (torch.stack(differences).max() / largest).item()


def told_by_diffusers(
    network: nn.Module, config: ModelConfig, latents: Tensor, time: Tensor, condition: Condition
) -> Tensor:
    """The velocity that diffusers' network computes: latents [B, C, h, w] and time [B] in [0, 1] => [B, C, h, w]."""
    joined = [x for x in (latents, condition.masked_latents, condition.mask) if x is not None]
    labels = condition.labels
    if labels is None and config.network.kind == "dit":
        labels = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)  # its only row
    return network(torch.cat(joined, dim=1), time * config.network.time_scale, class_labels=labels).sample


def _questions(config: ModelConfig, made: DiffusersNetwork) -> Iterator[tuple[Tensor, Tensor, Condition]]:
    """Random latents at times from data to noise, with labels from the first to the null label."""
    told, generator = config.conditioning, torch.Generator().manual_seed(0)
    channels, height, width = config.latent_shape
    multiple = config.network.size_multiple
    shapes = [(height, width), (2 * multiple, 3 * multiple)] if made.any_size else [(height, width)]
    time = torch.tensor([1.0, 0.7, 0.31, 0.0])
    last = told.num_classes - 1
    labels = torch.tensor([0, last // 2, last, told.null_label]) if told.num_classes else None
    for shape in shapes:
        for turn in range(2 if told.num_classes else 1):  # the second time round, every time meets another label
            drawn = torch.randn(4, 2 * channels + 1, *shape, generator=generator)
            latents, masked_latents, mask = drawn.split([channels, channels, 1], dim=1)
            given = Condition(labels=None if labels is None else labels.roll(turn))
            condition = told.build(latents.shape, "cpu", given)
            if told.inpainting:
                condition = replace(condition, masked_latents=masked_latents, mask=mask.sigmoid())
            yield latents, time, condition


# The page


def _readme(model: FlowModel, made: DiffusersNetwork) -> str:
    config, told = model.config, model.config.conditioning
    size = f"{config.image_size} x {config.image_size}"
    reference = config.autoencoder.reference
    origin = "" if reference == AUTOENCODER_FOLDER else f" from `{reference}`"
    sizes = (
        f"other sizes must be multiples of {config.pixel_multiple} pixels"
        if made.any_size
        else "the class takes no other size"
    )
    least = 1 / config.network.time_scale
    tags = ["flow-matching", "image-generation", *(["class-conditional"] if told.num_classes else [])]
    parts = [
        f"""---
library_name: diffusers
pipeline_tag: {"image-to-image" if told.inpainting else "unconditional-image-generation"}
tags: [{", ".join(tags)}]
---
# A latent flow-matching model for diffusers

| | |
|---|---|
| `{made.folder}/` | `{made.class_name}`: {config.network.title}, predicts the velocity noise - data |
| `scheduler/` | `{SCHEDULER}`, sigma 1 is noise, the network is told sigma * {config.network.time_scale:g} |
| `vae/` | `{type(model.autoencoder.model).__name__}`{origin}; images of {size}, {sizes} |
| `model.json` | scaling of the latents, class names, null label |

No pipeline of diffusers is made of these three. In this folder, this program draws images with them:

```python
{_program(model, made)}```

Always give the scheduler its sigmas, as here: those it chooses by itself fall from 1 to {least:g}.
{_scaling_note(model)}"""
    ]
    if told.num_classes:
        null = "stands for no class" if "label" in told.can_guide else "was never trained"
        parts.append(f"""## Classes

Label i is the class at place i of `class_names` in `model.json`, counted from 0; label {told.null_label} {null}.

{", ".join(f"{i} {name}" for i, name in enumerate(told.class_names))}
""")
    if told.inpainting:
        factor, by_sign = config.autoencoder.factor, config.masks is not None and config.masks.told_as == "sign"
        level = "-1.0" if by_sign else f"{HOLE_GRAY} / 127.5 - 1"
        shares = f"torch.nn.functional.avg_pool2d(hole, {factor})"
        mask = f"2.0 * hole[:, :, ::{factor}, ::{factor}] - 1" if by_sign else shares
        learned = "" if "inpainting" in told.can_guide else ", which this model never learned to do"
        parts.append(f"""## Holes

The program above paints the whole image{learned}. To fill a hole, with `image` [B, 3, H, W] in [-1, 1] and
`hole` [B, 1, H, W], 1 where it is painted anew, put in place of its two lines

```python
hidden = torch.where(hole > 0, {level}, image)
masked_latents = (vae.encode(hidden, return_dict=False)[0]{".mode()" if _variational(model) else ""} - shift) * scale
mask = {mask}
```

and put the known pixels back behind the decoder.
""")
    return "\n".join(parts)


def _variational(model: FlowModel) -> bool:
    return model.autoencoder.num_moments != model.autoencoder.num_channels


def _scaling_note(model: FlowModel) -> str:
    normalisation = model.config.normalisation
    if len({*normalisation.shift}) == len({*normalisation.scale}) == 1:
        return (
            f"Latents are (raw - {normalisation.shift[0]:g}) * {normalisation.scale[0]:g} of what the autoencoder "
            "encodes.\n"
        )
    return (
        "Latents have a shift and a scale for each channel, which `vae/config.json` has no place for: take them from "
        "`model.json`, not the scaling_factor.\n"
    )


def _program(model: FlowModel, made: DiffusersNetwork) -> str:
    """Python that draws images with diffusers alone, in the exported folder."""
    config, told = model.config, model.config.conditioning
    preset = config.sampling
    guided = "label" in told.can_guide and "label" in (preset.guided_by or ["label"])
    guidance = f", {preset.guidance if preset.guidance != 1 else 1.5:g}" if guided else ""
    autoencoder = type(model.autoencoder.model).__name__
    lines = [
        "import json",
        "",
        "import numpy as np",
        "import torch",
        f"from diffusers import {', '.join(sorted([autoencoder, SCHEDULER, made.class_name]))}",
        "from PIL import Image",
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f'network = {made.class_name}.from_pretrained(".", subfolder="{made.folder}").to(device)',
        f'scheduler = {SCHEDULER}.from_pretrained(".", subfolder="scheduler")',
        f'vae = {autoencoder}.from_pretrained(".", subfolder="vae").to(device)',
        'about = json.load(open("model.json", encoding="utf-8"))',
        'shift = torch.tensor(about["latent_shift"], device=device)[:, None, None]',
        'scale = torch.tensor(about["latent_scale"], device=device)[:, None, None]',
        "",
        f"num, steps{', guidance' if guided else ''} = 4, {preset.steps if preset.solver == 'euler' else 50}{guidance}",
        'noise = torch.randn(num, *about["latent_shape"], generator=torch.Generator().manual_seed(0)).to(device)',
    ]
    if told.num_classes:
        lines.append('labels = torch.arange(num, device=device) % len(about["class_names"])')
    elif not made.any_size:
        lines.append("labels = torch.zeros(num, dtype=torch.long, device=device)  # the class asks for one")
    else:
        lines.append("labels = None")
    if guided:
        lines.append('null = torch.full_like(labels, about["null_label"])')
    if told.inpainting:
        lines += ["masked_latents = torch.zeros_like(noise)", "mask = torch.ones_like(noise[:, :1])"]
    lines += [
        "",
        "",
        "def velocity(latents, timestep, labels):",
        *(["    latents = torch.cat([latents, masked_latents, mask], dim=1)"] if told.inpainting else []),
        "    return network(latents, timestep.expand(len(latents)), class_labels=labels).sample",
        "",
        "",
        "with torch.no_grad():",
        "    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)",
        "    latents = noise",
    ]
    if guided and preset.guidance_interval != (0, 1):
        low, high = preset.guidance_interval
        lines += [
            "    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas):",
            "        v = velocity(latents, timestep, labels)",
            f"        if guidance != 1 and {low} <= sigma <= {high}:",
        ]
    else:
        lines += [
            "    for timestep in scheduler.timesteps:",
            "        v = velocity(latents, timestep, labels)",
            *(["        if guidance != 1:"] if guided else []),
        ]
    if guided:
        first = f"[:, :{preset.guided_channels}]" if preset.guided_channels else ""
        lines += [
            "            v_null = velocity(latents, timestep, null)",
            f"            v{first} = v_null{first} + guidance * (v{first} - v_null{first})",
        ]
    lines += [
        "        latents = scheduler.step(v, timestep, latents).prev_sample",
        "    pixels = vae.decode(latents / scale + shift).sample.clamp(-1, 1)",
        "",
        "for i, image in enumerate(((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()):",
        '    Image.fromarray(image).save(f"image_{i}.png")',
    ]
    return "\n".join(lines) + "\n"
