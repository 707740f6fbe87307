"""A plan as tables for people and as numbers for a script.

Each number is labelled: exact (parameters, weights, gradients, averages, moments, checkpoints), estimate (what is kept
for the backward pass, what a preview takes), measured here (time, from a few real steps), or assumed.
"""

from __future__ import annotations

from typing import Any

from latentflow.networks.running import MEMORY_MODES
from latentflow.planning.advice import advice
from latentflow.planning.plan import Plan
from latentflow.planning.units import duration_of, gib
from latentflow.progress import duration
from latentflow.training.finetuning import trained_share
from latentflow.training.student_step import step_cost

EXACT, ESTIMATE, MEASURED, ASSUMED = "exact", "estimate", "measured here", "assumed"


def tables(plan: Plan) -> dict[str, list[tuple[str, str, str]]]:
    """Tables to print, by title: rows of a name, a value, and how it is known."""
    return {"": _run_rows(plan), **_memory_rows(plan), "time": _time_rows(plan), "disk": _disk_rows(plan)}


def numbers(plan: Plan) -> dict[str, Any]:
    """All numbers, for a script: bytes and seconds."""
    memory, disk, machine = plan.memory, plan.disk, plan.machine
    fitting = {mode: memory.largest_micro_batch(mode, machine.memory) for mode in MEMORY_MODES}
    return {
        "recipe": plan.name,
        "assumed": plan.subject.assumed,
        "network": plan.subject.config.network.title,
        "parameters": plan.num_parameters,
        "trained_parameters": trained_share(plan.subject.network)[0],
        "latents": list(plan.subject.config.latent_shape),
        "images": plan.subject.data.num_images,
        "trained_on": plan.subject.num_trained,
        "memorisation": plan.memorisation,
        "steps": plan.recipe.training.steps,
        "batch_size": plan.recipe.training.batch_size,
        "machine": {
            "name": machine.name,
            "memory": machine.memory,
            "precision": machine.precision,
            "processes": machine.num_processes,
        },
        "memory": {
            "exact": dict(memory.exact),
            "estimated": dict(memory.estimated),
            "kept_for_backward": {mode: memory.kept(mode) for mode in MEMORY_MODES},
            "preview": memory.preview,
            "mode": memory.mode,
            "micro_batch_size": memory.micro_batch_size,
            "peak": memory.peak,
            "fits": memory.fits(machine.memory),
            "largest_micro_batch": fitting,
        },
        "time": {
            "forward_flops_per_image": plan.speed.forward_flops,
            "probed": plan.speed.probed,
            "flops_per_second": plan.speed.flops_per_second,
            "seconds_per_step": plan.seconds_per_step,
            "images_per_second": plan.recipe.training.batch_size / plan.seconds_per_step,
            "seconds_per_preview": plan.preview_seconds,
            "seconds": plan.seconds,
        },
        "disk": {
            "checkpoint": disk.checkpoint,
            "checkpoints": disk.num_checkpoints,
            "model": disk.model,
            "averages": disk.averages,
            "averages_kept": disk.averages_kept,
            "cache": disk.cache,
            "previews": disk.previews,
            "run": disk.run,
            "free": disk.free,
        },
        "advice": advice(plan),
    }


