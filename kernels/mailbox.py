"""Memory of one of two ranks into which the other writes, over the link between their GPUs.

    words   own: counts of calls, `stop`, numbers sent and taken; the other rank's: numbers that have come
    few     2 halves, in turns: rows of a sum, each word with its call's number beside it
    inbox   2 halves, in turns: rows of larger sums
    slots   bytes that are copied, on their way

Each call's kernels say in which order these are used: csrc/peer_sum.cu, csrc/peer_copy.cu. Zeros at first.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import cuda_library

MOST_ROWS = 2048  # of a sum, whatever their size
FEW_BYTES = 256 << 10  # of a sum's rows, that travel with their numbers
INBOX_BYTES = 16 << 20  # of a sum's rows
NUM_SLOTS = 64

_SLOT_BYTES = 256 << 10  # csrc/peer_copy.cu
_CALLS, _STOP = 0, 128  # each on a cache line of its own
_SENT, _TAKEN, _CAME, _ACKED = (1024 * part for part in range(1, 5))
_ARRIVED = 8192
_FEW = _ARRIVED + 4 * MOST_ROWS
_INBOX = _FEW + 2 * 2 * FEW_BYTES
_SLOTS = _INBOX + 2 * INBOX_BYTES
MAILBOX_BYTES = _SLOTS + NUM_SLOTS * _SLOT_BYTES


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Addresses in memory [MAILBOX_BYTES] u8, as this process reaches it."""

    memory: Tensor

    def __post_init__(self) -> None:
        assert self.memory.shape == (MAILBOX_BYTES,), self.memory.shape
        assert self.memory.dtype == torch.uint8, self.memory.dtype

    def at(self, offset: int) -> int:
        return self.memory.data_ptr() + offset

    @property
    def few(self) -> int:
        return self.at(_FEW)

    @property
    def inbox(self) -> int:
        return self.at(_INBOX)

    @property
    def arrived(self) -> int:
        """[MOST_ROWS] u32, from the other rank."""
        return self.at(_ARRIVED)

    @property
    def calls(self) -> int:
        """[2] u32."""
        return self.at(_CALLS)

    @property
    def stop(self) -> int:
        """u32: not 0 once nothing is to be waited for any more."""
        return self.at(_STOP)

    @property
    def slots(self) -> int:
        return self.at(_SLOTS)

    @property
    def sent(self) -> int:
        """[NUM_SLOTS] u32, as `taken`, and, from the other rank, `came` and `acked`."""
        return self.at(_SENT)

    @property
    def taken(self) -> int:
        return self.at(_TAKEN)

    @property
    def came(self) -> int:
        return self.at(_CAME)

    @property
    def acked(self) -> int:
        return self.at(_ACKED)


class Pair:
    """One rank's side of two. Both launch what meets in the same order, with equal shapes, each on one stream."""

    def __init__(self, rank: int, here: Mailbox, there: Mailbox) -> None:
        """rank: 0 or 1. there: the other's, as memory that this device reaches."""
        assert rank in (0, 1), rank
        library = cuda_library(here.memory.device)
        assert library is not None, "no CUDA kernels"
        self.library: ctypes.CDLL = library
        self.rank = rank
        self.here = here
        self.there = there
        # Made now: to pin memory may be to wait for the device.
        self._ones = torch.ones(4, dtype=torch.uint8, pin_memory=here.memory.is_cuda)
        self._aside = torch.cuda.Stream(here.memory.device) if here.memory.is_cuda else None  # type: ignore[no-untyped-call]

    @torch.inference_mode()  # the mailbox may have been made in it
    def stop(self) -> None:
        """End every wait, of kernels under way and to come: what they give is worth nothing. For a rank whose peer is
        gone. By a copy beside the current stream, which finds its way past kernels that fill the device."""
        word = self.here.memory[_STOP : _STOP + 4]
        if self._aside is None:
            word.copy_(self._ones)
            return
        with torch.cuda.stream(self._aside):
            word.copy_(self._ones, non_blocking=True)
        self._aside.synchronize()


def whole_run(x: Tensor, others: Sequence[Tensor | None] = ()) -> bool:
    """x is one run of memory, and the others are such runs of its dtype."""
    return x.is_contiguous() and all(y is None or (y.is_contiguous() and y.dtype == x.dtype) for y in others)
