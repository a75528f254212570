"""What every transport promises. A suite per transport inherits `TransportContract` and says how to make two ends."""

import select
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import pytest
import torch

from baton.core.errors import CorruptPiece, TransferFailed
from baton.core.ids import BlockId, Epoch, SequenceId, TicketId
from baton.core.tickets import Geometry, Piece
from baton.kv_transfer.inbox import Inbox
from baton.kv_transfer.messages import Delivery, Returned
from baton.kv_transfer.recut import Recut
from baton.kv_transfer.transport import Transport

from ..pieces import a_piece

GEOMETRY = Geometry(num_layers=1, num_kv_heads=1, head_size=16, block_tokens=16, dtype="float32", fingerprint="any")
BLOCKS, WAIT_S = 8, 60.0


@dataclass
class End:
    name: str
    pool: torch.Tensor
    transport: Transport
    inbox: Inbox

    def next_delivery(self) -> Delivery:
        """Waits for a message."""
        while True:
            found = self.inbox.drain()
            if found:
                assert len(found) == 1
                return found[0]
            self.wait()

    def wait(self) -> None:
        """Until the inbox wakes its rank."""
        poll = select.poll()
        poll.register(self.inbox.wakeup.fd, select.POLLIN)
        assert poll.poll(WAIT_S * 1000), "no message came"
        self.inbox.wakeup.clear()


def fresh_pool() -> torch.Tensor:
    return torch.zeros(BLOCKS, GEOMETRY.block_bytes, dtype=torch.uint8)


def piece(indices: tuple[int, ...], last: bool = True) -> Piece:
    return a_piece(GEOMETRY, indices, last=last, first_token=4 if last else None)


def damaged_delivery(source: End, reader: End) -> Delivery:
    """Blocks 1 and 2 of the source, full of sevens, under ticket t; the second does not have its checksum."""
    source.pool[:] = 7
    source.transport.offer(piece((0, 1)), ids(1, 2), reader.name).result(WAIT_S)
    delivery = reader.next_delivery()
    assert isinstance(delivery.message, Piece)
    first, second = delivery.message.checksums
    return Delivery(replace(delivery.message, checksums=(first, second ^ 1)), delivery.handles)


def ids(*blocks: int) -> list[BlockId]:
    return [BlockId(block) for block in blocks]


