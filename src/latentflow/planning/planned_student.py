"""What a recipe of `latentflow distill` would train: all but the number of images follows from the teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from latentflow.data.cache.reader import LatentCache
from latentflow.errors import ConfigError
from latentflow.model.config import AUTOENCODER_FOLDER, ModelConfig
from latentflow.model.flow_model import folders_of
from latentflow.model.own_images import is_own, rows_of_split
from latentflow.planning.machine import Machine
from latentflow.planning.planned_run import KNOWN_STAGES, DataFacts, PlannedRun, StageFacts, stage_here
from latentflow.planning.request import PlanRequest
from latentflow.training.held_out import open_data
from latentflow.training.student_recipe import StudentRecipe, fit_student
from latentflow.training.student_run import student_config, teacher_config, with_flips

_NO_HASH = "0" * 64


def plan_student(recipe: StudentRecipe, machine: Machine, request: PlanRequest) -> PlannedRun:
    """Find out what a recipe would train. No weights are read.

    Args:
        machine: what a recipe that is to be fitted is fitted to.
        request: the number of images, where the data are not here.

    Raises:
        ConfigError: the teacher has no student, the data are not such as it was trained on, or the request says what
            the teacher decides.
        DataError, ArtifactError: what is there is damaged, or there is no such teacher.
    """
    for name in ("classes", "latents"):
        if getattr(request, name) is not None:
            raise ConfigError(f"--{name}: those of a student are those of its teacher; leave it out")
    teacher = teacher_config(recipe)
    recipe = with_flips(recipe)
    data = _data(recipe.data.path, teacher, request.images)
    if recipe.fit:
        given = {"gpu": machine.gpu, "memory": machine.memory, "num_processes": machine.num_processes}
        recipe = fit_student(recipe, teacher, data.num_images - data.num_held_out, **given)
    config = student_config(recipe, teacher, _NO_HASH, teacher.training)
    return PlannedRun(recipe, config, data, _stage(recipe.teacher, teacher), teacher=teacher)


def _data(path: str, teacher: ModelConfig, num_images: int | None) -> DataFacts:
    """The images of a student; if they are not here, as many as its teacher was trained on."""
    training, conditioning = teacher.training, teacher.conditioning
    facts = DataFacts(None, conditioning.num_classes, conditioning.num_map_classes)
    if path.startswith("synthetic:") or (path and Path(path).exists()):
        source = open_data(teacher, path)
        number = len(source)
        if isinstance(source, LatentCache):
            source.require_autoencoder(teacher.autoencoder)
            own = training.held_out is not None and is_own(training, source)
            num_held_out = len(rows_of_split(training, source, "held-out")) if own else 0
            num_bytes = sum(shard.num_bytes for shard in source.index.shards)
            found = {"num_images": number, "num_held_out": num_held_out}
            return replace(facts, **found, cache=source.plan, num_bytes=num_bytes)
        # as many as the teacher was trained with are its own: to compare them, all of them would have to be read
        held_out = training.held_out.num_images if training.held_out else 0
        return replace(
            facts, num_images=number, num_held_out=held_out if number == training.num_images + held_out else 0
        )
    number = num_images or training.num_images
    why = f"{path} is not there" if path else "data.path is not set"
    return replace(facts, num_images=number, assumed=f"{why}: {number:,} images; change with --images")


def _stage(name: str, teacher: ModelConfig) -> StageFacts:
    """The autoencoder of the teacher."""
    own = teacher.autoencoder
    is_inside = own.reference == AUTOENCODER_FOLDER
    reference = str(folders_of(name)[0] / AUTOENCODER_FOLDER) if is_inside else own.reference
    known = KNOWN_STAGES.get(reference, StageFacts(own.factor, own.num_channels, 2 * own.num_channels))
    return stage_here(reference) or known
