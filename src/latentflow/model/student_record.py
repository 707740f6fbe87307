"""Whose student a model is, as its config says: what `latentflow distill` made it from, and what it has learned.

A student gives the average velocity between two times, at a guidance scale that is one of its inputs; see
`latentflow.flow.flow_map`. So it draws in a few jumps, and guidance costs it nothing.
"""

from __future__ import annotations

from pydantic import Field

from latentflow.records import Record

MOST_JUMPS = 16
"""Evaluations of a student with which it may be asked to draw."""


class StudentRecord(Record):
    """The teacher of a student, and the guidance that it has learned from it."""

    teacher: str = Field(max_length=10_000, description="The teacher, as it was named.")
    weights: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of its weights.")
    guided: bool = Field(default=True, description="Whether the guidance scale is an input.")
    guidance_interval: tuple[float, float] = Field(
        default=(0.0, 1.0), description="Times at which the teacher was guided."
    )
    guided_channels: int | None = Field(
        default=None, ge=1, description="Latent channels that were guided, the first ones; null: all of them."
    )

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.teacher}, weights {self.weights[:12]}"
