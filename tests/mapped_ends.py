"""A rank's end of a mapped transport, without a rank: a pool in shared memory, a ledger over it, an inbox."""

from pathlib import Path

import torch

from baton.core.generations import Generations
from baton.core.ids import Epoch, WorkerId
from baton.core.segment import Segment
from baton.core.tickets import Geometry
from baton.engine.ledger import Ledger
from baton.kv_transfer.capability import RankPool, Site
from baton.kv_transfer.inbox import Inbox
from baton.kv_transfer.pool import BlockPool


class SharedEnd:
    """One rank that holds all heads."""

    def __init__(
        self,
        name: str,
        geometry: Geometry,
        num_blocks: int,
        folder: Path,
        *,
        transport: str = "auto",
        checked: bool = True,
        unmapped: str = "",
    ) -> None:
        self.name = name
        self.segment = Segment.create(num_blocks * geometry.block_bytes)
        flat = torch.frombuffer(self.segment.shared, dtype=torch.uint8)
        self.pool = flat.view(num_blocks, geometry.block_bytes)
        self.generations = Generations.create(num_blocks)
        self.ledger = Ledger(num_blocks, self.generations.renew)
        self.inbox = Inbox()
        self.site = Site(
            worker_id=WorkerId(name),
            epoch=Epoch(1),
            address=name,
            inbox=self.inbox,
            geometry=geometry,
            pool=BlockPool(self.pool),
            num_blocks=num_blocks,
            pools=() if unmapped else (RankPool(self.segment.address, 0, geometry.num_kv_heads),),
            unmapped=unmapped,
            generations=None if unmapped else self.generations,
            socket=folder / f"{name}.kv",
            transport=transport,
            checked=checked,
        )

    def close(self) -> None:
        self.segment.close()
        self.generations.close()
        self.inbox.wakeup.close()
