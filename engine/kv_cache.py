"""The bytes of the KV pool and their layout."""

import torch
from torch import Tensor

from ..core.tickets import Geometry

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class KvCache:
    """One allocation, block outermost: a block of all layers is one run of bytes, so it moves as one."""

    def __init__(self, num_blocks: int, geometry: Geometry, device: torch.device) -> None:
        shape = (
            num_blocks,
            geometry.num_layers,
            2,
            geometry.num_kv_heads,
            geometry.block_tokens,
            geometry.head_size,
        )
        self.geometry = geometry
        self.pool: Tensor = torch.zeros(shape, dtype=_DTYPES[geometry.dtype], device=device)  # [N, L, 2, G, P, D]

    @property
    def num_blocks(self) -> int:
        return self.pool.shape[0]

    @property
    def block_bytes_view(self) -> Tensor:
        """The same memory as bytes, one row a block.    [N, block_bytes] u8."""
        return self.pool.view(self.num_blocks, -1).view(torch.uint8)


def num_blocks_for(kv_bytes: int, geometry: Geometry) -> int:
    """How many blocks fit. Raises ValueError when none does."""
    count = kv_bytes // geometry.block_bytes
    if count < 1:
        raise ValueError(f"{kv_bytes} bytes of KV memory hold no block; one has {geometry.block_bytes}")
    return count
