"""Lending and landing against each other over loopback, driven at random, with canaries in the blocks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.core.errors import BatonError, Cancelled, CorruptPiece, StaleEpoch
from baton.core.frames import Holder
from baton.core.ids import BlockId, Epoch, SequenceId, TicketId, WorkerId
from baton.core.tickets import Geometry, Piece
from baton.engine.ledger import Ledger
from baton.kv_transfer.inbox import Inbox
from baton.kv_transfer.loopback import Hub, LoopbackTransport
from baton.kv_transfer.messages import PeerLost, Returned
from baton.kv_transfer.pool import BlockPool
from baton.worker.landing import Landed, Landing, LandingFailed
from baton.worker.lending import Identity, Lending
from baton.worker.loop import unaccounted

from ...fakes import GEOMETRY, HandCranked

BLOCKS = 12
UNIT = 16  # tokens
LEASE_S = 10.0


class Side:
    """A rank's pool, ledger, inbox and transport."""

    def __init__(self, hub: Hub, name: str, epoch: int, geometry: Geometry = GEOMETRY) -> None:
        self.pool = torch.zeros(BLOCKS, geometry.block_bytes, dtype=torch.uint8)
        self.ledger = Ledger(BLOCKS)
        self.inbox = Inbox()
        self.crank = HandCranked()
        self.identity = Identity(WorkerId(name), Epoch(epoch), name)
        self.transport = LoopbackTransport(hub, BlockPool(self.pool), self.crank)
        hub.join(name, self.inbox)


