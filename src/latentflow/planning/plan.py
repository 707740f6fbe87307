"""The plan of a training run: memory, disk space and time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from latentflow.flow.solvers import expected_evaluations, is_adaptive
from latentflow.planning.estimate import Disk, Memory, preview_of
from latentflow.planning.machine import Machine
from latentflow.planning.planned_run import PlannedRun
from latentflow.planning.probe import Speed
from latentflow.training.config import Recipe
from latentflow.training.memorisation_onset import memorisation_warning
from latentflow.training.student_recipe import StudentRecipe


@dataclass(frozen=True)
class Plan:
    """What a run takes."""

    name: str
    subject: PlannedRun
    machine: Machine
    num_parameters: int
    memory: Memory
    disk: Disk
    speed: Speed

    @property
    def recipe(self) -> Recipe | StudentRecipe:
        return self.subject.recipe

    @property
    def memorisation(self) -> str:
        """A warning of copies of training images, if the run takes many steps for its images; else "".

        A student learns from its teacher, in as many steps as it takes.
        """
        if self.subject.teacher is not None:
            return ""
        return memorisation_warning(self.recipe.training.steps, self.subject.num_trained or 0)

    @property
    def seconds_per_step(self) -> float:
        return self.memory.share * self.speed.seconds_per_image + self.speed.seconds_per_update

    @property
    def num_previews(self) -> int:
        every = self.recipe.training.preview_every
        return -(-self.recipe.training.steps // every) if every else 0

    @cached_property
    def preview_seconds(self) -> float:
        """Time of one preview, shared by the processes, without decoding."""
        request = preview_of(self.subject)
        preset, num_images = request.sampling, -(-len(request.seeds) // self.machine.num_processes)
        tolerance = preset.rtol if is_adaptive(preset.solver) else 1.0
        doubled = preset.guidance != 1 and self.subject.teacher is None  # a student has the scale as an input
        calls = expected_evaluations(preset.solver, preset.steps, tolerance) * (2 if doubled else 1)
        return calls * num_images * self.speed.seconds_per_forward

    @property
    def seconds(self) -> float:
        """Time of the run, without saving."""
        return self.recipe.training.steps * self.seconds_per_step + self.num_previews * self.preview_seconds
