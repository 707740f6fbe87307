"""Classes as a person writes them: names, or indices like "#3"."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Iterable, Sequence, Set

from latentflow.errors import ConfigError, nearest

ClassList = int | str | Sequence[int | str]
"""Classes as a person gives them: one, or a list of either names or indices; see `class_indices`."""


def class_index(class_names: Sequence[str], given: int | str) -> int:
    """The index of one class: a number is the index; a text is a name, or "#3" for an index that is no name.

    Names are compared exactly, then in Unicode's composed form (NFC).

    Raises:
        ConfigError: there is no such class; with the nearest name, or with how an index is written.
    """
    if isinstance(given, str) and (index := _named(class_names, given)) is not None:
        return index
    num_classes = len(class_names)
    if not num_classes:
        raise ConfigError(f"class {str(given)!r}: this model has no classes; leave the classes out")
    index = _written_index(given)
    if index is not None:
        if 0 <= index < num_classes:
            return index
        raise ConfigError(f"class #{index} does not exist; this model has the classes #0 to #{num_classes - 1}")
    name = given.strip()
    hint = nearest(name, [in_a_list(one) for one in class_names])
    if cut := next((one for one in class_names if one.startswith(f"{name},")), None):
        hint = f"a name with a comma stands in double quotes: {in_a_list(cut)}"
    elif re.fullmatch("[0-9]{1,9}", name) and int(name) < num_classes:
        hint = f"the class with that index, {class_names[int(name)]!r}, is written '#{int(name)}'"
    raise ConfigError(f"no class is named {name!r}; {hint}")


def class_indices(class_names: Sequence[str], given: ClassList) -> list[int]:
    """The indices of one class or of a list of them; empty for "none" or an empty list: no label is given.

    Where a class is called none, "#none" means no label.

    Raises:
        ConfigError: there is no such class, or names and indices are mixed.
    """
    if isinstance(given, Set):
        raise ConfigError(f"classes {given!r}: a set has no order; give a list")
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else [given]
    asked = [one if isinstance(one, str) else _written_index(one) for one in listed]
    indices = [one for one in asked if not _is_name(class_names, one)]
    if len(listed) == 1 and (indices == ["#none"] or (listed == ["none"] and _named(class_names, "none") is None)):
        return []
    if indices and len(indices) < len(listed):
        name = next(one for one in listed if _is_name(class_names, one))
        index = str(indices[0]).strip().lstrip("#")
        raise ConfigError(f"the classes {name!r} and '#{index}' in one list; give all by name, or all by index")
    return [class_index(class_names, one) for one in listed]


def _is_name(class_names: Sequence[str], given: int | str) -> bool:
    return isinstance(given, str) and (_named(class_names, given) is not None or not given.strip().startswith("#"))


def _named(class_names: Sequence[str], text: str) -> int | None:
    for name in (text, text.strip()):
        if name in class_names:
            return class_names.index(name)
    composed = [unicodedata.normalize("NFC", name) for name in class_names]
    wanted = unicodedata.normalize("NFC", text.strip())
    return composed.index(wanted) if wanted in composed else None


def in_a_list(name: str) -> str:
    """A class's name as it is written in a list in CSV."""
    return '"' + name.replace('"', '""') + '"' if "," in name or name.startswith('"') else name


def _written_index(given: int | str) -> int | None:
    """The index that a number or a text like "#3" stands for; None: it is a name."""
    if isinstance(given, str):
        written = re.fullmatch("#(-?[0-9]{1,18})", given.strip())
        return int(written[1]) if written else None
    if isinstance(given, bool) or not hasattr(given, "__index__"):
        raise ConfigError(f"class {given!r} is neither a name nor an index; give a text or a whole number")
    return operator.index(given)