def units(pool: torch.Tensor, geometry: Geometry, table: list[BlockId], index: int) -> torch.Tensor:
    """A view of 16 tokens of a prompt in its blocks, K and V, as bytes."""
    parts = geometry.block_tokens // UNIT
    return pool.view(len(pool), 2, parts, -1)[table[index // parts], :, index % parts]


class HandOver(RuleBasedStateMachine):
    SOURCE = READER = GEOMETRY

    def __init__(self) -> None:
        super().__init__()
        self.hub = Hub()
        self.now = 0.0
        self.count = 0
        self.source = self.make_side("P", 1)
        self.lending = Lending(
            self.source.ledger, self.source.transport, self.SOURCE, self.source.identity, LEASE_S, lambda: None
        )
        self.canary: dict[SequenceId, list[int]] = {}  # byte of each 16 tokens of a prompt
        self.tables: dict[SequenceId, list[BlockId]] = {}  # the source's, while its sequence holds them
        self.tickets: dict[SequenceId, TicketId] = {}
        self.given: dict[SequenceId, list[BlockId]] = {}  # the reader's own, committed
        self.ends: list[tuple[Side, Callable[[], None]]] = []  # copies under way
        self.epoch = 0
        self.new_reader()

    def make_side(self, name: str, epoch: int) -> Side:
        return Side(self.hub, name, epoch, self.SOURCE if name == "P" else self.READER)

    def new_reader(self) -> None:
        self.epoch += 1
        self.reader = self.make_side("D", self.epoch)
        self.landing = Landing(
            self.reader.ledger,
            self.reader.transport,
            self.READER,
            self.reader.identity,
            lease_s=LEASE_S,
            timeout_s=LEASE_S,
            wake=lambda: None,
        )

    @rule(count=st.integers(1, 6), cached=st.integers(0, 4))
    def reserve(self, count: int, cached: int) -> None:
        """A prompt of so many units of 16 tokens, whose first blocks the reader may have."""
        there, here = (-(-count * UNIT // side.block_tokens) for side in (self.SOURCE, self.READER))
        if self.source.ledger.available < there or self.reader.ledger.available < here + 1:
            return
        self.count += 1
        key = SequenceId(f"s{self.count}/0")
        table = self.source.ledger.allocate(there)
        self.tables[key] = table
        self.canary[key] = [(self.count * 7 + i) % 255 + 1 for i in range(count)]
        for index, byte in enumerate(self.canary[key]):
            units(self.source.pool, self.SOURCE, table, index)[:] = byte
        held = self.reader.ledger.allocate(here + 1)
        have = min(cached, here)
        for index in range(min(have * self.READER.block_tokens // UNIT, count)):
            units(self.reader.pool, self.READER, held, index)[:] = self.canary[key][index]
        self.tickets[key] = TicketId(f"t{self.count}")
        ticket = self.landing.reserve(key, self.tickets[key], held, range(have, here), count * UNIT, self.now)
        self.lending.open(key, ticket, count * UNIT)
        self.lending.open(key, ticket, count * UNIT)  # twice is as good as once

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), last=st.booleans())
    def announce(self, data: st.DataObject, last: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.tables)))
        table = self.tables[key]
        complete = len(table) if last else data.draw(st.integers(0, len(table)))
        said = self.lending.announce(key, table, complete, self.now, 5 if last else None)
        if last and said:
            self.source.ledger.release(self.tables.pop(key))

    @precondition(lambda self: self.source.crank.waiting)
    @rule(at=st.integers(0, 3))
    def begin_offer(self, at: int) -> None:
        self._begin(self.source, at)

    @precondition(lambda self: self.reader.crank.waiting)
    @rule(at=st.integers(0, 3))
    def begin_pull(self, at: int) -> None:
        self._begin(self.reader, at)

    def _begin(self, side: Side, at: int) -> None:
        end = side.crank.begin(at % len(side.crank.waiting))
        if end is not None:
            self.ends.append((side, end))

    @precondition(lambda self: self.ends)
    @rule(data=st.data())
    def end_copy(self, data: st.DataObject) -> None:
        self.ends.pop(data.draw(st.integers(0, len(self.ends) - 1)))[1]()

    @rule(twice=st.booleans())
    def deliver(self, twice: bool) -> None:
        for delivery in self.reader.inbox.drain() * (2 if twice else 1):
            if isinstance(delivery.message, PeerLost):
                self.landing.lost(delivery.message.inbox)
                continue
            try:
                self.landing.accept(delivery, self.now)
            except BatonError as error:
                self.landing.refuse(delivery.message, error)
        for delivery in self.source.inbox.drain() * (2 if twice else 1):
            if isinstance(delivery.message, PeerLost):
                for lost in self.lending.lost(delivery.message.inbox):
                    self._forget_source(lost.sequence_id)
                continue
            assert isinstance(delivery.message, Returned)
            loan = self.lending.returned(delivery.message)
            if loan is not None:
                self._forget_source(loan.sequence_id)

    @rule(seconds=st.sampled_from([0.0, 1.0, LEASE_S]))
    def poll(self, seconds: float) -> None:
        self.now += seconds
        for failure in self.lending.poll(self.now):
            self._forget_source(failure.sequence_id)
        for news in self.landing.poll(self.now):
            if isinstance(news, Landed):
                key = news.reservation.sequence_id
                assert news.first_token == 5
                self.given[key] = self.landing.commit(self.tickets[key])
            else:
                assert isinstance(news, LandingFailed)

    def _forget_source(self, key: SequenceId) -> None:
        if key in self.tables:
            self.source.ledger.release(self.tables.pop(key))

    @precondition(lambda self: self.canary)
    @rule(data=st.data())
    def cancel_at_source(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.canary)))
        self.lending.withdraw(key)
        self._forget_source(key)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.landing.abort(self.tickets[data.draw(st.sampled_from(sorted(self.tickets)))], Cancelled("released"))

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.reader.ledger.release(self.given.pop(data.draw(st.sampled_from(sorted(self.given)))))

    @rule()
    def the_stream_between_them_closes(self) -> None:
        for failure in self.landing.lost("P"):
            assert isinstance(failure.error, BatonError)
            assert failure.error.retryable
        for loan in self.lending.lost("D"):
            self._forget_source(loan.sequence_id)
        assert self.lending.next_deadline() is None
        assert self.landing.lost("P") == []
        assert self.lending.lost("D") == []

    @rule()
    def another_life_of_the_reader(self) -> None:
        self.new_reader()
        self.given.clear()
        self.tickets.clear()

    @invariant()
    def every_block_has_the_holders_it_should(self) -> None:
        own = [Holder(sequence_id=key, state="computing", block_ids=table) for key, table in self.tables.items()]
        assert unaccounted(self.source.ledger, [*own, *self.lending.holders()]) == []
        mine = [Holder(sequence_id=key, state="running", block_ids=table) for key, table in self.given.items()]
        assert unaccounted(self.reader.ledger, [*mine, *self.landing.holders()]) == []
        self.source.ledger.check()
        self.reader.ledger.check()

    @invariant()
    def what_was_committed_is_what_the_source_computed(self) -> None:
        for key, blocks in self.given.items():
            for index, byte in enumerate(self.canary[key]):
                assert bool((units(self.reader.pool, self.READER, blocks, index) == byte).all()), (key, index)

    def teardown(self) -> None:
        for key in list(self.canary):
            self.cancel_source(key)
        for key in list(self.tickets):
            self.landing.abort(self.tickets[key], Cancelled("released"))
        for blocks in self.given.values():
            self.reader.ledger.release(blocks)
        for _, end in self.ends:
            end()
        self.source.crank.run()
        self.reader.crank.run()
        self.lending.poll(self.now)
        self.landing.poll(self.now)
        assert self.source.ledger.free_count == BLOCKS
        assert self.reader.ledger.free_count == BLOCKS
        assert self.source.transport.living() == 0
        assert self.lending.open_loans() == 0
        assert self.landing.open_reservations() == 0

    def cancel_source(self, key: SequenceId) -> None:
        self.lending.withdraw(key)
        self._forget_source(key)


