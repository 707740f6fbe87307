"""`latentflow plan`: what a training run will take, before it begins."""

from __future__ import annotations

from dataclasses import replace

from latentflow.planning.estimate import Memory, estimate_disk, estimate_memory
from latentflow.planning.machine import machine_for
from latentflow.planning.plan import Plan
from latentflow.planning.planned_run import PlannedRun, plan_subject
from latentflow.planning.probe import Speed, probe, seconds_of_orthogonalisation, stated_speed
from latentflow.planning.request import PlanRequest
from latentflow.runtime import Runtime
from latentflow.training.compiling import compiles
from latentflow.training.config import Recipe
from latentflow.training.loop import micro_batches
from latentflow.training.memory import count_parameters, forward_flops, total_memory

_PROBE_SECONDS = 3.0


def plan(recipe: Recipe, name: str, request: PlanRequest, runtime: Runtime) -> Plan:
    """What training a recipe will take. Nothing is written, and nothing is downloaded.

    Args:
        name: of the recipe.
        request: another machine, and facts about data that are not here.
        runtime: where the speed is measured.

    Raises:
        ConfigError, DataError, ArtifactError: see `plan_subject`; also if the batch cannot be shared evenly.
    """
    processes, elsewhere = request.processes or runtime.world, request.device_memory is not None
    runtime = runtime.with_precision("auto" if elsewhere else recipe.training.precision)
    machine = machine_for(recipe, runtime, request.device_memory, processes)
    subject = plan_subject(recipe, name, machine, request)
    parts = micro_batches(subject.recipe.training, replace(runtime, world=processes))
    aligned = subject.recipe.training.is_aligned
    memory = estimate_memory(subject, machine, share=parts.size * parts.number, micro=parts.size)
    if request.device_tflops is not None:
        speed = stated_speed(subject.config, 1e12 * request.device_tflops, memory.mode, subject.recipe.optimizer)
    elif machine.here:
        speed = _measured(subject, memory, parts.size, runtime)
    else:
        this = machine_for(recipe, runtime, None, 1)
        here = estimate_memory(subject, this, share=parts.size, micro=1)
        speed = _measured(subject, here, parts.size, runtime)
    if aligned:  # the time of the head, by its operations
        slower = forward_flops(subject.config, aligned=True) / speed.forward_flops
        speed = replace(speed, seconds_per_image=slower * speed.seconds_per_image)
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
    )
    more = seconds_of_orthogonalisation(subject.config, subject.recipe.optimizer, runtime)
    return replace(speed, seconds_per_update=speed.seconds_per_update + more)
