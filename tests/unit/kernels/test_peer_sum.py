"""Two ranks, two processes with one memory, each with the kernels for GPUs, run on the CPU: see tests/emulation."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.kernels import mailbox
from baton.kernels.mailbox import MAILBOX_BYTES, Mailbox

from ...emulation import library as emulation

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=f"emulation: {emulation.missing()}")

HIDDEN = 264
CALLS = [1, 7, 3, 3, 1, 7, 7, 2]  # rows of each call
EPS = 1e-5


def one_rank(connection: Connection, work: Callable[..., Any], rank: int, *args: Any) -> None:
    from baton.kernels import peer_copy, peer_sum  # noqa: F401 # there to be patched

    with pytest.MonkeyPatch.context() as patch:
        emulation.use(emulation.compile_for_cpu(), patch)
        connection.send(work(rank, *args))


def both(work: Callable[..., Any], *args: Any) -> list[Any]:
    """What work(rank, mailboxes, *args) gives in each of two processes."""
    emulation.compile_for_cpu()
    boxes = [torch.zeros(MAILBOX_BYTES, dtype=torch.uint8).share_memory_() for _ in range(2)]
    return processes(work, boxes, *args)


def processes(work: Callable[..., Any], boxes: list[Tensor], *args: Any) -> list[Any]:
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(2)]
    ranks = [
        spawn.Process(target=one_rank, args=(theirs, work, rank, boxes, *args), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    found = []
    for ours, _ in pipes:
        assert ours.poll(120), "a rank said nothing"
        found.append(ours.recv())
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    return found


def pair_of(rank: int, boxes: list[Tensor]) -> mailbox.Pair:
    return mailbox.Pair(rank, Mailbox(boxes[rank]), Mailbox(boxes[1 - rank]))


def inputs(rank: int, dtype: torch.dtype) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(rank)
    return [torch.randn(rows, HIDDEN, generator=numbers).to(dtype) for rows in CALLS]


def a_residual(call: int, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(100 + call)).to(dtype)


def a_weight(dtype: torch.dtype) -> Tensor:
    return (torch.rand(HIDDEN, generator=torch.Generator().manual_seed(99)) + 0.5).to(dtype)


def sums(rank: int, boxes: list[Tensor], dtype: torch.dtype, few_rows: int) -> list[tuple[Any, Any]]:
    """Sums, and every other call adds to a residual and normalises. few_rows: that travel with their numbers."""
    from baton.kernels import peer_sum

    peer_sum.FEW_BYTES = few_rows * HIDDEN * dtype.itemsize  # type: ignore[attr-defined]
    pair, found = pair_of(rank, boxes), []
    for call, x in enumerate(inputs(rank, dtype)):
        if call % 2 == 0:
            found.append((peer_sum.peer_sum(pair, x).float().numpy(), None))
        else:
            residual = a_residual(call, len(x), dtype)
            normed = peer_sum.peer_add_rms_norm(pair, x, residual, a_weight(dtype), EPS)
            found.append((residual.float().numpy(), normed.float().numpy()))
    return found


@pytest.mark.parametrize(
    ("dtype", "few_rows", "last"),
    [
        (torch.float32, 8, 0),
        (torch.bfloat16, 0, 0),
        (torch.bfloat16, 3, 2**32 - 4),  # both ways in turns, and numbers that wrap around
    ],
)
def test_both_ranks_get_the_sum_and_its_norm(dtype: torch.dtype, few_rows: int, last: int) -> None:
    from baton.kernels.peer_sum import add_rms_norm_reference

    emulation.compile_for_cpu()
    boxes = [torch.zeros(MAILBOX_BYTES, dtype=torch.uint8).share_memory_() for _ in range(2)]
    for box in boxes:
        word = Mailbox(box).calls - box.data_ptr()
        box[word : word + 8].view(torch.int64).fill_(last)
    found = processes(sums, boxes, dtype, few_rows)
    bound = 1e-6 if dtype == torch.float32 else 2**-8
    parts = [inputs(rank, dtype) for rank in range(2)]
    for call, ((first, normed), (second, also)) in enumerate(zip(*found, strict=True)):
        assert (first == second).all()
        both_parts = [part[call].double() for part in parts]
        expected = sum(both_parts)
        if call % 2 == 0:
            assert abs(first - expected.numpy()).max() <= bound * expected.abs().max()
            continue
        assert (normed == also).all()
        residual = a_residual(call, CALLS[call], dtype).double()
        total, norm = add_rms_norm_reference(both_parts, residual, a_weight(dtype).double(), EPS)
        assert abs(first - total.numpy()).max() <= bound * total.abs().max()
        assert abs(normed - norm.numpy()).max() <= 2 * bound * norm.abs().max()


SIZES = [(1, 1), (1, 8), (3, 5), (1, 64128), (7, 4100), (2, 5), (5, (4 << 20) + 6), (9, 16)]  # rows, bytes of each


def a_part(rank: int, size: tuple[int, int]) -> Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(size) + rank))


def copies(rank: int, boxes: list[Tensor]) -> bool:
    """One way and the other, in turns."""
    from baton.kernels.peer_copy import peer_receive, peer_receive_beside, peer_send

    pair, right = pair_of(rank, boxes), True
    for size in SIZES:
        own, others = a_part(rank, size), a_part(1 - rank, size)
        if rank == 0:
            right &= torch.equal(peer_receive_beside(pair, own), torch.cat((own, others), 1))
            peer_send(pair, own)
        else:
            peer_send(pair, own)
            right &= torch.equal(peer_receive(pair, torch.empty_like(own)), others)
    return right


@pytest.mark.parametrize("last", [0, 2**32 - 3])
def test_bytes_arrive_whatever_their_number(last: int) -> None:
    boxes = [torch.zeros(MAILBOX_BYTES, dtype=torch.uint8).share_memory_() for _ in range(2)]
    for box in boxes:
        own = Mailbox(box)
        for part in (own.sent, own.taken, own.came, own.acked):
            at = part - box.data_ptr()
            box[at : at + 4 * mailbox.NUM_SLOTS].view(torch.int32).fill_(last - (1 << 32) if last else 0)
    emulation.compile_for_cpu()
    assert processes(copies, boxes) == [True, True]


def stopped(rank: int, boxes: list[Tensor]) -> bool:
    """Rank 0 is told that nobody comes; rank 1 does not."""
    from baton.kernels.peer_copy import peer_receive, peer_send
    from baton.kernels.peer_sum import peer_sum

    if rank == 1:
        return True
    pair = pair_of(rank, boxes)
    pair.stop()
    for rows in (1, 300):  # few, and more
        peer_sum(pair, torch.ones(rows, HIDDEN))
    peer_receive(pair, torch.ones(100))
    for _ in range(3):
        peer_send(pair, torch.ones(100))
    return True


def test_a_rank_whose_peer_is_gone_waits_for_nothing_once_it_was_told() -> None:
    assert both(stopped) == [True, True]
