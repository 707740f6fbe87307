"""Export a model as ONNX files, which other programs run without torch.

    velocity.onnx    the velocity network: latents, time and conditions => velocity
    decoder.onnx     latents of the flow => pixels in [-1, 1]
    encoder.onnx     pixels in [-1, 1] => latents of the flow, where a condition needs them
    onnx.json        inputs and outputs, path, latent normalisation, sampling preset, class names, null values
    README.md        a model card with a program that samples images and needs only numpy, Pillow and onnxruntime

All files compute in float32, take any number of images, and are compared with torch before the folder is there. A
model that was trained on several image sizes has them as free dimensions.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentflow.artifacts import atomic_folder, require_new, write_json, write_text
from latentflow.convert.exported import LIMIT, Exported, largest_error, random_inputs, require_no_student
from latentflow.convert.onnx.onnx_description import folder_facts
from latentflow.convert.onnx.traced import GIVEN, DecoderGraph, EncoderGraph, VelocityGraph
from latentflow.data.painting.latent_size import HOLE_GRAY
from latentflow.errors import ArtifactError, ConfigError
from latentflow.model.card import render_card
from latentflow.model.config import ModelConfig
from latentflow.model.flow_model import FlowModel

if TYPE_CHECKING:
    import onnxruntime

OPSET = 20
_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
_TRACED, _COMPARED = 3, (1, 2, 5)
"""Images in the batch that is traced, and in the batches that are compared: other ones, one image among them."""
_MOST_ROWS = 1 << 14


@dataclass(frozen=True)
class _File:
    """A file to write: its module, what it is traced with, the names of its tensors, and which axes are free.

    Attributes:
        example: positional arguments of the module; the last may be a list.
        free: for each tensor of `example`, its free dimensions by axis.
    """

    name: str
    module: nn.Module
    example: tuple[Any, ...]
    free: tuple[Any, ...]
    inputs: list[str]
    output: str


def onnx_network(config: ModelConfig) -> None:
    """Refuse a model that ONNX files cannot hold, and a machine without the libraries.

    Raises:
        ArtifactError: naming what it is.
        ConfigError: with the command that installs the libraries.
    """
    require_no_student(config, "ONNX")
    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        raise ConfigError(f"--format onnx needs {', '.join(missing)}: pip install 'latentflow[onnx]'")


@torch.no_grad()
def export_onnx(model: FlowModel, folder: str | Path, *, only: Sequence[str] = ()) -> Exported:
    """Write a model as ONNX files, after comparing them with torch.

    Args:
        folder: new or empty.
        only: the files to write: velocity, decoder, encoder; none: all that the model needs.

    Raises:
        ArtifactError: the folder is not empty, torch cannot express the model in ONNX, or onnxruntime computes
            something else. Nothing is written.
        ConfigError: a library is missing.
    """
    folder = require_new(folder)
    onnx_network(model.config)
    errors: dict[str, float] = {}
    with atomic_folder(folder) as temporary:
        files = [file for file in _files(model) if not only or file.name in only]
        for file in files:
            _write(file, temporary / f"{file.name}.onnx")
            errors[file.name] = _compared(model, file, temporary / f"{file.name}.onnx")
        names = [file.name for file in files]
        write_json(temporary / "onnx.json", folder_facts(model, names, errors, OPSET))
        write_text(temporary / "README.md", _readme(model.config, names))
    return Exported(folder, {name: f"{name}.onnx" for name in names}, max(errors.values()))


def _files(model: FlowModel) -> list[_File]:
    """The files of a model: an encoder only where a condition is made of latents."""
    config = model.config
    latents, time, condition = random_inputs(config, _TRACED)
    names = [name for name in GIVEN if getattr(condition, name) is not None]
    given = [getattr(condition, name) for name in names]
    batch, images = {0: torch.export.Dim("batch", min=1)}, _free_sides(config)
    spatial = {**batch, **images[0]}
    free = (spatial, batch, [spatial if value.dim() == 4 else batch for value in given])
    network = VelocityGraph(config, model.network, names)
    files = [
        _File("velocity", network, (latents, time, given), free, ["latents", "time", *names], "velocity"),
        _File("decoder", DecoderGraph(config, model.autoencoder), (latents,), (spatial,), ["latents"], "pixels"),
    ]
    if config.conditioning.inpainting or (config.inputs is not None and config.inputs.form == "latents"):
        pixels = _pixels(model, latents)
        module, free_pixels = EncoderGraph(config, model.autoencoder), ({**batch, **images[1]},)
        files.append(_File("encoder", module, (pixels,), free_pixels, ["pixels"], "latents"))
    return files


def _free_sides(config: ModelConfig) -> tuple[dict[int, Any], dict[int, Any]]:
    """Free axes of latents and of pixels: none, unless the model was trained on several sizes."""
    if len(config.sizes) == 1:
        return {}, {}
    rows, columns = (torch.export.Dim(name, min=1, max=_MOST_ROWS) for name in ("rows", "columns"))
    multiple, factor = config.network.size_multiple, config.pixel_multiple
    latents = {2: rows, 3: columns} if multiple == 1 else {2: multiple * rows, 3: multiple * columns}
    return latents, {2: factor * rows, 3: factor * columns}


def _pixels(model: FlowModel, latents: Tensor) -> Tensor:
    """Images of the size of latents: what the decoder makes of them."""
    return model.autoencoder.decode(model.config.normalisation.restore(latents))


def _write(file: _File, path: Path) -> None:
    """Trace a module and write it, without the paths of this machine.

    Raises:
        ArtifactError: ONNX lacks one of its operations.
    """
    from torch.onnx import OnnxExporterError

    try:
        with _quiet():
            program = torch.onnx.export(
                *(file.module, file.example),
                input_names=file.inputs,
                output_names=[file.output],
                dynamic_shapes=file.free,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except OnnxExporterError as error:
        reasons = [line.strip() for line in f"{error.__cause__ or error}".splitlines() if line.strip()]
        raise ArtifactError(
            f"the {file.name} of this model cannot be exported to ONNX: {' '.join(reasons[:1])[:300]}"
        ) from error
    for node in program.model.graph.all_nodes():  # where in which file each operation was called
        node.metadata_props.clear()
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        value.metadata_props.clear()
    program.model.metadata_props.clear()
    program.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on libraries that are not there and on its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _compared(model: FlowModel, file: _File, path: Path) -> float:
    """The largest relative error of a file: one image, several, and every size of the model.

    Raises:
        ArtifactError: it is more than rounding explains, or onnxruntime cannot run the file.
    """
    session = opened(path)
    sizes = [size.over(model.config.autoencoder.factor) for size in model.config.sizes]
    pairs = []
    for turn, num_images in enumerate(_COMPARED):
        for sides in sizes:
            latents, time, condition = random_inputs(model.config, num_images, seed=turn, sides=tuple(sides))
            given = [getattr(condition, name) for name in file.inputs[2:]]
            values = {"velocity": (latents, time, given), "decoder": (latents,)}.get(file.name)
            values = values or (_pixels(model, latents),)
            flat = [*values[:2], *given] if file.name == "velocity" else values
            pairs.append((_run(session, file, flat), file.module(*values)))
    error = largest_error(pairs)
    if not error <= LIMIT:
        raise ArtifactError(
            f"onnxruntime computes a {file.name} that differs from torch's by {error:.1e} of its largest value, where "
            f"rounding explains {LIMIT:g}; nothing was written"
        )
    return error


def opened(path: Path) -> onnxruntime.InferenceSession:
    """A file in onnxruntime, on the CPU, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, file: _File, values: Sequence[Tensor]) -> Tensor:
    try:
        feed = {name: value.numpy() for name, value in zip(file.inputs, values, strict=True)}
        return torch.from_numpy(session.run([file.output], feed)[0])
    except Exception as error:  # its errors have no common class
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(f"onnxruntime cannot run the {file.name} of this model ({reason[:300]})") from error


def _readme(config: ModelConfig, names: Sequence[str]) -> str:
    """The page with its program; both are templates in `templates/`."""
    as_sign = config.masks is not None and config.masks.told_as == "sign"
    hole = {"hole_as_sign": as_sign, "hole_level": "-1" if as_sign else f"{HOLE_GRAY} / 127.5 - 1"}
    return render_card("latentflow.convert.onnx", "README.md.j2", config, "onnx", names=names, **hole)
