"""One training run, completely described: the recipe.

What a recipe leaves open is decided before the first step, and saved in the run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from latentflow.columns import MOST_COLUMNS
from latentflow.data.cache.resident import Switch
from latentflow.data.hold_out import HeldOutShare
from latentflow.data.painting.input_rules import InputRules
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.pixel_choice import EIGHT_BIT_RGB, PixelChoice
from latentflow.data.table_options import TableOptions
from latentflow.errors import ConfigError, nearest
from latentflow.flow.path import LinearPath, PathConfig
from latentflow.flow.times import TrainingTimes
from latentflow.model.config import SamplingPreset
from latentflow.model.snapshots import step_of_share
from latentflow.networks.dit import DiTConfig
from latentflow.networks.velocity_network import NetworkConfig
from latentflow.records import Record
from latentflow.runtime import PrecisionWord
from latentflow.sizes import ImageSize, Size, bounded
from latentflow.training.changes import FREE_IN_EVERY_RUN, ChangeRules
from latentflow.training.optim import OptimizerConfig
from latentflow.training.request import LONGEST
from latentflow.training.settings import load_settings
from latentflow.training.trackers import TrackerName

RECIPES = Path(__file__).parent.parent / "recipes"


MOST_STEPS = 10**9
LARGEST_IMAGE = 8192
LARGEST_SEED = 2**63 - 1


class DataConfig(PixelChoice, TableOptions):
    """Where the images come from."""

    path: str = Field("", description="A latent cache, or images: whatever `latentflow encode` reads.")
    images: str = Field(
        "",
        description="For inpainting from a latent cache: the images it was made from, to cut new holes in every step; "
        "empty: use the holes stored in the cache.",
    )
    masks: MaskRules = Field(MaskRules(), description="Holes for inpainting; those in a latent cache take precedence.")
    inputs: InputRules = Field(
        InputRules(), description="Paired inputs, for conditioning.input; not set: those of the latent cache."
    )
    image_size: Annotated[ImageSize, bounded(1, LARGEST_IMAGE)] = Field(
        Size(256, 256),
        description="Size of the images in pixels: 256 for squares, or WIDTHxHEIGHT, like 192x128; not set: that of "
        "the latent cache.",
    )
    flip: bool = Field(True, description="Flip images at random; not set: if the latent cache holds flipped ones.")
    augment: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of images seen as one of their variants in the latent cache (`encode --variants`), whose "
        "numbers the network gets; not set: 0.5 if the cache holds variants.",
    )
    labels: bool = Field(True, description="Use the classes of the data as labels; false: train unconditionally.")
    held_out: HeldOutShare = Field(
        "auto",
        description="Share of images that are never trained on, chosen by their names; auto: 5 %, at least 64 of 640 "
        "images or more, a tenth of fewer, none of fewer than 80; 0: none.",
    )
    num_workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description="Worker processes that read ahead; null: automatic, none on a CPU and for a resident cache.",
    )
    resident: Switch = Field(
        "auto",
        description="Keep a latent cache in the memory of the training device; auto: if it takes at most a third of "
        "the free memory on a GPU, a quarter on a CPU.",
    )


class ConditioningConfig(Record):
    """The conditions of the model, and their dropout, which classifier-free guidance needs (arXiv 2207.12598)."""

    label_dropout: float = Field(0.1, ge=0, lt=1, description="Fraction of labels dropped; 0: no guidance on labels.")
    inpainting: bool = Field(False, description="Condition on the known part of an image and a mask.")
    inpainting_dropout: float = Field(0.1, ge=0, lt=1, description="Fraction of images that are all hole.")
    semantic_map: bool = Field(False, description="Condition on the semantic map, which the data must have.")
    map_dropout: float = Field(0.1, ge=0, lt=1, description="Fraction of maps dropped; 0: no guidance on maps.")
    input: bool = Field(False, description="Condition on a paired image (data.inputs), to draw images from images.")
    input_dropout: float = Field(0.1, ge=0, lt=1, description="Fraction of inputs dropped; 0: no guidance on inputs.")
    columns: list[str] | None = Field(
        None,
        max_length=MOST_COLUMNS,
        description="Named columns of the data to condition on, each as NAME or as NAME:DROPOUT; null: all; []: none.",
    )
    column_dropout: float = Field(
        0.1, ge=0, lt=1, description="Fraction dropped of each of these columns; 0: no guidance on them."
    )


class TrainingConfig(Record):
    """How long, how fast, and how carefully."""

    steps: int = Field(100_000, ge=1, le=MOST_STEPS, description="Optimizer steps.")
    batch_size: int = Field(64, ge=1, le=2**20, description="Images per optimizer step, over all processes.")
    micro_batch_size: int | None = Field(
        None, ge=1, le=2**20, description="Images per forward pass of a process; null: no accumulation."
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of weights, data order and all random numbers.")
    precision: PrecisionWord = Field(
        "auto",
        description="What networks compute in: fp32, tf32, bf16, fp16, or auto: bf16 on a GPU that has it, else fp32.",
    )
    memory: Literal["auto", "none", "recompute-cheap", "checkpoint"] = Field(
        "auto",
        description="What the backward pass recomputes to save memory, with the same results: none; recompute-cheap: "
        "all but products and attention; checkpoint: every block, a third more time; auto: as little as fits.",
    )
    align_weight: float = Field(
        0.0,
        ge=0,
        le=1e3,
        description="Weight of the loss of a head that predicts the clean latents from the tokens of an early block "
        "(SRA 2, arXiv 2601.17830, which has 1); the head exists in training only, for a DiT; 0: no head.",
    )
    align_block: int = Field(
        2,
        ge=1,
        le=512,
        description="Block after which it reads the tokens; SRA 2 has 2 for DiT-B, 8 for L and XL.",
    )
    compile: Switch = Field(
        "auto", description="Compile the network's blocks (torch.compile); auto: on CUDA, if the run takes minutes."
    )
    cuda_graph: Switch = Field(
        "auto",
        description="Launch the kernels of a step together, as one CUDA graph; auto: where a small network waits for "
        "its kernels to be launched.",
    )
    ema_decay: float = Field(
        0.9999, ge=0, lt=1, description="Decay of the weight average used for sampling; 0: no averaging."
    )
    ema_lengths: list[Annotated[float, Field(ge=0.005, le=LONGEST)]] | None = Field(
        None,
        min_length=1,
        max_length=4,
        description="Lengths of power function averages that are kept next to it, from which `latentflow ema` makes an "
        "average of another length after training; [0.05, 0.1] is usual; null: none.",
    )
    ema_snapshots: int = Field(
        16, ge=1, le=256, description="How many snapshots of these averages are kept, at even distances of steps."
    )
    log_every: int = Field(50, ge=1, le=MOST_STEPS, description="Steps between lines of metrics.jsonl.")
    checkpoint_every: int = Field(1000, ge=1, le=MOST_STEPS, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, le=MOST_STEPS, description="How many of the newest checkpoints to keep.")
    keep_every: int | None = Field(
        None,
        ge=1,
        le=MOST_STEPS,
        description="Steps between milestones: checkpoints that are kept, with a model to sample from; null: none.",
    )
    keep_at: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.0625, 0.125],
        max_length=100,
        description="Shares of the steps at which a model is kept, as a guide for sampling (RUN@1/8); []: none.",
    )
    preview_every: int = Field(1000, ge=0, le=MOST_STEPS, description="Steps between preview grids; 0: none.")
    track: TrackerName | None = Field(
        None,
        description="Where the numbers of metrics.jsonl go as well: tensorboard, wandb (Weights & Biases), trackio or "
        "mlflow; null: tensorboard where it is installed.",
    )

    @field_validator("ema_lengths")
    @classmethod
    def _refuse_equal(cls, lengths: list[float] | None) -> list[float] | None:
        if len(set(lengths or ())) < len(lengths or ()):
            raise ValueError("give each length once")
        return lengths

    @property
    def num_averages(self) -> int:
        """Averages of the weights that training keeps in memory, the exponential one among them."""
        return 1 + len(self.ema_lengths or ())

    @property
    def is_aligned(self) -> bool:
        """Whether the network is trained with an `AlignHead`."""
        return self.align_weight > 0

    @property
    def kept_at(self) -> tuple[int, ...]:
        """The steps of `keep_at`, rising."""
        return tuple(sorted({step_of_share(share, self.steps) for share in self.keep_at} - {0}))

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` steps, if the run does not end there."""
        is_multiple = any(every is not None and step % every == 0 for every in (self.checkpoint_every, self.keep_every))
        return is_multiple or step in self.kept_at or self.keeps_averages(step)

    def keeps_averages(self, step: int) -> bool:
        """Whether the averages after `step` steps are kept: one of `averages_at`."""
        number, steps = self.ema_snapshots, self.steps
        return self.ema_lengths is not None and step * number // steps > (step - 1) * number // steps

    @property
    def averages_at(self) -> list[int]:
        """The steps whose averages are kept: the ends of `ema_snapshots` equal parts of the run, rounded up."""
        if self.ema_lengths is None:
            return []
        return sorted({-(-part * self.steps // self.ema_snapshots) for part in range(1, self.ema_snapshots + 1)})


class FinetuningConfig(Record):
    """How a model that begins with the weights of another one, `init_from`, is trained."""

    method: Literal["auto", "full", "lora", "biases"] = Field(
        "auto",
        description="What is trained besides the vectors of new classes and conditions: full: all weights; lora: a "
        "difference of low rank for each matrix (arXiv 2106.09685); biases: only biases (BitFit, arXiv 2106.10199); "
        "auto: lora below 500 images, else full.",
    )
    rank: int | None = Field(None, ge=1, le=1024, description="Rank of the differences of lora; null: 16.")
    class_from: list[str] = Field(
        [],
        max_length=1_000_000,
        description="Classes that begin as a class of the source, each as new=Old; other new ones begin with the mean "
        "of the old ones.",
    )
    weights: Annotated[str, Field(pattern="^([0-9a-f]{12})?$")] = Field(
        "", description="The first digits of the SHA-256 of the source's weights; empty: any. A run writes them down."
    )

    @field_validator("class_from")
    @classmethod
    def _refuse_doubtful(cls, given: list[str]) -> list[str]:
        known: set[str] = set()
        for one in given:
            new, equals, old = map(str.strip, one.partition("="))
            if not (new and equals and old):
                raise ValueError(f"{one!r} is not of the form new=Old, for example corgi=Pembroke")
            if new in known:
                raise ValueError(f"{new} is given twice; give it once")
            known.add(new)
        return given

    @model_validator(mode="after")
    def _check(self) -> FinetuningConfig:
        if self.rank is not None and self.method in ("full", "biases"):
            raise ConfigError(
                f"finetuning.rank = {self.rank} is for lora, and finetuning.method = {self.method}; add "
                "finetuning.method=lora, or leave the rank out"
            )
        return self

    @property
    def former_classes(self) -> dict[str, str]:
        """The new classes of `class_from`, each with the class of the source that it begins as."""
        return {new.strip(): old.strip() for new, _, old in (one.partition("=") for one in self.class_from)}


class Recipe(Record):
    """Everything `latentflow train` needs to know."""

    description: str = Field("", description="One line, shown by `latentflow recipes`.")
    out: str = Field("", description="The run folder; empty: runs/NAME of the recipe.")
    fit: bool = Field(
        False, description="Choose network, batch size, steps and learning rate by data and machine, where not set."
    )
    data: DataConfig = DataConfig()
    init_from: str = Field(
        "",
        description="A model to begin with: a model folder, a run folder or a hub id. It decides network, path and "
        "latent scaling, and what is not set of conditioning and sampling; empty: random weights.",
    )
    finetuning: FinetuningConfig = FinetuningConfig()
    autoencoder: str = Field(
        "stabilityai/sd-vae-ft-mse",
        description="A folder, a hub id, or 'shapes', the built-in one; not set: that of the latent cache.",
    )
    normalise: Literal["autoencoder", "per_channel", "source"] = Field(
        "autoencoder",
        description="Latent scaling: that of the autoencoder's config, zero mean and unit variance per channel, or "
        "that of init_from, which is the only one with it.",
    )
    network: NetworkConfig = DiTConfig(name="DiT-S/2")
    path: PathConfig = LinearPath()
    times: TrainingTimes = TrainingTimes()
    conditioning: ConditioningConfig = ConditioningConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingPreset = SamplingPreset()

    @model_validator(mode="before")
    @classmethod
    def _refuse_former_keys(cls, given: Any) -> Any:
        """Name the new place of a key that has moved; the defaults in old run folders are still read."""
        network = given.get("network") if isinstance(given, dict) else None
        if isinstance(network, dict) and str(network.get("gradient_checkpointing", False)).lower() != "false":
            raise ConfigError("network.gradient_checkpointing has moved: write training.memory=checkpoint")
        return given

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if not self.init_from and self.finetuning != FinetuningConfig():
            raise ConfigError(
                "finetuning is about a model to begin with, and init_from is not set; add init_from=MODEL, or leave it "
                "out"
            )
        return self


_OTHER_STATE = "checkpoints hold the state of the old one"
_OTHER_DATA = "the model would train on other images than before"
CHANGES = ChangeRules(
    free=(
        "description",
        "out",
        "data.path",  # its content is compared
        "autoencoder",  # likewise
        "init_from",  # likewise
        *FREE_IN_EVERY_RUN,
    ),
    fixed={
        "finetuning": "it decides the weights that the run began with, and which of them it trains",
        "network": "its weights would not fit",
        "path": "the network has learned the velocities of the old one",
        "conditioning": "the network was trained with the old conditions",
        "normalise": "the network was trained on latents of the old scale",
        "training.ema_lengths": "an average has to begin with the run",
        "optimizer.kind": _OTHER_STATE,
        "optimizer.orthogonalise_every": _OTHER_STATE,
        "training.align_weight": "its head is trained from the first step on",
        "training.align_block": "its head has learned from the tokens of the old block",
        "data.image_size": _OTHER_DATA,
        "data.augment": _OTHER_DATA,
        "data.labels": _OTHER_DATA,
        "data.held_out": _OTHER_DATA,
        "data.images": _OTHER_DATA,
        "data.masks": _OTHER_DATA,
        "data.inputs": _OTHER_DATA,
        **dict.fromkeys(EIGHT_BIT_RGB, _OTHER_DATA),
    },
    former={"data.held_out": 0.0, **EIGHT_BIT_RGB},
)
"""What may change in a run of `latentflow train`."""


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Names of the recipes that come with the package, by default those of `latentflow train`."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def find_recipe(name_or_file: str | Path, folder: Path = RECIPES) -> Path:
    """The YAML file of a recipe in `folder`, given by name, or of one's own.

    Raises:
        ConfigError: no such recipe; the nearest name is given.
    """
    names, given = recipe_names(folder), str(name_or_file)
    if given in names:
        return folder / f"{given}.yaml"
    if not _is_file(name_or_file):
        raise ConfigError(f"no recipe {given!r}, neither by that name nor as a file; {nearest(given, names)}")
    return Path(name_or_file)


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def load_recipe(name_or_file: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A named recipe or a YAML file, with `key=value` overrides applied.

    Raises:
        ConfigError: no such recipe; a key or value that does not exist or fit (the nearest key is named).
    """
    return load_settings(Recipe, find_recipe(name_or_file), overrides)
