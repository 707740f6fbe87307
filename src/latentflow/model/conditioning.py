"""What the network is told besides latents and time, built the same way in training and sampling.

A model may hear any set of three conditions. Each has a null, "nothing is said", which training puts in its
place now and then (dropout), each condition on its own. So any subset of them can be asked for, and
classifier-free guidance works for each.

    condition       what it is                                              its null
    label           a class index                                           the null label, behind the last class
    inpainting      latents of the image without its hole, and the mask     latents 0, mask 1: all is to be painted
    semantic_map    shares of map classes in each latent pixel              0: no class is named

Legend: B images, C latent channels, h and w latent height and width, K classes of the semantic map.
"""

from __future__ import annotations

import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence, Set
from dataclasses import replace
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from latentflow.errors import ConfigError, nearest
from latentflow.randomness import ImageRandom
from latentflow.records import Record
from latentflow.shapes import Condition

ConditionName = Literal["label", "inpainting", "semantic_map"]
CONDITION_NAMES: tuple[ConditionName, ...] = get_args(ConditionName)

ClassList = int | str | Sequence[int | str]
"""Classes as a person gives them: one, or a list of either names or indices; see `Conditioning.class_indices`."""

CONDITION_FIELDS: dict[ConditionName, tuple[str, ...]] = {
    "label": ("labels",),
    "inpainting": ("masked_latents", "mask"),
    "semantic_map": ("class_fractions",),
}
"""The fields of `Condition` that each condition fills."""


ClassName = Annotated[str, Field(max_length=1000)]
Channel = Annotated[int, Field(ge=0, le=255)]


