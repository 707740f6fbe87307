"""What the command line prints: short tables, or JSON for a script."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latentflow.cli.options import Precision
from latentflow.console import printable

if TYPE_CHECKING:
    from latentflow.runtime import Runtime
    from latentflow.sampling.named_files import Pictures
    from latentflow.sampling.picture_folder import DrawnFolder


def runtime_for(device: str | None, precision: Precision = Precision.auto) -> Runtime:
    """The runtime of a verb, opened once."""
    from latentflow.runtime import open_runtime

    return open_runtime(device, precision.value)


def teller(print_recipe: bool) -> Callable[[Any], None]:
    """Prints what a prepared run is in about ten lines, or its whole recipe, once."""

    def tell(prepared: Any) -> None:
        from latentflow.training.settings import to_yaml

        lines = [f"{key:<10} {printable(value)}" for key, value in prepared.describe().items()]
        if prepared.runtime.is_main:
            typer.echo(to_yaml(prepared.recipe) if print_recipe else "\n".join(lines))

    return tell


def folder_rows(result: DrawnFolder) -> dict[str, Any]:
    """What drawing into a folder took."""
    return {
        "grid": str(result.grid),
        "evaluations per image": round(result.evaluations, 2),
        "seconds": round(result.seconds, 2),
    }


def picture_rows(result: Pictures) -> dict[str, Any]:
    return {
        "files": ", ".join(map(str, result.files)),
        "evaluations per image": round(result.evaluations, 2),
        "seconds": round(result.seconds, 2),
    }


def show(rows: dict[str, Any], as_json: bool) -> None:
    """A short two-column table, or JSON for a script."""
    if as_json:
        from latentflow.artifacts import json_line

        typer.echo(json_line(rows))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut short is of no use
    for key, value in rows.items():
        table.add_row(f"[bold]{escape(printable(key))}", escape(printable(_in_words(value))))
    Console().print(table)


def _in_words(value: Any) -> Any:
    """A value of a table as a reader expects it; Python's own constants mean nothing to many."""
    named = {True: "yes", False: "no", None: "none"}
    return named[value] if value is None or isinstance(value, bool) else value


def shortened(value: Any, most: int = 12) -> Any:
    """A list of texts as a line of the first few; other values as they are."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return value
    if len(value) <= most:
        return ", ".join(value) or "none"
    return f"{len(value):,}: {', '.join(value[:5])}, ... (all of them with --json)"
