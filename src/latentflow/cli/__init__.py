"""The command line: parses and prints. What a verb does is imported when it runs, so that help is quick."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

import typer

from latentflow.cli.options import app
from latentflow.console import open_streams
from latentflow.door import guarded, hush_libraries
from latentflow.errors import ConfigError, nearest

# isort: split
# each adds its verbs, in the order of the help
from latentflow.cli import data  # noqa: F401  isort: skip
from latentflow.cli import training  # noqa: F401  isort: skip
from latentflow.cli import drawing  # noqa: F401  isort: skip
from latentflow.cli import measuring  # noqa: F401  isort: skip
from latentflow.cli import models  # noqa: F401  isort: skip
from latentflow.cli import serving  # noqa: F401  isort: skip


@app.callback()
def shared(
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify", help="Do not verify the checksums of files that are read; may also follow the command."
        ),
    ] = False,
) -> None:
    """What every command understands."""
    if no_verify:
        from latentflow.artifacts import verify_checksums

        verify_checksums(False)


def main() -> None:
    """Run the command line; whatever goes wrong is one line on stderr and an exit code: see `latentflow.door`."""
    open_streams()
    hush_libraries()
    sys.exit(guarded(_run))


def _run() -> int:
    command = typer.main.get_command(app)
    try:
        # what every command understands may stand anywhere, and is looked for in front
        args = sorted(sys.argv[1:], key=lambda arg: arg != "--no-verify")
        with command.make_context("latentflow", args or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _USAGE_ERROR as error:
        raise ConfigError(_usage_line(error)) from error
    if (runtime := sys.modules.get("latentflow.runtime")) is not None:  # which most help does without
        runtime.leave()
    return 0


_USAGE_ERROR = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What the parser raises; typer brings its own copy of click, or uses the one that is installed."""


def _usage_line(error: Any) -> str:
    """What is wrong with a command line, and the nearest that would be right."""
    message = error.format_message().rstrip(".").replace("Value error, ", "")
    command = error.ctx.command if error.ctx else None
    path = error.ctx.command_path if error.ctx else _path_typed()
    if unknown := re.match(r"No such command '(.*?)'", message):
        return f"there is no {path} {unknown[1]!r}; {nearest(unknown[1], command.list_commands(error.ctx))}"
    if hasattr(error, "possibilities"):
        options = [name for one in command.params for name in (*one.opts, *one.secondary_opts)]
        options = [name for name in options if name.startswith("--")]
        return f"{path} has no option {error.option_name}; {nearest(error.option_name, [*options, '--help'])}"
    parameter = getattr(error, "param", None)
    if message.startswith("Missing ") and parameter is not None:
        named = [name for name in parameter.opts if name.startswith("--")]
        message = f"{path} needs {named[0] if named else (parameter.metavar or parameter.name).upper()}"
    elif message.startswith("Invalid value for ") and parameter is not None:
        is_option = parameter.opts[0].startswith("-")
        name = parameter.opts[0] if is_option else (parameter.metavar or parameter.name).upper()
        value = _typed_behind(parameter.opts) if is_option else None
        message = f"{name}{'' if value is None else f' {value!r}'}: {message.partition(': ')[2]}"
    for theirs, ours in _PARSER_SAYS.items():
        message = message.replace(theirs, ours)
    return f"{message}; see `{path} --help`"


_PARSER_SAYS = {
    "Input should be a valid integer, unable to parse string as an integer": "give a whole number",
    "Input should be a valid number, unable to parse string as a number": "give a number",
    "Input should be greater than or equal to": "give at least",
}
"""The parser's words about types, and what to give."""


def _path_typed() -> str:
    """The command as far as it was understood: the verb, if there is one."""
    verbs = typer.main.get_command(app).list_commands(None)
    return " ".join(["latentflow", *[word for word in sys.argv[1:] if word in verbs][:1]])


def _typed_behind(options: list[str]) -> str | None:
    """The value that was given for an option; None for what is no option."""
    for word, following in zip(sys.argv, [*sys.argv[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name in options:
            return value if equals else following
    return None
