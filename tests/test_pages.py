"""What the pages say is so: commands parse or run, programs run, links and files exist, figures are those measured."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from latentflow.artifacts import read_json
from latentflow.cli.options import every_command
from latentflow.data.painting.input_rules import InputRules
from latentflow.training.config import load_recipe
from latentflow.training.first_stage import load_autoencoder_recipe
from latentflow.training.student_recipe import load_student_recipe
from tests import tiny
from tests.processes import run_here
from tests.test_layers import LAYERS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "latentflow"
DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(file.relative_to(ROOT).as_posix() for file in DOCS.rglob("*.md"))]
AROUND = ["CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]
VERBS = every_command()


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def command_lines(page: str) -> list[list[str]]:
    """The indented lines of a page that call latentflow, as words, without what stands after a #."""
    lines = re.findall(r"^    (?:\.venv/bin/)?(latentflow .*)$", text_of(page), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def programs(page: str) -> list[str]:
    """The blocks of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


EVERY = [(page, words) for page in PAGES for words in command_lines(page)]
PROGRAMS = [(page, program) for page in PAGES for program in programs(page)]


def test_the_pages_show_commands_and_programs():
    assert len({page for page, _ in EVERY}) > 10
    assert len(EVERY) > 70
    assert len(PROGRAMS) > 5


@pytest.mark.parametrize(("page", "words"), EVERY, ids=lambda x: x if isinstance(x, str) else x[1])
def test_every_command_of_the_pages_is_one(page, words):
    """Verbs, options and the kinds of their values; recipes and their keys."""
    context = VERBS[words[1]].make_context(words[1], words[2:])
    loader = {"train": load_recipe, "train-autoencoder": load_autoencoder_recipe}.get(words[1])
    if words[1] == "distill":
        load_student_recipe(context.params["recipe"], context.params["overrides"] or ())
    if loader:
        loader(context.params["recipe"], context.params["overrides"])


def test_every_verb_is_on_a_page():
    assert {words[1] for _, words in EVERY} >= VERBS.keys() - {"recipes", "demo"}


@pytest.mark.parametrize(("page", "program"), PROGRAMS, ids=lambda x: x if x.endswith(".md") else "")
def test_what_programs_import_is_there(page, program):
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


# Files and links


@pytest.mark.parametrize("page", [*PAGES, *AROUND])
def test_links_lead_to_files_and_headings(page):
    """Within the project; `make docs` looks at the pages that it generates."""
    generated = {
        "reference/commands",
        "reference/recipes",
        "benchmarks",
        "contributing",
        "changelog",
        "reference/python/",
    }
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)):
        if link.startswith(("https://", "#")):
            continue
        file, _, heading = link.partition("#")
        target = (ROOT / page).parent / file
        if target.resolve().is_relative_to(DOCS):
            name = target.resolve().relative_to(DOCS).with_suffix("").as_posix()
            if name.startswith(tuple(generated)):
                continue
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\s-]", "", one.lower()).strip().replace(" ", "-") for one in headings]
            assert heading in slugs, (link, slugs)


def test_every_picture_is_on_a_page():
    text = "".join(text_of(page) for page in PAGES)
    assert [file.name for file in (DOCS / "images").iterdir() if f"images/{file.name}" not in text] == []


@pytest.mark.parametrize("page", [*PAGES, *AROUND])
def test_files_that_the_pages_name_are_there(page):
    for name in re.findall(r"`((?:[\w.]+/)+[\w.]+\.(?:py|yaml|json|sh|md|css))`", text_of(page)):
        if not name.startswith(("runs/", "caches/", "demo/", "samples/", "diagnosis/")):
            assert (ROOT / name).exists() or (SOURCE / name).exists(), name


def test_names_that_contributing_says_are_in_the_files_it_names():
    """An item names files, and things that stand in one of them."""
    looked_at = 0
    for item in re.split(r"^(?:\d\. |## |- )", text_of("CONTRIBUTING.md"), flags=re.MULTILINE):
        item = item.partition("\n\n")[0]
        quoted = re.findall(r"`([^`]+)`", item)
        files = [ROOT / one for one in quoted if re.fullmatch(r"(src|tests)/[\w/]+\.py", one)]
        texts = "".join(file.read_text(encoding="utf-8") for file in files)
        for name in quoted:
            if files and re.fullmatch(r"[A-Za-z_]\w{3,}", name):
                assert re.search(rf"\b{name}\b", texts), (name, files)
                looked_at += 1
    assert looked_at > 30


def test_readme_draws_the_layers_that_are_tested():
    drawn, level = {}, -1
    picture = text_of("README.md").split("## How it is built\n\n")[1].partition("\n\n")[0]
    for number, names in re.findall(r"^    (\d| )  (.+)$", picture, re.MULTILINE):
        level = int(number) if number != " " else level
        drawn |= dict.fromkeys(re.findall(r"\b(\w+)(?:/|\.py)", names), level)
    assert drawn == {name: LAYERS[name] for name in drawn}
    assert drawn.keys() >= {name for name in LAYERS if (SOURCE / name).is_dir()}


def test_readme_has_every_room_in_its_tree():
    tree = text_of("README.md").split("    src/latentflow/\n")[1].partition("\n\n")[0]
    folder, named = "", set()
    for line in tree.splitlines():
        names = re.findall(r"\w+(?:/|\.py)", line.partition("── ")[2].partition("  ")[0])
        indented = line.startswith("    │")
        folder = folder if indented else names[0]
        for name in names:
            path = SOURCE / folder / name if indented else SOURCE / name
            assert path.exists(), line
            named.add(name.rstrip("/"))
    assert named >= {
        file.name for file in SOURCE.iterdir() if file.is_dir() and file.name not in ("__pycache__", "assets")
    }


def test_the_figures_of_a_gpu_are_those_that_were_stored():
    page = text_of("benchmarks/README.md")
    for name, part in (("S/2", "train_s2"), ("XL/2", "train_xl2")):
        stored = read_json(ROOT / "benchmarks" / "results" / f"gpu_{part}-cuda.json")
        row = next(line for line in page.splitlines() if line.startswith(f"| `latentflow train`, DiT-{name}"))
        speed, memory, mfu, seconds = (cell.strip() for cell in row.strip("| ").split("|")[1:])
        assert speed == f"{stored['images_per_second']:,.0f}"
        assert memory == f"{stored['gib']:.1f}"
        assert mfu == f"{100 * stored['mfu']['measured']:.1f} %"
        assert seconds == f"{stored['seconds_to_first_step']:.1f}"


def test_the_errors_of_onnx_files_are_those_that_were_stored():
    stored = read_json(ROOT / "benchmarks" / "results" / "onnx_parity-cpu.json")["largest_relative_error"]
    rows = re.findall(r"^\| ((?:DiT|U-Net).*?) \| (\S+) \|$", text_of("docs/how-to/export.md"), re.MULTILINE)
    assert dict(rows) == {name: f"{error:.1e}" for name, error in stored.items()}
    assert max(stored.values()) < 1e-5


def test_solvers_are_named_where_they_are_chosen():
    from latentflow.flow.solvers import SOLVERS
    from latentflow.sampling.request import SamplingRequest

    said = SamplingRequest.model_fields["solver"].description
    table = text_of("docs/theory/flow-matching.md").partition("| solver |")[2].partition("\n\n")[0]
    for name in SOLVERS:
        assert re.search(rf"\b{name}\b", said)
        assert f"`{name}`" in table


# What is written from the code


def _hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = _hooks()


def test_the_command_reference_has_every_option():
    page = HOOKS.command_page()
    parts = dict(re.findall(r"^#+ latentflow ([\w-]+) .*?$(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL))
    assert parts.keys() == VERBS.keys()
    for verb, command in VERBS.items():
        options = [name for one in command.params for name in one.opts if name.startswith("--")]
        assert options
        for option in options:
            assert re.search(rf"<code>[^<]*{option}\b", parts[verb]), (verb, option)


def test_the_recipe_reference_has_every_key():
    from latentflow.training.config import Recipe
    from latentflow.training.settings import keys_of

    page = HOOKS.recipe_page()
    for key in keys_of(Recipe()):
        assert f"<code>{key}</code>" in page or key.endswith(".kind"), key
    assert "<code>network.channels</code>" in page  # of a U-Net, which is not the default


@pytest.mark.parametrize("room", HOOKS.ROOMS)
def test_the_python_reference_has_every_file_of_a_room(room):
    files = [SOURCE / f"{room}.py"] if (SOURCE / f"{room}.py").is_file() else (SOURCE / room).rglob("*.py")
    modules = {".".join(file.relative_to(SOURCE).with_suffix("").parts) for file in files if file.stem != "__init__"}
    modules = {name for name in modules if ".templates." not in name}  # programs that are written for users
    assert modules
    shown = re.findall(r"^::: latentflow\.([\w.]+)$", HOOKS.python_page(room), re.MULTILINE)
    assert sorted(shown) == sorted(modules)


# A place where the files that the pages name are there, in small


@pytest.fixture(scope="module")
def things(tmp_path_factory, kl, kl_folder) -> Path:
    """What the pages take as given."""
    folder = tmp_path_factory.mktemp("things")
    tiny.write_images(folder / "photos", classes=("cat", "dog"), per_class=20)
    for name in ("cat", "dog"):
        (folder / "held_out" / name).mkdir(parents=True)
        for file in sorted((folder / "photos" / name).iterdir())[:8]:
            file.rename(folder / "held_out" / name / file.name)
    shutil.copytree(kl_folder, folder / "autoencoder")
    picture, whole = next((folder / "photos").rglob("*.png")), np.zeros((20, 24), np.uint8)
    for name in ("photo.jpg", "street.jpg"):
        with Image.open(picture) as image:
            image.save(folder / name)
    hole = whole.copy()
    hole[6:14, 8:16] = 255
    Image.fromarray(hole).save(folder / "hole.png")
    Image.fromarray(whole).save(folder / "map.png")
    painter = tiny.model(kl, class_names=(), conditioning=tiny.SPATIAL)
    painter.save_pretrained(folder / "runs" / "camvid")
    tiny.model(kl, class_names=("cat", "dog")).save_pretrained(folder / "runs" / "photos")
    tiny.model(kl, class_names=("horse", "ship")).save_pretrained(folder / "runs" / "cifar10")
    tiny.model(kl, class_names=("jay", "wren")).save_pretrained(folder / "runs" / "birds")
    tiny.model(kl, inputs=InputRules(origin="shrink:4")).save_pretrained(folder / "runs" / "sharp")
    Image.fromarray(whole).save(folder / "small.png")
    tiny.model(kl, class_names=("Pembroke", "goldfish")).save_pretrained(folder / "models" / "imagenet")
    tiny.model(kl, time_scale=1.0).save_pretrained(folder / "models" / "ffhq")
    return folder


@pytest.fixture
def place(tmp_path, things, monkeypatch) -> Path:
    """A folder with them, to run the commands of a page in."""
    folder = shutil.copytree(things, tmp_path / "place")
    monkeypatch.chdir(folder)
    return folder


SMALL = {
    "stabilityai/sd-vae-ft-mse": "autoencoder",
    "madebyollin/taesd": "autoencoder",
    "256": str(tiny.IMAGE_SIZE),
    "64": str(tiny.IMAGE_SIZE),
    "10000": "12",
    "600": "2",
}
MORE = {
    "train": [
        *(
            "training.steps=16",  # a sixteenth of which is a snapshot
            "training.batch_size=4",
            "training.log_every=2",
            "training.precision=fp32",
            "--device",
            "cpu",
        ),
        *("network.depth=2", "network.hidden_size=32", "network.num_heads=2", "network.patch_size=2"),
    ],
    "distill": ["training.steps=4", "training.batch_size=4", "training.precision=fp32", "--device", "cpu"],
    "finetune": ["training.steps=2", "training.batch_size=4", "training.precision=fp32", "--device", "cpu"],
    "evaluate": ["--features", "random"],
    "sweep": ["--num", "4"],
    "diagnose": ["--num", "16"],
    "bound": ["--num", "8"],
    "loss": ["--num", "8"],
    "benchmark": ["--num", "1", "--repeats", "1"],
}
NOT_HERE = ("prepare", "convert", "push", "train-features", "fit-solver", "studio", "serve")
"""They need others' files, the hub, more images than are here, minutes, or do not end; their tests have stand-ins."""


def runs_here(words: list[str]) -> bool:
    """Whether a command can run with what `place` holds, in seconds."""
    without_data = words[1] in ("encode", "train") and "camvid" in " ".join(words)
    is_long = any(word.startswith(("training.", "network.")) for word in words)
    is_fitted = any("fitted-" in word for word in words)  # by fit-solver
    return words[1] not in NOT_HERE and not (without_data or is_long or is_fitted)


def run_page(page: str, capsys, monkeypatch) -> set[str]:
    """Run the commands of a page one after the other; which verbs ran."""
    lines = [words for words in command_lines(page) if runs_here(words)]
    for words in lines:
        if words[1] in ("train", "finetune"):  # what a page trains is not given
            shutil.rmtree(next(word.partition("=")[2] for word in words if word.startswith("out=")), ignore_errors=True)
    for words in lines:
        given = [SMALL.get(word, word) for word in words[1:]]
        done = run_here([*given, *MORE.get(words[1], [])], capsys, monkeypatch)
        assert done.code == 0, (words, done.err)
    return {words[1] for words in lines}


def test_the_commands_and_the_program_of_the_readme_run(place, capsys, monkeypatch):
    ran = run_page("README.md", capsys, monkeypatch)
    assert ran >= {"encode", "train", "sample", "inpaint", "mask-to-image", "image-to-image", "interpolate", "vary"}
    assert ran >= {"invert", "export", "evaluate", "sweep", "diagnose", "bound"}
    for file in ("filled_seed-00000003.png", "street_seed-00000003.png", "again.png", "samples/grid.png"):
        assert (place / file).is_file(), (file, sorted(place.iterdir()))
    assert (place / "diagnosis" / "page.html").is_file()
    (program,) = programs("README.md")
    exec(compile(program, "README.md", "exec"), {})
    with Image.open(place / "cat.png") as image:
        assert image.size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


def test_the_start_page_shows_the_commands_and_the_program_of_the_readme():
    assert command_lines("docs/index.md") == command_lines("README.md")[:5]
    assert programs("docs/index.md") == programs("README.md")


def test_the_tutorial_runs(place, capsys, monkeypatch):
    assert run_page("docs/tutorial.md", capsys, monkeypatch) == {"encode", "train", "sample", "diagnose"}
    assert (place / "caches" / "photos.png").is_file()
    assert (place / "samples" / "grid.png").is_file()


@pytest.mark.parametrize(
    ("page", "verbs"),
    [
        ("how-to/classes", {"encode", "train", "sample", "info", "sweep", "loss"}),
        ("how-to/inpaint", {"encode", "train", "inpaint"}),
        ("how-to/mask-to-image", {"mask-to-image", "inpaint"}),
        ("how-to/augment", {"encode", "train"}),
        ("how-to/finetune", {"encode", "finetune", "train", "sample"}),
        ("how-to/edit", {"image-to-image", "interpolate", "vary", "invert"}),
        ("how-to/distill", {"plan", "encode", "distill", "sample", "evaluate", "sweep"}),
        ("how-to/evaluate", {"evaluate", "sweep", "benchmark", "diagnose"}),
        ("reference/python/index", set()),
    ],
)
def test_pages_run(page, verbs, place, capsys, monkeypatch):
    assert run_page(f"docs/{page}.md", capsys, monkeypatch) == verbs
    for program in programs(f"docs/{page}.md"):
        exec(compile(program.replace("num=10000", "num=12"), page, "exec"), {})
