"""Options of a verb, generated from the record of what it can be asked.

    @command(example="latentflow sample runs/pets --num 4 --out samples")
    def sample(model: Model, request: SampleRequest, out: ..., device: Device = None) -> None: ...

A parameter that is a request stands for the options of its fields; the others are options as typer knows them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from latentflow.errors import ConfigError
from latentflow.records import alternatives
from latentflow.requests import FromText, Option, Request, RequestError, markers_of, option_of, range_text
from latentflow.sizes import Size


class Precision(str, Enum):
    """What networks compute in."""

    auto = "auto"
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"
    fp16 = "fp16"


AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or mps; default: a GPU if there is one. Each of several processes gets its own."),
]
ComputesIn = Annotated[
    Precision, typer.Option(help="What the network computes in; auto: bf16 on a GPU that has it, else fp32.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images computed together; does not change them.")]
Model = Annotated[str, typer.Argument(help="A model folder, a run folder or a hub id.")]


@dataclass(frozen=True)
class _Verb:
    """A verb of the command line; its options are made when it is called, so that the list of verbs is quick."""

    function: Callable[..., None]
    example: str
    group: str

    @property
    def name(self) -> str:
        return self.function.__name__.replace("_", "-")

    def summary(self) -> typer.core.TyperCommand:
        """What the list of verbs shows."""
        return typer.core.TyperCommand(self.name, help=inspect.getdoc(self.function), rich_help_panel=self.group)

    def command(self) -> typer.core.TyperCommand:
        """The whole command."""
        signature = inspect.signature(self.function, eval_str=True)
        records = {
            name: parameter.annotation
            for name, parameter in signature.parameters.items()
            if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, Request)
        }
        parameters, adapted = [], ""
        for name, parameter in signature.parameters.items():
            if name in records:
                parameters += _parameters(records[name])
                adapted = adapted or _adapted(records[name])
            else:
                parameters.append(parameter.replace(annotation=_refusing_empty(parameter.annotation)))
                adapted = name if parameter.annotation == Model else adapted
        parameters += _ADAPTER_OPTIONS if adapted else []
        arguments_first = sorted(parameters, key=lambda one: not isinstance(_info(one), typer.models.ArgumentInfo))

        def run(**options: Any) -> None:
            if adapted:
                options[adapted] = _with_adapter(
                    options[adapted], options.pop("adapter"), options.pop("adapter_strength")
                )
            given = {name: _asked(record, options) for name, record in records.items()}
            try:
                self.function(**options, **given)
            except RequestError as error:  # by what the model cannot do
                raise _as_written(error, given.values()) from None

        run.__name__, run.__doc__ = self.function.__name__, self.function.__doc__
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        run.__signature__ = inspect.Signature(  # what typer reads
            [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in arguments_first]
        )
        alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
        alone.command(self.name, epilog=f"Example: {self.example}", rich_help_panel=self.group)(run)
        return typer.main.get_command(alone)


_VERBS: dict[str, _Verb] = {}


class _Verbs(typer.core.TyperGroup):
    """The verbs, of which only the one that is called is made in full."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _VERBS[cmd_name].summary() if cmd_name in _VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        return name, found and _VERBS[found.name].command(), rest


app = typer.Typer(
    name="latentflow",
    help="Train, sample and measure image generators by flow matching in the latent space of a pretrained autoencoder.",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def command(*, example: str, group: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to the command line as a verb, with an example below its help.

    Args:
        group: the heading that it stands under in the list of verbs.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        verb = _Verb(function, example, group)
        _VERBS[verb.name] = verb
        return function

    return decorate


def every_command() -> dict[str, typer.core.TyperCommand]:
    """All verbs in full, as the documentation shows them."""
    return {name: verb.command() for name, verb in _VERBS.items()}


def _adapted(record: type[Request]) -> str:
    """The field of a request that names a model to which an adapter can be added; "" for none."""
    return next((name for name, field in record.model_fields.items() if option_of(field).adapts), "")


_ADAPTER_OPTIONS = [
    inspect.Parameter(
        "adapter",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            list[str] | None,  # of several, the last would be taken
            typer.Option(
                "--adapter",
                metavar="ADAPTER",
                help="Low-rank differences that were trained on MODEL: their folder, the run of `finetune --method "
                "lora` that made them, or a hub id.",
            ),
        ],
    ),
    inspect.Parameter(
        "adapter_strength",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            list[str] | None,
            typer.Option(
                "--adapter-strength",
                metavar="NUMBER",
                help="Strength of the adapter, 0 to 10; 0: MODEL itself, 1 (default): as trained.",
            ),
        ],
    ),
]


def _with_adapter(model: str, adapters: list[str] | None, strengths: list[str] | None) -> str:
    """The name of a model with the adapter that is given, if one is.

    Raises:
        ConfigError: an option is given twice, or does not fit.
    """
    from latentflow.model.adapter_name import adapted_name

    for option, values in (("--adapter", adapters), ("--adapter-strength", strengths)):
        if len(values or []) > 1:
            raise ConfigError(f"{option} is given twice, {' and '.join(values or [])}; give one")
    adapter, typed = (next(iter(values or []), None) for values in (adapters, strengths))
    try:
        strength = None if typed is None else float(typed)
    except ValueError:
        raise ConfigError(f"--adapter-strength {typed!r} is not a number; give one from 0 to 10, like 0.7") from None
    try:
        named = adapted_name(model, adapter, strength)
    except RequestError as error:
        raise ConfigError(f"{_flag(error.field)}{error.reason}") from None
    return str(named) if named else model


