"""The conditions of a model: what the network sees besides latents and time.

A model has any subset of these conditions, one class each. Every condition has a null value. Training puts it in the
place of the true value at random (dropout), for each condition independently, so a model can be sampled with any subset
of its conditions, and classifier-free guidance (arXiv 2207.12598) works for each of them.

    condition       value                                                   null value
    label           a class index                                           the null label, after the last class
    inpainting      latents of the image without its hole, and the mask     latents 0, mask 1: everything is hole
    semantic_map    fraction of each map class in each latent pixel         0 for every class
    input           a paired image at latent size                           0, which no 8-bit pixel is in [-1, 1]
    NAME            the value of a named column, see `latentflow.columns`   not known; one condition for each column

A model may also take the numbers of the variants that it was trained on (`augmentation`). They are no condition that
anybody gives: they are zero except in training, in both branches of guidance, so that no augmentation shows in samples
(EDM, arXiv 2206.00364, section 5).

A new condition is one class here: its name, the fields of `Condition` that it fills, their shapes and null values.

Legend: B images, C latent channels, h and w latent height and width, K classes of the semantic map, I channels of the
input at latent size, P numbers of a variant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from latentflow.columns import MOST_CLASSES, MOST_COLUMNS, Column, ColumnKind, ColumnRow, check_columns, places_of
from latentflow.errors import ConfigError, DataError, nearest
from latentflow.model.class_names import ClassList, class_index, class_indices, in_a_list
from latentflow.networks.column_embedding import ColumnInput
from latentflow.randomness import ImageRandom
from latentflow.records import Record
from latentflow.shapes import Condition

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

ConditionName = str
"""One of `CONDITION_NAMES`, or the name of a column."""
CONDITION_NAMES: tuple[ConditionName, ...] = ("label", "inpainting", "semantic_map", "input")

_MOST_NAMED = 12  # classes in a description

NOTHING = Condition()
"""No condition is given."""

ClassName = Annotated[str, Field(max_length=1000)]
Channel = Annotated[int, Field(ge=0, le=255)]


@dataclass(frozen=True)
class ConditionKind(ABC):
    """One condition of a model.

    Attributes:
        dropout: fraction of training images that see the null value; 0: the model cannot do without the condition.
        name: in requests and in the metadata of pictures.
        dropout_key: the key of `dropout` in a recipe's `conditioning` and in config.json.
        task: of `latentflow evaluate` that gives this condition.
        fields: of `Condition` that it fills.
        dtype: of these fields.
    """

    dropout: float

    name: ClassVar[ConditionName]
    dropout_key: ClassVar[str]
    task: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    dtype: ClassVar[torch.dtype] = torch.float32

    @classmethod
    @abstractmethod
    def of(cls, config: Conditioning) -> Self | None:
        """The condition as a config describes it; None: the model does not have it."""

    @classmethod
    def all_of(cls, config: Conditioning) -> list[Self]:
        """The conditions of this kind as a config describes them."""
        own = cls.of(config)
        return [] if own is None else [own]

    @property
    @abstractmethod
    def nulls(self) -> tuple[float, ...]:
        """The null value of each field."""

    @abstractmethod
    def shapes(self, latents_shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shape of each field, for latents of the shape [B, C, h, w]."""

    @abstractmethod
    def remedy(self, given: Collection[ConditionName]) -> str:
        """How to give this condition, to a user who gave the others."""

    def complete(self, given: Condition, latents_shape: Sequence[int], device: torch.device | str) -> dict[str, Tensor]:
        """The fields of this condition on `device`: as given, or null."""
        complete = {}
        for field, null, shape in zip(self.fields, self.nulls, self.shapes(latents_shape), strict=True):
            value = getattr(given, field)
            if value is None:
                value = torch.full(shape, null, dtype=self.dtype, device=device)
            complete[field] = value.to(device, self.dtype)
            assert complete[field].shape == shape, (field, complete[field].shape, shape)
        return complete

    def drop(self, condition: Condition, rows: Tensor | None = None) -> Condition:
        """Put null values in place of this condition for the images in `rows` ([B] bool); None: for all images."""
        dropped = {}
        for field, null in zip(self.fields, self.nulls, strict=True):
            value = getattr(condition, field)
            if rows is None:
                dropped[field] = torch.full_like(value, null)
            else:
                dropped[field] = value.masked_fill(rows.reshape(-1, *[1] * (value.dim() - 1)), null)
        return replace(condition, **dropped)


