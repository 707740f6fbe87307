"""A run of `latentflow distill`: it is decided and checked, and the student is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from latentflow.console import notice
from latentflow.data.batches import TrainingImages
from latentflow.data.cache.reader import LatentCache, is_cache
from latentflow.errors import ConfigError
from latentflow.flow.solvers import JUMPS
from latentflow.model.config import ModelConfig, SamplingPreset, TrainingRecord
from latentflow.model.flow_model import CONFIG_FILE, FlowModel, config_of, folders_of, read_config
from latentflow.model.own_images import is_own
from latentflow.model.snapshots import BEST
from latentflow.model.student_record import StudentRecord
from latentflow.networks.running import compile_blocks, restore_blocks, set_memory
from latentflow.networks.velocity_network import NETWORKS
from latentflow.randomness import derive_seed
from latentflow.runtime import Runtime
from latentflow.shapes import MOST_GUIDANCE
from latentflow.sizes import Size
from latentflow.training.changes import RECIPE_FILE, as_begun, check_changes, trained_steps
from latentflow.training.checkpoint import Keeping
from latentflow.training.compiling import captures, compiles
from latentflow.training.fitting import is_set, value_of, with_values
from latentflow.training.fresh_model import training_record
from latentflow.training.held_out import images_for
from latentflow.training.interruption import Outcome
from latentflow.training.loop import Job, MicroBatches, micro_batches, run_loop
from latentflow.training.memory import (
    bytes_per_image,
    count_parameters,
    free_memory,
    memory_mode,
    memory_of_process,
    require_memory,
    state_bytes,
)
from latentflow.training.run_folder import PreparedRun, check_places
from latentflow.training.settings import load_settings
from latentflow.training.student_recipe import CHANGES, FITTED, StudentRecipe, fit_student
from latentflow.training.student_step import StudentMeter, guided_conditions, step_cost, student_step
from latentflow.training.velocity import Preview, draw_if_due, record_progress
from latentflow.training.velocity_run import require_same_images, stays_in_memory

_REPLACED = ("model", "checkpoints", "samples", BEST)  # folders of a run


@dataclass(frozen=True)
class PreparedStudent(PreparedRun):
    """A checked run of a student.

    Attributes:
        teacher: frozen.
        model: the student, which computes what the teacher does.
        resident: whether the latent cache is kept in the device's memory.
    """

    recipe: StudentRecipe
    teacher: FlowModel
    model: FlowModel
    resident: bool

    def describe(self) -> dict[str, str]:
        """The run in about ten lines."""
        config, jumps, optimizer = self.model.config, self.recipe.jumps, self.recipe.optimizer
        preset, guided = self.teacher.config.sampling, guided_conditions(self.model)
        scales = f"1 to {MOST_GUIDANCE:g} on {', '.join(guided)}" if guided else "none, as the teacher has none"
        parameters = sum(parameter.numel() for parameter in self.model.network.parameters())
        return {
            "teacher": f"{config.student.title}, sampled by {preset.solver} in {preset.steps} steps",
            "data": f"{len(self.images):,} images: {self.recipe.data.path}{', in memory' if self.resident else ''}",
            "network": f"{config.network.title}, {parameters:,} parameters",
            "guidance": scales,
            "cost": f"a step takes about {step_cost(config.student, jumps.every):.2g} times one of `train`",
            "jumps": f"by 1 image in {jumps.every}; the teacher's share falls from {jumps.first_share:g} to "
            f"{jumps.last_share:g}",
            "optimizer": f"{optimizer.title} at {optimizer.learning_rate:g}, {optimizer.schedule}",
            "sampling": f"in {config.sampling.steps} evaluations, guidance {config.sampling.guidance:g}",
            **self.rows(),
        }


def prepare_student(recipe: StudentRecipe, runtime: Runtime, *, allow_change: Sequence[str] = ()) -> PreparedStudent:
    """Decide what a recipe leaves open and check all of it; nothing is written.

    Args:
        allow_change: keys of the recipe that may differ from the run's although they change what is computed.

    Raises:
        ConfigError, DataError, ArtifactError: the first thing that is wrong.
    """
    teacher_config(recipe)
    also_read = [str(folder) for folder in folders_of(recipe.teacher)]
    run = check_places(recipe, "the latent cache or the images of the teacher", also_read, replaced=_REPLACED)
    recipe = as_begun(_fitted_before(with_flips(recipe), run), run, CHANGES)
    changes = None if recipe.fit else check_changes(run, recipe, CHANGES, allow_change)
    runtime = runtime.with_precision(recipe.training.precision)
    teacher = FlowModel.from_pretrained(recipe.teacher, runtime=runtime)
    images = _images(recipe, teacher)
    if recipe.fit:
        gpu, memory = runtime.device.type == "cuda", memory_of_process(runtime)
        given = {"gpu": gpu, "memory": memory, "num_processes": runtime.world}
        recipe = fit_student(recipe, teacher.config, len(images), **given)
        images = images.in_batches_of(recipe.training.batch_size)
    require_jumps(recipe, micro_batches(recipe.training, runtime))
    _require_memory(recipe, runtime, teacher.config)
    model = new_student(recipe, teacher, images)
    _refuse_other_content(run, recipe, model.config)
    captures(recipe.training, model, images, runtime)  # refuses what cannot be
    broken = [] if not isinstance(images.source, LatentCache) else images.source.index.broken
    resident = stays_in_memory(recipe.data, images, runtime)
    return PreparedStudent(recipe, runtime, images, broken, changes, teacher, model, resident)


def new_student(recipe: StudentRecipe, teacher: FlowModel, images: TrainingImages) -> FlowModel:
    """A student that computes what its teacher does, bit for bit, whatever the span of a jump and the guidance."""
    known = teacher.config.training
    held_out = known.held_out if is_own(known, images.source) else None
    record = training_record(images, held_out, labelled=teacher.config.conditioning.num_classes > 0)
    config = student_config(recipe, teacher.config, teacher.weights_hash, record)
    torch.manual_seed(derive_seed(recipe.training.seed, "weights"))
    network = config.build_network()
    added, unknown = network.load_state_dict(teacher.network.state_dict(), strict=False)
    assert not unknown and all("jump_embedding" in name for name in added), (added, unknown)
    return FlowModel(config, network, teacher.autoencoder, teacher.runtime)


def train_student(prepared: PreparedStudent, *, preview: Preview | None = None) -> Outcome:
    """Train until the recipe's last step, or until SIGTERM or Ctrl-C; see `run_loop`.

    Only the student is in the optimizer, the average and the checkpoints.

    Args:
        preview: draws sample grids.

    Raises:
        NonFiniteError: a gradient was not finite; the weights are those from before that step.
    """
    recipe, teacher, model, images = prepared.recipe, prepared.teacher, prepared.model, prepared.images
    config, runtime = recipe.training, prepared.runtime
    parts, network = micro_batches(config, runtime), model.to(runtime).network.train().requires_grad_()
    # the weights of the teacher take as much memory as an average does
    set_memory(network, memory_mode(config.memory, model.config, parts.size, runtime, averages=config.num_averages + 1))
    given = {"times": recipe.jumps, "steps": config.steps, "batch_size": config.batch_size, "seed": config.seed}

    def compiles_both(images_left: int) -> bool:
        if wanted := compiles(config.compile, model.config, images_left, runtime):
            compile_blocks(teacher.network)
        return wanted

    job = Job(
        network=network,
        compare=partial(student_step, model, teacher, **given),
        meter=StudentMeter,
        images=images,
        run=prepared.run,
        runtime=runtime,
        config=config,
        optimizer=recipe.optimizer,
        parts=parts,
        num_workers=recipe.data.num_workers,
        keeping=Keeping(config.keep_checkpoints, config.keep_every, config.kept_at, config.keeps_averages),
        compiles=compiles_both,
        captures=captures(config, model, images, runtime),
        before_save=partial(record_progress, model, len(images)),
        save_model=lambda folder, average: model.save_pretrained(folder, weights=average),
        ema_lengths=config.ema_lengths or (),
        after_step=partial(draw_if_due, preview, model, config),
        track=config.track,
    )
    outcome, _ = run_loop(job)
    for one in (network, teacher.network):
        restore_blocks(one.eval().requires_grad_(False))
    return outcome


def teacher_config(recipe: StudentRecipe) -> ModelConfig:
    """The config of the teacher; no weights are read.

    Raises:
        ArtifactError: there is no such model.
        ConfigError: it is not set, is a student itself, or has a network that takes no jumps.
    """
    if not recipe.teacher:
        raise ConfigError("teacher is not set; give the model to distil")
    name, config = recipe.teacher, config_of(recipe.teacher)
    if config.student is not None:
        raise ConfigError(f"{name} is a student itself, of {config.student.title}; give its teacher")
    if config.network.kind not in NETWORKS:
        raise ConfigError(
            f"{name} has a {config.network.title}, which has no input for the length of a jump; give a model with a "
            f"network of the kind {' or '.join(NETWORKS)}"
        )
    return config


def with_flips(recipe: StudentRecipe) -> StudentRecipe:
    """The recipe with `data.flip` decided, so that a latent cache that is encoded otherwise does not change a run.

    Raises:
        ConfigError: flips are asked for, and a latent cache holds none.
    """
    path, asked = recipe.data.path, recipe.data.flip
    flips = is_cache(path) and LatentCache(path).plan.flips
    if asked == "true" and is_cache(path) and not flips:
        raise ConfigError(f"data.flip = true, but {path} holds no mirrored images; encode it with --flips")
    return recipe if asked != "auto" else with_values(recipe, {"data.flip": "true" if flips else "false"})


def _images(recipe: StudentRecipe, teacher: FlowModel) -> TrainingImages:
    """What the teacher was trained on, without what it held out; of other data all that can be read."""
    training, flip = recipe.training, recipe.data.flip == "true"
    given = {"seed": training.seed, "flip": flip, "batch_size": training.batch_size}
    return images_for(teacher, recipe.data.path, split=None, **given)


def student_config(recipe: StudentRecipe, config: ModelConfig, weights: str, training: TrainingRecord) -> ModelConfig:
    """The config of a student.

    Args:
        config, weights: of the teacher, and the SHA-256 of its weights.
        training: what the student is trained on.

    Raises:
        ConfigError: guidance is asked for, and the teacher has none.
    """
    preset = config.sampling
    can_guide = [name for name in config.conditioning.can_guide if name in (preset.guided_by or [name])]
    guidance = recipe.sampling.guidance or min(max(preset.guidance, 1.0), MOST_GUIDANCE)
    if preset.guide is not None:
        notice(f"the guide of the teacher, {preset.guide.model}, is not distilled: guidance is by the null condition")
        guidance = recipe.sampling.guidance or 1.0
    if recipe.sampling.guidance not in (None, 1.0) and not can_guide:
        raise ConfigError(
            f"sampling.guidance = {recipe.sampling.guidance:g}, but the teacher has no condition to guide on; use 1"
        )
    return config.model_copy(
        update={
            "student": StudentRecord(
                teacher=recipe.teacher,
                weights=weights,
                guided=bool(can_guide),
                guidance_interval=preset.guidance_interval,
                guided_channels=preset.guided_channels,
            ),
            "sampling": SamplingPreset(
                solver=JUMPS,
                steps=recipe.sampling.evaluations,
                guidance=guidance if can_guide else 1.0,
                guided_by=preset.guided_by,
            ),
            "training": training,
        }
    )


def _fitted_before(recipe: StudentRecipe, run: Path) -> StudentRecipe:
    """A recipe to be fitted, with what was fitted when its run began; one without a saved step begins again."""
    if not recipe.fit or trained_steps(run) is None:
        return recipe
    old = load_settings(StudentRecipe, run / RECIPE_FILE)
    return with_values(recipe, {"fit": False, **{key: value_of(old, key) for key in FITTED if not is_set(recipe, key)}})


def require_jumps(recipe: StudentRecipe, parts: MicroBatches) -> None:
    """Refuse micro-batches in which the images that teach jumps would not come as often as they are to."""
    if parts.size % (every := recipe.jumps.every):
        raise ConfigError(
            f"jumps.every = {every}, and a process computes {parts.size} images at a time; use a multiple of {every} "
            "for training.batch_size, shared by the processes, and for training.micro_batch_size"
        )


def _require_memory(recipe: StudentRecipe, runtime: Runtime, config: ModelConfig) -> None:
    """Refuse a batch that the memory cannot hold next to the teacher, whose weights take as much as an average."""
    training, half = recipe.training, runtime.precision in ("bf16", "fp16")
    share, averages = micro_batches(training, runtime).size, training.num_averages + 1
    mode = memory_mode(training.memory, config, share, runtime, averages=averages)
    free, shared = free_memory(runtime.device), 1 if runtime.device.type == "cuda" else runtime.local_world
    num_parameters = count_parameters(config)
    require_memory(
        f"a student, a {config.network.title},",
        num_parameters,
        state_bytes(num_parameters, averages=averages),
        bytes_per_image(config.network, Size(*config.latent_shape[1:]), half=half, memory=mode),
        share,
        free // shared if free else None,
        key="training.micro_batch_size",
        multiple=recipe.jumps.every,
    )


def _refuse_other_content(run: Path, recipe: StudentRecipe, config: ModelConfig) -> None:
    """Teacher and images may have moved since the run began; their content must be the same."""
    if not (run / "model" / CONFIG_FILE).exists():
        return
    before = read_config(run / "model")
    if before.student is None or before.student.weights != config.student.weights:
        whose = f"{before.student.weights[:12]}" if before.student else "none"
        raise ConfigError(
            f"{run} was trained by a teacher with the weights {whose}, and {recipe.teacher} has "
            f"{config.student.weights[:12]}; restore that one, or choose another out"
        )
    require_same_images(run, before, config)
