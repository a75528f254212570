"""Pieces that are not as their source sent them: none of them lands, and what comes twice does no harm.

`python -m tests.kv_mutations 100000` runs as many; test_mutations.py a few.

A hand-over of two pieces goes through the bytes of a message, the stream's checks, landing and a pull over the mapped
pool, into blocks of the same shape or of another. One piece is changed on its way, or the memory behind it.
"""

import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path

import torch

from baton.core.errors import BatonError
from baton.core.ids import Epoch, SequenceId, TicketId
from baton.core.tickets import Geometry, Piece
from baton.kv_transfer.encoding import Damaged, Wire, decode, encode
from baton.kv_transfer.inbox import greet
from baton.kv_transfer.mapped import MappedTransport
from baton.kv_transfer.messages import Returned
from baton.worker.landing import Landed, Landing, LandingFailed
from baton.worker.lending import Lending

from .fakes import HandCranked
from .shaped_ends import HEADS, LAYERS, SIZE, Shape, ShapedEnd
from .unit.kv_transfer.shapes import CANARY, DTYPES

PROMPT, FIRST = 75, 40  # tokens in all, and of the first chunk
SOURCE = Shape(1, 16, "float32")
READERS = (SOURCE, Shape(2, 48, "bfloat16"))


class Stand:
    """A source and a reader in one process; what the source says is kept instead of sent."""

    def __init__(self, reader: Shape, seed: int, stack: ExitStack) -> None:
        self.random = random.Random(seed)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.here, self.there = ShapedEnd("D", reader, folder), ShapedEnd("P", SOURCE, folder)
        stack.callback(self.here.close)
        stack.callback(self.there.close)
        self.reading = stack.enter_context(MappedTransport(self.here.site, lambda *_: b""))
        self.here.inbox.greeter = self.reading.answer
        self.giving = stack.enter_context(
            MappedTransport(self.there.site, lambda _, record: greet(self.here.inbox, record))
        )
        stream = self.giving.meet("D")
        self.said: list[Wire] = []
        stream.send = self.said.append  # type: ignore[method-assign]
        self.stream = self.reading._sources["P"].stream
        self.stream.send = self.said.append  # type: ignore[method-assign]
        self.crank = HandCranked()
        self.giving._offers = self.reading._pulls = self.crank  # type: ignore[assignment]
        self.lending = Lending(
            self.there.ledger, self.giving, self.there.side.geometry, self.there.identity, 1e9, lambda: None
        )
        self.landing = Landing(
            self.here.ledger,
            self.reading,
            self.here.side.geometry,
            self.here.identity,
            lease_s=1e9,
            timeout_s=1e9,
            wake=lambda: None,
        )
        self.canary = self.here.ledger.allocate(2)  # another request's
        self.number = 0
        self.kv = torch.randn(PROMPT, LAYERS, 2, HEADS, SIZE, generator=torch.Generator().manual_seed(seed))

    # One hand-over

    def begin(self) -> list[Piece]:
        """A ticket and what its source says of it: two pieces."""
        self.number += 1
        self.key, self.ticket_id = SequenceId(f"s{self.number}/0"), TicketId(f"t{self.number}")
        self.kv += 1
        self.table = self.there.allocate(PROMPT)
        whole = torch.zeros(len(self.table) * SOURCE.block_tokens, *self.kv.shape[1:])
        whole[:PROMPT] = self.kv
        blocks = whole.view(len(self.table), SOURCE.block_tokens, *self.kv.shape[1:])
        self.there.pools[0][self.table] = blocks.permute(0, 2, 3, 4, 1, 5)
        self.mine = self.here.allocate(PROMPT)
        wanted = range(len(self.mine))
        ticket = self.landing.reserve(self.key, self.ticket_id, self.mine, wanted, PROMPT, 0.0)
        self.lending.open(self.key, ticket, PROMPT)
        self.said.clear()
        self.lending.announce(self.key, self.table, FIRST // SOURCE.block_tokens, 0.0)
        self.lending.announce(self.key, self.table, len(self.table), 0.0, 5)
        self.crank.run()
        return [message for message in self.said if isinstance(message, Piece)]

    def hear(self, data: bytes) -> str:
        """What a reader does with the bytes of a message. Gives who refused it; empty: nobody yet."""
        try:
            self.reading._heard(self.stream, decode(data))
        except Damaged:
            return "message"
        for delivery in self.here.inbox.drain():
            assert isinstance(delivery.message, Piece)
            try:
                self.landing.accept(delivery, 0.0)
            except BatonError as error:
                self.landing.refuse(delivery.message, error)
                return error.code
        return ""

    def news(self) -> list[Landed | LandingFailed]:
        self.crank.run()
        return self.landing.poll(0.0)

    def end(self) -> None:
        """Whatever became of it: no block is left behind, and no byte of another's is changed."""
        self.landing.abort(self.ticket_id, BatonError("over"))
        self.crank.run()
        self.landing.poll(0.0)
        self.lending.withdraw(self.key)
        self.lending.poll(0.0)
        self.there.ledger.release(self.table)
        assert self.there.ledger.held_count == 0
        assert self.here.ledger.held_count == len(self.canary)
        for pool in self.here.pools:
            assert bool((pool[self.canary].view(torch.uint8) == CANARY).all()), "another request's block was written"

    def check(self) -> None:
        """What has landed is what was computed."""
        expected = self.kv.to(DTYPES[self.here.side.geometry.dtype])
        for pool, heads in zip(self.here.pools, self.here.side.rank_heads, strict=True):
            size = self.here.side.geometry.block_tokens
            found = (
                pool[self.mine].permute(0, 4, 1, 2, 3, 5).reshape(len(self.mine) * size, LAYERS, 2, len(heads), SIZE)
            )
            assert torch.equal(found[:PROMPT], expected[:, :, :, heads.start : heads.stop])


# What may happen to a piece. Each gives the bytes that arrive instead of it.

Change = Callable[[Stand, Piece], bytes]


def flipped(stand: Stand, piece: Piece) -> bytes:
    data = bytearray(encode(piece))
    for at in stand.random.sample(range(8 * len(data)), stand.random.randint(1, 4)):
        data[at // 8] ^= 1 << at % 8
    return bytes(data)


def truncated(stand: Stand, piece: Piece) -> bytes:
    data = encode(piece)
    return data[: stand.random.randrange(len(data))]


def extended(stand: Stand, piece: Piece) -> bytes:
    return encode(piece) + stand.random.randbytes(stand.random.randint(1, 40))


def swapped_block(stand: Stand, piece: Piece) -> bytes:
    """Two of its prompt's blocks change places, or two of the source's."""
    name = stand.random.choice(("blocks", "source_blocks"))
    return encode(replace(piece, **{name: _swapped(stand, getattr(piece, name))}))  # type: ignore[arg-type]


def another_block(stand: Stand, piece: Piece) -> bytes:
    at = stand.random.randrange(len(piece.blocks))
    name = stand.random.choice(("blocks", "source_blocks"))
    values = list(getattr(piece, name))
    values[at] = stand.random.choice([number for number in range(40) if number != values[at]])
    return encode(replace(piece, **{name: tuple(values)}))  # type: ignore[arg-type]


def swapped_layer(stand: Stand, piece: Piece) -> bytes:
    """Of a block that was announced."""
    one, other = stand.random.sample(range(LAYERS), 2)
    block = stand.random.choice(piece.source_blocks)
    layers = stand.there.pools[0][block]
    layers[[one, other]] = layers[[other, one]]
    return encode(piece)


def damaged_memory(stand: Stand, piece: Piece) -> bytes:
    block = stand.there.pools[0][stand.random.choice(piece.source_blocks)].view(torch.uint8).view(-1)
    block[stand.random.randrange(len(block))] ^= 1 << stand.random.randrange(8)
    return encode(piece)


def another_request(stand: Stand, piece: Piece) -> bytes:
    named = {"ticket_id": TicketId("t0"), "sequence_id": SequenceId("s0/0")}
    name = stand.random.choice(sorted(named))
    return encode(replace(piece, **{name: named[name]}))  # type: ignore[arg-type]


def stale_epoch(stand: Stand, piece: Piece) -> bytes:
    name = stand.random.choice(("reader_epoch", "source_epoch"))
    return encode(replace(piece, **{name: Epoch(stand.random.choice((0, 2, 3)))}))  # type: ignore[arg-type]


def old_generation(stand: Stand, piece: Piece) -> bytes:
    """The word of one block is another than it was, or its memory has a new holder."""
    at = stand.random.randrange(len(piece.blocks))
    if stand.random.random() < 0.5:
        words = list(piece.generations)
        words[at] += stand.random.choice((-1, 1)) if words[at] else 1
        return encode(replace(piece, generations=tuple(words)))
    stand.there.generations.renew([piece.source_blocks[at]])
    return encode(piece)


def wrong_geometry(stand: Stand, piece: Piece) -> bytes:
    name = stand.random.choice([field.name for field in fields(Geometry)])
    value = getattr(piece.geometry, name)
    wrong = f"{value}x" if isinstance(value, str) else value + stand.random.choice((1, 16))
    return encode(replace(piece, geometry=replace(piece.geometry, **{name: wrong})))


def wrong_count(stand: Stand, piece: Piece) -> bytes:
    """A list that is longer or shorter than the others."""
    name = stand.random.choice(("blocks", "source_blocks", "generations", "checksums"))
    values = getattr(piece, name)
    return encode(replace(piece, **{name: (*values, values[-1]) if stand.random.random() < 0.5 else values[:-1]}))


def no_token(stand: Stand, piece: Piece) -> bytes:
    return encode(replace(piece, last=True, first_token=None))


CHANGES: tuple[Change, ...] = (
    flipped,
    truncated,
    extended,
    swapped_block,
    another_block,
    swapped_layer,
    damaged_memory,
    another_request,
    stale_epoch,
    old_generation,
    wrong_geometry,
    wrong_count,
    no_token,
)


def _swapped(stand: Stand, values: tuple[int, ...]) -> tuple[int, ...]:
    one, other = stand.random.sample(range(len(values)), 2)
    found = list(values)
    found[one], found[other] = found[other], found[one]
    return tuple(found)


def mutate(stand: Stand, change: Change) -> str:
    """One hand-over with one piece changed. Gives who refused it: somebody must, and nothing may land."""
    pieces = stand.begin()
    at = stand.random.randrange(len(pieces))
    changed = change(stand, pieces[at])
    refused = ""
    for index, piece in enumerate(pieces):
        refused = refused or stand.hear(changed if index == at else encode(piece))
    for news in stand.news():
        assert isinstance(news, LandingFailed), f"{change.__name__}: a changed piece has landed"
        refused = refused or news.error.code
    assert refused, f"{change.__name__}: nobody refused it"
    stand.end()
    return refused


def replay(stand: Stand) -> None:
    """All pieces, each up to three times and in any order, before and after they have landed; returns too."""
    pieces = stand.begin()
    said = [encode(piece) for piece in pieces for _ in range(stand.random.randint(1, 3))]
    stand.random.shuffle(said)
    for data in said:
        assert stand.hear(data) == ""
    (news,) = stand.news()
    assert isinstance(news, Landed)
    assert news.first_token == 5
    stand.said.clear()
    stand.here.ledger.release(stand.landing.commit(stand.ticket_id))
    stand.check()
    (returned,) = [message for message in stand.said if isinstance(message, Returned)]
    assert stand.hear(said[0]) == "StaleEpoch"
    wrong = (
        replace(returned, ticket_id=TicketId("t0")),
        replace(returned, sequence_id=SequenceId("s0/0")),
        replace(returned, source_epoch=Epoch(2)),
    )
    assert stand.lending.returned(stand.random.choice(wrong)) is None
    assert stand.lending.returned(returned) is not None
    assert stand.lending.returned(returned) is None
    stand.end()


def run(count: int, seed: int = 0) -> Counter[str]:
    """So many changed pieces, half of them into another shape, and a tenth as many replays. Gives who refused them."""
    found: Counter[str] = Counter()
    with ExitStack() as stack:
        stands = [Stand(shape, seed + at, stack) for at, shape in enumerate(READERS)]
        for number in range(count):
            stand = stands[number % len(stands)]
            change = CHANGES[number // len(stands) % len(CHANGES)]
            found[f"{change.__name__}: {mutate(stand, change)}"] += 1
            if number % 10 == 0:
                replay(stand)
    return found


def main(count: int) -> None:
    begin = time.monotonic()
    logging.disable(logging.WARNING)  # of each one
    torch.set_num_threads(1)
    for what, times in sorted(run(count, seed=time.time_ns() % 2**32).items()):
        print(f"{times:8}  {what}")
    print(f"{count} changed pieces were all refused, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
