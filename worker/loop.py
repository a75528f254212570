"""The step loop of a rank: take in commands and mail, run one step, say what came of it in one frame per link.

One thread owns the ledger, the sequences and the device. It never waits for the service, and sleeps on two descriptors
(the ring's doorbell and the inbox's) only when a step had nothing to do.
"""

import select
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from time import monotonic
from typing import Protocol

from ..core.frames import PINNED, Command, Holder, LedgerDump, WorkerStatus
from ..core.ids import BlockId
from ..core.request import Load
from ..engine.ledger import Ledger
from ..kv_transfer.inbox import Inbox
from ..kv_transfer.messages import Delivery
from ..kv_transfer.transport import Transport
from ..wire.codec import commands_from_bytes
from ..wire.worker_codec import ledger_to_bytes, status_to_bytes
from .outbox import Outbox
from .records import Kind, Record
from .reporting import Reporter
from .ring import RingFull, RingPair

_FULL_RING_S = 0.005  # how long to sleep at most while the service has no room for a frame
_QUIET_S = 0.25  # and while counts wait to be reported
_COUNT = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class LinkClosed:
    """The service's word that a link is gone: end its sequences, nobody reads of them any more."""


@dataclass(frozen=True, slots=True)
class RoleState:
    """What a role says of itself at every step."""

    load: Load
    remaining: int  # sequences, loans and reservations that are not over


@dataclass(frozen=True, slots=True)
class Survey:
    """What a role says of itself when asked; costs a look at every sequence."""

    holders: tuple[Holder, ...]
    next_deadline: float | None

    def blocks_in(self, state: str) -> set[BlockId]:
        """Of a state and of its endings."""
        return {block for holder in self.holders if holder.state.startswith(state) for block in holder.block_ids}


class Role(Protocol):
    """The policy of one kind of worker. Called by the loop's thread alone; `now` is the loop's clock, in seconds."""

    def command(self, link: int, command: Command | LinkClosed, now: float) -> None:
        """Never raises for what a router sent: a sequence that can't be taken ends as FAILED."""

    def deliver(self, delivery: Delivery, now: float) -> None:
        """A message of a peer rank."""

    def step(self, now: float) -> bool:
        """Take in what has finished or expired, then run one step. False: nothing was there to run."""

    def state(self, *, drain: bool = False) -> RoleState:
        """`drain`: take no new sequence from now on."""

    def lent_blocks(self) -> int:
        """Held, and announced to a peer. Costs a look at every loan."""

    def survey(self) -> Survey: ...


