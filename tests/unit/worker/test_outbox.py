"""What a rank says, whatever order it says it in and however seldom there is room to send it."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.core.frames import TicketGranted, WorkerFrame
from baton.core.ids import Epoch, SequenceId, TicketId, WorkerId
from baton.core.request import MAX_PROMPT_LOGPROBS, Ended, EndReason, Load, SequenceTokens, TokenLogprobs
from baton.core.tickets import Geometry, Ticket
from baton.wire.codec import frame_from_bytes
from baton.worker.outbox import Outbox
from baton.worker.records import Kind, Record
from baton.worker.ring import Ring, RingFull

LINK = 3
CAPACITY = 4 << 20
LOGPROB = TokenLogprobs(-1.0)


@dataclass
class Wire:
    """An outbox and the reader of its ring, which may be stuffed so that nothing fits."""

    outbox: Outbox
    ring: Ring
    reader: Ring

    def stuff(self) -> None:
        """No frame fits any more."""
        for size in (1 << 16, 1 << 8, 0):
            with suppress(RingFull):
                while True:
                    self.ring.put(*Record(Kind.REPORT, 0, b"x" * size).parts())

    def frames(self) -> list[WorkerFrame]:
        records = [Record.parse(data) for data in self.reader.take()]
        return [frame_from_bytes(record.body) for record in records if record.kind is Kind.FRAME]


@pytest.fixture(scope="module")
def rings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ring, Ring]]:
    path: Path = tmp_path_factory.mktemp("ring") / "r"
    with_writer, reader = Ring.create(path, CAPACITY), Ring.open(path)
    yield with_writer, reader
    with_writer.close()
    reader.close()


@pytest.fixture
def wire(rings: tuple[Ring, Ring]) -> Wire:
    return a_wire(rings)


def a_wire(rings: tuple[Ring, Ring]) -> Wire:
    rings[1].take()
    outbox = Outbox(rings[0])
    outbox.open(LINK)
    return Wire(outbox, *rings)


def a_ticket(name: SequenceId) -> Ticket:
    geometry = Geometry(num_layers=1, num_kv_heads=1, head_size=8, block_tokens=16, dtype="float32", fingerprint="f")
    return Ticket(
        ticket_id=TicketId(name),
        worker_id=WorkerId("d"),
        epoch=Epoch(1),
        wanted=(),
        geometry=geometry,
        lease_s=1.0,
        inbox="i",
    )


@dataclass
class Life:
    """One life of a sequence, as its worker has told it."""

    name: SequenceId
    number: int
    first: int = 0  # position of the first token told here
    told: int = 0

    @property
    def position(self) -> int:
        return self.first + self.told


@dataclass
class Heard:
    """What a reader made of it."""

    tickets: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: int = 0
    ended: bool = False


def token_of(life: Life, position: int) -> int:
    """Different in each place of each life."""
    return life.number * 100_000 + position


class Reader:
    """Takes tickets, then tokens by position, then ends; numbers and names lead to the life that has them now."""

    def __init__(self) -> None:
        self.heard: dict[int, Heard] = defaultdict(Heard)  # by number
        self.living: dict[SequenceId, Life] = {}
        self.waiting: dict[SequenceId, list[Life]] = defaultdict(list)  # lives of a name, the next one first

    def take(self, frame: WorkerFrame) -> None:
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for granted in frame.tickets:
            self._life(granted.sequence_id, begins=True)
            self.heard[self.living[granted.sequence_id].number].tickets += 1
        for tokens in frame.tokens:
            life = self._life(tokens.sequence_id, begins=tokens.first_position == 0)
            found[life.number] += enumerate(tokens.token_ids, tokens.first_position)
            assert len(tokens.logprobs) in (0, len(tokens.token_ids))
            self.heard[life.number].logprobs += len(tokens.logprobs)
        if frame.step is not None:
            assert frame.step.numbers
            for number, position, token in zip(
                frame.step.numbers, frame.step.positions, frame.step.token_ids, strict=True
            ):
                found[number].append((position, token))
        for number, places in found.items():
            assert not self.heard[number].ended, "a token came after its sequence's end"
            self.heard[number].tokens += [token for _, token in sorted(places)]
        for ended in frame.ended:
            life = self._life(ended.sequence_id)
            self.heard[life.number].ended = True
            del self.living[ended.sequence_id]

    def _life(self, name: SequenceId, *, begins: bool = False) -> Life:
        if name not in self.living:
            assert begins, f"{name} speaks before it begins"
            self.living[name] = self.waiting[name].pop(0)
        return self.living[name]


class Speaker:
    """A worker that says all kinds of things of three names, each of which may live again and again."""

    def __init__(self, wire: Wire, reader: Reader, tickets: bool) -> None:
        self.wire = wire
        self.reader = reader
        self.tickets = tickets  # a decode worker's lives begin with one, and at position 1
        self.lives: list[Life] = []
        self.living: dict[SequenceId, Life] = {}

    def life_of(self, name: SequenceId) -> Life:
        if name not in self.living:
            life = self.living[name] = Life(name, number=len(self.lives) + 1, first=1 if self.tickets else 0)
            self.lives.append(life)
            self.reader.waiting[name].append(life)
            if self.tickets:
                self.wire.outbox.granted(LINK, TicketGranted(sequence_id=name, ticket=a_ticket(name)))
            else:
                self.by_name(name, 1, False)
        return self.living[name]

    def by_name(self, name: SequenceId, count: int, logprobs: bool) -> None:
        life = self.life_of(name)
        tokens = SequenceTokens(
            sequence_id=name,
            first_position=life.position,
            token_ids=tuple(token_of(life, life.position + at) for at in range(count)),
            logprobs=(LOGPROB,) * count if logprobs else (),
        )
        self.wire.outbox.tokens(LINK, tokens)
        life.told += count

    def steps(self, names: set[SequenceId], count: int) -> None:
        for _ in range(count):
            speakers = [self.life_of(name) for name in sorted(names)]
            positions = [life.position for life in speakers]
            ids = [token_of(life, life.position) for life in speakers]
            self.wire.outbox.step_tokens(LINK, [life.number for life in speakers], positions, ids)
            for life in speakers:
                life.told += 1

    def long_column(self, name: SequenceId, count: int) -> None:
        life = self.life_of(name)
        positions = range(life.position, life.position + count)
        self.wire.outbox.step_tokens(
            LINK, [life.number] * count, positions, [token_of(life, position) for position in positions]
        )
        life.told += count

    def end(self, name: SequenceId) -> None:
        if self.living.pop(name, None) is not None:
            self.wire.outbox.ended(LINK, Ended(sequence_id=name, reason=EndReason.STOP))

    def flush(self, full: bool) -> None:
        if full:
            self.wire.stuff()
        self.wire.outbox.flush(Load(running=len(self.living)))
        for frame in self.wire.frames():
            self.reader.take(frame)


NAMES = st.sampled_from(["a", "b", "c"]).map(SequenceId)
MOVES = st.one_of(
    st.tuples(st.just(Speaker.by_name), NAMES, st.integers(1, 3), st.booleans()),
    st.tuples(st.just(Speaker.steps), st.sets(NAMES, min_size=1), st.integers(1, 3)),
    st.tuples(st.just(Speaker.long_column), NAMES, st.integers(3000, 9000)),
    st.tuples(st.just(Speaker.end), NAMES),
    st.tuples(st.just(Speaker.flush), st.booleans()),
)


@given(moves=st.lists(MOVES, max_size=40), tickets=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
def test_each_sequence_gets_its_tokens_once_in_order_and_before_its_end(
    rings: tuple[Ring, Ring], moves: list[tuple[Any, ...]], tickets: bool
) -> None:
    reader = Reader()
    speaker = Speaker(a_wire(rings), reader, tickets)
    for move, *what in moves:
        move(speaker, *what)
    for _ in range(2):  # the first may leave the ring's room to the second
        speaker.flush(full=False)
    for life in speaker.lives:
        heard = reader.heard[life.number]
        assert heard.tokens == [token_of(life, life.first + at) for at in range(life.told)]
        assert heard.ended == (speaker.living.get(life.name) is not life)
        assert heard.tickets == int(tickets)


def test_steps_that_wait_for_room_go_out_as_one_frame(wire: Wire) -> None:
    wire.stuff()
    for position in range(1, 4):
        wire.outbox.step_tokens(LINK, [7, 8], [position] * 2, [position, position + 50])
        assert not wire.outbox.flush(Load())
    wire.frames()
    assert wire.outbox.flush(Load())
    (frame,) = wire.frames()
    assert frame.step
    assert frame.step.numbers == (7, 8) * 3
    assert frame.step.positions == (1, 1, 2, 2, 3, 3)
    assert frame.step.token_ids == (1, 51, 2, 52, 3, 53)
    assert not frame.tokens


def test_a_frame_without_columns_has_none(wire: Wire) -> None:
    wire.outbox.tokens(LINK, SequenceTokens(sequence_id=SequenceId("a"), first_position=0, token_ids=(1,)))
    wire.outbox.step_tokens(LINK, [], [], [])
    wire.outbox.flush(Load())
    assert [frame.step for frame in wire.frames()] == [None]


def test_columns_of_a_closed_link_are_dropped(wire: Wire) -> None:
    wire.outbox.close(LINK)
    wire.outbox.step_tokens(LINK, [1], [1], [1])
    assert wire.outbox.flush(Load())
    assert not wire.frames()


def test_the_largest_frame_fits_the_smallest_ring(wire: Wire) -> None:
    most = TokenLogprobs(-1.0, tuple((2**31 - 1, -1.0) for _ in range(20)))
    for at in range(4095):
        tokens = SequenceTokens(
            sequence_id=SequenceId(f"{at:0200}"), first_position=9, token_ids=(2**31 - 1,), logprobs=(most,)
        )
        wire.outbox.tokens(LINK, tokens)
    prompt = (None, *(most for _ in range(MAX_PROMPT_LOGPROBS // 21 - 1)))
    first = SequenceTokens(sequence_id=SequenceId("p"), first_position=0, token_ids=(1,), prompt_logprobs=prompt)
    wire.outbox.tokens(LINK, first)
    assert wire.outbox.flush(Load())
    (frame,) = wire.frames()
    assert frame.tokens[-1].prompt_logprobs == prompt
