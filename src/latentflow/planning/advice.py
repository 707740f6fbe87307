"""Changes of a recipe with which its run would fit into memory and on the disk."""

from __future__ import annotations

from latentflow.networks.dit import NAMES, SIZES, DiTConfig
from latentflow.networks.running import MEMORY_MODES
from latentflow.planning.estimate import estimate_memory
from latentflow.planning.plan import Plan
from latentflow.planning.planned_run import PlannedRun
from latentflow.planning.units import gib
from latentflow.training.fitting import with_values


def advice(plan: Plan) -> list[str]:
    """What would make the run fit, a line each; empty if it fits."""
    return [*_memory_advice(plan), *_disk_advice(plan)]


def _memory_advice(plan: Plan) -> list[str]:
    memory, machine = plan.memory, plan.machine
    lines = [] if memory.previews_fit(machine.memory) else ["previews would not fit; add training.preview_every=0"]
    if memory.largest_micro_batch(memory.mode, machine.memory) >= memory.micro_batch_size:
        return lines
    fitting = {mode: memory.largest_micro_batch(mode, machine.memory) for mode in MEMORY_MODES}
    for mode, largest in fitting.items():
        if largest:
            words = [f"training.memory={mode}"] if mode != memory.mode else []
            words += [f"training.micro_batch_size={largest}"] if largest < memory.micro_batch_size else []
            lines.append(f"{' '.join(words)} would fit")
    if not any(fitting.values()):
        needed = gib(memory.fixed + memory.multiple * memory.kept_per_image["checkpoint"])
        fewest = "one image at a time fits" if memory.multiple == 1 else f"{memory.multiple} images at a time fit"
        lines.append(f"not even {fewest}: it takes about {needed}")
        lines += [smaller] if (smaller := _smaller(plan)) else []
    return lines


def _smaller(plan: Plan) -> str | None:
    """The largest published transformer with the same patch size that fits."""
    network = plan.subject.config.network
    if plan.subject.teacher is not None:
        return "distil a smaller model"
    if plan.recipe.init_from:
        fewer = "finetuning.method=lora or biases train few weights; or " if not plan.recipe.finetuning.rank else ""
        return f"{fewer}begin with a smaller model"
    if not isinstance(network, DiTConfig):
        return "reduce network.channels or the image size"
    for size in reversed(SIZES):
        name = f"DiT-{size}/{network.patch_size}"
        if name not in NAMES or SIZES[size]["hidden_size"] >= network.hidden_size:
            continue
        chosen = DiTConfig(name=name, variant=network.variant, value_residual=network.value_residual)
        config = plan.subject.config.model_copy(update={"network": chosen})
        recipe = with_values(plan.recipe, {"network": chosen})
        subject = PlannedRun(recipe, config, plan.subject.data, plan.subject.stage)
        memory = estimate_memory(subject, plan.machine, share=plan.memory.share, micro=plan.memory.micro_batch_size)
        if largest := memory.largest_micro_batch(memory.mode, plan.machine.memory):
            return f"network.name={name} would fit, {largest} images at a time"
    return None


def _disk_advice(plan: Plan) -> list[str]:
    disk = plan.disk
    needed = disk.run + (0 if disk.cache_is_here else disk.cache or 0)
    if needed <= disk.free:
        return []
    return [f"{gib(disk.free)} of disk space are free, and {gib(needed)} are needed; set out=... to another disk"]
