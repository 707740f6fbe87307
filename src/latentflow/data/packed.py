"""Many short texts, such as the names of a million files, without one Python object for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from latentflow.data.prefetch import shared_bytes


class PackedBytes(Sequence[bytes]):
    """Byte strings end to end in one array: little memory, and none of it copied into worker processes.

    A forked worker has no reference counts to write; a spawned one gets shared memory.
    """

    def __init__(self, items: Iterable[bytes]):
        whole, ends = bytearray(), [0]
        for item in items:
            whole += item
            ends.append(len(whole))
        self._bytes, self._ends = np.frombuffer(bytes(whole), np.uint8), np.array(ends)
        self._sent: tuple[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self._bytes[self._ends[index] : self._ends[index + 1]].tobytes()

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedBytes):
            return NotImplemented
        return np.array_equal(self._ends, other._ends) and np.array_equal(self._bytes, other._bytes)

    __hash__ = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self._sent is None:  # one copy for all processes; torch passes tensors as shared memory
            num_bytes = self._bytes.nbytes + self._ends.nbytes
            there_is_room = _LEAST_SHARED < num_bytes < shared_bytes() / 4
            as_shared = (lambda array: torch.from_numpy(array.copy())) if there_is_room else (lambda array: array)
            self._sent = as_shared(self._bytes), as_shared(self._ends)
        return _unpacked, (type(self), *self._sent)


class PackedText(PackedBytes):
    """The same for texts, which may contain bytes of file names that are not UTF-8."""

    def __init__(self, texts: Iterable[str]):
        super().__init__(text.encode("utf-8", "surrogatepass") for text in texts)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return found if isinstance(found, list) else found.decode("utf-8", "surrogatepass")


_LEAST_SHARED = 1 << 14  # bytes; fewer are quickly copied


def _unpacked(kind: type[PackedBytes], whole: Any, ends: Any) -> PackedBytes:
    packed = kind.__new__(kind)
    packed._bytes, packed._ends, packed._sent = np.asarray(whole), np.asarray(ends), None
    return packed
