"""A rank's end of a mapped transport, of any shape: the pools of all ranks in shared memory."""

from pathlib import Path
from typing import NamedTuple

import torch

from baton.core.generations import Generations
from baton.core.ids import BlockId, Epoch, WorkerId
from baton.engine.ledger import Ledger
from baton.engine.parallel.shared_pool import HostPoolHandle, SharedPool
from baton.kv_transfer.capability import RankPool, Site
from baton.kv_transfer.inbox import Inbox
from baton.kv_transfer.plan import Side
from baton.kv_transfer.rank_pools import whole_blocks
from baton.worker.lending import Identity

from .unit.kv_transfer.shapes import CANARY, DTYPES, a_side

BLOCKS, LAYERS, HEADS, SIZE = 24, 3, 2, 8


class Shape(NamedTuple):
    tp: int
    block_tokens: int
    dtype: str

    @property
    def side(self) -> Side:
        return a_side(self.tp, HEADS, range(LAYERS), self.block_tokens, self.dtype, SIZE)


class ShapedEnd:
    """A worker of any shape: the pools of its ranks in shared memory, a ledger over them, an inbox."""

    def __init__(self, name: str, shape: Shape, folder: Path) -> None:
        self.side, g = shape.side, shape.side.geometry
        self.made = [
            SharedPool.create(
                (BLOCKS, LAYERS, 2, len(heads), g.block_tokens, SIZE), DTYPES[g.dtype], torch.device("cpu")
            )
            for heads in self.side.rank_heads
        ]
        self.pools = [one.tensor for one in self.made]
        for pool in self.pools:
            pool.view(torch.uint8).fill_(CANARY)
        self.generations = Generations.create(BLOCKS)
        self.ledger = Ledger(BLOCKS, self.generations.renew)
        self.inbox = Inbox()
        self.identity = Identity(WorkerId(name), Epoch(1), name)
        handles = [one.handle for one in self.made]
        self.site = Site(
            worker_id=self.identity.worker_id,
            epoch=self.identity.epoch,
            address=name,
            inbox=self.inbox,
            geometry=g,
            pool=whole_blocks(self.pools, self.side.rank_heads),
            num_blocks=BLOCKS,
            pools=tuple(
                RankPool(handle.address, heads.start, len(heads))
                for handle, heads in zip(handles, self.side.rank_heads, strict=True)
                if isinstance(handle, HostPoolHandle)
            ),
            generations=self.generations,
            socket=folder / f"{name}.kv",
        )

    def allocate(self, tokens: int) -> list[BlockId]:
        """Blocks for so many tokens, not in order."""
        first = self.ledger.allocate(2)
        blocks = self.ledger.allocate(-(-tokens // self.side.geometry.block_tokens))
        self.ledger.release(first)
        return blocks[1::2] + blocks[::2]

    def close(self) -> None:
        self.generations.close()
        self.inbox.wakeup.close()
