"""Checksums of KV blocks, 64 bits for each, made where a block is read and checked where it has arrived.

A block is a table of 64-bit words x, 256 in a row. Each row r has a multilinear sum over fixed odd weights,

    s_r = w_0 x_r0 + w_1 x_r1 + ...   mod 2^64

and all s_r and all x_r0 together, as 32-bit words, one more sum of that kind. To it are added 64 bits of the ticket's
BLAKE2b and the block's index in the prompt times an odd number: a right block in a wrong place is as wrong as a damaged
one.

What it finds. Damage to one word of a row, always: an odd weight times a difference other than 0 is not 0. To several:
take the lowest bit t that differs in any of them; over weights drawn at random, one case in 2^(63 - t) goes unnoticed
(multilinear hashing; Lemire and Kaser, "Strongly universal string hashing is fast", 2014), in each damaged row by
itself. So bytes that are torn, stale, or of another block are found but for one case in 2^32 and less. The last sum is
over words of half its width and misses as many at most, exchanged rows among them. Our weights are drawn once, by
splitmix64, which is enough against damage that does not know them.

What it does not find. Of a row's highest bits, those of weight 2^63, its sum sees only whether an even number has
flipped, and of the few below them not much more. A broken line of a bus that flips them here and there is still found,
row by row, by all rows but one in 2^rows, and one that flips them everywhere by the words x_r0, which the last sum sees
as they are. But the highest bit flipped in an even number of words of a row, x_r0 not among them, and no other damage
in the whole block, is not noticed. All this guards against damage and mix-ups, not against an attacker.

Numpy takes the sums in one pass over what is in the cache, without the interpreter's lock and without a copy; so could
a GPU. Half as wide words would have no blind spot, and take twice the time.
"""

from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from math import gcd

import numpy as np
import numpy.typing as npt

from ..core.ids import TicketId

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

_ROW_WORDS = 256
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


class RowSums:
    """Of some blocks of a pool: taken block by block, while each is in the cache, then made checksums together."""

    def __init__(self, pool: Bytes, count: int) -> None:
        """pool [N, B] u8, its rows contiguous, B a multiple of 8. count: of blocks that are to be taken."""
        num_blocks, block_bytes = pool.shape
        self._row_words = gcd(block_bytes // 8, _ROW_WORDS)
        self._words = pool.view(np.uint64).reshape(num_blocks, -1, self._row_words)
        self._rows = self._words.shape[1]
        self._weights = _weights(self._row_words)
        self._sums = np.empty(count * self._rows, dtype=np.uint64)

    def take(self, at: int, block: int, count: int) -> None:
        """The at-th of those to be taken is this block; so many neighbours follow it."""
        words = self._words[block : block + count].reshape(-1, self._row_words)
        words.dot(self._weights, out=self._sums[at * self._rows : (at + count) * self._rows])

    def checksums(self, ticket_id: TicketId, indices: Sequence[int], blocks: Sequence[int]) -> tuple[int, ...]:
        """Of all that were taken, which were these blocks and have these indices in the prompt."""
        firsts = self._words[np.asarray(blocks, dtype=np.int64), :, 0]
        table = np.concatenate((self._sums.reshape(firsts.shape), firsts), axis=1)
        whole = table.view(np.uint32).dot(_weights(4 * self._rows)).tolist()
        start = int.from_bytes(blake2b(ticket_id.encode(), digest_size=8).digest(), "little")
        return tuple([(one + start + index * _GOLDEN) & _MASK for one, index in zip(whole, indices, strict=True)])


def checksums(ticket_id: TicketId, indices: Sequence[int], blocks: Bytes) -> tuple[int, ...]:
    """blocks [n, B] u8, contiguous, in the order of `indices`; B a multiple of 8."""
    if not len(blocks):
        return ()
    sums = RowSums(blocks, len(blocks))
    sums.take(0, 0, len(blocks))
    return sums.checksums(ticket_id, indices, range(len(blocks)))


def bad_blocks(ticket_id: TicketId, indices: Sequence[int], blocks: Bytes, expected: Sequence[int]) -> list[int]:
    """Which of `indices` do not hold what was promised. A block too few or a checksum too few makes all of them bad;
    no checksum at all says that the source makes none."""
    if not expected:
        return []
    if not len(indices) == len(blocks) == len(expected):
        return list(indices)
    found = checksums(ticket_id, indices, blocks)
    return [index for index, a, b in zip(indices, found, expected, strict=True) if a != b]


@cache
def _weights(count: int) -> Words:
    """The first outputs of splitmix64 from state 0, made odd."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray((z ^ (z >> np.uint64(31))) | np.uint64(1))
