"""Sides of every shape, pools full of numbers, and the slow way to hand KV over, for the tests of plans."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy.typing as npt
import torch

from baton.core.ids import BlockId
from baton.core.tickets import Geometry
from baton.engine.models.shard import Shard
from baton.kv_transfer.plan import Side

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
CANARY = 0x5B  # in every byte of a reader's pool before anything arrives


def a_side(
    tp: int = 1,
    kv_heads: int = 1,
    layers: range = range(2),
    block_tokens: int = 16,
    dtype: str = "float32",
    head_size: int = 4,
) -> Side:
    """The heads are split as engine/ splits them."""
    geometry = Geometry(
        num_layers=len(layers),
        first_layer=layers.start,
        num_kv_heads=kv_heads,
        head_size=head_size,
        block_tokens=block_tokens,
        dtype=dtype,
        fingerprint=f"a model/{dtype}",
        model="a model",
    )
    return Side(geometry, tuple(Shard(rank, tp).kv_heads(kv_heads) for rank in range(tp)))


def canary_pools(side: Side, num_blocks: int) -> list[torch.Tensor]:
    """[N, L, 2, G_r, P, D] of each rank."""
    geometry = side.geometry
    pools = []
    for held in side.rank_heads:
        shape = (num_blocks, geometry.num_layers, 2, len(held), geometry.block_tokens, geometry.head_size)
        pool = torch.empty(shape, dtype=DTYPES[geometry.dtype])
        pool.view(torch.uint8).fill_(CANARY)
        pools.append(pool)
    return pools


def write_by_token(
    pools: Sequence[torch.Tensor], side: Side, table: Sequence[BlockId], kv: torch.Tensor, tokens: Iterable[int]
) -> None:
    """The specification: one token at a time. kv [T, all layers of the model, 2, G, D], in the pools' dtype."""
    geometry = side.geometry
    size, layers = geometry.block_tokens, slice(geometry.layers.start, geometry.layers.stop)
    numbers = bits(kv)
    for pool, held in zip(map(bits, pools), side.rank_heads, strict=True):
        for token in tokens:
            pool[table[token // size], :, :, :, token % size] = numbers[token, layers, :, held.start : held.stop]


def bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The same memory, as integers that numpy knows."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    found: npt.NDArray[Any] = tensor.view(kind).numpy()
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def scattered(num_blocks: int, size: int, seed: int) -> list[BlockId]:
    """`num_blocks` different blocks of a pool of `size`, partly in runs, partly anywhere."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    half = num_blocks // 2
    run = list(range(half))
    rest = [block for block in order if block >= half]
    return [BlockId(block) for block in (*run, *rest)][:num_blocks]
