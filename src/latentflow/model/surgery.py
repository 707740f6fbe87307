"""The weights of a model put into a network of other classes, other conditions or another image size.

Before the first step of finetuning the new network computes what the source computes, bit for bit on the CPU:

    classes         a class of the same name keeps its row of the table; a new one gets the row of the class that it is
                    said to come from, or the mean of all rows; the null row stays. Classes for a source without any
                    begin at zero, so that all of them are what the source draws.
    no classes      the null row of the source becomes a constant that is added in place of the label.
    named columns   the same, value by value; a new column begins with vectors of zero. The known rows of a column are
                    kept by the names of its classes, the mean and deviation of a number are those of the source.
    space           the weights of new input channels (known part and mask, map, paired input) are zero.
    image size      nothing: positions are computed for the size at hand.

What a source can do without is dropped: maps and paired inputs, whose null value is zero. A known part cannot be
dropped, because its null mask is 1 and enters the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentflow.errors import ConfigError, nearest
from latentflow.model.conditioning import ColumnCondition, Conditioning
from latentflow.model.config import ModelConfig
from latentflow.networks.base import VelocityNetwork
from latentflow.networks.column_embedding import ColumnEmbedding, NumberEmbedding
from latentflow.networks.spatial_encoder import SpatialEncoder
from latentflow.weights import without_memory


@dataclass(frozen=True)
class Grafted:
    """The weights that a model begins with when it is finetuned.

    Attributes:
        weights: by name, as in the state dict of the network; those that are unchanged are the source's tensors.
        made: names of the tensors that the source does not have, in whole or in part.
    """

    weights: dict[str, Tensor]
    made: frozenset[str]


def grafted_config(source: ModelConfig, config: ModelConfig) -> ModelConfig:
    """The config of a model that begins with the weights of `source`, on its path and on latents of its scale.

    Args:
        config: of a new model with the source's network, and the conditions that are wanted.

    Raises:
        ConfigError: the source has a condition that cannot be taken away.
    """
    ours, theirs = config.conditioning, source.conditioning
    if theirs.inpainting and not ours.inpainting:
        raise ConfigError(
            "conditioning.inpainting = false, but the model of init_from is conditioned on the known part of an image, "
            "and cannot do without its mask; add conditioning.inpainting=true"
        )
    known = {one.name: one for one in theirs.columns}
    columns = [_scaled_as(one, known.get(one.name)) for one in ours.columns]
    lost = (theirs.num_classes and not ours.num_classes) or known.keys() - {one.name for one in columns}
    update = {"columns": columns, "constant_embedding": theirs.constant_embedding or bool(lost)}
    conditioning = ours.model_copy(update=update)
    same = {name: getattr(source, name) for name in ("prediction", "path", "normalisation")}
    return ModelConfig.model_validate(config.model_copy(update={"conditioning": conditioning, **same}).model_dump())


def _scaled_as(column: ColumnCondition, known: ColumnCondition | None) -> ColumnCondition:
    """A column with the mean and deviation by which the source knows its numbers.

    Raises:
        ConfigError: the source has a column of that name and of another kind.
    """
    if known is None:
        return column
    if known.kind != column.kind:
        raise ConfigError(
            f"column {column.name}: it is a {column.kind}, but the model of init_from knows a {known.kind} of that "
            f"name; leave it out of conditioning.columns, or rename it"
        )
    return column.model_copy(update={"mean": known.mean, "deviation": known.deviation})


def label_rows(source: ModelConfig, class_names: Sequence[str], class_from: Mapping[str, str]) -> list[list[int]]:
    """The classes of `source` whose mean each class begins with; an empty list: with zero, for a source without any.

    Args:
        class_from: names of new classes, each with that of the class of the source that it comes from.

    Raises:
        ConfigError: there is no such class, new or old.
    """
    old = source.conditioning.class_names
    for new, former in class_from.items():
        if new not in class_names:
            own = nearest(new, class_names) if class_names else "the data have no classes"
            raise ConfigError(f"class_from {new}={former}: the data have no class {new!r}; {own}")
        if former not in old:
            own = nearest(former, old) if old else "it has no classes"
            raise ConfigError(f"class_from {new}={former}: the model of init_from has no class {former!r}; {own}")
    place = {name: index for index, name in enumerate(old)}
    starts = {name: class_from.get(name, name) for name in class_names}
    return [[place[starts[name]]] if starts[name] in place else list(source.seen_classes) for name in class_names]


def graft(
    source: ModelConfig, weights: Mapping[str, Tensor], config: ModelConfig, class_from: Mapping[str, str]
) -> Grafted:
    """The weights with which a network of `config` computes what the source does.

    New weights that may not be zero, such as the embedding of map classes, are drawn from torch's generator.

    Args:
        weights: of the source.
        config: from `grafted_config`.
        class_from: see `label_rows`.

    Raises:
        ConfigError: see `label_rows`.
    """
    with without_memory():
        built = source.build_network(), config.build_network()
    (theirs, prefix), (ours, _) = map(_inner, built)
    names = {id(module): name for name, module in ours.named_modules()}
    wide = {name: tensor.dtype for name, tensor in theirs.state_dict().items()}  # the file may be in half precision
    plain = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    old = {name: tensor.to(wide[name]) for name, tensor in plain.items()}
    new = _input_weights(theirs, ours, names, old, same_input=_same_input(source, config))
    if ours.spatial.map_encoder is not None:
        new[f"{names[id(ours.spatial.map_encoder)]}.mix.weight"] = _map_weights(theirs, source, config, old)
    rows = label_rows(source, config.conditioning.class_names, class_from)
    new |= _vectors(_Sides(theirs, ours, source.conditioning, config.conditioning, old), rows)
    state = {name: new[name] if name in new else old[name] for name in ours.state_dict()}
    made = [name for name in new if name not in old or not _equal(new[name], old[name])]
    return Grafted({f"{prefix}{name}": one for name, one in state.items()}, frozenset(f"{prefix}{n}" for n in made))


def _inner(network: nn.Module) -> tuple[VelocityNetwork, str]:
    """The network inside of what turns its output into a velocity, and what its names begin with there."""
    return (network, "") if isinstance(network, VelocityNetwork) else (network.network, "network.")


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _same_input(source: ModelConfig, config: ModelConfig) -> bool:
    """Whether paired inputs enter both in the same form."""
    same = source.conditioning.input_channels == config.conditioning.input_channels
    return same and (source.inputs, source.input_format) == (config.inputs, config.input_format)


def _input_weights(
    theirs: VelocityNetwork,
    ours: VelocityNetwork,
    names: Mapping[int, str],
    old: Mapping[str, Tensor],
    *,
    same_input: bool,
) -> dict[str, Tensor]:
    """Of the layers that read spatial conditions, zero for the channels that the source does not have."""
    before, now = theirs.spatial.channels_of, ours.spatial.channels_of
    both = [field for field in now if field in before and (field != "input" or same_input)]
    weights = {}
    for layer in ours.input_layers:
        name = f"{names[id(layer)]}.weight"
        weight = old[name].new_zeros(layer.weight.shape)
        for field in both:
            weight[:, now[field]] = old[name][:, before[field]]
        weights[name] = weight
    return weights


def _map_weights(
    theirs: VelocityNetwork, source: ModelConfig, config: ModelConfig, old: Mapping[str, Tensor]
) -> Tensor:
    """The vectors of map classes [C, K, 1, 1]: by name, zero for new ones; drawn where the source has no maps."""
    classes, known = config.conditioning.map_class_names, source.conditioning.map_class_names
    channels = config.autoencoder.num_channels
    if not known:
        return SpatialEncoder(len(classes), channels).mix.weight.detach()
    table = old["spatial.map_encoder.mix.weight"]
    weight = table.new_zeros(channels, len(classes), 1, 1)
    for index, name in enumerate(classes):
        if name in known:
            weight[:, index] = table[:, known.index(name)]
    return weight


@dataclass(frozen=True)
class _Sides:
    """The source and the new model: their networks without memory, their conditions, and the source's weights."""

    theirs: VelocityNetwork
    ours: VelocityNetwork
    before: Conditioning
    now: Conditioning
    old: Mapping[str, Tensor]

    def names(self, kind: str) -> tuple[str, str]:
        """The names of a condition's layer in both networks; "" where there is none."""
        return tuple(_name_in(network, network.condition_layers[kind]) for network in (self.theirs, self.ours))


