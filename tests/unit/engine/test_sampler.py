"""Tokens from logits: filters, distribution, and randomness by position alone."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.request import Sampling
from baton.engine.sampler import SamplingRows, _filtered, sample, uniform

CPU = torch.device("cpu")
VOCAB = 50
PINNED = [0.851073167519849, 0.8851203426900583, 0.2784156158501401]


def rows_of(*params: Sampling) -> SamplingRows:
    return SamplingRows.of(params, VOCAB, CPU)


def some_logits(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def random_sampling(number: int) -> Sampling:
    choose = np.random.default_rng(number)
    return Sampling(
        max_tokens=9,
        temperature=float(choose.choice([0.0, 0.3, 1.0, 2.5])),
        top_k=int(choose.choice([0, 1, 7, 1000])),
        top_p=float(choose.choice([0.01, 0.6, 1.0])),
        min_p=float(choose.choice([0.0, 0.05, 1.0])),
        seed=int(choose.integers(0, 2**63)) * 2 + 1,
        branch=int(choose.integers(0, 16)),
    )


def test_a_row_alone_and_in_a_batch_gets_the_same_token() -> None:
    params = [random_sampling(number) for number in range(64)]
    logits, positions = some_logits(64), list(range(64))
    together = sample(logits, rows_of(*params), positions).token_ids
    alone = [sample(logits[i : i + 1], rows_of(params[i]), [i]).token_ids[0] for i in range(64)]
    assert together == alone


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


def test_drawn_tokens_have_the_softmaxs_distribution() -> None:
    logits = some_logits(1, seed=5)
    params = Sampling(max_tokens=1, temperature=1.5, seed=11)
    count = 20_000
    drawn = sample(logits.expand(count, -1), rows_of(*[params] * count), range(count)).token_ids
    expected = torch.softmax(logits[0].double() / 1.5, -1).numpy() * count
    counts = np.bincount(drawn, minlength=VOCAB)
    large = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[large].sum()
    assert statistic < large.sum() + 4 * np.sqrt(2 * large.sum())


def naive_filter(logits: list[float], params: Sampling, slack: float = 0.0) -> dict[int, float]:
    """Token -> probability by the words of the contract, one token at a time. slack > 0 lets tokens at an edge in."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    top = logits[order[0]]
    weights = {token: float(np.exp((logits[token] - top) / params.temperature)) for token in order}
    kept = order[: params.top_k] if params.top_k else order
    total, before, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if nucleus and before >= params.top_p * total * (1 + slack):
            break
        nucleus.append(token)
        before += weights[token]
    strong = [token for token in nucleus if weights[token] >= params.min_p * (1 - slack)]
    total = sum(weights[token] for token in strong)
    return {token: weights[token] / total for token in strong}


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda n: n / 7), min_size=VOCAB, max_size=VOCAB),
    temperature=st.floats(0.05, 4),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_filters_keep_what_a_plain_reading_keeps(logits: list[float], **given_params: Any) -> None:
    params = Sampling(max_tokens=1, **given_params)
    tensor = torch.tensor([logits])
    values = tensor[0].tolist()
    draw = rows_of(params).draw
    assert draw is not None
    weights, order = _filtered(tensor, draw)
    kept = {int(token): float(weight) for weight, token in zip(weights[0], order[0], strict=True) if weight > 0}
    # Rounding decides of tokens that lie within 1e-6 of a threshold.
    assert set(naive_filter(values, params, -1e-6)) <= set(kept) <= set(naive_filter(values, params, 1e-6))
    expected, total = naive_filter(values, params), sum(kept.values())
    for token in set(kept) & set(expected):
        assert kept[token] / total == pytest.approx(expected[token], rel=1e-3)


def test_zero_temperature_is_greedy_beside_others_that_draw() -> None:
    logits = some_logits(2)
    params = [Sampling(max_tokens=1, temperature=0.0), Sampling(max_tokens=1, temperature=5.0, seed=3)]
    assert sample(logits, rows_of(*params), [0, 0]).token_ids[0] == int(logits[0].argmax())


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = some_logits(1) * 1000
    assert sample(logits, rows_of(Sampling(max_tokens=1, temperature=1e-30)), [0]).token_ids == [int(logits.argmax())]


def test_logprobs_are_those_before_temperature_and_only_for_who_asked() -> None:
    logits = some_logits(3)
    params = [
        Sampling(max_tokens=1, temperature=0.0, logprobs=2),
        Sampling(max_tokens=1, temperature=3.0),
        Sampling(max_tokens=1, temperature=3.0, top_k=1, logprobs=0),
    ]
    sampled = sample(logits, rows_of(*params), [0, 0, 0])
    table = torch.log_softmax(logits, -1)
    first, second, third = sampled.logprobs
    assert second is None
    assert first is not None
    assert third is not None
    assert first.logprob == pytest.approx(float(table[0].max()))
    assert [token for token, _ in first.top] == table[0].topk(2).indices.tolist()
    assert third.top == ()
    assert third.logprob == pytest.approx(float(table[2].max()))