def _run_rows(plan: Plan) -> list[tuple[str, str, str]]:
    subject, training, config = plan.subject, plan.recipe.training, plan.subject.config
    data = subject.data
    images = f"{data.num_images:,} images" if data.num_images else "images"
    classes = f", {config.conditioning.num_classes:,} classes" if config.conditioning.num_classes else ""
    maps = f", maps of {config.conditioning.num_map_classes} classes" if config.conditioning.num_map_classes else ""
    shape = " x ".join(map(str, config.latent_shape))
    sizes = " or ".join(size.words for size in config.sizes)
    steps = f"{training.steps:,} steps of {training.batch_size:,} images"
    if subject.num_trained:
        steps += f", {training.steps * training.batch_size / subject.num_trained:,.3g} passes over the data"
        if held_out := data.num_images - subject.num_trained:
            images += f", {held_out:,} of them held out,"
    known = ASSUMED if data.assumed else EXACT
    rows = [
        ("data", f"{images} of {sizes}{classes}{maps}", known),
        ("latents", f"{shape}, by {subject.autoencoder}", ASSUMED if subject.stage.assumed else EXACT),
        ("network", f"{config.network.title}, {plan.num_parameters:,} parameters", EXACT),
        ("training", steps, known if data.num_images else EXACT),
    ]
    if subject.teacher is not None:
        cost = step_cost(config.student, plan.recipe.jumps.every)
        rows.append(("student of", f"{plan.recipe.teacher}; a step takes about {cost:.2g} times one of `train`", EXACT))
    elif plan.recipe.init_from:
        own = plan.recipe.finetuning
        method = own.method if own.rank is None else f"{own.method} of rank {own.rank}"
        trained, _ = trained_share(subject.network)
        rows.append(("begins as", f"{plan.recipe.init_from}, weights {own.weights}", EXACT))
        rows.append(("method", f"{method}: {trained:,} parameters are trained", known))
    machine = plan.machine
    size = f", {gib(machine.memory)}" if machine.memory else ""
    each = f", {machine.num_processes} processes" if machine.num_processes > 1 else ""
    rows.append(
        ("planned for", f"{machine.name}{size}, {machine.precision}{each}", EXACT if machine.here else "as given")
    )
    if plan.memorisation:
        rows.append(("memorisation", plan.memorisation, ESTIMATE))
    if subject.reasons:
        rows.append(("fitted", "; ".join(subject.reasons), ""))
    return rows + [("assumed", line, "") for line in subject.assumed]


def _memory_rows(plan: Plan) -> dict[str, list[tuple[str, str, str]]]:
    memory, machine = plan.memory, plan.machine
    rows = [(name, gib(value), EXACT) for name, value in memory.exact.items()]
    rows += [(name, gib(value), ESTIMATE) for name, value in memory.estimated.items()]
    for mode in MEMORY_MODES:
        largest = memory.largest_micro_batch(mode, machine.memory)
        most = f"; at most {largest:,} images at a time fit" if machine.memory else ""
        mark = " <" if mode == memory.mode else ""
        rows.append((f"kept for backward, {mode}", f"{gib(memory.kept(mode))}{most}{mark}", ESTIMATE))
    if memory.preview:
        rows.append(("drawing a preview", f"{gib(memory.preview)}, without a backward pass", ESTIMATE))
    verdict = "" if machine.memory is None else ": it fits" if memory.fits(machine.memory) else ": it does NOT fit"
    rows.append(("peak", f"{gib(memory.peak)}, with training.memory={memory.mode}{verdict}", ESTIMATE))
    return {f"memory of a process, {memory.micro_batch_size:,} images at a time": rows}


def _time_rows(plan: Plan) -> list[tuple[str, str, str]]:
    speed, training = plan.speed, plan.recipe.training
    how = MEASURED if speed.whole else f"{ESTIMATE} from a part" if speed.measured else ESTIMATE
    rate = training.batch_size / plan.seconds_per_step
    rows = [
        ("network", f"{speed.forward_flops / 1e9:,.4g} GFLOP forward, an image", EXACT),
        ("speed", f"{speed.probed}: {speed.flops_per_second / 1e12:.3g} TFLOP/s", MEASURED if speed.measured else how),
        ("a step", f"{duration_of(plan.seconds_per_step)}, {rate:,.3g} images/s", how),
    ]
    if plan.num_previews:
        each = duration_of(plan.preview_seconds)
        rows.append(("previews", f"{plan.num_previews:,} of {each}, without decoding", ESTIMATE))
    where = " on this machine, not the planned one" if speed.measured and not plan.machine.here else ""
    return [*rows, ("the run", f"{duration(plan.seconds)}{where}", ESTIMATE)]


def _disk_rows(plan: Plan) -> list[tuple[str, str, str]]:
    disk = plan.disk
    rows = [
        ("a checkpoint", f"{gib(disk.checkpoint)}; at most {disk.num_checkpoints} at a time", EXACT),
        ("the model", gib(disk.model), EXACT),
    ]
    if disk.averages_kept:
        rows.append(("snapshots of averages", f"{disk.averages_kept:,} of {gib(disk.averages)}", EXACT))
    if disk.cache is not None:
        known = EXACT if disk.cache_is_here else ASSUMED
        rows.append(("latent cache", gib(disk.cache) + (", exists already" if disk.cache_is_here else ""), known))
    if disk.previews:
        rows.append(("previews", gib(disk.previews), ESTIMATE))
    return [*rows, ("the run", f"{gib(disk.run)} of {gib(disk.free)} free", ESTIMATE)]
