"""The command line: help that is quick, results, and bad input that costs one line and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from latentflow.cli.options import every_command
from latentflow.training.config import RECIPES, find_recipe, load_recipe
from latentflow.training.first_stage import AUTOENCODER_RECIPES, load_autoencoder_recipe
from latentflow.training.settings import to_yaml
from tests import tiny
from tests.processes import Result, run_here

ROOT = Path(__file__).parents[1]
VERBS = every_command()


@pytest.fixture
def command(capsys, monkeypatch):
    """Run `latentflow ARGS` in this process."""
    return lambda *args: run_here(args, capsys, monkeypatch)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, kl) -> Path:
    """A model with guidance, on disk."""
    folder = tmp_path_factory.mktemp("models") / "fruit"
    tiny.model(kl).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_file(tmp_path, cache, kl_folder) -> Path:
    """A recipe that would train on the cache into `tmp_path`/run."""
    file = tmp_path / "fruit.yaml"
    recipe = tiny.recipe(data={"path": cache}, autoencoder=kl_folder, out=tmp_path / "run", training={"steps": 2})
    file.write_text(to_yaml(recipe), encoding="utf-8")
    return file


@pytest.fixture
def pickled(bomb, tmp_path) -> Path:
    """A .pth file full of code; it must never go off."""
    return bomb(tmp_path / "model.pth")


# Help


def test_help_imports_nothing_heavy_and_shows_an_example():
    """All verbs in one fresh interpreter."""
    program = """
import sys
from typer.testing import CliRunner
from latentflow.cli import app
for verb in sys.argv[1:]:
    result = CliRunner().invoke(app, [verb, "--help"] if verb else ["--help"])
    assert result.exit_code == 0, (verb, result.output)
    assert not verb or f"latentflow {verb}" in result.output.partition("Example")[2], (verb, result.output)
    for heavy in ("torch", "diffusers", "accelerate", "numpy", "PIL", "yaml", "huggingface_hub"):
        assert heavy not in sys.modules, (verb, heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "", *VERBS], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_verb_says_what_it_does(command):
    listing = command("--help")
    assert listing.code == 0
    for verb in VERBS:
        assert verb in listing.out


# Results


def test_encode_train_sample_info(command, tmp_path, images, kl_folder, recipe_file):
    cache, run, pictures = tmp_path / "cache", tmp_path / "run", tmp_path / "pictures"
    encoded = command(
        *("encode", images, "--autoencoder", kl_folder, "--image-size", tiny.IMAGE_SIZE, "--out", cache, "--json")
    )
    assert encoded.code == 0, encoded.err
    assert json.loads(encoded.out)["images"] == tiny.NUM_IMAGES

    trained = command("train", recipe_file, f"data.path={cache}", "training.preview_every=2", "--device", "cpu")
    assert trained.code == 0, trained.err
    assert str(run / "model") in trained.err

    sampled = command(
        "sample", run, "--num", 3, "--classes", "cherry,apple", "--out", pictures, "--device", "cpu", "--json"
    )
    assert sampled.code == 0, sampled.err
    report = json.loads(sampled.out)
    assert report["images"] == 3
    assert report["evaluations per image"] == 2  # two Euler steps, no guidance
    names = sorted(file.name for file in pictures.iterdir())
    labels = ["apple_seed-00000001.png", "cherry_seed-00000000.png", "cherry_seed-00000002.png"]
    assert names == [*labels, "grid.png"]
    assert Image.open(pictures / names[0]).size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)

    facts = json.loads(command("info", run, "--json").out)
    assert facts["steps"] == 2
    assert facts["images seen"] == 8
    assert facts["classes"] == list(tiny.CLASSES)
    facts = json.loads(command("info", cache, "--json").out)
    assert facts["images"] == tiny.NUM_IMAGES
    assert "fruit" in command("info", run).out  # the table for people


