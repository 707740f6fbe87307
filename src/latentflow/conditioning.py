"""What the network is told besides latents and time, built the same way in training and sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from latentflow.errors import ConfigError, nearest
from latentflow.randomness import ImageRandom
from latentflow.shapes import Condition


class Conditioning(BaseModel):
    """The conditions of a model, as its config stores them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    class_names: list[str] = Field(
        default_factory=list, description="One name per class; empty: an unconditional model."
    )
    label_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of training images whose label is replaced by the null label; 0: no guidance.",
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Conditioning:
        doubled = sorted({name for name in self.class_names if self.class_names.count(name) > 1})
        if doubled:
            raise ValueError(f"class names must differ; given twice: {', '.join(doubled)}")
        return self

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for an unconditional model."""
        return len(self.class_names)

    @property
    def null_label(self) -> int:
        """The label that means "no label": the index behind the last class."""
        return self.num_classes

    @property
    def can_guide(self) -> bool:
        """Whether the null condition was trained, so that classifier-free guidance means something."""
        return self.num_classes > 0 and self.label_dropout > 0

    def for_training(self, labels: Tensor | None, random: ImageRandom, device: torch.device | str) -> Condition:
        """The condition of training images: labels [B], each dropped to the null label on its own."""
        if not self.num_classes:
            return Condition()
        dropped = random.uniform() < self.label_dropout
        return Condition(labels.masked_fill(dropped.to(labels.device), self.null_label)).to(device)

    def for_labels(self, labels: Sequence[int], device: torch.device | str) -> Condition:
        """The condition of images to be drawn: one class index per image; ignored by an unconditional model."""
        if not self.num_classes:
            return Condition()
        return Condition(torch.tensor(list(labels), dtype=torch.int64, device=device))

    def null(self, num_images: int, device: torch.device | str) -> Condition:
        """The null condition of `num_images` images: the twin that guidance compares with."""
        return self.for_labels([self.null_label] * num_images, device)

    def class_index(self, given: int | str) -> int:
        """A class by index or by name; a text like "3" is a name first, where a class is called that.

        Raises:
            ConfigError: there is no such class.
        """
        text = str(given).strip()
        if isinstance(given, str) and text in self.class_names:
            return self.class_names.index(text)
        if not self.num_classes:
            raise ConfigError(f"class {text!r}: this model is unconditional and has no classes; leave the classes out")
        try:
            index = int(text)
        except ValueError:
            raise ConfigError(f"no class is named {text!r}; {nearest(text, self.class_names)}") from None
        if not 0 <= index < self.num_classes:
            raise ConfigError(f"class {index} does not exist; this model has classes 0 to {self.num_classes - 1}")
        return index
