from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
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
    words = [int.from_bytes(block[at : at + 4], "little") for at in range(0, len(block), 4)]
    sums = [
        sum(x * weight(k) for k, x in enumerate(words[at : at + row_words])) % 2**64
        for at in range(0, len(words), row_words)
    ]
    text = f"{ticket}:{index}:".encode() + b"".join(one.to_bytes(8, "little") for one in sums)
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


@pytest.mark.parametrize(("block_bytes", "row_words"), [(64, 16), (4096, 1024), (12288, 1024), (1000, 2)])
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
    """As by a broken line of a bus, top bits of words among them."""
    words = np.random.default_rng(1).integers(0, 2**64, (1, 2048), dtype=np.uint64)
    found = checksums(T, (0,), words.view(np.uint8))
    bit = data.draw(st.integers(0, 63))
    for at in data.draw(st.sets(st.integers(0, 2047), min_size=1, max_size=40)):
        words[0, at] ^= np.uint64(1 << bit)
    assert checksums(T, (0,), words.view(np.uint8)) != found


def test_all_signs_flipped_and_exchanged_rows_are_found() -> None:
    block = np.random.default_rng(2).standard_normal((1, 8192)).astype(np.float32)
    found = checksums(T, (0,), block.view(np.uint8))
    assert checksums(T, (0,), (-block).view(np.uint8)) != found
    rows = block.reshape(8, 1024)[[1, 0, 2, 3, 4, 5, 6, 7]].reshape(1, -1)
    assert checksums(T, (0,), np.ascontiguousarray(rows).view(np.uint8)) != found


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
