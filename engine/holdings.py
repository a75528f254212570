"""Which blocks a sequence holds, from its start to its end. Asks the ledger and the prefix cache; decides nothing.

    start -> advance, advance, ... -> release        blocks of the prompt's known beginning are shared, the rest its own

A sequence writes its own blocks only, but for one case: the partial last block of a prompt may be another's, who has
the same prompt (answers to one request do). It is copied before the borrower's first write; its owner writes on behind
the prompt, where the borrower never reads.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from ..core.ids import BlockId, BlockKey
from .ledger import Ledger
from .prefix_cache import PrefixCache
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class _Tail:
    parent: BlockKey
    tokens: tuple[int, ...]
    block: BlockId


@dataclass(frozen=True, slots=True)
class _Keys:
    """Of all full blocks of a sequence that waits; made once, however often it tries to start."""

    length: int
    keys: list[BlockKey]


class Holdings:
    """One thread owns it, as it owns the ledger."""

    def __init__(self, ledger: Ledger, prefix_cache: PrefixCache, block_tokens: int) -> None:
        self._ledger = ledger
        self._prefix_cache = prefix_cache
        self._block_tokens = block_tokens
        self._keys: dict[Sequence, _Keys] = {}
        self._expected: dict[Sequence, list[BlockKey]] = {}  # that a sequence is about to compute or to land
        self._lent: dict[Sequence, _Tail] = {}
        self._borrowers: set[Sequence] = set()  # whose last block is another's

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold the KV of so many tokens."""
        return -(-tokens // self._block_tokens)

    def awaited(self, seq: Sequence, *, whole_prompt: bool = False) -> bool:
        """The block it lacks first is on its way already, by another sequence: it is cheaper to wait for it."""
        usable = seq.length - (not whole_prompt)
        keys = self._keys_of(seq)[: usable // self._block_tokens]
        return seq.sampling.prompt_logprobs is None and self._prefix_cache.awaited(keys)

    def start(self, seq: Sequence, spare: int, *, whole_prompt: bool = False, borrow: bool = True) -> int | None:
        """Give a sequence the cached beginning of what it knows, and blocks for all of it, leaving `spare` available.

        Returns how many of its blocks were known; None, with nothing changed, where blocks are short. At most all
        tokens but one are found, or, with whole_prompt, all: nothing is computed from a prompt that lands.
        """
        keys = self._keys_of(seq)
        blocks, computed = self._match(seq, keys, whole_prompt)
        known = len(blocks)
        gain = self._borrow_tail(seq, keys, blocks, computed, whole_prompt) if borrow else 0
        fresh = self.blocks_for(seq.length) - len(blocks)
        if fresh + spare + (gain > 0) > self._ledger.available:  # a borrower copies before its first write
            self._ledger.release(reversed(blocks))
            return None
        seq.blocks = blocks + self._ledger.allocate(fresh)
        seq.computed = computed + gain
        seq.keys = keys[:known]
        if gain:
            self._borrowers.add(seq)
        if not (seq.started or seq.tokens):
            seq.cached_tokens = seq.computed
        seq.started = True
        if not seq.apart:
            self._expected[seq] = keys[known:]
            self._prefix_cache.expect(keys[known:])
        self._keys.pop(seq, None)
        return known

    def grow(self, sequences: Seq[Sequence]) -> list[BlockId]:
        """A block more for each; gives them in order. All or, raising OutOfBlocks, none."""
        blocks = self._ledger.allocate(len(sequences))
        for seq, block in zip(sequences, blocks, strict=True):
            seq.blocks.append(block)
        return blocks

    def borrows(self, seq: Sequence) -> bool:
        """Its last block is another's: `own_last_block` comes before its next write."""
        return seq in self._borrowers

    def own_last_block(self, seq: Sequence) -> tuple[BlockId, BlockId] | None:
        """Before a borrower's first write: (from, to) where its last block has to be copied. What it is copied from is
        held until the copy is done and `copied` is told. Raises OutOfBlocks."""
        shared = seq.blocks[-1]
        if self._ledger.claim(shared):
            self._borrowers.discard(seq)
            return None  # whoever lent it is gone, and had not filled it
        (own,) = self._ledger.allocate(1)
        self._borrowers.discard(seq)
        seq.blocks[-1] = own
        return shared, own

    def copied(self, blocks: Seq[BlockId]) -> None:
        """Nobody reads these any more, of which `own_last_block` has had copies made."""
        self._ledger.release(blocks)

    def distrust(self, seq: Sequence) -> None:
        """Nobody else is to find its blocks, nor borrow its last: their KV may be wrong."""
        self._prefix_cache.distrust(seq.blocks)
        self._end_tail(seq)

    def keep_apart(self, seq: Sequence) -> None:
        """From now on nothing of it becomes known: nobody finds its blocks, nor waits for them, nor borrows its last.
        What it shares with others stays known."""
        seq.apart = True
        self._prefix_cache.unexpect(self._expected.pop(seq, []))
        self._end_tail(seq)

    def advance(self, seq: Sequence, computed: int) -> bool:
        """The KV of the first `computed` tokens is in the blocks; full ones become known to the prefix cache. Gives
        whether one of them was expected: somebody may wait for it."""
        seq.computed, arrived = computed, False
        if seq.apart:
            return False
        known = len(seq.keys)
        full = computed // self._block_tokens
        if full > known:
            fresh = seq.tokens_between(known * self._block_tokens, full * self._block_tokens)
            parent = seq.keys[-1] if known else None
            seq.keys += self._prefix_cache.insert(fresh, seq.blocks[known:full], parent, seq.salt)
            expected = self._expected.get(seq)
            if expected:
                arrived = True
                self._arrived(expected, full - known)
        if computed >= len(seq.prompt) and seq not in self._lent and seq not in self._borrowers:
            self._lend_tail(seq)  # only what is its own: a borrowed block goes once it is copied
        return arrived

    def release(self, seq: Sequence) -> None:
        """Take all blocks of a sequence back; the known ones stay cached. Again: nothing."""
        self._keys.pop(seq, None)
        self._borrowers.discard(seq)
        self._prefix_cache.unexpect(self._expected.pop(seq, []))
        self._end_tail(seq)
        self._ledger.release(reversed(seq.take_blocks()))

    def _keys_of(self, seq: Sequence) -> list[BlockKey]:
        found = self._keys.get(seq)
        if found is None or found.length != seq.length:
            tokens = seq.tokens_between(0, seq.length)
            found = _Keys(seq.length, self._prefix_cache.prompt_keys(tokens, seq.salt))
            self._keys[seq] = found
        return found.keys

    def _match(self, seq: Sequence, keys: Seq[BlockKey], whole_prompt: bool) -> tuple[list[BlockId], int]:
        if seq.sampling.prompt_logprobs is not None and not seq.tokens and not whole_prompt:
            return [], 0  # they come from computing the prompt
        limit = seq.length if whole_prompt else seq.length - 1
        return self._prefix_cache.match(seq.tokens_between(0, seq.length), seq.salt, limit, keys=keys)

    def _borrow_tail(
        self, seq: Sequence, keys: Seq[BlockKey], blocks: list[BlockId], computed: int, whole_prompt: bool
    ) -> int:
        """How many tokens more a borrowed partial last block brings; it is among the blocks then."""
        gain = len(seq.prompt) % self._block_tokens - (not whole_prompt)
        if seq.tokens or gain < 1 or computed != len(keys) * self._block_tokens:
            return 0
        if seq.sampling.prompt_logprobs is not None and not whole_prompt:
            return 0
        parent = keys[-1] if keys else self._prefix_cache.root(seq.salt)
        block = self._prefix_cache.match_tail(parent, seq.prompt[computed:])
        if block is None:
            return 0
        blocks.append(block)
        return gain

    def _lend_tail(self, seq: Sequence) -> None:
        full = len(seq.prompt) // self._block_tokens
        tokens = seq.prompt[full * self._block_tokens :]
        if not tokens or len(seq.keys) < full:
            return
        parent = seq.keys[full - 1] if full else self._prefix_cache.root(seq.salt)
        tail = self._lent[seq] = _Tail(parent, tokens, seq.blocks[full])
        self._prefix_cache.lend_tail(tail.parent, tail.tokens, tail.block)

    def _end_tail(self, seq: Sequence) -> None:
        tail = self._lent.pop(seq, None)
        if tail is not None:
            self._prefix_cache.end_tail(tail.parent, tail.tokens, tail.block)

    def _arrived(self, expected: list[BlockKey], count: int) -> None:
        self._prefix_cache.unexpect(expected[:count])
        del expected[:count]