HandOver.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHandOver = HandOver.TestCase


class ToLargerBlocks(HandOver):
    """Two thirds of a block of the reader are one of the source."""

    SOURCE, READER = replace(GEOMETRY, block_tokens=32), replace(GEOMETRY, block_tokens=48)


class ToSmallerBlocks(HandOver):
    SOURCE = replace(GEOMETRY, block_tokens=32)


for machine in (ToLargerBlocks, ToSmallerBlocks):
    machine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestToLargerBlocks = ToLargerBlocks.TestCase
TestToSmallerBlocks = ToSmallerBlocks.TestCase


@pytest.fixture
def sides() -> tuple[Side, Side]:
    hub = Hub()
    return Side(hub, "P", 1), Side(hub, "D", 2)


def landing_of(side: Side) -> Landing:
    return Landing(
        side.ledger,
        side.transport,
        GEOMETRY,
        side.identity,
        lease_s=LEASE_S,
        timeout_s=LEASE_S,
        wake=side.inbox.wakeup.ring,
    )


def lending_of(side: Side) -> Lending:
    return Lending(side.ledger, side.transport, GEOMETRY, side.identity, LEASE_S, side.inbox.wakeup.ring)


def test_a_piece_of_an_aborted_ticket_is_refused_and_its_source_told(sides: tuple[Side, Side]) -> None:
    source, reader = sides
    landing, lending = landing_of(reader), lending_of(source)
    key, blocks = SequenceId("a/0"), source.ledger.allocate(1)
    ticket = landing.reserve(key, TicketId("t"), reader.ledger.allocate(1), [0], 16, 0.0)
    lending.open(key, ticket, 16)
    lending.announce(key, blocks, 1, 0.0, first_token=3)
    source.ledger.release(blocks)
    source.crank.run()
    landing.abort(ticket.ticket_id, Cancelled("released"))
    (delivery,) = reader.inbox.drain()
    with pytest.raises(StaleEpoch) as refusal:
        landing.accept(delivery, 0.0)
    landing.refuse(delivery.message, refusal.value)
    (told,) = source.inbox.drain()
    assert isinstance(told.message, Returned)
    assert told.message.error_code == "StaleEpoch"
    assert source.ledger.held_count == 1
    assert lending.returned(told.message) is not None
    assert source.ledger.held_count == 0
    assert source.transport.living() == 0
    reader.ledger.check()
    assert reader.ledger.held_count == 0


def test_blocks_that_a_pull_still_writes_stay_held_after_an_abort(sides: tuple[Side, Side]) -> None:
    source, reader = sides
    landing, lending = landing_of(reader), lending_of(source)
    key, blocks = SequenceId("a/0"), source.ledger.allocate(2)
    source.pool[blocks] = 9
    ticket = landing.reserve(key, TicketId("t"), reader.ledger.allocate(3), [0, 1], 32, 0.0)
    lending.open(key, ticket, 32)
    lending.announce(key, blocks, 1, 0.0)
    source.crank.run()
    landing.accept(reader.inbox.drain()[0], 0.0)
    end = reader.crank.begin()
    assert end is not None
    landing.abort(ticket.ticket_id, Cancelled("released"))
    landing.poll(0.0)
    assert reader.ledger.held_count == 1
    end()
    landing.poll(0.0)
    assert reader.ledger.held_count == 0


