import pytest

from latentflow.errors import ConfigError
from latentflow.processes import launch_name, local_rank, process_rank


@pytest.fixture
def environment(monkeypatch):
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "SLURM_LOCALID")

    def set_to(**values: str) -> None:
        for key in keys:
            monkeypatch.delenv(key, raising=False)
        for key, value in values.items():
            monkeypatch.setenv(key, value)

    set_to()
    return set_to


def test_without_a_launcher(environment):
    assert (process_rank(), local_rank(), launch_name()) == ((0, 1), (0, 1), "")


def test_under_a_launcher(environment):
    environment(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", MASTER_PORT="29500")
    assert (process_rank(), local_rank()) == ((5, 8), (1, 4))
    assert launch_name() == "WORLD_SIZE=8 MASTER_PORT=29500"
    environment(RANK="5", WORLD_SIZE="8", SLURM_LOCALID="2")
    assert local_rank() == (2, 3)
    environment(RANK="", WORLD_SIZE="")
    assert process_rank() == (0, 1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "0"}, "RANK=0 of WORLD_SIZE=0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
        ({"RANK": "1"}, "RANK=1 of WORLD_SIZE=1"),
    ],
)
def test_an_environment_that_cannot_be(environment, values, said):
    environment(**values)
    with pytest.raises(ConfigError, match=said):
        process_rank()
