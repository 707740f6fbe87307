"""Errors that the user can fix, each with one clear line and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LatentFlowError(Exception):
    """An error that the user can fix. The message names the value and the nearest remedy."""

    exit_code = 2


class ConfigError(LatentFlowError):
    """A recipe, an override or a request asks for something that does not exist or does not fit."""


class DataError(LatentFlowError):
    """Images, masks or a latent cache cannot be used."""


class ArtifactError(LatentFlowError):
    """A model folder, a checkpoint or another file on disk is missing, damaged or of the wrong kind."""


class NonFiniteError(LatentFlowError):
    """A loss, a gradient or a solver state is not finite; it was not used."""

    exit_code = 1


def nearest(name: object, valid: Iterable[object]) -> str:
    """A hint for a misspelt `name`: the nearest of `valid`, or all of them if none is near.

    >>> nearest("huen", ["euler", "heun"])
    "did you mean 'heun'? (valid: euler, heun)"
    """
    names = [str(v) for v in valid]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    listed = ", ".join(names[:24]) + (f", ... ({len(names)} in all)" if len(names) > 24 else "")
    return f"did you mean {close[0]!r}? (valid: {listed})" if close else f"valid: {listed}"