def test_a_block_that_two_pieces_bring_is_committed_when_both_have_ended(sides: tuple[Side, Side]) -> None:
    source, reader = sides
    landing = landing_of(reader)
    key, blocks = SequenceId("a/0"), source.ledger.allocate(2)
    ticket = landing.reserve(key, TicketId("t"), reader.ledger.allocate(2), [0, 1], 32, 0.0)
    for indices in ((0,), (0, 1)):  # no source of ours does that
        lending = lending_of(source)
        lending.open(key, replace(ticket, wanted=indices), 32)
        lending.announce(key, blocks, 2, 0.0, first_token=3)
    source.crank.run()
    for delivery in reader.inbox.drain():
        landing.accept(delivery, 0.0)
    first, second = reader.crank.begin(), reader.crank.begin()
    assert first is not None
    assert second is not None
    second()
    assert landing.poll(0.0) == []
    first()
    assert [type(news) for news in landing.poll(0.0)] == [Landed]
    reader.ledger.release(landing.commit(ticket.ticket_id))
    assert reader.ledger.held_count == 0


def test_a_damaged_block_fails_the_sequence_as_retryable(sides: tuple[Side, Side]) -> None:
    source, reader = sides
    landing, lending = landing_of(reader), lending_of(source)
    key, blocks = SequenceId("a/0"), source.ledger.allocate(1)
    ticket = landing.reserve(key, TicketId("t"), reader.ledger.allocate(1), [0], 16, 0.0)
    lending.open(key, ticket, 16)
    lending.announce(key, blocks, 1, 0.0, first_token=3)
    source.crank.run()
    (delivery,) = reader.inbox.drain()
    hub = reader.transport._hub
    hub.fetch(delivery.handles[0])[0, 5] ^= 1
    landing.accept(delivery, 0.0)
    reader.crank.run()
    (news,) = landing.poll(0.0)
    assert isinstance(news, LandingFailed)
    assert news.error.code == "CorruptPiece"
    assert news.error.retryable
    assert not np.any(reader.pool.numpy())
    assert reader.ledger.held_count == 0


def test_a_reader_that_never_answers_loses_its_loan_when_the_lease_ends(sides: tuple[Side, Side]) -> None:
    source, reader = sides
    landing, lending = landing_of(reader), lending_of(source)
    key, blocks = SequenceId("a/0"), source.ledger.allocate(1)
    lending.open(key, landing.reserve(key, TicketId("t"), reader.ledger.allocate(1), [0], 16, 0.0), 16)
    lending.announce(key, blocks, 1, 0.0, first_token=3)
    source.ledger.release(blocks)
    source.crank.run()
    assert lending.poll(0.0) == []
    assert lending.poll(LEASE_S - 1) == []
    assert lending.next_deadline() == LEASE_S
    (failure,) = lending.poll(LEASE_S)
    assert failure.error.code == "LeaseExpired"
    assert source.ledger.held_count == 0
    assert source.transport.living() == 0


def test_a_lease_begins_anew_when_a_slow_announcement_has_arrived(sides: tuple[Side, Side]) -> None:
    source, reader = sides
    landing, lending = landing_of(reader), lending_of(source)
    key, blocks = SequenceId("a/0"), source.ledger.allocate(1)
    lending.open(key, landing.reserve(key, TicketId("t"), reader.ledger.allocate(1), [0], 16, 0.0), 16)
    lending.announce(key, blocks, 1, 0.0, first_token=3)
    assert lending.next_deadline() == LEASE_S
    source.crank.run()
    assert lending.poll(LEASE_S - 1) == []
    assert lending.next_deadline() == 2 * LEASE_S - 1


def test_a_lost_source_fails_what_waits_for_it_and_nothing_else(sides: tuple[Side, Side]) -> None:
    source, reader = sides
    landing, lending = landing_of(reader), lending_of(source)
    blocks = source.ledger.allocate(2)
    for name, complete, token in (("half", 1, None), ("whole", 2, 3), ("unheard", 0, None)):
        key = SequenceId(f"{name}/0")
        lending.open(key, landing.reserve(key, TicketId(name), reader.ledger.allocate(2), [0, 1], 32, 0.0), 32)
        lending.announce(key, blocks, complete, 0.0, token)
    source.crank.run()
    for delivery in reader.inbox.drain():
        landing.accept(delivery, 0.0)
    reader.crank.run()
    assert landing.lost("another") == []
    (failure,) = landing.lost("P")
    assert (failure.sequence_id, failure.error.code, failure.error.retryable) == ("half/0", "WorkerLost", True)
    (news,) = landing.poll(0.0)
    assert isinstance(news, Landed)
    assert news.reservation.sequence_id == "whole/0"
    assert landing.open_reservations() == 2
    assert reader.ledger.held_count == 4