def test_encode_train_sample_info_with_conditions_of_space(command, tmp_path, segmented, kl_folder, recipe_file):
    cache, run, pictures = tmp_path / "cache", tmp_path / "run", tmp_path / "pictures"
    where = ("--autoencoder", kl_folder, "--image-size", tiny.IMAGE_SIZE, "--out", cache, "--device", "cpu", "--json")
    encoded = command("encode", segmented, *where, "--mask-variants", 2, "--mask-policy", "boxes")
    assert encoded.code == 0, encoded.err
    report = json.loads(encoded.out)
    assert (report["images"], report["map classes"], report["mask variants"]) == (12, 3, 2)

    overrides = ("conditioning.inpainting=true", "conditioning.semantic_map=true", "training.preview_every=2")
    trained = command("train", recipe_file, f"data.path={cache}", *overrides, "--device", "cpu")
    assert trained.code == 0, trained.err
    assert (run / "samples" / "step-00000002.png").is_file()

    guided = ("--guidance", 2, "--guided-by", "label", "--classes", "cherry", "--device", "cpu", "--json")
    sampled = command("sample", run, "--num", 2, "--out", pictures, *guided)
    assert sampled.code == 0, sampled.err
    assert json.loads(sampled.out)["evaluations per image"] == 4
    refused(command("sample", run, "--out", pictures, *guided[:2], "--guided-by", "semantic_mop"), "semantic_map")
    untold = ("--num", 1, "--classes", "none", "--device", "cpu", "--out")
    refused(command("sample", run, *untold, pictures), "holds 2 pictures that are not of this request")
    unconditional = command("sample", run, *untold, tmp_path / "others")
    assert unconditional.code == 0, unconditional.err
    assert (tmp_path / "others" / "seed-00000000.png").is_file()

    facts = json.loads(command("info", run, "--json").out)
    assert facts["told"] == ["label", "inpainting", "semantic_map"]
    assert (facts["map classes"], facts["holes"]) == (list(tiny.MAP_CLASSES), "boxes")
    facts = json.loads(command("info", cache, "--json").out)
    assert (facts["map classes"], facts["mask variants"]) == (list(tiny.MAP_CLASSES), 2)


def test_dry_run_checks_everything_and_writes_nothing(command, tmp_path, recipe_file, leaves_nothing):
    result = command("train", recipe_file, "training.steps=7", "--dry-run", "--device", "cpu")
    assert result.code == 0, result.err
    said = [*result.out.splitlines(), *result.err.splitlines()]
    assert len(said) <= 12
    for words in (
        "18 images of 16 x 16",
        "3: apple, berry, cherry",
        "7 steps of 4 images",
        "cpu, fp32",
        "new",
        "all is well",
    ):
        assert any(words in line for line in said), words
    leaves_nothing()


def test_print_gives_the_recipe_with_everything_decided(command, tmp_path, recipe_file):
    result = command("train", recipe_file, "training.steps=7", "--dry-run", "--print", "--device", "cpu")
    (tmp_path / "printed.yaml").write_text(result.out, encoding="utf-8")
    assert load_recipe(tmp_path / "printed.yaml") == load_recipe(recipe_file, ["training.steps=7"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.path=nowhere-at-all", "nowhere-at-all"),
        ("autoencoder=nowhere-at-all", "nowhere-at-all"),
        ("data.image_size=32", "data.image_size=16"),
        ("network.patch_size=3", "latents of 8 x 8 do not fit"),
        ("conditioning.semantic_map=true", "has no semantic maps"),
        ("conditioning.label_dropout=0 sampling.guidance=2", "add sampling.guidance=1"),
        ("sampling.solver=huen", "did you mean 'heun'"),
        ("sampling.guided_channels=99", "sampling.guided_channels 99"),
        (f"out={'x' * 300}", "has a name of 300 bytes"),
        (f"data.path={'x' * 300}", "has a name of 300 bytes"),
        ("training.batch_size=1e6 network.depth=400 network.hidden_size=1024", "GiB are free"),
        ("network.depth=512 network.hidden_size=65536", "choose a smaller network"),
    ],
)
def test_dry_run_finds_what_training_would_refuse(command, recipe_file, leaves_nothing, override, said):
    refused(command("train", recipe_file, *override.split(), "--dry-run", "--device", "cpu"), said)
    leaves_nothing()


