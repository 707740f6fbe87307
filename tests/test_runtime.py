"""Device, processes and precision: what each process chooses under faked environments, and real processes together."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import TCPStore

from latentflow import runtime as module
from latentflow.errors import ConfigError
from latentflow.runtime import Runtime, launch_name, open_runtime

KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    def set_to(**values: object) -> None:
        for key in KEYS:
            monkeypatch.delenv(key, raising=False)
        for key, value in values.items():
            monkeypatch.setenv(key, str(value))

    set_to()
    monkeypatch.setattr("latentflow.console._muted", False)
    return set_to


class Gpus:
    """A machine with GPUs, and with all processes of a launch, as far as `open_runtime` looks."""

    def __init__(self, monkeypatch, number: int, *, bf16: bool = True):
        self.current, self.state = None, None
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
        monkeypatch.setattr(torch.cuda, "set_device", self._set)
        monkeypatch.setattr(torch, "empty", lambda *shape, device=None: None)
        monkeypatch.setattr("accelerate.PartialState", self._joined)
        monkeypatch.setattr(module, "_meeting_place", lambda: None)

    def _set(self, device: torch.device) -> None:
        self.current = device

    def _joined(self, **options: object) -> SimpleNamespace:
        self.state = options
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return SimpleNamespace(process_index=rank, num_processes=world)


def test_a_precision_that_was_not_asked_for_is_known_as_such():
    assert not open_runtime("cpu").precision_is_explicit
    assert not Runtime(torch.device("cpu")).with_precision("auto").precision_is_explicit
    assert open_runtime("cpu", "bf16").precision_is_explicit
    assert open_runtime("cpu").with_precision("fp32").precision_is_explicit


def test_one_process_on_a_cpu():
    assert open_runtime("cpu") == Runtime(torch.device("cpu"))
    assert open_runtime("cpu").is_main
    assert launch_name() == ""


@pytest.mark.parametrize("asked", [None, "cuda"])
def test_each_process_has_a_gpu_of_its_own(monkeypatch, environment, asked):
    """Two machines with four GPUs each: the index is that on the machine, not that of all."""
    for rank in range(8):
        gpus = Gpus(monkeypatch, 4)
        environment(RANK=rank, WORLD_SIZE=8, LOCAL_RANK=rank % 4, LOCAL_WORLD_SIZE=4, MASTER_PORT=1)
        runtime = open_runtime(asked)
        assert runtime.device == gpus.current == torch.device("cuda", rank % 4)
        assert (runtime.rank, runtime.world, runtime.local_rank, runtime.local_world) == (rank, 8, rank % 4, 4)
        assert runtime.is_main == (rank == 0)
        assert gpus.state["cpu"] is False
        assert gpus.state["backend"] == "cpu:gloo,cuda:nccl"


def test_a_gpu_by_its_index(monkeypatch, environment):
    Gpus(monkeypatch, 4)
    assert open_runtime("cuda:2").device == torch.device("cuda", 2)
    assert open_runtime("cuda").device == torch.device("cuda", 0)
    environment(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, MASTER_PORT=1)
    with pytest.raises(
        ConfigError, match=r"--device cuda:2 would put all 2 processes .* on one GPU; use --device cuda"
    ):
        open_runtime("cuda:2")
    assert open_runtime("cuda", alone=True).device == torch.device("cuda", 1)


def test_a_cpu_run_on_a_machine_with_gpus(monkeypatch, environment):
    gpus = Gpus(monkeypatch, 1)
    environment(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, MASTER_PORT=1)
    assert open_runtime("cpu").device == torch.device("cpu")
    assert gpus.state["cpu"] is True
    assert gpus.current is None
    environment(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, MASTER_PORT=1, ACCELERATE_USE_CPU="true")
    assert open_runtime().device == torch.device("cpu")


def test_more_processes_than_gpus_are_refused_in_every_process(monkeypatch, environment):
    for rank in range(2):
        Gpus(monkeypatch, 1)
        environment(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2, MASTER_PORT=1)
        with pytest.raises(ConfigError, match=r"2 processes .* 1 visible GPU\(s\); start 1, or add --device cpu"):
            open_runtime()


@pytest.mark.parametrize("device", ["foo", "cuda", "cuda:1", "cpu:x", ""])
def test_a_device_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"device '{device}' cannot be used here; cpu can"):
        open_runtime(device)
    assert open_runtime("cpu").device.type == "cpu"  # the remedy


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK=-1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_FSDP": "true"}, "FSDP shards the weights"),
    ],
)
def test_an_environment_that_cannot_be(environment, values, said):
    environment(**values)
    with pytest.raises(ConfigError, match=said):
        open_runtime("cpu")


def test_processes_that_do_not_find_each_other(environment, monkeypatch):
    monkeypatch.setattr(module, "_TO_FIND_EACH_OTHER", timedelta(seconds=1))
    environment(WORLD_SIZE=2, RANK=1, LOCAL_RANK=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    with pytest.raises(
        ConfigError, match=r"the 2 processes of the launcher did not find each other \(.*\); start them with"
    ):
        open_runtime("cpu")


def test_the_word_of_precision(monkeypatch):
    assert open_runtime("cpu").precision == "fp32"
    assert open_runtime("cpu", "tf32").precision == "tf32"
    with pytest.raises(ConfigError, match=r"precision fp16 needs a GPU.*use fp32, or bf16"):
        open_runtime("cpu", "fp16")
    assert open_runtime("cpu", "bf16").precision == "bf16"  # the remedy
    with pytest.raises(ConfigError, match="unknown precision 'bf61'; did you mean 'bf16'"):
        open_runtime("cpu", "bf61")
    Gpus(monkeypatch, 1)
    assert open_runtime().precision == "bf16"
    assert open_runtime(precision="fp16").precision == "fp16"
    Gpus(monkeypatch, 1, bf16=False)
    assert open_runtime().precision == "fp32"
    with pytest.raises(ConfigError, match="precision bf16: Tesla V100 does not support it; use fp16 or fp32"):
        open_runtime(precision="bf16")


def switches() -> tuple[object, ...]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    newer = matmul.fp32_precision, cudnn.conv.fp32_precision
    try:
        return *newer, matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        return *newer, "torch does not say, as both kinds of switches were used"


@pytest.fixture
def switches_of_the_caller(request):
    """As torch sets them, or as a user did by the older or the newer ones."""
    before = torch.backends.cuda.matmul.fp32_precision
    request.param()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    "switches_of_the_caller",
    [
        lambda: None,
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    ],
    ids=["none", "older", "newer"],
    indirect=True,
)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_how_float32_is_computed_on_a_gpu(precision, switches_of_the_caller):
    """Both kinds of switches say the same inside, or torch's compiler would not run; they are put back."""
    tf32, before, runtime = precision != "fp32", switches(), Runtime(torch.device("cuda", 0), precision=precision)
    with runtime.float32_policy():
        inside = switches()
        assert inside[0] == ("tf32" if tf32 else "ieee")
        assert (inside[1] == "tf32") == tf32
        assert inside[2:] == (tf32, tf32, "high" if tf32 else "highest")
    with pytest.raises(ZeroDivisionError), runtime.float32_policy():
        raise ZeroDivisionError
    assert switches() == before


