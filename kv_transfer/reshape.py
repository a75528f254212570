"""Carries a plan out on CPU pools: heads go to other ranks, tokens to other blocks, numbers to another dtype.

The larger of two block sizes is looked at as several *units* of the smaller one (their greatest common divisor, in
general), so that pools of both sides are arrays of units:

    pool [N, L, 2, G_r, P, D]   ->   units [N, R, layers, 2, heads, U, D],   P = R * U, a view

and a prompt is a row of them. Where units follow each other in both pools they move as one strided copy for each
route. Without any difference that is a plain copy of blocks; tokens before the first and behind the last whole unit
are copied by themselves.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..core.ids import BlockId
from ..core.tickets import KV_WIDTHS, Geometry
from .plan import Plan, Route, Side

Numbers = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by width: numpy lacks our dtypes
_CONVERTED_BYTES = 1 << 20  # at a time, where whole units allow it: a temporary that stays in the processor's cache


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a number x with |x| <= largest loses in a dtype: at most max(relative * |x|, absolute), to nearest even."""

    relative: float
    absolute: float  # below the smallest normal number
    largest: float


ROUNDING = {
    "bfloat16": Rounding(2.0**-8, 2.0**-134, torch.finfo(torch.bfloat16).max),  # beyond: infinite, as IEEE has it
    "float8_e4m3fn": Rounding(2.0**-4, 2.0**-10, 448.0),  # beyond, and infinite: 448; there are no scales
}
"""On the way to a narrower dtype; to a wider one nothing is lost. NaN stays NaN."""


@dataclass(frozen=True, slots=True)
class Held:
    """One side's KV of a prompt: the pools [N, L, 2, G_r, P, D] of all its ranks, contiguous, on the CPU, and its
    blocks in them, by index in the prompt (only those that are needed)."""

    pools: Sequence[torch.Tensor]
    table: Sequence[BlockId] | Mapping[int, BlockId]