EXAMPLES = [shlex.split(verb.epilog.removeprefix("Example: ")) for verb in VERBS.values()]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda words: words[1])
def test_examples_of_the_help_are_commands(example):
    """Every word is parsed as it would be, and the recipes that are named exist."""
    verb = VERBS[example[1]]
    context = verb.make_context(example[1], example[2:])
    loader = {"train": load_recipe, "train-autoencoder": load_autoencoder_recipe}.get(example[1])
    if loader:
        loader(context.params["recipe"], context.params["overrides"])


PAGES = ["README.md", *sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_recipes_that_the_pages_name_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for verb, name in re.findall(r"latentflow (train|train-autoencoder) (\w\S*)", text):
        if not name.endswith((".yaml", "...")) and not name.isupper():
            find_recipe(name, AUTOENCODER_RECIPES if verb == "train-autoencoder" else RECIPES)


def test_recipes_name_themselves_in_their_comments():
    for folder, verb in ((RECIPES, "train"), (AUTOENCODER_RECIPES, "train-autoencoder")):
        for file in folder.glob("*.yaml"):
            assert f"# latentflow {verb} {file.stem}" in file.read_text(encoding="utf-8")


def test_recipes_are_listed_and_valid(command):
    from latentflow.training.config import recipe_names
    from latentflow.training.first_stage import AUTOENCODER_RECIPES
    from latentflow.training.student_recipe import STUDENT_RECIPES

    listed = json.loads(command("recipes", "--json").out)
    first_stages = [f"train-autoencoder {name}" for name in recipe_names(AUTOENCODER_RECIPES)]
    students = [f"distill {name}" for name in recipe_names(STUDENT_RECIPES)]
    assert list(listed) == recipe_names() + first_stages + students
    assert all(listed.values()), "a recipe without a description"


# Bad input: each is one line, exit code 2, and nothing left behind


def refused(result: Result, *said: str) -> None:
    """One line on stderr which says what was wrong, and exit code 2."""
    assert result.code == 2, result
    assert result.error.startswith("latentflow: ")
    for words in said:
        assert words in result.error


@pytest.fixture
def leaves_nothing(tmp_path):
    """After the test `tmp_path` is as it was when this was called: leaves_nothing()."""
    before = []
    yield lambda: before.append(tiny.tree(tmp_path))
    assert before, "leaves_nothing() was not called"
    assert tiny.tree(tmp_path) == before[0]


@pytest.fixture
def encode(command, tmp_path, kl_folder, images):
    """Encode with one thing changed."""

    def run(data=images, autoencoder=kl_folder, image_size=tiny.IMAGE_SIZE, out=tmp_path / "out", *options):
        where = ("--autoencoder", autoencoder, "--image-size", image_size, "--out", out)
        return command("encode", data, *where, "--device", "cpu", *options)

    return run


def test_encode_missing_folder(encode, tmp_path, leaves_nothing):
    leaves_nothing()
    refused(encode(data=tmp_path / "nowhere"), "nowhere")


def test_encode_empty_folder(encode, tmp_path, leaves_nothing):
    (tmp_path / "empty").mkdir()
    leaves_nothing()
    refused(encode(data=tmp_path / "empty"), "empty")


def test_encode_size_that_does_not_divide(encode, leaves_nothing):
    leaves_nothing()
    refused(encode(image_size=17), "17", "16 or 18")


@pytest.mark.parametrize("size", [0, -16])
def test_encode_size_of_nothing(encode, leaves_nothing, size):
    leaves_nothing()
    refused(encode(image_size=size), str(size))


def test_encode_missing_autoencoder(encode, tmp_path, leaves_nothing):
    leaves_nothing()
    refused(encode(autoencoder=tmp_path / "nowhere"), "nowhere")


def test_encode_pickle_as_autoencoder(encode, pickled, leaves_nothing):
    leaves_nothing()
    refused(encode(autoencoder=pickled), "model.pth")


def test_encode_pickle_inside_autoencoder_folder(encode, tmp_path, kl_folder, bomb, leaves_nothing):
    folder = tmp_path / "poisoned"
    folder.mkdir()
    shutil.copy(kl_folder / "config.json", folder)
    bomb(folder / "diffusion_pytorch_model.bin")
    leaves_nothing()
    refused(encode(autoencoder=folder), "poisoned")


def test_encode_truncated_autoencoder(encode, tmp_path, kl_folder, leaves_nothing):
    folder = tmp_path / "cut"
    shutil.copytree(kl_folder, folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    leaves_nothing()
    refused(encode(autoencoder=folder), "cut")


@pytest.mark.parametrize("place", ["images.txt/below", "/proc/nope"])
def test_encode_output_that_cannot_be_written(encode, tmp_path, leaves_nothing, place):
    (tmp_path / "images.txt").write_text("a regular file")
    leaves_nothing()
    refused(encode(out=tmp_path / place), place.removeprefix("/"))


def test_encode_into_a_folder_of_something_else(encode, tmp_path, leaves_nothing):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    leaves_nothing()
    refused(encode(), "thesis.tex")


def test_train_unknown_recipe(command, leaves_nothing):
    leaves_nothing()
    refused(command("train", "cifar10_46", "--device", "cpu"), "cifar10_46", "did you mean 'cifar10_64'?")


def test_train_pickle_as_recipe(command, pickled, leaves_nothing):
    leaves_nothing()
    refused(command("train", pickled, "--device", "cpu"), "model.pth")


def test_train_unknown_key(command, recipe_file, leaves_nothing):
    leaves_nothing()
    refused(
        command("train", recipe_file, "training.batchsize=4", "--device", "cpu"),
        "batchsize",
        "did you mean 'batch_size'?",
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps=0", "training.steps"),
        ("training.steps", "key=value"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate"),
        ("network.hidden_size=33", "33"),
        ("network.patch_size=3", "3"),
        ("training.micro_batch_size=3", "micro"),
        ("data.image_size=17", "17"),
        ("data.path=", "data.path"),
        ("data.path=nowhere-at-all", "nowhere-at-all"),
        ("autoencoder=nowhere-at-all", "nowhere-at-all"),
        ("sampling.solver=huen", "did you mean 'heun'?"),
        ("sampling.guidance_interval=[0.8, 0.2]", "0.8"),
        ("training.precision=fp8", "training.precision"),
    ],
)
def test_train_bad_values(command, recipe_file, leaves_nothing, override, said):
    leaves_nothing()
    refused(command("train", recipe_file, override, "--device", "cpu"), said)


def test_train_guided_preview_of_a_model_that_cannot_be_guided(command, recipe_file, leaves_nothing):
    leaves_nothing()
    overrides = ("conditioning.label_dropout=0", "sampling.guidance=2", "training.preview_every=1")
    refused(
        command("train", recipe_file, *overrides, "--device", "cpu"),
        "sampling.guidance = 2",
        "conditioning.label_dropout = 0",
        "add sampling.guidance=1",
    )


def test_train_wrong_autoencoder_for_the_cache(command, recipe_file, deterministic_folder, leaves_nothing):
    leaves_nothing()
    refused(command("train", recipe_file, f"autoencoder={deterministic_folder}", "--device", "cpu"), "was encoded with")


def test_train_truncated_shard(command, tmp_path, recipe_file, cache, leaves_nothing):
    shutil.copytree(cache, tmp_path / "cut")
    shard = tmp_path / "cut" / "shard-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    leaves_nothing()
    refused(
        command("train", recipe_file, f"data.path={tmp_path / 'cut'}", "--device", "cpu"),
        "shard-00001.safetensors is truncated",
        "run the same `latentflow encode` again",
    )


def test_train_unfinished_cache(command, tmp_path, recipe_file, cache, leaves_nothing):
    shutil.copytree(cache, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "index.json").unlink()
    leaves_nothing()
    refused(command("train", recipe_file, f"data.path={tmp_path / 'unfinished'}", "--device", "cpu"), "not finished")


def test_train_flips_that_the_cache_has_not(command, tmp_path, recipe_file, images, kl_folder, leaves_nothing):
    command(
        *("encode", images, "--autoencoder", kl_folder, "--image-size", tiny.IMAGE_SIZE, "--out", tmp_path / "plain")
    )
    leaves_nothing()
    overrides = (f"data.path={tmp_path / 'plain'}", "data.flip=true")
    refused(command("train", recipe_file, *overrides, "--device", "cpu"), "--flips")


def test_train_images_none_of_which_can_be_read(command, tmp_path, recipe_file, leaves_nothing):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "one.png").write_bytes(b"no image")
    leaves_nothing()
    refused(command("train", recipe_file, f"data.path={tmp_path / 'bad'}", "--device", "cpu"), "one.png")


@pytest.mark.parametrize("place", ["fruit.yaml/below", "/proc/nope"])
def test_train_output_that_cannot_be_written(command, tmp_path, recipe_file, leaves_nothing, place):
    leaves_nothing()
    refused(command("train", recipe_file, f"out={tmp_path / place}", "--device", "cpu"), place)


@pytest.mark.parametrize("file", ["network.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_train_truncated_checkpoint(command, tmp_path, recipe_file, leaves_nothing, file):
    assert command("train", recipe_file, "--device", "cpu").code == 0
    damaged = tmp_path / "run" / "checkpoints" / "step-00000002" / file
    os.truncate(damaged, damaged.stat().st_size // 2)
    leaves_nothing()
    refused(command("train", recipe_file, "--device", "cpu"), str(damaged))


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.learning_rate=0.5",
        "training.batch_size=6",
        "network.depth=3",
        "conditioning.label_dropout=0.5",
        "training.seed=1",
    ],
)
def test_train_another_recipe_in_the_same_folder(command, recipe_file, leaves_nothing, change):
    assert command("train", recipe_file, "--device", "cpu").code == 0
    leaves_nothing()
    refused(
        command("train", recipe_file, change, "--device", "cpu"),
        change.partition("=")[0],
        "another recipe",
        "choose another out",
    )


@pytest.fixture
def sample(command, tmp_path, model_folder):
    """Sample with one thing changed."""

    def run(*options, model=model_folder, out=tmp_path / "out"):
        return command("sample", model, "--num", 1, "--out", out, "--device", "cpu", *options)

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--classes", "#3"), ("class #3 does not exist", "#0 to #2")),
        (("--classes", "2"), ("no class is named '2'", "'cherry', is written '#2'")),
        (("--classes", "-1"), ("no class is named '-1'",)),
        (("--classes", "apple,#1"), ("the classes 'apple' and '#1' in one list",)),
        (("--classes", 'apple,"berry'), ("is not a list like cat,dog",)),
        (("--classes", ""), ("no class is named ''",)),
        (("--classes", "aple"), ("aple", "did you mean 'apple'?")),
        (("--guidance", "-0.5"), ("-0.5",)),
        (("--guidance", "nan"), ("nan",)),
        (("--guidance", "2", "--guidance-interval", "0.8,0.2"), ("0.8",)),
        (("--guidance-interval", "0.8,1.2"), ("1.2",)),
        (("--guidance-interval", "early"), ("--guidance-interval", "early")),
        (("--solver", "huen"), ("did you mean 'heun'?",)),
        (("--solver", "dopri5", "--rtol", "-1"), ("rtol",)),
        (("--solver", "dopri5", "--atol", "0"), ("atol",)),
        (("--steps", "0"), ("steps",)),
        (("--shift", "0"), ("shift",)),
        (("--num", "0"), ("0",)),
    ],
)
def test_sample_bad_values(sample, leaves_nothing, options, said):
    leaves_nothing()
    refused(sample(*options), *said)


