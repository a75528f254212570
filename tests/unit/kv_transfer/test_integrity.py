from collections import Counter
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from baton.core.ids import TicketId
from baton.kv_transfer.integrity import bad_blocks, checksums

BLOCKS = np.arange(4 * 64, dtype=np.uint8).reshape(4, 64)
T = TicketId("t")


def weight(k: int) -> int:
    """The k-th output of splitmix64 from state 0, odd, in plain integers."""
    mask = 2**64 - 1
    z = (k + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31 | 1


def by_definition(ticket: str, index: int, block: bytes, row_words: int) -> int:
    words = [int.from_bytes(block[at : at + 8], "little") for at in range(0, len(block), 8)]
    rows = [words[at : at + row_words] for at in range(0, len(words), row_words)]
    sums = [sum(x * weight(k) for k, x in enumerate(row)) % 2**64 for row in rows]
    halves = [half for one in sums + [row[0] for row in rows] for half in (one % 2**32, one >> 32)]
    start = int.from_bytes(blake2b(ticket.encode(), digest_size=8).digest(), "little")
    return (sum(x * weight(k) for k, x in enumerate(halves)) + start + index * 0x9E3779B97F4A7C15) % 2**64


@pytest.mark.parametrize(("block_bytes", "row_words"), [(64, 8), (4096, 256), (12288, 256), (1000, 1)])
def test_it_is_what_its_definition_says(block_bytes: int, row_words: int) -> None:
    blocks = np.random.default_rng(block_bytes).integers(0, 256, (3, block_bytes), dtype=np.uint8)
    expected = tuple(by_definition("t", index, blocks[i].tobytes(), row_words) for i, index in enumerate((4, 0, 9)))
    assert checksums(T, (4, 0, 9), blocks) == expected


def test_what_was_sent_is_good() -> None:
    assert bad_blocks(T, (0, 1, 5, 6), BLOCKS, checksums(T, (0, 1, 5, 6), BLOCKS)) == []


def test_every_flipped_bit_is_found_in_its_block() -> None:
    sums = checksums(T, (0, 1, 5, 6), BLOCKS)
    for at in range(64):
        for bit in range(8):
            damaged = BLOCKS.copy()
            damaged[2, at] ^= 1 << bit
            assert bad_blocks(T, (0, 1, 5, 6), damaged, sums) == [5]


@given(st.data())
def test_the_same_bit_flipped_in_any_words_is_found(data: st.DataObject) -> None:
    """As by a broken line of a bus, the highest bits of words among them."""
    words = np.random.default_rng(1).integers(0, 2**64, (1, 2048), dtype=np.uint64)
    found = checksums(T, (0,), words.view(np.uint8))
    bit = data.draw(st.integers(0, 63))
    flipped = data.draw(st.sets(st.integers(0, 2047), min_size=1, max_size=40))
    per_row = Counter(at // 256 for at in flipped)
    # Else it may go unnoticed: see integrity.py.
    assume(bit < 32 or any(count % 2 for count in per_row.values()) or any(at % 256 == 0 for at in flipped))
    for at in flipped:
        words[0, at] ^= np.uint64(1 << bit)
    assert checksums(T, (0,), words.view(np.uint8)) != found


def test_all_signs_flipped_are_found() -> None:
    block = np.random.default_rng(2).standard_normal((1, 8192)).astype(np.float32)
    assert checksums(T, (0,), block.view(np.uint8)) != checksums(T, (0,), (-block).view(np.uint8))


def test_the_blind_spot_is_no_larger_than_said() -> None:
    """Two highest bits of a row vanish; with any other bit beside them they do not."""
    block = np.random.default_rng(2).integers(0, 2**64, (1, 2048), dtype=np.uint64)
    found = checksums(T, (0,), block.view(np.uint8))
    block[0, [3, 7]] ^= np.uint64(1 << 63)
    assert checksums(T, (0,), block.view(np.uint8)) == found
    for bit in range(63):
        block[0, 5] ^= np.uint64(1 << bit)
        assert checksums(T, (0,), block.view(np.uint8)) != found
        block[0, 5] ^= np.uint64(1 << bit)


def test_exchanged_rows_and_words_are_found() -> None:
    block = np.random.default_rng(2).integers(0, 2**64, (1, 2048), dtype=np.uint64)
    found = checksums(T, (0,), block.view(np.uint8))
    rows = block.reshape(8, 256)
    for other in (rows[np.arange(8) ^ 1], rows[:, np.arange(256) ^ 1]):
        assert checksums(T, (0,), np.ascontiguousarray(other).view(np.uint8).reshape(1, -1)) != found


def test_right_bytes_in_the_wrong_place_or_of_another_ticket_are_bad() -> None:
    same = np.zeros((2, 64), dtype=np.uint8)
    sums = checksums(T, (0, 1), same)
    assert bad_blocks(T, (1, 0), same, sums) == [1, 0]
    assert bad_blocks(TicketId("u"), (0, 1), same, sums) == [0, 1]


def test_too_few_blocks_or_checksums_make_all_bad() -> None:
    sums = checksums(T, (0, 1), BLOCKS[:2])
    assert bad_blocks(T, (0, 1), BLOCKS[:1], sums) == [0, 1]
    assert bad_blocks(T, (0, 1), BLOCKS[:2], sums[:1]) == [0, 1]


def test_a_source_that_makes_no_checksums_is_taken_at_its_word() -> None:
    assert bad_blocks(T, (0, 1), BLOCKS[:2], ()) == []
