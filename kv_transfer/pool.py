"""A rank's KV pool as bytes: read scattered blocks into one run, write one run into scattered blocks."""

from collections.abc import Sequence
from threading import Lock
from typing import Protocol

import numpy as np
import torch

from ..core.ids import BlockId
from ..kernels.block_copy import gather_blocks, scatter_blocks
from ..kernels.device_wait import settle
from .integrity import Bytes


class Blocks(Protocol):
    """Where a transport reads and writes a worker's blocks, each B bytes: all layers, K and V, all KV heads."""

    changing: Lock
    """Held by who gathers blocks, changes parts of them and scatters them again: others may change other parts."""

    @property
    def block_bytes(self) -> int: ...

    def gather(self, blocks: Sequence[BlockId]) -> Bytes:
        """Copy of the blocks, [n, B] u8 contiguous, on the host. The steps that wrote them are over."""

    def scatter(self, blocks: Sequence[BlockId], source: Bytes) -> None:
        """source [n, B] u8; every byte is in the pool on return."""


class BlockPool:
    """View of a pool tensor, [N, B] u8: N blocks of B bytes. Owns nothing; callers hold the blocks they name.

    On CUDA copies run on a stream of their own, beside the steps. So nobody may gather from a block where a step under
    way writes what is gathered, or scatter into one that it reads or writes.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        assert pool.dtype == torch.uint8, pool.dtype
        assert pool.ndim == 2, pool.shape
        assert pool.is_contiguous(), pool.stride()
        self.changing = Lock()
        self._pool = pool
        self._host = pool.numpy() if pool.device.type == "cpu" else None
        cuda = pool.device.type == "cuda"
        self._stream = torch.cuda.Stream(pool.device) if cuda else None  # type: ignore[no-untyped-call] # torch's own

    @property
    def block_bytes(self) -> int:
        return int(self._pool.shape[1])

    @property
    def host(self) -> Bytes | None:
        """The pool itself, [N, B] u8, where it is in host memory."""
        return self._host

    def gather(self, blocks: Sequence[BlockId]) -> Bytes:
        if self._host is not None:
            return self._host[np.asarray(blocks, dtype=np.int64)]
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            out = torch.empty(len(blocks), self.block_bytes, dtype=torch.uint8, device=self._pool.device)
            gather_blocks(self._pool, self._ids(blocks), out)
            settle(self._pool.device)
            host = out.to("cpu")
        return host.numpy()

    def scatter(self, blocks: Sequence[BlockId], source: Bytes) -> None:
        """source [n, B] u8; every byte is in the pool on return."""
        assert source.shape == (len(blocks), self.block_bytes), (source.shape, len(blocks), self.block_bytes)
        if self._host is not None:
            self._host[np.asarray(blocks, dtype=np.int64)] = source
            return
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            staged = torch.from_numpy(np.array(source)).to(self._pool.device)  # a mapped object is read-only
            scatter_blocks(self._pool, self._ids(blocks), staged)
            settle(self._pool.device)

    def _ids(self, blocks: Sequence[BlockId]) -> torch.Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self._pool.device)