def test_autocast():
    weights, x = torch.ones(3, 3), torch.ones(2, 3)
    for precision, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        with Runtime(torch.device("cpu"), precision=precision).autocast():
            assert (x @ weights).dtype == dtype
        assert (x @ weights).dtype == torch.float32


def test_the_autoencoder_of_a_network_is_never_in_half_precision():
    found = {
        word: Runtime(torch.device("cpu"), precision=word).for_autoencoder().precision
        for word in ("fp32", "tf32", "bf16", "fp16")
    }
    assert found == {"fp32": "fp32", "tf32": "tf32", "bf16": "tf32", "fp16": "tf32"}


def test_shares_are_all_of_it():
    shares = [Runtime(torch.device("cpu"), rank, 3).share(range(10)) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == list(range(10))
    assert list(shares[1]) == [1, 4, 7]


def test_one_process_meets_itself():
    alone, rows = Runtime(torch.device("cpu")), torch.arange(6).reshape(3, 2)
    alone.barrier()
    assert torch.equal(alone.sum(rows), rows)
    assert torch.equal(alone.gather(rows), rows)


def _meet(rank: int, port: int, results) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="3", OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    runtime = open_runtime("cpu")
    own = torch.full((rank, 2), float(rank))  # no rows of the first process
    runtime.barrier()
    results.put((runtime.rank, runtime.sum(torch.tensor([1.0, rank])).tolist(), runtime.gather(own).tolist()))
    module.leave()


def test_three_processes_meet():
    context, store = (
        multiprocessing.get_context("forkserver"),
        TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False),
    )
    results = context.Queue()
    processes = [context.Process(target=_meet, args=(rank, store.port, results)) for rank in range(3)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    gathered = [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    assert found == [(rank, [3.0, 3.0], gathered) for rank in range(3)]