@dataclass(frozen=True)
class Label(ConditionKind):
    """A class index; its null value is the index after the last class."""

    num_classes: int

    name, dropout_key, task = "label", "label_dropout", "sample"
    fields, dtype = ("labels",), torch.int64

    @classmethod
    def of(cls, config: Conditioning) -> Label | None:
        return cls(config.label_dropout, config.num_classes) if config.num_classes else None

    @property
    def nulls(self) -> tuple[float, ...]:
        return (self.num_classes,)

    def shapes(self, latents_shape: Sequence[int]) -> list[tuple[int, ...]]:
        return [(latents_shape[0],)]

    def remedy(self, given: Collection[ConditionName]) -> str:
        return "give --classes"


@dataclass(frozen=True)
class Inpainting(ConditionKind):
    """The known part of an image and the mask of its hole; null: everything is hole."""

    name, dropout_key, task = "inpainting", "inpainting_dropout", "inpaint"
    fields = ("masked_latents", "mask")

    @classmethod
    def of(cls, config: Conditioning) -> Inpainting | None:
        return cls(config.inpainting_dropout) if config.inpainting else None

    @property
    def nulls(self) -> tuple[float, ...]:
        return 0, 1

    def shapes(self, latents_shape: Sequence[int]) -> list[tuple[int, ...]]:
        num_images, channels, height, width = latents_shape
        return [(num_images, channels, height, width), (num_images, 1, height, width)]

    def remedy(self, given: Collection[ConditionName]) -> str:
        needs_map = " and --map" if "semantic_map" in given else ""
        return f"it can only fill holes: `latentflow inpaint` with the method 'condition'{needs_map}"


@dataclass(frozen=True)
class SemanticMap(ConditionKind):
    """The fraction of each map class in each latent pixel; null: 0 for every class."""

    num_classes: int

    name, dropout_key, task = "semantic_map", "map_dropout", "mask-to-image"
    fields = ("class_fractions",)

    @classmethod
    def of(cls, config: Conditioning) -> SemanticMap | None:
        return cls(config.map_dropout, config.num_map_classes) if config.num_map_classes else None

    @property
    def nulls(self) -> tuple[float, ...]:
        return (0,)

    def shapes(self, latents_shape: Sequence[int]) -> list[tuple[int, ...]]:
        num_images, _, height, width = latents_shape
        return [(num_images, self.num_classes, height, width)]

    def remedy(self, given: Collection[ConditionName]) -> str:
        if "inpainting" in given:
            return "give a map: `latentflow inpaint --map`"
        return "it can only paint maps: `latentflow mask-to-image`"


@dataclass(frozen=True)
class PairedInput(ConditionKind):
    """A paired image at latent size, its pixels or its latents (see `InputRules`); null: 0."""

    channels: int

    name, dropout_key, task = "input", "input_dropout", "translate"
    fields = ("input",)

    @classmethod
    def of(cls, config: Conditioning) -> PairedInput | None:
        return cls(config.input_dropout, config.input_channels) if config.input_channels else None

    @property
    def nulls(self) -> tuple[float, ...]:
        return (0,)

    def shapes(self, latents_shape: Sequence[int]) -> list[tuple[int, ...]]:
        num_images, _, height, width = latents_shape
        return [(num_images, self.channels, height, width)]

    def remedy(self, given: Collection[ConditionName]) -> str:
        return "it draws images from images: `latentflow translate`"


