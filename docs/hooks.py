"""What of the documentation is written by the code itself, when `make docs` builds the site.

The command reference is read from the parser, the recipe reference from the records that check a recipe, and the Python
reference from docstrings (by mkdocstrings, which parses and imports nothing). Equations become MathML, which browsers
typeset without a script.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "latentflow"
ELSEWHERE = {
    "benchmarks.md": ROOT / "benchmarks" / "README.md",
    "ladder/RESULTS.md": ROOT / "benchmarks" / "ladder" / "RESULTS.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "changelog.md": ROOT / "CHANGELOG.md",
}
"""Pages that are kept outside docs/."""

ROOMS = {
    "flow": "paths, times, loss, guidance, solvers: functions of tensors",
    "networks": "velocity networks, their layers, and how they run",
    "autoencoder": "any diffusers autoencoder: pixels, moments, latents, pixels",
    "data": "image sources, latent caches, masks and semantic maps, batches",
    "model": "network, path, conditioning and autoencoder as one folder",
    "training": "the loop, its step, optimizer, EMA, checkpoints and recipes",
    "sampling": "requests, the sampler, inpainting, maps, edits, inversion",
    "metrics": "features and scores",
    "analysis": "what a velocity does: bound, Lipschitz constants, trajectories",
    "evaluation": "drawing, reading and scoring sets of images",
    "convert": "published weights in, diffusers' classes and ONNX files out",
    "planning": "what a run takes in memory, time and disk",
    "commands": "the commands, callable from Python",
    "requests": "what a command can be asked, as checked records",
    "runtime": "device, processes and precision",
    "errors": "what is raised",
}
"""Rooms and files of the package that have a page of the Python reference."""


FIRST = {
    "flow": ("path", "loss", "times", "guidance", "solvers", "multistep"),
    "networks": ("velocity_network", "dit", "unet"),
    "data": ("items", "batches"),
    "model": ("flow_model", "conditioning", "config"),
    "training": ("config", "step", "loop"),
    "sampling": ("request", "pipeline", "samples", "inpaint", "mask_to_image", "translate", "edits", "inversion"),
    "metrics": ("scores", "neighbours", "pairs", "feature_scores", "evaluation_report"),
    "evaluation": ("request", "subject", "scoring"),
    "convert": ("request", "published"),
}
"""What a reader of a room looks for first; its other files follow by name."""


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and those that are kept elsewhere."""
    from mkdocs.structure.files import File

    for page, file in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(file)))
    written = {"reference/commands.md": command_page(), "reference/recipes.md": recipe_page()}
    written |= {f"reference/python/{room}.md": python_page(room) for room in ROOMS}
    for page, text in written.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_content(text: str, **_: Any) -> str:
    """Typeset equations."""
    return typeset(text)


# The command line


def command_page() -> str:
    """Every command with its arguments and options, as the parser has them."""
    import typer

    from latentflow.cli.options import app, every_command

    group = typer.main.get_command(app)
    context = group.make_context("latentflow", ["recipes"], resilient_parsing=True)
    parts = [
        "# Commands\n",
        "This page is generated from the command line; `latentflow COMMAND --help` prints the same.\n",
        "An option of `latentflow` itself may stand before or after the command:\n",
        _table(group, context, "option"),
    ]
    heading = None
    for name, command in every_command().items():
        inner = type(context)(command, info_name=name, parent=context)
        usage = " ".join(["latentflow", name, *command.collect_usage_pieces(inner)])
        example = (command.epilog or "").removeprefix("Example: ")
        panel = group.get_command(context, name).rich_help_panel
        if panel not in (heading, None):
            heading = panel
            parts.append(f"\n## {heading}\n")
        parts += [f"\n{'###' if heading else '##'} latentflow {name} {{: #{name} }}\n", _text(command.help)]
        parts.append(f"\n    {usage}\n")
        parts += [f"For example:\n\n    {example}\n"] if example else []
        parts += [_table(command, inner, kind) for kind in ("argument", "option")]
    return "\n".join(parts)


def _table(command: Any, context: Any, kind: str) -> str:
    """Arguments or options as a table, from what the parser would print; empty where there are none."""
    parameters = [one for one in command.get_params(context) if one.param_type_name == kind]
    records = [record for one in parameters if (record := one.get_help_record(context))]
    rows = []
    for name, meaning in records:
        text, _, extra = meaning.partition("  [") if meaning.endswith("]") else (meaning, "", "")
        cells = (f"<code>{html.escape(name)}</code>", _inline(text), _inline(extra.removesuffix("]")))
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n")
    if not rows:
        return ""
    head = "".join(f"<th>{title}</th>" for title in (kind.title(), "Meaning", "Default or range"))
    return f'\n<table class="options"><thead><tr>{head}</tr></thead><tbody>\n{"".join(rows)}</tbody></table>\n'


def _text(docstring: str | None) -> str:
    """A docstring as paragraphs of HTML."""
    paragraphs = re.split(r"\n\s*\n", (docstring or "").strip())
    return "\n".join(f"<p>{_inline(' '.join(paragraph.split()))}</p>" for paragraph in paragraphs) + "\n"


def _inline(text: str) -> str:
    """Text in which only backticks mean something, as HTML."""
    parts = re.split(r"`([^`]+)`", " ".join(text.split()))
    return "".join(f"<code>{html.escape(part)}</code>" if n % 2 else html.escape(part) for n, part in enumerate(parts))


# Recipes


