"""Hand-overs between workers of different shape over the mapped pool, the source in a process of its own: lending and
landing, real handshakes, KV compared bit for bit with what the prompt's tokens had."""

from collections.abc import Iterator
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from baton.core.ids import SequenceId, TicketId
from baton.core.tickets import Piece, Ticket
from baton.kv_transfer.mapped import MappedTransport
from baton.kv_transfer.messages import Returned
from baton.kv_transfer.reshape import ROUNDING
from baton.worker.landing import Landed, Landing
from baton.worker.lending import Lending

from ..shaped_ends import HEADS, LAYERS, SIZE, Shape, ShapedEnd
from ..unit.kv_transfer.shapes import DTYPES, same_bits, write_by_token
from .transport_contract import WAIT_S, End

PROMPT = 150
ENDS = (50, 110, PROMPT)  # of the prompt's chunks
KNOWN = 1  # blocks that the reader has
SHAPES = [Shape(tp, *rest) for tp in (1, 2) for rest in ((16, "float32"), (32, "bfloat16"), (48, "float32"))]


def numbers(dtype: str) -> torch.Tensor:
    """The prompt's KV, [T, L, 2, G, D]."""
    made = torch.randn(PROMPT, LAYERS, 2, HEADS, SIZE, generator=torch.Generator().manual_seed(5))
    return made.to(DTYPES[dtype])


def be_source(pipe: Connection) -> None:
    """The other process: computes the prompt chunk by chunk, as a worker of the shape that it is told."""

    def ask(_: str, record: bytes) -> bytes:
        pipe.send(record)
        answer: bytes = pipe.recv()
        return answer

    while True:
        shape, folder, ticket = pipe.recv()
        end = ShapedEnd("P", shape, folder)
        with MappedTransport(end.site, ask) as transport:
            transport.meet("D")
            lending = Lending(end.ledger, transport, end.side.geometry, end.identity, WAIT_S, end.inbox.wakeup.ring)
            key, table = SequenceId("s/0"), end.allocate(PROMPT)
            lending.open(key, ticket, PROMPT)
            before = 0
            for stop in ENDS:
                write_by_token(end.pools, end.side, table, numbers(shape.dtype), range(before, stop))
                done, before = stop == PROMPT, stop
                complete = len(table) if done else stop // shape.block_tokens
                lending.announce(key, table, complete, 0.0, 7 if done else None)
            end.ledger.release(table)
            message = End("P", end.pools[0], transport, end.inbox).next_delivery().message
            loan = lending.returned(message) if isinstance(message, Returned) else None
        lending.poll(0.0)  # its offers are done by now
        pipe.send((loan is not None, end.ledger.held_count, getattr(message, "error_code", "?")))
        end.close()


@pytest.fixture(scope="module")
def far() -> Iterator[Connection]:
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=be_source, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    yield ours
    process.kill()
    process.join(WAIT_S)


def land(end: ShapedEnd, transport: MappedTransport, far: Connection, shape: Shape, folder: Path) -> Landed:
    """One hand-over from a source of that shape into `end`."""
    landing = Landing(
        end.ledger,
        transport,
        end.side.geometry,
        end.identity,
        lease_s=WAIT_S,
        timeout_s=WAIT_S,
        wake=end.inbox.wakeup.ring,
    )
    table = end.allocate(PROMPT)
    ticket: Ticket = landing.reserve(SequenceId("s/0"), TicketId("t"), table, range(KNOWN, len(table)), PROMPT, 0.0)
    far.send((shape, folder, ticket))
    assert far.poll(WAIT_S)
    far.send(transport.answer(far.recv()))
    near = End("D", end.pools[0], transport, end.inbox)
    while True:
        near.wait()
        for delivery in end.inbox.drain():
            if isinstance(delivery.message, Piece):
                landing.accept(delivery, 0.0)
        for news in landing.poll(0.0):
            assert isinstance(news, Landed), news
            landing.commit(TicketId("t"))
            return news


@pytest.mark.parametrize(("source", "reader"), list(product(SHAPES, SHAPES)), ids=lambda one: "-".join(map(str, one)))
def test_kv_lands_in_every_shape_from_every_shape(
    far: Connection, tmp_path: Path, source: Shape, reader: Shape
) -> None:
    end = ShapedEnd("D", reader, tmp_path)
    untouched = [pool.clone() for pool in end.pools]
    with MappedTransport(end.site, lambda *_: b"") as transport:
        landed = land(end, transport, far, source, tmp_path)
        assert far.poll(WAIT_S)
        assert far.recv() == (True, 0, ""), "the source has all of its blocks back"
    exact = numbers(source.dtype)
    expected = exact.to(DTYPES[reader.dtype])
    wanted = range(KNOWN * reader.block_tokens, PROMPT)
    same = source == reader._replace(tp=source.tp)  # whole blocks are copied, with what lies behind the prompt's end
    for pool, before in zip(end.pools, untouched, strict=True):
        assert not same_bits(pool, before)
    write_by_token(untouched, end.side, landed.reservation.table, expected, wanted)
    for pool, whole in zip(end.pools, untouched, strict=True):
        assert same or same_bits(pool, whole)
    read = torch.empty_like(expected)
    size = reader.block_tokens
    for pool, heads in zip(end.pools, end.side.rank_heads, strict=True):
        for token in wanted:
            block = landed.reservation.table[token // size]
            read[token, :, :, heads.start : heads.stop] = pool[block, :, :, :, token % size]
    assert same_bits(read[wanted.start :], expected[wanted.start :])
    if source.dtype == reader.dtype:
        assert same_bits(read[wanted.start :], exact[wanted.start :])
    error = (read.double() - exact.double())[wanted.start :].abs()
    assert (error <= ROUNDING["bfloat16"].relative * exact[wanted.start :].double().abs()).all()
    assert landed.reservation.keeps_keys == ((source.dtype, reader.dtype) != ("bfloat16", "float32"))
    end.close()