@dataclass(frozen=True, slots=True)
class _Side:
    """One side's blocks, looked at as units."""

    held: Held
    parts: int  # units of a block

    def slots(self, units: Indices) -> Indices:
        """Where these units of the prompt lie in the side's pools, counted in units."""
        indices, where = np.unique(units // self.parts, return_inverse=True)
        blocks = np.array([self.held.table[index] for index in indices.tolist()], dtype=np.int64)
        num_blocks = len(self.held.pools[0])
        if len(blocks) and not (blocks.min() >= 0 and blocks.max() < num_blocks):
            raise ValueError(f"blocks {blocks.min()} to {blocks.max()} are not all in a pool of {num_blocks}")
        return blocks[where] * self.parts + units % self.parts


class _Stroke(NamedTuple):
    """One strided copy: an index into each side's units. There may be thousands, so they are plain tuples."""

    source: tuple[Any, ...]
    reader: tuple[Any, ...]
    shape: tuple[int, int] | None = None  # (blocks, units of each) that both are looked at as; None: it is one unit


def carry_out(plan: Plan, source: Held, reader: Held, tokens: Iterable[range]) -> int:
    """Copy the KV of these ranges of the prompt's tokens, which lie apart; returns how many bytes were written.

    Nothing else in the reader's pools is touched. Meanwhile nobody writes what is read here. Raises ValueError where a
    block is not in the pools, IndexError or KeyError where a table does not know it; then nothing is written.
    """
    _check(plan.source, source)
    _check(plan.reader, reader)
    ours, theirs = plan.source.geometry, plan.reader.geometry
    unit = gcd(ours.block_tokens, theirs.block_tokens)
    sides = (_Side(source, ours.block_tokens // unit), _Side(reader, theirs.block_tokens // unit))
    most = max(1, _CONVERTED_BYTES // _unit_bytes(plan, unit)) if plan.converts else None
    runs = list(tokens)
    strokes = [*_edges(runs, unit, *sides), *_inner(runs, unit, *sides, most)]
    for route in plan.routes:
        there = _units(source.pools[route.source_rank], route.source_layers, route.source_heads, unit)
        here = _units(reader.pools[route.reader_rank], route.reader_layers, route.reader_heads, unit)
        for stroke in strokes:
            from_, to = there[stroke.source], here[stroke.reader]
            if stroke.shape is not None:
                from_, to = _shaped(from_, stroke.shape), _shaped(to, stroke.shape)
            _copy(from_, to, ours.dtype, theirs.dtype)
    token_bytes = sum(_token_bytes(route, theirs) for route in plan.routes)
    return token_bytes * sum(map(len, runs))


def _edges(runs: Iterable[range], unit: int, source: _Side, reader: _Side) -> Iterator[_Stroke]:
    """Tokens of units that are not wholly in a run: at most two a run."""
    for run in runs:
        whole = _whole(run, unit)
        edges = [range(run.start, whole.start * unit), range(whole.stop * unit, run.stop)]
        for edge in filter(None, edges if whole.start <= whole.stop else [run]):
            at, start = np.array([edge.start // unit]), edge.start % unit
            tokens = (..., slice(start, start + len(edge)), slice(None))
            places = [divmod(int(side.slots(at)[0]), side.parts) for side in (source, reader)]
            yield _Stroke((*places[0], *tokens), (*places[1], *tokens))


def _inner(runs: Iterable[range], unit: int, source: _Side, reader: _Side, most: int | None) -> Iterator[_Stroke]:
    """The whole units of the runs; most: how many at a time, where there is a limit."""
    whole = [_whole(run, unit) for run in runs]
    units = np.array([at for run in whole for at in run], dtype=np.int64)
    parts = (source.parts, reader.parts)
    slots = (source.slots(units), reader.slots(units))
    split = parts[1] > parts[0]  # whose blocks have several units
    for start, stop in _rows(slots, parts, most):
        places = [(int(slot[start]) // r, int(slot[start]) % r) for slot, r in zip(slots, parts, strict=True)]
        if stop - start == 1:
            yield _Stroke(*places)
            continue
        boxes = [_box(*place, stop - start, r) for place, r in zip(places, parts, strict=True)]
        blocks, subs = boxes[split]
        yield _Stroke(boxes[0], boxes[1], (blocks.stop - blocks.start, subs.stop - subs.start))


def _whole(run: range, unit: int) -> range:
    """The units that are wholly in a run of tokens; stop < start where it is shorter and touches no end of one."""
    return range(-(-run.start // unit), run.stop // unit)


def _rows(slots: tuple[Indices, Indices], parts: tuple[int, int], most: int | None) -> Iterator[tuple[int, int]]:
    """Cut the units into rows [start, stop) that are one box on each side."""
    r = max(parts)
    large = slots[parts.index(r)]
    ends = (np.diff(slots[0]) != 1) | (np.diff(slots[1]) != 1)
    if min(parts) > 1:  # neither size divides the other: no box spans blocks
        ends |= (slots[0][1:] % parts[0] == 0) | (slots[1][1:] % parts[1] == 0)
    cuts = [0, *(np.flatnonzero(ends) + 1).tolist(), len(slots[0])]
    for start, stop in pairwise(cuts):
        if stop - start == 1:
            yield start, stop
            continue
        # | units up to the end of a large block | whole large blocks | units of a large block's beginning |
        head = min(start + -int(large[start]) % r, stop) if start < stop else stop
        tail = stop - (stop - head) % r
        step = tail - head if most is None else max(most - most % r, r)
        middle = range(head, tail, step) if head < tail else range(0)
        for first, last in [(start, head), *((at, min(at + step, tail)) for at in middle), (tail, stop)]:
            if first < last:
                yield first, last


def _box(block: int, sub: int, count: int, parts: int) -> tuple[slice, slice]:
    """Some units of one block, or all of some blocks."""
    if sub + count <= parts:
        return slice(block, block + 1), slice(sub, sub + count)
    assert sub == count % parts == 0, (block, sub, count, parts)
    return slice(block, block + count // parts), slice(0, parts)


def _units(pool: torch.Tensor, layers: range, heads: range, unit: int) -> Numbers:
    """A view of the pool's bits, [N, R, layers, 2, heads, U, D], as integers."""
    numbers: Numbers = pool.view(_BITS[pool.element_size()]).numpy()
    n, num_layers, _, num_heads, block_tokens, size = numbers.shape
    units = numbers.reshape(n, num_layers, 2, num_heads, block_tokens // unit, unit, size).transpose(
        0, 4, 1, 2, 3, 5, 6
    )
    return units[:, :, layers.start : layers.stop, :, heads.start : heads.stop]


def _shaped(found: Numbers, shape: tuple[int, int]) -> Numbers:
    """A view of [blocks, units, ...] in this shape; where they differ, there is one unit to a block."""
    if found.shape[:2] == shape:
        return found
    split = found[:, 0].reshape(*shape, *found.shape[2:])  # one axis in two: no copy
    assert np.may_share_memory(split, found), (found.shape, found.strides, shape)
    return split


def _copy(source: Numbers, reader: Numbers, source_dtype: str, reader_dtype: str) -> None:
    if source_dtype == reader_dtype:
        np.copyto(reader, source)
        return
    numbers = torch.from_numpy(source).view(TORCH_DTYPES[source_dtype])
    if reader_dtype == "float8_e4m3fn":
        numbers = numbers.clamp(-ROUNDING[reader_dtype].largest, ROUNDING[reader_dtype].largest)  # torch promises none
    torch.from_numpy(reader).view(TORCH_DTYPES[reader_dtype]).copy_(numbers)


def _token_bytes(route: Route, geometry: Geometry) -> int:
    return len(route.reader_layers) * 2 * len(route.reader_heads) * geometry.head_size * KV_WIDTHS[geometry.dtype]


def _unit_bytes(plan: Plan, unit: int) -> int:
    """Of the route that has most, at the source."""
    return unit * max(_token_bytes(route, plan.source.geometry) for route in plan.routes)


def _check(side: Side, held: Held) -> None:
    geometry = side.geometry
    assert len(held.pools) == len(side.rank_heads), (len(held.pools), side.rank_heads)
    for pool, heads in zip(held.pools, side.rank_heads, strict=True):
        inner = (geometry.num_layers, 2, len(heads), geometry.block_tokens, geometry.head_size)
        assert pool.shape == (len(held.pools[0]), *inner), (pool.shape, inner)
        assert pool.dtype == TORCH_DTYPES[geometry.dtype], (pool.dtype, geometry.dtype)
        assert pool.device.type == "cpu", pool.device
        assert pool.is_contiguous(), pool.stride()
