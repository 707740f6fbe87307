"""Find the files of an autoencoder in the layout of diffusers, check them, and load them.

diffusers' own loader is not used: it fills missing weights with random numbers, runs Python code from the folder (in
some versions), and changes torch's state for all threads while it loads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from latentflow.artifacts import read_json, read_tensors
from latentflow.console import notice
from latentflow.errors import ArtifactError, ConfigError, nearest
from latentflow.hub import PIPELINE_FILE, HubId, fetch
from latentflow.pixel_format import PixelFormat
from latentflow.weights import LOADING, filled, require_fit, tensor_shapes

_CONFIG = "config.json"
_STEM = "diffusion_pytorch_model"
_WEIGHTS = f"{_STEM}.safetensors"
PIXELS_FILE = "pixel_format.json"
"""What the autoencoder was trained on, if that is known and is not 8-bit RGB. Other programs do not look at it."""
AUTOENCODER_FILES = (_CONFIG, PIXELS_FILE, f"{_STEM}*.json", f"{_STEM}*.safetensors")
"""Patterns of the files in an autoencoder's folder."""

_PIPELINE_FOLDERS = ("vae", "vqvae", "movq")
_WRAPPERS = ("vae.", "first_stage_model.", "model.", "module.", "_orig_mod.")
_ONCE_NAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of attention layers in diffusers up to 0.15."""

_MOST_OF_A_CONFIG = 2**20  # bytes of the file, and its largest whole number
_MOST_DEPTH, _MOST_LENGTH = 8, 4096


def load_first_stage(reference: str, built_in: Mapping[str, Path]) -> nn.Module:
    """The autoencoder at `reference`, in float32 on the CPU. Several threads may load at once.

    Args:
        reference: an autoencoder's or pipeline's folder, a hub id `owner/name` or `owner/name/subfolder`, or a name in
            `built_in`.

    Raises:
        ArtifactError: there is no usable autoencoder; the message says what is there, and the remedy.
    """
    with LOADING:
        import diffusers  # slow to import, so only when a first stage is loaded

        folder = _folder(reference, built_in)
        config = _read_config(folder)
        kind = _kind(config, folder)
        shapes, weights = _read_weights(folder, kind)
        _require_bounded(config, folder, len(shapes))

        def build() -> nn.Module:
            verbosity = diffusers.logging.get_verbosity()
            diffusers.logging.set_verbosity_error()  # it warns about harmless extra keys in the config
            try:
                return kind.from_config(dict(config))
            finally:
                diffusers.logging.set_verbosity(verbosity)

        require_fit(build, shapes, folder, folder / _CONFIG)
        return filled(build, weights, folder)


def trained_format(reference: str, built_in: Mapping[str, Path]) -> PixelFormat | None:
    """The pixel format that the autoencoder in a folder was trained on; None: not known, or no folder.

    Args:
        reference, built_in: as for `load_first_stage`.

    Raises:
        ArtifactError: there is no autoencoder in the folder, or the file is damaged.
    """
    place = Path(reference).expanduser()
    if reference in built_in or not place.is_dir():
        return None
    file = _inside(place) / PIXELS_FILE
    if not file.is_file():
        return None
    try:
        return PixelFormat.model_validate(read_json(file))
    except ValidationError as error:
        raise ArtifactError(f"{file} describes no pixel format; restore the original, or delete it") from error


def _folder(reference: str, built_in: Mapping[str, Path]) -> Path:
    """The folder with config and weights for `reference`."""
    if reference in built_in:
        return built_in[reference]
    place = Path(reference).expanduser()
    if place.is_dir():
        return _inside(place)
    if place.exists():
        raise ArtifactError(_about_a_file(place))
    parts = reference.split("/")
    if reference.startswith((".", "/", "~")) or len(parts) not in (2, 3) or not _is_plain(parts[-1]):
        raise ArtifactError(
            f"autoencoder {reference!r}: no such folder, not a hub id like 'stabilityai/sd-vae-ft-mse', "
            f"and not built in ({', '.join(built_in)})"
        )
    try:
        repo = HubId.parse("/".join(parts[:2]))
    except ConfigError as error:
        raise ArtifactError(f"autoencoder {reference!r}: no such folder, and {error}") from error
    below = parts[2:] or ["", *_PIPELINE_FOLDERS]
    fetched = fetch(repo, [f"{folder}/{file}".lstrip("/") for folder in below for file in AUTOENCODER_FILES])
    return _inside(fetched.joinpath(*parts[2:]))


def _inside(place: Path) -> Path:
    """`place` if it is an autoencoder's folder, or the autoencoder's folder inside a pipeline."""
    if "_class_name" in _config_of(place):
        return place
    for name in _PIPELINE_FOLDERS:
        if "_class_name" in _config_of(place / name):
            return place / name
    if (place / PIPELINE_FILE).is_file():
        raise ArtifactError(f"{place} is a pipeline without {_PIPELINE_FOLDERS[0]}/{_CONFIG}; give an autoencoder")
    if "_class_name" in _config_of(place / "autoencoder"):
        raise ArtifactError(f"{place} is not an autoencoder, but has one: give {place / 'autoencoder'}")
    weights = [file.name for file in sorted(place.glob("*")) if file.suffix in (".safetensors", ".bin", ".ckpt", ".pt")]
    if weights and not (place / _CONFIG).is_file():
        raise ArtifactError(
            f"{place} has {weights[0]} but no {_CONFIG}, which describes the weights; copy it from their origin"
        )
    raise ArtifactError(
        f"{place} is not a diffusers autoencoder folder: it needs a {_CONFIG} with _class_name, and {_WEIGHTS}"
    )


def _config_of(place: Path) -> Mapping[str, Any]:
    file = place / _CONFIG
    return _read_config(place) if file.is_file() else {}


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG
    if file.stat().st_size > _MOST_OF_A_CONFIG:
        raise ArtifactError(f"{file} is larger than 1 MiB, which no autoencoder config is; restore the original")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ArtifactError(f"{file} holds no settings; restore the original")
    return config


def _kind(config: Mapping[str, Any], folder: Path) -> Any:
    """The diffusers class that a config names, if it is an autoencoder; nothing else is ever imported."""
    from diffusers.models import autoencoders
    from diffusers.models.modeling_utils import ModelMixin

    known = {
        name: kind
        for name, kind in vars(autoencoders).items()
        if isinstance(kind, type)
        and issubclass(kind, ModelMixin)
        and hasattr(kind, "encode")
        and hasattr(kind, "decode")
    }
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in known:
        raise ArtifactError(
            f"{folder} holds a {name}, which is not one of diffusers' autoencoders with encode and decode; "
            f"{nearest(name, known)}"
        )
    return known[name]


def _read_weights(folder: Path, kind: Any) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Shapes and tensors by the current names of diffusers."""
    files = _weight_files(folder)
    shapes: dict[str, list[int]] = {}
    for file in files:
        shapes |= tensor_shapes(file)
    names = {name: _current_name(name, shapes) for name in shapes}
    ignored = getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or []
    names = {old: new for old, new in names.items() if not any(re.search(pattern, new) for pattern in ignored)}
    parts = {name for name in names.values() if name.startswith(("encoder.", "decoder."))}
    for part, other in (("encoder", "decoder"), ("decoder", "encoder")):
        if parts and not any(name.startswith(f"{part}.") for name in parts):
            raise ArtifactError(
                f"{folder} lacks the weights of the {part}: its file only holds the {other}; get the one with both"
            )
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    return (
        {new: shapes[old] for old, new in names.items()},
        {new: tensors[old] for old, new in names.items()},
    )


