"""The picture of the package's layers, kept true by parsing every import."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import latentflow

SOURCE = Path(latentflow.__file__).parent

LAYERS = {
    "shapes": 0,
    "sizes": 0,
    "randomness": 0,
    "artifacts": 0,
    "autoencoder_files": 0,
    "columns": 0,
    "console": 0,
    "door": 0,
    "errors": 0,
    "hub": 0,
    "ledger": 0,
    "pixel_format": 0,
    "plans": 0,
    "progress": 0,
    "records": 0,
    "requests": 0,
    "weights": 0,
    "runtime": 1,
    "locks": 2,
    "flow": 2,
    "networks": 2,
    "autoencoder": 2,
    "data": 3,
    "model": 4,
    "training": 5,
    "sampling": 5,
    "metrics": 5,
    "convert": 5,
    "analysis": 5,
    "evaluation": 6,
    "planning": 6,
    "pages": 6,
    "api": 6,
    "commands": 7,
    "demo": 7,
    "studio": 7,
    "cli": 8,
    "__main__": 9,
}
STRANGERS = (2, 5)
"""Layers whose rooms never import each other. In the others they may, as long as the picture stays free of circles."""


@dataclass(frozen=True)
class Import:
    """`file` imports `module`; `where` is the function it does that in, or "" at the top."""

    file: str
    module: str
    where: str
    types_only: bool


def imports_of(file: Path) -> list[Import]:
    """Every import of a file, relative ones and those inside functions included."""
    name = ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    found = []

    def visit(node: ast.AST, where: str, types_only: bool) -> None:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            where = f"{where}.{node.name}".strip(".")
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            types_only = True
        if isinstance(node, ast.Import):
            found.extend(Import(name, alias.name, where, types_only) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} uses a relative import"
            for alias in node.names:
                below = SOURCE.parent.joinpath(*node.module.split("."), alias.name)
                is_module = below.is_dir() or below.with_suffix(".py").is_file()
                module = f"{node.module}.{alias.name}" if is_module else node.module
                found.append(Import(name, module, where, types_only))
        for child in ast.iter_child_nodes(node):
            visit(child, where, types_only)

    visit(ast.parse(file.read_text(encoding="utf-8")), "", False)
    return found


FILES = sorted(SOURCE.rglob("*.py"))
IMPORTS = [one for file in FILES for one in imports_of(file)]
INNER = [
    Import(one.file, one.module.removeprefix("latentflow").strip("."), one.where, one.types_only)
    for one in IMPORTS
    if one.module.split(".")[0] == "latentflow"
]


def room(module: str) -> str:
    """The folder or top-level file that a module belongs to."""
    return module.split(".")[0]


BETWEEN = [
    one
    for one in INNER
    if one.file != "__init__"  # which offers the public name
    and one.module  # `import latentflow` for the version
    and room(one.file) != room(one.module)
]
"""Imports from one room to another."""


def test_there_is_something_to_look_at():
    assert len(FILES) > 25
    assert len(INNER) > 80
    assert Import("flow.loss", "shapes", "", False) in INNER


def test_every_file_has_its_layer():
    rooms = {room(".".join(file.relative_to(SOURCE).with_suffix("").parts)) for file in FILES} - {"__init__"}
    assert rooms <= LAYERS.keys()


def test_files_import_lower_layers_only():
    wrong = [one for one in BETWEEN if LAYERS[room(one.module)] > LAYERS[room(one.file)]]
    assert wrong == []


@pytest.mark.parametrize("layer", STRANGERS)
def test_siblings_never_meet(layer):
    assert [o for o in BETWEEN if LAYERS[room(o.file)] == LAYERS[room(o.module)] == layer] == []


def acyclic(arrows: set[tuple[str, str]]) -> None:
    """Fail with the circle if there is one."""
    graph: dict[str, set[str]] = {}
    for above, below in arrows:
        graph.setdefault(above, set()).add(below)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_no_cycles_between_rooms():
    acyclic({(room(one.file), room(one.module)) for one in BETWEEN})


def test_no_cycles_between_files():
    acyclic({(one.file, one.module) for one in INNER if not one.types_only and one.module})


@pytest.mark.parametrize("folder", sorted({room(one.file) for one in INNER if one.file.count(".") > 1}))
def test_no_cycles_between_the_rooms_of_a_room(folder):
    """Files that stand in the folder itself may be below its rooms or above them."""
    inside = [one for one in INNER if room(one.file) == room(one.module) == folder]
    inside = [one for one in inside if one.file.count(".") > 1 and one.module.count(".") > 1]
    arrows = {(one.file.rpartition(".")[0], one.module.rpartition(".")[0]) for one in inside}
    acyclic({(above, below) for above, below in arrows if above != below})


VERBS_AND_PAGES = ("cli", "commands", "demo", "pages", "api", "__main__")
"""Rooms whose files and functions are called as what they offer or show."""


def test_no_file_name_means_two_things():
    """A `request` or a `config` is that of its room, and a family of `convert` is named as the networks it reads."""
    places: dict[str, list[str]] = {}
    for file in FILES:
        name = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
        if room(name) not in VERBS_AND_PAGES and not name.startswith("convert.families."):
            places.setdefault(file.stem, []).append(name)
    assert {stem: at for stem, at in places.items() if len(at) > 1}.keys() <= {"__init__", "request", "config"}


def test_no_public_name_means_two_things():
    places: dict[str, list[str]] = {}
    for file in FILES:
        name = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and room(name) not in ("cli", "commands", "demo"):
                places.setdefault(node.name, []).append(name)
    assert {public: at for public, at in places.items() if len(at) > 1 and not public.startswith("_")} == {}


def test_no_import_is_hidden_from_a_type_checker():
    """What is imported for its types alone counts as an arrow, too."""
    assert [one for one in BETWEEN if one.types_only and LAYERS[room(one.module)] > LAYERS[room(one.file)]] == []


def test_flow_knows_tensors_only():
    """No network class, no dataset, no device, no file."""
    allowed = {"torch", "pydantic", "latentflow"}
    outer = {one.module.split(".")[0] for one in IMPORTS if room(one.file) == "flow"}
    assert outer - allowed <= {"__future__", "collections", "copy", "dataclasses", "itertools", "math", "typing", "abc"}
    assert {room(one.module) for one in INNER if room(one.file) == "flow"} <= {"flow", "shapes", "errors", "records"}


def test_only_the_runtime_and_trackers_know_accelerate():
    """The runtime for processes and devices, trackers for what takes the numbers of a run."""
    assert {one.file for one in IMPORTS if one.module.split(".")[0] == "accelerate"} == {"runtime", "training.trackers"}


def test_only_the_runtime_reads_what_a_launcher_says():
    """No other file asks the environment which process this one is."""
    asked = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID"}
    found = {
        str(file.relative_to(SOURCE))
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in asked
    }
    assert found == {"runtime.py"}


@pytest.mark.parametrize("library", ["torchvision", "timm", "scipy", "einops", "lpips", "cleanfid", "torch_fidelity"])
def test_banned_libraries(library):
    assert [one for one in IMPORTS if one.module.split(".")[0] == library] == []


@pytest.mark.parametrize("library", ["pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"])
def test_nothing_is_unpickled(library):
    assert [one for one in IMPORTS if one.module.split(".")[0] == library] == []


def test_torch_load_only_reads_weights():
    """`torch.load` stands in one place alone, with weights_only=True; numpy never gets allow_pickle."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load":
                assert file == SOURCE / "artifacts.py", file
                assert options.get("weights_only") == "True", file
            assert "allow_pickle" not in options, file
            assert "trust_remote_code" not in options, file


def test_text_files_are_utf_8_wherever_they_are_read_and_written():
    """`open`, `read_text` and `write_text` take the locale's encoding where none is said, which is ASCII or cp1252."""
    wrong = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
                continue
            called = ast.unparse(node.func)
            name, is_method = called.rpartition(".")[2], isinstance(node.func, ast.Attribute)
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            modes += [k.value.value for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
            is_binary = any(set(mode) <= set("rwabx+") and "b" in mode for mode in modes)
            opens = called == "open" or (is_method and name == "open" and _opens_a_path(node))
            if (opens and not is_binary) or (is_method and name in ("read_text", "write_text")):
                wrong.append(f"{file.relative_to(SOURCE)}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []


def _opens_a_path(call: ast.Call) -> bool:
    """Whether `x.open(...)` looks like that of a path: no argument, or a mode."""
    modes = [a.value if isinstance(a, ast.Constant) else None for a in call.args]
    return all(isinstance(mode, str) and set(mode) <= set("rwabxt+") for mode in modes)
