"""The live workers: who is linked, how busy each is, whose turn it is to be placed.

A worker's load is what its last frame said, less what this router has claimed since: a claim counts until the worker
has shown, by its ticket or its first token, that it has counted it itself. Requests that find no room wait in order of
arrival, so that a large one is not passed by small ones for ever.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from ..core.errors import BatonError, Overloaded, Unavailable
from ..core.frames import WorkerFrame
from ..core.ids import WorkerId
from ..text.settling import ModelLimits
from ..wire.registry import WorkerRecord
from .placement import Need, Placement, Role, WorkerView, place
from .seats import Line, Member, TakenSeat
from .workers import News, Seats

log = logging.getLogger(__name__)


OpenLine: TypeAlias = Callable[[WorkerRecord, Callable[[WorkerFrame], None], Callable[[bool], None]], Line]
"""(worker, on_frame, on_state) -> a line that is not started yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    name: str
    max_model_len: int
    vocab_size: int
    dtype: str
    fingerprint: str


class Fleet:
    """All workers of one model. One event loop."""

    def __init__(
        self,
        *,
        model: str,
        open_line: OpenLine,
        max_waiting: int,
        wait_s: float,
        on_change: Callable[[], None] = lambda: None,
        on_queue: Callable[[int], None] = lambda waiting: None,
    ) -> None:
        """`wait_s`: the longest that a request waits for room. `on_change`: a worker came or went, or drains.
        `on_queue`: so many requests wait."""
        self._model = model
        self._open_line = open_line
        self._max_waiting = max_waiting
        self._wait_s = wait_s
        self._on_change = on_change
        self._on_queue = on_queue
        self._members: dict[WorkerId, Member] = {}
        self._listed: Mapping[WorkerId, WorkerRecord] = {}
        self._served: ServedModel | None = None
        self._waiting: deque[tuple[Need, asyncio.Future[Seats]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def served(self) -> ServedModel | None:
        """The model as its workers describe it; None before the first one came."""
        return self._served

    def limits(self) -> ModelLimits:
        """Raises Unavailable before the first worker came."""
        if self._served is None:
            raise Unavailable("no worker has come yet; try again soon")
        served = self._served
        return ModelLimits(name=served.name, max_model_len=served.max_model_len, vocab_size=served.vocab_size)

    @property
    def ready(self) -> bool:
        """A prefill and a decode worker that understand each other are linked and take requests, or one that is
        both."""
        kinds: dict[Role, set[str]] = {role: set() for role in Role}
        for view in self.views():
            if not view.draining:
                kinds[view.role].add(view.model_fingerprint)
        return bool(kinds[Role.BOTH] or kinds[Role.PREFILL] & kinds[Role.DECODE])

    def linked(self, role: Role) -> int:
        return sum(view.role is role for view in self.views())

    def views(self) -> list[WorkerView]:
        return [member.view() for member in self._members.values() if member.linked]

    def update(self, records: Mapping[WorkerId, WorkerRecord]) -> None:
        """What the registry lists now. A worker that it no longer lists stays while its link is open: the link is the
        truth, not a lease."""
        self._listed = {key: record for key, record in records.items() if record.model == self._model}
        for worker_id, record in self._listed.items():
            known = self._members.get(worker_id)
            if known is not None and (known.record.epoch, known.record.address) == (record.epoch, record.address):
                continue
            if known is not None:
                self._drop(known)
            self._add(record)
        for member in list(self._members.values()):
            if member.record.worker_id not in self._listed and not member.linked:
                self._drop(member)
        self._describe()

    async def seats(self, need: Need) -> Seats:
        """See workers.Workers."""
        if not self._waiting:
            placed = place(need, self.views())
            if isinstance(placed, Placement):
                return self._claim(placed, need)
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} requests wait for a worker, which is the most; try again soon")
        found: asyncio.Future[Seats] = asyncio.get_running_loop().create_future()
        entry = (need, found)
        self._waiting.append(entry)
        self.reconsider()
        try:
            self._on_queue(len(self._waiting))
            async with asyncio.timeout(self._wait_s):
                return await found
        except BaseException as error:
            if found.done() and not found.cancelled():
                found.result().release()  # it was given at the very moment
            if isinstance(error, TimeoutError):
                raise self._no_room(need) from None
            raise
        finally:
            found.cancel()
            if entry in self._waiting:
                self._waiting.remove(entry)
            self._on_queue(len(self._waiting))
            self.reconsider()  # the next in line may need less

    def reconsider(self) -> None:
        """Gives seats to those who wait, in their order, up to the first for whom there is no room."""
        for entry in list(self._waiting):
            need, found = entry
            if found.done():
                continue
            placed = place(need, self.views())
            if isinstance(placed, Placement):
                self._waiting.remove(entry)
                found.set_result(self._claim(placed, need))
            elif placed.full:
                return

    async def close(self) -> None:
        """Closes every link; the workers release what came over them."""
        self._closing = True
        lines = [member.line for member in self._members.values() if member.line]
        for member in list(self._members.values()):
            self._drop(member)
        await asyncio.gather(*(line.close() for line in lines), *self._tasks)

    def _claim(self, placement: Placement, need: Need) -> Seats:
        decode = None if placement.decode is None else TakenSeat(self._members[placement.decode], need)
        prefill = TakenSeat(self._members[placement.prefill], need)
        return Seats(placement=placement, prefill=prefill, decode=decode)

    def _no_room(self, need: Need) -> BatonError:
        placed = place(need, self.views())
        if isinstance(placed, Placement):
            return Overloaded(f"no worker had room within {self._wait_s:g} s: others were first")
        kind = Overloaded if placed.full else Unavailable
        return kind(f"no worker had room within {self._wait_s:g} s: {placed.reason}")

    def _add(self, record: WorkerRecord) -> None:
        member = Member(record, self.reconsider)
        self._members[record.worker_id] = member
        member.line = self._open_line(
            record, lambda frame: self._on_frame(member, frame), lambda linked: self._on_state(member, linked)
        )
        self._begin(member.line.start())

    def _drop(self, member: Member) -> None:
        if self._members.get(member.record.worker_id) is member:
            del self._members[member.record.worker_id]
        if member.linked:
            self._on_state(member, False)
        if member.line is not None:
            self._begin(member.line.close())

    def _begin(self, chore: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(chore)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_state(self, member: Member, linked: bool) -> None:
        if member.linked == linked:
            return
        record = member.record
        if linked:
            change = "linked"
        elif self._closing or record.worker_id not in self._listed or (member.load and member.load.draining):
            change = "left"
        else:
            change = "lost"
        log.info("%s worker %s %s", record.role, record.worker_id, change)
        member.linked = linked
        member.load = None
        if not linked:
            for seat in list(member.seats):
                seat.tell(News(lost=True))
            if record.worker_id not in self._listed and self._members.get(record.worker_id) is member:
                self._drop(member)
        self._on_change()
        self.reconsider()

    def _on_frame(self, member: Member, frame: WorkerFrame) -> None:
        spoken = by_seat(member, frame)
        for seat, news in spoken.items():
            seat.heard = seat.heard or news.ticket is not None or bool(news.tokens or news.plain)
        if frame.load is not None:
            drains = member.load is not None and member.load.draining != frame.load.draining
            member.load = frame.load
            for seat in member.seats:
                seat.counted = seat.heard
            if drains or frame.load.draining:
                self._on_change()
        for seat, news in spoken.items():
            seat.tell(news)
        if frame.load is not None:
            self.reconsider()

    def _describe(self) -> None:
        """The model, as all of its workers can serve it."""
        records = list(self._listed.values())
        if not records:
            return  # the last known answers on
        first = records[0]
        self._served = ServedModel(
            name=self._model,
            max_model_len=min(min(record.max_model_len, record.num_blocks * record.block_tokens) for record in records),
            vocab_size=min(record.vocab_size for record in records),
            dtype=first.dtype,
            fingerprint=first.fingerprint,
        )


def by_seat(member: Member, frame: WorkerFrame) -> dict[TakenSeat, News]:
    """A frame, turned: for each seat all that is said of its sequence. What is said of others is left out."""
    plain: dict[TakenSeat, list[tuple[int, int]]] = {}
    step = frame.step
    if step is not None:  # most of what workers say, so nothing is made here but the pairs
        seat_of = member.by_number.get
        for number, position, token in zip(step.numbers, step.positions, step.token_ids, strict=True):
            taken = seat_of(number)
            if taken in plain:
                plain[taken].append((position, token))
            elif taken is not None:
                plain[taken] = [(position, token)]
    said = {seat: News(plain=pairs) for seat, pairs in plain.items()}
    nothing = News()
    for granted in frame.tickets:
        if (seat := member.by_sequence.get(granted.sequence_id)) is not None:
            said[seat] = said.get(seat, nothing)._replace(ticket=granted.ticket)
    for tokens in frame.tokens:
        if (seat := member.by_sequence.get(tokens.sequence_id)) is not None:
            before = said.get(seat, nothing)
            said[seat] = before._replace(tokens=(*before.tokens, tokens))
    for ended in frame.ended:
        if (seat := member.by_sequence.get(ended.sequence_id)) is not None:
            said[seat] = said.get(seat, nothing)._replace(ended=ended)
    return said