class StepLoop:
    """Joins a role to the ring and the inbox."""

    def __init__(
        self,
        role: Role,
        rings: RingPair,
        inbox: Inbox,
        outbox: Outbox,
        reporter: Reporter,
        ledger: Ledger,
        transport: Transport,
        status: WorkerStatus,
        unused_slots: Callable[[], int],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """status: what never changes of it. unused_slots: places for tokens in held blocks that hold none."""
        self._role = role
        self._rings = rings
        self._inbox = inbox
        self._outbox = outbox
        self._reporter = reporter
        self._ledger = ledger
        self._transport = transport
        self._status = status
        self._unused_slots = unused_slots
        self._clock = clock
        self._started = clock()
        self._answers: list[Record] = []
        self._drains: list[int] = []
        self._stopped = False
        self._poll = select.poll()
        for fd in (rings.incoming.fd, inbox.wakeup.fd):
            self._poll.register(fd, select.POLLIN)

    def run(self) -> None:
        """Until the service says stop. An error of a step ends the loop, and with it this life of the worker."""
        while not self._stopped:
            worked, sent = self.turn()
            if not worked and not self._stopped:
                self._sleep(sent)

    def turn(self) -> tuple[bool, bool]:
        """One round. Gives whether a step ran, and whether everything that was to be said went out."""
        ready = {fd for fd, _ in self._poll.poll(0)}  # one call of the kernel, where two would find nothing
        if self._rings.incoming.fd in ready:
            for data in self._rings.incoming.take():
                self._take(Record.parse(data))
        if self._inbox.wakeup.fd in ready:
            self._inbox.wakeup.clear()
        now = self._clock()
        for delivery in self._inbox.drain():
            self._role.deliver(delivery, now)
        worked = self._role.step(now)
        return worked, self._say(self._clock())

    def _take(self, record: Record) -> None:
        match record.kind:
            case Kind.FRAME:
                self._outbox.open(record.number)
                now = self._clock()
                for command in commands_from_bytes(record.body):
                    self._role.command(record.number, command, now)
            case Kind.LINK_CLOSED:
                self._role.command(record.number, LinkClosed(), self._clock())
                self._outbox.close(record.number)
            case Kind.LEDGER:
                if record.body:
                    self._ledger.drop_cached()
                self._answers.append(replace(record, body=ledger_to_bytes(self._dump())))
            case Kind.STATUS:
                self._answers.append(replace(record, body=status_to_bytes(self._status_now())))
            case Kind.DRAIN:
                self._role.state(drain=True)
                self._drains.append(record.number)
            case Kind.REMAINING:
                self._answers.append(replace(record, body=_COUNT.pack(self._role.state().remaining)))
            case Kind.STOP:
                self._stopped = True
            case _:
                raise AssertionError(f"a rank never gets {record.kind!r}")

    def _say(self, now: float) -> bool:
        """False: the ring is full, something is still here."""
        state = self._role.state()
        if self._drains and not state.remaining:
            self._answers += [Record(Kind.DRAIN, number, _COUNT.pack(0)) for number in self._drains]
            self._drains.clear()
        if not self._outbox.flush(state.load):
            return False
        try:
            while self._answers:
                self._rings.outgoing.put(*self._answers[0].parts())
                del self._answers[0]
        except RingFull:
            return False
        self._reporter.gauges(state.load, self._ledger.cached_count, self._ledger.held_count)
        if self._reporter.due(now):
            self._reporter.flush(now, self._role.lent_blocks(), self._unused_slots())
        return True

    def _sleep(self, sent: bool) -> None:
        waits = [] if sent else [_FULL_RING_S]
        if self._reporter.pending():
            waits.append(_QUIET_S)
        deadline = self._role.survey().next_deadline
        if deadline is not None:
            waits.append(max(deadline - self._clock(), 0.0))
        # A millisecond more than the deadline, so that the loop does not wake just before it.
        self._poll.poll(min(waits) * 1000 + 1 if waits else None)

    def _dump(self) -> LedgerDump:
        survey = self._role.survey()
        ledger = self._ledger
        return LedgerDump(
            total_blocks=ledger.num_blocks,
            free_blocks=ledger.free_count,
            cached_blocks=ledger.cached_count,
            held_blocks=ledger.held_count,
            lent_blocks=len(survey.blocks_in("lent")),
            holders=survey.holders,
            violations=(*ledger.violations(), *unaccounted(ledger, survey.holders)),
            transport_objects=self._transport.living(),
            pinned_blocks=len(survey.blocks_in(PINNED)),
            unused_slots=self._unused_slots(),
        )

    def _status_now(self) -> WorkerStatus:
        return replace(
            self._status,
            load=self._role.state().load,
            steps=self._reporter.steps,
            uptime_s=self._clock() - self._started,
            transfer_gb_per_s=self._reporter.gb_per_s(),
            ways=tuple(self._transport.ways),
        )


def unaccounted(ledger: Ledger, holders: Iterable[Holder]) -> list[str]:
    """Blocks that more, or fewer, hold in the ledger than sequences, loans and reservations say. Empty: all is well."""
    claimed = Counter(block for holder in holders for block in holder.block_ids)
    return [
        f"block {block}: {ledger.holders(block)} holders, {claimed[block]} known"
        for block in map(BlockId, range(ledger.num_blocks))
        if ledger.holders(block) != claimed[block]
    ]
