"""`latentflow convert`: a foreign checkpoint => a model folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from latentflow.artifacts import require_new
from latentflow.autoencoder import Autoencoder
from latentflow.convert.assemble import assemble
from latentflow.convert.families.dit import learns_sigma
from latentflow.convert.families.registry import require_family
from latentflow.convert.foreign_file import read_checkpoint
from latentflow.convert.published import class_names_of, published
from latentflow.convert.request import ConvertRequest
from latentflow.convert.selfcheck import SelfCheck, check_flow
from latentflow.errors import ArtifactError, ConfigError, DataError
from latentflow.locks import writes
from latentflow.model.flow_model import WEIGHTS_FILE, FlowModel
from latentflow.runtime import Runtime, open_runtime


@dataclass(frozen=True)
class ConvertResult:
    """A converted model.

    Attributes:
        model: the model that was written.
        num_parameters: of its network.
        part: the part of the file that held the weights; "" if it holds only weights.
        check: results of the probes; None if they were left out.
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
def convert(request: ConvertRequest, out: str | Path, *, runtime: Runtime | None = None) -> ConvertResult:
    """Turn published weights into a model folder. No code in the file is run.

    Args:
        out: a new folder.
        runtime: where the probes run; None: the default device.

    Raises:
        ArtifactError: the file is damaged, needs code to be read, or does not fit the network; or the result flows
            the wrong way.
        ConfigError: an unknown family, experiment or option, or an autoencoder that does not fit.
    """
    began = time.perf_counter()
    if (Path(out) / WEIGHTS_FILE).is_file():
        raise ArtifactError(f"{out} holds a finished model already; use it, delete it, or give a new folder")
    require_new(out)
    given = dict(_key_value(option) for option in request.options or ())
    named = _read_names(request.class_names)
    require_family(request.family)
    asked = {"experiment": request.experiment, "image_size": request.image_size}
    if request.experiment is not None:  # wrong names are reported before gigabytes are read
        published(request.family, given, **asked)
    autoencoder = Autoencoder.from_pretrained(request.autoencoder)
    file = read_checkpoint(request.checkpoint, encoder=request.encoder)
    found = {**file.options, "learn_sigma": learns_sigma(file.weights)}
    known = published(request.family, given, **asked, found=found, factor=autoencoder.factor)
    network = known.architecture.load(file.weights, file.origin)
    names = named or class_names_of(known.architecture)
    model = assemble(known, network, autoencoder, class_names=names).to(runtime or open_runtime(alone=True))
    num_classes = model.config.conditioning.num_classes
    labels = [0, num_classes - 1] if num_classes else None
    check = check_flow(model, labels) if request.check else None
    model.save_pretrained(out)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return ConvertResult(model, num_parameters, file.part, check, known.notes, time.perf_counter() - began)


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
