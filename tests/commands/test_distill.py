"""`latentflow distill`: a student of a model, exact when resumed; and what is refused, before anything is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.api import LatentFlow
from latentflow.artifacts import read_tensors
from latentflow.cli import training as cli
from latentflow.commands.distill import distill, prepare_distillation
from latentflow.commands.evaluate import evaluate
from latentflow.commands.info import describe
from latentflow.commands.train import train
from latentflow.data.painting.input_rules import InputRules
from latentflow.data.painting.mask_rules import MaskRules
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, ConfigError, LatentFlowError
from latentflow.evaluation.request import EvaluationRequest
from latentflow.flow.flow_map import JumpTimes
from latentflow.model.flow_model import read_config
from latentflow.networks import registered
from latentflow.networks.registered import RegisteredNetwork, register_network
from latentflow.networks.unet import UNetConfig
from latentflow.training import student_run
from latentflow.training.config import TrainingConfig
from latentflow.training.memory import bytes_per_image, count_parameters, state_bytes
from latentflow.training.student_recipe import StudentRecipe, fit_student, load_student_recipe
from tests import tiny
from tests.processes import finish, run_here, start_processes
from tests.tiny import write_cache
from tests.training.test_loop import final, largest_difference, read_metrics

TRAINING = {**tiny.RECIPE["training"], "steps": 6, "batch_size": 8}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, kl) -> Path:
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tiny.model(kl, time_scale=20.0, guidance=2.0).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, teacher, cache):
    def made(out: str = "run", **given) -> StudentRecipe:
        values = {
            "teacher": str(teacher),
            "out": str(tmp_path / out),
            "optimizer": {"learning_rate": 1e-3},
            **given,
            "data": {"path": str(cache), **given.get("data", {})},
            "training": {**TRAINING, **given.get("training", {})},
        }
        return StudentRecipe.model_validate(values)

    return made


@pytest.fixture
def run(recipe):
    def trained(out: str = "run", **given) -> Path:
        return distill(recipe(out, **given), runtime=tiny.CPU).run

    return trained


def test_the_student_is_a_model_that_says_whose_it_is(run, teacher):
    folder = run(training={"preview_every": 6})
    config, own = read_config(folder / "model"), LatentFlow.from_pretrained(teacher, device="cpu")
    assert (config.student.teacher, config.student.weights) == (str(teacher), own.weights_hash)
    assert (config.sampling.solver, config.sampling.steps, config.sampling.guidance) == ("jumps", 4, 2.0)
    assert (config.training.step, config.training.num_images) == (6, tiny.NUM_IMAGES)
    assert describe(folder)["student of"] == f"{teacher}, weights {own.weights_hash[:12]}"
    assert (folder / "samples" / "step-00000006.png").exists()
    drawn = LatentFlow.from_pretrained(folder, device="cpu").sample(num=2, evaluations=2, guidance=3.0)
    assert drawn.evaluations.tolist() == [2, 2]


def test_step_zero_is_the_teacher(recipe, teacher):
    prepared = student_run.prepare_student(recipe(), tiny.CPU)
    own = LatentFlow.from_pretrained(teacher, device="cpu").network.state_dict()
    weights = prepared.model.network.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in own.items())
    x, ones = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2)
    condition = prepared.model.config.conditioning.build(x.shape, "cpu")
    assert torch.equal(prepared.model.velocity(x, ones, condition), prepared.teacher.velocity(x, ones, condition))


def test_nothing_of_the_teacher_is_trained_or_kept(run, teacher):
    before = tiny.tree(teacher)
    folder = run()
    assert tiny.tree(teacher) == before
    (checkpoint,) = (folder / "checkpoints").iterdir()
    names = set(read_tensors(checkpoint / "network.safetensors"))
    assert names == set(read_tensors(checkpoint / "ema.safetensors"))
    assert names == set(LatentFlow.from_pretrained(folder, device="cpu").network.state_dict())


def test_it_learns(run):
    """The error of the velocity falls from that of a student that ignores guidance."""
    lines = read_metrics(run(training={"steps": 60, "batch_size": 16, "log_every": 10}))
    assert lines[-1]["velocity_error"] < 0.5 * lines[0]["velocity_error"]
    assert {"loss", "velocity_error", "jump_error", "learning_rate"} <= set(lines[0])


def test_resume_is_exact(run, monkeypatch):
    whole = run("whole", training={"checkpoint_every": 2})
    step, calls = student_run.student_step, iter(range(1, 1000))

    def killed(*args, **options):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return step(*args, **options)

    monkeypatch.setattr(student_run, "student_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run("killed", training={"checkpoint_every": 2})
    monkeypatch.setattr(student_run, "student_step", step)
    resumed = run("killed", training={"checkpoint_every": 2})
    assert final(resumed) == final(whole)


def require_equal(one: Path, other: Path) -> None:
    """Equal up to rounding, which is all that the gradients of the biases of keys consist of; Adam enlarges it."""
    assert largest_difference(one, other) < 3e-4
    losses = [[line["loss"] for line in read_metrics(run)] for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_micro_batches_equal_the_whole(run):
    require_equal(run("one"), run("two", training={"micro_batch_size": 4}))


def test_two_processes_equal_one(run, recipe, teacher, cache, tmp_path):
    one, log = run("one"), tmp_path / "log"
    keys = ["steps=6", "batch_size=8", "precision=fp32", "ema_decay=0.9", "log_every=1", "checkpoint_every=100"]
    options = [f"training.{key}" for key in [*keys, "preview_every=0"]]
    options += ["optimizer.learning_rate=1e-3", "optimizer.betas=0.9,0.999", "optimizer.warmup_steps=0"]
    options += ["optimizer.kind=adamw", "optimizer.schedule=constant"]
    command = ("distill", teacher, "--data", cache, f"out={tmp_path / 'two'}", *options, "--device", "cpu")
    workers = start_processes(command, log, 2)
    assert [finish(worker, log.with_name(f"log.{rank}")) for rank, worker in enumerate(workers)] == [0, 0]
    require_equal(one, tmp_path / "two")


def test_a_unet(tmp_path, kl, cache, run):
    made = tiny.model(kl, guidance=2.0)
    sizes = {"channels": 8, "multipliers": [1, 2], "blocks_per_level": 1, "norm_groups": 4, "dropout": 0.1}
    config = made.config.model_copy(update={"network": UNetConfig(**sizes, num_heads=1)})
    network = tiny.randomise(config.build_network())
    LatentFlow(config, network.eval(), kl).save_pretrained(tmp_path / "unet")
    folder = run(teacher=str(tmp_path / "unet"), training={"steps": 2})
    drawn = LatentFlow.from_pretrained(folder, device="cpu").sample(num=1, evaluations=1)
    assert drawn.latents.isfinite().all()


def test_paired_images(tmp_path, kl, run):
    made = tiny.model(kl, inputs=InputRules(origin="shrink:4"), guidance=2.0)
    made.save_pretrained(tmp_path / "sharp")
    paired = tiny.write_images(tmp_path / "photos")
    folder = run(teacher=str(tmp_path / "sharp"), data={"path": str(paired)}, training={"steps": 2})
    student = LatentFlow.from_pretrained(folder, device="cpu")
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8))
    assert student.translate(small, num=2, evaluations=2).evaluations.tolist() == [2, 2]


def test_images_that_the_teacher_held_out_are_not_learned(tmp_path, kl, kl_folder, recipe):
    many = tiny.write_images(tmp_path / "many", per_class=30)
    write_cache(open_images(many, tiny.IMAGE_SIZE), kl, tmp_path / "cache")
    own = tiny.recipe(
        autoencoder=kl_folder,
        data={"path": tmp_path / "cache", "held_out": 0.1},
        training={"steps": 1},
        out=tmp_path / "teacher",
    )
    train(own, runtime=tiny.CPU)
    held_out = read_config(tmp_path / "teacher" / "model").training.held_out
    given = recipe(teacher=str(tmp_path / "teacher"), data={"path": str(tmp_path / "cache")})
    prepared = student_run.prepare_student(given, tiny.CPU)
    assert len(prepared.images) == 90 - held_out.num_images
    assert prepared.model.config.training.held_out == held_out


def test_is_evaluated_at_its_true_cost(run, images):
    folder = run()
    asked = {"model": str(folder), "data": str(images), "features": "random", "num": 8, "metrics": ["fid"]}
    report = evaluate(EvaluationRequest(**asked, evaluations=2, guidance=2.0, resamples=0), runtime=tiny.CPU)
    assert report.report.protocol.evaluations.mean == 2


def test_command_line(teacher, cache, tmp_path, capsys, monkeypatch):
    command = ["distill", teacher, "--data", cache, "training.steps=2", "training.batch_size=4", "--device", "cpu"]
    checked = run_here([*command, f"out={tmp_path / 'run'}", "--dry-run"], capsys, monkeypatch)
    assert checked.code == 0 and "all is well" in checked.out + checked.err
    assert "1 to 8 on label" in checked.out + checked.err
    assert "about 1.8 times one of `train`" in checked.out + checked.err
    assert not (tmp_path / "run").exists()
    done = run_here([*command, f"out={tmp_path / 'run'}"], capsys, monkeypatch)
    assert done.code == 0, done.err
    drawn = run_here(
        ["sample", tmp_path / "run", "--num", 2, "--evaluations", 1, "--out", tmp_path / "out", "--device", "cpu"],
        capsys,
        monkeypatch,
    )
    assert drawn.code == 0, drawn.err
    assert len(list((tmp_path / "out").glob("*_seed-*.png"))) == 2


def test_name_of_the_run_is_that_of_the_teacher():
    names = ("runs/photos", "someone/photos@v2", "runs/photos@best/", "models/dit+runs/photos:0.7")
    assert [cli._name_of(name) for name in names] == ["photos"] * 4


def test_rules_of_what_is_left_open(kl, recipe, monkeypatch):
    config = tiny.model(kl).config
    training = config.training.model_copy(update={"step": 4000})
    open_recipe = load_student_recipe("student")
    cpu = fit_student(open_recipe, config.model_copy(update={"training": training}), 1000, gpu=False)
    assert (cpu.training.steps, cpu.training.batch_size, cpu.fit) == (800, 128, False)
    assert (cpu.optimizer.kind, cpu.optimizer.learning_rate, cpu.optimizer.schedule) == ("muon", 1e-3, "cosine")
    gpu = fit_student(open_recipe, config, 100_000, gpu=True)
    assert (gpu.training.steps, gpu.training.batch_size, gpu.training.ema_decay) == (30_000, 256, 0.9999)
    assert gpu.optimizer.learning_rate == 3e-4
    given = load_student_recipe("student", ["training.steps=77", "optimizer.learning_rate=1e-5"])
    fixed = fit_student(given, config, 6, gpu=False)
    assert (fixed.training.steps, fixed.training.batch_size, fixed.optimizer.learning_rate) == (77, 4, 1e-5)
    assert fixed.training.micro_batch_size is None
    plain = fit_student(load_student_recipe("student", ["optimizer.kind=adamw"]), config, 1000, gpu=False)
    assert (plain.optimizer.kind, plain.optimizer.learning_rate) == ("adamw", 3e-4)
    monkeypatch.setattr("latentflow.training.student_recipe.hidden_matrices", lambda network: [])
    assert fit_student(open_recipe, config, 1000, gpu=False).optimizer == plain.optimizer


@pytest.mark.parametrize(("changes", "share"), [((), 128), (("training.batch_size=96",), 48)])
def test_as_many_images_at_a_time_as_fit_next_to_the_teacher(kl, changes, share):
    config, given = tiny.model(kl).config, load_student_recipe("student", changes)
    state = state_bytes(count_parameters(config), half=True, averages=3)  # EMA and teacher are fewer
    memory = state + 40 * bytes_per_image(config.network, 8, half=True)
    fitted = fit_student(given, config, 10_000, gpu=True, memory=memory, num_processes=2)
    micro = fitted.training.micro_batch_size
    assert share % micro == 0 and micro % 4 == 0 and 16 <= micro < share


def test_a_run_without_a_saved_step_is_fitted_again(recipe):
    """Of one that ended before its first checkpoint nothing is left that what was chosen for it belongs to."""
    given = [StudentRecipe.model_validate({**_open(recipe), "training": {"precision": "fp32"}})]
    given.append(given[0].model_copy(update={"training": TrainingConfig(precision="fp32", steps=80)}))
    begun = prepare_distillation(given[0], tiny.CPU)
    begun.begin()
    again = prepare_distillation(given[1], tiny.CPU).recipe
    assert begun.recipe.training.checkpoint_every == 500 and again.training.checkpoint_every == 20
    assert again.optimizer.warmup_steps == 4


def _open(recipe) -> dict[str, Any]:
    """A recipe that leaves open what can be fitted."""
    values = recipe().model_dump(mode="json")
    return {"fit": True, **{key: values[key] for key in ("teacher", "out", "data")}}


def test_the_shipped_recipe_is_the_default_one():
    assert load_student_recipe("student").jumps == JumpTimes()


# What is refused, before anything is written


@pytest.fixture
def refused(recipe, tmp_path):
    def run(kind: type[LatentFlowError], *words: str, **given) -> None:
        with pytest.raises(kind) as caught:
            distill(recipe(**given), runtime=tiny.CPU)
        assert "\n" not in str(caught.value)
        for part in words:
            assert part in str(caught.value)
        assert not (tmp_path / "run").exists()

    return run


def test_a_student_has_no_student(run, refused, recipe, tmp_path):
    folder = run("first", training={"steps": 1})
    refused(ConfigError, str(folder), "is a student itself", "give its teacher", teacher=str(folder))


def test_a_network_that_takes_no_jumps(refused, tmp_path, kl, monkeypatch):
    monkeypatch.setattr(registered, "_MAKERS", {})
    made = tiny.model(kl)
    register_network("anything")(made.config.build_network)
    config = made.config.model_copy(update={"network": RegisteredNetwork(name="anything")})
    LatentFlow(config, made.network, kl).save_pretrained(tmp_path / "own")
    words = ("registered network anything", "no input for the length of a jump", "dit or unet")
    refused(ConfigError, *words, teacher=str(tmp_path / "own"))


def test_another_autoencoder(refused, tmp_path, images, deterministic):
    write_cache(open_images(images, tiny.IMAGE_SIZE), deterministic, tmp_path / "other")
    refused(LatentFlowError, str(tmp_path / "other"), "autoencoder", data={"path": str(tmp_path / "other")})


def test_other_classes(refused, tmp_path, kl):
    fewer = tiny.write_images(tmp_path / "fewer", classes=("apple", "date"))
    write_cache(open_images(fewer, tiny.IMAGE_SIZE), kl, tmp_path / "other")
    words = ("['apple', 'date']", "give data of the model's classes")
    refused(ConfigError, *words, data={"path": str(tmp_path / "other")})


def test_other_sizes(refused, tmp_path, images, kl):
    write_cache(open_images(images, 32), kl, tmp_path / "other")
    refused(ConfigError, "images of 32", "the model draws 16", data={"path": str(tmp_path / "other")})


def test_no_teacher_and_no_data(refused, tmp_path):
    refused(ArtifactError, "nowhere-at-all", teacher="nowhere-at-all/at/all")
    refused(ConfigError, "teacher is not set", teacher="")
    refused(ConfigError, "data.path is not set", data={"path": ""})


def test_batches_in_which_no_image_jumps(refused):
    words = ("jumps.every = 4", "2 images at a time", "use a multiple of 4")
    refused(ConfigError, *words, jumps={"every": 4}, training={"batch_size": 2})
    refused(ConfigError, *words, jumps={"every": 4}, training={"micro_batch_size": 2})


@pytest.mark.parametrize(("free", "remedy"), [(3_000_000, "micro_batch_size="), (1000, "choose a smaller network")])
def test_a_batch_that_does_not_fit(recipe, monkeypatch, free, remedy):
    monkeypatch.setattr(student_run, "free_memory", lambda device: free)
    with pytest.raises(ConfigError, match="a student") as caught:
        distill(recipe(jumps={"every": 4}, training={"batch_size": 4096}), runtime=tiny.CPU)
    assert remedy in str(caught.value)
    if found := re.search(r"micro_batch_size=(\d+)", str(caught.value)):
        assert int(found[1]) % 4 == 0  # what is advised is not refused


def test_flips_that_the_cache_has_not(refused, tmp_path, kl):
    flat = tiny.write_images(tmp_path / "flat", per_class=2)
    write_cache(open_images(flat, tiny.IMAGE_SIZE), kl, tmp_path / "flat_cache")
    data = {"path": str(tmp_path / "flat_cache"), "flip": "true"}
    refused(ConfigError, "data.flip = true", "encode it with --flips", data=data)


def test_guidance_that_the_teacher_has_not(refused, tmp_path, kl):
    tiny.model(kl, class_names=()).save_pretrained(tmp_path / "plain")
    flat = tiny.write_images(tmp_path / "flat", classes=())
    given = {"teacher": str(tmp_path / "plain"), "data": {"path": str(flat)}, "sampling": {"guidance": 2.0}}
    refused(ConfigError, "sampling.guidance = 2", "no condition to guide on; use 1", **given)


def test_out_is_not_the_run_of_the_teacher(tmp_path, teacher, recipe):
    (tmp_path / "own").mkdir()
    shutil.copytree(teacher, tmp_path / "own" / "model")
    before = tiny.tree(tmp_path / "own")
    with pytest.raises(ArtifactError, match="which is overwritten; choose another place"):
        distill(recipe("own", teacher=str(tmp_path / "own")), runtime=tiny.CPU)
    assert tiny.tree(tmp_path / "own") == before


def test_a_teacher_with_an_adapter(run, refused, tmp_path, teacher):
    tiny.finetuned(teacher).save_pretrained(tmp_path / "tuned")
    name = f"{teacher}+{tmp_path / 'tuned'}:0.5"
    for place in (teacher, tmp_path / "tuned" / "adapter"):
        refused(ArtifactError, "lies inside", teacher=name, out=str(place / "run"))
    student = read_config(run(teacher=name, training={"steps": 1}) / "model").student
    assert (student.teacher, student.weights) == (name, LatentFlow.from_pretrained(name).weights_hash)


def test_a_cache_of_other_flips_is_another_run(run, tmp_path, images, kl):
    """Whether images are mirrored is read from the cache once, and does not change unasked."""
    for name, flips in (("plain", False), ("mirrored", True)):
        write_cache(open_images(images, tiny.IMAGE_SIZE), kl, tmp_path / name, flips=flips)
    given = {"training": {"steps": 1}}
    folder = run(data={"path": str(tmp_path / "plain")}, **given)
    assert "flip: 'false'" in (folder / "recipe.yaml").read_text()
    with pytest.raises(ConfigError, match=r"data\.flip: .*--allow-change data\.flip"):
        run(data={"path": str(tmp_path / "mirrored")}, training={"steps": 2})


def test_mask_files_that_have_changed(run, tmp_path, kl):
    """They are as much part of a run as its images."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for number in range(3):
        hole = np.zeros((16, 16), np.uint8)
        hole[number : number + 6, 4:12] = 255
        Image.fromarray(hole).save(masks / f"{number}.png")
    made = tiny.model(kl, conditioning={"inpainting": True})
    rules = MaskRules(folder=str(masks))
    LatentFlow(made.config.model_copy(update={"masks": rules}), made.network, kl).save_pretrained(tmp_path / "holes")
    pictures = tiny.write_images(tmp_path / "pictures", per_class=3)
    given = {"teacher": str(tmp_path / "holes"), "data": {"path": str(pictures)}}
    run(**given, training={"steps": 1})
    Image.fromarray(hole.T).save(masks / "2.png")
    with pytest.raises(ConfigError, match=r"the mask files in .* have changed"):
        run(**given, training={"steps": 2})


def test_a_run_goes_on_with_its_teacher_alone(run, recipe, tmp_path, kl, teacher):
    folder = run(training={"steps": 2})
    other = tiny.model(kl, seed=5, time_scale=20.0)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="was trained by a teacher with the weights"):
        distill(recipe(teacher=str(tmp_path / "other")), runtime=tiny.CPU)
    moved = shutil.copytree(teacher, tmp_path / "moved")
    assert run(teacher=str(moved)) == folder
    assert read_config(folder / "model").training.step == 6
    with pytest.raises(ConfigError, match="the student has learned with the old one"):
        distill(recipe(jumps={"every": 4}), runtime=tiny.CPU)


@pytest.mark.parametrize("form", ["diffusers", "onnx"])
def test_export_is_refused(run, tmp_path, capsys, monkeypatch, form):
    folder = run(training={"steps": 1})
    command = ["export", folder, "--format", form, "--out", tmp_path / "exported"]
    result = run_here(command, capsys, monkeypatch)
    assert result.code == 2 and "student" in result.err and "export its teacher" in result.err
    assert not (tmp_path / "exported").exists()
