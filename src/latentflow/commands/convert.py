"""`latentflow convert`: a foreign checkpoint => a model folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from latentflow.artifacts import require_new
from latentflow.autoencoder import Autoencoder
from latentflow.convert.assemble import assemble
from latentflow.convert.families.dit import learns_sigma
from latentflow.convert.families.lfm import AUTOENCODER
from latentflow.convert.families.registry import require_family
from latentflow.convert.foreign_file import read_checkpoint
from latentflow.convert.published import class_names_of, published
from latentflow.convert.selfcheck import SelfCheck, check_flow
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.locks import writes
from latentflow.model.flow_model import WEIGHTS_FILE, FlowModel
from latentflow.runtime import Runtime, open_runtime


@dataclass(frozen=True)
class ConvertResult:
    """What `convert` did.

    Attributes:
        model: the model, as it was written.
        num_parameters: of its network.
        part: which part of the file the weights were, "" for a file of weights alone.
        check: what the probes found; None where they were left out.
        notes: what a user should know.
        seconds: wall time.
    """

    model: FlowModel
    num_parameters: int
    part: str
    check: SelfCheck | None
    notes: list[str]
    seconds: float


@writes("out")
def convert(
    family: str,
    checkpoint: str | Path,
    out: str | Path,
    *,
    experiment: str | None = None,
    options: Sequence[str] = (),
    autoencoder: str | Path = AUTOENCODER,
    image_size: int | None = None,
    class_names: str | Path | None = None,
    encoder: str | Path | None = None,
    check: bool = True,
    runtime: Runtime | None = None,
) -> ConvertResult:
    """Turn published weights into a model folder. Nothing in the file is ever run.

    Args:
        family: lfm, sit, dit or edm.
        checkpoint: .pth, .pt or .safetensors: a state_dict, or a training state that holds one.
        experiment: of LFM, by name.
        options: key=value, arguments of the published program; see `convert.published.published`.
        autoencoder: the first stage it was trained with.
        class_names: a text file of one name per line; None: ImageNet's for 1000 classes, else numbers.
        encoder: the file of LFM's encoder of semantic maps, where it stands apart.
        check: probe whether the result flows the right way.

    Raises:
        ArtifactError: the file is damaged, wants to run code, or does not fit the network; or the result flows wrongly.
        ConfigError: an unknown family, experiment or option, or an autoencoder that does not fit.
    """
    began = time.perf_counter()
    if (Path(out) / WEIGHTS_FILE).is_file():
        raise ArtifactError(f"{out} holds a finished model already; use it, delete it, or give a new folder")
    require_new(out)
    given = dict(_key_value(option) for option in options)
    named = _read_names(class_names)
    require_family(family)
    if experiment is not None:  # what is wrong with names is told before gigabytes are read
        published(family, given, experiment=experiment, image_size=image_size)
    first_stage = Autoencoder.from_pretrained(autoencoder)
    file = read_checkpoint(checkpoint, encoder=encoder)
    found = {**file.options, "learn_sigma": learns_sigma(file.weights)}
    known = published(
        family, given, experiment=experiment, found=found, image_size=image_size, factor=first_stage.factor
    )
    network = known.architecture.load(file.weights, file.origin)
    names = named or class_names_of(known.architecture)
    model = assemble(known, network, first_stage, class_names=names).to(runtime or open_runtime(alone=True))
    num_classes = model.config.conditioning.num_classes
    labels = [0, num_classes - 1] if num_classes else None
    checked = check_flow(model, labels) if check else None
    model.save_pretrained(out)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return ConvertResult(model, num_parameters, file.part, checked, known.notes, time.perf_counter() - began)


def _key_value(option: str) -> tuple[str, Any]:
    key, equals, text = option.partition("=")
    if not equals or not key:
        raise ConfigError(f"{option!r} is not of the form key=value, for example num_classes=1000")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option!r}: the value is not valid YAML") from error


def _read_names(file: str | Path | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the class names in {file}: {error}") from error