def _current_name(name: str, names: Mapping[str, Any]) -> str:
    while wrapper := next((w for w in _WRAPPERS if all(other.startswith(w) for other in names)), ""):
        names = {other.removeprefix(wrapper): None for other in names}
        name = name.removeprefix(wrapper)
    found = re.fullmatch(r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    return f"{found[1]}.{_ONCE_NAMED[found[2]]}.{found[3]}" if found else name


def _weight_files(folder: Path) -> list[Path]:
    """The files of one set of weights: a single file, shards, or the only variant (fp16)."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    indices = sorted(folder.glob(f"{_STEM}.safetensors.index*.json"))
    if indices:
        return _shards(folder, indices[0])
    variants = sorted(folder.glob(f"{_STEM}.*.safetensors"))
    if len(variants) == 1:
        variant = variants[0].name.split(".")[1]
        notice(f"{folder} only has weights in {variant}; they are used with their reduced precision")
        return variants
    if variants:
        listed = ", ".join(file.name for file in variants)
        raise ArtifactError(f"{folder} has {listed}; rename the one you want to {_WEIGHTS}")
    pickles = sorted(file for file in folder.glob("*") if file.suffix in (".bin", ".ckpt", ".pt", ".pth"))
    if pickles:
        raise ArtifactError(
            f"{folder} has its weights as {pickles[0].name}, a pickle, which is never loaded; convert them to "
            f'safetensors: python -c "from diffusers import AutoModel; AutoModel.from_pretrained({str(folder)!r}, '
            f'use_safetensors=False).save_pretrained({str(folder)!r})"'
        )
    other = sorted(folder.glob("*.safetensors"))
    if len(other) == 1:
        raise ArtifactError(f"{folder} has no {_WEIGHTS}, but {other[0].name}; rename it")
    raise ArtifactError(f"{folder} has no {_WEIGHTS}; get the whole folder")


def _shards(folder: Path, index: Path) -> list[Path]:
    found = read_json(index)
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not places:
        raise ArtifactError(f"{index} names no shards; get the whole folder again")
    names = sorted({str(name) for name in places.values()})
    for name in names:
        if not _is_plain(name) or not name.endswith(".safetensors"):
            raise ArtifactError(f"{index} names {name!r}, which is not a safetensors file in its folder")
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} lacks {name}, which {index.name} names; get the whole folder")
    return [folder / name for name in names]


def _about_a_file(file: Path) -> str:
    """Why a single file is not an autoencoder, and how to turn it into one."""
    if (file.parent / _CONFIG).is_file() and file.name.startswith(_STEM):
        return f"{file} is one file of an autoencoder; give its folder {file.parent}"
    if file.suffix == ".safetensors":
        names = tensor_shapes(file)
        if not any("down.0.block" in name or "first_stage_model" in name for name in names):
            return (
                f"{file} only holds weights; put it into a folder as {_WEIGHTS}, together with the {_CONFIG} of its "
                "autoencoder, and give the folder"
            )
    return (
        f"{file} is a single file without a config; diffusers turns it into a folder: "
        f'python -c "from diffusers import AutoencoderKL; AutoencoderKL.from_single_file({str(file)!r}, config=LIKE)'
        f".save_pretrained('vae')\" with LIKE a folder or hub id in quotes that has the same {_CONFIG}; then give vae"
    )


def _require_bounded(config: Mapping[str, Any], folder: Path, num_tensors: int) -> None:
    """Refuse implausible numbers before a constructor uses them."""
    origin = folder / _CONFIG
    layers = 0
    for key, value in config.items():
        for number in _numbers(value, f"{origin}: {key}"):
            if isinstance(number, float) and not math.isfinite(number):
                raise ArtifactError(f"{origin}: {key} = {number} is not a finite number; restore the original")
            if abs(number) > _MOST_OF_A_CONFIG:
                raise ArtifactError(f"{origin}: {key} = {number} is larger than in any autoencoder")
            if isinstance(number, int) and any(word in key for word in ("layers", "blocks", "depth")):
                layers += max(number, 0)
    if layers > num_tensors:
        raise ArtifactError(f"{origin} asks for {layers} layers, but the file has {num_tensors} weights in all")
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        value, is_list = config.get(key), key.startswith("latents_")
        parts = [] if value is None else value if is_list and isinstance(value, list) else [value]
        if not all(isinstance(part, int | float) for part in parts):
            raise ArtifactError(f"{origin}: {key} = {value!r} is not {'numbers' if is_list else 'a number'}")
        for number in parts:
            if number <= 0 and key in ("scaling_factor", "latents_std"):
                raise ArtifactError(f"{origin}: {key} = {number} must be above 0; restore the original")


def _numbers(value: Any, where: str, depth: int = 0) -> list[int | float]:
    """All numbers in a value of a config."""
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if depth >= _MOST_DEPTH or len(value) > _MOST_LENGTH:
        raise ArtifactError(f"{where} is nested too deeply or too long; restore the original")
    return [] if isinstance(value, str) else [n for part in value for n in _numbers(part, where, depth + 1)]


def _is_plain(name: str) -> bool:
    """Whether a file name cannot leave its folder."""
    return re.fullmatch(r"[\w.-]+", name) is not None and set(name) != {"."}
