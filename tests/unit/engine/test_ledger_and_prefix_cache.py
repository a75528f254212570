"""Ledger and prefix cache against a naive model of what they promise."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.core.generations import HEAD
from baton.core.ids import BlockId, BlockKey, SequenceId
from baton.core.request import Sampling
from baton.core.segment import Segment
from baton.engine.engine import Engine
from baton.engine.holdings import Holdings
from baton.engine.ledger import Ledger, OutOfBlocks
from baton.engine.prefix_cache import PrefixCache
from baton.engine.sequence import Sequence

BLOCK, POOL = 16, 8


class Storm(RuleBasedStateMachine):
    """Sequences come, share, and go. The model: who holds what, and what each known block holds, newest use last."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(POOL)
        self.cache = PrefixCache(self.ledger, BLOCK, "model")
        self.sequences: list[list[BlockId]] = []
        self.holders = dict.fromkeys(range(POOL), 0)
        self.known: dict[tuple[int, ...], int] = {}  # all tokens up to a block's end -> block
        self.idle: list[int] = []  # cached blocks, longest unused first

    @rule(letters=st.lists(st.integers(0, 1), min_size=1, max_size=4), extra=st.integers(0, 1))
    def start(self, letters: list[int], extra: int) -> None:
        while len(self.sequences) > 2:  # so that much is cached and evicted
            self._release(self.sequences.pop(0))
        tokens = [letter for letter in letters for _ in range(BLOCK)]
        expected: list[int] = []
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            if tuple(tokens[:end]) not in self.known:
                break
            expected.append(self.known[tuple(tokens[:end])])
        found, count = self.cache.match(tokens)
        assert (found, count) == (expected, len(expected) * BLOCK)
        for block in found:
            self._hold(block)
        missing = len(letters) - len(found) + extra
        if missing > self.holders_free():
            with pytest.raises(OutOfBlocks):
                self.ledger.allocate(missing)
            self._release(found)
            return
        fresh = self._allocate(missing)
        self._insert(tokens, found + fresh)
        self.sequences.append(found + fresh)

    @rule(letters=st.lists(st.integers(0, 1), min_size=1, max_size=2))
    def start_at_the_same_time_as_another(self, letters: list[int]) -> None:
        """It found nothing cached, since the other was not yet computed; now both insert the same."""
        tokens = [letter for letter in letters for _ in range(BLOCK)]
        if len(letters) <= self.holders_free():
            blocks = self._allocate(len(letters))
            self._insert(tokens, blocks)
            self.sequences.append(blocks)

    def _allocate(self, missing: int) -> list[BlockId]:
        fresh = self.ledger.allocate(missing)
        unknown = POOL - len(set(self.known.values()) | {b for b, n in self.holders.items() if n})
        for block in self.idle[: max(0, missing - unknown)]:  # the longest unused are evicted, and only those needed
            assert block in fresh
            self.known = {prefix: known for prefix, known in self.known.items() if known != block}
        for block in fresh:
            assert self.holders[block] == 0
            assert block not in self.known.values()
            self._hold(block)
        return fresh

    def _insert(self, tokens: list[int], blocks: list[BlockId]) -> None:
        self.cache.insert(tokens, blocks)
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            self.known.setdefault(tuple(tokens[:end]), blocks[end // BLOCK - 1])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self._release(self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1))))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def lend(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.sequences))
        self.ledger.hold(blocks)
        for block in blocks:
            self._hold(block)
        self.sequences.append(list(blocks))

    @rule()
    def drop_cached(self) -> None:
        assert self.ledger.drop_cached() == len(self.idle)
        self.known = {prefix: block for prefix, block in self.known.items() if block not in self.idle}
        self.idle = []

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        self.ledger.check()
        assert [self.ledger.holders(BlockId(block)) for block in range(POOL)] == list(self.holders.values())
        assert self.ledger.cached_count == len(self.idle)
        assert self.ledger.free_count + self.ledger.cached_count + self.ledger.held_count == POOL

    def teardown(self) -> None:
        while self.sequences:
            self._release(self.sequences.pop())
        assert self.ledger.available == POOL

    def holders_free(self) -> int:
        return sum(count == 0 for count in self.holders.values())

    def _hold(self, block: BlockId) -> None:
        self.holders[block] += 1
        if block in self.idle:
            self.idle.remove(block)

    def _release(self, blocks: list[BlockId]) -> None:
        self.ledger.release(reversed(blocks))
        for block in reversed(blocks):
            self.holders[block] -= 1
            if self.holders[block] == 0 and block in self.known.values():
                self.idle.append(block)


Storm.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestStorm = Storm.TestCase


def test_a_block_whose_tokens_differ_is_no_hit_even_under_the_same_key() -> None:
    ledger = Ledger(4)
    cache = PrefixCache(ledger, BLOCK, "model")
    blocks = ledger.allocate(1)
    (key,) = cache.insert(range(16), blocks)
    cache._tokens[blocks[0]] = tuple(range(1, 17))  # as if another text had the same hash
    assert ledger.lookup(key) == blocks[0]
    assert cache.match(range(16)) == ([], 0)


def test_another_tenants_salt_is_another_prefix() -> None:
    ledger = Ledger(4)
    cache = PrefixCache(ledger, BLOCK, "model")
    cache.insert(range(16), ledger.allocate(1), salt="one")
    assert cache.match(list(range(16)), salt="two") == ([], 0)
    assert cache.match(list(range(16)), salt="one")[1] == 16


def test_a_limit_leaves_a_token_to_compute() -> None:
    ledger = Ledger(4)
    cache = PrefixCache(ledger, BLOCK, "model")
    cache.insert(list(range(32)), ledger.allocate(2))
    assert cache.match(list(range(32)), limit=31)[1] == 16
    assert cache.match(list(range(32)))[1] == 32


def test_blocks_inserted_piece_by_piece_have_the_keys_of_the_whole() -> None:
    tokens = list(range(70))
    whole = Ledger(8)
    expected = PrefixCache(whole, BLOCK, "model").insert(tokens, whole.allocate(5))
    ledger = Ledger(8)
    cache, blocks = PrefixCache(ledger, BLOCK, "model"), ledger.allocate(5)
    keys: list[BlockKey] = []
    for end in (20, 40, 70):
        known = len(keys)
        keys += cache.insert(tokens[known * BLOCK : end], blocks[known:], keys[-1] if keys else None)
    assert keys == expected


def test_releasing_a_block_that_nobody_holds_is_noticed() -> None:
    ledger = Ledger(2)
    with pytest.raises(KeyError):
        ledger.release([BlockId(0)])


def test_an_impossible_allocation_takes_nothing() -> None:
    ledger = Ledger(2)
    with pytest.raises(OutOfBlocks):
        ledger.allocate(3)
    assert ledger.free_count == 2
    ledger.check()


def test_violations_name_a_block_in_two_states() -> None:
    ledger = Ledger(2)
    ledger.allocate(1)
    ledger._free.append(BlockId(0))
    assert ledger.violations() == ["block 0 is not in exactly one state"]


def test_whoever_takes_a_block_to_write_in_it_gives_it_a_new_word() -> None:
    renewed: list[BlockId] = []
    ledger = Ledger(3, renewed.extend)
    shared, keyed, own = ledger.allocate(3)
    assert renewed == [shared, keyed, own]
    ledger.hold([shared])
    ledger.set_key(keyed, BlockKey(b"key"))
    assert [ledger.claim(block) for block in (shared, keyed, own)] == [False, False, True]
    assert renewed[3:] == [own]


def test_a_borrowed_last_block_that_is_written_in_place_has_a_new_word() -> None:
    renewed: list[BlockId] = []
    ledger = Ledger(8, renewed.extend)
    holdings = Holdings(ledger, PrefixCache(ledger, BLOCK, "m"), BLOCK)
    length = BLOCK + 4
    owner, borrower = (Sequence(SequenceId(name), tuple(range(length)), Sampling(max_tokens=4)) for name in "ab")
    holdings.start(owner, 0)
    holdings.advance(owner, length)
    tail = owner.blocks[-1]
    ledger.hold([tail])  # lent to a reader
    holdings.start(borrower, 0)
    assert borrower.blocks[-1] == tail
    holdings.release(owner)
    ledger.release([tail])  # the lease ends while the reader reads
    renewed.clear()
    assert holdings.own_last_block(borrower) is None
    assert renewed == [tail]
    holdings.release(borrower)
    ledger.check()


def test_blocks_that_an_engine_gives_away_have_new_words_for_whoever_maps_its_pool(
    checkpoint: Callable[..., Path],
) -> None:
    engine = Engine.build(checkpoint(), torch.float32, torch.device("cpu"), 1 << 20, shared=True)
    assert engine.generations is not None
    opened = Segment.open(engine.generations.address, writable=False)
    words = memoryview(opened.shared)[HEAD:].cast("Q")
    blocks = engine.ledger.allocate(3)
    assert [words[block] for block in blocks] == [1, 1, 1]
    engine.ledger.release(blocks)
    again = engine.ledger.allocate(engine.ledger.num_blocks)
    assert [words[block] for block in blocks] == [2, 2, 2]
    engine.ledger.release(again)
    engine.ledger.check()
    words.release()
    opened.close()
