"""Read a dictionary of arrays from the .npy file that `numpy.save` wrote of it, without unpickling anything.

Such a file holds a pickle, which is a program. `pickletools` only lists its instructions; the few that numpy needs for
arrays are acted out here on plain values, and any other instruction or name ends the reading. No name that stands in
the file is ever imported or called.
"""

from __future__ import annotations

import math
import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latentflow.errors import ArtifactError

_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
_OBJECT = ("O8", "O4")
_MOST_INSTRUCTIONS = 10_000  # a mean and a covariance take about a hundred

_NAMES = {
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
    "__builtin__ bytes": "bytes",
    **{
        f"numpy.{core}.{name}": meaning
        for core in ("core", "_core")  # before and since numpy 2
        for name, meaning in (
            ("multiarray _reconstruct", "reconstruct"),
            ("multiarray scalar", "scalar"),
            ("numeric _frombuffer", "frombuffer"),
        )
    },
}
"""What numpy's pickles mention, and the name that `_reduce` knows it by."""


class _Name(NamedTuple):
    """A name that numpy's pickles mention; it stands for itself and can do nothing."""

    meaning: str


class _Single(NamedTuple):
    """The array without dimensions that `numpy.save` makes of an object before it writes it."""

    item: Any


class _DType:
    """An element type: its code, and the byte order that comes later."""

    def __init__(self, code: Any):
        if code not in _CODES + _OBJECT:
            raise _Refused(f"elements of type {code!r}")
        self.code, self.order = code, "<"

    def build(self, state: Any) -> None:
        _, order, *rest = state
        if order not in ("<", ">", "|", "=") or any(value is not None for value in rest[:3]):
            raise _Refused("a structured element type")
        self.order = order

    def array(self, data: Any, shape: Any, order: str) -> np.ndarray | _Single:
        if self.code in _OBJECT:
            if shape != () or not isinstance(data, list) or len(data) != 1:
                raise _Refused("an array of objects")
            return _Single(data[0])
        dtype = np.dtype(self.order + self.code)
        if not isinstance(data, bytes | bytearray) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise _Refused("an array without its bytes")
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise _Refused(f"{len(data)} bytes for an array of shape {shape}")
        return np.frombuffer(data, dtype).reshape(shape, order=order)


class _Array:
    """An array that is made empty and gets its content later."""

    content: np.ndarray | _Single | None = None

    def build(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self.content = dtype.array(data, shape, "F" if is_fortran else "C")


class _Refused(Exception):
    """What the pickle asks for and no array needs."""


def read_pickled_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays in a .npy file of `numpy.save(path, {"name": array, ...})`, written with any pickle protocol.

    Raises:
        ArtifactError: the file is missing or damaged, or it holds anything but named arrays of numbers: the message
            says what. Nothing in the file was executed.
    """
    try:
        with Path(path).open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
            shape, _, dtype = read_header(file)
            if not dtype.hasobject or shape != ():
                raise _Refused("no dictionary, but an array")
            found = _act_out(file.read())
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    except _Refused as error:
        raise ArtifactError(
            f"{path} was not read: it holds {error}. Only a dictionary of arrays of numbers is taken from a .npy file, "
            "since it may run programs; save the statistics as .npz with mu and sigma"
        ) from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ArtifactError(f"{path} is damaged, or not written by numpy.save ({error})") from error
    return found


def _act_out(program: bytes) -> dict[str, np.ndarray]:
    stack: list[Any] = []
    marks: list[int] = []
    memory: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
        if count > _MOST_INSTRUCTIONS:
            raise _Refused("far more than a few arrays")
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                if not isinstance(stack[-1], list):
                    raise _Refused(f"an item of a {type(stack[-1]).__name__}")
                stack[-1].append(item)
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":  # Python 2
                stack.append(argument.encode("latin1"))
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(instruction.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "MEMOIZE":
                memory[len(memory)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memory[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memory[argument])
            case "GLOBAL":
                stack.append(_known(argument))
            case "STACK_GLOBAL":
                module, name = stack.pop(-2), stack.pop()
                stack.append(_known(f"{module} {name}"))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_reduce(function, arguments))
            case "BUILD":
                state, target = stack.pop(), stack[-1]
                if not isinstance(target, _DType | _Array):
                    raise _Refused(f"a {type(target).__name__} with a state")
                target.build(state)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = since_mark()
                _set_items(stack[-1], items)
            case "STOP":
                break
            case other:
                raise _Refused(f"the pickle instruction {other}")
    return _arrays(stack.pop())


def _known(name: str) -> _Name:
    if name not in _NAMES:
        raise _Refused(f"the name {name.replace(' ', '.')}")
    return _Name(_NAMES[name])


def _reduce(function: Any, arguments: tuple) -> Any:
    """What numpy's own functions would make of plain values."""
    match function, arguments:
        case _Name("reconstruct"), (_Name("ndarray"), _, _):
            return _Array()
        case _Name("dtype"), (str(code), *_):
            return _DType(code)
        case _Name("dtype"), (bytes(code), *_):
            return _DType(code.decode("latin1"))
        case _Name("bytes"), ():
            return b""
        case _Name("encode"), (str(text), "latin1"):
            return text.encode("latin1")
        case _Name("scalar"), (_DType() as dtype, data):
            return dtype.array(data, (), "C")
        case _Name("frombuffer"), (data, _DType() as dtype, shape, ("C" | "F") as order):
            return dtype.array(data, shape, order)
    raise _Refused(f"a call of {getattr(function, 'meaning', function)!r}")


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise _Refused(f"items of a {type(target).__name__}")
    target.update(zip(items[::2], items[1::2], strict=True))


def _arrays(found: Any) -> dict[str, np.ndarray]:
    saved = found.content if isinstance(found, _Array) else None
    if not isinstance(saved, _Single) or not isinstance(saved.item, dict):
        raise _Refused("no dictionary")
    arrays = {}
    for name, value in saved.item.items():
        content = value.content if isinstance(value, _Array) else value
        if isinstance(content, int | float):
            content = np.array(content)
        if not isinstance(name, str) or not isinstance(content, np.ndarray):
            raise _Refused(f"an entry {name!r} that is no array")
        arrays[name] = content
    return arrays