def _name_in(network: VelocityNetwork, layer: Any) -> str:
    everything = (*network.named_modules(), *network.named_parameters())
    return "" if layer is None else next(name for name, one in everything if one is layer)


def _vectors(sides: _Sides, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The weights of what makes vectors of labels, columns and the numbers of variants, and the constant."""
    some = next(iter(sides.old.values()))
    new, lost = {}, []
    theirs, ours = sides.names("label")
    table = sides.old[f"{theirs}.weight"] if theirs else None
    if ours:
        shape = (sides.now.num_classes + 1, sides.ours.condition_layers["label"].embedding_dim)
        new[f"{ours}.weight"] = some.new_zeros(shape) if table is None else _table(table, rows)
    elif table is not None:
        lost.append(table[-1])
    columns, nulls = _column_weights(sides)
    new, lost = new | columns, lost + nulls
    theirs, ours = sides.names("augmentation")
    if ours:
        layer = sides.ours.condition_layers["augmentation"]
        same = theirs and sides.before.augmentation == sides.now.augmentation
        new[f"{ours}.weight"] = sides.old[f"{theirs}.weight"] if same else some.new_zeros(layer.weight.shape)
    theirs, ours = sides.names("constant")
    if ours:
        constant = [sides.old[theirs]] if theirs else []
        new[ours] = torch.stack([*constant, *lost]).sum(0) if len(constant) + len(lost) > 1 else (constant + lost)[0]
    return new


def _table(table: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """A table of classes, each the mean of rows of another table, with the last row of that one."""
    means = [table[one[0]] if len(one) == 1 else table[list(one)].double().mean(0).to(table.dtype) for one in rows]
    return torch.stack([*means, table[-1]])


def _column_weights(sides: _Sides) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The weights of all named columns, and the null vectors of those of the source that are left out."""
    theirs, ours = sides.names("columns")
    places = {one.name: f"{theirs}.parts.{index}" for index, one in enumerate(sides.before.columns)}
    known, kept = {one.name: one for one in sides.before.columns}, {one.name for one in sides.now.columns}
    new: dict[str, Tensor] = {}
    embedding = sides.ours.condition_layers["columns"]
    for index, one in enumerate(sides.now.columns):
        part = embedding.parts[index]
        if one.name in known:
            weights = _known_column(sides.old, places[one.name], known[one.name], one)
        else:
            weights = _new_column(embedding, index, one)
        assert weights.keys() == {name for name, _ in part.named_parameters()}, one.name
        new |= {f"{ours}.parts.{index}.{name}": weight for name, weight in weights.items()}
    lost = [place for name, place in places.items() if name not in kept]
    return new, [_null_vector(sides.old, place) for place in lost]


def _known_column(
    old: Mapping[str, Tensor], place: str, before: ColumnCondition, now: ColumnCondition
) -> dict[str, Tensor]:
    """The weights of a column that the source has, of classes by their names; new ones begin with the mean."""
    weights = {name.removeprefix(f"{place}."): old[name] for name in old if name.startswith(f"{place}.")}
    if now.kind == "number":
        return weights
    index, everything = {name: row for row, name in enumerate(before.class_names)}, range(len(before.class_names))
    rows = [[index[name]] if name in index else list(everything) for name in now.class_names]
    return {"table": _table(weights["table"], rows)}


def _new_column(embedding: ColumnEmbedding, index: int, column: ColumnCondition) -> dict[str, Tensor]:
    """The weights of a column that the source does not have: its vectors are zero."""
    part = embedding.parts[index]
    weights = {name: torch.zeros(one.shape) for name, one in part.named_parameters()}
    if isinstance(part, NumberEmbedding):  # whose first layer must not be zero, or nothing would be learned
        fresh = NumberEmbedding(column.network_input, len(weights["unknown"]))
        fresh.reset_parameters()
        weights |= {f"linear1.{name}": one.detach() for name, one in fresh.linear1.named_parameters()}
    return weights


def _null_vector(old: Mapping[str, Tensor], place: str) -> Tensor:
    """What a column adds where nothing is known."""
    table = old.get(f"{place}.table")
    return old[f"{place}.unknown"] if table is None else table[-1]
