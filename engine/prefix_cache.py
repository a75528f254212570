"""Finds the blocks that hold a prompt's beginning already, and those that will soon."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from ..core.blocks import block_keys, root_key
from ..core.ids import BlockId, BlockKey
from .ledger import Ledger

_MOST_PINNED = 0.5  # of the pool


class PrefixCache:
    """Block key -> block, over the ledger's keys. Tokens are compared too: a wrong hit would answer another's text.

    Beside full blocks it knows what no key names: *pending* blocks, which a live sequence is about to compute or to
    land, and *tails*, the partial last blocks of live sequences' prompts. One thread owns it, as it owns the ledger.
    """

    def __init__(self, ledger: Ledger, block_tokens: int, fingerprint: str) -> None:
        """fingerprint: of model and KV dtype. Raises ValueError unless block_tokens is a multiple of 16."""
        block_keys((), block_tokens, root_key(fingerprint))
        self._ledger = ledger
        self._block_tokens = block_tokens
        self._fingerprint = fingerprint
        self._tokens: dict[BlockId, tuple[int, ...]] = {}  # of blocks that have, or had, a key; so bounded by the pool
        self._pending: Counter[BlockKey] = Counter()
        self._tails: dict[tuple[BlockKey, tuple[int, ...]], list[BlockId]] = {}
        self._pins: dict[tuple[str, tuple[int, ...]], list[BlockId]] = {}

    def root(self, salt: str = "") -> BlockKey:
        """The key before the first block, for a tenant's salt."""
        return root_key(self._fingerprint, salt)

    def prompt_keys(self, tokens: Sequence[int], salt: str = "") -> list[BlockKey]:
        """Keys of all full blocks of `tokens`, in order: made once, to be given to `match` and `awaited`."""
        return block_keys(tokens, self._block_tokens, self.root(salt))

    def match(
        self,
        tokens: Sequence[int],
        salt: str = "",
        limit: int | None = None,
        keys: Sequence[BlockKey] | None = None,
    ) -> tuple[list[BlockId], int]:
        """(blocks, how many tokens they hold) of the longest known beginning of `tokens`, held for the caller.

        limit: at most that many tokens; len(tokens) - 1 leaves one to compute logits from. keys: prompt_keys of the
        tokens, where the caller has them.
        """
        usable = len(tokens) if limit is None else min(len(tokens), limit)
        usable -= usable % self._block_tokens
        if keys is None:
            keys = self.prompt_keys(tokens[:usable], salt)
        found: list[BlockId] = []
        for key in keys[: usable // self._block_tokens]:
            block = self._ledger.lookup(key)
            start = len(found) * self._block_tokens
            if block is None or self._tokens[block] != tuple(tokens[start : start + self._block_tokens]):
                break
            found.append(block)
        self._ledger.hold(found)
        return found, len(found) * self._block_tokens

    def insert(
        self, tokens: Sequence[int], blocks: Sequence[BlockId], parent: BlockKey | None = None, salt: str = ""
    ) -> list[BlockKey]:
        """Make the full blocks of `tokens`, which the caller holds and whose KV is computed, known. Returns their keys.

        parent: the key of the block before the first, None at a beginning; so a growing sequence hashes no block twice.
        Where a block of the same key is known already, that one stays the known one.
        """
        size = self._block_tokens
        keys = block_keys(tokens, size, self.root(salt) if parent is None else parent)
        for index, key in enumerate(keys):
            if self._ledger.set_key(blocks[index], key):
                self._tokens[blocks[index]] = tuple(tokens[index * size : (index + 1) * size])
        return keys

    def distrust(self, blocks: Sequence[BlockId]) -> None:
        """These held blocks may hold something else than their keys say: nobody finds them any more, pinned or not."""
        self._ledger.forget(blocks)
        wrong = set(blocks)
        for salt, tokens in [pin for pin, held in self._pins.items() if not wrong.isdisjoint(held)]:
            self.unpin(tokens, salt)

    # Blocks that are on their way

    def expect(self, keys: Iterable[BlockKey]) -> None:
        """A live sequence is about to compute or to land the blocks of these keys."""
        self._pending.update(keys)

    def unexpect(self, keys: Iterable[BlockKey]) -> None:
        """They have come, or will not. Once for each `expect`."""
        for key in keys:
            self._pending[key] -= 1
            if not self._pending[key]:
                del self._pending[key]

    def awaited(self, keys: Sequence[BlockKey]) -> bool:
        """The first of a prompt's blocks that is not known is on its way: waiting for it saves work."""
        if not self._pending:
            return False
        for key in keys:
            if self._ledger.lookup(key) is None:
                return key in self._pending
        return False

    # Partial last blocks of prompts

    def lend_tail(self, parent: BlockKey, tokens: Sequence[int], block: BlockId) -> None:
        """The block holds these tokens behind its parent, and its owner writes behind them alone, until `end_tail`."""
        self._tails.setdefault((parent, tuple(tokens)), []).append(block)

    def end_tail(self, parent: BlockKey, tokens: Sequence[int], block: BlockId) -> None:
        """Before the owner gives the block back. Who has borrowed it goes on holding it."""
        owners = self._tails[parent, tuple(tokens)]
        owners.remove(block)
        if not owners:
            del self._tails[parent, tuple(tokens)]

    def match_tail(self, parent: BlockKey, tokens: Sequence[int]) -> BlockId | None:
        """A block that holds just these tokens, held for the caller, who copies it before writing; None: there is none.

        Told apart by the tokens themselves, and by the key of all that comes before them.
        """
        owners = self._tails.get((parent, tuple(tokens)))
        if not owners:
            return None
        self._ledger.hold(owners[:1])
        return owners[0]

    # Beginnings that stay

    def pin(self, tokens: Sequence[int], salt: str = "") -> int:
        """Hold what is known of a beginning, so that it is not evicted, but by `unpin_oldest`; returns how many tokens.
        Again: no more.

        Raises ValueError where more than half of the pool would be pinned; then nothing has changed.
        """
        blocks, count = self.match(tokens, salt)
        pinned = set(blocks).union(*self._pins.values())
        if len(pinned) > self._ledger.num_blocks * _MOST_PINNED:
            self._ledger.release(reversed(blocks))
            raise ValueError(f"{len(pinned)} of {self._ledger.num_blocks} blocks would be pinned, more than half")
        self.unpin(tokens, salt)
        if blocks:
            self._pins[salt, tuple(tokens)] = blocks
        return count

    def unpin(self, tokens: Sequence[int], salt: str = "") -> None:
        """Let a beginning go. One that is not pinned: nothing."""
        self._ledger.release(reversed(self._pins.pop((salt, tuple(tokens)), [])))

    def unpin_oldest(self) -> bool:
        """Let the beginning go that was pinned first. False: none is pinned."""
        if not self._pins:
            return False
        salt, tokens = next(iter(self._pins))
        self.unpin(tokens, salt)
        return True

    def pins(self) -> Collection[list[BlockId]]:
        """The blocks of each pinned beginning, which hold them like sequences do."""
        return self._pins.values()
