"""The best of each row, whatever ties there are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.ranking import best_first, first_best, parts

NAN, INF = float("nan"), float("inf")
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 1e-40, -1e-40, 3e38, -3e38, -INF])


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 60))
def test_the_best_are_what_a_stable_sort_begins_with(data: st.DataObject, width: int) -> None:
    values = torch.tensor(data.draw(st.lists(st.lists(FEW, min_size=width, max_size=width), min_size=1, max_size=4)))
    count = data.draw(st.integers(0, width))
    ranked, ids = best_first(values, count)
    expected, order = torch.sort(values, dim=-1, descending=True, stable=True)
    assert torch.equal(ids, order[:, :count])
    assert torch.equal(ranked, expected[:, :count])


@pytest.mark.parametrize("count", [1, 40, 1024, 1025, 5000])
def test_logits_that_were_bfloat16_rank_like_a_stable_sort(count: int) -> None:
    values = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert len(values[0].unique()) < 3000
    ids = best_first(values, count)[1]
    assert torch.equal(ids, torch.sort(values, dim=-1, descending=True, stable=True)[1][:, :count])


@pytest.mark.parametrize("width", [1, 127, 128, 4096, 5000])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_first_best_is_the_argmax(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(rows, width, generator=generator).bfloat16().float()
    for some in (values, values.round(), torch.full_like(values, -INF)):
        largest, at = first_best(some)
        assert torch.equal(at, some.argmax(-1))
        assert torch.equal(largest, some.amax(-1))
    values[:, width // 2 :] = INF
    values[0, width - 1] = NAN
    largest, at = first_best(values)
    assert at.tolist() == [width - 1] + [width // 2] * (rows - 1)
    assert largest[0].isnan()
    assert largest[1:].tolist() == [INF] * (rows - 1)


def test_parts_cover_every_row_once() -> None:
    for rows, width in [(1, 10), (64, 131072), (7, 1 << 22), (1000, 4096)]:
        found = [row for part in parts(rows, width, torch.device("cpu")) for row in range(rows)[part]]
        assert found == list(range(rows))