@dataclass(frozen=True)
class NamedColumn(ConditionKind):
    """The value of one named column; all columns share the field.

    Attributes:
        name: of the column.
        row: the shape of its values.
        place: where it stands in the row of all columns.
        whole: the width of that row, and the places and values of its numbers that are not 0 where nothing is known.
    """

    name: str  # type: ignore[misc]  # of a kind elsewhere, here of each column
    row: ColumnRow
    place: slice
    whole: tuple[int, tuple[tuple[int, int], ...]]

    dropout_key, task = "column_dropout", "sample"
    fields = ("columns",)

    @classmethod
    def all_of(cls, config: Conditioning) -> list[NamedColumn]:
        rows = [one.column.row for one in config.columns]
        places = places_of(rows)
        nulls = tuple((place.stop - 1, row.null) for place, row in zip(places, rows, strict=True))
        whole = places[-1].stop if places else 0, nulls
        return [
            cls(one.dropout, one.name, row, place, whole)
            for one, row, place in zip(config.columns, rows, places, strict=True)
        ]

    @classmethod
    def of(cls, config: Conditioning) -> NamedColumn | None:
        """The first column; see `all_of`."""
        return next(iter(cls.all_of(config)), None)

    @property
    def nulls(self) -> tuple[float, ...]:
        """Of the last number of its place; the others are 0."""
        return (self.row.null,)

    def shapes(self, latents_shape: Sequence[int]) -> list[tuple[int, ...]]:
        return [(latents_shape[0], self.whole[0])]

    def remedy(self, given: Collection[ConditionName]) -> str:
        return f"give --condition {self.name}=VALUE"

    def complete(self, given: Condition, latents_shape: Sequence[int], device: torch.device | str) -> dict[str, Tensor]:
        if given.columns is not None:
            return super().complete(given, latents_shape, device)
        (shape,) = self.shapes(latents_shape)
        columns = torch.zeros(shape, device=device)
        for place, value in self.whole[1]:
            columns[:, place] = value  # no copy from the host, which a CUDA graph could not have
        return {"columns": columns}

    def drop(self, condition: Condition, rows: Tensor | None = None) -> Condition:
        columns = condition.columns
        assert columns is not None
        rows = torch.ones(len(columns), dtype=torch.bool, device=columns.device) if rows is None else rows
        own = columns[:, self.place].masked_fill(rows[:, None], 0)
        last = own[:, -1:].masked_fill(rows[:, None], self.row.null)
        before, after = columns[:, : self.place.start], columns[:, self.place.stop :]
        return replace(condition, columns=torch.cat([before, own[:, :-1], last, after], dim=1))


CONDITION_KINDS: tuple[type[ConditionKind], ...] = (Label, Inpainting, SemanticMap, PairedInput, NamedColumn)
"""All conditions, in the order in which dropout draws their random numbers: a new one comes last."""


class ColumnCondition(Record):
    """A named column that a model is conditioned on, and what is known of its values in the training data."""

    name: str = Field(max_length=1000)
    kind: ColumnKind
    class_names: list[ClassName] = Field(
        default_factory=list, max_length=MOST_CLASSES, description="One name per class of a label or of labels."
    )
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="Fraction of training images without it; 0: no guidance on it."
    )
    images_per_class: list[int] = Field(
        default_factory=list, description="Training images of each class; empty: not known."
    )
    mean: float = Field(default=0.0, description="Of a number; the network gets (number - mean) / deviation.")
    deviation: float = Field(default=1.0, gt=0, description="Standard deviation of a number.")
    low: float | None = Field(default=None, description="The smallest number in training; null: not known.")
    high: float | None = Field(default=None, description="The largest number in training; null: not known.")

    @model_validator(mode="after")
    def _check(self) -> ColumnCondition:
        try:
            _ = self.column
        except DataError as error:
            raise ValueError(str(error)) from None
        if len(self.images_per_class) not in (0, len(self.class_names)):
            raise ValueError(f"{len(self.images_per_class)} counts of images for {len(self.class_names)} classes")
        return self

    def describe(self) -> str:
        """Its values in a few words: "label: frontal, lateral", or "number, 18 to 95"."""
        if self.kind == "number":
            return "number" if self.low is None else f"number, {self.low:g} to {self.high:g}"
        more = f", ... ({len(self.class_names)} in all)" if len(self.class_names) > _MOST_NAMED else ""
        return f"{self.kind}: {', '.join(self.class_names[:_MOST_NAMED])}{more}"

    @property
    def example(self) -> str:
        """A value as the command line takes it: "age=63"."""
        if self.kind == "number":
            return f"{self.name}={self.mean:.3g}"
        return f"{self.name}={in_a_list(self.class_names[0])}"

    @property
    def column(self) -> Column:
        """The column of the data."""
        return Column(self.name, self.kind, tuple(self.class_names))

    @property
    def network_input(self) -> ColumnInput:
        """What a network has to know of it."""
        return ColumnInput(self.column.row, self.mean, self.deviation)


