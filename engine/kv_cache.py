"""The bytes of the KV pool and their layout."""

import torch
from torch import Tensor

from ..core.tickets import Geometry
from .parallel.shared_pool import SharedPool

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class KvCache:
    """One allocation, block outermost: a block of all layers is one run of bytes, so it moves as one."""

    def __init__(
        self,
        num_blocks: int,
        geometry: Geometry,
        device: torch.device,
        heads: range | None = None,
        shared: bool = False,
    ) -> None:
        """heads: the KV heads that this rank holds, of the geometry's; None: all. shared: others will open it."""
        self.geometry = geometry
        self.heads = range(geometry.num_kv_heads) if heads is None else heads
        shape = (num_blocks, geometry.num_layers, 2, len(self.heads), geometry.block_tokens, geometry.head_size)
        dtype = DTYPES[geometry.dtype]
        self.shared = SharedPool.create(shape, dtype, device) if shared else None
        self.pool: Tensor = (  # [N, L, 2, G, P, D], G: the heads held here
            torch.zeros(shape, dtype=dtype, device=device) if self.shared is None else self.shared.tensor
        )

    @property
    def num_blocks(self) -> int:
        return self.pool.shape[0]

    @property
    def block_bytes_view(self) -> Tensor:
        """The same memory as bytes, one row a block.    [N, B] u8, B the bytes of the heads held here."""
        return self.pool.view(self.num_blocks, -1).view(torch.uint8)


def num_blocks_for(kv_bytes: int, geometry: Geometry, heads: range | None = None) -> int:
    """How many blocks fit; heads: as of `KvCache`. Raises ValueError when none does."""
    held = geometry.num_kv_heads if heads is None else len(heads)
    block_bytes = geometry.block_bytes // geometry.num_kv_heads * held
    count = kv_bytes // block_bytes
    if count < 1:
        raise ValueError(f"{kv_bytes} bytes of KV memory hold no block; one has {block_bytes}")
    return count