def test_a_lost_reader_gives_its_blocks_back_at_once(sides: tuple[Side, Side]) -> None:
    source, reader = sides
    landing, lending = landing_of(reader), lending_of(source)
    key, blocks = SequenceId("a/0"), source.ledger.allocate(1)
    lending.open(key, landing.reserve(key, TicketId("t"), reader.ledger.allocate(1), [0], 16, 0.0), 16)
    lending.announce(key, blocks, 1, 0.0, first_token=3)
    source.ledger.release(blocks)
    source.crank.run()
    assert lending.lost("another") == []
    (failure,) = lending.lost("D")
    assert (failure.sequence_id, failure.error.code) == (key, "WorkerLost")
    assert source.ledger.held_count == 0
    assert source.transport.living() == 0


def to_larger_blocks() -> tuple[Side, Side, Landing, Lending, Geometry]:
    """A source of 16 tokens in a block, and a reader of 32."""
    hub, larger = Hub(), replace(GEOMETRY, block_tokens=32)
    source, reader = Side(hub, "P", 1), Side(hub, "D", 2, larger)
    landing = Landing(
        reader.ledger,
        reader.transport,
        larger,
        reader.identity,
        lease_s=LEASE_S,
        timeout_s=LEASE_S,
        wake=lambda: None,
    )
    return source, reader, landing, lending_of(source), larger


def test_a_block_that_two_pieces_bring_parts_of_is_here_with_both_whichever_comes_first() -> None:
    source, reader, landing, lending, larger = to_larger_blocks()
    key, blocks = SequenceId("a/0"), source.ledger.allocate(2)
    source.pool[blocks[0]], source.pool[blocks[1]] = 3, 4
    lending.open(key, landing.reserve(key, TicketId("t"), reader.ledger.allocate(1), [0], 32, 0.0), 32)
    lending.announce(key, blocks, 1, 0.0)
    lending.announce(key, blocks, 2, 0.0, first_token=3)
    source.crank.run()
    first, last = reader.inbox.drain()
    landing.accept(last, 0.0)
    reader.crank.run()
    assert landing.poll(0.0) == []
    landing.accept(first, 0.0)
    reader.crank.run()
    assert [type(news) for news in landing.poll(0.0)] == [Landed]
    table = landing.commit(TicketId("t"))
    assert [int(units(reader.pool, larger, table, at)[0, 0]) for at in (0, 1)] == [3, 4]


def test_a_block_that_a_pull_still_writes_in_part_stays_held_after_an_abort() -> None:
    source, reader, landing, lending, _ = to_larger_blocks()
    key, blocks, table = SequenceId("a/0"), source.ledger.allocate(4), reader.ledger.allocate(2)
    lending.open(key, landing.reserve(key, TicketId("t"), table, [1], 64, 0.0), 64)
    lending.announce(key, blocks, 3, 0.0)
    source.crank.run()
    (delivery,) = reader.inbox.drain()
    assert isinstance(delivery.message, Piece)
    assert delivery.message.blocks == (2,), "nobody wants the first two"
    landing.accept(delivery, 0.0)
    end = reader.crank.begin()
    assert end is not None
    landing.abort(TicketId("t"), Cancelled("released"))
    landing.poll(0.0)
    assert [reader.ledger.holders(block) for block in table] == [0, 1]
    end()
    landing.poll(0.0)
    assert reader.ledger.held_count == 0


@pytest.mark.parametrize("change", [{"block_tokens": 48}, {"dtype": "bfloat16"}, {"blocks": (0,)}])
def test_a_piece_that_does_not_fit_its_ticket_is_refused_before_anything_is_pulled(change: dict[str, Any]) -> None:
    source, reader, landing, lending, _ = to_larger_blocks()
    key, blocks = SequenceId("a/0"), source.ledger.allocate(4)
    lending.open(key, landing.reserve(key, TicketId("t"), reader.ledger.allocate(2), [1], 64, 0.0), 64)
    lending.announce(key, blocks, 3, 0.0)
    lending.announce(key, blocks, 4, 0.0, first_token=3)
    source.crank.run()
    first, last = reader.inbox.drain()
    landing.accept(first, 0.0)
    assert isinstance(last.message, Piece)
    if "blocks" in change:
        wrong = replace(last.message, **change)
    else:
        wrong = replace(last.message, geometry=replace(GEOMETRY, **change))
    with pytest.raises(CorruptPiece):
        landing.accept(replace(last, message=wrong), 0.0)
    assert len(reader.crank.waiting) == 1
