"""Networks and experiments of LFM (arXiv 2307.08698)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, PositiveInt, model_validator

from latentflow.convert.architecture import Architecture, PublishedOptions
from latentflow.convert.families.dit import DiTOptions, dit
from latentflow.convert.families.edm_unet import EdmUNetOptions, edm_unet
from latentflow.convert.families.guided_unet import GuidedUNetOptions, guided_unet
from latentflow.data.prepare import CELEBAMASK_HQ
from latentflow.errors import ConfigError, nearest
from latentflow.networks.dit import NAMES
from latentflow.records import Record


class LfmFlags(PublishedOptions):
    """Flags of the published training scripts that shape the network, with the scripts' defaults.

    A run of those scripts stores them in its config.yaml, and as "args" in content.pth.
    """

    model_type: str | None = Field(
        None, description="adm, ncsn++, ddpm++, or a name such as DiT-B/2; the scripts for inpainting do not have it"
    )
    use_origin_adm: bool = Field(False, description="guided-diffusion's U-Net, as without model_type")
    layout: bool = False
    image_size: int = Field(32, gt=0, le=16_384)
    f: int = Field(8, gt=0, description="pixels per latent pixel")
    scale_factor: float = Field(0.18215, gt=0, le=1e6)
    num_in_channels: int = Field(3, gt=0, le=65_536)
    num_out_channels: int = Field(3, gt=0, le=65_536)
    nf: int = Field(256, gt=0)
    num_res_blocks: int = Field(2, gt=0)
    num_blocks: int | None = Field(None, description="ncsn++ reads it in place of num_res_blocks")
    attn_resolutions: tuple[int, ...] = (16,)
    ch_mult: tuple[PositiveInt, ...] = Field((1, 1, 2, 2, 4, 4), min_length=1, max_length=12)
    dropout: float = Field(0.0, ge=0, lt=1)
    label_dim: int = Field(0, ge=0, le=1_000_000)
    num_classes: int | None = Field(None, ge=0, le=1_000_000)
    label_dropout: float = Field(0.0, ge=0, lt=1)
    learn_sigma: bool | None = Field(None, description="of a transformer: the velocity is the output's first half")
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    resamp_with_conv: bool = True
    num_heads: int = Field(4, gt=0)
    num_head_upsample: int = -1
    num_head_channels: int = -1

    @property
    def builds_guided_unet(self) -> bool:
        """Whether these flags build guided-diffusion's U-Net."""
        return self.use_origin_adm or self.model_type is None

    @model_validator(mode="after")
    def _built(self) -> LfmFlags:
        if self.layout:
            raise ConfigError("--layout builds a network with cross-attention, of which nothing was published")
        types = ["adm", "ncsn++", "ddpm++", *NAMES]
        if self.model_type not in (None, *types):
            raise ConfigError(f"model_type {self.model_type!r}: {nearest(self.model_type, types)}")
        return self


class Experiment(Record):
    """A published experiment: the network, its training data, and how it was sampled."""

    data: str
    num_images: int
    flags: dict[str, Any] = Field(description="Of the training script; see `LfmFlags`.")
    guidance: float = 1.0
    fid: float | None = Field(None, description="As published, by `PROTOCOL`; None: not in the repository.")
    inpainting: bool = False
    map_class_names: tuple[str, ...] = ()

    @property
    def task(self) -> dict[str, Any]:
        """What its network takes besides latents, as `lfm` names it."""
        return {"inpainting": self.inpainting, "num_map_classes": len(self.map_class_names)}


PROTOCOL = "50,000 JPEG-compressed samples of dopri5 at tolerance 1e-5, against JPEG-compressed references"
"""How the published FIDs were measured; they are not comparable with FIDs of PNG images."""

_COMMON = {"image_size": 256, "num_in_channels": 4, "num_out_channels": 4}
_ORIGIN = {**_COMMON, "model_type": "adm", "use_origin_adm": True, "attn_resolutions": (16, 8), "ch_mult": (1, 2, 3, 4)}
_EDM = {**_COMMON, "model_type": "adm", "attn_resolutions": (16, 8, 4), "ch_mult": (1, 2, 3, 4)}
_DIT = {**_COMMON, "model_type": "DiT-L/2", "num_classes": 1, "label_dropout": 0.0}
_PAINTING = {key: value for key, value in _ORIGIN.items() if key != "model_type"}
_CELEBA = {"data": "CelebA-HQ 256", "num_images": 27_000}
_FFHQ = {"data": "FFHQ 256", "num_images": 63_000}
_BEDROOM = {"data": "LSUN bedroom 256, the first 120,000", "num_images": 120_000}
_CHURCH = {"data": "LSUN church 256, the first 120,000", "num_images": 120_000}
_IMAGENET = {"data": "ImageNet 256", "num_images": 1_281_167}

