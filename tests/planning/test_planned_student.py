"""Plans of students: exact numbers are those of a run, and time is that of student and teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentflow.api import LatentFlow
from latentflow.commands.distill import distill, prepare_distillation
from latentflow.commands.plan import plan as plan_command
from latentflow.commands.plan import recipe_to_plan
from latentflow.commands.train import train
from latentflow.data.sources.images import open_images
from latentflow.errors import ArtifactError, ConfigError
from latentflow.planning.advice import advice
from latentflow.planning.plan import Plan
from latentflow.planning.request import PlanRequest
from latentflow.training.checkpoint import newest_checkpoint
from latentflow.training.config import Recipe
from latentflow.training.memory import training_flops
from latentflow.training.settings import to_yaml
from latentflow.training.student_recipe import StudentRecipe
from tests import tiny
from tests.planning.test_plan import num_bytes
from tests.processes import run_here
from tests.tiny import write_cache


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, kl) -> Path:
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tiny.model(kl, guidance=2.0).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, teacher, cache):
    def made(**given) -> StudentRecipe:
        values = {"fit": True, "teacher": str(teacher), "out": str(tmp_path / "run"), "data": {"path": str(cache)}}
        training = {"steps": 2, "precision": "fp32", "preview_every": 0, **given.pop("training", {})}
        return StudentRecipe.model_validate({**values, "training": training, **given})

    return made


def planned(recipe: StudentRecipe, **options) -> Plan:
    return plan_command(recipe, "student", PlanRequest(**options), tiny.CPU)


@pytest.mark.usefixtures("unprobed")
def test_what_is_exact_is_what_a_run_has_and_writes(recipe):
    given = recipe()
    found, prepared = planned(given), prepare_distillation(given, tiny.CPU)
    run = distill(given, runtime=tiny.CPU).run
    folder, model = newest_checkpoint(run), run / "model"
    assert found.disk.checkpoint == sum(num_bytes(file) for file in folder.glob("*.safetensors"))
    assert found.memory.exact["optimizer's moments"] == num_bytes(folder / "optimizer.safetensors")
    assert found.memory.exact["moving average"] == num_bytes(folder / "ema.safetensors")
    assert found.memory.exact["weights"] == 4 * found.num_parameters == num_bytes(model / "velocity.safetensors")
    assert found.memory.exact["teacher"] == sum(one.nbytes for one in prepared.teacher.network.parameters())
    assert found.memory.exact["teacher"] < found.memory.exact["weights"]  # the student has more inputs
    written = [*model.glob("velocity.safetensors"), *model.glob("autoencoder/*.s*")]
    assert found.disk.model == sum(num_bytes(file) for file in written)
    assert found.disk.num_milestones == 0
    assert found.recipe == prepared.recipe
    assert found.subject.num_trained == len(prepared.images) == tiny.NUM_IMAGES
    assert found.subject.assumed == [] and found.memorisation == ""


def test_a_step_takes_the_passes_of_the_student_and_the_calls_of_the_teacher(recipe, teacher, kl, tmp_path):
    """In forward passes: 3 of the student, 2 of a teacher that is guided or 1 of another, and half once more."""
    tiny.model(kl, class_names=()).save_pretrained(tmp_path / "plain")
    for name, calls in ((teacher, 2.5), (tmp_path / "plain", 1.5)):
        found = planned(recipe(teacher=str(name)), device_memory=80, device_tflops=100)
        speed = found.speed
        passes = (
            training_flops(found.subject.network, found.subject.config) / speed.forward_flops
        )  # of a tiny network 2.9
        assert speed.seconds_per_image / speed.seconds_per_forward == pytest.approx(passes + calls)
        expected = found.memory.share * speed.seconds_per_image + speed.seconds_per_update
        assert found.seconds_per_step == pytest.approx(expected)


def test_previews_of_a_student_are_not_drawn_twice_for_guidance(recipe):
    found = planned(recipe(training={"preview_every": 1}))
    assert found.subject.config.sampling.guidance == 2 and found.speed.whole
    images = found.preview_seconds / (4 * found.speed.seconds_per_forward)
    assert images == pytest.approx(round(images))


@pytest.mark.usefixtures("unprobed")
def test_what_the_teacher_held_out_is_not_counted(recipe, kl, kl_folder, tmp_path):
    own = tmp_path / "own"
    write_cache(open_images(tiny.write_images(tmp_path / "images"), tiny.IMAGE_SIZE), kl, own)
    given = {"data": {"path": own, "held_out": 0.2}, "training": {"steps": 1}}
    train(tiny.recipe(**given, autoencoder=kl_folder, out=tmp_path / "teacher"), runtime=tiny.CPU)
    found = planned(recipe(teacher=str(tmp_path / "teacher"), data={"path": str(own)}))
    assert (found.subject.data.num_images, found.subject.num_trained) == (18, 14)
    assert found.disk.num_milestones == 0  # nothing is measured on them


@pytest.mark.usefixtures("unprobed")
def test_data_that_are_not_there(recipe):
    found = planned(recipe(data={"path": ""}), images=5000)
    assert found.subject.num_trained == 5000
    assert found.subject.assumed == ["data.path is not set: 5,000 images; change with --images"]


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("kind", ["cache", "images"])
def test_data_that_are_not_such_as_the_teachers(recipe, kl, tmp_path, kind):
    images = tiny.write_images(tmp_path / "images", classes=("bear", "wolf"))
    if kind == "cache":
        write_cache(open_images(images, tiny.IMAGE_SIZE), kl, images := tmp_path / "cache")
    given = recipe(data={"path": str(images)})
    for command in (planned, lambda given: prepare_distillation(given, tiny.CPU)):
        with pytest.raises(ConfigError, match=r"has the classes \['bear', 'wolf'\], but the model knows"):
            command(given)


@pytest.mark.usefixtures("unprobed")
def test_latents_of_another_autoencoder(recipe, deterministic, tmp_path):
    write_cache(open_images(tiny.write_images(tmp_path / "images"), tiny.IMAGE_SIZE), deterministic, tmp_path / "cache")
    given = recipe(data={"path": str(tmp_path / "cache")})
    for command in (planned, lambda given: prepare_distillation(given, tiny.CPU)):
        with pytest.raises(ArtifactError, match=r"was encoded with .* use the former, or encode a new cache"):
            command(given)


@pytest.mark.usefixtures("unprobed")
def test_what_is_advised_can_be_had(recipe):
    """A micro-batch is a multiple of the images of which one jumps."""
    given = recipe(fit=False, jumps={"every": 4}, training={"batch_size": 4096, "memory": "none"})
    short = planned(given, device_memory=0.03)
    assert not short.memory.fits(short.machine.memory)
    assert short.memory.largest_micro_batch("none", short.machine.memory) % 4 == 0
    assert any("training.micro_batch_size=" in line for line in advice(short))
    assert "distil a smaller model" in advice(planned(given, device_memory=0.001))
    with pytest.raises(ConfigError, match=r"jumps\.every = 4, and a process computes 2 images"):
        planned(recipe(jumps={"every": 4}, training={"batch_size": 4}), processes=2)


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("option", [{"classes": 3}, {"latents": (4, 8, 8)}])
def test_what_the_teacher_decides_is_not_asked_for(recipe, option):
    with pytest.raises(ConfigError, match="are those of its teacher; leave it out"):
        planned(recipe(), **option)


@pytest.mark.usefixtures("unprobed")
def test_teachers_that_are_none(recipe, teacher, tmp_path):
    with pytest.raises(ConfigError, match="teacher is not set"):
        planned(recipe(teacher=""))
    with pytest.raises(ArtifactError, match="does not exist"):
        planned(recipe(teacher="nowhere/at/all"))
    tiny.student(LatentFlow.from_pretrained(teacher)).save_pretrained(tmp_path / "student")
    with pytest.raises(ConfigError, match="is a student itself"):
        planned(recipe(teacher=str(tmp_path / "student")))


def test_a_recipe_says_what_it_is_for(recipe, teacher, cache, tmp_path):
    """By its name, by what its file holds, or by an override."""
    file, open_one = tmp_path / "own.yaml", tmp_path / "open.yaml"
    file.write_text(to_yaml(recipe()), encoding="utf-8")
    open_one.write_text("fit: true\n", encoding="utf-8")
    for name, overrides in (
        ("student", ()),
        (file, ()),
        (open_one, (f"teacher={teacher}",)),
        (file, ("jumps.every=8",)),
    ):
        assert isinstance(recipe_to_plan(name, overrides), StudentRecipe)
    for name in ("finetune", open_one):
        assert isinstance(recipe_to_plan(name, (f"data.path={cache}",)), Recipe)
    with pytest.raises(ConfigError, match="no recipe 'studnt'"):
        recipe_to_plan("studnt")


@pytest.mark.usefixtures("unprobed")
def test_the_command_prints_tables_and_records(teacher, cache, capsys, monkeypatch):
    command = ("plan", "student", f"teacher={teacher}", f"data.path={cache}", "--device", "cpu")
    shown = run_here(command, capsys, monkeypatch)
    assert shown.code == 0, shown.err
    assert "student of" in shown.out and "about 1.8 times one of `train`" in " ".join(shown.out.split())
    record = json.loads(run_here((*command, "--json"), capsys, monkeypatch).out)
    assert record["memory"]["exact"]["teacher"] > 0 and record["trained_on"] == tiny.NUM_IMAGES