class Conditioning(Record):
    """The conditions of a model, as its config stores them."""

    class_names: list[ClassName] = Field(
        default_factory=list, max_length=1_000_000, description="One name per class; empty: a model without labels."
    )
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of training images whose label is dropped; 0: no guidance by it."
    )
    inpainting: bool = Field(False, description="Whether the model is told the known part of an image and a mask.")
    inpainting_dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of training images that are all hole; 0: no guidance by the known part."
    )
    map_class_names: list[ClassName] = Field(
        default_factory=list,
        max_length=255,
        description="One name per class of the semantic map; empty: a model without maps.",
    )
    map_palette: list[tuple[Channel, Channel, Channel]] = Field(
        default_factory=list, max_length=255, description="The RGB colour of each map class, 0 to 255."
    )
    map_dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of training images whose map is dropped; 0: no guidance by it."
    )

    @model_validator(mode="after")
    def _check(self) -> Conditioning:
        for names in (self.class_names, self.map_class_names):
            doubled = sorted(name for name, count in Counter(names).items() if count > 1)
            if doubled:
                raise ValueError(f"class names must differ; given twice: {', '.join(doubled)}")
        if len(self.map_palette) != len(self.map_class_names):
            raise ValueError(f"{len(self.map_palette)} colours for {len(self.map_class_names)} map classes")
        return self

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a model without labels."""
        return len(self.class_names)

    @property
    def num_map_classes(self) -> int:
        """Number of classes of the semantic map; 0 for a model without maps."""
        return len(self.map_class_names)

    @property
    def null_label(self) -> int:
        """The label that means "no label": the index behind the last class."""
        return self.num_classes

    @property
    def dropout(self) -> dict[ConditionName, float]:
        """The conditions of this model, each with the share of training images that were not told it."""
        conditions = {
            "label": (self.num_classes > 0, self.label_dropout),
            "inpainting": (self.inpainting, self.inpainting_dropout),
            "semantic_map": (self.num_map_classes > 0, self.map_dropout),
        }
        return {name: share for name, (is_there, share) in conditions.items() if is_there}

    @property
    def can_guide(self) -> list[ConditionName]:
        """The conditions whose null was trained, so that classifier-free guidance by them means something."""
        return [name for name, share in self.dropout.items() if share > 0]

    def draw_dropped(self, random: ImageRandom) -> dict[ConditionName, Tensor]:
        """Which training images are not told which condition: [B] bool each, drawn independently."""
        return {name: random.uniform() < share for name, share in self.dropout.items()}

    def build(
        self,
        latents_shape: Sequence[int],
        device: torch.device | str,
        *,
        labels: Tensor | None = None,
        masked_latents: Tensor | None = None,
        mask: Tensor | None = None,
        class_fractions: Tensor | None = None,
    ) -> Condition:
        """The condition of images whose latents have the shape [B, C, h, w]; what is not given is null.

        Args:
            labels: [B] int64 in [0, num_classes].
            masked_latents, mask: [B, C, h, w] and [B, 1, h, w], given together.
            class_fractions: [B, K, h, w].

        Raises:
            ConfigError: the model does not have a condition that is given.
        """
        num_images, channels, height, width = latents_shape
        given = {
            "labels": labels,
            "masked_latents": masked_latents,
            "mask": mask,
            "class_fractions": class_fractions,
        }
        shapes = {
            "labels": (num_images,),
            "masked_latents": (num_images, channels, height, width),
            "mask": (num_images, 1, height, width),
            "class_fractions": (num_images, self.num_map_classes, height, width),
        }
        built = {}
        for condition, names in CONDITION_FIELDS.items():
            for name in names:
                if condition in self.dropout:
                    dtype = torch.int64 if name == "labels" else torch.float32
                    null = torch.full(shapes[name], self._null(name), dtype=dtype, device=device)
                    built[name] = null if given[name] is None else given[name].to(null)
                    assert built[name].shape == null.shape, (name, built[name].shape, null.shape)
                elif given[name] is not None:
                    self.require(condition)
        return Condition(**built)

    def drop(self, condition: Condition, dropped: dict[ConditionName, Tensor]) -> Condition:
        """Put nulls in the place of what is `dropped`: for each condition a [B] bool on the condition's device."""
        changed = {}
        for kind, rows in dropped.items():
            for name in CONDITION_FIELDS[kind]:
                value = getattr(condition, name)
                rows = rows.reshape(-1, *[1] * (value.dim() - 1))
                changed[name] = value.masked_fill(rows, self._null(name))
        return replace(condition, **changed)

    def without(self, condition: Condition, kinds: Collection[ConditionName]) -> Condition:
        """The same images told nothing of `kinds`: the null twin that guidance compares with."""
        fields = {kind: getattr(condition, CONDITION_FIELDS[kind][0]) for kind in kinds}
        every = {kind: torch.ones(len(x), dtype=torch.bool, device=x.device) for kind, x in fields.items()}
        return self.drop(condition, every)

    def require(self, kind: ConditionName) -> None:
        """Refuse a condition that the model was not trained with.

        Raises:
            ConfigError: saying which conditions it has.
        """
        if kind not in self.dropout:
            told = ", ".join(self.dropout) or "nothing: it is unconditional"
            raise ConfigError(f"this model was not trained with the condition {kind}; it is told {told}")

    def class_index(self, given: int | str) -> int:
        """A class: a number is its index; a text is its name, or "#3" for its index where no class is called so.

        Names are compared as they are, or else in Unicode's composed form (NFC).

        Raises:
            ConfigError: there is no such class; with the nearest name, or with how an index is written.
        """
        if isinstance(given, str) and (index := self._named(given)) is not None:
            return index
        if not self.num_classes:
            raise ConfigError(f"class {str(given)!r}: this model has no classes; leave the classes out")
        index = _written_index(given)
        if index is not None:
            if 0 <= index < self.num_classes:
                return index
            raise ConfigError(
                f"class #{index} does not exist; this model has the classes #0 to #{self.num_classes - 1}"
            )
        name = given.strip()
        hint = nearest(name, [_in_a_list(one) for one in self.class_names])
        if begun := next((one for one in self.class_names if one.startswith(f"{name},")), None):
            hint = f"a name with a comma stands in double quotes: {_in_a_list(begun)}"
        elif re.fullmatch("[0-9]{1,9}", name) and int(name) < self.num_classes:
            hint = f"the class with that index, {self.class_names[int(name)]!r}, is written '#{int(name)}'"
        raise ConfigError(f"no class is named {name!r}; {hint}")

    def class_indices(self, given: ClassList) -> list[int]:
        """Classes: one, or a list of names or of indices; "none" or an empty list: no class is told.

        Where a class is called none, "#none" tells no class.

        Raises:
            ConfigError: there is no such class, or names and indices stand in one list.
        """
        if isinstance(given, Set):
            raise ConfigError(f"classes {given!r}: a set has no order; give a list")
        listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else [given]
        asked = [one if isinstance(one, str) else _written_index(one) for one in listed]
        indices = [one for one in asked if not self._is_name(one)]
        if len(listed) == 1 and (indices == ["#none"] or (listed == ["none"] and self._named("none") is None)):
            return []
        if indices and len(indices) < len(listed):
            name = next(one for one in listed if self._is_name(one))
            index = str(indices[0]).strip().lstrip("#")
            raise ConfigError(f"the classes {name!r} and '#{index}' in one list; give all by name, or all by index")
        return [self.class_index(one) for one in listed]

    def _is_name(self, given: int | str) -> bool:
        return isinstance(given, str) and (self._named(given) is not None or not given.strip().startswith("#"))

    def _named(self, text: str) -> int | None:
        for name in (text, text.strip()):
            if name in self.class_names:
                return self.class_names.index(name)
        composed = [unicodedata.normalize("NFC", name) for name in self.class_names]
        wanted = unicodedata.normalize("NFC", text.strip())
        return composed.index(wanted) if wanted in composed else None

    def _null(self, field: str) -> float:
        return {"labels": self.null_label, "masked_latents": 0, "mask": 1, "class_fractions": 0}[field]


def _in_a_list(name: str) -> str:
    """A class's name as a list in CSV asks for it."""
    return '"' + name.replace('"', '""') + '"' if "," in name or name.startswith('"') else name


def _written_index(given: int | str) -> int | None:
    """The index that a number or a text like "#3" stands for; None: it is a name."""
    if isinstance(given, str):
        written = re.fullmatch("#(-?[0-9]{1,18})", given.strip())
        return int(written[1]) if written else None
    if isinstance(given, bool) or not hasattr(given, "__index__"):
        raise ConfigError(f"class {given!r} is neither a name nor an index; give a text or a whole number")
    return operator.index(given)
