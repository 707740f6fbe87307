"""A run that begins with the weights of another model, `init_from`: what it takes from it, and what it trains.

The rules, and where they come from:

    method     Below 500 images lora, else full: few images move all weights of a large network away from what it knows.
    steps      24,000 of 32 images, as domain guidance finetunes DiT-XL/2 to small sets (arXiv 2504.01521); at most 30
               per image, but at least 1,000, as in `fitting`: more would memorise the images.
    rate       1e-4 for all weights, 2e-4 for lora and 1e-3 for biases, which are few; 500 steps of warm-up.
    average    over about 10,000 steps, over 1,000 in runs of at most 10,000 steps.
    sampling   as the source is sampled, as far as the new model can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentflow.artifacts import sha256_tensors
from latentflow.autoencoder import Autoencoder
from latentflow.errors import ConfigError
from latentflow.flow.solvers import fitted_evaluations
from latentflow.model.adapter import AdapterBase
from latentflow.model.adapter_name import split_adapted
from latentflow.model.conditioning import Conditioning
from latentflow.model.config import AUTOENCODER_FOLDER, ModelConfig, SamplingPreset
from latentflow.model.flow_model import FlowModel, StoredModel, find_model, read_stored
from latentflow.model.surgery import graft, grafted_config
from latentflow.networks.dit import DiTConfig
from latentflow.networks.low_rank import add_low_rank
from latentflow.networks.unet import UNetConfig
from latentflow.randomness import derive_seed
from latentflow.training.changes import RECIPE_FILE, trained_steps
from latentflow.training.config import FinetuningConfig, Recipe
from latentflow.training.fitting import (
    Situation,
    is_set,
    power_of_two,
    share_of,
    steps_by_images,
    value_of,
    why_steps,
    with_values,
)
from latentflow.training.memory import bytes_per_image, micro_batch_that_fits, network_in_training, state_bytes
from latentflow.training.settings import load_settings
from latentflow.weights import filled

FEW_IMAGES = 500
RANK = 16
HASH_DIGITS = 12

_RATES = {"full": 1e-4, "lora": 2e-4, "biases": 1e-3}
_STEPS, _BATCH, _WARM_UP = 24_000, 32, 500
_CONDITIONS = ("inpainting", "semantic_map", "input")
_INHERITED = ("label_dropout", "inpainting_dropout", "map_dropout", "input_dropout")


@dataclass(frozen=True)
class Source:
    """The model that a run begins with.

    Attributes:
        name: as it was asked for.
        stored: what is there.
    """

    name: str
    stored: StoredModel

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.stored.config

    @cached_property
    def weights_hash(self) -> str:
        """The SHA-256 of its weights."""
        return sha256_tensors(self.stored.weights)

    @property
    def hash(self) -> str:
        """The first digits of it."""
        return self.weights_hash[:HASH_DIGITS]

    @property
    def autoencoder(self) -> str:
        """The reference of its autoencoder."""
        reference = self.config.autoencoder.reference
        return str(self.stored.folder / AUTOENCODER_FOLDER) if reference == AUTOENCODER_FOLDER else reference

    def require_autoencoder(self, reference: str, content_hash: str, path: str) -> None:
        """Refuse data of other latents than the model's.

        Args:
            reference, content_hash: of the autoencoder of the data.

        Raises:
            ConfigError: with both hashes, and which autoencoder would be right.
        """
        theirs = self.config.autoencoder.content_hash
        if content_hash != theirs:
            raise ConfigError(
                f"{path} is for the autoencoder {reference} (hash {content_hash[:HASH_DIGITS]}), but init_from = "
                f"{self.name} was trained with {self.config.autoencoder.reference} (hash {theirs[:HASH_DIGITS]}); "
                f"encode the images with --autoencoder {self.autoencoder}"
            )


def open_source_model(recipe: Recipe) -> Source | None:
    """The model of `init_from`; None: the recipe has none.

    Raises:
        ArtifactError: there is no such model, or it is damaged.
        ConfigError: the recipe needs one, or it is one that cannot be finetuned.
    """
    if not recipe.init_from:
        if recipe.normalise == "source":
            raise ConfigError("init_from is not set, the model to begin with; add init_from=MODEL")
        return None
    named = split_adapted(recipe.init_from)
    stored = read_stored(find_model(named.model if named else recipe.init_from), named)
    require_finetunable(stored.config, recipe.init_from)
    return Source(recipe.init_from, stored)


def require_finetunable(config: ModelConfig, name: str) -> None:
    """Refuse a model whose weights have no place in a network that a recipe trains.

    Raises:
        ConfigError: it is a student, or has a network of one's own.
    """
    if config.student is not None:
        raise ConfigError(
            f"init_from = {name} is a student of {config.student.teacher}, which draws in jumps; finetune that "
            "model, and distil the result"
        )
    if not isinstance(config.network, DiTConfig | UNetConfig):
        raise ConfigError(
            f"init_from = {name} has a network of its own kind, {config.network.title}, which recipes do not train; "
            "give a model with a DiT or a U-Net"
        )


def with_source(recipe: Recipe, source: Source, run: Path | None) -> Recipe:
    """A recipe in which the source decides what it has to, and what is not set.

    Args:
        run: the run folder, if there is one; a run that has begun goes on with the weights and the method that it
            began with.

    Raises:
        ConfigError: the recipe sets something that the source does not allow.
    """
    config = source.config
    recipe = _with_network(recipe, source)
    _require_same(recipe, source, "path", config.path)
    _require_scale(recipe, source)
    values: dict[str, Any] = {"path": config.path, "normalise": "source"}
    open_values = {f"conditioning.{name}": value for name, value in _conditions(config).items()}
    open_values |= {"data.image_size": config.image_size, "autoencoder": source.autoencoder}
    values |= {key: value for key, value in open_values.items() if not is_set(recipe, key)}
    recipe = with_values(recipe, values)
    return _as_finetuned(recipe, source, run)


def _with_network(recipe: Recipe, source: Source) -> Recipe:
    """The recipe with the network of the source; a U-Net may have another dropout."""
    own, given = source.config.network, recipe.network
    if not is_set(recipe, "network"):
        return with_values(recipe, {"network": own})
    if _shape_of(given) != _shape_of(own):
        raise ConfigError(
            f"network is a {given.title}, but init_from = {source.name} has a {own.title}; leave network out, or use "
            "the recipe finetune"
        )
    dropout = {"dropout": given.dropout} if isinstance(given, UNetConfig) else {}
    return with_values(recipe, {"network": own.model_copy(update=dropout)})


def _shape_of(network: DiTConfig | UNetConfig) -> dict[str, Any]:
    return network.model_dump(exclude={"name", "variant", "dropout"})


def _require_same(recipe: Recipe, source: Source, key: str, theirs: Any) -> None:
    ours = value_of(recipe, key)
    if is_set(recipe, key) and ours != theirs:
        raise ConfigError(
            f"{key} = {ours!r}, but init_from = {source.name} was trained with {theirs!r}; leave {key} out of "
            "the recipe"
        )


def _require_scale(recipe: Recipe, source: Source) -> None:
    """Refuse another scale of the latents than the source's."""
    if is_set(recipe, "normalise") and recipe.normalise != "source":
        raise ConfigError(
            f"normalise = {recipe.normalise}, but init_from = {source.name} was trained on latents of its own scale; "
            "use normalise=source, or leave it out"
        )