def _info(parameter: inspect.Parameter) -> object:
    return parameter.annotation.__metadata__[0] if get_origin(parameter.annotation) is Annotated else None


def _parameters(record: type[Request]) -> list[inspect.Parameter]:
    """The options and arguments that a request's fields are."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=_annotation(name, field),
        )
        for name, field in _own_first(record).items()
    ]


def _default(field: FieldInfo) -> Any:
    """The default as it is written on the command line."""
    if field.is_required():
        return inspect.Parameter.empty
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Size):
        return str(default)
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else default


def _own_first(record: type[Request]) -> dict[str, FieldInfo]:
    """The fields of a request, those that it has in common with others behind its own."""
    names = [name for kind in record.__mro__ for name in getattr(kind, "__annotations__", {})]
    return {name: record.model_fields[name] for name in dict.fromkeys(names) if name in record.model_fields}


def _annotation(name: str, field: FieldInfo) -> Any:
    """A field as typer knows options: its type, or text that is read by its `FromText`."""
    option, kind = option_of(field), _kind(field)
    between = range_text(field)
    described = f"{field.description} ({between})" if between and kind in (int, float) else field.description
    if option.argument:
        info = typer.Argument(help=described, metavar=option.metavar)
    else:
        names = (option.name,) if option.name else (_flag(name),) if kind is bool and not field.get_default() else ()
        info = typer.Option(*names, help=described, metavar=option.metavar)
    annotation = Annotated[kind if field.is_required() or field.get_default() is not None else kind | None, info]
    return annotation if _reader(field) else _refusing_empty(annotation)


def _reader(field: FieldInfo) -> FromText | None:
    return next((one for one in markers_of(field) if isinstance(one, FromText)), None)


def _refusing_empty(annotation: Any) -> Any:
    """Texts and paths that are not empty: Path("") would be the current folder. Other annotations are unchanged."""
    if get_origin(annotation) is not Annotated:
        return annotation
    (inner, info), kinds = get_args(annotation), alternatives(annotation)
    reader = next((read for kind, read in ((str, text), (Path, path)) if kind in kinds), None)
    if reader is None:
        return annotation
    info = copy(info)
    info.parser = reader
    return Annotated[inner, info]


def text(given: str) -> str:
    """What is typed, if anything is."""
    if not given:
        raise typer.BadParameter("give a value; this one is empty")
    return given


def path(given: str) -> Path:
    """The path that is typed, if one is."""
    return Path(text(given))


def _kind(field: FieldInfo) -> Any:
    """int, float, bool, Path, a Literal, or str for whatever else is written as text."""
    if reader := _reader(field):
        return list[str] if reader.repeats else str
    kinds = [kind for kind in alternatives(field.annotation) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and (kinds[0] in _TYPED or get_origin(kinds[0]) is Literal) else str


_TYPED = (int, float, bool, Path, list[str])  # a list without a `FromText` is given as several words


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _asked(record: type[Request], options: dict[str, Any]) -> Request:
    """Take the options of a record out of all options, and check them.

    Raises:
        ConfigError: in one line that names the option as it is written.
    """
    given = {}
    for name, field in record.model_fields.items():
        value, reader = options.pop(name), _reader(field)
        if reader is not None and reader.repeats:
            value = _each(value or [], reader, _written(name, option_of(field))) or None
        elif isinstance(value, str) and reader is not None:
            value = _read(value, reader, _written(name, option_of(field)))
        given[name] = value
    try:
        return record(**given)
    except RequestError as error:
        if not error.field:
            raise
        option = option_of(record.model_fields[error.field])
        raise ConfigError(f"{_written(error.field, option)}{error.reason}") from None


def _read(given: str, reader: FromText, option: str) -> Any:
    try:
        return reader.parse(given)
    except ValueError as error:
        raise ConfigError(f"{option} {given!r} {error}") from None


def _each(given: Iterable[str], reader: FromText, option: str) -> dict[str, Any]:
    """What an option means that is given several times, each time with another name."""
    values: dict[str, Any] = {}
    for one in given:
        name, value = _read(one, reader, option)
        if name in values:
            raise ConfigError(f"{option} {one!r}: {name} is given twice; give it once")
        values[name] = value
    return values


def _as_written(error: RequestError, requests: Iterable[Request]) -> ConfigError:
    """The error with the option in the place of the field, if the option was given."""
    for request in requests:
        field = type(request).model_fields.get(error.field)
        if field is not None and getattr(request, error.field) != field.get_default(call_default_factory=True):
            return ConfigError(f"{_written(error.field, option_of(field))}{error.reason}")
    return error


def _written(name: str, option: Option) -> str:
    return (option.metavar or name.upper()) if option.argument else option.name or _flag(name)
