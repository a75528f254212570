"""Lending and landing against each other over the mapped pool: a loan that ends while its blocks are read gives them to
others who write, and nobody commits that. Without checksums, so that generations alone see to it."""

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Semaphore

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import rule

from baton.core.ids import Epoch, WorkerId
from baton.core.tickets import Geometry
from baton.kv_transfer.encoding import Wire
from baton.kv_transfer.inbox import Inbox
from baton.kv_transfer.mapped import MappedTransport
from baton.kv_transfer.messages import Delivery
from baton.kv_transfer.streams import Stream
from baton.worker.lending import Identity

from ..fakes import GEOMETRY, HandCranked
from ..mapped_ends import SharedEnd
from ..unit.worker.test_hand_over import BLOCKS, HandOver, Side
from .transport_contract import WAIT_S


class CountedInbox(Inbox):
    def __init__(self) -> None:
        super().__init__()
        self.taken = Semaphore(0)

    def put(self, delivery: Delivery) -> None:
        super().put(delivery)
        self.taken.release()

    def wait(self) -> None:
        """Until one more has come than was waited for before."""
        assert self.taken.acquire(timeout=WAIT_S), "no message came"


class MappedSide(Side):
    """As `Side`, with what it owns in shared memory. Its offers and pulls run when the machine says so."""

    def __init__(self, name: str, epoch: int, folder: Path, sides: "dict[str, MappedSide]", geometry: Geometry) -> None:
        self.end = SharedEnd(name, geometry, BLOCKS, folder / str(epoch), checked=False)
        self.pool, self.ledger = self.end.pool, self.end.ledger
        self.inbox = self.counted = CountedInbox()
        self.crank = HandCranked()
        self.identity = Identity(WorkerId(name), Epoch(epoch), name)
        site = replace(self.end.site, inbox=self.inbox, epoch=Epoch(epoch))
        self.mapped = self.transport = MappedTransport(  # type: ignore[assignment]
            site, lambda peer, record: sides[peer].mapped.answer(record)
        )
        self.mapped._offers = self.mapped._pulls = self.crank  # type: ignore[assignment]
        sides[name] = self

    def leave(self) -> None:
        self.mapped._streams.close()


class MappedHandOver(HandOver):
    def __init__(self) -> None:
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.sides: dict[str, MappedSide] = {}
        super().__init__()

    def make_side(self, name: str, epoch: int) -> Side:
        if name == "D" and name in self.sides:  # the earlier life ends
            self.sides[name].leave()
            self.sides["P"].counted.wait()
        folder = self.folder / str(epoch)
        folder.mkdir(exist_ok=True)
        made = MappedSide(name, epoch, self.folder, self.sides, self.SOURCE if name == "P" else self.READER)
        self.stack.callback(made.end.close)
        if name == "D":
            self.meet()
        return made

    def meet(self) -> None:
        """From now on whoever sends waits until the other side has it."""
        source, reader = self.sides["P"], self.sides["D"]
        waits_for(source.mapped.meet("D"), reader.counted)
        waits_for(reader.mapped._sources["P"].stream, source.counted)

    @rule()
    def others_get_every_free_block_and_write(self) -> None:
        blocks = self.source.ledger.allocate(self.source.ledger.available)
        self.source.pool[blocks] = 0  # no canary is
        self.source.ledger.release(blocks)

    @rule(count=st.integers(1, 4))
    def a_source_takes_back_what_the_reader_has_heard_of(self, count: int) -> None:
        known = set(self.tables)
        self.reserve(count=count, cached=0)
        for key in set(self.tables) - known:
            table = self.tables[key]
            self.lending.announce(key, table, len(table), self.now, 5)
            self.source.ledger.release(self.tables.pop(key))
            self.all_offers_arrive()
            self.lending.withdraw(key)

    @rule()
    def all_offers_arrive(self) -> None:
        self.source.crank.run()
        self.deliver(twice=False)

    @rule()
    def all_pulls_end(self) -> None:
        self.reader.crank.run()
        self.poll(seconds=0.0)

    @rule()
    def the_stream_between_them_closes(self) -> None:
        source, reader = self.sides["P"], self.sides["D"]
        source.mapped.meet("D").end()
        source.counted.wait()
        reader.counted.wait()
        self.meet()

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            for side in self.sides.values():
                side.leave()
            self.stack.close()


def waits_for(stream: Stream, inbox: CountedInbox) -> None:
    plain = stream.send

    def send(message: Wire) -> None:
        plain(message)
        inbox.wait()

    stream.send = send  # type: ignore[method-assign]


class MappedToOtherBlocks(MappedHandOver):
    SOURCE, READER = replace(GEOMETRY, block_tokens=32), replace(GEOMETRY, block_tokens=48)


MappedHandOver.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
MappedToOtherBlocks.TestCase.settings = settings(max_examples=15, stateful_step_count=40, deadline=None)
TestMappedHandOver = MappedHandOver.TestCase
TestMappedToOtherBlocks = MappedToOtherBlocks.TestCase
