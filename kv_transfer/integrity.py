"""Checksums of KV blocks, one per block.

CRC-32 (IEEE 802.3, zlib's), started from the ticket and the block's index in the prompt, so that a right block in a
wrong place is as wrong as a damaged one. It guards against damage and mix-ups, not against an attacker.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..core.ids import TicketId

Bytes = npt.NDArray[np.uint8]


def checksum(ticket_id: TicketId, index: int, block: Bytes) -> int:
    """Of one block's bytes [B] u8, contiguous."""
    return zlib.crc32(block.data, zlib.crc32(f"{ticket_id}:{index}".encode()))


def checksums(ticket_id: TicketId, indices: Sequence[int], blocks: Bytes) -> tuple[int, ...]:
    """blocks [n, B] u8, contiguous, in the order of `indices`."""
    return tuple(checksum(ticket_id, index, blocks[i]) for i, index in enumerate(indices))


def bad_blocks(ticket_id: TicketId, indices: Sequence[int], blocks: Bytes, expected: Sequence[int]) -> list[int]:
    """Which of `indices` do not hold what was promised. A block too few or a checksum too few makes all of them bad."""
    if not len(indices) == len(blocks) == len(expected):
        return list(indices)
    found = checksums(ticket_id, indices, blocks)
    return [index for index, a, b in zip(indices, found, expected, strict=True) if a != b]
