"""One run of `latentflow distill`, completely described, and the rules for what its recipe leaves open:

steps      30,000 on a GPU and 2,000 on a CPU, or a fifth of those of the teacher where that is less; at least 500
batch      256 on a GPU; 2,048 tokens on a CPU, from 16 to 128; at most the number of images
micro      as many images of it together as fit into memory next to the teacher
optimizer  Muon, or AdamW for a network that declares no matrices
rate       of Muon 3e-4 on a GPU and 1e-3 on a CPU, of AdamW 1e-4 and 3e-4, after a warm-up of a twentieth of the steps,
           at most 500
average    over about 1,000 steps in runs of at most 20,000 steps, else over 10,000
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from latentflow.data.cache.resident import Switch
from latentflow.errors import ConfigError
from latentflow.flow.flow_map import JumpTimes
from latentflow.model.config import ModelConfig
from latentflow.model.student_record import MOST_JUMPS
from latentflow.networks.dit import DiTConfig
from latentflow.records import Record
from latentflow.shapes import MOST_GUIDANCE
from latentflow.sizes import Size
from latentflow.training.changes import FREE_IN_EVERY_RUN, ChangeRules
from latentflow.training.config import RECIPES, TrainingConfig, find_recipe
from latentflow.training.fitting import is_set, share_of, with_values
from latentflow.training.memory import (
    bytes_per_image,
    count_parameters,
    micro_batch_that_fits,
    network_in_training,
    state_bytes,
)
from latentflow.training.muon import hidden_matrices
from latentflow.training.optim import OptimizerConfig
from latentflow.training.settings import load_settings

STUDENT_RECIPES = RECIPES / "students"


class StudentData(Record):
    """Where the images come from; what is read with them follows from the teacher."""

    path: str = Field("", description="A latent cache, or images: those of the teacher, or others of its classes.")
    flip: Switch = Field("auto", description="Flip images at random; auto: if a latent cache holds flipped ones.")
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


class StudentSampling(Record):
    """How the student is sampled by default."""

    evaluations: int = Field(4, ge=1, le=MOST_JUMPS, description="Network calls per image.")
    guidance: float | None = Field(
        None, ge=1, le=MOST_GUIDANCE, description="Guidance scale; null: that of the teacher's preset."
    )


class StudentRecipe(Record):
    """Everything `latentflow distill` needs to know."""

    description: str = Field("", description="One line, shown by `latentflow recipes`.")
    out: str = Field("", description="The run folder; empty: runs/NAME_student, with the NAME of the teacher.")
    teacher: str = Field("", description="The model to distil: a model folder, a run folder or a hub id.")
    fit: bool = Field(
        False, description="Choose batch size, steps and learning rate by teacher, data and machine, where not set."
    )
    data: StudentData = StudentData()
    jumps: JumpTimes = JumpTimes()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: StudentSampling = StudentSampling()

    @model_validator(mode="after")
    def _check(self) -> StudentRecipe:
        if self.training.is_aligned:
            raise ConfigError(
                f"training.align_weight = {self.training.align_weight:g} is for training from images; a student learns "
                "from its teacher, so leave it out"
            )
        return self


_OTHER = "the student has learned with the old one"
CHANGES = ChangeRules(
    free=(
        "description",
        "out",
        "teacher",  # its weights are compared
        "data.path",  # its content is compared
        *FREE_IN_EVERY_RUN,
    ),
    fixed={
        "training.ema_lengths": "an average has to begin with the run",
        "optimizer.kind": "checkpoints hold the state of the old one",
        "optimizer.orthogonalise_every": "checkpoints hold the state of the old one",
        "jumps.every": _OTHER,
    },
)
"""What may change in a run of `latentflow distill`."""

FITTED = (
    "training.steps",
    "training.batch_size",
    "training.micro_batch_size",
    "training.ema_decay",
    "training.checkpoint_every",
    "training.preview_every",
    "optimizer.kind",
    "optimizer.learning_rate",
    "optimizer.betas",
    "optimizer.warmup_steps",
)
"""Keys that are fitted if a recipe leaves them open."""


def load_student_recipe(name_or_file: str | Path, overrides: Sequence[str] = ()) -> StudentRecipe:
    """A named recipe or a YAML file, with `key=value` overrides applied.

    Raises:
        ConfigError: no such recipe; a key or value that does not exist or fit (the nearest key is named).
    """
    return load_settings(StudentRecipe, find_recipe(name_or_file, STUDENT_RECIPES), overrides)


def fit_student(
    recipe: StudentRecipe,
    teacher: ModelConfig,
    num_images: int,
    *,
    gpu: bool,
    memory: int | None = None,
    num_processes: int = 1,
) -> StudentRecipe:
    """The recipe with everything decided, by the rules at the top of this file.

    Args:
        gpu: whether it is trained on GPUs, in half precision.
        memory: bytes that each process may take; None: unknown.
    """
    steps = recipe.training.steps
    if not is_set(recipe, "training.steps"):
        most = 30_000 if gpu else 2000
        steps = min(most, max(teacher.training.step // 5, 500)) if teacher.training.step else most
    every = max(min(5000 if gpu else 500, steps // 4), 1)
    kind = recipe.optimizer.kind
    if not is_set(recipe, "optimizer.kind"):
        kind = "muon" if hidden_matrices(network_in_training(teacher)) else "adamw"
    rates = {"muon": (1e-3, 3e-4), "adamw": (3e-4, 1e-4)}
    together = recipe.jumps.every * num_processes
    batch = max(_batch(teacher, num_images, gpu=gpu) // together, 1) * together
    share = share_of(recipe, batch, num_processes)
    fitted = {
        "training.steps": steps,
        "training.batch_size": batch,
        "training.micro_batch_size": _micro_batch(recipe, teacher, share, memory, half=gpu),
        "training.ema_decay": 0.9999 if steps > 20_000 else 0.999,
        "training.checkpoint_every": every,
        "training.preview_every": every,
        "optimizer.kind": kind,
        "optimizer.learning_rate": rates[kind][gpu],
        "optimizer.betas": (0.9, 0.99),
        "optimizer.warmup_steps": min(500, steps // 20),
    }
    return with_values(recipe, {"fit": False, **{key: fitted[key] for key in FITTED if not is_set(recipe, key)}})


def _micro_batch(
    recipe: StudentRecipe, teacher: ModelConfig, share: int, memory: int | None, *, half: bool
) -> int | None:
    """Images of a process's share that are computed together; None: all of them."""
    # the weights of the teacher take as much memory as an average does
    averages = recipe.training.num_averages + 1
    state = state_bytes(count_parameters(teacher), half=half, averages=averages)
    per_image = bytes_per_image(teacher.network, Size(*teacher.latent_shape[1:]), half=half)
    micro = micro_batch_that_fits(state, per_image, share, memory, recipe.jumps.every)
    return micro if 0 < micro < share else None


def _batch(teacher: ModelConfig, num_images: int, *, gpu: bool) -> int:
    network = teacher.network
    wanted = 256
    if not gpu:
        tokens = teacher.image_size.over(teacher.autoencoder.factor * network.size_multiple).area
        wanted = max(min(2048 // tokens, 128), 16) if isinstance(network, DiTConfig) else 32
    return min(wanted, 1 << (max(num_images, 1).bit_length() - 1))
