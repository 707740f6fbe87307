"""Which of how many processes this one is, for work that is shared out without a word between them."""

from __future__ import annotations

import os


def process_rank() -> tuple[int, int]:
    """(rank, number of processes), as `accelerate launch` and torchrun tell it in the environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
