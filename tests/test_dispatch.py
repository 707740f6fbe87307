"""The watch over what makes the host wait: it sees what it should, and nothing else."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from tests.dispatch import watched


@pytest.fixture(params=[nullcontext, torch.no_grad, torch.inference_mode])
def mode(request):
    """How gradients are left out, which changes what operations are made of."""
    return request.param


X, MASK = torch.empty(2, 3, device="meta"), torch.empty(2, dtype=torch.bool, device="meta")


@pytest.mark.parametrize(
    ("reads", "said"),
    [
        (lambda: X.sum().item(), "_local_scalar_dense"),
        (lambda: bool(MASK.any()), "_local_scalar_dense"),
        (lambda: MASK.nonzero(), "nonzero"),
        (lambda: X[MASK], "index by a mask"),
        (lambda: X.cpu(), "_to_copy to the host"),
        (lambda: X.tolist(), "_to_copy to the host"),
        (lambda: torch.zeros(2, 3).copy_(X), "copy_ to the host"),
        (lambda: torch.equal(X, X), "equal"),
    ],
)
def test_reading_fails_on_meta_and_is_named(reads, said, mode):
    with watched() as waits, mode(), pytest.raises((RuntimeError, NotImplementedError)):
        reads()
    assert waits[0].startswith(said)


@pytest.mark.parametrize(
    ("sends", "said"),
    [
        (lambda: torch.ones(3).to("meta"), "_to_copy from memory that is not pinned"),
        (lambda: torch.ones(3).to("meta", non_blocking=True), "_to_copy from memory that is not pinned"),
        (lambda: X.copy_(torch.ones(2, 3)), "copy_ from memory that is not pinned"),
        (lambda: torch.tensor([1.0], device="meta"), "tensor of numbers"),
        (lambda: X[torch.tensor([0])], "index by places on the host"),
    ],
)
def test_sending_is_named(sends, said, mode):
    with watched() as waits, mode():
        sends()
    assert len(waits) == 1
    assert waits[0].startswith(said)


def test_work_of_the_device_and_of_the_host_is_not_waiting(mode):
    with watched() as waits, mode():
        torch.where(X > 0, X * torch.tensor(2.0), X[1:])[:, X.new_zeros(2, dtype=torch.long)]
        torch.full((2,), 0.5, device="meta").double().to("meta")
        bookkeeping = torch.tensor([1, 0, 2])
        bookkeeping[bookkeeping > 0].sum().item()
    assert not waits


def test_on_the_cpu_reads_are_counted(mode):
    x = torch.ones(3)
    with watched("cpu") as waits, mode():
        float(x.sum())
        x[x > 0] = 1
    assert [wait.split()[0] for wait in waits] == ["_local_scalar_dense", "index_put_"]
