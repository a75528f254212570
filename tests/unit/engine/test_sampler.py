"""Logits to tokens: who gets what, whoever else is in the batch."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.request import Sampling
from baton.engine.sampler import NO_TOKEN, SamplingRows, sample
from baton.engine.sampling_table import SamplingTable

from .sampling import CPU, INF, PROMPT, choose, edited_row, masks_of, reference_tokens, rows_of

VOCAB = 50
TOKENS = st.integers(0, VOCAB - 1)
NAN = float("nan")


def some_logits(count: int, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def random_sampling(number: int) -> Sampling:
    choose = np.random.default_rng(number)
    return Sampling(
        max_tokens=99,
        temperature=float(choose.choice([0.0, 0.3, 1.0, 2.5])),
        top_k=int(choose.choice([0, 0, 1, 7, 1000, 1500])),
        top_p=float(choose.choice([0.01, 0.6, 1.0])),
        min_p=float(choose.choice([0.0, 0.0, 0.05, 1.0])),
        seed=int(choose.integers(0, 2**63)) * 2 + 1,
        branch=int(choose.integers(0, 16)),
        repetition_penalty=float(choose.choice([1.0, 1.0, 1.3])),
        frequency_penalty=float(choose.choice([0.0, 0.0, 0.5])),
        logit_bias=((4, 3.0), (7, -100.0)) if choose.random() < 0.3 else (),
        min_tokens=int(choose.choice([0, 0, 20])),
        stop_token_ids=frozenset({9}),
        logprobs=[None, None, 0, 3][choose.integers(0, 4)],
    )


@pytest.mark.parametrize("vocab_size", [VOCAB, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_or_in_a_batch_of_64_in_any_order_a_row_gets_the_same(dtype: torch.dtype, vocab_size: int) -> None:
    params = [random_sampling(number) for number in range(64)]
    dice = random.Random(1)
    answers = [dice.choices(range(VOCAB), k=dice.randrange(30)) for _ in params]
    logits, positions = some_logits(64, vocab_size=vocab_size).to(dtype), [len(answer) for answer in answers]
    alone = [
        choose(logits[row : row + 1], [params[row]], [positions[row]], [answers[row]]) for row in range(len(params))
    ]
    table = SamplingTable(64, vocab_size, CPU)
    for row in dice.sample(range(64), 64):
        table.put(row, params[row], PROMPT, answers[row])
    for count in (64, 64, 40, 7):
        order = np.array(dice.sample(range(64), count))
        together = sample(logits[order], table.take(order, np.array(positions)[order])).to_host().result()
        assert together.token_ids.tolist() == [alone[row].token_ids[0] for row in order]
        for index, row in enumerate(order):
            one, other = together.logprobs.get(index), alone[row].logprobs.get(0)
            assert (one is None) == (other is None) == (params[row].logprobs is None)
            assert one is None or other is None or one.logprob == pytest.approx(other.logprob, abs=1e-5)


SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.just(500),
    temperature=st.just(0.0) | st.floats(0.05, 3),
    top_k=st.just(0) | st.integers(1, 60),
    top_p=st.just(1.0) | st.floats(0.05, 1),
    min_p=st.just(0.0) | st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    branch=st.integers(0, 15),
    repetition_penalty=st.just(1.0) | st.floats(0.5, 2),
    presence_penalty=st.just(0.0) | st.floats(-2, 2),
    frequency_penalty=st.just(0.0) | st.floats(-2, 2),
    logit_bias=st.dictionaries(TOKENS, st.floats(-100, 100), max_size=4).map(lambda bias: tuple(sorted(bias.items()))),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.frozensets(TOKENS, max_size=4),
)
SEQUENCES = st.tuples(SAMPLINGS, st.lists(TOKENS, max_size=12), st.none() | st.sets(TOKENS, min_size=8))


@settings(max_examples=250, deadline=None)
@given(st.lists(SEQUENCES, min_size=1, max_size=6), st.integers(0, 10_000), st.sampled_from([0.0, 0.01, 3.0]))
def test_every_row_gets_the_token_of_a_plain_reading(
    sequences: list[tuple[Sampling, list[int], set[int] | None]], seed: int, spread: float
) -> None:
    """Row by row in float64, from the words of the contract. Ties too: some logits are all the same."""
    logits = torch.randn(len(sequences), VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    params, answers = [params for params, _, _ in sequences], [answer for _, answer, _ in sequences]
    rows = rows_of(params, [len(answer) for answer in answers], VOCAB, answers)
    allowed = {row: mask for row, (_, _, mask) in enumerate(sequences) if mask is not None}
    if allowed:
        rows = masked(rows, allowed)
    found = sample(logits, rows).to_host().result().token_ids.tolist()
    for token, line, (sampling, answer, mask) in zip(found, logits.tolist(), sequences, strict=True):
        values = edited_row(line, sampling, answer, mask)
        assert token in reference_tokens(values, sampling, len(answer))


def masked(rows: SamplingRows, allowed: dict[int, set[int]], vocab_size: int = VOCAB) -> SamplingRows:
    return SamplingRows(rows.count, rows.draws, rows.edits, masks_of(allowed, vocab_size), rows.logprobs)


def test_zero_temperature_is_greedy_beside_others_that_draw() -> None:
    logits = some_logits(2)
    params = [Sampling(max_tokens=1, temperature=0.0), Sampling(max_tokens=1, temperature=5.0, seed=3)]
    assert choose(logits, params).token_ids[0] == int(logits[0].argmax())


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = some_logits(1) * 1000
    for temperature in (1e-30, 1e-60):
        params = Sampling(max_tokens=1, temperature=temperature)
        assert choose(logits, [params]).token_ids.tolist() == [int(logits.argmax())]


def test_logprobs_are_those_before_temperature_and_only_for_who_asked() -> None:
    logits = some_logits(3)
    params = [
        Sampling(max_tokens=1, temperature=0.0, logprobs=2),
        Sampling(max_tokens=1, temperature=3.0),
        Sampling(max_tokens=1, temperature=3.0, top_k=1, logprobs=0),
    ]
    sampled = choose(logits, params)
    table = torch.log_softmax(logits, -1)
    assert sorted(sampled.logprobs) == [0, 2]
    first, third = sampled.logprobs[0], sampled.logprobs[2]
    assert first.logprob == pytest.approx(float(table[0].max()))
    assert [token for token, _ in first.top] == table[0].topk(2).indices.tolist()
    assert third.top == ()
    assert third.logprob == pytest.approx(float(table[2].max()))


def test_a_greedy_tokens_logprob_is_the_first_of_the_best_though_others_tie() -> None:
    logits = torch.zeros(1, VOCAB)
    sampled = choose(logits, [Sampling(max_tokens=1, temperature=0.0, logprobs=3)])
    assert sampled.token_ids.tolist() == [0]
    assert [token for token, _ in sampled.logprobs[0].top] == [0, 1, 2]


# Logits that are no logits


PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"top_k": 5},
    {"top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"repetition_penalty": 1e-38, "logit_bias": ((20, -100.0), (21, 100.0))},
]


@pytest.mark.parametrize("vocab_size", [VOCAB, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_row_with_nan_or_inf_or_nothing_finite_gets_no_token(
    with_mask: bool, dtype: torch.dtype, vocab_size: int
) -> None:
    """Wherever it is: where edits touch it and where a mask forbids it too. The rows beside it get theirs."""
    params = [Sampling(max_tokens=9, seed=4, logprobs=1, **given) for given in PARAMS]
    for bad in (NAN, INF):
        for place in (0, 2, 20, 21, vocab_size - 1):
            for broken in range(len(params)):
                logits = some_logits(len(params), vocab_size=vocab_size).to(dtype)
                rows = rows_of(params, [0] * len(params), vocab_size)
                if with_mask:
                    rows = masked(rows, {row: {5, 20} for row in range(len(params))}, vocab_size)
                fine = sample(logits, rows).to_host().result().token_ids.tolist()
                assert NO_TOKEN not in fine
                logits[broken, place] = bad
                drawn = sample(logits, rows)
                assert 0 <= int(drawn.token_ids.min()) <= int(drawn.token_ids.max()) < vocab_size, (
                    "the next step reads it"
                )
                found = drawn.to_host().result().token_ids.tolist()
                assert found == [*fine[:broken], NO_TOKEN, *fine[broken + 1 :]]
    assert choose(torch.full((6, vocab_size), -INF, dtype=dtype), params).token_ids.tolist() == [NO_TOKEN] * 6


def test_a_row_of_minus_infinity_but_for_one_token_gets_it() -> None:
    logits = torch.full((len(PARAMS), VOCAB), -INF)
    logits[:, 17] = -300.0
    params = [Sampling(max_tokens=9, **given) for given in PARAMS]
    assert choose(logits, params).token_ids.tolist() == [17] * len(PARAMS)


# Masks


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 50, 2048])
def test_a_mask_leaves_only_its_tokens_and_touches_no_other_row(vocab_size: int) -> None:
    params = [Sampling(max_tokens=9, temperature=temperature, seed=6) for temperature in (0.0, 1.0, 0.0, 2.0)]
    logits = some_logits(4, vocab_size=vocab_size)
    kept = logits.clone()
    rows = rows_of(params, [0] * 4, vocab_size)
    free = sample(logits, rows).to_host().result().token_ids.tolist()
    for token in {0, 30, vocab_size - 1}:
        found = sample(logits, masked(rows, {3: {token}, 0: {token}}, vocab_size)).to_host().result().token_ids.tolist()
        assert found == [token, free[1], free[2], token]
    assert torch.equal(logits, kept)


def test_a_mask_that_leaves_nothing_gives_no_token() -> None:
    """Also where edits forbid what the mask allows; edits alone never leave a row without a token."""
    params = [
        Sampling(max_tokens=9, temperature=temperature, min_tokens=3, stop_token_ids=frozenset({8}))
        for temperature in (0.0, 1.0)
    ]
    rows = rows_of(params, [0, 0], VOCAB)
    for allowed in (set(), {8}):
        assert sample(some_logits(2), masked(rows, {0: allowed, 1: allowed})).to_host().result().token_ids.tolist() == [
            -1,
            -1,
        ]
    assert sample(some_logits(2), masked(rows, {0: {8, 9}, 1: {9}})).to_host().result().token_ids.tolist() == [9, 9]


# Several tokens of a sequence in one step


def test_a_row_that_stands_there_several_times_gets_the_token_of_each_position() -> None:
    params = [random_sampling(number) for number in range(16)]
    table = SamplingTable(16, VOCAB, CPU)
    for row, sampling in enumerate(params):
        table.put(row, sampling, PROMPT)
    rows, positions = np.repeat(np.arange(16), 4), np.tile(np.arange(4), 16)
    logits = some_logits(64)
    together = sample(logits, table.take(rows, positions)).to_host().result()
    for index, (row, position) in enumerate(zip(rows, positions, strict=True)):
        alone = choose(logits[index : index + 1], [params[row]], [position])
        assert together.token_ids[index] == alone.token_ids[0]
        assert (index in together.logprobs) == (0 in alone.logprobs)


def test_the_same_logits_at_other_positions_give_other_tokens() -> None:
    table = SamplingTable(1, VOCAB, CPU)
    table.put(0, Sampling(max_tokens=9, temperature=5.0, seed=1), PROMPT)
    rows = table.take(np.zeros(200, dtype=np.int32), np.arange(200))
    found = sample(some_logits(1).expand(200, -1), rows).to_host().result().token_ids.tolist()
    assert len(set(found)) > 20


def test_no_rows_give_no_tokens() -> None:
    table = SamplingTable(4, VOCAB, CPU)
    table.put(0, random_sampling(2), PROMPT)
    none = np.zeros(0, dtype=np.int64)
    assert sample(torch.empty(0, VOCAB), table.take(none, none)).to_host().result().token_ids.tolist() == []
