"""Rules between a foreign checkpoint and our weights, in both directions, with every key accounted for.

A key map lists every tensor of our network with the foreign tensors it is made of. It has no shapes: the shape of a
foreign tensor follows from ours by the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentflow.errors import ArtifactError, nearest


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _same_back(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


@dataclass(frozen=True)
class Rule:
    """How one tensor of ours is made of foreign ones.

    Attributes:
        ours: our key.
        theirs: the foreign keys.
        forth: foreign tensors (float64) => ours.
        back: ours => the foreign tensors; their shapes are always right, their values only if `exact_back`.
        exact_back: whether `back` gives the foreign values, up to rounding.
    """

    ours: str
    theirs: tuple[str, ...]
    forth: Callable[..., Tensor] = _same
    back: Callable[[Tensor], tuple[Tensor, ...]] = _same_back
    exact_back: bool = True


@dataclass(frozen=True)
class Constant:
    """A foreign tensor that is not a weight, and the value it must have."""

    theirs: str
    value: Tensor
    tolerance: float = 1e-5


@dataclass(frozen=True)
class KeyMap:
    """All rules of one architecture.

    Attributes:
        rules: one per tensor of ours.
        constants: foreign tensors that are not weights; they may be absent from the file.
        unused: foreign keys without a counterpart in our network, with the reason.
    """

    rules: Sequence[Rule]
    constants: Sequence[Constant] = ()
    unused: Mapping[str, str] = field(default_factory=dict)

    def ours(self, foreign: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
        """Our weights from foreign ones.

        Args:
            foreign: by foreign key, any floating-point precision.
            expected: the state_dict of our network, for shapes and dtypes; may be on the meta device.
            origin: the file, for messages.

        Raises:
            ArtifactError: a key is missing or unknown, a shape differs, a value is not finite, or a constant has
                another value.
        """
        assert {rule.ours for rule in self.rules} == expected.keys(), "the key map does not match the network"
        shapes = self.foreign_shapes(expected)
        known = {*shapes, *self.unused, *(constant.theirs for constant in self.constants)}
        missing, unknown = sorted(shapes.keys() - foreign.keys()), sorted(foreign.keys() - known)
        if missing or unknown:
            raise ArtifactError(f"{origin} is not a checkpoint of this network: {_complaint(missing, unknown)}")
        for key, shape in shapes.items():
            if foreign[key].shape != shape:
                raise ArtifactError(
                    f"{origin}: {key!r} has the shape {list(foreign[key].shape)}, this network needs {list(shape)}; "
                    "check the experiment and its options"
                )
            if not foreign[key].is_floating_point():
                raise ArtifactError(f"{origin}: {key!r} holds {foreign[key].dtype}, not floating-point numbers")
            if not foreign[key].isfinite().all():
                raise ArtifactError(f"{origin}: {key!r} holds values that are not finite; fetch the file again")
        for constant in self.constants:
            self._check_constant(constant, foreign, origin)
        made = {}
        for rule in self.rules:
            tensor = rule.forth(*(foreign[key].double() for key in rule.theirs))
            made[rule.ours] = tensor.to(expected[rule.ours].dtype).contiguous()
        return made

    def theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Foreign weights and constants from our weights."""
        made = {constant.theirs: constant.value for constant in self.constants}
        for rule in self.rules:
            parts = rule.back(ours[rule.ours].double())
            made |= {
                key: part.to(ours[rule.ours].dtype).contiguous() for key, part in zip(rule.theirs, parts, strict=True)
            }
        return made

    def foreign_shapes(self, expected: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        """The shape of every foreign weight, from our network's state."""
        shapes = {}
        for rule in self.rules:
            parts = rule.back(torch.empty(expected[rule.ours].shape, device="meta"))
            shapes |= {key: part.shape for key, part in zip(rule.theirs, parts, strict=True)}
        return shapes

    def _check_constant(self, constant: Constant, foreign: Mapping[str, Tensor], origin: str) -> None:
        if constant.theirs not in foreign:
            return
        found = foreign[constant.theirs]
        if found.shape != constant.value.shape:
            raise ArtifactError(
                f"{origin}: {constant.theirs!r} has the shape {list(found.shape)}, this network needs "
                f"{list(constant.value.shape)}; check the image size"
            )
        error = (found.double() - constant.value.double()).abs().max().item()
        rounding = torch.finfo(found.dtype).eps * constant.value.abs().max().item()  # of a file in half precision
        if not error <= constant.tolerance + rounding:
            raise ArtifactError(
                f"{origin}: {constant.theirs!r}, which is not a weight, differs by {error:.1e} from what this network "
                "computes; it comes from another architecture"
            )


def _complaint(missing: list[str], unknown: list[str]) -> str:
    """One line about missing and unknown keys."""
    parts = []
    if missing:
        parts.append(f"it lacks {_some(missing)}")
    if unknown:
        parts.append(f"it has {_some(unknown)}, which this network does not know")
    if len(missing) == len(unknown) == 1:
        parts.append(nearest(unknown[0], missing))
    return "; ".join(parts)


def _some(keys: list[str]) -> str:
    return repr(keys[0]) + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
