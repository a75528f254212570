"""Each pair chooses its way: mapped, or what stands for the object store here."""

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from baton.core.errors import ConfigError, GeometryMismatch, TransferFailed
from baton.core.frames import Way
from baton.core.ids import BlockId, Epoch, SequenceId, TicketId, WorkerId
from baton.core.tickets import Piece, Ticket
from baton.kv_transfer import by_pair, mapped
from baton.kv_transfer.by_pair import PairTransport
from baton.kv_transfer.capability import Capability
from baton.kv_transfer.encoding import Wire
from baton.kv_transfer.inbox import greet
from baton.kv_transfer.loopback import Hub, LoopbackTransport
from baton.kv_transfer.mapped import _WELCOME_S, MappedTransport
from baton.kv_transfer.mapping import Mapping
from baton.kv_transfer.messages import PeerLost, Returned
from baton.kv_transfer.ray_ranks import _GREET_S
from baton.kv_transfer.streams import Stream
from baton.worker.config import WorkerConfig
from baton.worker.lending import Identity, Lending

from ..mapped_ends import SharedEnd
from .transport_contract import BLOCKS, GEOMETRY, WAIT_S, End, SnapshotContract, TransportContract, ids, piece


class Pairs:
    """Makes ends that reach each other's handshakes and share a hub; a clock that only the test moves."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.now = 0.0
        self.greeted = 0
        self._folder = folder
        self._stack = stack
        self._hub = Hub()
        self._threads = stack.enter_context(ThreadPoolExecutor(4))
        self._ends: dict[str, SharedEnd] = {}

    def end(self, name: str, *, transport: str = "auto", unmapped: str = "") -> End:
        made = SharedEnd(name, GEOMETRY, BLOCKS, self._folder, transport=transport, unmapped=unmapped)
        self._stack.callback(made.close)
        self._ends[name] = made
        self._hub.join(name, made.inbox)
        store = LoopbackTransport(self._hub, made.site.pool, self._threads)
        pair = PairTransport(made.site, store, self._ask, lambda: self.now)
        return End(name, made.pool, self._stack.enter_context(pair), made.inbox)

    def _ask(self, name: str, record: bytes) -> bytes:
        self.greeted += 1
        if name not in self._ends:
            raise TransferFailed(f"no rank is {name}")
        return greet(self._ends[name].inbox, record)


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[Pairs]:
    with ExitStack() as stack:
        yield Pairs(tmp_path, stack)


class TestMappedPair(TransportContract):
    carrier = "mapped"

    @pytest.fixture
    def ends(self, pairs: Pairs) -> tuple[End, End]:
        source, reader = pairs.end("P"), pairs.end("D")
        assert carry(source, reader) == "loopback", "nothing waits for the handshake"
        return source, reader


class TestPinnedPair(TransportContract):
    carrier = "mapped"

    @pytest.fixture
    def ends(self, pairs: Pairs) -> tuple[End, End]:
        return pairs.end("P", transport="mapped"), pairs.end("D")


class TestStorePair(SnapshotContract):
    carrier = "loopback"

    @pytest.fixture
    def ends(self, pairs: Pairs) -> tuple[End, End]:
        return pairs.end("P"), pairs.end("D", unmapped="the pool is on cuda")


def carry(source: End, reader: End) -> str:
    """One piece; what carried it. Who has not met has met after it."""
    source.transport.offer(piece((0,)), ids(1), reader.name).result(WAIT_S)
    settle(source, reader)
    moved = reader.transport.pull(reader.next_delivery(), ids(2)).result(WAIT_S)
    source.transport.withdraw(TicketId("t"))
    return moved.transport


def settle(source: End, reader: End) -> None:
    """The handshake that is under way, if one is, ends."""
    choosing = source.transport._pairs[reader.name].choosing  # type: ignore[attr-defined]
    if choosing is not None:
        choosing.result(WAIT_S)


def met(source: End, reader: End) -> None:
    """They move by the mapped way from now on."""
    assert [carry(source, reader) for _ in range(2)] == ["loopback", "mapped"]


def ways(end: End) -> dict[str, tuple[str, str]]:
    return {way.peer: (way.transport, way.reason) for way in end.transport.ways}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda pairs: pairs.end("D", transport="ray_store"), "the reader D is pinned to ray_store"),
        (lambda pairs: pairs.end("D", unmapped="the pool is on cuda"), "the pool is on cuda of the reader D"),
    ],
)
def test_two_that_cannot_map_move_by_the_store_and_say_why_once(
    pairs: Pairs, change: Callable[[Pairs], End], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, reader = pairs.end("P"), change(pairs)
    assert [carry(source, reader) for _ in range(3)] == ["loopback"] * 3
    pairs.now += 1e6
    assert carry(source, reader) == "loopback"
    assert pairs.greeted == 1, "they never will"
    assert [record.message for record in caplog.records if says in record.message] == [
        f"KV for D moves by ray_store: {says}"
    ]
    assert ways(source) == {"D": ("ray_store", says)}
    assert ways(reader) == {"P": ("ray_store", "the source chose it")}


def test_a_source_that_is_pinned_to_the_store_asks_nobody(pairs: Pairs) -> None:
    source, reader = pairs.end("P", transport="ray_store"), pairs.end("D")
    assert carry(source, reader) == "loopback"
    assert pairs.greeted == 0
    assert ways(source) == {"D": ("ray_store", "this worker is pinned to ray_store")}


def test_a_source_that_cannot_be_mapped_says_so_once_for_each_reader(
    pairs: Pairs, caplog: pytest.LogCaptureFixture
) -> None:
    source, reader = pairs.end("P", unmapped="the pool is on cuda"), pairs.end("D")
    assert [carry(source, reader) for _ in range(2)] == ["loopback"] * 2
    assert [record.message for record in caplog.records] == ["KV for D moves by ray_store: the pool is on cuda"]


def test_the_probe_is_shown_on_both_sides(pairs: Pairs) -> None:
    source, reader = pairs.end("P"), pairs.end("D")
    met(source, reader)
    for end, peer in ((source, "D"), (reader, "P")):
        (way,) = end.transport.ways
        assert way == Way(peer=peer, transport="mapped", probed_gb_per_s=way.probed_gb_per_s)
        assert way.probed_gb_per_s > 0


def test_a_source_that_has_left_is_not_said_to_have_chosen_the_store(pairs: Pairs) -> None:
    source, reader = pairs.end("P"), pairs.end("D")
    met(source, reader)
    source.transport._mapped._streams.close()  # type: ignore[attr-defined]
    assert reader.next_delivery().message == PeerLost("P")
    assert reader.transport.ways == ()


def test_a_pinned_way_that_cannot_be_had_is_an_error_that_says_why(pairs: Pairs) -> None:
    source, reader = pairs.end("P", transport="mapped"), pairs.end("D", transport="ray_store")
    for _ in range(2):
        with pytest.raises(GeometryMismatch, match="the reader D is pinned to ray_store"):
            source.transport.offer(piece((0,)), ids(1), reader.name).result(WAIT_S)
    assert reader.inbox.drain() == []
    assert ways(source)["D"][0] == ""
    with pytest.raises(ConfigError, match="the pool is on cuda"):
        pairs.end("C", transport="mapped", unmapped="the pool is on cuda")


def test_a_reader_that_is_pinned_takes_nothing_from_the_store(pairs: Pairs) -> None:
    source, reader = pairs.end("P", transport="ray_store"), pairs.end("D", transport="mapped")
    source.transport.offer(piece((0,)), ids(1), reader.name).result(WAIT_S)
    with pytest.raises(GeometryMismatch, match="not at P"):
        reader.transport.pull(reader.next_delivery(), ids(2)).result(WAIT_S)


@pytest.mark.parametrize("fault", ["a stream that closes", "a copy that fails"])
def test_after_a_fault_they_move_by_the_store_and_climb_back(pairs: Pairs, fault: str) -> None:
    source, reader = pairs.end("P"), pairs.end("D")
    met(source, reader)
    if fault == "a stream that closes":
        source.transport._mapped.meet("D").end()  # type: ignore[attr-defined]
        source.next_delivery()
        reader.next_delivery()
    else:
        source.transport.offer(piece((0,)), ids(1), reader.name).result(WAIT_S)
        reader.next_delivery()
        reader.transport.tell("P", returned("CorruptPiece"))
        source.next_delivery()
        source.transport.withdraw(TicketId("t"))
    assert carry(source, reader) == "loopback"
    assert ways(source)["D"][0] == "ray_store"
    pairs.now += 29
    assert carry(source, reader) == "loopback"
    pairs.now += 2
    met(source, reader)
    assert ways(source)["D"] == ("mapped", "")
    assert ways(reader)["P"] == ("mapped", "")


@pytest.mark.parametrize("code", ["", "LeaseExpired", "Cancelled", "DeadlineExceeded"])
def test_what_a_request_ended_with_does_not_speak_against_the_way(pairs: Pairs, code: str) -> None:
    source, reader = pairs.end("P"), pairs.end("D")
    met(source, reader)
    source.transport.offer(piece((0,)), ids(1), reader.name).result(WAIT_S)
    reader.next_delivery()
    reader.transport.tell("P", returned(code))
    source.next_delivery()
    assert carry(source, reader) == "mapped"


def test_a_handshake_without_an_answer_is_tried_again_after_a_while(pairs: Pairs) -> None:
    source, reader = pairs.end("P"), pairs.end("D")
    greeter, reader.inbox.greeter = reader.inbox.greeter, None  # it still loads
    with pytest.raises(Exception, match="not loaded"):
        greet(reader.inbox, b"")
    source.transport._mapped._greet = failing  # type: ignore[attr-defined]
    assert carry(source, reader) == "loopback"
    reader.inbox.greeter = greeter
    source.transport._mapped._greet = pairs._ask  # type: ignore[attr-defined]
    assert carry(source, reader) == "loopback"
    pairs.now += 31
    met(source, reader)


class Silent:
    """A rank whose handshakes are answered when the test says so, or fail then as those do that took too long."""

    def __init__(self, pairs: Pairs, source: End, name: str) -> None:
        self.asked = 0
        self.answers = threading.Event()
        self._name = name
        self._plain = pairs._ask
        source.transport._mapped._greet = self._ask  # type: ignore[attr-defined]

    def _ask(self, name: str, record: bytes) -> bytes:
        if name == self._name:
            self.asked += 1
            assert self.answers.wait(WAIT_S)
            raise TransferFailed("GetTimeoutError")
        return self._plain(name, record)


def test_a_reader_that_does_not_answer_holds_up_nobody(pairs: Pairs) -> None:
    source, reader, silent = pairs.end("P"), pairs.end("D"), pairs.end("H")
    handshakes = Silent(pairs, source, "H")
    for index in range(4):
        source.transport.offer(piece((index,)), ids(index), "H").result(WAIT_S)
        assert silent.next_delivery().handles, "by the store, at once"
    met(source, reader)
    assert handshakes.asked == 1
    handshakes.answers.set()
    settle(source, silent)
    assert ways(source)["H"] == ("ray_store", "no handshake: GetTimeoutError")


def test_a_handshake_without_an_answer_takes_nothing_of_a_loans_lease(pairs: Pairs) -> None:
    source, reader = pairs.end("P"), pairs.end("D")
    handshakes = Silent(pairs, source, "D")
    ledger, identity = pairs._ends["P"].ledger, Identity(WorkerId("P"), Epoch(1), "P")
    lending = Lending(ledger, source.transport, GEOMETRY, identity, 20.0, source.inbox.wakeup.ring)
    ticket = Ticket(
        ticket_id=TicketId("t"),
        worker_id=WorkerId("D"),
        epoch=Epoch(1),
        wanted=(0,),
        geometry=GEOMETRY,
        lease_s=20.0,
        inbox="D",
    )
    lending.open(SequenceId("s/0"), ticket, 16)
    blocks = ledger.allocate(1)
    lending.announce(SequenceId("s/0"), blocks, 1, 0.0, first_token=3)
    reader.transport.pull(reader.next_delivery(), ids(2)).result(WAIT_S)
    reader.transport.tell("P", returned(""))
    message = source.next_delivery().message
    assert isinstance(message, Returned)
    assert lending.poll(19.0) == []
    assert lending.returned(message) is not None
    handshakes.answers.set()
    lease_s = WorkerConfig.__dataclass_fields__["lease_s"].default
    assert lease_s > 2 * (_GREET_S + _WELCOME_S), "pinned pairs do wait"


def test_an_offer_that_waits_for_a_handshake_can_still_be_withdrawn(pairs: Pairs) -> None:
    source, reader = pairs.end("P", transport="mapped"), pairs.end("D")
    go, plain = threading.Event(), pairs._ask

    def late(name: str, record: bytes) -> bytes:
        assert go.wait(WAIT_S)
        return plain(name, record)

    source.transport._mapped._greet = late  # type: ignore[attr-defined]
    withdrawn, kept = (source.transport.offer(piece((index,)), ids(1), "D") for index in (0, 1))
    assert withdrawn.cancel()
    go.set()
    assert kept.result(WAIT_S).transport == "mapped"
    message = reader.next_delivery().message
    assert isinstance(message, Piece)
    assert message.blocks == (1,)


def test_a_reader_that_answers_but_cannot_map_ends_no_loan(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    source, reader = pairs.end("P"), pairs.end("D")
    plain = mapped.Mapping

    def fails_for_good(record: Capability) -> Mapping:
        if threading.current_thread().name == "kv-streams":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return plain(record)

    monkeypatch.setattr(mapped, "Mapping", fails_for_good)
    for _ in range(3):
        assert carry(source, reader) == "loopback"
        assert source.inbox.drain() == reader.inbox.drain() == []
        assert ways(source)["D"] == ("ray_store", "its stream closed before it had mapped our pool")
        pairs.now += 31


def test_a_part_that_is_refused_while_the_next_is_still_sent_speaks_against_the_way(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reader = pairs.end("P"), pairs.end("D")
    met(source, reader)
    monkeypatch.setattr(mapped, "_PART_BYTES", GEOMETRY.block_bytes)
    way = source.transport._mapped  # type: ignore[attr-defined]
    sums, go, parts = way._checksums, threading.Event(), []

    def second_takes_long(part: Piece, blocks: list[BlockId]) -> tuple[int, ...]:
        parts.append(part)
        assert len(parts) == 1 or go.wait(WAIT_S)
        found: tuple[int, ...] = sums(part, blocks)
        return found

    monkeypatch.setattr(way, "_checksums", second_takes_long)
    offered = source.transport.offer(piece((0, 1)), ids(1, 2), "D")
    reader.next_delivery()
    reader.transport.tell("P", returned("CorruptPiece"))
    source.next_delivery()
    go.set()
    offered.result(WAIT_S)
    assert ways(source)["D"] == ("ray_store", "CorruptPiece")


def test_what_a_stream_does_not_take_is_told_by_the_store(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    source, reader = pairs.end("P"), pairs.end("D")
    met(source, reader)

    def refuses(_: Stream, __: Wire) -> None:
        raise TransferFailed("the other worker does not read what it is told")

    monkeypatch.setattr(Stream, "send", refuses)
    reader.transport.tell("P", returned(""))
    assert source.next_delivery().message == returned("")


def test_offers_on_their_way_when_a_stream_closes_fail_and_shake_no_hands(pairs: Pairs) -> None:
    source, reader = pairs.end("P"), pairs.end("D")
    met(source, reader)
    asked, way = pairs.greeted, source.transport._mapped  # type: ignore[attr-defined]
    way.meet("D").end()
    with pytest.raises(TransferFailed):
        way.offer(piece((0,)), ids(1), "D").result(WAIT_S)
    assert pairs.greeted == asked
    assert way.living() == 0


def test_a_stream_that_closes_just_as_they_have_met_leaves_them_in_the_store(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reader = pairs.end("P"), pairs.end("D")
    meet = MappedTransport.meet

    def and_closes(way: MappedTransport, name: str) -> Stream:
        stream = meet(way, name)
        stream.end()
        source.next_delivery()
        return stream

    monkeypatch.setattr(MappedTransport, "meet", and_closes)
    source.transport.offer(piece((0,)), ids(1), "D").result(WAIT_S)
    settle(source, reader)
    assert ways(source)["D"] == ("ray_store", "its stream has closed")


@pytest.mark.parametrize("leaves", [True, False])
def test_a_stream_that_closes_is_warned_of_unless_the_reader_left_in_good_order(
    pairs: Pairs, leaves: bool, caplog: pytest.LogCaptureFixture
) -> None:
    source, reader = pairs.end("P"), pairs.end("D")
    met(source, reader)
    if leaves:
        reader.transport._mapped._streams.close()  # type: ignore[attr-defined]
    else:
        reader.transport._mapped._sources["P"].stream.end()  # type: ignore[attr-defined]
    assert source.next_delivery().message == PeerLost("D")
    assert ["has closed" in record.message for record in caplog.records] == ([] if leaves else [True])


def test_readers_in_use_are_remembered_and_the_longest_unused_forgotten(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_pair, "_MOST_WAYS", 2)
    source, mapping = pairs.end("P"), pairs.end("D")
    met(source, mapping)
    often, *others = (pairs.end(name, unmapped="the pool is on cuda") for name in "ABCE")
    for other in others:
        carry(source, other)
        carry(source, often)
    assert pairs.greeted == 5, "each once"
    assert list(ways(source)) == ["D", "C", "E", "A"], "B was forgotten as E came"
    assert carry(source, mapping) == "mapped"


def failing(_: str, __: bytes) -> bytes:
    raise TransferFailed("GetTimeoutError")


def returned(code: str) -> Returned:
    message = Returned(ticket_id=TicketId("t"), sequence_id=SequenceId("s/0"), source_epoch=Epoch(1))
    return replace(message, error_code=code)
