import numpy as np

from baton.core.ids import TicketId
from baton.kv_transfer.integrity import bad_blocks, checksums

BLOCKS = np.arange(4 * 64, dtype=np.uint8).reshape(4, 64)
T = TicketId("t")


def test_what_was_sent_is_good() -> None:
    assert bad_blocks(T, (0, 1, 5, 6), BLOCKS, checksums(T, (0, 1, 5, 6), BLOCKS)) == []


def test_one_flipped_bit_is_found_in_its_block() -> None:
    damaged = BLOCKS.copy()
    damaged[2, 17] ^= 8
    assert bad_blocks(T, (0, 1, 5, 6), damaged, checksums(T, (0, 1, 5, 6), BLOCKS)) == [5]


def test_right_bytes_in_the_wrong_place_or_of_another_ticket_are_bad() -> None:
    same = np.zeros((2, 64), dtype=np.uint8)
    sums = checksums(T, (0, 1), same)
    assert bad_blocks(T, (1, 0), same, sums) == [1, 0]
    assert bad_blocks(TicketId("u"), (0, 1), same, sums) == [0, 1]


def test_too_few_blocks_or_checksums_make_all_bad() -> None:
    sums = checksums(T, (0, 1), BLOCKS[:2])
    assert bad_blocks(T, (0, 1), BLOCKS[:1], sums) == [0, 1]
    assert bad_blocks(T, (0, 1), BLOCKS[:2], sums[:1]) == [0, 1]
