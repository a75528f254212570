"""Host memory for the KV of preempted sequences: whole blocks out, and in again."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from ..core.ids import BlockId
from ..kernels.block_copy import gather_blocks, scatter_blocks
from ..kernels.device_wait import settle

_NEW_SHARE = 0.2  # of the last measurement in a moving average


@dataclass(frozen=True, slots=True, eq=False)
class SwapTicket:
    """Where a sequence's blocks are, in order. Good for one way back."""

    slots: tuple[int, ...]


class SwapSpace:
    """M slots of one block each; pinned, for pools on a GPU. One thread owns it.

    A swap out has read its blocks, and a swap in has written them, when the call returns: on a GPU both wait for the
    stream, since other streams, threads and ranks may be given the blocks next. Preemption is rare enough for that.
    """

    def __init__(self, num_slots: int, pools: Sequence[Tensor]) -> None:
        """pools: the blocks' bytes [N, B] u8 of each rank, where this process has them mapped: its own first."""
        self._pools = pools
        pinned = pools[0].is_cuda
        self._slots = [torch.empty(num_slots, pool.shape[1], dtype=torch.uint8, pin_memory=pinned) for pool in pools]
        self._free = list(range(num_slots - 1, -1, -1))
        self.block_bytes = sum(pool.shape[1] for pool in pools)
        self.bytes_per_s = 0.0  # moving average; 0: not known yet

    @property
    def num_slots(self) -> int:
        return len(self._slots[0])

    @property
    def free_count(self) -> int:
        return len(self._free)

    def swap_out(self, blocks: Sequence[BlockId]) -> SwapTicket | None:
        """Copy the blocks to the host. None, and nothing copied, where there is no room for all."""
        if not blocks or len(blocks) > len(self._free):
            return None
        for pool in self._pools:
            settle(pool.device)  # what was queued before is not of this copy's time
        begin = perf_counter()
        ticket = SwapTicket(tuple(self._free.pop() for _ in blocks))
        there = torch.tensor(ticket.slots)
        for pool, slots in zip(self._pools, self._slots, strict=True):
            gathered = torch.empty(len(blocks), pool.shape[1], dtype=torch.uint8, device=pool.device)
            gather_blocks(pool, torch.tensor(blocks, device=pool.device), gathered)
            slots.index_copy_(0, there, gathered.cpu())
        self._measured(len(blocks), perf_counter() - begin)
        return ticket

    def swap_in(self, ticket: SwapTicket, blocks: Sequence[BlockId], skip: int = 0) -> None:
        """Copy a ticket's blocks back into as many, but for the first `skip`, which are right. Ends the ticket."""
        assert len(blocks) == len(ticket.slots), (len(blocks), len(ticket.slots))
        if skip < len(blocks):
            settle(self._pools[0].device)
            begin = perf_counter()
            there = torch.tensor(ticket.slots[skip:])
            for pool, slots in zip(self._pools, self._slots, strict=True):
                source = slots.index_select(0, there).to(pool.device)
                scatter_blocks(pool, torch.tensor(blocks[skip:], device=pool.device), source)
            settle(self._pools[0].device)
            self._measured(len(blocks) - skip, perf_counter() - begin)
        self.drop(ticket)

    def drop(self, ticket: SwapTicket) -> None:
        """Nobody wants a ticket's blocks back."""
        self._free += reversed(ticket.slots)

    def _measured(self, num_blocks: int, seconds: float) -> None:
        rate = num_blocks * self.block_bytes / max(seconds, 1e-9)
        self.bytes_per_s += (rate - self.bytes_per_s) * (_NEW_SHARE if self.bytes_per_s else 1.0)


def cheaper_to_swap(swap_bytes: int, bytes_per_s: float, tokens: int, tokens_per_s: float) -> bool:
    """Whether moving the bytes out and in again is predicted to take less time than computing the tokens again.

    A rate of 0 is not known yet: then swapping is tried, which teaches it. Either way keeps the answer.
    """
    if bytes_per_s <= 0 or tokens_per_s <= 0:
        return True
    return 2 * swap_bytes / bytes_per_s < tokens / tokens_per_s
