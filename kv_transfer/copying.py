"""Blocks copied into a pool in host memory, run by run, and looked at where they have arrived."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ..core.ids import TicketId
from ..core.tickets import Piece
from .integrity import Bytes, RowSums, checksums

_CHUNK_BYTES = 1 << 18  # copied, then checked while it is in the cache


def copy_rows(
    piece: Piece, at: Sequence[int], rows: Bytes, named: Sequence[int], host: Bytes, into: Sequence[int]
) -> list[int]:
    """host[into[j]] = rows[named[j]], which is the piece's block at position at[j]; neighbours go as one.

    rows [n, B] u8, host [N, B] u8, nobody else's at `into`. Gives the positions of those that do not have their
    checksums there. Where the piece has none, all are taken to be good.
    """
    if not at:
        return []
    sums = RowSums(host, len(at)) if piece.checksums else None
    most = max(1, _CHUNK_BYTES // host.shape[1]) if sums is not None else len(at)
    for start, stop in runs(most, named, into):
        source, target, count = named[start], into[start], stop - start
        np.copyto(host[target : target + count], rows[source : source + count])
        if sums is not None:
            sums.take(start, target, count)
    if sums is None:
        return []
    found = sums.checksums(piece.ticket_id, [piece.blocks[i] for i in at], into)
    return [i for i, one in zip(at, found, strict=True) if one != piece.checksums[i]]


def checksums_of(ticket_id: TicketId, indices: Sequence[int], host: Bytes, blocks: Sequence[int]) -> tuple[int, ...]:
    """Of these blocks of a pool [N, B] u8, without a copy."""
    if not blocks:
        return ()
    sums = RowSums(host, len(blocks))
    for start, stop in runs(max(1, _CHUNK_BYTES // host.shape[1]), blocks):
        sums.take(start, blocks[start], stop - start)
    return sums.checksums(ticket_id, indices, blocks)


def bad_positions(piece: Piece, at: Sequence[int], blocks: Bytes) -> list[int]:
    """blocks [n, B] u8: the piece's at these positions. Which of the positions do not have their checksums."""
    if not piece.checksums:
        return []
    found = checksums(piece.ticket_id, [piece.blocks[i] for i in at], blocks)
    return [i for i, one in zip(at, found, strict=True) if one != piece.checksums[i]]


def runs(most: int, *tables: Sequence[int]) -> list[tuple[int, int]]:
    """Positions [start, stop) that follow each other in every one of these tables of blocks, at most so many together.

    Between them they are all positions, in order.
    """
    count = len(tables[0])
    if not count:
        return []
    ends = np.zeros(count - 1, dtype=bool)
    for table in tables:
        ends |= np.diff(np.asarray(table, dtype=np.int64)) != 1
    bounds = [0, *(np.flatnonzero(ends) + 1).tolist(), count]
    return [(at, min(at + most, stop)) for start, stop in pairwise(bounds) for at in range(start, stop, most)]
