"""The facts about a foreign checkpoint that are not in its weights: network, path, and sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from latentflow.convert.architecture import Architecture
from latentflow.convert.families.dit import DiTOptions
from latentflow.convert.families.edm_unet import EdmUNetOptions
from latentflow.convert.families.lfm import PROTOCOL, Experiment, LfmFlags, find_experiment
from latentflow.convert.families.registry import architecture, require_family
from latentflow.errors import ConfigError, nearest
from latentflow.flow.path import CosinePath, LinearPath, PathConfig
from latentflow.model.config import SamplingPreset, TrainingRecord
from latentflow.networks.dit import NAMES
from latentflow.networks.velocity_network import (
    DenoiserPrediction,
    NoisePrediction,
    PredictionConfig,
    VelocityPrediction,
)

_DOPRI5 = {"solver": "dopri5", "rtol": 1e-5, "atol": 1e-5}
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Published:
    """A foreign model without its weights and its autoencoder.

    Attributes:
        architecture: its network, and where its weights go.
        image_size: height and width of its images in pixels.
        latent_scale: factor of the raw latents; None: that of the autoencoder's config.
        label_dropout: fraction of labels dropped in training; 0: no guidance.
        map_class_names: classes of its semantic maps.
        path, prediction: the meaning of its output.
        sampling: how its published samples were generated.
        training: its training data.
        notes: what a user should know.
    """

    architecture: Architecture
    image_size: int
    latent_scale: float | None = None
    label_dropout: float = 0.0
    map_class_names: tuple[str, ...] = ()
    path: PathConfig = field(default_factory=LinearPath)
    prediction: PredictionConfig = field(default_factory=VelocityPrediction)
    sampling: SamplingPreset = field(default_factory=SamplingPreset)
    training: TrainingRecord = field(default_factory=TrainingRecord)
    notes: list[str] = field(default_factory=list)


def published(
    family: str,
    options: Mapping[str, Any],
    *,
    experiment: str | None = None,
    found: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    factor: int | None = None,
) -> Published:
    """Describe a checkpoint of a family.

    Args:
        options: arguments of the published network, under its own names; for "sit" and "dit" also "name", for example
            SiT-XL/2.
        experiment: for "lfm", the name of an experiment; `options` replace its flags.
        found: what the file says about itself; with an experiment, only "learn_sigma" of it is used.
        image_size: in pixels; None: from the options, or 256.
        factor: pixels per latent pixel of the autoencoder; None: not known yet, 8 is assumed.

    Raises:
        ConfigError: an unknown family, experiment or option, too few of them, or sizes that contradict each other.
    """
    require_family(family)
    if experiment is not None and family != "lfm":
        option = {"sit": "name=SiT-XL/2", "dit": "name=DiT-XL/2", "edm": "model_type=adm"}[family]
        raise ConfigError(f"--experiment names one of LFM's; for {family}, give options such as {option}")
    if family == "lfm":
        return _lfm(options, experiment, found or {}, image_size, factor)
    if family == "edm":
        return _edm(dict(options), image_size, factor or 8)
    return _transformer(family, dict(options), found or {}, image_size, factor or 8)


def imagenet_synsets() -> list[str]:
    """The names of ImageNet's 1000 class folders, in the order of the labels."""
    return files("latentflow").joinpath("assets", "imagenet_synsets.txt").read_text(encoding="utf-8").split()


def class_names_of(network: Architecture) -> list[str]:
    """ImageNet's names for 1000 classes; else none."""
    return imagenet_synsets() if network.num_classes == _IMAGENET_CLASSES else []


def _lfm(
    options: Mapping[str, Any],
    experiment: str | None,
    found: Mapping[str, Any],
    image_size: int | None,
    factor: int | None,
) -> Published:
    if (sigma := found.get("learn_sigma")) is not None:
        options = {"learn_sigma": sigma, **options}
    if experiment is None and "hidden_size" in options:
        factor = factor or 8
        sizes = _sizes(options, image_size, factor)
        return Published(
            architecture("lfm", dict(sizes)),
            _pixels(sizes.input_size, factor, image_size),
            label_dropout=sizes.class_dropout_prob,
            sampling=SamplingPreset(**_DOPRI5),
        )
    size = {} if image_size is None else {"image_size": image_size}
    if experiment is not None:
        known = find_experiment(experiment)
        given = {**known.flags, **options, **size}
        return _from_flags(LfmFlags.read(given), architecture("lfm", given, **known.task), known, experiment, factor)
    flag_names = LfmFlags.model_fields.keys() - {"learn_sigma"}
    own = {key: value for key, value in found.items() if key in flag_names and value is not None}
    if not own and options.keys() <= {"learn_sigma"}:
        raise ConfigError(
            "the file does not say which network it is; give --experiment NAME, or the flags of its training as "
            "key=value, for example model_type=DiT-L/2 num_classes=1 image_size=256 num_in_channels=4 "
            "num_out_channels=4"
        )
    flags = LfmFlags.read({**own, **options, **size})
    task: dict[str, Any] = {}
    if flags.model_type is None:  # the channels of the input say whether it is the script for inpainting
        task["inpainting"] = flags.num_in_channels == 2 * flags.num_out_channels + 1
        if flags.num_in_channels == 2 * flags.num_out_channels:
            raise ConfigError("a network of semantic maps needs --experiment semantic_kl, which names its classes")
    return _from_flags(flags, architecture("lfm", flags.model_dump(exclude_none=True), **task), None, "", factor)


