"""The columns of an Arrow store next to its images, with what `datasets` says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentflow.columns import ColumnKind
from latentflow.data.stores.arrow import ArrowStore
from latentflow.data.tables.table import ImageTable, LazyCells


def arrow_table(store: ArrowStore, without: Sequence[str] = ()) -> ImageTable:
    """The rows of a store as a table. A column is read when it is asked for.

    Columns of structs and of bytes are left out. The indices of ClassLabel become the names of the classes; below 0
    they are not known.

    Args:
        without: columns to leave out.
    """
    from pyarrow import types

    def is_plain(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            return not types.is_nested(kind.value_type) and is_plain(kind.value_type)
        return not (types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))

    names = [field.name for field in store.schema if field.name not in without and is_plain(field.type)]
    stated = {name: found for name in names if (found := _classes(store.features.get(name)))}

    def read(name: str) -> list[Any]:
        cells = store.column(name)
        return [_named(cell, stated[name][1]) for cell in cells] if name in stated else cells

    kinds: dict[str, ColumnKind] = {name: kind for name, (kind, _) in stated.items()}
    classes = {name: class_names for name, (_, class_names) in stated.items()}
    return ImageTable(str(store.path), LazyCells(names, read), lambda row: f"row {row}", kinds, classes)


def _classes(feature: Any) -> tuple[ColumnKind, tuple[str, ...]] | None:
    """Kind and classes of a column of class labels or of lists of them; None for other columns."""
    if isinstance(feature, list) and len(feature) == 1:  # how earlier versions wrote a list
        feature = {"_type": "List", "feature": feature[0]}
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list):
        return "label", tuple(map(str, feature["names"]))
    inner = _classes(feature.get("feature")) if feature.get("_type") in ("List", "LargeList", "Sequence") else None
    return ("labels", inner[1]) if inner and inner[0] == "label" else None


def _named(cell: Any, class_names: Sequence[str]) -> Any:
    if isinstance(cell, list):
        return [_named(one, class_names) for one in cell]
    return class_names[cell] if isinstance(cell, int) and 0 <= cell < len(class_names) else None