def _conditions(config: ModelConfig) -> dict[str, Any]:
    """Keys of a recipe's `conditioning` as the source has them."""
    conditioning = config.conditioning
    has = dict(zip(_CONDITIONS, (conditioning.inpainting, conditioning.num_map_classes, config.inputs), strict=True))
    return {**{name: bool(one) for name, one in has.items()}, **{n: getattr(conditioning, n) for n in _INHERITED}}


def _as_finetuned(recipe: Recipe, source: Source, run: Path | None) -> Recipe:
    """The recipe with the hash of the source's weights, and what its run began with where it has begun."""
    own = recipe.finetuning
    if run is not None and trained_steps(run) is not None:
        begun = load_settings(Recipe, run / RECIPE_FILE).finetuning
        own = own.model_copy(
            update={
                "method": begun.method if own.method == "auto" else own.method,
                "rank": begun.rank if own.rank is None and own.method in ("auto", begun.method) else own.rank,
                "weights": own.weights or begun.weights,
            }
        )
    if own.weights not in ("", source.hash):
        raise ConfigError(
            f"init_from = {source.name} has the weights {source.hash}, but the run began with {own.weights}; restore "
            "that model, or choose another out"
        )
    return with_values(recipe, {"finetuning": own.model_copy(update={"weights": source.hash})})


