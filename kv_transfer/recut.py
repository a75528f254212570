"""A piece whose source has blocks of another shape: what arrived is whole blocks of the source, which are checked as
they are and then written into ours.

    rows [n, B] u8: the source's blocks, all heads   -- carry_out -->   our ranks' pools: other heads, blocks, dtype
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch

from ..core.errors import CorruptPiece
from ..core.ids import BlockId
from ..core.tickets import Geometry, Piece
from .cuts import blocks_of, common, tokens_of
from .integrity import Bytes
from .plan import Plan, Side, plan_hand_over
from .pool import Blocks
from .rank_pools import host_ranks
from .reshape import TORCH_DTYPES, Held, carry_out


@dataclass(frozen=True, slots=True)
class Recut:
    """Where a piece of another shape goes."""

    geometry: Geometry  # of the reader
    table: Mapping[int, BlockId]  # the reader's blocks that are written, by index in the prompt
    tokens: tuple[range, ...]  # of the prompt, rising, apart: what is written


Into: TypeAlias = Sequence[BlockId] | Recut
"""Where a piece goes: a block of ours for each of its blocks, in order, or into blocks of another shape."""


def write_recut(pool: Blocks, piece: Piece, at: Sequence[int], rows: Bytes, into: Recut) -> int:
    """What the piece's blocks at these positions, rows [n, B] u8, bring to ours. Returns how many bytes were written;
    nothing else in the pool is touched. Raises CorruptPiece where they are no blocks of the piece's geometry, and
    GeometryMismatch; then nothing is written."""
    there = piece.geometry
    if rows.shape != (len(at), there.block_bytes):
        raise CorruptPiece(f"blocks of {rows.shape[1]} bytes came, where the source's have {there.block_bytes}")
    if not into.tokens or not len(at):
        return 0
    named = {piece.blocks[i]: BlockId(row) for row, i in enumerate(at)}
    given = tokens_of(named, there.block_tokens, into.tokens[-1].stop)
    tokens = tuple(common(into.tokens, given))
    source = Held([_as_numbers(rows, there, there.num_kv_heads)], named)
    ranks = host_ranks(pool, into.geometry.num_kv_heads)
    if ranks is not None:
        plan = _plan(Side.whole(there), Side(into.geometry, tuple(heads for _, heads in ranks)))
        pools = [_as_numbers(memory, into.geometry, len(heads)) for memory, heads in ranks]
        return carry_out(plan, source, Held(pools, into.table), tokens)
    return _by_way_of_the_host(pool, source, there, into, tokens)


def _by_way_of_the_host(pool: Blocks, source: Held, there: Geometry, into: Recut, tokens: tuple[range, ...]) -> int:
    """Blocks of ours that are not in host memory are fetched, changed and put back."""
    indices = sorted({block for run in tokens for block in blocks_of(run, into.geometry.block_tokens)})
    blocks = [into.table[index] for index in indices]
    with pool.changing:
        held = pool.gather(blocks)
        numbers = _as_numbers(held, into.geometry, into.geometry.num_kv_heads)
        table = {index: BlockId(row) for row, index in enumerate(indices)}
        plan = _plan(Side.whole(there), Side.whole(into.geometry))
        written = carry_out(plan, source, Held([numbers], table), tokens)
        pool.scatter(blocks, held)
    return written


@lru_cache(256)
def _plan(source: Side, reader: Side) -> Plan:
    return plan_hand_over(source, reader)


def _as_numbers(rows: Bytes, geometry: Geometry, heads: int) -> torch.Tensor:
    """[n, L, 2, heads, P, D] of the same memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the store's memory can't be written to is what we want
        numbers = torch.from_numpy(rows).view(TORCH_DTYPES[geometry.dtype])
    return numbers.view(len(rows), geometry.num_layers, 2, heads, geometry.block_tokens, geometry.head_size)
