"""A prompt in blocks of two sizes: against sets of tokens."""

from itertools import pairwise, product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.ids import BlockId
from baton.kv_transfer.cuts import (
    Cut,
    Part,
    blocks_of,
    brought,
    completed,
    is_needed,
    next_source_parcel,
    source_blocks_for,
    tokens_of,
)
from baton.kv_transfer.plan import Parcel, next_parcel

SIZES = (16, 32, 64, 128)


@st.composite
def hand_overs(draw: st.DrawFn, sizes: tuple[int, ...] = (16, 32, 48, 64, 128)) -> tuple[Cut, set[int], list[int]]:
    """A prompt, the reader's wanted blocks and the ends of the source's chunks."""
    prompt = draw(st.integers(1, 700))
    cut = Cut(
        prompt_tokens=prompt, source_block=draw(st.sampled_from(sizes)), reader_block=draw(st.sampled_from(sizes))
    )
    wanted = draw(st.sets(st.integers(0, (prompt - 1) // cut.reader_block)))
    ends = draw(st.sets(st.integers(1, prompt), max_size=8))
    return cut, wanted, sorted(ends | {prompt})


def tokens_in(cut: Cut, blocks: set[int], size: int) -> set[int]:
    return {token for token in range(cut.prompt_tokens) if token // size in blocks}


def flat(runs: tuple[range, ...]) -> list[int]:
    return [token for run in runs for token in run]


def test_a_small_prompt() -> None:
    cut = Cut(prompt_tokens=150, source_block=64, reader_block=32)
    assert source_blocks_for(cut, {0, 2, 3, 4}) == (
        Part(0, (range(32),)),
        Part(1, (range(64),)),
        Part(2, (range(22),)),  # of the last block, what the prompt has
    )
    assert source_blocks_for(cut, {1, 4}) == (Part(0, (range(32, 64),)), Part(2, (range(22),)))
    back = Cut(prompt_tokens=150, source_block=32, reader_block=64)
    assert [part.index for part in source_blocks_for(back, {0, 2})] == [0, 1, 4]
    assert completed(back, {0, 2}, set(), {0}) == ()
    assert completed(back, {0, 2}, {0}, {1, 2, 3, 4}) == (0, 2)


def test_parts_of_one_block_lie_apart() -> None:
    cut = Cut(prompt_tokens=128, source_block=128, reader_block=16)
    assert source_blocks_for(cut, {0, 2, 3, 7}) == (Part(0, (range(16), range(32, 64), range(112, 128))),)


@pytest.mark.parametrize(("source", "reader"), list(product(SIZES, SIZES)))
def test_every_single_wanted_block_of_every_length(source: int, reader: int) -> None:
    for prompt in (1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 300):
        cut = Cut(prompt_tokens=prompt, source_block=source, reader_block=reader)
        for block in range(-(-prompt // reader)):
            parts = source_blocks_for(cut, (block,))
            tokens = [part.index * source + token for part in parts for token in flat(part.tokens)]
            assert tokens == list(range(block * reader, min((block + 1) * reader, prompt)))
            assert [part.index for part in parts] == sorted({token // source for token in tokens})


@given(hand_overs())
def test_the_source_blocks_hold_just_what_is_wanted(hand_over: tuple[Cut, set[int], list[int]]) -> None:
    cut, wanted, _ = hand_over
    parts = source_blocks_for(cut, wanted)
    tokens = [part.index * cut.source_block + token for part in parts for token in flat(part.tokens)]
    assert set(tokens) == tokens_in(cut, wanted, cut.reader_block)
    assert tokens == sorted(set(tokens))
    assert all(flat(part.tokens) and max(flat(part.tokens)) < cut.source_block for part in parts)
    assert [part.index for part in parts] == sorted({part.index for part in parts})


@given(hand_overs())
def test_chunk_by_chunk_every_wanted_token_comes_once_and_every_wanted_block_is_completed_once(
    hand_over: tuple[Cut, set[int], list[int]],
) -> None:
    cut, wanted, ends = hand_over
    table = [BlockId(1000 - index) for index in range(-(-cut.prompt_tokens // cut.source_block))]
    announced: set[int] = set()
    before = 0
    tokens: list[int] = []
    done: list[int] = []
    for computed in ends:
        parcel = next_source_parcel(cut, wanted, table, before, computed)
        before = computed
        assert parcel.blocks == tuple(table[index] for index in parcel.indices)
        come = flat(brought(cut, wanted, parcel.indices))
        assert all(token < computed for token in come)
        blocks = completed(cut, wanted, announced, parcel.indices)
        assert completed(cut, wanted, announced | set(parcel.indices), parcel.indices) == ()  # twice is as good as once
        tokens += come
        announced |= set(parcel.indices)
        done += blocks
        there = set(tokens)
        for block in wanted:
            assert (block in done) == (tokens_in(cut, {block}, cut.reader_block) <= there)
        for index in range(computed // cut.source_block):  # what is complete does not wait
            needed = bool(tokens_in(cut, {index}, cut.source_block) & tokens_in(cut, wanted, cut.reader_block))
            assert (index in announced) == is_needed(cut, wanted, index) == needed
    assert tokens == sorted(tokens_in(cut, wanted, cut.reader_block))
    assert sorted(done) == sorted(wanted)


@given(hand_overs(), st.sets(st.integers(0, 50)), st.randoms(use_true_random=False))
def test_pieces_in_any_order_and_with_strange_blocks_bring_nothing_else(
    hand_over: tuple[Cut, set[int], list[int]], strange: set[int], shuffler: Random
) -> None:
    cut, wanted, _ = hand_over
    wants = tokens_in(cut, wanted, cut.reader_block)
    came = flat(brought(cut, wanted, strange))
    assert came == sorted(tokens_in(cut, strange, cut.source_block) & wants)
    order = [part.index for part in source_blocks_for(cut, wanted)]
    shuffler.shuffle(order)
    arrived: set[int] = set()
    done: list[int] = []
    for index in order:
        done += completed(cut, wanted, arrived, {index})
        arrived.add(index)
    assert sorted(done) == sorted(wanted)


@given(hand_overs(sizes=(16, 64)))
def test_blocks_of_one_size_are_handed_over_as_before(hand_over: tuple[Cut, set[int], list[int]]) -> None:
    cut, wanted, ends = hand_over
    cut = Cut(prompt_tokens=cut.prompt_tokens, source_block=cut.reader_block, reader_block=cut.reader_block)
    table = [BlockId(7 + index) for index in range(50)]
    announced: set[int] = set()
    for before, computed in pairwise((0, *ends)):
        complete = len(table) if computed == cut.prompt_tokens else computed // cut.reader_block
        parcel = next_source_parcel(cut, wanted, table, before, computed)
        assert parcel == next_parcel(wanted, announced, table, complete)
        assert completed(cut, wanted, announced, parcel.indices) == parcel.indices
        announced |= set(parcel.indices)


def test_what_lies_beyond_the_prompt_is_nothing() -> None:
    cut = Cut(prompt_tokens=20, source_block=16, reader_block=16)
    assert tokens_of({1, 5}, 16, 20) == (range(16, 20),)
    assert source_blocks_for(cut, {2}) == ()
    assert next_source_parcel(cut, {2}, [], 0, 20) == Parcel((), ())
    assert not is_needed(cut, {2}, 2)
    assert completed(cut, {2}, set(), {2}) == ()
    assert blocks_of(range(0), 16) == range(0)
