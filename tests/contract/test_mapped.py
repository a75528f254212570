"""The mapped pool: the contract with both ends in this process, and what needs a source in a process of its own."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch

from baton.core.errors import CorruptPiece, LeaseExpired, TransferFailed
from baton.core.ids import Epoch, SequenceId, TicketId, WorkerId
from baton.core.tickets import Geometry, Piece
from baton.engine.parallel.shared_pool import SharedPool
from baton.kv_transfer.capability import RankPool, to_bytes, why_not_mapped
from baton.kv_transfer.encoding import encode
from baton.kv_transfer.inbox import greet
from baton.kv_transfer.mapped import MappedTransport, NotMapped, Reader, Source
from baton.kv_transfer.messages import Delivery, Hello, PeerLost, Returned
from baton.kv_transfer.rank_pools import whole_blocks
from baton.kv_transfer.streams import Stream

from ..mapped_ends import SharedEnd
from .transport_contract import BLOCKS, GEOMETRY, WAIT_S, End, TransportContract, ids, piece

OTHER = replace(GEOMETRY, fingerprint="another")


def mapped_ends(folder: Path, *, checked: bool = True) -> "tuple[list[SharedEnd], list[MappedTransport]]":
    ends = [SharedEnd(name, GEOMETRY, BLOCKS, folder, checked=checked) for name in ("P", "D")]
    inboxes = {end.name: end.inbox for end in ends}

    def ask(name: str, record: bytes) -> bytes:
        if name not in inboxes:
            raise TransferFailed(f"no rank is {name}")
        return greet(inboxes[name], record)

    transports = [MappedTransport(end.site, ask) for end in ends]
    for end, transport in zip(ends, transports, strict=True):
        end.inbox.greeter = transport.answer
    return ends, transports


def knock(source: MappedTransport, reader: MappedTransport, inbox: str) -> None:
    """Connect with the token that this inbox was given."""
    token = reader._expected[inbox].token
    owner = Reader(reader._capability, token, 0.0)
    source._streams.connect(reader._capability.socket, Hello(token), owner)
    owner.mapped.result(WAIT_S)


@contextmanager
def opened(folder: Path, *, checked: bool = True) -> Iterator[tuple[End, End]]:
    ends, transports = mapped_ends(folder, checked=checked)
    with transports[0], transports[1]:
        transports[0].meet("D")
        made = [End(end.name, end.pool, transport, end.inbox) for end, transport in zip(ends, transports, strict=True)]
        yield made[0], made[1]
    for end in ends:
        end.close()


class TestMapped(TransportContract):
    carrier = "mapped"

    @pytest.fixture
    def ends(self, tmp_path: Path) -> Iterator[tuple[End, End]]:
        with opened(tmp_path) as made:
            yield made

    def test_neighbours_and_strangers_arrive_in_order(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        source.pool[:] = torch.arange(BLOCKS, dtype=torch.uint8)[:, None] + 1
        source.transport.offer(piece(tuple(range(6))), ids(2, 3, 4, 0, 1, 7), reader.name).result(WAIT_S)
        reader.transport.pull(reader.next_delivery(), ids(5, 6, 7, 1, 2, 0)).result(WAIT_S)
        assert reader.pool[:, 0].tolist() == [8, 1, 2, 0, 0, 3, 4, 5]

    def test_a_block_that_is_damaged_once_is_copied_again(
        self, ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, reader = ends
        source.pool[:] = 7
        source.transport.offer(piece((0, 1, 2)), ids(1, 2, 5), reader.name).result(WAIT_S)
        copied, plain = [], np.copyto

        def damages_the_first(into: np.ndarray, data: np.ndarray) -> None:
            plain(into, data)
            if not copied:
                into[-1, 100] ^= 1
            copied.append(len(into))

        monkeypatch.setattr("baton.kv_transfer.copying.np.copyto", damages_the_first)
        reader.transport.pull(reader.next_delivery(), ids(3, 4, 0)).result(WAIT_S)
        assert copied == [2, 1, 1]
        assert bool((reader.pool[[0, 3, 4]] == 7).all())

    def test_a_piece_that_names_blocks_which_are_not_there_is_refused(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        source.transport.offer(piece((0, 1)), ids(1, 2), reader.name).result(WAIT_S)
        delivery = reader.next_delivery()
        assert isinstance(delivery.message, Piece)
        for wrong in ({"source_blocks": (1, BLOCKS)}, {"generations": (0,)}, {"checksums": (1,)}):
            damaged = replace(delivery.message, **wrong)
            with pytest.raises(CorruptPiece):
                reader.transport.pull(Delivery(damaged, delivery.handles), ids(1, 2)).result(WAIT_S)

    def test_without_checksums_nothing_is_checked_but_generations(self, tmp_path: Path) -> None:
        with opened(tmp_path, checked=False) as (source, reader):
            source.pool[3] = 9
            source.transport.offer(piece((0,)), ids(3), reader.name).result(WAIT_S)
            delivery = reader.next_delivery()
            assert isinstance(delivery.message, Piece)
            assert (delivery.message.checksums, delivery.message.generations) == ((), (0,))
            reader.transport.pull(delivery, ids(4)).result(WAIT_S)
            assert bool((reader.pool[4] == 9).all())

    def test_a_message_damaged_on_the_stream_ends_it_and_both_hear_of_it(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        source.transport.offer(piece((0,)), ids(3), reader.name).result(WAIT_S)
        delivery = reader.next_delivery()
        stream = source.transport.meet(reader.name)  # type: ignore[attr-defined]
        said = bytearray(encode(piece((1,))))
        said[40] ^= 4
        stream.file.send(said)
        assert reader.next_delivery().message == PeerLost("P")
        assert source.next_delivery().message == PeerLost("D")
        with pytest.raises(TransferFailed):
            reader.transport.pull(delivery, ids(4)).result(WAIT_S)
        with pytest.raises(TransferFailed, match="no stream"):
            source.transport.offer(piece((0,)), ids(3), reader.name).result(WAIT_S)
        source.transport.meet(reader.name)  # type: ignore[attr-defined]
        source.transport.offer(piece((0,)), ids(3), reader.name).result(WAIT_S)
        reader.transport.pull(reader.next_delivery(), ids(4)).result(WAIT_S)

    def test_a_stream_without_the_token_of_a_handshake_is_closed(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        first = source.transport.meet(reader.name)  # type: ignore[attr-defined]
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(WAIT_S)
            stranger.connect(reader.transport._capability.socket)  # type: ignore[attr-defined]
            stranger.sendall(encode(Hello(bytes(16))))
            assert stranger.recv(1) == b""
        assert first.is_open

    def test_a_stream_whose_end_is_told_late_takes_nothing_from_the_next_one(
        self, ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, reader = ends
        way = source.transport
        assert isinstance(way, MappedTransport)
        first, ended = way.meet("D"), SimpleQueue[Stream]()
        monkeypatch.setattr(way._streams, "_told_closed", ended.put)
        first.end()
        assert ended.get(timeout=WAIT_S) is first
        assert reader.next_delivery().message == PeerLost("P")
        second = way.meet("D")
        assert source.next_delivery().message == PeerLost("D"), "what was promised on the first ends before the second"
        way._closed(first)
        assert source.inbox.drain() == []
        assert way.meet("D") is second
        source.transport.offer(piece((0,)), ids(3), reader.name).result(WAIT_S)
        reader.transport.pull(reader.next_delivery(), ids(4)).result(WAIT_S)

    def test_a_source_that_comes_again_ends_what_came_before(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        source.transport.offer(piece((0,)), ids(3), reader.name).result(WAIT_S)
        delivery = reader.next_delivery()
        way = source.transport
        assert isinstance(way, MappedTransport)
        with way._lock:
            way._readers.clear()  # as another process of its inbox would know none
        way.meet("D")
        assert reader.next_delivery().message == PeerLost("P")
        with pytest.raises(TransferFailed, match="gone"):
            reader.transport.pull(delivery, ids(4)).result(WAIT_S)
        assert [one.peer for one in reader.transport.ways] == ["P"]

    @pytest.mark.parametrize(
        "lie", [{"source": WorkerId("Q")}, {"source_epoch": Epoch(2)}, {"source_inbox": "Q"}, {"geometry": OTHER}]
    )
    def test_a_piece_of_another_source_ends_the_stream(self, ends: tuple[End, End], lie: "dict[str, Any]") -> None:
        source, reader = ends
        source.transport.meet("D").send(replace(piece((0,)), **lie))  # type: ignore[attr-defined]
        assert reader.next_delivery().message == PeerLost("P")
        assert source.next_delivery().message == PeerLost("D")

    def test_only_what_was_announced_on_the_stream_counts_for_the_way(
        self, ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, reader = ends
        heard: list[str] = []
        monkeypatch.setattr(source.transport, "_returned", lambda _, message: heard.append(message.ticket_id))
        source.transport.offer(piece((0,)), ids(3), reader.name).result(WAIT_S)
        reader.next_delivery()
        for ticket in ("another", "t"):
            said = Returned(ticket_id=TicketId(ticket), sequence_id=SequenceId("s/0"), source_epoch=Epoch(1))
            reader.transport.tell("P", said)
            assert source.next_delivery().message == said
        assert heard == ["t"]

    def test_answers_are_kept_for_a_while_and_for_so_many(
        self, ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, reader = (end.transport for end in ends)
        assert isinstance(source, MappedTransport)
        assert isinstance(reader, MappedTransport)
        for index in range(100):
            reader.answer(to_bytes(replace(source._capability, inbox=f"P.{index}")))
        assert list(reader._expected) == [f"P.{index}" for index in range(36, 100)]
        now = reader._clock() + 11
        monkeypatch.setattr(reader, "_clock", lambda: now)
        with pytest.raises(NotMapped, match="closed before"):
            knock(source, reader, "P.50")
        assert not reader._expected
        reader.answer(to_bytes(source._capability))
        assert list(reader._expected) == ["P"]

    def test_a_full_inbox_holds_messages_back_and_loses_none(self, tmp_path: Path) -> None:
        with opened(tmp_path) as (source, reader):
            reader.inbox._bound = 3
            for index in range(9):
                source.transport.offer(piece((index,)), ids(1), reader.name).result(WAIT_S)
            found: list[Delivery] = []
            while len(found) < 9:
                found += [reader.next_delivery()] if len(reader.inbox._waiting) == 1 else reader.inbox.drain()
            assert [one.message.blocks for one in found if isinstance(one.message, Piece)] == [(i,) for i in range(9)]


@pytest.mark.parametrize(("source_heads", "reader_heads"), [(2, 2), (2, 1), (1, 2)])
def test_workers_that_split_the_heads_read_each_others_pools(
    tmp_path: Path, source_heads: int, reader_heads: int
) -> None:
    geometry = Geometry(num_layers=2, num_kv_heads=2, head_size=16, block_tokens=16, dtype="float32", fingerprint="any")
    ends = [SharedEnd(name, geometry, BLOCKS, tmp_path) for name in ("P", "D")]
    whole = torch.randn(BLOCKS, 2, 2, 2, 16, 16)
    sites, pools = [], []
    for end, ranks in zip(ends, (source_heads, reader_heads), strict=True):
        held = 2 // ranks
        made = [
            SharedPool.create((BLOCKS, 2, 2, held, 16, 16), torch.float32, torch.device("cpu")) for _ in range(ranks)
        ]
        heads = [range(at * held, (at + 1) * held) for at in range(ranks)]
        tensors = [one.tensor for one in made]
        sites.append(
            replace(
                end.site,
                pool=whole_blocks(tensors, heads),
                pools=tuple(
                    RankPool(one.handle.address, h.start, len(h))  # type: ignore[union-attr]
                    for one, h in zip(made, heads, strict=True)
                ),
            )
        )
        pools.append((tensors, heads))
    for tensor, held_heads in zip(*pools[0], strict=True):
        tensor.copy_(whole[:, :, :, held_heads.start : held_heads.stop])
    with (
        MappedTransport(sites[1], lambda *_: b"") as reader,
        MappedTransport(sites[0], lambda _, record: reader.answer(record)) as source,
    ):
        source.meet("D")
        about = replace(piece((0, 1, 2)), geometry=geometry)
        source.offer(about, ids(4, 5, 1), "D").result(WAIT_S)
        delivery = End("D", ends[1].pool, reader, ends[1].inbox).next_delivery()
        reader.pull(delivery, ids(0, 1, 7)).result(WAIT_S)
    for tensor, held_heads in zip(*pools[1], strict=True):
        expected = torch.zeros_like(whole)
        expected[[0, 1, 7]] = whole[[4, 5, 1]]
        assert torch.equal(tensor, expected[:, :, :, held_heads.start : held_heads.stop])
    for end in ends:
        end.close()


class Far:
    """A source in a process of its own: does what it is told, and says when it is done."""

    def __init__(self, process: BaseProcess, pipe: Connection, reader: MappedTransport, folder: Path) -> None:
        self.process = process
        self._pipe = pipe
        self._reader = reader
        self._folder = folder

    def do(self, what: str, *arguments: object) -> object:
        """Answers its handshakes meanwhile."""
        self._pipe.send((what, arguments))
        while True:
            assert self._pipe.poll(WAIT_S), "the source does not answer"
            kind, value = self._pipe.recv()
            if kind == "greet":
                self._pipe.send(self._reader.answer(value))
            elif kind == "failed":
                raise AssertionError(value)
            else:
                return value


def be_source(pipe: Connection, folder: Path) -> None:
    """The other process: fills blocks with a byte each, offers, reuses, and tells what it hears."""
    end = SharedEnd("P", GEOMETRY, BLOCKS, folder)

    def ask(_: str, record: bytes) -> bytes:
        pipe.send(("greet", record))
        answer: bytes = pipe.recv()
        return answer

    transport = MappedTransport(end.site, ask)
    near = End("P", end.pool, transport, end.inbox)
    while True:
        what, arguments = pipe.recv()
        try:
            match what:
                case "allocate":  # blocks, and write a byte all over them
                    value: object = end.ledger.allocate(arguments[0])
                    end.pool[value] = arguments[1]
                case "offer":
                    transport.meet("D")
                    value = transport.offer(piece(tuple(range(len(arguments[0])))), arguments[0], "D").result(WAIT_S)
                case "release":
                    value = end.ledger.release(arguments[0])
                case "hear":
                    value = near.next_delivery().message
                case "leave":
                    value = transport.__exit__(None, None, None)
        except Exception as error:
            pipe.send(("failed", repr(error)))
        else:
            pipe.send(("done", value))


@pytest.fixture
def far(tmp_path: Path) -> Iterator[tuple[Far, End]]:
    end = SharedEnd("D", GEOMETRY, BLOCKS, tmp_path)
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=be_source, args=(theirs, tmp_path), daemon=True)
    process.start()
    theirs.close()
    with MappedTransport(end.site, lambda *_: b"") as transport:
        yield Far(process, ours, transport, tmp_path), End("D", end.pool, transport, end.inbox)
    process.kill()
    process.join(WAIT_S)
    end.close()


def test_a_block_that_is_reused_before_the_copy_fails_the_pull(far: tuple[Far, End]) -> None:
    source, reader = far
    blocks = source.do("allocate", 3, 7)
    source.do("offer", blocks)
    first = reader.next_delivery()
    reader.transport.pull(first, ids(0, 1, 2)).result(WAIT_S)
    assert bool((reader.pool[:3] == 7).all())
    source.do("offer", blocks)
    source.do("release", blocks)  # the loan has ended, nobody has them: they still hold what was announced
    again = reader.next_delivery()
    reader.transport.pull(again, ids(3, 4, 5)).result(WAIT_S)
    source.do("allocate", BLOCKS, 8)
    with pytest.raises(LeaseExpired, match="took 3 of 3 KV blocks back"):
        reader.transport.pull(again, ids(3, 4, 5)).result(WAIT_S)
    assert bool((reader.pool[3:6] == 7).all()), "known before the copy, so nothing was copied"
    assert [way.stale_reads for way in reader.transport.ways] == [1]


def test_a_block_that_is_reused_under_the_copy_fails_the_pull(
    far: tuple[Far, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The live source gives the blocks to another holder, who writes, between two copies of a piece."""
    source, reader = far
    blocks = source.do("allocate", BLOCKS, 7)
    assert isinstance(blocks, list)
    source.do("offer", blocks[::2])
    delivery = reader.next_delivery()
    assert isinstance(delivery.message, Piece)
    delivery = Delivery(replace(delivery.message, checksums=()), delivery.handles)  # it is not for them to notice
    plain, copied = np.copyto, threading.Event()

    def copies_one(into: np.ndarray, data: np.ndarray) -> None:
        if not copied.is_set():
            copied.set()
            source.do("release", blocks)
            source.do("allocate", BLOCKS, 8)
        plain(into, data)

    monkeypatch.setattr("baton.kv_transfer.copying.np.copyto", copies_one)
    with pytest.raises(LeaseExpired):
        reader.transport.pull(delivery, ids(0, 1, 2, 3)).result(WAIT_S)
    assert copied.is_set()
    assert bool((reader.pool[3] == 8).all()), "another holder's bytes did arrive"


