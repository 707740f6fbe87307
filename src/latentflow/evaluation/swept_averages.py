"""A sweep over lengths of the weights' average: which candidate is drawn with which weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from latentflow.artifacts import sha256_tensors
from latentflow.evaluation.sweep_rules import Candidate
from latentflow.model.config import ModelConfig
from latentflow.requests import RequestError
from latentflow.training.kept_averages import open_averages
from latentflow.weights import load_weights


def with_lengths(
    candidates: dict[str, Candidate], lengths: Sequence[float]
) -> tuple[dict[str, Candidate], dict[str, float]]:
    """Every candidate with every length: the presets and the lengths, both by names such as heun-8_g1.5_e0.1."""
    pairs = [(f"{name}_e{length:g}", one, length) for name, one in candidates.items() for length in lengths]
    return {name: one for name, one, _ in pairs}, {name: length for name, _, length in pairs}


class SweptAverages:
    """The averages of a run that a sweep compares; all of them stay in the memory of the host.

    Args:
        run: the run folder.
        lengths: of the averages, at the last step that was kept.
        config: of the run's model.

    Raises:
        ArtifactError: the run has kept none, or a file is damaged.
        RequestError: a length that what it has kept does not span.
    """

    def __init__(self, run: str | Path, lengths: Sequence[float], config: ModelConfig):
        kept = open_averages(run)
        for length in lengths:
            if reason := kept.why_not(length):
                raise RequestError("ema", reason)
        self.weights = {length: kept.reconstruct(length).weights(config) for length in lengths}

    @property
    def hash(self) -> str:
        """SHA-256 of all their weights."""
        named: dict[str, Tensor] = {}
        for length, weights in self.weights.items():
            named |= {f"{length}/{name}": tensor for name, tensor in weights.items()}
        return sha256_tensors(named)

    def put_into(self, network: nn.Module, lengths: dict[str, float]) -> Callable[[str], None]:
        """A function that gives `network` the weights of a candidate, by name, where it does not have them already.

        Args:
            lengths: by name of the candidate.
        """
        now: list[float] = []

        def put(name: str) -> None:
            if now != [lengths[name]]:
                load_weights(network, self.weights[lengths[name]], f"the average of length {lengths[name]:g}")
                now[:] = [lengths[name]]

        return put