def test_sample_missing_model(sample, tmp_path, leaves_nothing):
    leaves_nothing()
    refused(sample(model=tmp_path / "nowhere"), "nowhere")


def test_sample_pickle_as_model(sample, pickled, leaves_nothing):
    leaves_nothing()
    refused(sample(model=pickled), "model.pth")


def test_sample_folder_that_is_no_model(sample, images, leaves_nothing):
    leaves_nothing()
    refused(sample(model=images), "config.json")


@pytest.mark.parametrize("file", ["velocity.safetensors", "config.json"])
def test_sample_truncated_model(sample, tmp_path, model_folder, leaves_nothing, file):
    shutil.copytree(model_folder, tmp_path / "cut")
    damaged = tmp_path / "cut" / file
    os.truncate(damaged, damaged.stat().st_size // 2)
    leaves_nothing()
    refused(sample(model=tmp_path / "cut"), file)


def test_sample_model_with_another_autoencoder(sample, tmp_path, model_folder, leaves_nothing):
    shutil.copytree(model_folder, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "autoencoder")
    tiny.kl(seed=1).save_pretrained(tmp_path / "other" / "autoencoder")
    leaves_nothing()
    refused(sample(model=tmp_path / "other"), "was trained with an autoencoder of hash")


@pytest.mark.parametrize("place", ["file.txt/below", "/proc/nope"])
def test_sample_output_that_cannot_be_written(sample, tmp_path, leaves_nothing, place):
    (tmp_path / "file.txt").write_text("a regular file")
    leaves_nothing()
    refused(sample(out=tmp_path / place), place)


def test_info_of_nothing(command, tmp_path, leaves_nothing):
    leaves_nothing()
    refused(command("info", tmp_path), "is not a model folder")


def test_sample_needs_no_gradients(model_folder):
    """A loaded model is ready to sample: frozen, in eval mode."""
    from latentflow.api import LatentFlow

    model = LatentFlow.from_pretrained(model_folder, device="cpu")
    assert not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert model.device == torch.device("cpu")


def test_info_shortens_long_lists_of_classes(command, tmp_path, kl):
    names = tuple(f"n{number:08d}" for number in range(1000))
    tiny.model(kl, class_names=names).save_pretrained(tmp_path / "model")
    text = " ".join(command("info", tmp_path / "model").out.split())
    assert "classes 1,000: n00000000, n00000001, n00000002, n00000003, n00000004, ... (all of them with --json)" in text
    assert "map classes none" in text
    assert json.loads(command("info", tmp_path / "model", "--json").out)["classes"] == list(names)


def test_a_name_with_a_comma_and_a_number_are_names(command, tmp_path, kl):
    tiny.model(kl, class_names=("Doe, Jane", "7", "none")).save_pretrained(tmp_path / "model")
    for place, (asked, names) in enumerate(
        [
            ('"Doe, Jane", 7', ["7_seed-00000001.png", "Doe, Jane_seed-00000000.png"]),
            ("#1,#0", ["7_seed-00000000.png", "Doe, Jane_seed-00000001.png"]),
            ("none", ["none_seed-00000000.png", "none_seed-00000001.png"]),
            ("#none", ["seed-00000000.png", "seed-00000001.png"]),
        ]
    ):
        out = tmp_path / str(place)
        drawn = command("sample", tmp_path / "model", "--num", 2, "--classes", asked, "--out", out, "--device", "cpu")
        assert drawn.code == 0, drawn.err
        assert sorted(file.name for file in out.glob("*seed-*")) == names
