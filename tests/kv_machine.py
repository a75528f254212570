"""Ledger, prefix cache, holdings and swap space driven at random against a naive model, with real bytes in the blocks.

`python -m tests.kv_machine` takes 200,000 steps; the unit tests take some thousands.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from baton.core.ids import BlockId, BlockKey, SequenceId
from baton.core.request import Sampling
from baton.engine.holdings import Holdings
from baton.engine.ledger import Ledger, OutOfBlocks
from baton.engine.prefix_cache import PrefixCache
from baton.engine.sequence import Sequence
from baton.engine.swap import SwapSpace, SwapTicket

BLOCK_TOKENS = 16
SWAP_SLOTS = 9
_NAMES = ("_expected", "_lent", "_borrowers")  # of what holdings knows of sequences
STEPS = 0  # taken by all machines of this process


class WatchedLedger(Ledger):
    """A ledger, and beside it what it should be, kept with plain lists: each answer is compared."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.free = list(range(num_blocks))
        self.cached: list[int] = []  # longest unused first
        self.held: Counter[int] = Counter()
        self.keys: dict[int, BlockKey] = {}

    def allocate(self, count: int) -> list[BlockId]:
        expected = (self.free + self.cached)[:count]
        if count > len(self.free) + len(self.cached):
            try:
                super().allocate(count)
            except OutOfBlocks:
                raise
            raise AssertionError("more blocks than there are")
        blocks = super().allocate(count)
        assert blocks == expected, "not the free ones first, then the longest unused"
        for block in expected:
            if block in self.cached:
                self.cached.remove(block)
                del self.keys[block]
            else:
                self.free.remove(block)
            self.held[block] = 1
        return blocks

    def hold(self, blocks: Iterable[BlockId]) -> None:
        blocks = list(blocks)
        super().hold(blocks)
        for block in blocks:
            if block in self.cached:
                self.cached.remove(block)
            self.held[block] += 1

    def release(self, blocks: Iterable[BlockId]) -> None:
        blocks = list(blocks)
        super().release(blocks)
        for block in blocks:
            self.held[block] -= 1
            if not self.held[block]:
                del self.held[block]
                (self.cached if block in self.keys else self.free).append(block)

    def set_key(self, block: BlockId, key: BlockKey) -> bool:
        known = key in self.keys.values() and self.keys.get(block) != key
        assert super().set_key(block, key) is not known
        if not known:
            self.keys[block] = key
        return not known

    def forget(self, blocks: Iterable[BlockId]) -> None:
        blocks = list(blocks)
        super().forget(blocks)
        for block in blocks:
            self.keys.pop(block, None)

    def lookup(self, key: BlockKey) -> BlockId | None:
        found = super().lookup(key)
        assert found == next((block for block, of in self.keys.items() if of == key), None)
        return found

    def drop_cached(self) -> int:
        self.free += self.cached
        for block in self.cached:
            del self.keys[block]
        self.cached.clear()
        return super().drop_cached()


def written(tokens: tuple[int, ...], salt: str) -> int:
    """What the KV of the last of these tokens is: it depends on all before it."""
    return int.from_bytes(blake2b(bytes(tokens) + salt.encode(), digest_size=7).digest())


def bytes_of(block: torch.Tensor) -> bytes:
    return bytes(block.view(torch.uint8).tolist())


