"""How rank 0 tells the other ranks of its host what each step is: one writes, several read, all of it, in order.

for each rank, on lines that it alone writes:
         how many frames it has written (rank 0) or taken | its process id, 0 until it has joined | whether it sleeps
then the slots: 16 bytes of kind and length, then a frame; a long step takes several
"""

import os
import struct

from ...core.segment import LINE, WORD, Doorbell, Fence, Segment
from ..step_input import StepInput
from .waiting import Ringer, Waiter

_HEADER = struct.Struct("=QQ")  # kind, bytes that follow
_PART, _STEP, _STOP = 1, 2, 3
_NUM_SLOTS = 8
_SLOT_BYTES = 256 << 10
_TIMEOUT_S = 60.0
_SPIN_S = 60e-6  # rank 0 has sampling and planning to do meanwhile, and needs the core if there are few


class _Lines:
    """Where everything lies in the segment."""

    def __init__(self, segment: Segment, size: int) -> None:
        self.counts, self.pids, self.asleep = (
            [segment.word((3 * rank + part) * LINE) for rank in range(size)] for part in range(3)
        )
        slots = memoryview(segment.shared)[3 * size * LINE :]
        self.slot_bytes = len(slots) // _NUM_SLOTS
        self.slots = [slots[at * self.slot_bytes : (at + 1) * self.slot_bytes] for at in range(_NUM_SLOTS)]


class PlanWriter:
    """Rank 0's end. One thread uses it."""

    def __init__(self, num_readers: int, slot_bytes: int = _SLOT_BYTES, timeout_s: float = _TIMEOUT_S) -> None:
        """timeout_s: how long a reader may keep all slots full."""
        assert slot_bytes % WORD == 0, slot_bytes
        size = num_readers + 1
        self._segment = Segment.create(3 * size * LINE + _NUM_SLOTS * slot_bytes)
        self._lines = lines = _Lines(self._segment, size)
        lines.pids[0][0] = os.getpid()
        bells = [Doorbell.create() for _ in range(size)]
        readers = range(1, size)
        self.addresses = [f"{self._segment.address} {bells[0].address} {bells[rank].address}" for rank in readers]
        """For each reader's `PlanReader.join`, in the order of ranks 1, 2, ..."""
        self._waiter = Waiter(lines.asleep[0], bells[0], [(rank, lines.pids[rank]) for rank in readers], _SPIN_S)
        self._ringer = Ringer([(lines.asleep[rank], bells[rank]) for rank in readers])
        self._taken = lines.counts[1:]
        self._fence = Fence()
        self._timeout_s = timeout_s
        self._written = 0

    def put(self, step: StepInput) -> None:
        """Waits only while a reader lags by all slots. Raises RankLost."""
        data = memoryview(step.to_bytes())
        room = self._lines.slot_bytes - _HEADER.size
        while len(data) > room:
            self._put(_PART, data[:room])
            data = data[room:]
        self._put(_STEP, data)

    def stop(self) -> None:
        """There are no more steps. Waits as `put` does."""
        self._put(_STOP, memoryview(b""))

    def close(self) -> None:
        """Nobody can join from now on. Those who have joined still take what was written. Again: nothing."""
        self._waiter.close()
        self._ringer.close()
        self._segment.close()

    def _put(self, kind: int, data: memoryview) -> None:
        if not self._has_room():
            self._waiter.wait(self._has_room, self._timeout_s, "room for a plan")
        self._fence()
        slot = self._lines.slots[self._written % _NUM_SLOTS]
        _HEADER.pack_into(slot, 0, kind, len(data))
        slot[_HEADER.size : _HEADER.size + len(data)] = data
        self._written += 1
        self._fence()
        self._lines.counts[0][0] = self._written
        self._ringer.ring()

    def _has_room(self) -> bool:
        oldest = self._written - _NUM_SLOTS
        return all(taken[0] > oldest for taken in self._taken)


class PlanReader:
    """A follower's end. One thread uses it."""

    def __init__(self, segment: Segment, writers: Doorbell, own: Doorbell, rank: int, size: int) -> None:
        self._segment = segment
        lines = _Lines(segment, size)
        self._slots, self._written, self._taken = lines.slots, lines.counts[0], lines.counts[rank]
        self._waiter = Waiter(lines.asleep[rank], own, [(0, lines.pids[0])], _SPIN_S)
        self._ringer = Ringer([(lines.asleep[0], writers)])
        self._fence = Fence()
        self._count = 0
        lines.pids[rank][0] = os.getpid()

    @classmethod
    def join(cls, address: str, rank: int, size: int) -> "PlanReader":
        """address: this rank's own of the writer's. Raises RankLost where rank 0 is gone."""
        memory, writers, own = address.split()
        return cls(Segment.open(memory), Doorbell.open(writers), Doorbell.open(own), rank, size)

    def take(self) -> StepInput | None:
        """The next step; None: there are no more. Waits for as long as rank 0 lives, then raises RankLost."""
        parts = []
        while True:
            self._waiter.wait(self._has_more, None, "a plan")
            self._fence()
            slot = self._slots[self._count % _NUM_SLOTS]
            kind, size = _HEADER.unpack_from(slot)
            parts.append(bytearray(slot[_HEADER.size : _HEADER.size + size]))  # torch warns of what is read-only
            self._fence()
            self._count += 1
            self._taken[0] = self._count
            self._ringer.ring()
            if kind == _STOP:
                return None
            if kind == _STEP:
                return StepInput.from_bytes(parts[0] if len(parts) == 1 else bytearray().join(parts))

    def close(self) -> None:
        self._waiter.close()
        self._ringer.close()
        self._segment.close()

    def _has_more(self) -> bool:
        more: bool = self._written[0] > self._count
        return more
