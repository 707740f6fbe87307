"""`latentflow plan`: what a training run will take, before it begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from latentflow.planning.estimate import Memory, estimate_disk, estimate_memory
from latentflow.planning.machine import machine_for
from latentflow.planning.plan import Plan
from latentflow.planning.planned_run import PlannedRun, plan_subject
from latentflow.planning.planned_student import plan_student
from latentflow.planning.probe import Speed, probe, seconds_of_orthogonalisation, stated_speed
from latentflow.planning.request import PlanRequest
from latentflow.runtime import Runtime
from latentflow.training.compiling import compiles
from latentflow.training.config import Recipe, find_recipe, load_recipe, recipe_names
from latentflow.training.loop import micro_batches
from latentflow.training.memory import count_parameters, forward_flops, total_memory
from latentflow.training.plain_yaml import read_yaml
from latentflow.training.student_recipe import STUDENT_RECIPES, StudentRecipe, load_student_recipe
from latentflow.training.student_run import require_jumps
from latentflow.training.student_step import calls_without_gradient

_PROBE_SECONDS = 3.0


def recipe_to_plan(name_or_file: str | Path, overrides: Sequence[str] = ()) -> Recipe | StudentRecipe:
    """A recipe of a velocity network, or of a student: by its name, or by the keys that only students have.

    Raises:
        ConfigError: no such recipe; a key or value that does not exist or fit (the nearest key is named).
    """
    if str(name_or_file) in recipe_names(STUDENT_RECIPES):
        return load_student_recipe(name_or_file, overrides)
    file = find_recipe(name_or_file)
    keys = {*read_yaml(file), *(re.split("[.=]", override)[0].strip() for override in overrides)}
    load = load_student_recipe if keys & {"teacher", "jumps"} else load_recipe
    return load(file, overrides)


def plan(recipe: Recipe | StudentRecipe, name: str, request: PlanRequest, runtime: Runtime) -> Plan:
    """What training a recipe will take. Nothing is written, and nothing is downloaded.

    Args:
        recipe: of a velocity network, or of a student.
        name: of the recipe.
        request: another machine, and facts about data that are not here.
        runtime: where the speed is measured.

    Raises:
        ConfigError, DataError, ArtifactError: see `plan_subject` and `plan_student`; also if the batch cannot be
            shared evenly.
    """
    processes, elsewhere = request.processes or runtime.world, request.device_memory is not None
    runtime = runtime.with_precision("auto" if elsewhere else recipe.training.precision)
    machine = machine_for(recipe, runtime, request.device_memory, processes)
    is_student = isinstance(recipe, StudentRecipe)
    subject = plan_student(recipe, machine, request) if is_student else plan_subject(recipe, name, machine, request)
    parts = micro_batches(subject.recipe.training, replace(runtime, world=processes))
    if is_student:
        require_jumps(subject.recipe, parts)
    aligned = subject.recipe.training.is_aligned
    memory = estimate_memory(subject, machine, share=parts.size * parts.number, micro=parts.size)
    if request.device_tflops is not None:
        network, optimizer = subject.built(subject.config), subject.recipe.optimizer
        speed = stated_speed(subject.config, network, 1e12 * request.device_tflops, memory.mode, optimizer)
    elif machine.here:
        speed = _measured(subject, memory, parts.size, runtime)
    else:
        this = machine_for(recipe, runtime, None, 1)
        here = estimate_memory(subject, this, share=parts.size, micro=subject.multiple)
        speed = _measured(subject, here, parts.size, runtime)
    if aligned:  # the time of the head, by its operations
        slower = forward_flops(subject.config, aligned=True) / speed.forward_flops
        speed = replace(speed, seconds_per_image=slower * speed.seconds_per_image)
    if is_student:
        more = calls_without_gradient(subject.config.student, subject.recipe.jumps.every) * speed.seconds_per_forward
        speed = replace(speed, seconds_per_image=speed.seconds_per_image + more)
    num_parameters = count_parameters(subject.config)
    return Plan(name, subject, machine, num_parameters, memory, estimate_disk(subject), speed)


def _measured(subject: PlannedRun, memory: Memory, most: int, runtime: Runtime) -> Speed:
    """The speed of a few steps on this machine, with as many images together as fit, and at most so many."""
    fitting = memory.largest_micro_batch(memory.mode, total_memory(runtime.device))
    training = subject.recipe.training
    num_images = training.steps * training.batch_size
    is_compiled = runtime.device.type == "cuda" and compiles(training.compile, subject.config, num_images, runtime)
    speed = probe(
        subject.config,
        runtime,
        images=min(most, max(fitting, 1)),
        seconds=_PROBE_SECONDS,
        mode=memory.mode,
        compiled=is_compiled,
        ema_lengths=training.ema_lengths or (),
        build=subject.built,
    )
    more = seconds_of_orthogonalisation(subject.config, subject.recipe.optimizer, runtime)
    return replace(speed, seconds_per_update=speed.seconds_per_update + more)
