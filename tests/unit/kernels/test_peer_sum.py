"""Two ranks, two processes with one memory, each with the kernel for GPUs, run on the CPU: see tests/emulation."""

import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor

from ...emulation import library as emulation

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=f"emulation: {emulation.missing()}")

HIDDEN, ROWS = 264, 7
CALLS = [1, 7, 3, 3, 1, 7, 7, 2]  # rows of each call
EPS = 1e-5


def inputs(rank: int, dtype: torch.dtype) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(rank)
    return [torch.randn(rows, HIDDEN, generator=numbers).to(dtype) for rows in CALLS]


def a_residual(call: int, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(100 + call)).to(dtype)


def a_weight(dtype: torch.dtype) -> Tensor:
    return (torch.rand(HIDDEN, generator=torch.Generator().manual_seed(99)) + 0.5).to(dtype)


def one_rank(rank: int, dtype: torch.dtype, boxes: list[Any], told: Any) -> None:
    """Sums, and every other call adds to a residual and normalises."""
    from baton.kernels import peer_sum

    with pytest.MonkeyPatch.context() as patch:
        emulation.use(emulation.compile_for_cpu(), patch)
        mine = peer_sum.PeerSum(rank, boxes[rank], boxes[1 - rank])
        for call, x in enumerate(inputs(rank, dtype)):
            if call % 2 == 0:
                told.put((call, mine.sum(x).float().numpy(), None))
            else:
                residual = a_residual(call, len(x), dtype)
                normed = mine.add_rms_norm(x, residual, a_weight(dtype), EPS)
                told.put((call, residual.float().numpy(), normed.float().numpy()))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_both_ranks_get_the_sum_and_its_norm(dtype: torch.dtype, bound: float) -> None:
    from baton.kernels.peer_sum import Mailbox, add_rms_norm_reference

    emulation.compile_for_cpu()
    boxes = [Mailbox.make(ROWS, HIDDEN, dtype, torch.device("cpu")) for _ in range(2)]
    for box in boxes:
        box.inbox.share_memory_()
        box.arrived.share_memory_()
        box.calls.share_memory_()
    spawn = multiprocessing.get_context("spawn")
    queues = [spawn.Queue() for _ in range(2)]
    ranks = [spawn.Process(target=one_rank, args=(rank, dtype, boxes, queues[rank])) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = [[queue.get(timeout=120) for _ in CALLS] for queue in queues]
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    parts = [inputs(rank, dtype) for rank in range(2)]
    for (call, first, normed), (_, second, also) in zip(*found, strict=True):
        assert (first == second).all()
        both = [part[call].double() for part in parts]
        expected = sum(both)
        if call % 2 == 0:
            assert abs(first - expected.numpy()).max() <= bound * expected.abs().max()
            continue
        assert (normed == also).all()
        residual = a_residual(call, CALLS[call], dtype).double()
        total, norm = add_rms_norm_reference(both, residual, a_weight(dtype).double(), EPS)
        assert abs(first - total.numpy()).max() <= bound * total.abs().max()
        assert abs(normed - norm.numpy()).max() <= 2 * bound * norm.abs().max()
