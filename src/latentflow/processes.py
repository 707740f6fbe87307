"""Which of how many processes this one is, as `accelerate launch`, torchrun and the like tell it in the environment."""

from __future__ import annotations

import os

from latentflow.errors import ConfigError


def process_rank() -> tuple[int, int]:
    """(rank, number of processes).

    Raises:
        ConfigError: the environment does not say it in numbers that fit each other.
    """
    rank, num_processes = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not 0 <= rank < num_processes:
        raise ConfigError(
            f"the environment says RANK={rank} of WORLD_SIZE={num_processes}; ranks begin at 0: "
            "unset both, or start the command with a launcher"
        )
    return rank, num_processes


def local_rank() -> tuple[int, int]:
    """(rank among the processes of this machine, how many they are as far as is known).

    Raises:
        ConfigError: the environment does not say it in numbers.
    """
    rank = _number("LOCAL_RANK", _number("SLURM_LOCALID", 0))
    return rank, max(rank + 1, _number("LOCAL_WORLD_SIZE", 1))


def launch_name() -> str:
    """What the processes of one launch have in common and those of another have not; "" for a single process."""
    if process_rank()[1] == 1:
        return ""
    keys = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
    return " ".join(f"{key}={os.environ[key]}" for key in keys if key in os.environ)


def _number(key: str, default: int) -> int:
    text = os.environ.get(key) or str(default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"the environment says {key}={text!r}, which is no whole number; unset it, or start the command with a "
            "launcher"
        ) from None
