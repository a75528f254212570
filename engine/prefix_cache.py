"""Finds the blocks that hold a prompt's beginning already."""

from collections.abc import Sequence

from ..core.blocks import block_keys, root_key
from ..core.ids import BlockId, BlockKey
from .ledger import Ledger


class PrefixCache:
    """Block key -> block, over the ledger's keys. Tokens are compared too: a wrong hit would answer another's text."""

    def __init__(self, ledger: Ledger, block_tokens: int, fingerprint: str) -> None:
        """fingerprint: of model and KV dtype. Raises ValueError unless block_tokens is a multiple of 16."""
        block_keys((), block_tokens, root_key(fingerprint))
        self._ledger = ledger
        self._block_tokens = block_tokens
        self._fingerprint = fingerprint
        self._tokens: dict[BlockId, tuple[int, ...]] = {}  # of blocks that have, or had, a key; so bounded by the pool

    def root(self, salt: str = "") -> BlockKey:
        """The key before the first block, for a tenant's salt."""
        return root_key(self._fingerprint, salt)

    def match(self, tokens: Sequence[int], salt: str = "", limit: int | None = None) -> tuple[list[BlockId], int]:
        """(blocks, how many tokens they hold) of the longest known beginning of `tokens`, held for the caller.

        limit: at most that many tokens; len(tokens) - 1 leaves one to compute logits from.
        """
        usable = len(tokens) if limit is None else min(len(tokens), limit)
        usable -= usable % self._block_tokens
        found: list[BlockId] = []
        for key in block_keys(tokens[:usable], self._block_tokens, self.root(salt)):
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
        keys = block_keys(tokens, self._block_tokens, self.root(salt) if parent is None else parent)
        for index, (key, block) in enumerate(zip(keys, blocks, strict=False)):
            if self._ledger.set_key(block, key):
                start = index * self._block_tokens
                self._tokens[block] = tuple(tokens[start : start + self._block_tokens])
        return keys