class Conditioning(Record):
    """The conditions of a model, as its config stores them."""

    class_names: list[ClassName] = Field(
        default_factory=list, max_length=1_000_000, description="One name per class; empty: a model without labels."
    )
    label_dropout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Fraction of training images without their label; 0: no guidance on labels.",
    )
    inpainting: bool = Field(
        default=False, description="Whether the model is conditioned on the known part of an image."
    )
    inpainting_dropout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Fraction of training images that are all hole; 0: no guidance on the known part.",
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
        default=0.1, ge=0, lt=1, description="Fraction of training images without their map; 0: no guidance on maps."
    )
    input_channels: int = Field(
        default=0,
        ge=0,
        le=65_536,
        description="Channels of the paired input at latent size; 0: a model without inputs.",
    )
    input_dropout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Fraction of training images without their input; 0: no guidance on inputs.",
    )
    columns: list[ColumnCondition] = Field(
        default_factory=list, max_length=MOST_COLUMNS, description="The named columns that the model is conditioned on."
    )
    augmentation: list[ClassName] = Field(
        default_factory=list,
        max_length=255,
        description="One name per number of an augmented variant; empty: a model trained without variants.",
    )
    constant_embedding: bool = Field(
        default=False,
        description="Whether the network adds a learned vector in place of labels or columns that the model it was "
        "finetuned from had.",
    )

    @model_validator(mode="after")
    def _check(self) -> Conditioning:
        for given in (self.class_names, self.map_class_names):
            doubled = sorted(name for name, count in Counter(given).items() if count > 1)
            if doubled:
                raise ValueError(f"class names must differ; given twice: {', '.join(doubled)}")
        if len(self.map_palette) != len(self.map_class_names):
            raise ValueError(f"{len(self.map_palette)} colours for {len(self.map_class_names)} map classes")
        try:
            check_columns([one.column for one in self.columns])
        except DataError as error:
            raise ValueError(str(error)) from None
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
        """The label that means "no label": the index after the last class."""
        return self.num_classes

    @property
    def kinds(self) -> dict[ConditionName, ConditionKind]:
        """The conditions of this model."""
        return {kind.name: kind for every in CONDITION_KINDS for kind in every.all_of(self)}

    @property
    def dropout(self) -> dict[ConditionName, float]:
        """The dropout of each condition of this model."""
        return {name: kind.dropout for name, kind in self.kinds.items()}

    @property
    def can_guide(self) -> list[ConditionName]:
        """The conditions that were dropped in training, so that there is an unconditional branch to guide away from."""
        return [name for name, share in self.dropout.items() if share > 0]

    @property
    def required(self) -> list[ConditionName]:
        """The conditions that were never dropped in training, so that the model cannot do without them."""
        return [name for name, share in self.dropout.items() if share == 0]

    def with_required(
        self, chosen: Collection[ConditionName], among: Collection[ConditionName] | None = None
    ) -> list[ConditionName]:
        """The chosen conditions and those that the model requires, as far as they are `among` some; None: among all."""
        wanted = [name for name in self.kinds if name in chosen or name in self.required]
        return [name for name in wanted if among is None or name in among]

    def draw_dropped(self, random: ImageRandom) -> dict[ConditionName, Tensor]:
        """Which training images lose which condition: [B] bool each, drawn independently."""
        return {name: random.uniform() < share for name, share in self.dropout.items()}

    def build(self, latents_shape: Sequence[int], device: torch.device | str, given: Condition = NOTHING) -> Condition:
        """The condition of images with latents of the shape [B, C, h, w]: what is given, and null values for the rest.

        The numbers of variants are zero unless given.

        Raises:
            ConfigError: the model does not have a condition that is given.
        """
        for kind in CONDITION_KINDS:
            if set(kind.fields) & set(given.names) and not kind.all_of(self):
                self.require(getattr(kind, "name", "columns"))
        built: dict[str, Tensor] = {}
        for own in self.kinds.values():
            built |= own.complete(given, latents_shape, device)
        if given.augmentation is not None and not self.augmentation:
            raise ConfigError("this model was trained without augmented variants, so it takes no numbers of them")
        if self.augmentation:
            shape, numbers = (latents_shape[0], len(self.augmentation)), given.augmentation
            assert numbers is None or numbers.shape == shape, (numbers.shape, shape)
            built["augmentation"] = torch.zeros(shape, device=device) if numbers is None else numbers.to(device)
        return Condition(**built)

    def drop(self, condition: Condition, dropped: dict[ConditionName, Tensor]) -> Condition:
        """Put null values in place of what is `dropped`: for each condition a [B] bool on the condition's device."""
        kinds = self.kinds
        for name, rows in dropped.items():
            condition = kinds[name].drop(condition, rows)
        return condition

    def without(self, condition: Condition, dropped: Collection[ConditionName]) -> Condition:
        """The same images without the conditions `dropped`: what guidance compares with."""
        kinds = self.kinds
        for name in dropped:
            condition = kinds[name].drop(condition)
        return condition

    def require(self, name: ConditionName) -> None:
        """Refuse a condition that the model was not trained with.

        Raises:
            ConfigError: naming the conditions it has.
        """
        if name not in self.kinds:
            own = f"it is conditioned on {', '.join(self.kinds)}" if self.kinds else "it is unconditional"
            raise ConfigError(f"this model was not trained with the condition {name}; {own}")

    def column(self, name: str) -> ColumnCondition:
        """The column of that name.

        Raises:
            ConfigError: there is none; the nearest one is named.
        """
        found = next((one for one in self.columns if one.name == name), None)
        if found is None:
            own = nearest(name, [one.name for one in self.columns]) if self.columns else "this model has none"
            raise ConfigError(f"condition {name!r}: the model was not trained with a column of that name; {own}")
        return found

    def require_columns(self, found: Sequence[Column], where: object) -> None:
        """Refuse data that lack a column of this model, or have other classes in it.

        Raises:
            ConfigError: naming the column, and the nearest one of the data.
        """
        names = {column.name: column for column in found}
        for one in self.columns:
            if one.name not in names:
                own = nearest(one.name, names) if names else "they have none"
                raise ConfigError(f"{where} has no column {one.name!r}, which the model was trained with; {own}")
            if names[one.name] != one.column:
                theirs, ours = (f"{c.kind} ({', '.join(c.class_names[:8])})" for c in (names[one.name], one.column))
                raise ConfigError(f"{where}: the column {one.name} is a {theirs}, but the model knows a {ours}")

    def require_all(self, given: Collection[ConditionName]) -> None:
        """Refuse to leave out a condition that the model cannot do without.

        Raises:
            ConfigError: naming it, and how to give it.
        """
        for name in self.required:
            if name not in given:
                kind = self.kinds[name]
                raise ConfigError(
                    f"this model requires the condition {name}: it was trained with {kind.dropout_key} = 0; "
                    f"{kind.remedy(given)}"
                )

    def class_index(self, given: int | str) -> int:
        """The index of one class; see `latentflow.model.class_names.class_index`."""
        return class_index(self.class_names, given)

    def class_indices(self, given: ClassList) -> list[int]:
        """The indices of one class or several; see `latentflow.model.class_names.class_indices`."""
        return class_indices(self.class_names, given)
