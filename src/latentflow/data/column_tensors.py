"""Values of named columns as tensors: as a latent cache stores them, and as a network gets them.

Legend: n images, K classes of a column, W numbers of all columns of an image; see `ColumnRow`.

    kind     stored
    label    [n] int32: the index; K: not known
    labels   [n, (K + 8) // 8] uint8: a bit for each class, from the lowest bit of the first byte on; bit K: not known
    number   [n, 2] float64: the number, 0; not known: 0, 1
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from latentflow.columns import Column, ColumnValue

_BITS = 8


def stored_values(column: Column, values: Sequence[ColumnValue]) -> Tensor:
    """Values of one column of n images as a cache stores them."""
    unknown = column.num_classes
    if column.kind == "label":
        return torch.tensor([unknown if value is None else value for value in values], dtype=torch.int32)
    if column.kind == "number":
        pairs = [(0.0, 1.0) if value is None else (float(value), 0.0) for value in values]
        return torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
    bits = [sum(1 << bit for bit in ((unknown,) if value is None else value)) for value in values]
    num_bytes = unknown // _BITS + 1
    whole = b"".join(one.to_bytes(num_bytes, "little") for one in bits)
    return torch.from_numpy(np.array(bytearray(whole), np.uint8)).reshape(len(values), num_bytes)


def row_values(column: Column, stored: Tensor) -> Tensor:
    """Stored values of one column of n images as a network gets them: [n, width] float32, on the same device."""
    if column.kind == "label":
        return stored[:, None].float()
    if column.kind == "number":
        return stored.float()
    bits = stored[..., None] >> torch.arange(_BITS, dtype=torch.uint8, device=stored.device)
    return (bits & 1).flatten(1)[:, : column.num_classes + 1].float()


def joined_rows(columns: Sequence[Column], stored: Iterable[Tensor]) -> Tensor:
    """Stored values of several columns of n images as a network gets them: [n, W] float32."""
    return torch.cat([row_values(*pair) for pair in zip(columns, stored, strict=True)], dim=1)


def rows_of(columns: Sequence[Column], values: Sequence[Sequence[ColumnValue]]) -> Tensor:
    """The values of `columns` of n images as a network gets them: [n, W] float32."""
    of_each = zip(*values, strict=True) if values else ((),) * len(columns)
    return joined_rows(columns, [stored_values(*pair) for pair in zip(columns, of_each, strict=True)])
