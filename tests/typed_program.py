"""A program as users write it, for the type checker: what is right has no error, and what is wrong has one.

Each `type: ignore` names the error that has to be there; mypy complains of one that is not needed.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from latentflow import LatentFlow, RegisteredNetwork, register_network
from latentflow.model.conditioning import Conditioning
from latentflow.sampling.samples import Samples
from latentflow.shapes import Condition


@register_network("typed")
class Typed(nn.Module):
    def forward(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return latents * time[:, None, None, None]


def draw(model: LatentFlow) -> list[Path]:
    drawn: Samples = model.sample(num=4, classes=["cat", "dog"], guidance=1.5, solver="heun", steps=10, seed=0)
    model.inpaint("street.png", "hole.png", feather=4, method="condition")
    model.interpolate(seeds=(3, 8), num=9)
    images: list[Image.Image] = drawn.images
    images[0].save("cat.png")
    return drawn.save("folder")


def mistaken(model: LatentFlow) -> None:
    model.sample(guidence=2)  # type: ignore[call-arg]
    model.sample(steps="ten")  # type: ignore[arg-type]
    model.inpaint("street.png")  # type: ignore[call-arg]
    model.inpaint("street.png", "hole.png", method="magic")  # type: ignore[arg-type]
    print(model.sample(num=2).image)  # type: ignore[attr-defined]


def train() -> Tensor:
    network = RegisteredNetwork(name="typed")
    model = LatentFlow.assemble(network, "shapes", image_size=32, conditioning=Conditioning(class_names=["cat"]))
    made: Typed = Typed()
    return model.loss(made(model.encode(model.autoencoder.decode(Tensor())), Tensor(), Condition()))