def with_method(recipe: Recipe, num_images: int) -> Recipe:
    """The recipe with its method decided.

    Raises:
        ConfigError: a method cannot be had with other keys of the recipe.
    """
    own = recipe.finetuning
    method = own.method
    if method == "auto":
        method = "lora" if own.rank is not None or num_images < FEW_IMAGES else "full"
    if method != "full" and recipe.training.ema_lengths is not None:
        raise ConfigError(
            f"training.ema_lengths goes with finetuning.method = full, not with {method}: averages of other lengths "
            "hold only the weights that are trained; leave it out"
        )
    if method != "full" and recipe.optimizer.kind == "muon":
        raise ConfigError(
            f"optimizer.kind = muon goes with finetuning.method = full, not with {method}: it is for whole matrices; "
            "use adamw"
        )
    rank = (own.rank or RANK) if method == "lora" else None
    return with_values(recipe, {"finetuning": FinetuningConfig(**{**own.model_dump(), "method": method, "rank": rank})})


FITTED_TO_SOURCE = (
    "training.steps",
    "training.batch_size",
    "training.micro_batch_size",
    "training.ema_decay",
    "training.checkpoint_every",
    "training.preview_every",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
)
"""Keys that are decided by the source and by the number of images if a recipe leaves them open."""


def fit_to_source(recipe: Recipe, situation: Situation, num_parameters: int) -> tuple[Recipe, list[str]]:
    """The recipe with steps, batch size and rate decided, and a line that explains it.

    Args:
        recipe: with the network of its source, and its method decided.
        num_parameters: of the network.
    """
    method = recipe.finetuning.method
    num_images, half, processes = situation.num_images, situation.gpu, situation.num_processes
    share = share_of(recipe, power_of_two(min(_BATCH, max(num_images, 1))), processes)
    steps = recipe.training.steps if is_set(recipe, "training.steps") else steps_by_images(num_images, _STEPS)
    per_image = bytes_per_image(recipe.network, situation.size, half=half)
    state = state_bytes(num_parameters, half=half, trained=num_parameters if method == "full" else 0)
    micro = micro_batch_that_fits(state, per_image, share, situation.memory)
    every = max(min(1000, steps // 5), 1)
    fitted = {
        "training.steps": steps,
        "training.batch_size": share * processes,
        "training.micro_batch_size": micro if 0 < micro < share else None,
        "training.ema_decay": 0.9999 if steps > 10_000 else 0.999,
        "training.checkpoint_every": every,
        "training.preview_every": every,
        "optimizer.learning_rate": _RATES[method],
        "optimizer.warmup_steps": min(_WARM_UP, steps // 10),
    }
    open_keys = [key for key in FITTED_TO_SOURCE if not is_set(recipe, key)]
    done = with_values(recipe, {"fit": False, **{key: fitted[key] for key in open_keys}})
    lines = [f"method: {method}, for {num_images:,} images"]
    if "training.steps" in open_keys:
        lines.append(why_steps(steps, _STEPS, "usual for finetuning"))
    return done, lines


def with_preset(recipe: Recipe, source: ModelConfig, conditioning: Conditioning) -> Recipe:
    """The recipe with the sampling preset of the source where it sets nothing, as far as the new conditions allow it.

    What belongs to the source alone is left: a guide with the scale that was chosen for it, a solver that was fitted to
    its weights, and conditions to guide by that the model does not have.
    """
    given, preset = recipe.sampling, source.sampling
    left = {"guide", *(("guidance", "guided_by") if preset.guide is not None else ())}
    left |= {"solver", "steps", "shift"} if fitted_evaluations(preset.solver) is not None else set()
    left |= given.model_fields_set
    theirs = {name: getattr(preset, name) for name in SamplingPreset.model_fields if name not in left}
    if not set(theirs.get("guided_by") or ()) <= set(conditioning.can_guide):
        theirs["guided_by"] = None
    if not conditioning.can_guide and "guidance" in theirs:
        theirs["guidance"] = 1.0
    return with_values(recipe, {"sampling": given.model_copy(update=theirs)})


def finetuned_config(config: ModelConfig, source: Source) -> ModelConfig:
    """The config of a model that begins with the weights of a source.

    Args:
        config: of a new model with the network and the path of the source.

    Raises:
        ConfigError: see `grafted_config`.
    """
    origin = {"source": source.name, "source_weights": source.hash}
    training = config.training.model_copy(update=origin)
    return grafted_config(source.config, config.model_copy(update={"training": training}))


def finetuned(config: ModelConfig, source: Source, recipe: Recipe, autoencoder: Autoencoder) -> FlowModel:
    """The model that a finetuning run begins with; what its method does not train is frozen.

    Args:
        config: from `finetuned_config`.

    Raises:
        ConfigError: see `graft`.
    """
    torch.manual_seed(derive_seed(recipe.training.seed, "weights"))
    grafted = graft(source.config, source.stored.weights, config, recipe.finetuning.former_classes)
    network = filled(config.build_network, grafted.weights, source.name)
    choose_trained(network, recipe.finetuning, grafted.made, recipe.training.seed)
    model = FlowModel(config, network, autoencoder)
    if recipe.finetuning.method == "lora":
        start = {name: grafted.weights[name].clone() for name in grafted.made}
        model.adapted_from = AdapterBase(reference=source.name, weights=source.weights_hash, start=start)
    return model


def choose_trained(network: nn.Module, finetuning: FinetuningConfig, made: frozenset[str], seed: int) -> None:
    """Freeze what a method does not train, in place; with lora the network gets factors.

    Args:
        made: names of parameters that are new, which every method trains.
    """
    if finetuning.method == "full":
        return
    learned = [name for name, _ in network.named_parameters() if name in made]
    if finetuning.method == "lora":
        assert finetuning.rank is not None
        add_low_rank(network, finetuning.rank, seed=derive_seed(seed, "low rank"), also=learned)
        return
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in made or name.rpartition(".")[2] == "bias")


def count_trained(config: ModelConfig, finetuning: FinetuningConfig) -> int | None:
    """How many numbers a method trains, without those of new classes and conditions; None: all."""
    if finetuning.method in ("auto", "full"):
        return None
    network = network_in_training(config)
    choose_trained(network, finetuning, frozenset(), 0)
    return trained_share(network)[0]


def trained_share(network: nn.Module) -> tuple[int, int]:
    """How many numbers of a network are trained, and how many there are."""
    sizes: Mapping[bool, list[int]] = {True: [], False: []}
    for parameter in network.parameters():
        sizes[parameter.requires_grad].append(parameter.numel())
    trained = sum(sizes[True])
    return trained, trained + sum(sizes[False])
