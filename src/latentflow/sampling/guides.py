"""Guides: other models whose velocity takes the place of the null velocity, v = v_guide + s (v - v_guide).

Autoguidance (arXiv 2406.02507) guides a model away from a worse version of itself: an earlier snapshot of its run, or a
smaller model. It needs no condition, so it is the guidance of models without labels. Domain guidance (arXiv 2504.01521)
guides a fine-tuned model away from the model that it was tuned from.

A guide gets the conditions of the model as far as it has the same ones, and null conditions for the rest:

    label           if it was trained on all classes that the model was trained on, by their names
    inpainting      if masks enter both in the same form
    semantic_map    if the classes of the maps are the same, in the same order
    input           if it is made in the same way and has as many channels
    NAME            a named column: if it was trained on one of that name and kind, with the same classes

So an earlier snapshot sees the same conditions, and a model of other classes, as before fine-tuning, is unconditional.
`guided_by` names conditions that the guide does not get in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentflow.columns import places_of
from latentflow.model.conditioning import ColumnCondition, Conditioning, ConditionName
from latentflow.model.config import ModelConfig
from latentflow.model.flow_model import FlowModel, config_of
from latentflow.model.guide_reference import GuideReference
from latentflow.model.snapshots import CHECKPOINTS, run_of, split_snapshot
from latentflow.requests import RequestError
from latentflow.sampling.call_cost import relative_cost
from latentflow.shapes import Condition, send
from latentflow.sizes import Size
from latentflow.weights import LOADING

HASH_DIGITS = 12
"""Of the hash of a guide's weights, in records."""


@dataclass(frozen=True)
class OpenedGuide:
    """A guide of a model.

    Attributes:
        name: as it was asked for.
        flow: the guide, with the autoencoder of the model.
        cost: of one of its calls, in calls of the model; see `latentflow.sampling.call_cost`.
    """

    name: str
    flow: FlowModel
    cost: float

    @property
    def reference(self) -> GuideReference:
        """Its name and weights, as a picture records them."""
        return GuideReference(model=self.name, weights=self.flow.weights_hash[:HASH_DIGITS])


def open_guide(model: FlowModel, wanted: GuideReference) -> OpenedGuide:
    """The guide of a model, loaded at its first use and kept with the model.

    Raises:
        RequestError: its latents are others than the model's, or its weights others than wanted.
        ArtifactError: there is no such model.
    """
    with LOADING:  # two threads that draw share one
        opened = model.guides.get(wanted.model)
        if opened is None or opened.flow.device != model.device:
            name = _full_name(model, wanted.model)
            config = config_of(name)
            require_same_latents(model.config, config, wanted.model)
            flow = FlowModel.from_pretrained(name, runtime=model.runtime, autoencoder=model.autoencoder)
            opened = OpenedGuide(wanted.model, flow, relative_cost(config, model.config))
            model.guides[wanted.model] = opened
    found = opened.reference.weights
    if wanted.weights and wanted.weights != found:
        reason = f" {wanted.model} has the weights {found}, not {wanted.weights} as recorded; give the guide of then"
        raise RequestError("guide", reason)
    return opened


def _full_name(model: FlowModel, name: str) -> str:
    """The name of a guide; "@1/8" is a snapshot of the run that the model comes from."""
    if not name.startswith("@"):
        return name
    named = split_snapshot(model.reference)
    run = run_of(named[0] if named else model.reference)
    if model.reference and (run / CHECKPOINTS).is_dir():
        return f"{run}{name}"
    whose = f"{model.reference} is no run folder" if model.reference else "the model was not loaded from a run folder"
    raise RequestError("guide", f" {name}: {whose}, so it has no snapshots; give the whole name: RUN{name}")


