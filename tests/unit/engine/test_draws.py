"""Draws: filters, distribution, and randomness by position alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.request import Sampling
from baton.engine.draws import DrawRows, Way, _draw_sorted, _weights, draw, kept, uniform, way_of
from baton.engine.ranking import best_first, first_best

from .sampling import choose, filtered, rows_of

VOCAB = 50
PINNED = [0.851073167519849, 0.8851203426900583, 0.2784156158501401]


def some_logits(count: int, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def test_seed_branch_and_position_each_change_the_number() -> None:
    numbers = [
        uniform(*(np.array([part], dtype=np.uint64) for part in triple))[0]
        for triple in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 0, 0), (1, 1, 0), (0, 1, 1)]
    ]
    assert len(set(numbers)) == len(numbers)


def test_the_numbers_never_change_between_versions() -> None:
    """A replayed answer must continue as it would have: these are part of the contract."""
    found = uniform(*(np.array(part, dtype=np.uint64) for part in ([0, 7, 2**64 - 1], [0, 1, 15], [0, 2, 4095])))
    assert found.tolist() == PINNED


@pytest.mark.parametrize("stride", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 1)])
def test_neighbouring_numbers_are_uniform_and_uncorrelated(stride: tuple[int, int, int]) -> None:
    steps = np.arange(40_000, dtype=np.uint64)
    numbers = uniform(*(steps * np.uint64(part) for part in stride))
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 150  # chi-square, 99 degrees of freedom: p = 0.0007
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("filters", [{}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.02}, {"top_k": 20, "top_p": 0.9}])
@pytest.mark.parametrize("vocab_size", [VOCAB, 1500])
def test_drawn_tokens_have_the_distribution_that_the_filters_leave(vocab_size: int, filters: dict[str, Any]) -> None:
    logits = some_logits(1, seed=5, vocab_size=vocab_size)
    params = Sampling(max_tokens=1, temperature=0.8, seed=11, **filters)
    count = 20_000
    drawn = choose(logits.expand(count, -1), [params] * count, range(count)).token_ids.tolist()
    weights = filtered([np.float32(value) for value in logits[0].tolist()], params)
    expected = np.zeros(vocab_size)
    expected[list(weights)] = np.array(list(weights.values())) / sum(weights.values()) * count
    counts = np.bincount(drawn, minlength=vocab_size)
    assert set(counts.nonzero()[0]) <= set(weights)
    large = expected >= 5
    statistic = ((counts - expected) ** 2 / np.where(large, expected, 1))[large].sum()
    assert statistic < large.sum() + 4 * np.sqrt(2 * large.sum())


@pytest.mark.parametrize("filters", [{}, {"top_k": 9}, {"top_p": 0.8}])
def test_a_number_is_a_place_on_the_line_of_running_sums(filters: dict[str, Any]) -> None:
    """Exact: 10,001 even numbers give each token as many as its share of the line."""
    logits = some_logits(1, seed=6)
    rows = rows_of([Sampling(max_tokens=1, temperature=1.5, **filters)], [0], VOCAB).draws[0]
    numbers = (torch.arange(10_001, dtype=torch.float64) / 10_001)[:, None]
    many = DrawRows(
        rows.way,
        at=None,
        temperature=rows.temperature.expand(10_001, 1),
        top_k=rows.top_k.expand(10_001, 1),
        top_p=rows.top_p.expand(10_001, 1),
        min_p=rows.min_p.expand(10_001, 1),
        numbers=numbers,
        most=rows.most,
    )
    values = logits.expand(10_001, -1)
    counts = torch.bincount(draw(values, values.argmax(-1), many), minlength=VOCAB).numpy()
    weights = filtered([np.float32(v) for v in logits[0].tolist()], Sampling(max_tokens=1, temperature=1.5, **filters))
    expected = np.zeros(VOCAB)
    expected[list(weights)] = np.array(list(weights.values())) / sum(weights.values()) * 10_001
    assert np.abs(counts - expected).max() <= 1


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda n: n / 7), min_size=VOCAB, max_size=VOCAB),
    temperature=st.floats(0.05, 4),
    top_k=st.integers(0, 60).filter(lambda k: k != 1),
    top_p=st.floats(0.01, 0.99),
    min_p=st.floats(0, 1),
)
def test_filters_keep_what_a_plain_reading_keeps(logits: list[float], **given_params: Any) -> None:
    params = Sampling(max_tokens=1, **given_params)
    tensor = torch.tensor([logits])
    values = [np.float32(value) for value in tensor[0].tolist()]
    (rows,) = rows_of([params], [0], VOCAB).draws
    ranked, order = best_first(tensor, VOCAB)
    found = kept(ranked, rows, VOCAB)
    ids = order[0, : int(found.length)].tolist()
    weights = np.diff(found.sums[0].numpy(), prepend=0.0)
    # Rounding decides of tokens that lie within 1e-6 of a threshold.
    assert set(filtered(values, params, -1e-6)) <= set(ids) <= set(filtered(values, params, 1e-6))
    expected = filtered(values, params)
    for token, weight in zip(ids, weights, strict=False):
        if token in expected:
            assert weight == pytest.approx(expected[token], rel=1e-3, abs=1e-12)


# The ways that rank agree, to the bit


def bf16_logits(count: int, vocab_size: int, spread: float) -> torch.Tensor:
    logits = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(8)) * spread
    return logits.bfloat16().float()


def sorted_draw(values: torch.Tensor, rows: DrawRows) -> list[int]:
    """By ranking all tokens."""
    values = values if rows.at is None else values[rows.at]
    total = _weights(values, values.amax(-1, keepdim=True), rows.temperature).cumsum(-1)[:, -1:]
    tokens: list[int] = _draw_sorted(values, total, rows)[:, 0].tolist()
    return tokens


@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("vocab_size", [VOCAB, 4096, 6000])
def test_selecting_the_best_and_sorting_all_draw_the_same_token(vocab_size: int, spread: float) -> None:
    """Ties included, of which logits that were bfloat16 are full."""
    dice = np.random.default_rng(2)
    params = [
        Sampling(
            max_tokens=1,
            temperature=float(dice.choice([0.3, 1.0, 1.7])),
            top_k=int(dice.choice([0, 2, 40, 128, 1024, 1025, 3000])),
            top_p=float(dice.choice([0.5, 0.9, 0.999, 1.0])),
            min_p=float(dice.choice([0.0, 0.01, 1.0])),
            seed=seed,
        )
        for seed in range(600)
    ]
    values = bf16_logits(len(params), vocab_size, spread)
    groups = [rows for rows in rows_of(params, [0] * 600, vocab_size).draws if rows.way is not Way.WHOLE]
    assert {rows.way for rows in groups} == ({Way.SHORT} if vocab_size <= 1024 else {Way.SHORT, Way.LONG})
    for rows in groups:
        assert draw(values, first_best(values)[1], rows).tolist() == sorted_draw(values, rows)


def test_a_nucleus_of_more_than_the_best_thousand_is_drawn_whole() -> None:
    """Flat logits: top-p 0.9 keeps nine tenths of 4,096; a sharp row beside it needs but few."""
    logits = torch.zeros(400, 4096)
    logits[::2, 77] = 30.0
    drawn = choose(logits, [Sampling(max_tokens=1, top_p=0.9, seed=seed) for seed in range(400)]).token_ids.tolist()
    assert drawn[::2] == [77] * 200
    assert max(drawn[1::2]) < 0.9 * 4096 + 1
    assert sum(token > 1024 for token in drawn[1::2]) > 100


def test_each_row_is_drawn_in_the_way_of_its_own_parameters() -> None:
    plain = Sampling(max_tokens=1)
    assert way_of(plain, 4096) is Way.WHOLE
    assert way_of(replace(plain, top_k=4096), 4096) is Way.WHOLE
    assert way_of(replace(plain, top_k=40, top_p=0.5), 4096) is Way.SHORT
    assert way_of(replace(plain, top_k=1025), 4096) is Way.LONG
    assert way_of(replace(plain, top_p=0.5), 4096) is Way.LONG
    assert way_of(replace(plain, min_p=0.5), 4096) is Way.LONG
    assert way_of(replace(plain, min_p=0.5), 1024) is Way.SHORT
    assert way_of(replace(plain, temperature=0.0), 4096) is Way.GREEDY
    assert way_of(replace(plain, temperature=1e-60), 4096) is Way.GREEDY  # 0 in float32
    assert way_of(replace(plain, top_k=1), 4096) is Way.GREEDY


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9999}])
def test_what_cannot_be_chosen_never_is(filters: dict[str, Any]) -> None:
    logits = torch.full((2000, 1500), -torch.inf)
    logits[:, [3, 800, 1499]] = torch.tensor([0.0, 1.0, 2.0])
    drawn = choose(logits, [Sampling(max_tokens=1, seed=seed, **filters) for seed in range(2000)]).token_ids.tolist()
    assert set(drawn) == {3, 800, 1499}


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.3}])
def test_the_smallest_and_the_largest_number_draw_the_ends(number: float, filters: dict[str, Any]) -> None:
    logits = some_logits(1, vocab_size=1500)
    params = Sampling(max_tokens=1, **filters)
    (rows,) = rows_of([params], [0], 1500).draws
    rows = replace(rows, numbers=torch.tensor([[number]], dtype=torch.float64))
    weights = filtered([np.float32(value) for value in logits[0].tolist()], params)
    order = list(weights)  # best first
    assert draw(logits, logits.argmax(-1), rows).tolist() == [order[-1 if number else 0]]


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9999}, {"min_p": 1.0}])
def test_a_number_on_an_edge_draws_the_token_that_begins_there(filters: dict[str, Any]) -> None:
    """Four tokens as good as each other, all kept by every filter; number 0 passes over what cannot be chosen."""
    logits = torch.full((1, 1500), -1e4)
    logits[0, [5, 6, 700, 1400]] = 2.0
    (rows,) = rows_of([Sampling(max_tokens=1, **filters)], [0], 1500).draws
    for quarter, token in enumerate([5, 6, 700, 1400]):
        exact = replace(rows, numbers=torch.tensor([[quarter / 4]], dtype=torch.float64))
        assert draw(logits, logits.argmax(-1), exact).tolist() == [token]
