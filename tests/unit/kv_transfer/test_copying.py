"""Runs of blocks, and blocks copied by them."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baton.core.ids import TicketId
from baton.core.tickets import Geometry
from baton.kv_transfer.copying import checksums_of, copy_rows, runs
from baton.kv_transfer.integrity import checksums

from ...pieces import a_piece

GEOMETRY = Geometry(num_layers=1, num_kv_heads=1, head_size=8, block_tokens=16, dtype="float32", fingerprint="any")
BLOCKS = 9


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12), st.integers(1, 4))
def test_runs_are_as_long_as_neighbours_in_every_table_allow(pairs: list[tuple[int, int]], most: int) -> None:
    expected: list[tuple[int, int]] = []
    for i, (a, b) in enumerate(pairs):
        start, stop = expected[-1] if expected else (0, 0)
        if i and pairs[i - 1] == (a - 1, b - 1) and stop - start < most:
            expected[-1] = (start, i + 1)
        else:
            expected.append((i, i + 1))
    assert runs(most, [a for a, _ in pairs], [b for _, b in pairs]) == expected


@given(st.permutations(range(BLOCKS)), st.permutations(range(BLOCKS)), st.integers(0, BLOCKS), st.booleans())
def test_blocks_arrive_where_they_belong_and_bad_ones_are_named(
    named: list[int], into: list[int], count: int, checked: bool
) -> None:
    named, into = named[:count], into[:count]
    rows = np.random.default_rng(1).integers(0, 256, (BLOCKS, GEOMETRY.block_bytes), dtype=np.uint8)
    host = np.zeros_like(rows)
    indices = tuple(range(10, 10 + count))
    sums = checksums_of(TicketId("t"), indices, rows, named)
    assert sums == checksums(TicketId("t"), indices, rows[named])
    wrong = tuple(one ^ (i % 3 == 1) for i, one in enumerate(sums))
    piece = replace(PIECE, blocks=indices, checksums=wrong if checked else ())
    bad = copy_rows(piece, range(count), rows, named, host, into)
    assert bad == ([i for i in range(count) if i % 3 == 1] if checked else [])
    expected = np.zeros_like(rows)
    expected[into] = rows[named]
    assert np.array_equal(host, expected)


PIECE = a_piece(GEOMETRY)
