"""A step's chunks become items that hold every token once, each with the tiles of keys that its tokens see."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baton.kernels.prefill_tiles import cut, items_of

chunks = st.lists(st.tuples(st.integers(0, 700), st.integers(0, 200)), min_size=1, max_size=4)
groups = st.sampled_from([1, 2, 3, 4, 7, 8, 16, 128])


@given(chunks, groups, st.none() | st.integers(1, 500))
def test_items_hold_every_token_once_and_all_it_sees(
    chunks: list[tuple[int, int]], group: int, window: int | None
) -> None:
    starts = np.cumsum([0, *(count for _, count in chunks)])
    contexts = np.array([prefix + count for prefix, count in chunks])
    items = items_of(starts, contexts, group, window)
    seen = np.zeros(starts[-1], int)
    for row, tokens, position, context, sequence, begin, end, _ in items.tolist():
        assert 1 <= tokens <= 128 // group
        assert starts[sequence] <= row < row + tokens <= starts[sequence + 1]
        assert context == contexts[sequence]
        assert position == context - starts[sequence + 1] + row
        first = 0 if window is None else max(0, position - window + 1)
        assert begin == first // 128
        assert (end - 1) * 128 < position + tokens <= end * 128
        seen[row : row + tokens] += 1
    assert (seen == 1).all()


@given(chunks, groups, st.none() | st.integers(1, 5000), st.integers(1, 8), st.integers(1, 132))
def test_items_are_cut_into_parts_that_hold_every_tile_once(
    chunks: list[tuple[int, int]], group: int, window: int | None, kv_heads: int, blocks: int
) -> None:
    starts = np.cumsum([0, *(count for _, count in chunks)])
    contexts = np.array([20 * prefix + count for prefix, count in chunks])
    items = items_of(starts, contexts, group, window)
    made, merges = cut(items, kv_heads, blocks)
    tiles = made[:, 6] - made[:, 5]
    assert (tiles >= 1).all()
    assert (tiles[1:] <= tiles[:-1]).all()
    assert tiles.sum() == (items[:, 6] - items[:, 5]).sum()
    assert tiles.max(initial=0) <= max(8, -(-tiles.sum() * kv_heads // blocks))
    assert sorted(part for part in made[:, 7].tolist() if part) == list(range(1, int(merges[:, 3].sum()) + 1))
    merge_of = {row: (first, parts) for row, _, first, parts in merges.tolist()}
    for row, tokens, *rest, begin, end, _ in items.tolist():
        mine = sorted(made[made[:, 0] == row].tolist(), key=lambda item: item[5])
        assert all(item[:5] == [row, tokens, *rest] for item in mine)
        assert [item[5] for item in mine] == [begin, *(item[6] for item in mine[:-1])]
        assert mine[-1][6] == end
        first, parts = merge_of.get(row, (-1, 1))
        assert [item[7] for item in mine] == list(range(first + 1, first + 1 + parts))
