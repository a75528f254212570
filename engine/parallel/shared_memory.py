"""Ranks of one host on the CPU meet in shared memory: tens of microseconds, where a socket takes hundreds.

    for each rank, on lines that it alone writes:
             how many meetings it has come to | its process id, 0 until it has joined | whether it sleeps
    then, for each rank, two places for its part, used in turn

A meeting: each rank puts its part into its place, then counts it; it reads the others' parts once they have counted
theirs. A place is written again two meetings later, and only when all have counted the meeting between, which they do
after they have read: so nobody writes what another still reads. Longer tensors take several meetings.
"""

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.segment import LINE, Doorbell, Fence, Segment
from .waiting import Ringer, Waiter

PLACE_BYTES = 256 << 10  # a rank's two places stay in its core's second-level cache
_TIMEOUT_S = 60.0
_SPIN_S = 200e-6  # the others compute the same, so they come soon, where each has a core


class SharedMemory:
    """See communicator.py. `create` it in rank 0, `join` its address in the others. One thread uses it."""

    def __init__(self, segment: Segment, bells: list[Doorbell], rank: int, size: int, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self.address = " ".join((segment.address, *(bell.address for bell in bells)))
        self._segment = segment
        self._timeout_s = timeout_s
        self._counts, pids, asleep = ([segment.word((3 * at + part) * LINE) for at in range(size)] for part in range(3))
        self._others = tuple(at for at in range(size) if at != rank)
        spin_s = _SPIN_S if size <= len(os.sched_getaffinity(0)) else 0.0
        self._waiter = Waiter(asleep[rank], bells[rank], [(at, pids[at]) for at in self._others], spin_s)
        self._ringer = Ringer([(asleep[at], bells[at]) for at in self._others])
        self._place_bytes = _place_bytes(segment, size)
        places = torch.frombuffer(segment.shared, dtype=torch.uint8, offset=3 * size * LINE)
        self._places = places.view(size, 2, self._place_bytes)
        self._views: dict[tuple[int, torch.dtype, int], list[Tensor]] = {}
        self._count = 0
        self._fence = Fence()
        self._closed = False
        pids[rank][0] = os.getpid()

    @classmethod
    def create(cls, size: int, timeout_s: float = _TIMEOUT_S, place_bytes: int = PLACE_BYTES) -> "SharedMemory":
        """timeout_s: how late a peer may be. place_bytes: of each rank, per meeting; a multiple of 64."""
        assert place_bytes % LINE == 0, place_bytes
        segment = Segment.create(size * (3 * LINE + 2 * place_bytes))
        return cls(segment, [Doorbell.create() for _ in range(size)], 0, size, timeout_s)

    @classmethod
    def join(cls, address: str, rank: int, size: int, timeout_s: float = _TIMEOUT_S) -> "SharedMemory":
        """address: rank 0's. Raises RankLost where rank 0 is gone."""
        memory, *bells = address.split()
        assert len(bells) == size, (address, size)
        return cls(Segment.open(memory), [Doorbell.open(bell) for bell in bells], rank, size, timeout_s)

    def all_reduce(self, x: Tensor) -> Tensor:
        for part in self._chunks(x):
            parts = self._meet(part)
            if len(parts) == 2:
                torch.add(*parts, out=part)  # added in float32 and rounded once, whatever the dtype
            elif part.dtype == torch.float32:
                torch.add(parts[0], parts[1], out=part)
                for other in parts[2:]:
                    part.add_(other)
            else:
                wide = parts[0].float()
                for other in parts[1:]:
                    wide.add_(other)
                part.copy_(wide)
        return x

    def gather_last(self, x: Tensor) -> Tensor:
        width, leads = x.shape[-1], self.rank == 0
        rows = x.reshape(x.shape[:-1].numel(), width)
        whole = x.new_empty(len(rows), self.size if leads else 0, width)
        room = self._place_bytes // x.element_size()
        height = max(1, room // width)
        for row in range(0, len(rows), height):
            for column in range(0, width, room):
                part = rows[row : row + height, column : column + room]
                for rank, found in enumerate(self._meet(part.reshape(-1), read=leads)):
                    whole[row : row + height, rank, column : column + room] = found.view(part.shape)
        return whole.view(*x.shape[:-1], whole.shape[1] * width)

    def broadcast(self, x: Tensor) -> Tensor:
        for part in self._chunks(x):
            parts = self._meet(part, write=self.rank == 0)
            if self.rank != 0:
                part.copy_(parts[0])
        return x

    def barrier(self) -> None:
        self._count += 1
        self._come()
        self._await(self._count)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._waiter.close()
            self._ringer.close()
            self._segment.close()

    def _chunks(self, x: Tensor) -> Iterator[Tensor]:
        """Flat views of x that a place can hold."""
        flat = x.view(-1)
        step = self._place_bytes // x.element_size()
        for begin in range(0, len(flat), step):
            yield flat[begin : begin + step]

    def _meet(self, part: Tensor, write: bool = True, read: bool = True) -> list[Tensor]:
        """Put our part [n] in its place; the ranks' places, once they are all filled, where we read them."""
        count = self._count = self._count + 1
        places = self._at(count % 2, part)
        self._await(count - 1)
        if write:
            places[self.rank].copy_(part)
        self._come()
        if not read:
            return []
        self._await(count)
        return places

    def _come(self) -> None:
        self._fence()
        self._counts[self.rank][0] = self._count
        self._ringer.ring()

    def _await(self, count: int) -> None:
        for other in self._others:
            at = self._counts[other]
            if at[0] < count:
                self._waiter.wait(lambda: at[0] >= count, self._timeout_s, f"rank {other}")  # noqa: B023 # called at once
        self._fence()

    def _at(self, turn: int, part: Tensor) -> list[Tensor]:
        """The ranks' places [n], as part's dtype. Few sizes come again and again, so their views are kept."""
        key = (turn, part.dtype, len(part))
        views = self._views.get(key)
        if views is None:
            num_bytes = part.nbytes
            if len(self._views) >= 256:
                self._views.clear()
            views = [place[:num_bytes].view(part.dtype) for place in self._places[:, turn]]
            self._views[key] = views
        return views


def _place_bytes(segment: Segment, size: int) -> int:
    return (len(segment.shared) // size - 3 * LINE) // 2
