"""The demo's first stages: from images to a trained model."""

from __future__ import annotations

from typing import Any

import numpy as np

from latentflow.artifacts import read_json
from latentflow.autoencoder import Autoencoder
from latentflow.commands.encode import encode
from latentflow.commands.info import describe
from latentflow.commands.train import train
from latentflow.data.pictures.user_picture import psnr
from latentflow.data.request import EncodeRequest
from latentflow.data.sources.synthetic import CLASS_NAMES
from latentflow.demo.judging import judge
from latentflow.demo.workshop import BATCH, Workshop, as_tensor
from latentflow.training.log import read_metrics

_MASK_VARIANTS = 1  # holes per image: encoding new ones in every step would take longer than the step


class Interrupted(Exception):
    """A signal stopped the training, which is saved; repeating the call goes on.

    Attributes:
        signal: its number.
    """

    def __init__(self, step: int, signal: int):
        super().__init__(f"stopped by a signal at step {step}, saved; repeat the command to go on")
        self.signal = signal


def encode_images(work: Workshop) -> dict[str, Any]:
    """Images => latent cache."""
    recipe, folder = work.figures.recipe, work.out / "cache"
    before = sum(read_json(record)["num_images"] for record in folder.glob("shard-*.json"))
    request = EncodeRequest(
        data=recipe.data.path,
        autoencoder=recipe.autoencoder,
        image_size=recipe.data.image_size,
        flips=recipe.data.flip,
        mask_policy=recipe.data.masks.policy,
        mask_variants=_MASK_VARIANTS,
        batch_size=BATCH,
    )
    result = encode(request, folder, runtime=work.runtime)
    plan, num_images = result.index.plan, result.index.num_images
    return {
        "num_images": num_images,
        "image_size": plan.image_size,
        "latent_shape": (plan.num_channels, *plan.moments_shape[1:]),
        "images_per_second": (num_images - before) / result.seconds,
    }


def examine_autoencoder(work: Workshop) -> dict[str, Any]:
    """What the autoencoder keeps of held-out images."""
    autoencoder = Autoencoder.from_pretrained(work.figures.recipe.autoencoder).to(work.runtime.for_autoencoder())
    source = work.held_out(work.figures.scale.num_judged)
    labels = [source.label(index) for index in range(len(source))]
    real = as_tensor([item.pixels for item in source])
    decoded = autoencoder.reconstruct(real)
    decibels = psnr(real, decoded)
    shown = np.argsort(labels[: len(CLASS_NAMES)])  # the first of each class, in the order of the classes
    work.save_sheet("reconstructions", [real[shown], decoded[shown]])
    return {
        "psnr": decibels.mean().item(),
        "worst_psnr": decibels.min().item(),
        "shown_psnr": decibels[shown].tolist(),
        "real": judge(real, labels),
        "reconstructed": judge(decoded, labels),
    }


def train_network(work: Workshop) -> dict[str, Any]:
    """Latent cache => model; the figures are those of the run's log.

    Raises:
        Interrupted: a signal stopped it.
    """
    recipe = work.figures.recipe
    data = recipe.data.model_copy(update={"path": str(work.out / "cache")})
    recipe = recipe.model_copy(update={"data": data, "out": str(work.out / "run")})
    result = train(recipe, runtime=work.runtime)
    if not result.outcome.finished:
        raise Interrupted(result.outcome.step, result.outcome.signal or 0)
    curve, environment = read_metrics(result.run), read_json(result.run / "environment.json")
    seen = [0, *(line["images_seen"] for line in curve)]
    return {
        "seconds": sum((seen[n + 1] - seen[n]) / line["images_per_second"] for n, line in enumerate(curve)),
        "images_seen": seen[-1],
        "num_parameters": describe(result.run)["parameters"],
        "device": environment["device"],
        "num_threads": environment["num_threads"],
        "curve": curve,
    }
