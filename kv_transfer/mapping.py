"""A source's KV pool in a reader's memory: opened once, read only, and copied from for as long as the source lives."""

import logging
import warnings
from collections.abc import Sequence
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from ..core.generations import HEAD
from ..core.ids import BlockId, Epoch
from ..core.segment import WORD, Fence, Segment
from ..core.tickets import Piece
from .capability import Capability
from .copying import bad_positions, copy_rows
from .integrity import Bytes
from .pool import BlockPool, Blocks
from .rank_pools import RankPools
from .recut import Recut, write_recut
from .reshape import TORCH_DTYPES

_log = logging.getLogger(__name__)

_PROBE_BYTES = 4 << 20
_STAGED_BYTES = 4 << 20  # at a time, where both sides hold the heads differently


class Mapping:
    """Of one life of a source. What was mapped goes back when nobody refers to this any more."""

    def __init__(self, record: Capability) -> None:
        """Raises RankLost where the source is gone, ValueError where its memory is not as its record says."""
        geometry, count = record.geometry, record.num_blocks
        self.num_blocks = count
        self._epoch: Epoch = record.epoch
        words = _open(record.generations, HEAD + count * WORD).view(np.uint64)
        self._epoch_word, self._words = words[:1], words[HEAD // WORD :]
        head_bytes = geometry.block_bytes // geometry.num_kv_heads
        self._pools: list[Bytes] = []  # [N, B_r] u8 of each rank
        for pool in record.pools:
            size = count * head_bytes * pool.num_heads
            self._pools.append(_open(pool.address, size).reshape(count, -1))
        self.plain: Bytes | None = None  # [N, B] u8, where one rank holds whole blocks
        self.blocks: Blocks | None = None  # the others'
        if len(self._pools) == 1:
            self.plain = self._pools[0]
        else:
            self.blocks = _whole(self._pools, record)

    def probe(self) -> float:
        """GB/s of a copy out of it, the better of two."""
        memory = self._pools[0].reshape(-1)[:_PROBE_BYTES]
        into = np.empty_like(memory)
        seconds = []
        for _ in range(2):
            begin = perf_counter()
            np.copyto(into, memory)
            seconds.append(perf_counter() - begin)
        return float(len(memory) / min(seconds) / 1e9)

    def is_of_its_epoch(self) -> bool:
        return int(self._epoch_word[0]) == self._epoch

    def generations(self, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        return self._words[blocks]

    def fits(self, piece: Piece, count: int) -> bool:
        """It names `count` blocks of this pool, a generation for each, and a checksum for each or none."""
        named, sums = piece.source_blocks, len(piece.checksums)
        return (
            len(named) == len(piece.generations) == len(piece.blocks) == count
            and (sums == count or not sums)
            and all(0 <= block < self.num_blocks for block in named)
        )

    def copy(self, piece: Piece, into: Sequence[BlockId], pool: Blocks, at: Sequence[int]) -> list[int]:
        """Copy the piece's blocks at these positions into `pool`, and look at what has arrived there. Gives the
        positions of those that do not have their checksums."""
        host = pool.host if isinstance(pool, BlockPool) else None
        if host is not None and self.plain is not None:
            named, targets = [piece.source_blocks[i] for i in at], [into[i] for i in at]
            return copy_rows(piece, at, self.plain, named, host, targets)
        return self._copy_staged(piece, into, pool, at)

    def gather(self, blocks: Sequence[BlockId]) -> Bytes:
        """A copy, [n, B] u8, all heads."""
        return self.blocks.gather(blocks) if self.blocks is not None else self._pools[0][list(blocks)]

    def _copy_staged(self, piece: Piece, into: Sequence[BlockId], pool: Blocks, at: Sequence[int]) -> list[int]:
        """By way of whole blocks: one side holds the heads otherwise than the other."""
        bad: list[int] = []
        most = max(1, _STAGED_BYTES // pool.block_bytes)
        for start in range(0, len(at), most):
            positions = at[start : start + most]
            named = [piece.source_blocks[i] for i in positions]
            data = self.gather(named)
            targets = [into[i] for i in positions]
            pool.scatter(targets, data)
            if piece.checksums:
                bad += bad_positions(piece, positions, pool.gather(targets))
        return bad

    def recut(self, piece: Piece, into: Recut, pool: Blocks) -> tuple[int, list[int]]:
        """Write what the piece brings into `pool`, part by part, each checked before. Gives how many bytes were
        written, and the positions of blocks that do not have their checksums; what is written then is not all."""
        written, most = 0, max(1, _STAGED_BYTES // piece.geometry.block_bytes)
        for start in range(0, len(piece.blocks), most):
            at = range(start, min(start + most, len(piece.blocks)))
            named = [piece.source_blocks[i] for i in at]
            rows = self.gather(named)
            if bad_positions(piece, at, rows):
                _log.warning("blocks of ticket %s arrived damaged, copying them again", piece.ticket_id)
                rows = self.gather(named)
            bad = bad_positions(piece, at, rows)
            if bad:
                return written, bad
            written += write_recut(pool, piece, at, rows, into)
        return written, []


def fence() -> None:
    """What comes before it is done before what comes after, for whoever shares memory with us."""
    Fence()()


def _open(address: str, size: int) -> Bytes:
    """[size] u8, read only."""
    segment = Segment.open(address, writable=False)
    segment.close()  # the mapping stays
    if len(segment.shared) < size:
        raise ValueError(f"the memory at {address} has {len(segment.shared)} bytes, not {size}")
    return np.frombuffer(segment.shared, dtype=np.uint8, count=size)


def _whole(pools: Sequence[Bytes], record: Capability) -> Blocks:
    g = record.geometry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it can't be written to is what we want
        tensors = [
            torch.from_numpy(memory)
            .view(TORCH_DTYPES[g.dtype])
            .view(record.num_blocks, g.num_layers, 2, pool.num_heads, g.block_tokens, g.head_size)
            for memory, pool in zip(pools, record.pools, strict=True)
        ]
    return RankPools(tensors, [pool.heads for pool in record.pools])
