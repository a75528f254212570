"""Checksums of KV blocks, 64 bits for each, made where a block is read and checked where it has arrived.

A block's bytes are 32-bit words x, in rows of at most 1,024; each row has a multilinear sum over fixed odd 64-bit
weights,

    s = w_0 x_0 + w_1 x_1 + ...   mod 2^64

and the checksum is BLAKE2b-64 of a block's row sums, begun from the ticket and the block's index in the prompt: a right
block in a wrong place is as wrong as a damaged one.

What it finds. One damaged word, always: an odd weight times a difference other than 0 is not 0. Of any other damage to
a row, all but one case in 2^32: over weights drawn at random, sums of 32-bit words times 64-bit weights are strongly
universal (Lemire and Kaser, "Strongly universal string hashing is fast", 2014, where the family is MULTILINEAR); ours
are drawn once, by splitmix64, which is enough against damage that does not know them. Words must not be wider than half
the sum: one over 64-bit words would lose flipped sign bits whenever an even number of words had one. Damage that
exchanges rows, blocks or tickets changes what BLAKE2b sees. It guards against damage and mix-ups, not against an
attacker.

Numpy takes the row sums in one pass, without the interpreter's lock and with no more than a few rows widened at a time;
so could a GPU.
"""

from collections.abc import Sequence
from hashlib import blake2b
from math import gcd

import numpy as np
import numpy.typing as npt

from ..core.ids import TicketId

Bytes = npt.NDArray[np.uint8]

_ROW_WORDS = 1024


def checksums(ticket_id: TicketId, indices: Sequence[int], blocks: Bytes) -> tuple[int, ...]:
    """blocks [n, B] u8, contiguous, in the order of `indices`; B a multiple of 4."""
    if not len(blocks):
        return ()
    count, block_bytes = blocks.shape
    row_words = gcd(block_bytes // 4, _ROW_WORDS)
    words = blocks.reshape(-1).view(np.uint32).reshape(-1, row_words)
    # Widened by the few rows that lie in numpy's buffer, not as a whole.
    sums = np.einsum("rk,k->r", words, _WEIGHTS[:row_words], dtype=np.uint64, casting="unsafe")
    rows = sums.reshape(count, -1)
    return tuple(_bound(ticket_id, index, row.tobytes()) for index, row in zip(indices, rows, strict=True))


def bad_blocks(ticket_id: TicketId, indices: Sequence[int], blocks: Bytes, expected: Sequence[int]) -> list[int]:
    """Which of `indices` do not hold what was promised. A block too few or a checksum too few makes all of them bad;
    no checksum at all says that the source makes none."""
    if not expected:
        return []
    if not len(indices) == len(blocks) == len(expected):
        return list(indices)
    found = checksums(ticket_id, indices, blocks)
    return [index for index, a, b in zip(indices, found, expected, strict=True) if a != b]


def _bound(ticket_id: TicketId, index: int, row_sums: bytes) -> int:
    hashed = blake2b(f"{ticket_id}:{index}:".encode(), digest_size=8)
    hashed.update(row_sums)
    return int.from_bytes(hashed.digest(), "little")


def _weights(count: int) -> npt.NDArray[np.uint64]:
    """The outputs of splitmix64 from state 0, made odd."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray((z ^ (z >> np.uint64(31))) | np.uint64(1))


_WEIGHTS = _weights(_ROW_WORDS)