class TransportContract(ABC):
    carrier: str
    """What is to carry the bytes."""

    @pytest.fixture
    @abstractmethod
    def ends(self) -> tuple[End, End]:
        """Source and reader, named as inboxes are."""

    def test_scattered_blocks_arrive_in_order_and_touch_nothing_else(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        source.pool[:] = torch.arange(BLOCKS, dtype=torch.uint8)[:, None] + 1
        offered = source.transport.offer(piece((2, 3, 6)), ids(5, 0, 7), reader.name).result(WAIT_S)
        assert offered.num_blocks == 3
        assert offered.num_bytes == 3 * GEOMETRY.block_bytes
        delivery = reader.next_delivery()
        assert isinstance(delivery.message, Piece)
        assert len(delivery.message.checksums) == 3
        assert replace(delivery.message, checksums=(), source_blocks=(), generations=()) == piece((2, 3, 6))
        pulled = reader.transport.pull(delivery, ids(1, 6, 2)).result(WAIT_S)
        assert pulled.num_bytes == 3 * GEOMETRY.block_bytes
        assert pulled.end_ns >= pulled.start_ns
        assert reader.pool[:, 0].tolist() == [0, 6, 8, 0, 0, 0, 1, 0]
        assert bool((reader.pool == reader.pool[:, :1]).all())
        source.transport.withdraw(TicketId("t"))

    def test_what_is_offered_may_be_read_twice(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        source.pool[3] = 9
        source.transport.offer(piece((0,)), ids(3), reader.name).result(WAIT_S)
        delivery = reader.next_delivery()
        for _ in range(2):
            reader.transport.pull(delivery, ids(4)).result(WAIT_S)
            assert bool((reader.pool[4] == 9).all())
        source.transport.withdraw(TicketId("t"))

    def test_a_piece_without_blocks_carries_its_first_token(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        source.transport.offer(piece(()), [], reader.name).result(WAIT_S)
        delivery = reader.next_delivery()
        assert isinstance(delivery.message, Piece)
        assert delivery.message.first_token == 4
        assert reader.transport.pull(delivery, []).result(WAIT_S).num_bytes == 0
        source.transport.withdraw(TicketId("t"))

    def test_a_wrong_checksum_fails_the_pull_and_touches_no_other_block(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        delivery = damaged_delivery(source, reader)
        with pytest.raises(CorruptPiece):
            reader.transport.pull(delivery, ids(1, 2)).result(WAIT_S)
        assert not bool(reader.pool[[0, 3, 4, 5, 6, 7]].any())
        source.transport.withdraw(TicketId("t"))

    def test_a_piece_is_cut_anew_for_blocks_of_another_shape(self, ends: tuple[End, End]) -> None:
        """Three blocks of 16 tokens in float32 become 40 tokens in two of 32 in bfloat16."""
        source, reader = ends
        shape = replace(GEOMETRY, block_tokens=32, dtype="bfloat16")
        kv = torch.randn(BLOCKS, 2, 16, 16)
        source.pool.view(torch.float32)[:] = kv.view(BLOCKS, -1)
        reader.pool[:] = 0
        source.transport.offer(piece((0, 1, 2)), ids(4, 7, 1), reader.name).result(WAIT_S)
        into = Recut(shape, {0: BlockId(5), 1: BlockId(2)}, (range(3, 40),))
        pulled = reader.transport.pull(reader.next_delivery(), into).result(WAIT_S)
        assert (pulled.num_bytes, pulled.num_blocks) == (37 * 2 * 16 * 2, 2)
        tokens = torch.zeros(64, 2, 16, dtype=torch.bfloat16)
        tokens[3:40] = kv[[4, 7, 1]].transpose(1, 2).reshape(48, 2, 16)[3:40].bfloat16()
        expected = torch.zeros(BLOCKS, 2, 32, 16, dtype=torch.bfloat16)
        expected[[5, 2]] = tokens.view(2, 32, 2, 16).transpose(1, 2)
        assert torch.equal(reader.pool, expected.view(BLOCKS, -1).view(torch.uint8))
        source.transport.withdraw(TicketId("t"))

    def test_what_is_damaged_is_not_cut(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        delivery = damaged_delivery(source, reader)
        into = Recut(replace(GEOMETRY, block_tokens=32), {0: BlockId(1)}, (range(32),))
        with pytest.raises(CorruptPiece):
            reader.transport.pull(delivery, into).result(WAIT_S)
        assert not bool(reader.pool.any())
        source.transport.withdraw(TicketId("t"))

    def test_what_moved_names_what_carried_it(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        offered = source.transport.offer(piece((0,)), ids(1), reader.name).result(WAIT_S)
        pulled = reader.transport.pull(reader.next_delivery(), ids(2)).result(WAIT_S)
        assert offered.transport == pulled.transport == self.carrier
        source.transport.withdraw(TicketId("t"))

    def test_an_offer_to_nobody_fails_and_keeps_nothing(self, ends: tuple[End, End]) -> None:
        source, _ = ends
        with pytest.raises(TransferFailed):
            source.transport.offer(piece((0,)), ids(1), "nobody").result(WAIT_S)
        assert source.transport.living() == 0

    def test_offered_bytes_live_until_they_are_withdrawn(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        source.transport.offer(piece((0,), last=False), ids(1), reader.name).result(WAIT_S)
        reader.next_delivery()
        source.transport.offer(piece((1,)), ids(2), reader.name).result(WAIT_S)
        reader.next_delivery()
        assert source.transport.living() == 2
        source.transport.withdraw(TicketId("another"))
        assert source.transport.living() == 2
        source.transport.withdraw(TicketId("t"))
        source.transport.withdraw(TicketId("t"))
        assert source.transport.living() == 0

    def test_who_was_offered_something_can_tell_the_source(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        source.transport.offer(piece((0,)), ids(1), reader.name).result(WAIT_S)
        reader.next_delivery()
        message = Returned(ticket_id=TicketId("t"), sequence_id=SequenceId("s/0"), source_epoch=Epoch(1))
        reader.transport.tell("nobody", message)
        reader.transport.tell(source.name, message)
        assert source.next_delivery().message == message
        source.transport.withdraw(TicketId("t"))


class SnapshotContract(TransportContract):
    """What those promise beside that which copy a piece as it is offered."""

    def test_what_is_offered_is_a_snapshot(self, ends: tuple[End, End]) -> None:
        source, reader = ends
        source.pool[3] = 9
        source.transport.offer(piece((0,)), ids(3), reader.name).result(WAIT_S)
        source.pool[3] = 1
        reader.transport.pull(reader.next_delivery(), ids(4)).result(WAIT_S)
        assert bool((reader.pool[4] == 9).all())
        source.transport.withdraw(TicketId("t"))