class KvMachine(RuleBasedStateMachine):
    """Sequences over a few patterns of blocks, so that beginnings and tails collide all the time."""

    @initialize(num_blocks=st.integers(8, 20))
    def begin(self, num_blocks: int) -> None:
        self.ledger = WatchedLedger(num_blocks)
        self.cache = PrefixCache(self.ledger, BLOCK_TOKENS, "a model")
        self.pool = torch.zeros(num_blocks, BLOCK_TOKENS, dtype=torch.int64)
        self.holdings = Holdings(self.ledger, self.cache, BLOCK_TOKENS)
        self.swap = SwapSpace(SWAP_SLOTS, [self.pool.view(torch.uint8)])
        self.live: list[Sequence] = []
        self.away: dict[Sequence, tuple[SwapTicket | None, int]] = {}  # preempted: where its KV is, of how many tokens
        self.pins: set[tuple[str, tuple[int, ...]]] = set()
        self.started: dict[Sequence, int] = {}  # how many tokens each live one knew as it started
        self.alone: dict[Sequence, tuple[BlockKey, ...]] = {}  # keys of those kept apart, as they had become so
        self.matched: dict[Sequence, int] = {}  # blocks that each found as it started
        self.named: dict[BlockKey, bytes] = {}  # what the first block of each key held
        self.count = 0
        self.read: list[BlockId] = []  # blocks that were copied, held until the step that does it is over

    @precondition(lambda self: len(self.live) < 5)
    @rule(
        patterns=st.sampled_from([(), (0,), (0, 1), (0, 1, 2), (1,)]),
        tail=st.sampled_from([0, 1, 7, 7, 7, 15]),
        salt=st.sampled_from(["", "", "", "tenant"]),
        whole=st.booleans(),
        spare=st.integers(0, 3),
    )
    def start(self, patterns: tuple[int, ...], tail: int, salt: str, whole: bool, spare: int) -> None:
        prompt = (*(token for pattern in patterns for token in [pattern] * BLOCK_TOKENS), *([3] * tail))
        seq = Sequence(SequenceId(f"s/{self.count}"), prompt or (4,), Sampling(max_tokens=40), salt)
        self.count += 1
        self._start(seq, spare, whole_prompt=whole, borrow=True)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), whole=st.booleans())
    def start_a_twin(self, data: st.DataObject, whole: bool) -> None:
        """Another answer to the prompt of one that is here, as soon as that is computed."""
        owner = data.draw(st.sampled_from(self.live))
        if len(owner.prompt) % BLOCK_TOKENS == 0:
            return
        if owner.computed < len(owner.prompt) and self._own(owner):
            self._write(owner, len(owner.prompt))
        if owner.computed >= len(owner.prompt):
            twin = Sequence(SequenceId(f"s/{self.count}"), owner.prompt, owner.sampling, owner.salt)
            self.count += 1
            self._start(twin, 0, whole_prompt=whole, borrow=True)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.sampled_from([1, 5, 16, 64, 64]))
    def compute(self, data: st.DataObject, count: int) -> None:
        """Write the KV of some tokens more."""
        seq = data.draw(st.sampled_from(self.live))
        end = min(seq.computed + count, seq.length)
        if end > seq.computed and self._own(seq):
            self._write(seq, end)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 3))
    def append(self, data: st.DataObject, token: int) -> None:
        """One token of the answer, and a block for it where the last is full."""
        seq = data.draw(st.sampled_from(self.live))
        if seq.computed < seq.length or len(seq.tokens) == seq.sampling.max_tokens:
            return
        if seq.length == len(seq.blocks) * BLOCK_TOKENS:
            try:
                self.holdings.grow([seq])
            except OutOfBlocks:
                assert self.ledger.available == 0
                return
        seq.tokens.append(token)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live))
        self.live.remove(seq)
        self.holdings.release(seq)
        assert seq.blocks == []
        self.holdings.release(seq)  # again: nothing

    @precondition(lambda self: self.live)
    @rule(data=st.data(), keep=st.booleans())
    def preempt(self, data: st.DataObject, keep: bool) -> None:
        seq = data.draw(st.sampled_from(self.live))
        self.live.remove(seq)
        tokens = seq.computed
        blocks = seq.blocks[: -(-tokens // BLOCK_TOKENS)]
        free = self.swap.free_count
        ticket = self.swap.swap_out(blocks) if keep else None
        assert (ticket is not None) == (keep and 0 < len(blocks) <= free)
        self.holdings.release(seq)
        self.away[seq] = (ticket, tokens)

    @precondition(lambda self: self.away)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(list(self.away)))
        ticket, tokens = self.away[seq]
        known = self._start(seq, 0, whole_prompt=False, borrow=ticket is None)
        if known is None:
            return
        del self.away[seq]
        if ticket is not None:
            self.swap.swap_in(ticket, seq.blocks[: len(ticket.slots)], skip=known)
            self.holdings.advance(seq, max(tokens, seq.computed))

    @precondition(lambda self: self.away)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        ticket, _ = self.away.pop(data.draw(st.sampled_from(list(self.away))))
        if ticket is not None:
            self.swap.drop(ticket)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live))
        before = {block for blocks in self.cache.pins() for block in blocks}
        try:
            count = self.cache.pin(seq.prompt, seq.salt)
        except ValueError:
            assert len(before) + len(seq.prompt) // BLOCK_TOKENS > self.ledger.num_blocks / 2
            return
        self.pins.discard((seq.salt, seq.prompt))
        if count:
            self.pins.add((seq.salt, seq.prompt))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        salt, tokens = data.draw(st.sampled_from(sorted(self.pins)))
        self.pins.remove((salt, tokens))
        self.cache.unpin(tokens, salt)
        self.cache.unpin(tokens, salt)  # again: nothing

    @precondition(lambda self: self.read)
    @rule()
    def steps_are_over(self) -> None:
        self.holdings.copied(self.read)
        self.read = []

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        """A prompt is said to be there, maybe in a block that is borrowed still."""
        seq = data.draw(st.sampled_from(self.live))
        if seq.computed >= len(seq.prompt):
            self.holdings.advance(seq, seq.computed)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), draw=st.sampled_from([True, False, False]))
    def keep_apart(self, data: st.DataObject, draw: bool) -> None:
        """Its KV is rounded: what becomes known of it from now on would be wrong."""
        if not draw:
            return
        seq = data.draw(st.sampled_from(self.live))
        self.holdings.keep_apart(seq)
        self.alone[seq] = tuple(seq.keys)

    @invariant()
    def what_is_kept_apart_becomes_no_better_known(self) -> None:
        for seq in self.live:
            if seq.apart:
                assert len(seq.keys) <= max(len(self.alone[seq]), self.matched.get(seq, 0))
                assert seq not in self.holdings._lent
                assert not self.holdings._expected.get(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def distrust(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live))
        self.holdings.distrust(seq)
        assert not any(block in self.ledger.keys for block in seq.blocks)

    @rule()
    def drop_cached(self) -> None:
        assert self.ledger.drop_cached() >= 0
        assert self.ledger.cached_count == 0

    def _start(self, seq: Sequence, spare: int, *, whole_prompt: bool, borrow: bool) -> int | None:
        self._expect_awaited(seq, whole_prompt)
        available = self.ledger.available
        known = self.holdings.start(seq, spare, whole_prompt=whole_prompt, borrow=borrow)
        if known is None:
            assert available < self.holdings.blocks_for(seq.length) + spare
            assert seq.blocks == []
            return None
        assert len(seq.blocks) == self.holdings.blocks_for(seq.length)
        assert seq.computed <= seq.length - (not whole_prompt)
        assert self.ledger.available >= spare
        self.live.append(seq)
        self.started[seq] = seq.length
        self.matched[seq] = len(seq.keys)
        return known

    def _expect_awaited(self, seq: Sequence, whole_prompt: bool) -> None:
        """A sequence is to wait when another is about to compute the block that it lacks first."""
        tokens = seq.tokens_between(0, seq.length)
        usable = seq.length - (not whole_prompt)
        keys = self.cache.prompt_keys(tokens[:usable], seq.salt)
        alike = [other for other in self.live if not other.apart]
        pending = {key for other in alike for key in self._keys_of(other)[len(other.keys) :]}
        first = next((key for key in keys if key not in self.ledger.keys.values()), None)
        assert self.holdings.awaited(seq, whole_prompt=whole_prompt) == (first in pending)

    def _keys_of(self, seq: Sequence) -> list[BlockKey]:
        """Of the blocks that it said it would compute: those of what it knew as it started."""
        return self.cache.prompt_keys(seq.tokens_between(0, self.started[seq]), seq.salt)

    def _own(self, seq: Sequence) -> bool:
        """Copy a borrowed last block before it is written. False: no block is left for that."""
        if not self.holdings.borrows(seq):
            return True
        try:
            copy = self.holdings.own_last_block(seq)
        except OutOfBlocks:
            return False
        if copy is not None:
            source, target = copy
            self.pool[target] = self.pool[source]
            self.read.append(source)  # by a step under way: it stays held until that is over
        return True

    def _write(self, seq: Sequence, end: int) -> None:
        for position in range(seq.computed, end):
            block = seq.blocks[position // BLOCK_TOKENS]
            assert self.ledger.holders(block) == 1 or self._lent_only(seq, position)
            self.pool[block, position % BLOCK_TOKENS] = written(tuple(seq.tokens_between(0, position + 1)), seq.salt)
        self.holdings.advance(seq, end)

    def _lent_only(self, seq: Sequence, position: int) -> bool:
        """Who else holds the block reads the prompt's tail alone, which lies before."""
        return position >= len(seq.prompt) and position // BLOCK_TOKENS == len(seq.prompt) // BLOCK_TOKENS

    @invariant()
    def bytes_are_those_of_the_sequence(self) -> None:
        global STEPS  # noqa: PLW0603  # hypothesis makes many machines, and does not say how many steps they took
        STEPS += 1
        for seq in self.live:
            for position in range(seq.computed):
                found = int(self.pool[seq.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS])
                assert found == written(tuple(seq.tokens_between(0, position + 1)), seq.salt), (
                    seq.sequence_id,
                    position,
                )

    @invariant()
    def known_blocks_hold_what_their_key_says(self) -> None:
        for block, key in self.ledger.keys.items():
            assert self.named.setdefault(key, bytes_of(self.pool[block])) == bytes_of(self.pool[block])

    @invariant()
    def every_block_has_the_holders_it_should(self) -> None:
        self.ledger.check()
        ledger = self.ledger
        assert (ledger.free_count, ledger.cached_count) == (len(ledger.free), len(ledger.cached))
        claimed = Counter(block for seq in self.live for block in seq.blocks)
        claimed.update(block for blocks in self.cache.pins() for block in blocks)
        claimed.update(self.read)
        assert claimed == ledger.held
        assert all(ledger.holders(BlockId(block)) == claimed[block] for block in range(ledger.num_blocks))

    @invariant()
    def a_tail_is_lent_by_who_holds_it(self) -> None:
        assert all(tail.block in seq.blocks for seq, tail in self.holdings._lent.items())

    @invariant()
    def swap_slots_are_those_of_who_is_away(self) -> None:
        used = [slot for ticket, _ in self.away.values() if ticket for slot in ticket.slots]
        assert len(used) == len(set(used)) == SWAP_SLOTS - self.swap.free_count

    def teardown(self) -> None:
        """Nothing is left when all have gone."""
        if not hasattr(self, "ledger"):
            return
        for seq in self.live:
            self.holdings.release(seq)
        self.holdings.copied(self.read)
        for salt, tokens in list(self.pins):
            self.cache.unpin(tokens, salt)
        for ticket, _ in self.away.values():
            if ticket is not None:
                self.swap.drop(ticket)
        self.ledger.drop_cached()
        assert self.ledger.free_count == self.ledger.num_blocks
        assert self.swap.free_count == SWAP_SLOTS
        left = (self.cache._pending, self.cache._tails, *(getattr(self.holdings, name) for name in _NAMES))
        assert not any(left), left


def main(steps: int) -> None:
    begin, length = time.monotonic(), 100
    while steps > STEPS:
        limits = settings(
            max_examples=200,
            stateful_step_count=length,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(KvMachine, settings=limits)  # type: ignore[no-untyped-call]
        print(f"{STEPS} steps, {time.monotonic() - begin:.0f} s", flush=True)
    print("ok")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