def _sizes(options: Mapping[str, Any], image_size: int | None, factor: int) -> DiTOptions:
    """Options of a transformer, with the latent size of `image_size` if they do not give one."""
    own = options.keys() & {"input_size", "img_resolution"}
    if len(own) == 2:
        raise ConfigError("input_size and img_resolution are the same thing; give one of them")
    return DiTOptions.read(options if own or image_size is None else {**options, "input_size": image_size // factor})


def _pixels(latent_side: int, factor: int, image_size: int | None) -> int:
    """Image size of a network that was built for latents of one size.

    Raises:
        ConfigError: `image_size` differs.
    """
    side = factor * latent_side
    if image_size not in (None, side):
        raise ConfigError(
            f"image size {image_size}: with an autoencoder of factor {factor}, latents of {latent_side} x "
            f"{latent_side} are images of {side} pixels; leave out one of the two"
        )
    return side


def _from_flags(
    flags: LfmFlags, network: Architecture, known: Experiment | None, name: str, factor: int | None
) -> Published:
    if factor not in (None, flags.f):
        raise ConfigError(
            f"the network was trained with an autoencoder of factor {flags.f}, this one has {factor}; give the one it "
            "was trained with (--autoencoder)"
        )
    guidance = known.guidance if known else 1.0
    record = TrainingRecord()
    notes = []
    if known:
        record = TrainingRecord(data=f"{known.data} (LFM's {name})", num_images=known.num_images)
        if known.fid is not None:
            notes.append(f"published FID {known.fid}: {PROTOCOL}")
        if name == "imnet_f8_adm":
            notes.append("the published command drops no labels, so the null label may be untrained")
        if name == "semantic_kl":
            notes.append("the published training left the encoder of semantic maps at its random initialisation")
    return Published(
        network,
        flags.image_size,
        latent_scale=flags.scale_factor,
        # guided-diffusion's network has no null row, which guidance needs
        label_dropout=flags.label_dropout if network.num_classes and not flags.builds_guided_unet else 0.0,
        map_class_names=known.map_class_names if known else (),
        sampling=SamplingPreset(**_DOPRI5, guidance=guidance),
        training=record,
        notes=notes,
    )


def _transformer(
    family: str, options: dict[str, Any], found: Mapping[str, Any], image_size: int | None, factor: int
) -> Published:
    # The training states of SiT and DiT include their arguments.
    own = {"name": found.get("model"), **{key: found.get(key) for key in ("num_classes", "learn_sigma")}}
    if family == "sit":
        own |= {key: found.get(key) for key in ("prediction", "path_type")}
        for key in ("prediction", "path_type"):
            if own[key] is not None and options.get(key, own[key]) != own[key]:
                raise ConfigError(f"{key}={options[key]}: the file says that it was trained with {own[key]}")
    if options.keys() & {"name", "hidden_size"}:
        del own["name"]
    options = {**{key: value for key, value in own.items() if value is not None}, **options}
    name = options.pop("name", None)
    if name is not None:
        names = {other.replace("DiT", {"sit": "SiT", "dit": "DiT"}[family]): size for other, size in NAMES.items()}
        if str(name) not in names:
            raise ConfigError(f"no {family} network {name!r}; {nearest(name, names)}")
        options = {**names[str(name)], **options}
    path = LinearPath(sigma_min=0) if family == "sit" else CosinePath()
    if family == "sit":
        prediction, path_type = str(options.pop("prediction", "velocity")), str(options.pop("path_type", "Linear"))
        if prediction != "velocity":
            raise ConfigError(
                f"prediction {prediction!r}: of SiT, networks that predict the velocity are converted; those for "
                "noise and score divide by a coefficient that vanishes at one end of the path"
            )
        paths: dict[str, PathConfig] = {"Linear": path, "GVP": CosinePath()}
        if path_type not in paths:
            raise ConfigError(
                f"path_type {path_type!r}: {nearest(path_type, paths)}; the VP path of SiT does not end in data here"
            )
        path = paths[path_type]
    if image_size is None and not options.keys() & {"input_size", "img_resolution"}:
        image_size = int(found.get("image_size") or 256)
    sizes = _sizes(options, image_size, factor)
    # Both papers sample with guidance on the first three of four channels.
    sampling = {"guidance": 1.5, "guided_channels": 3} if sizes.class_dropout_prob else {}
    common = {
        "image_size": _pixels(sizes.input_size, factor, image_size),
        "label_dropout": sizes.class_dropout_prob,
        "training": TrainingRecord(data="ImageNet" if sizes.num_classes == _IMAGENET_CLASSES else ""),
    }
    if family == "sit":
        sit = architecture("sit", dict(sizes))
        return Published(sit, path=path, sampling=SamplingPreset(**_DOPRI5, **sampling), **common)
    return Published(
        architecture("dit", dict(sizes)),
        path=path,
        prediction=NoisePrediction(),
        sampling=SamplingPreset(solver="heun", steps=50, **sampling),
        notes=["a diffusion of 1000 steps, sampled by its probability-flow ODE; the learned variance is left out"],
        **common,
    )


def _edm(options: dict[str, Any], image_size: int | None, factor: int) -> Published:
    denoiser = {key: options.pop(key) for key in ("sigma_data", "sigma_min", "sigma_max") if key in options}
    sizes = EdmUNetOptions.read(options)
    return Published(
        architecture("edm", dict(sizes)),
        image_size=_pixels(sizes.img_resolution, factor, image_size),
        label_dropout=sizes.label_dropout if sizes.label_dim else 0.0,
        path=LinearPath(sigma_min=0),
        prediction=DenoiserPrediction(**denoiser),
        sampling=SamplingPreset(solver="heun", steps=18),
        notes=["EDM's preconditioned denoiser, sampled by its probability-flow ODE"],
    )
