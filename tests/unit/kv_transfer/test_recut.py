"""What a piece of another shape writes, where pools are in host memory and where they are not."""

from collections.abc import Sequence
from dataclasses import replace
from threading import Lock

import numpy as np
import pytest
import torch

from baton.core.errors import CorruptPiece
from baton.core.ids import BlockId
from baton.kv_transfer.integrity import Bytes
from baton.kv_transfer.pool import BlockPool, Blocks
from baton.kv_transfer.rank_pools import RankPools, whole_blocks
from baton.kv_transfer.recut import Recut, write_recut

from ...pieces import a_piece
from .shapes import CANARY, DTYPES, a_side, canary_pools, same_bits, write_by_token

SOURCE = a_side(1, 2, block_tokens=16)
BLOCKS = 6


class Elsewhere:
    """Blocks that are on some device: they come and go as a whole."""

    def __init__(self, pool: Blocks) -> None:
        self.changing = Lock()
        self._pool = pool
        self.block_bytes = pool.block_bytes

    def gather(self, blocks: Sequence[BlockId]) -> Bytes:
        assert self.changing.locked(), "another pull may change the same blocks"
        return self._pool.gather(blocks)

    def scatter(self, blocks: Sequence[BlockId], source: Bytes) -> None:
        assert self.changing.locked(), "another pull may change the same blocks"
        self._pool.scatter(blocks, source)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tokens_land_in_every_rank_and_nothing_else_changes(tp: int, elsewhere: bool) -> None:
    reader = a_side(tp, 2, block_tokens=48, dtype="bfloat16")
    kv = torch.randn(100, 2, 2, 2, 4, generator=torch.Generator().manual_seed(1))
    (there,) = canary_pools(SOURCE, BLOCKS + 2)
    write_by_token([there], SOURCE, list(map(BlockId, range(7))), kv, range(100))
    pools = canary_pools(reader, BLOCKS)
    expected = [pool.clone() for pool in pools]
    table = {0: BlockId(4), 1: BlockId(1), 2: BlockId(3)}
    write_by_token(expected, reader, list(table.values()), kv.to(DTYPES["bfloat16"]), [*range(20, 64), *range(80, 100)])
    pool = whole_blocks(pools, reader.rank_heads)
    assert isinstance(pool, BlockPool if tp == 1 else RankPools)
    rows = there.view(len(there), -1).view(torch.uint8).numpy()
    into = Recut(reader.geometry, table, (range(20, 64), range(80, 100)))
    target = Elsewhere(pool) if elsewhere else pool
    for at in (range(1, 4), range(5, 7)):  # the fifth block is in nobody's range
        write_recut(target, a_piece(SOURCE.geometry, range(7)), at, rows[at.start : at.stop], into)
    assert all(same_bits(one, other) for one, other in zip(pools, expected, strict=True))


def test_what_is_no_block_of_the_pieces_geometry_is_refused_and_nothing_is_written() -> None:
    reader = a_side(1, 2, block_tokens=32)
    (numbers,) = canary_pools(reader, BLOCKS)
    pool, into = whole_blocks([numbers], reader.rank_heads), Recut(reader.geometry, {0: BlockId(0)}, (range(16),))
    good = SOURCE.geometry.block_bytes
    for rows in (np.zeros((1, good // 2), np.uint8), np.zeros((1, 2 * good), np.uint8), np.zeros((2, good), np.uint8)):
        with pytest.raises(CorruptPiece):
            write_recut(pool, a_piece(SOURCE.geometry, (0,)), range(1), rows, into)
    with pytest.raises(CorruptPiece):
        write_recut(
            pool,
            a_piece(replace(SOURCE.geometry, block_tokens=48), (0,)),
            range(1),
            np.zeros((1, good), np.uint8),
            into,
        )
    assert bool((numbers.view(torch.uint8) == CANARY).all())
