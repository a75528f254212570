"""Waits of microseconds for other processes: spin a little, then sleep until the one that was waited for rings.

A process that spins or yields for long is put behind others when the machine is busy, by milliseconds each time; one
that slept is let in at once. And a rank without work costs nothing.
"""

import os
import select
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import perf_counter

from ...core.segment import Doorbell, Fence
from .communicator import RankLost

_LOOKS = 20  # between those at the clock
_WAKE_S = 0.1  # where stores are seen in another order than here a doorbell may be missed: look again after this


class Peers:
    """Other processes of a group, by rank. Tells the dead from the slow."""

    def __init__(self) -> None:
        self._watched: dict[int, int] = {}  # rank -> pidfd, which is readable once the process has ended

    def watch(self, rank: int, pid: int) -> None:
        """pid: 0 while it is not known. Again: nothing. Raises RankLost."""
        if pid and rank not in self._watched:
            try:
                self._watched[rank] = os.pidfd_open(pid)
            except ProcessLookupError:
                raise RankLost(f"rank {rank} is gone") from None

    def register(self, poll: select.poll) -> None:
        """So that an end wakes who sleeps."""
        for fd in self._watched.values():
            poll.register(fd, select.POLLIN)

    def check(self, ready: set[int]) -> None:
        """ready: descriptors that poll found. Raises RankLost when one of them says that a process has ended: also one
        whose parent has not asked for its exit status yet, which a signal would not tell."""
        for rank, fd in self._watched.items():
            if fd in ready:
                raise RankLost(f"rank {rank} is gone")

    def close(self) -> None:
        for fd in self._watched.values():
            with suppress(OSError):
                os.close(fd)
        self._watched.clear()


class Waiter:
    """One process that waits for others, which ring its bell when it sleeps and they have changed something."""

    def __init__(
        self, asleep: memoryview, bell: Doorbell, pids: Sequence[tuple[int, memoryview]], spin_s: float
    ) -> None:
        """asleep: a shared word of this process, not 0 while it must be rung. pids: rank and shared word of each that
        may be waited for; 0 until it has joined. spin_s: how long to look before falling asleep."""
        self._asleep = asleep
        self._bell = bell
        self._pids = pids
        self._spin_s = spin_s
        self._peers = Peers()
        self._fence = Fence()

    def wait(self, done: Callable[[], bool], timeout_s: float | None, what: str) -> None:
        """Until `done`. timeout_s: None where nothing need come for as long as the others live. Raises RankLost where
        one has died or `what` came too late."""
        end = perf_counter() + self._spin_s
        while perf_counter() < end:
            for _ in range(_LOOKS):
                if done():
                    return
        self._asleep[0] = 1
        try:
            self._fence()  # either we see what was changed, or who changed it sees that we sleep
            deadline = None if timeout_s is None else end + timeout_s
            while not done():
                if deadline is not None and perf_counter() > deadline:
                    raise RankLost(f"{what} did not come within {timeout_s:g} s")
                self._sleep(_WAKE_S if deadline is None else min(_WAKE_S, max(0.0, deadline - perf_counter())), done)
        finally:
            self._asleep[0] = 0

    def close(self) -> None:
        self._peers.close()
        self._bell.close()

    def _sleep(self, seconds: float, done: Callable[[], bool]) -> None:
        poll = select.poll()
        poll.register(self._bell.fd, select.POLLIN)
        for rank, pid in self._pids:
            self._peers.watch(rank, pid[0])
        self._peers.register(poll)
        ready = {fd for fd, _ in poll.poll(seconds * 1000)}
        if self._bell.fd in ready:
            self._bell.clear()
        if not done():
            self._peers.check(ready)


class Ringer:
    """Rings those that sleep."""

    def __init__(self, sleepers: Sequence[tuple[memoryview, Doorbell]]) -> None:
        """Their `asleep` words and bells."""
        self._sleepers = sleepers
        self._fence = Fence()

    def ring(self) -> None:
        """What was written before is there to see now, also for those who fall asleep meanwhile."""
        self._fence()
        for asleep, bell in self._sleepers:
            if asleep[0]:
                bell.ring()

    def close(self) -> None:
        for _, bell in self._sleepers:
            bell.close()
