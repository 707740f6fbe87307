"""Network, path, conditioning and autoencoder as one model, and one folder on disk.

`latentflow.api.LatentFlow` adds sampling for users.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from latentflow.artifacts import (
    atomic_folder,
    open_tensors,
    read_json,
    read_tensors,
    restore,
    sha256_tensors,
    write_json,
    write_tensors,
    write_text,
)
from latentflow.autoencoder import Autoencoder, latent_mean, sample_latents
from latentflow.autoencoder_files import AUTOENCODER_FILES
from latentflow.data.painting.input_pixels import at_image_size, at_latent_size, unit_inputs
from latentflow.errors import ArtifactError, ConfigError
from latentflow.flow.multistep import FittedMultistep
from latentflow.hub import CARD_FILE, HubId, fetch, looks_like, push_folder, require_token
from latentflow.model.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    Adapter,
    AdapterBase,
    is_adapter,
    read_adapter,
    read_record,
    write_adapter,
)
from latentflow.model.adapter_name import AdaptedName, adapted_name, split_adapted
from latentflow.model.card import model_card
from latentflow.model.config import AUTOENCODER_FOLDER, ModelConfig
from latentflow.model.fitted_solvers import SOLVERS_FILE, FittedSolvers, read_solvers, write_solvers
from latentflow.model.snapshots import find_snapshot, split_snapshot
from latentflow.networks.low_rank import low_rank_of, merge_low_rank
from latentflow.networks.registered import NAMING
from latentflow.networks.velocity_network import network_class
from latentflow.randomness import ImageRandom
from latentflow.records import explain
from latentflow.runtime import PrecisionWord, Runtime, open_runtime
from latentflow.shapes import Condition
from latentflow.weights import filled, require_fit, tensor_shapes

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

CONFIG_FILE, WEIGHTS_FILE = "config.json", "velocity.safetensors"
_MOST_CONFIG_BYTES = 64 << 20  # a million class names fit
MODEL_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CARD_FILE,
    SOLVERS_FILE,
    *(f"{AUTOENCODER_FOLDER}/{name}" for name in AUTOENCODER_FILES),
)
"""The files of a model folder, as patterns; nothing else is uploaded or downloaded."""
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG_FILE)
"""The files of an adapter."""


class FlowModel:
    """A flow-matching model in the latent space of an autoencoder.

    Args:
        config: what the model is.
        network: called as network(latents [B, C, h, w], time [B], condition) => velocity [B, C, h, w].
        autoencoder: frozen.
        runtime: device and precision; None: the device of the network, in fp32.
    """

    def __init__(
        self,
        config: ModelConfig,
        network: torch.nn.Module,
        autoencoder: Autoencoder,
        runtime: Runtime | None = None,
    ):
        self.config = config
        self.network = network
        self.autoencoder = autoencoder
        self.runtime = runtime or Runtime(self.device)
        self._hashed: tuple[object, str] | None = None
        self.guides: dict[str, Any] = {}
        """The models that guide it, by name, where any have been opened; see `latentflow.sampling.guides`."""
        self.reference = ""
        """The folder it was loaded from, or the hub id with the commit: owner/name@commit."""
        self.fitted_solvers = FittedSolvers()
        """The solvers that were fitted to it."""
        self.adapted_from: AdapterBase | None = None
        """What it began with, if its network has low-rank factors: an adapter is saved with it."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        adapter: str | Path | None = None,
        adapter_strength: float | None = None,
        revision: str | None = None,
        device: torch.device | str | None = None,
        precision: PrecisionWord = "auto",
        runtime: Runtime | None = None,
        autoencoder: Autoencoder | None = None,
    ) -> Self:
        """Load a model folder, a run folder (its `model/`), a snapshot of a run, or a hub id, also with a revision.

        A snapshot is run@1/8, of a share of the run's steps, run@1000 or run@best; see `latentflow.model.snapshots`.

        Args:
            adapter: low-rank differences that were trained on this model: the folder of an adapter, a run, a snapshot
                or a model folder that holds one, or a hub id. They are merged into the weights.
            adapter_strength: from 0, the model itself as far as it has the same conditions, to 1, the finetuned model,
                and beyond; None: 1. MODEL+ADAPTER:0.7 as the name of the model is the same.
            revision: a branch, tag or commit on the hub; None: the default branch.
            device: None: a GPU if there is one, else the CPU.
            precision: of the network: fp32, tf32, bf16, fp16, or auto, which is bf16 on a GPU that supports it. The
                autoencoder computes in float32, on a GPU with TF32 unless this is fp32.
            runtime: device and precision in one, in place of both.
            autoencoder: to share with another model, in place of loading it.

        Raises:
            ArtifactError: there is no usable model, or the autoencoder is not the one that it was trained with.
            ConfigError: there is no such device, a revision is given for a folder, or a strength is out of range.
        """
        named = adapted_name(model, adapter, adapter_strength)
        model = named.model if named else model
        runtime = runtime or open_runtime(device, precision, alone=True)
        folder = find_model(model, revision)
        stored = read_stored(folder, named)
        autoencoder = _autoencoder_of(folder, stored.config, autoencoder)
        network = filled(stored.config.build_network, stored.weights, stored.origin)
        loaded = cls(stored.config, network.eval().requires_grad_(False), autoencoder).to(runtime)
        loaded.fitted_solvers = FittedSolvers() if named else read_solvers(folder)
        loaded.reference = _reference(model, folder, revision)
        if named is not None:
            adapter = _reference(named.adapter, stored.origin)
            loaded.reference = str(replace(named, model=loaded.reference, adapter=adapter))
        return loaded

    def save_pretrained(self, folder: str | Path, *, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the model folder, complete or not at all.

        Args:
            weights: written in place of the network's own, for example their EMA.

        Low-rank factors are merged; an adapter of them is written next to the weights, where `adapted_from` is known.

        Raises:
            ConfigError: the network is not the one that the config names, so the folder could not be loaded. Nothing
                was written.
        """
        low_rank, trained = low_rank_of(self.network), weights or self.network.state_dict()
        plain = trained if low_rank is None else merge_low_rank(trained, low_rank[1])
        _require_named(self.config, self.network, plain if weights is None else None)
        with atomic_folder(folder) as temporary:
            write_json(temporary / CONFIG_FILE, self.config.model_dump(mode="json"))
            metadata = {"config": json.dumps(self.config.computation)}  # one entry: safetensors shuffles several
            write_tensors(temporary / WEIGHTS_FILE, plain, metadata)
            write_text(temporary / CARD_FILE, model_card(self.config))
            if self.fitted_solvers.solvers and weights is None:  # others make them worthless
                write_solvers(temporary, self.fitted_solvers)
            if self.config.autoencoder.reference == AUTOENCODER_FOLDER:
                self.autoencoder.save_pretrained(temporary / AUTOENCODER_FOLDER)
            if low_rank is not None and self.adapted_from is not None:
                write_adapter(temporary / ADAPTER_FOLDER, self.adapted_from, *low_rank, trained)
                write_json(temporary / ADAPTER_FOLDER / CONFIG_FILE, self.config.model_dump(mode="json"))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        commit_message: str = "Upload a latentflow model",
        token: str | None = None,
    ) -> str:
        """Upload the model to the Hugging Face hub in one commit; returns its page.

        Args:
            repo_id: owner/name or owner/name@branch; created if it does not exist.
            private: create a private repository; an existing public one is refused.
            revision: the branch, created if it does not exist; None: the default branch.
            token: with write access; None: that of HF_TOKEN or of `hf auth login`.

        Raises:
            ConfigError: an invalid id, or there is no token. Nothing was sent.
            ArtifactError: the hub refuses, cannot be reached, or holds something else under that name.
        """
        target, token = HubId.parse(repo_id, revision), require_token(token)
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder)
            return push_folder(
                *(folder, target, MODEL_FILES),
                marker=WEIGHTS_FILE,
                private=private,
                message=commit_message,
                token=token,
            )

    def to(self, place: Runtime | torch.device | str) -> Self:
        """Move network and autoencoder to a device, in the precision of the runtime; returns itself.

        On CUDA the weights of convolutions are channels last, which tensor cores are fastest with. On the CPU they are
        not: it gains nothing, and torch's GroupNorm loses up to three digits (1e-4 of the output of a small U-Net).
        """
        self.runtime = place if isinstance(place, Runtime) else replace(self.runtime, device=torch.device(place))
        device = self.runtime.device
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.network.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.autoencoder.to(self.runtime.for_autoencoder())
        return self

    def computing_in(self, precision: PrecisionWord) -> Self:
        """A model that shares the weights of this one, and whose network computes in `precision`.

        Raises:
            ConfigError: the device does not support it.
        """
        other = copy.copy(self)
        other.runtime = self.runtime.with_precision(precision)
        return other

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def weights_hash(self) -> str:
        """The SHA-256 of the network's weights, low-rank factors merged; computed again once they have changed."""
        low_rank, weights = low_rank_of(self.network), self.network.state_dict(keep_vars=True)
        untracked = any(x.is_inference() for x in weights.values())  # changed in place they stay at one version
        versions = () if untracked else tuple((x.data_ptr(), x._version) for x in weights.values())
        hashed = self._hashed
        if untracked or hashed is None or hashed[0] != (low_rank, versions):
            plain = {name: x.detach() for name, x in weights.items()}
            merged = plain if low_rank is None else merge_low_rank(plain, low_rank[1])
            hashed = self._hashed = (low_rank, versions), sha256_tensors(merged)
        return hashed[1]

    def fitted_solver(self, name: str) -> tuple[str, FittedMultistep]:
        """The solver called fitted-N or fitted-N@HASH, and its name with the hash of its times and weights.

        Raises:
            ConfigError: there is none, or it was fitted to other weights.
        """
        weights = self.weights_hash if self.fitted_solvers.solvers else ""
        return self.fitted_solvers.resolved(name, self.reference or "MODEL", weights)

    def encode(self, pixels: Tensor, random: ImageRandom | None = None) -> Tensor:
        """pixels [B, P, H, W] in [-1, 1] => latents [B, C, h, w]: the posterior's mode, or a sample by `random`."""
        return self.latents(self.autoencoder.encode(pixels), random)

    def moments(self, pixels: Tensor) -> Tensor:
        """Stored values [B, C, H, W] in the model's `pixel_format` => moments [B, C or 2C, h, w]."""
        return self.autoencoder.encode(self.config.pixel_format.to_unit(pixels))

    def latents(self, moments: Tensor, random: ImageRandom | None = None) -> Tensor:
        """moments [B, C or 2C, h, w] => normalised latents [B, C, h, w]."""
        channels = self.config.autoencoder.num_channels
        raw = latent_mean(moments, channels) if random is None else sample_latents(moments, channels, random)
        return self.config.normalisation.normalise(raw)

    def paired_input(self, pixels: Tensor) -> Tensor:
        """Inputs as the network gets them, by the config's `inputs`.

        Args:
            pixels: [B, c, H / N, W / N] as `stack_inputs` gives them, for images of H x W.

        Returns:
            [B, I, h, w] float32.
        """
        config, rules = self.config, self.config.inputs
        assert rules is not None and config.input_format is not None
        values = unit_inputs(pixels, config.input_format)
        if rules.form == "latents":
            return self.encode(at_image_size(values, rules.shrinking, config.pixel_format.channels))
        return at_latent_size(values, config.autoencoder.factor, rules.shrinking)

    def velocity(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The learned velocity at x_t = latents [B, C, h, w] and time [B] (0 data, 1 noise): [B, C, h, w]."""
        with self.runtime.autocast():
            predicted: Tensor = self.network(latents, time, condition)
        return predicted

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] => pixels [B, P, H, W] in [-1, 1], with the channels of the model's `pixel_format`."""
        return self.autoencoder.decode(self.config.normalisation.restore(latents), self.config.pixel_format.channels)

    def pixels(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] => stored values [B, P, H, W] in the model's `pixel_format`, rounded on the device."""
        return self.autoencoder.decode_stored(self.config.normalisation.restore(latents), self.config.pixel_format)


def _reference(name: str | Path, folder: Path, revision: str | None = None) -> str:
    """The name of what was found in a folder, with its commit if it is from the hub."""
    is_local = Path(name).exists() or split_snapshot(name) is not None
    return str(name) if is_local else HubId.parse(str(name), revision).pinned(folder)


def find_model(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model, given as a model folder, a run folder, a snapshot of a run (`latentflow.model.snapshots`)
    or a hub id; local folders take precedence.

    Raises:
        ArtifactError: there is no such model.
        ConfigError: a revision is given for a folder.
    """
    if (adapted := split_adapted(model)) is not None:
        options = f"--adapter {adapted.adapter} --adapter-strength {adapted.strength:g} --out MODEL"
        raise ArtifactError(
            f"{model} is a model with an adapter, which has no folder; make one: latentflow merge {adapted.model} "
            f"{options}"
        )
    path = Path(model)
    for folder in (path, path / "model"):
        restore(folder)
        if _is_model(folder):
            if revision is not None:
                raise ConfigError(f"{model} is a local folder, which has no revision {revision!r}; leave it out")
            return folder
    if path.is_file():
        raise ArtifactError(f"{model} is a file; a model is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if is_adapter(path):
        raise ArtifactError(
            f"{model} is an adapter of {read_record(path).base_model_name_or_path}; give that model, and "
            f"--adapter {model}"
        )
    if path.exists():
        raise ArtifactError(
            f"{model} is not a model folder: it has no {CONFIG_FILE} with {WEIGHTS_FILE}, nor has {path / 'model'}"
        )
    if (named := split_snapshot(model)) is not None and revision is None:
        return find_snapshot(*named)
    try:
        hub_id = HubId.parse(str(model), revision)
    except ConfigError as error:
        raise ArtifactError(
            f"{model} does not exist; give a model folder, a run folder or a hub id ({error})"
        ) from error
    try:
        folder = fetch(hub_id, MODEL_FILES)
    except ArtifactError as error:
        raise ArtifactError(f"{model}: there is no such folder here, and {error}") from error
    if not _is_model(folder):
        raise ArtifactError(
            f"{hub_id.url} is not a latentflow model: it has no {CONFIG_FILE} with {WEIGHTS_FILE}; {looks_like(folder)}"
        )
    return folder


def config_of(model: str | Path) -> ModelConfig:
    """The config of a model, with an adapter or without, by its name; no weights are read.

    Raises:
        ArtifactError: there is no such model or adapter.
    """
    return read_config(folders_of(model)[-1])


def folders_of(model: str | Path) -> list[Path]:
    """The folder of a model, by its name, and that of its adapter if it has one.

    Raises:
        ArtifactError: there is no such model or adapter.
    """
    named = split_adapted(model)
    return [find_model(named.model), find_adapter(named.adapter)] if named else [find_model(model)]


def find_adapter(adapter: str | Path) -> Path:
    """The folder of an adapter, given as that, as a model folder, a run or a snapshot that holds one, or as a hub id.

    Raises:
        ArtifactError: there is no such adapter.
    """
    path = Path(adapter)
    if is_adapter(path):
        return path
    if path.is_file():
        raise ArtifactError(f"{adapter} is a file; an adapter is a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    if path.exists() or split_snapshot(adapter) is not None:
        inside = find_model(adapter) / ADAPTER_FOLDER if _holds_model(path) or not path.exists() else path
        if is_adapter(inside):
            return inside
        raise ArtifactError(
            f"{adapter} holds no adapter: it has no {ADAPTER_CONFIG}, nor {ADAPTER_FOLDER}/; "
            "`latentflow finetune MODEL --data CACHE --method lora` makes one"
        )
    try:
        hub_id = HubId.parse(str(adapter))
        folder = fetch(hub_id, ADAPTER_FILES)
    except ConfigError as error:
        raise ArtifactError(
            f"{adapter} does not exist; give the folder of an adapter, a run that holds one, or a hub id ({error})"
        ) from error
    if not is_adapter(folder):
        raise ArtifactError(f"{hub_id.url} is no adapter: it has no {ADAPTER_CONFIG}; {looks_like(folder)}")
    return folder


def open_adapter(adapter: str | Path) -> Adapter:
    """Read an adapter; see `find_adapter`.

    Raises:
        ArtifactError: it does not exist, or it is damaged or of another kind.
    """
    folder = find_adapter(adapter)
    read_record(folder)  # before the config, which one of another kind does not have
    return read_adapter(folder, read_config(folder))


def _holds_model(folder: Path) -> bool:
    return _is_model(folder) or _is_model(folder / "model")


def _is_model(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()


def read_config(folder: str | Path) -> ModelConfig:
    """The config of a model folder.

    Raises:
        ArtifactError: it is missing, damaged or of another kind.
    """
    file = Path(folder) / CONFIG_FILE
    if file.is_file() and file.stat().st_size > _MOST_CONFIG_BYTES:
        raise ArtifactError(f"{file} is larger than {_MOST_CONFIG_BYTES >> 20} MiB, which no config is; restore it")
    try:
        return ModelConfig.model_validate(read_json(file))
    except ValidationError as error:
        reason = explain(error, ModelConfig)
    except ConfigError as error:  # of a section that says itself what is wrong
        reason = str(error)
    raise ArtifactError(f"{file} is not the config of a latentflow model ({shorten(reason, 400, placeholder=' ...')})")


@dataclass(frozen=True)
class StoredModel:
    """What a model folder holds, with an adapter's differences if one was named.

    Attributes:
        folder: of the model.
        config: of the model, or of the adapter.
        weights: of the network, by name, memory-mapped if there is no adapter.
        origin: where the weights are from, for messages.
    """

    folder: Path
    config: ModelConfig
    weights: Mapping[str, Tensor]
    origin: Path


def read_stored(folder: Path, named: AdaptedName | None = None) -> StoredModel:
    """Config and weights of a model folder, which fit each other.

    Args:
        named: the adapter that is wanted, with its strength.

    Raises:
        ArtifactError: they do not fit, one is missing or damaged, or the adapter is for other weights.
    """
    config, file = read_config(folder), folder / WEIGHTS_FILE
    require_fit(config.build_network, tensor_shapes(file), file, str(folder / CONFIG_FILE))
    _require_written_with(config, file)
    weights = read_tensors(file)
    if named is None:
        return StoredModel(folder, config, weights, file)
    found = open_adapter(named.adapter)
    found.require_base(weights, named.model)
    return StoredModel(folder, found.config, found.applied(weights, named.strength), found.folder)


def _autoencoder_of(folder: Path, config: ModelConfig, given: Autoencoder | None = None) -> Autoencoder:
    """The autoencoder of a model folder, loaded where it is not `given`.

    Raises:
        ArtifactError: it is not there, or it is not the one that the model was trained with.
    """
    own = folder / AUTOENCODER_FOLDER
    if config.autoencoder.reference == AUTOENCODER_FOLDER and not own.is_dir():
        raise ArtifactError(f"{folder} is incomplete: {AUTOENCODER_FOLDER}/ is missing; copy the whole folder")
    autoencoder = given
    if autoencoder is None:
        autoencoder = Autoencoder.from_pretrained(own if own.is_dir() else config.autoencoder.reference)
    if autoencoder.content_hash != config.autoencoder.content_hash:
        raise ArtifactError(
            f"{folder} was trained with an autoencoder of hash {config.autoencoder.content_hash[:12]}, but "
            f"{autoencoder.reference} has hash {autoencoder.content_hash[:12]}; restore the original one"
        )
    found = {"factor": autoencoder.factor, "num_channels": autoencoder.num_channels}
    for name, number in found.items():
        if number != getattr(config.autoencoder, name):
            raise ArtifactError(
                f"{folder / CONFIG_FILE}: autoencoder.{name} is {getattr(config.autoencoder, name)}, but that of "
                f"{autoencoder.reference} is {number}; restore the original {CONFIG_FILE}"
            )
    return autoencoder


def _require_named(config: ModelConfig, network: torch.nn.Module, weights: Mapping[str, Tensor] | None) -> None:
    """Refuse to write a network other than the one that the config names.

    Args:
        weights: of the network; None: others are written, those of a run, which builds its network by the config. For
            them nothing is built: a checkpoint's thread would disturb the compiler of the thread that trains.

    Raises:
        ConfigError: with both.
    """
    named = network_class(config.network, config.prediction)
    if isinstance(named, type) and type(network) is not named:
        raise ConfigError(
            f"the config names a {config.network.title}, but the network is a {type(network).__name__}, which could "
            f"not be loaded from a folder; {NAMING}"
        )
    if weights is None:
        return
    try:
        require_fit(config.build_network, {name: list(x.shape) for name, x in weights.items()}, "the network")
    except ArtifactError as error:
        raise ConfigError(f"{error}; give the config that it was built by") from None


def _require_written_with(config: ModelConfig, weights: Path) -> None:
    """Refuse a config other than the one that the weights were written with, where shapes do not show it."""
    with open_tensors(weights) as file:
        written = (file.metadata() or {}).get("config")
    difference = written and _first_difference(json.loads(written), config.computation)
    if difference:
        name, then, now = difference
        raise ArtifactError(
            f"{weights.parent / CONFIG_FILE} says {name} = {now}, but {weights.name} was written with {then}; restore "
            "the two files that belong together"
        )


def _first_difference(then: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Name and values of the first difference between two JSON values; keys that `then` does not have are ignored."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return None if then == now else (name, then, now)
    pairs = (_first_difference(value, now.get(key), f"{name}.{key}".strip(".")) for key, value in then.items())
    return next((pair for pair in pairs if pair), None)