def recipe_page() -> str:
    """Every key of a recipe, with its type, default and meaning, from the records that check it."""
    from latentflow.training.config import Recipe, load_recipe, recipe_names
    from latentflow.training.first_stage import AUTOENCODER_RECIPES, AutoencoderRecipe, load_autoencoder_recipe
    from latentflow.training.student_recipe import STUDENT_RECIPES, StudentRecipe, load_student_recipe

    rows = [(f"`{name}`", load_recipe(name).description) for name in recipe_names()]
    stages = [(f"`{name}`", load_autoencoder_recipe(name).description) for name in recipe_names(AUTOENCODER_RECIPES)]
    students = [(f"`{name}`", load_student_recipe(name).description) for name in recipe_names(STUDENT_RECIPES)]
    return "\n".join(
        [
            "# Recipes\n",
            "This page is generated from the records that check a recipe.\n",
            "A recipe is a YAML file, or one of the names below. Any key can be overridden on the command line: "
            "`latentflow train own_images training.steps=50000`. Unknown keys are refused, and the nearest valid one "
            "is named.\n",
            "## Recipes of `latentflow train` {: #named }\n",
            _markdown_table(("Name", "What it trains"), rows),
            "## Recipes of `latentflow train-autoencoder` {: #named-autoencoders }\n",
            _markdown_table(("Name", "What it trains"), stages),
            "## Recipes of `latentflow distill` {: #named-students }\n",
            _markdown_table(("Name", "What it trains"), students),
            "## Keys of `latentflow train` {: #keys }\n",
            _keys(Recipe),
            "## Keys of `latentflow train-autoencoder` {: #autoencoder-keys }\n",
            _keys(AutoencoderRecipe),
            "## Keys of `latentflow distill` {: #student-keys }\n",
            _keys(StudentRecipe),
        ]
    )


def _markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _keys(schema: Any) -> str:
    """A table of the keys of a record, those of its sections included."""
    head = "<tr><th>Key</th><th>Value</th><th>Meaning</th></tr>"
    return f'<table class="options"><thead>{head}</thead><tbody>\n{"".join(_rows(schema, ""))}</tbody></table>\n'


def _rows(schema: Any, prefix: str) -> list[str]:
    rows = []
    for name, field in schema.model_fields.items():
        sections = _sections(field.annotation)
        for section in sections:
            kind = f", <code>kind: {_kind(section)}</code>" if len(sections) > 1 else ""
            about = _inline((section.__doc__ or "").strip().split("\n\n")[0])
            rows.append(f'<tr class="section"><td colspan="3"><code>{prefix}{name}</code>{kind}: {about}</td></tr>\n')
            rows += _rows(section, f"{prefix}{name}.")
        if not sections and name != "kind":
            value = "; ".join([html.escape(_type(field.annotation)), *_default(field)])
            cells = (f"<code>{prefix}{name}</code>", value, _inline(field.description or ""))
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n")
    return rows


def _default(field: Any) -> list[str]:
    """What is taken where nothing is said, as a recipe would have it; none where that follows from other keys."""
    if field.is_required() or field.default_factory_takes_validated_data:
        return ["required"] if field.is_required() else []
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = '""' if value == "" else str(list(value) if type(value) is tuple else value)
    return [f"default <code>{html.escape(text)}</code>"]


def _alternatives(annotation: Any) -> list[Any]:
    """The types that an annotation allows, without what is only attached to them."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [one for part in get_args(annotation) for one in _alternatives(part)]
    return [annotation]


def _sections(annotation: Any) -> list[Any]:
    return [one for one in _alternatives(annotation) if hasattr(one, "model_fields")]


def _kind(section: Any) -> str:
    return section.model_fields["kind"].default


def _type(annotation: Any) -> str:
    """A type in a reader's words."""
    from latentflow.sizes import Size

    words = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null", Size: "size"}
    said = []
    for one in _alternatives(annotation):
        if get_origin(one) is Literal:
            said.append(", ".join(map(str, get_args(one))))
        elif get_origin(one) in (list, tuple):
            said.append("list")
        else:
            said.append(words.get(one, getattr(one, "__name__", str(one))))
    return " or ".join(said)


# Python


def python_page(room: str) -> str:
    """A page of the Python reference, which mkdocstrings fills: the file, or every file of the room."""
    head = f"# latentflow.{room}\n\n{ROOMS[room][0].upper()}{ROOMS[room][1:]}.\n"
    if (SOURCE / f"{room}.py").is_file():
        return f"{head}\n::: latentflow.{room}\n"
    files = [file.relative_to(SOURCE / room).with_suffix("") for file in (SOURCE / room).rglob("*.py")]
    names = {".".join(file.parts) for file in files if file.stem != "__init__" and "templates" not in file.parts}
    first = FIRST.get(room, ())
    parts = [head]
    for name in (*first, *sorted(names.difference(first))):
        parts.append(f"\n## {room}.{name}\n\n::: latentflow.{room}.{name}\n    options: {{heading_level: 3}}\n")
    return "".join(parts)


# Equations


def typeset(text: str) -> str:
    """HTML in which the TeX that arithmatex marked is MathML."""
    from latex2mathml.converter import convert

    def inline(found: re.Match[str]) -> str:
        return convert(html.unescape(found[1]))

    def block(found: re.Match[str]) -> str:
        return f'<div class="equation">{convert(html.unescape(found[1]), display="block")}</div>'

    text = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, text, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', block, text, flags=re.DOTALL)