def require_same_latents(config: ModelConfig, guide: ModelConfig, name: str) -> None:
    """Refuse a guide whose velocity is of other latents than the model's, so that they cannot be mixed.

    Raises:
        RequestError: autoencoder, latent size, normalisation or path differ; with both.
    """
    pairs = {
        "autoencoder": [one.autoencoder.content_hash[:12] for one in (guide, config)],
        "latent size": [" x ".join(map(str, one.latent_shape)) for one in (guide, config)],
        "latent normalisation": [str(one.normalisation) for one in (guide, config)],
        "path": [str(one.path) if guide.path.kind == config.path.kind else one.path.kind for one in (guide, config)],
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            reason = f" {name} has another {what} ({theirs}) than the model ({ours}), so their velocities do not mix"
            raise RequestError("guide", f"{reason}; give a guide for the same latents")


def check_guide(
    model: FlowModel,
    guide: OpenedGuide,
    given: Sequence[ConditionName],
    guided_by: Sequence[ConditionName] | None,
    image_size: Size | None = None,
) -> None:
    """Refuse a guide that cannot draw these pictures, or that changes nothing.

    Args:
        given: the conditions that the model gets.
        guided_by: those that the guide does not get.

    Raises:
        RequestError: with the reason.
    """
    config, shared = guide.flow.config, shared_conditions(model, guide, given, guided_by)
    for name in config.conditioning.required:
        if name not in shared:
            why = "is not given" if name not in given else "is not that of the model"
            why = "is left out by guided_by" if name in (guided_by or ()) else why
            raise RequestError("guide", f" {guide.name} requires the condition {name}, which {why}; give another guide")
    multiple = config.pixel_multiple
    if image_size is not None and not image_size.is_multiple_of(multiple):
        reason = f" {guide.name} draws sides that are multiples of {multiple} pixels, not {image_size.words}"
        raise RequestError("guide", f"{reason}; give another guide, or another size")
    if list(given) == shared and guide.flow.weights_hash == model.weights_hash:
        reason = f" {guide.name} is the model itself under the same conditions, so guidance has nothing to act on"
        less = f", or take a condition from the guide (--guided-by {given[0]})" if given else ""
        raise RequestError("guide", f"{reason}; give an earlier snapshot or another model{less}")


def shared_conditions(
    model: FlowModel, guide: OpenedGuide, given: Sequence[ConditionName], guided_by: Sequence[ConditionName] | None
) -> list[ConditionName]:
    """The conditions that the guide gets, of those that the model gets."""
    ours, theirs = model.config, guide.flow.config
    same = {
        "label": {*_seen_names(ours)} <= {*_seen_names(theirs)},
        "inpainting": _mask_form(ours) == _mask_form(theirs),
        "semantic_map": ours.conditioning.map_class_names == theirs.conditioning.map_class_names,
        "input": (ours.inputs, ours.input_format) == (theirs.inputs, theirs.input_format),
        **{one.name: _same_column(one, theirs.conditioning) for one in ours.conditioning.columns},
    }
    kinds = theirs.conditioning.kinds
    return [name for name in given if name in kinds and same[name] and name not in (guided_by or ())]


def guide_condition(
    model: FlowModel,
    guide: OpenedGuide,
    shared: Sequence[ConditionName],
    labels: Sequence[int],
    others: Mapping[str, Tensor | None],
    latents_shape: Sequence[int],
) -> Condition:
    """The condition of a guide's images.

    Args:
        shared: the conditions that it gets.
        labels: of the model, one per image, or none.
        others: the other fields of the model's condition.
        latents_shape: [B, C, h, w].
    """
    kinds, conditioning = guide.flow.config.conditioning.kinds, guide.flow.config.conditioning
    named = {"label", *(one.name for one in conditioning.columns)}
    fields: dict[str, Tensor | None] = {
        field: others.get(field) for name in shared if name not in named for field in kinds[name].fields
    }
    fields["columns"] = _columns_for(model.config.conditioning, conditioning, shared, others.get("columns"))
    if labels and "label" in shared:
        names = model.config.conditioning.class_names
        place = {name: index for index, name in enumerate(conditioning.class_names)}
        fields["labels"] = send(torch.tensor([place[names[label]] for label in labels]), guide.flow.device)
    return conditioning.build(latents_shape, guide.flow.device, Condition(**fields))


def _same_column(column: ColumnCondition, theirs: Conditioning) -> bool:
    """Whether a guide has the column, with values of the same meaning."""
    return any(one.column == column.column for one in theirs.columns)


def _columns_for(
    ours: Conditioning, theirs: Conditioning, shared: Sequence[ConditionName], columns: Tensor | None
) -> Tensor | None:
    """The columns of a model's images in the order of its guide, null where they are not shared."""
    places = dict(zip([one.name for one in ours.columns], places_of([c.column.row for c in ours.columns]), strict=True))
    if columns is None or not any(one.name in shared for one in theirs.columns):
        return None
    nothing = theirs.build((len(columns), 1, 1, 1), columns.device).columns
    own = places_of([one.column.row for one in theirs.columns])
    parts = [
        columns[:, places[one.name]] if one.name in shared else nothing[:, place]
        for one, place in zip(theirs.columns, own, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _seen_names(config: ModelConfig) -> list[str]:
    return [config.conditioning.class_names[label] for label in config.seen_classes]


def _mask_form(config: ModelConfig) -> str:
    return config.masks.told_as if config.masks else "share"
