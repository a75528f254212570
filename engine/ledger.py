"""Who has each block of the KV pool."""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence

from ..core.ids import BlockId, BlockKey


class OutOfBlocks(Exception):
    """Fewer blocks are free or evictable than were asked for. The scheduler waits or refuses."""


class Ledger:
    """Sole owner of each KV block's state: free, cached or held; always exactly one.

    Held: it has holders, each of which releases it once; loans are holders like any other. Cached: no holder, but a
    key, so its content may be wanted again; evicted when blocks are needed, the longest unused first. Free: neither.
    """

    def __init__(self, num_blocks: int, renew: Callable[[Sequence[BlockId]], None] | None = None) -> None:
        """All blocks free. renew: told of blocks before their new holder is, so that whoever still reads them from
        elsewhere notices. Raises ValueError unless num_blocks is positive."""
        if num_blocks < 1:
            raise ValueError(f"a ledger needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._renew = renew
        self._free = deque(BlockId(index) for index in range(num_blocks))
        self._cached: OrderedDict[BlockId, None] = OrderedDict()  # longest unused first
        self._holders: dict[BlockId, int] = {}
        self._keys: dict[BlockId, BlockKey] = {}
        self._by_key: dict[BlockKey, BlockId] = {}

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def cached_count(self) -> int:
        return len(self._cached)

    @property
    def held_count(self) -> int:
        return len(self._holders)

    @property
    def available(self) -> int:
        """How many `allocate` could give now."""
        return len(self._free) + len(self._cached)

    def holders(self, block: BlockId) -> int:
        return self._holders.get(block, 0)

    def allocate(self, count: int) -> list[BlockId]:
        """Blocks of undefined content, each with one holder. All or, raising OutOfBlocks, none."""
        if count > self.available:
            raise OutOfBlocks(f"{count} blocks wanted, {self.available} available")
        blocks = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        if self._renew is not None:
            self._renew(blocks)
        return blocks

    def hold(self, blocks: Iterable[BlockId]) -> None:
        """One holder more each, of cached or held blocks."""
        for block in blocks:
            if block not in self._holders:
                del self._cached[block]
            self._holders[block] = self._holders.get(block, 0) + 1

    def release(self, blocks: Iterable[BlockId]) -> None:
        """One holder fewer each. A block without holders is cached while it has a key, else free.

        Those released first are evicted first: give a sequence's blocks last to first, so that its beginning, which
        other sequences may share, stays longest.
        """
        for block in blocks:
            self._holders[block] -= 1
            if self._holders[block] == 0:
                del self._holders[block]
                if block in self._keys:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def set_key(self, block: BlockId, key: BlockKey) -> bool:
        """Name what a held block holds. False, and nothing changed, when another block has this key already."""
        assert block in self._holders, f"block {block} is not held"
        assert self._keys.get(block, key) == key, f"block {block} has another key"
        if self._by_key.setdefault(key, block) != block:
            return False
        self._keys[block] = key
        return True

    def forget(self, blocks: Iterable[BlockId]) -> None:
        """What these held blocks hold is not what their keys say: nobody finds them by these any more."""
        for block in blocks:
            assert block in self._holders, f"block {block} is not held"
            key = self._keys.pop(block, None)
            if key is not None:
                del self._by_key[key]

    def claim(self, block: BlockId) -> bool:
        """Its only holder means to write anywhere in it, over what others wrote; True: it may, as no key says what it
        holds. Then it counts as given to a new holder: whoever was lent it before and still reads notices."""
        if self._holders.get(block) != 1 or block in self._keys:
            return False
        if self._renew is not None:
            self._renew([block])
        return True

    def lookup(self, key: BlockKey) -> BlockId | None:
        """The block of this key, held or cached; hold it before anything else is allocated."""
        return self._by_key.get(key)

    def drop_cached(self) -> int:
        """Free all cached blocks; returns how many. Held blocks keep their keys."""
        count = len(self._cached)
        self._free.extend(self._evict() for _ in range(count))
        return count

    def violations(self) -> list[str]:
        """What is wrong, in words; empty unless there is a bug. Costs a look at every block."""
        found = []
        seen = Counter([*self._free, *self._cached, *self._holders])
        for block in range(self.num_blocks):
            if seen.pop(BlockId(block), 0) != 1:
                found.append(f"block {block} is not in exactly one state")
        found += [f"block {block} is not of this pool" for block in seen]
        found += [f"block {block} has {count} holders" for block, count in self._holders.items() if count < 1]
        found += [f"cached block {block} has no key" for block in self._cached if block not in self._keys]
        found += [f"free block {block} has a key" for block in self._free if block in self._keys]
        if {key: block for block, key in self._keys.items()} != self._by_key:
            found.append("keys and blocks do not match")
        return found

    def check(self) -> None:
        """Raises AssertionError when there are violations."""
        found = self.violations()
        assert not found, "; ".join(found)

    def _evict(self) -> BlockId:
        block, _ = self._cached.popitem(last=False)
        del self._by_key[self._keys.pop(block)]
        return block