EXPERIMENTS: dict[str, Experiment] = {
    "celeb256_f8_adm": Experiment(**_CELEBA, flags={**_ORIGIN, "ch_mult": (1, 2, 2, 2)}, fid=5.67),
    "ffhq_f8_adm": Experiment(**_FFHQ, flags=_EDM, fid=6.12),
    "bed_f8_adm": Experiment(**_BEDROOM, flags=_EDM, fid=7.05),
    "church_f8_adm": Experiment(**_CHURCH, flags=_ORIGIN, fid=7.7),
    # Sampled with guidance, though the published command drops no labels; its null label is the absence of a label.
    "imnet_f8_adm": Experiment(
        **_IMAGENET, flags={**_EDM, "label_dim": 1000, "label_dropout": 0.1}, guidance=1.25, fid=8.58
    ),
    "imnet_f8_ditb2": Experiment(
        **_IMAGENET,
        flags={**_DIT, "model_type": "DiT-B/2", "num_classes": 1000, "label_dropout": 0.1},
        guidance=1.5,
        fid=4.46,
    ),
    "celeb_f8_dit": Experiment(**_CELEBA, flags=_DIT, fid=5.26),
    "ffhq_f8_dit": Experiment(**_FFHQ, flags=_DIT, fid=4.55),
    "bed_f8_dit": Experiment(**_BEDROOM, flags=_DIT, fid=4.92),
    "church_f8_dit": Experiment(**_CHURCH, flags=_DIT, fid=5.54),
    "celeb512_f8_adm": Experiment(
        data="CelebA-HQ 512",
        num_images=30_000,
        flags={**_ORIGIN, "image_size": 512, "ch_mult": (1, 2, 2, 2, 4)},
        fid=6.35,
    ),
    "celeb1024_f8_adm": Experiment(
        data="CelebA-HQ 1024",
        num_images=30_000,
        flags={**_EDM, "image_size": 1024, "ch_mult": (1, 1, 2, 2, 4, 4), "attn_resolutions": (16, 8)},
    ),
    "inpainting_kl": Experiment(**_CELEBA, flags={**_PAINTING, "num_in_channels": 9}, inpainting=True),
    "semantic_kl": Experiment(
        data="CelebAMask-HQ 256",
        num_images=27_000,
        flags={**_PAINTING, "num_in_channels": 8},
        map_class_names=CELEBAMASK_HQ,
    ),
}
"""The published experiments; no weights were released for celeb1024_f8_adm and the last two."""


def find_experiment(name: str) -> Experiment:
    """An experiment by name.

    Raises:
        ConfigError: there is no such experiment; the nearest name is given.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(f"no experiment {name!r}; {nearest(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]


def lfm(options: Mapping[str, Any], *, inpainting: bool = False, num_map_classes: int = 0) -> Architecture:
    """A network of LFM as one of ours.

    Args:
        options: flags of its training scripts (see `LfmFlags`), or, for a transformer without a name, the arguments of
            its class `DiT` (see `DiTOptions`).
        inpainting: masked latents and a mask follow the latents in the input.
        num_map_classes: an encoded semantic map of so many classes follows the latents in the input.

    Raises:
        ConfigError: an unknown option, or one that does not fit.
    """
    if "hidden_size" in options:
        return dit(DiTOptions.read(options), "lfm")
    flags = LfmFlags.read(options)
    if flags.builds_guided_unet:
        return _origin(flags, inpainting, num_map_classes)
    if inpainting or num_map_classes:
        raise ConfigError(
            f"LFM's networks for inpainting and maps have no model_type; leave out model_type={flags.model_type}"
        )
    if flags.model_type in NAMES:
        return dit(_dit_options(flags), "lfm")
    return edm_unet(
        EdmUNetOptions(
            model_type=flags.model_type,
            img_resolution=flags.image_size // flags.f,
            in_channels=flags.num_in_channels,
            out_channels=flags.num_out_channels,
            label_dim=flags.label_dim,
            model_channels=flags.nf,
            channel_mult=flags.ch_mult,
            num_blocks=(flags.num_blocks if flags.model_type == "ncsn++" else None) or flags.num_res_blocks,
            attn_resolutions=flags.attn_resolutions,
            dropout=flags.dropout,
            label_dropout=flags.label_dropout,
        )
    )


def _dit_options(flags: LfmFlags) -> DiTOptions:
    if not flags.num_classes:
        raise ConfigError(f"model_type {flags.model_type} needs num_classes; 1 for a model without labels")
    return DiTOptions(
        input_size=flags.image_size // flags.f,
        in_channels=flags.num_in_channels,
        class_dropout_prob=flags.label_dropout,
        num_classes=flags.num_classes,
        learn_sigma=flags.learn_sigma,
        **NAMES[flags.model_type],
    )


def _origin(flags: LfmFlags, inpainting: bool, num_map_classes: int) -> Architecture:
    options = GuidedUNetOptions(
        in_channels=flags.num_in_channels,
        model_channels=flags.nf,
        out_channels=flags.num_out_channels,
        num_res_blocks=flags.num_res_blocks,
        attention_resolutions=flags.attn_resolutions,
        dropout=flags.dropout,
        channel_mult=flags.ch_mult,
        conv_resample=flags.resamp_with_conv,
        num_classes=flags.num_classes,
        num_heads=flags.num_heads,
        num_head_channels=flags.num_head_channels,
        num_heads_upsample=flags.num_head_upsample,
        use_scale_shift_norm=flags.use_scale_shift_norm,
        resblock_updown=flags.resblock_updown,
        use_new_attention_order=flags.use_new_attention_order,
    )
    wanted = flags.num_out_channels
    if inpainting:
        wanted = 2 * flags.num_out_channels + 1
    if num_map_classes:
        wanted = 2 * flags.num_out_channels
    if (inpainting or num_map_classes) and flags.num_in_channels != wanted:
        raise ConfigError(
            f"num_in_channels {flags.num_in_channels}: with num_out_channels {flags.num_out_channels} this task "
            f"needs {wanted}"
        )
    channels = flags.num_out_channels if inpainting or num_map_classes else flags.num_in_channels
    return guided_unet(options, inpainting=inpainting, num_map_classes=num_map_classes, channels=channels)
