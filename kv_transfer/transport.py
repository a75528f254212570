"""How a rank reads blocks of a peer's pool into its own, whatever carries the bytes.

Geometry, epochs and inboxes travel with every ticket and piece, and the reader's inbox names the peer: whoever offers
and pulls need not know whether a transport has sessions beneath.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from time import time_ns
from typing import Protocol

from ..core.errors import CorruptPiece
from ..core.frames import Way
from ..core.ids import BlockId, TicketId
from ..core.tickets import Piece
from .integrity import Bytes, bad_blocks, checksums
from .messages import Delivery, Returned
from .pool import Blocks
from .recut import Into, Recut, write_recut


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What one finished offer or pull did. Times are Unix nanoseconds."""

    transport: str  # what carried the bytes
    num_bytes: int
    num_blocks: int
    start_ns: int
    end_ns: int


class Transport(Protocol):
    """Lets a rank read blocks of a peer's pool into its own. Knows bytes and blocks, no more.

    Futures end on the transport's own threads. Until one is done, the blocks it was given are in use.
    """

    name: str

    @property
    def ways(self) -> Sequence[Way]:
        """How KV moves to and from each peer that was met, for the status."""

    def offer(self, piece: Piece, blocks: Sequence[BlockId], reader: str) -> "Future[Moved]":
        """Source side: make the blocks readable, fill in what the piece says of them (checksums, and where they lie)
        and announce it at the inbox `reader`, maybe in parts that add up to it.

        Done when the announcement is with the reader's rank, or on a stream whose end both would notice. Fails with
        TransferFailed, or with GeometryMismatch where the only way allowed can't be had; then what was announced is not
        to be relied on. The caller keeps the blocks unchanged until
        `withdraw`, which it calls in every case: some transports copy them only when they are pulled.
        """

    def pull(self, delivery: Delivery, into: Into) -> "Future[Moved]":
        """Reader side: copy the announced piece's blocks into ours, in order or cut anew, and verify them. What is cut
        anew is verified before.

        Fails with CorruptPiece (after reading twice), LeaseExpired (the source gave a block to another holder
        meanwhile) or TransferFailed: then only `into` holds garbage. Cancelling it before it has begun leaves `into` as
        it was. Pulling twice is harmless.
        """

    def withdraw(self, ticket_id: TicketId) -> None:
        """Source side: nothing of this ticket is offered any more; frees what the transport keeps for it.

        To be called once the ticket's offers are done; from then on the blocks may have new holders. Unknown tickets
        change nothing.
        """

    def tell(self, inbox: str, message: Returned) -> None:
        """Best effort, never blocks, never raises: the source's lease covers a message that is lost."""

    def living(self) -> int:
        """Objects of the transport that still keep offered bytes, for the ledger dump."""


def read(pool: Blocks, piece: Piece, blocks: Sequence[BlockId]) -> tuple[Piece, Bytes]:
    """The bytes of an offer, [n, B] u8, and the piece with its checksums."""
    data = pool.gather(blocks)
    return replace(piece, checksums=checksums(piece.ticket_id, piece.blocks, data)), data


def parts(piece: Piece, blocks: Sequence[BlockId], most: int) -> Iterator[tuple[Piece, Sequence[BlockId]]]:
    """The piece as pieces of at most so many blocks, at least one. What ends it, only the last one says."""
    most = max(1, most)
    for at in range(0, max(1, len(blocks)), most):
        over = at + most >= len(blocks)
        part = replace(
            piece,
            blocks=piece.blocks[at : at + most],
            last=piece.last and over,
            first_token=piece.first_token if over else None,
        )
        yield part, blocks[at : at + most]


def write_verified(pool: Blocks, piece: Piece, data: Bytes, into: Into) -> int:
    """Gives how many bytes. Raises CorruptPiece, and then has written nothing."""
    bad = bad_blocks(piece.ticket_id, piece.blocks, data, piece.checksums)
    if bad:
        raise CorruptPiece(f"{len(bad)} of {len(piece.blocks)} KV blocks arrived damaged (first: {bad[0]})")
    if isinstance(into, Recut):
        return write_recut(pool, piece, range(len(piece.blocks)), data, into)
    if into:
        pool.scatter(into, data)
    return data.nbytes


def size_of(into: Into) -> int:
    """How many of our blocks are written, wholly or in part."""
    return len(into.table) if isinstance(into, Recut) else len(into)


def moved(transport: str, num_bytes: int, num_blocks: int, start_ns: int) -> Moved:
    return Moved(transport=transport, num_bytes=num_bytes, num_blocks=num_blocks, start_ns=start_ns, end_ns=time_ns())