def is_mapped(inode: int) -> bool:
    """The file of this inode, here."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:baton" in line]
    return any(fields[4] == str(inode) for fields in lines)


def test_a_killed_source_is_noticed_and_its_memory_goes_back(far: tuple[Far, End]) -> None:
    source, reader = far
    blocks = source.do("allocate", 2, 7)
    source.do("offer", blocks)
    delivery = reader.next_delivery()
    handle = delivery.handles[0]
    assert isinstance(handle, Source)
    record = handle.record
    memory = [os.stat(address).st_ino for address in (record.pools[0].address, record.generations)]
    assert all(is_mapped(inode) for inode in memory)
    source.process.kill()
    source.process.join(WAIT_S)
    assert source.process.exitcode == -signal.SIGKILL
    with pytest.raises(TransferFailed, match=r"ended|gone"):  # though its memory can still be read
        reader.transport.pull(delivery, ids(0, 1)).result(WAIT_S)
    assert reader.next_delivery().message == PeerLost("P")
    assert not any(is_mapped(inode) for inode in memory)
    assert reader.transport.ways == ()


def test_a_source_killed_under_the_copy_fails_the_pull(far: tuple[Far, End], monkeypatch: pytest.MonkeyPatch) -> None:
    source, reader = far
    source.do("offer", source.do("allocate", 2, 7))
    delivery = reader.next_delivery()
    plain = np.copyto

    def kills_first(into: np.ndarray, data: np.ndarray) -> None:
        source.process.kill()
        source.process.join(WAIT_S)
        plain(into, data)

    monkeypatch.setattr("baton.kv_transfer.copying.np.copyto", kills_first)
    with pytest.raises(TransferFailed, match="ended while"):
        reader.transport.pull(delivery, ids(0, 1)).result(WAIT_S)


def test_a_source_that_leaves_in_good_order_ends_its_epoch(far: tuple[Far, End]) -> None:
    source, reader = far
    source.do("offer", source.do("allocate", 2, 7))
    delivery = reader.next_delivery()
    handle = delivery.handles[0]
    assert isinstance(handle, Source)
    mapping = handle.mapping
    assert mapping is not None
    assert mapping.is_of_its_epoch()
    source.do("leave")
    assert not mapping.is_of_its_epoch()
    assert reader.next_delivery().message == PeerLost("P")


def test_a_reader_that_dies_is_told_to_the_source(far: tuple[Far, End]) -> None:
    source, reader = far
    source.do("offer", source.do("allocate", 1, 7))
    message = Returned(ticket_id=TicketId("t"), sequence_id=SequenceId("s/0"), source_epoch=Epoch(1))
    reader.transport.tell("P", message)
    assert source.do("hear") == message
    reader.transport._streams.close()  # type: ignore[attr-defined]  # as the kernel does for the dead
    assert source.do("hear") == PeerLost("D")


def test_what_keeps_two_workers_from_mapping_is_said_in_words(tmp_path: Path) -> None:
    source, reader = (SharedEnd(name, GEOMETRY, BLOCKS, tmp_path).site.capability for name in ("P", "D"))
    assert why_not_mapped(source, reader) == ""
    for change, says in (
        ({"transport": "ray_store"}, "pinned"),
        ({"unmapped": "the pool is on cuda"}, "cuda"),
        ({"host": replace(reader.host, boot_id="another")}, "different hosts"),
        ({"host": replace(reader.host, user=12345)}, "different users"),
        ({"host": replace(reader.host, pid_namespace="pid:[1]")}, "different containers"),
        ({"geometry": replace(GEOMETRY, head_size=32)}, "head_size: 16 here, 32 at the reader"),
    ):
        assert says in why_not_mapped(source, replace(reader, **change))  # type: ignore[arg-type]


def test_a_refusal_reaches_the_source(tmp_path: Path) -> None:
    ends = [SharedEnd(name, GEOMETRY, BLOCKS, tmp_path) for name in ("P", "D")]
    other = replace(ends[1].site, transport="ray_store")
    with (
        MappedTransport(other, lambda *_: b"") as reader,
        MappedTransport(ends[0].site, lambda _, record: reader.answer(record)) as source,
    ):
        with pytest.raises(NotMapped, match="pinned") as refusal:
            source.meet("D")
        assert refusal.value.lasting
    for end in ends:
        end.close()
