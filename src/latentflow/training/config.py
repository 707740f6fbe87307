"""One training run, completely described: the recipe.

A recipe is YAML; unknown keys are refused with the nearest valid one named; `key=value` overrides reach
any depth (`training.batch_size=64`). The resolved recipe is printed and saved in the run folder.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentflow.errors import ConfigError, nearest
from latentflow.flow.path import LinearPath, PathConfig
from latentflow.flow.times import TrainingTimes
from latentflow.latent_flow import SamplingPreset
from latentflow.networks.dit import DiTConfig
from latentflow.training.optim import OptimizerConfig

RECIPES = Path(__file__).parent.parent / "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """Where the images come from."""

    path: str = Field("", description="A latent cache, a folder or zip of images, or 'synthetic:COUNT'.")
    image_size: int = Field(256, ge=1, description="Side of the square images in pixels; a cache must agree.")
    flip: bool = Field(True, description="Mirror images at random; a cache must hold the mirrored images.")
    labels: bool = Field(True, description="Use class sub-folders as labels; false: train unconditionally.")
    num_workers: int = Field(0, ge=0, description="Processes that read images; 0 is right for a latent cache.")


class ConditioningConfig(_Section):
    """What of the condition is dropped in training."""

    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of labels replaced by the null label; 0: no guidance."
    )


class TrainingConfig(_Section):
    """How long, how fast, and how carefully."""

    steps: int = Field(100_000, ge=1, description="Optimizer steps.")
    batch_size: int = Field(64, ge=1, description="Images per optimizer step, over all processes.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Images per forward pass of a process; null: no accumulation."
    )
    seed: int = Field(0, description="Of weights, data order and every random number.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on CUDA that has it, else fp32."
    )
    compile: bool = Field(False, description="torch.compile the network.")
    ema_decay: float = Field(
        0.9999, ge=0, lt=1, description="Of the moving average that is sampled from; 0: no averaging."
    )
    log_every: int = Field(50, ge=1, description="Steps between lines of metrics.jsonl.")
    checkpoint_every: int = Field(1000, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="How many of the newest checkpoints stay.")
    preview_every: int = Field(1000, ge=0, description="Steps between preview grids; 0: none.")


class Recipe(_Section):
    """Everything `latentflow train` needs to know."""

    description: str = Field("", description="One line, shown by `latentflow recipes`.")
    out: str = Field("", description="The run folder; empty: runs/NAME of the recipe.")
    data: DataConfig = DataConfig()
    autoencoder: str = Field(
        "stabilityai/sd-vae-ft-mse", description="A folder, a hub id, or 'shapes', the built-in one."
    )
    normalise: Literal["autoencoder", "per_channel"] = Field(
        "autoencoder",
        description="Latent scaling: as the autoencoder's config says, or to zero mean and unit variance per channel.",
    )
    network: DiTConfig = DiTConfig(name="DiT-S/2")
    path: PathConfig = LinearPath()
    times: TrainingTimes = TrainingTimes()
    conditioning: ConditioningConfig = ConditioningConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingPreset = SamplingPreset()

    def to_yaml(self) -> str:
        """The recipe as YAML that `load_recipe` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


MAY_CHANGE_ON_RESUME = (
    "description",
    "out",
    "data.path",
    "data.num_workers",
    "autoencoder",
    "training.steps",
    "training.micro_batch_size",
    "training.compile",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.preview_every",
    "sampling",
)
"""Keys that do not alter what is computed (the data and autoencoder themselves are compared by content)."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def load_recipe(name_or_file: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A named recipe or a YAML file, with `key=value` overrides applied.

    Raises:
        ConfigError: no such recipe; a key or value that does not exist or fit (the nearest key is named).
    """
    file = Path(name_or_file)
    if str(name_or_file) in recipe_names():
        file = RECIPES / f"{name_or_file}.yaml"
    elif not file.is_file():
        raise ConfigError(
            f"no recipe {str(name_or_file)!r}, neither by that name nor as a file; {nearest(name_or_file, recipe_names())}"
        )
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping of recipe keys, not a {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return parse_recipe(values, origin=str(name_or_file))


def parse_recipe(values: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Check nested values against the recipe's schema.

    Raises:
        ConfigError: one line with the key, the value and the remedy.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            siblings = _keys_beside(values, where)
            raise ConfigError(f"{origin}: unknown key {'.'.join(where)!r}; {nearest(where[-1], siblings)}") from error
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{origin}: {'.'.join(where)} = {first['input']!r}: {message}") from error


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The keys in which two recipes differ and which alter what is computed, as "key: old, now new"."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
    fixed = [k for k in keys if not any(k == free or k.startswith(f"{free}.") for free in MAY_CHANGE_ON_RESUME)]
    return [f"{key}: {before.get(key)!r}, now {after.get(key)!r}" for key in sorted(fixed)]


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in nested mappings; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, for example training.batch_size=64")
    *path, last = key.strip().split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value and has no keys of its own")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error


def _keys_beside(values: dict[str, Any], where: list[str]) -> list[str]:
    """The valid keys of the section in which `where` was not found."""
    section: Any = Recipe
    for part in where[:-1]:
        if isinstance(section, type) and part in section.model_fields:
            section = _section_types(section.model_fields[part].annotation)
        elif not isinstance(section, type):  # a union of kinds: `part` is the kind that was chosen
            section = next(c for c in section if c.model_fields["kind"].default == part)
    return list(section.model_fields) if isinstance(section, type) else []


def _section_types(annotation: Any) -> Any:
    """The model class of an annotation, or the classes of a union of them."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return annotation


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
