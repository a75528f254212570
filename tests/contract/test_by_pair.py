"""Each pair chooses its way: mapped, or what stands for the object store here."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from baton.core.errors import ConfigError, GeometryMismatch, TransferFailed
from baton.core.frames import Way
from baton.core.ids import Epoch, SequenceId, TicketId
from baton.kv_transfer.by_pair import PairTransport
from baton.kv_transfer.inbox import greet
from baton.kv_transfer.loopback import Hub, LoopbackTransport
from baton.kv_transfer.messages import Returned

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
        return pairs.end("P"), pairs.end("D")


class TestStorePair(SnapshotContract):
    carrier = "loopback"

    @pytest.fixture
    def ends(self, pairs: Pairs) -> tuple[End, End]:
        return pairs.end("P"), pairs.end("D", unmapped="the pool is on cuda")


def carry(source: End, reader: End) -> str:
    """One piece; what carried it."""
    source.transport.offer(piece((0,)), ids(1), reader.name).result(WAIT_S)
    moved = reader.transport.pull(reader.next_delivery(), ids(2)).result(WAIT_S)
    source.transport.withdraw(TicketId("t"))
    return moved.transport


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
    assert carry(source, reader) == "mapped"
    for end, peer in ((source, "D"), (reader, "P")):
        (way,) = end.transport.ways
        assert way == Way(peer=peer, transport="mapped", probed_gb_per_s=way.probed_gb_per_s)
        assert way.probed_gb_per_s > 0


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
    assert carry(source, reader) == "mapped"
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
    assert carry(source, reader) == "mapped"
    assert ways(source)["D"] == ("mapped", "")
    assert ways(reader)["P"] == ("mapped", "")


@pytest.mark.parametrize("code", ["", "LeaseExpired", "Cancelled", "DeadlineExceeded"])
def test_what_a_request_ended_with_does_not_speak_against_the_way(pairs: Pairs, code: str) -> None:
    source, reader = pairs.end("P"), pairs.end("D")
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
    assert carry(source, reader) == "mapped"


def failing(_: str, __: bytes) -> bytes:
    raise TransferFailed("GetTimeoutError")


def returned(code: str) -> Returned:
    message = Returned(ticket_id=TicketId("t"), sequence_id=SequenceId("s/0"), source_epoch=Epoch(1))
    return replace(message, error_code=code)
