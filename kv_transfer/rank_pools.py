"""The pools of a worker's ranks as one: its blocks have all KV heads, so workers of different tp understand each other.

canonical block [L, 2, G, P, D]          rank 0's heads | rank 1's heads | ...
of rank r       [L, 2, G_r, P, D]        where there are more ranks than heads, several hold the same one
"""

from collections.abc import Sequence
from threading import Lock

import numpy as np
import torch

from ..core.ids import BlockId
from .integrity import Bytes
from .pool import BlockPool, Blocks


def whole_blocks(pools: Sequence[torch.Tensor], heads: Sequence[range]) -> Blocks:
    """pools: [N, L, 2, G_r, P, D] of each rank; heads: the KV heads in each. One alone is taken as it is."""
    return BlockPool(_as_bytes(pools[0])) if len(pools) == 1 else RankPools(pools, heads)


def host_ranks(pool: Blocks, num_heads: int) -> list[tuple[Bytes, range]] | None:
    """Each rank's memory, [N, B_r] u8, and which of all heads are in it. None: some of it is not in host memory."""
    if isinstance(pool, RankPools):
        return pool.hosts
    if isinstance(pool, BlockPool) and pool.host is not None:
        return [(pool.host, range(num_heads))]
    return None


class RankPools:
    """See `Blocks`. Rank 0 has every rank's pool mapped and moves all of them. Owns nothing.

    A head that several ranks hold is read from the first of them and written to all. That a step is over on rank 0 is
    enough: it has met the other ranks in the last layer, after they had written theirs.
    """

    def __init__(self, pools: Sequence[torch.Tensor], heads: Sequence[range]) -> None:
        """pools: [N, L, 2, G_r, P, D] of each rank, on one kind of device; heads: which of the G each holds."""
        _, layers, _, _, block_tokens, head_size = pools[0].shape
        assert len(pools) == len(heads), (len(pools), heads)
        for pool, held in zip(pools, heads, strict=True):
            shape = (len(pools[0]), layers, 2, len(held), block_tokens, head_size)
            assert pool.shape == shape, (pool.shape, shape)
        num_heads = max(held.stop for held in heads)
        assert {head for held in heads for head in held} == set(range(num_heads)), heads
        self.changing = Lock()
        self._pools = [BlockPool(_as_bytes(pool)) for pool in pools]
        self._heads = list(heads)
        self._readers = [at for at, held in enumerate(heads) if held not in heads[:at]]
        head_bytes = block_tokens * head_size * pools[0].element_size()
        self._shape = (layers * 2, num_heads, head_bytes)

    @property
    def block_bytes(self) -> int:
        return int(np.prod(self._shape))

    @property
    def hosts(self) -> list[tuple[Bytes, range]] | None:
        """Each rank's pool, [N, B_r] u8, and the heads in it, where all are in host memory."""
        found = [
            (pool.host, held) for pool, held in zip(self._pools, self._heads, strict=True) if pool.host is not None
        ]
        return found if len(found) == len(self._pools) else None

    def gather(self, blocks: Sequence[BlockId]) -> Bytes:
        whole = np.empty((len(blocks), *self._shape), dtype=np.uint8)
        for at in self._readers:
            held = self._heads[at]
            part = self._pools[at].gather(blocks)
            whole[:, :, held.start : held.stop] = part.reshape(len(blocks), self._shape[0], len(held), self._shape[2])
        return whole.reshape(len(blocks), self.block_bytes)

    def scatter(self, blocks: Sequence[BlockId], source: Bytes) -> None:
        assert source.shape == (len(blocks), self.block_bytes), (source.shape, len(blocks), self.block_bytes)
        whole = source.reshape(len(blocks), *self._shape)
        for pool, held in zip(self._pools, self._heads, strict=True):
            part = np.ascontiguousarray(whole[:, :, held.start : held.stop])
            pool.scatter(blocks, part.reshape(len(blocks), pool.block_bytes))


def _as_bytes(pool: torch.Tensor) -> torch.Tensor:
    return pool.view(len(pool), -1).view(torch.uint8)
