"""One linked worker as the fleet keeps it, and the seats taken on it."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..core.errors import BatonError, Overloaded, Unavailable
from ..core.frames import Command, HandOver, Release
from ..core.ids import SequenceId, WorkerId
from ..core.request import Load, Request
from ..core.tickets import Ticket
from ..wire.registry import WorkerRecord
from .placement import Need, Role, WorkerView
from .workers import Listener, News

MAX_NUMBER = 2**32 - 1  # of a sequence on its link
RESEND_S = 0.02  # after which a command is sent again that a busy line did not take
log = logging.getLogger(__name__)


class Line(Protocol):
    """What the fleet uses of a `wire.links.Link`."""

    @property
    def connected(self) -> bool: ...

    async def start(self) -> None: ...

    def send(self, command: Command) -> None: ...

    async def close(self) -> None: ...


@dataclass(eq=False, slots=True)
class Member:
    """One worker in one of its lives."""

    record: WorkerRecord
    on_freed: Callable[[], None]  # a seat was released
    line: Line | None = None
    linked: bool = False
    load: Load | None = None  # None: no frame has told yet
    seats: "set[TakenSeat]" = field(default_factory=set)
    by_sequence: "dict[SequenceId, TakenSeat]" = field(default_factory=dict)
    by_number: "dict[int, TakenSeat]" = field(default_factory=dict)
    last_number: int = 0

    @property
    def role(self) -> Role:
        return Role(self.record.role)

    def view(self) -> WorkerView:
        record, load = self.record, self.load or Load(free_blocks=self.record.num_blocks)
        uncounted = [seat for seat in self.seats if not seat.counted]
        return WorkerView(
            worker_id=record.worker_id,
            role=self.role,
            model_fingerprint=record.model_fingerprint,
            block_tokens=record.block_tokens,
            total_blocks=record.num_blocks,
            free_blocks=load.free_blocks - sum(seat.blocks for seat in uncounted),
            waiting_tokens=max(load.waiting_tokens, sum(seat.prompt_tokens for seat in uncounted)),
            sequences=max(load.running + load.waiting, len(self.seats)),
            running=load.running,
            waiting=load.waiting,
            draining=load.draining,
        )

    def next_number(self) -> int:
        """For a new sequence. None is used again before all others were: what the worker still says of one that was
        released must not be taken for another's."""
        while True:
            self.last_number = self.last_number % MAX_NUMBER + 1
            if self.last_number not in self.by_number:
                return self.last_number

    def send_release(self, release: Release) -> None:
        """Sends it now or as soon as the line takes it. A line that is lost has released everything."""
        if not self.linked or self.line is None:
            return
        try:
            self.line.send(release)
        except Overloaded:
            asyncio.get_running_loop().call_later(RESEND_S, self.send_release, release)
        except BatonError:
            log.debug("the link to %s closed before a release", self.record.worker_id)


class TakenSeat:
    """See workers.Seat."""

    def __init__(self, member: Member, need: Need) -> None:
        block_tokens = member.record.block_tokens
        prefill = member.role is Role.PREFILL
        self.blocks = need.prompt_blocks(block_tokens) if prefill else need.blocks_soon(block_tokens)
        self.prompt_tokens = need.prompt_tokens
        self.counted = False  # the worker's load has it
        self.heard = False  # the worker has shown that it knows of it
        self._member = member
        self._sequence: SequenceId | None = None  # while the worker has it
        self._number = 0  # the same
        self._listener: Listener | None = None
        member.seats.add(self)

    @property
    def worker_id(self) -> WorkerId:
        return self._member.record.worker_id

    def admit(self, request: Request, listener: Listener) -> None:
        number = self._member.next_number()
        self._send(replace(request, number=number))
        self._sequence, self._number = request.sequence_id, number
        self._listener = listener
        self._member.by_sequence[request.sequence_id] = self
        self._member.by_number[number] = self

    def hand_over(self, ticket: Ticket) -> None:
        if self._sequence is not None:
            self._send(HandOver(sequence_id=self._sequence, ticket=ticket))

    def release(self) -> None:
        if self not in self._member.seats:
            return
        self._member.seats.discard(self)
        self._listener = None
        sequence = self._forget()
        if sequence is not None:
            self._member.send_release(Release(sequence_id=sequence))
        self._member.on_freed()

    def tell(self, news: News) -> None:
        """From the fleet: what a frame says, or that the link closed."""
        listener = self._listener
        if news.ended is not None or news.lost:
            self._forget()
        if listener is not None:
            listener(news)

    def _forget(self) -> SequenceId | None:
        sequence, self._sequence = self._sequence, None
        if sequence is not None:
            if self._member.by_sequence.get(sequence) is self:
                del self._member.by_sequence[sequence]
            del self._member.by_number[self._number]
        return sequence

    def _send(self, command: Command) -> None:
        if not self._member.linked or self._member.line is None:
            raise Unavailable("the link to the worker closed")
        self._member.line.send(command)
