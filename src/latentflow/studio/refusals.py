"""Answers of the server that are no pictures: one line, and the status that belongs to it."""

from __future__ import annotations

from latentflow.errors import LatentFlowError
from latentflow.studio.queue import QueueClosed, QueueFull, Stopped


class Refused(LatentFlowError):
    """A request that the server does not take.

    Attributes:
        status: of HTTP.
        headers: of the answer.
    """

    def __init__(self, status: int, reason: str, **headers: str):
        super().__init__(reason)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def refusal_of(error: Exception) -> Refused:
    """What is answered to an error: mistakes of the user in full, other errors without details."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, QueueFull):
        return Refused(429, str(error), retry_after=f"{error.seconds:.0f}")
    if isinstance(error, QueueClosed | Stopped):
        return Refused(503, str(error), retry_after="10")
    if isinstance(error, LatentFlowError):
        return Refused(422, " ".join(str(error).split()))
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return Refused(503, "the server is out of memory; ask for fewer or smaller images", retry_after="10")
    return Refused(500, f"unexpected {type(error).__name__}; the log of the server has the details")
