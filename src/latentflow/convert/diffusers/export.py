"""Export a model as a diffusers folder: network, scheduler and autoencoder, each loaded by its class in diffusers.

    unet/ or transformer/    the velocity network, in float32
    scheduler/               FlowMatchEulerDiscreteScheduler
    vae/                     the autoencoder
    model.json               what diffusers has no place for: scaling of the latents, class names, null label
    README.md                a model card with a program that samples images and needs only diffusers

Time and direction are the same in both libraries: sigma is t, 1 at noise and 0 at data, and the velocity is
noise - data. The scheduler passes sigma * num_train_timesteps to the network, so that number is the network's
time_scale. The noise that a path leaves on the data (sigma_min) affects training only: sampling integrates the velocity
in either case.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from latentflow.artifacts import atomic_folder, require_new, write_json, write_text
from latentflow.autoencoder import Autoencoder
from latentflow.convert.diffusers.keys import DiffusersNetwork, diffusers_network
from latentflow.convert.exported import LIMIT, Exported, largest_error
from latentflow.data.painting.latent_size import HOLE_GRAY
from latentflow.errors import ArtifactError
from latentflow.model.card import render_card
from latentflow.model.config import AUTOENCODER_FOLDER, ModelConfig
from latentflow.model.flow_model import FlowModel
from latentflow.shapes import Condition

SCHEDULER = "FlowMatchEulerDiscreteScheduler"


@torch.no_grad()
def export_diffusers(model: FlowModel, folder: str | Path) -> Exported:
    """Write a model as a diffusers folder, after checking that diffusers computes the same velocity.

    Args:
        folder: new or empty.

    Raises:
        ArtifactError: the folder is not empty, no class of diffusers is the same function as the network, or the
            velocities differ after all. Nothing is written.
    """
    import diffusers

    folder = require_new(folder)
    config = model.config
    made = diffusers_network(config)
    network_class = getattr(diffusers, made.class_name)
    # Compared on the CPU: other devices round convolutions to fewer digits, and differently for each memory layout.
    ours = copy.deepcopy(model.network).to("cpu", torch.float32, memory_format=torch.contiguous_format).eval()
    with atomic_folder(folder) as temporary:
        network = network_class(**made.arguments)
        network.load_state_dict(made.keys.theirs(ours.state_dict()))
        network.save_pretrained(temporary / made.folder)
        scheduler = getattr(diffusers, SCHEDULER)(
            num_train_timesteps=int(config.network.time_scale), shift=config.sampling.shift
        )
        scheduler.save_pretrained(temporary / "scheduler")
        model.autoencoder.save_pretrained(temporary / "vae")
        write_json(temporary / "model.json", _facts(config))
        write_text(temporary / "README.md", _readme(model, made))

        saved = network_class.from_pretrained(temporary / made.folder, low_cpu_mem_usage=False)
        error = _compared(ours, saved, config, made)
        if not error <= LIMIT:
            raise ArtifactError(
                f"{made.class_name} of diffusers {diffusers.__version__} differs from this model by {error:.1e} of the "
                f"largest velocity, where rounding explains {LIMIT:g}; nothing was written"
            )
        if Autoencoder.from_pretrained(temporary / "vae").content_hash != config.autoencoder.content_hash:
            raise ArtifactError("diffusers changed the autoencoder when saving it; nothing was written")
    parts = {made.folder: made.class_name, "scheduler": SCHEDULER, "vae": _autoencoder_class(model)}
    return Exported(folder, parts, error)


def _facts(config: ModelConfig) -> dict[str, object]:
    """The content of model.json."""
    conditioning = config.conditioning
    return {
        "image_size": config.image_size.written,
        "latent_shape": list(config.latent_shape),
        "latent_shift": config.normalisation.shift,
        "latent_scale": config.normalisation.scale,
        "class_names": conditioning.class_names,
        "null_label": conditioning.null_label if conditioning.num_classes else None,
    }


def _compared(ours: nn.Module, theirs: nn.Module, config: ModelConfig, made: DiffusersNetwork) -> float:
    """The largest relative error over times, labels and sizes."""
    return largest_error((diffusers_velocity(theirs, config, *given), ours(*given)) for given in _probes(config, made))


def diffusers_velocity(
    network: nn.Module, config: ModelConfig, latents: Tensor, time: Tensor, condition: Condition
) -> Tensor:
    """The velocity of the network in diffusers: latents [B, C, h, w] and time [B] in [0, 1] => [B, C, h, w]."""
    joined = [x for x in (latents, condition.masked_latents, condition.mask) if x is not None]
    labels = condition.labels
    if labels is None and config.network.kind == "dit":
        labels = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)  # the only row
    return network(torch.cat(joined, dim=1), time * config.network.time_scale, class_labels=labels).sample


def _probes(config: ModelConfig, made: DiffusersNetwork) -> Iterator[tuple[Tensor, Tensor, Condition]]:
    """Random latents at times from data to noise, with labels from the first class to the null label."""
    conditioning, generator = config.conditioning, torch.Generator().manual_seed(0)
    channels, height, width = config.latent_shape
    multiple = config.network.size_multiple
    shapes = [(height, width), (2 * multiple, 3 * multiple)] if made.any_size else [(height, width)]
    time = torch.tensor([1.0, 0.7, 0.31, 0.0])
    last = conditioning.num_classes - 1
    labels = torch.tensor([0, last // 2, last, conditioning.null_label]) if conditioning.num_classes else None
    for shape in shapes:
        for turn in range(2 if conditioning.num_classes else 1):  # in the second turn every time has another label
            drawn = torch.randn(4, 2 * channels + 1, *shape, generator=generator)
            latents, masked_latents, mask = drawn.split([channels, channels, 1], dim=1)
            given = Condition(labels=None if labels is None else labels.roll(turn))
            condition = conditioning.build(latents.shape, "cpu", given)
            if conditioning.inpainting:
                condition = replace(condition, masked_latents=masked_latents, mask=mask.sigmoid())
            yield latents, time, condition


def _readme(model: FlowModel, made: DiffusersNetwork) -> str:
    """The page with its program; both are templates in `templates/`."""
    config, sampling = model.config, model.config.sampling
    normalisation, autoencoder = config.normalisation, _autoencoder_class(model)
    hole_as_sign = config.masks is not None and config.masks.told_as == "sign"
    values = {
        "network": made,
        "scheduler": SCHEDULER,
        "autoencoder": autoencoder,
        "imports": sorted([autoencoder, SCHEDULER, made.class_name]),
        "sampling": sampling,
        "steps": sampling.steps if sampling.solver == "euler" else 50,
        "guided": "label" in config.conditioning.can_guide and "label" in (sampling.guided_by or ["label"]),
        "guidance": sampling.guidance if sampling.guidance != 1 else 1.5,
        "origin": "" if config.autoencoder.reference == AUTOENCODER_FOLDER else config.autoencoder.reference,
        "one_scale": len({*normalisation.shift}) == len({*normalisation.scale}) == 1,
        "variational": model.autoencoder.num_moments != model.autoencoder.num_channels,
        "hole_as_sign": hole_as_sign,
        "hole_level": "-1.0" if hole_as_sign else f"{HOLE_GRAY} / 127.5 - 1",
    }
    return render_card("latentflow.convert.diffusers", "README.md.j2", config, "diffusers", **values)


def _autoencoder_class(model: FlowModel) -> str:
    return type(model.autoencoder.model).__name__
