"""Penalties, bias and min_tokens: what they do to logits, and that it depends on nothing but the sequence."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.ids import SequenceId
from baton.core.request import EndReason, Sampling
from baton.engine.engine import Engine
from baton.engine.logit_edits import LogitEdits
from baton.engine.sequence import Sequence

from ...batch_runs import Way, run
from .sampling import choose, with_edits

VOCAB = 40
INF = float("inf")
TOKENS = st.integers(0, VOCAB - 1)
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.just(500),
    repetition_penalty=st.just(1.0) | st.floats(0.1, 2),
    presence_penalty=st.just(0.0) | st.floats(-2, 2),
    frequency_penalty=st.just(0.0) | st.floats(-2, 2),
    logit_bias=st.dictionaries(TOKENS, st.floats(-100, 100), max_size=6).map(lambda bias: tuple(sorted(bias.items()))),
    min_tokens=st.integers(0, 12),
    stop_token_ids=st.frozensets(TOKENS, max_size=4),
)


def naive(logits: list[float], params: Sampling, prompt: list[int], answer: list[int]) -> list[float]:
    """By the words of the contract, one token at a time, in float64."""
    bias, found = dict(params.logit_bias), []
    for token, logit in enumerate(logits):
        value = logit + bias.get(token, 0.0)
        if token in prompt or token in answer:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * answer.count(token)
        value -= params.presence_penalty if token in answer else 0.0
        if token in params.stop_token_ids and len(answer) < params.min_tokens:
            value = -INF
        found.append(value)
    return found


def edits_of(params: Sampling, prompt: list[int], answer: list[int]) -> LogitEdits | None:
    """As they are after these tokens."""
    return LogitEdits.of(params, prompt, answer)


def a_sequence(index: int, prompt: list[int], params: Sampling, answer: list[int] | None = None) -> Sequence:
    seq = Sequence(SequenceId(f"r/{index}"), tuple(prompt), params)
    for token in answer or ():
        seq.tokens.append(token)
    return seq


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(
        st.tuples(SAMPLINGS, st.lists(TOKENS, min_size=1, max_size=30), st.lists(TOKENS, max_size=100)),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 1000),
)
def test_edits_are_what_a_plain_reading_gives(rows: list[tuple[Sampling, list[int], list[int]]], seed: int) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 5
    edits = [edits_of(*row) for row in rows]
    found = with_edits(logits, edits).double()
    expected = torch.tensor(
        [naive(line, *row) for line, row in zip(logits.tolist(), rows, strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_who_asks_for_nothing_has_no_edits_and_min_tokens_alone_end_with_them() -> None:
    assert edits_of(Sampling(max_tokens=9, stop_token_ids=frozenset({3})), [1], [2]) is None
    params = Sampling(max_tokens=9, min_tokens=3, stop_token_ids=frozenset({3}))
    assert [edits_of(params, [1], [5] * count) is None for count in range(5)] == [False, False, False, True, True]


def test_a_table_holds_each_token_once_however_long_the_answer() -> None:
    edits = edits_of(Sampling(max_tokens=2000, repetition_penalty=1.5), [7] * 50, [*range(1000), *range(900)])
    assert edits is not None
    assert sorted(edits.token_ids.tolist()) == list(range(1000))


def test_as_many_biases_and_stop_tokens_as_may_be_given_are_all_there() -> None:
    stops = frozenset(range(500, 1524))
    bias = tuple((token, 1.0) for token in range(1024))
    edits = edits_of(Sampling(max_tokens=9, logit_bias=bias, min_tokens=1, stop_token_ids=stops), [7], [])
    found = with_edits(torch.zeros(1, 2000), [edits])[0]
    assert found[:500].eq(1).all()
    assert found[500:1524].eq(-INF).all()
    assert found[1524:].eq(0).all()


def test_the_logits_and_their_logprobs_stay_as_they_were() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))
    kept = logits.clone()
    best = int(logits[0].argmax())
    params = Sampling(max_tokens=9, temperature=0.0, logprobs=1, logit_bias=((best, -100.0),))
    plain = Sampling(max_tokens=9, temperature=0.0, logprobs=1)
    sampled = choose(logits, [params, plain])
    assert torch.equal(logits, kept)
    first = sampled.logprobs[0]
    table = torch.log_softmax(kept, -1)
    assert sampled.token_ids[0] == int(kept[0].topk(2).indices[1])
    assert first.logprob == pytest.approx(float(table[0, sampled.token_ids[0]]))
    assert first.top[0] == (best, pytest.approx(float(table[0, best])))
    assert sampled.token_ids[1] == int(kept[1].argmax())


def random_params(number: int) -> Sampling:
    choose = random.Random(number)
    return Sampling(
        max_tokens=500,
        temperature=choose.choice([0.0, 0.7, 1.5]),
        top_k=choose.choice([0, 10]),
        top_p=choose.choice([0.8, 1.0]),
        seed=choose.getrandbits(64),
        branch=choose.randrange(4),
        repetition_penalty=choose.choice([1.0, 1.3, 0.7]),
        presence_penalty=choose.choice([0.0, 0.9, -0.4]),
        frequency_penalty=choose.choice([0.0, 0.6, -0.2]),
        logit_bias=choose.choice([(), ((3, 4.0), (17, -100.0))]),
        min_tokens=choose.choice([0, 0, 20]),
        stop_token_ids=frozenset({choose.randrange(VOCAB)}),
    )


def test_a_vocabulary_of_stop_tokens_alone_still_gives_a_token() -> None:
    for temperature in (0.0, 1.0):
        params = Sampling(max_tokens=9, temperature=temperature, min_tokens=5, stop_token_ids=frozenset(range(VOCAB)))
        (token,) = choose(torch.randn(1, VOCAB), [params]).token_ids
        assert 0 <= token < VOCAB


def test_a_tiny_repetition_penalty_gives_no_infinity() -> None:
    params = Sampling(max_tokens=9, repetition_penalty=1e-38, logit_bias=((4, 100.0),))
    assert torch.isfinite(with_edits(torch.randn(1, VOCAB) * 9, [edits_of(params, list(range(VOCAB)), [])])).all()


# Through the engine


def prompts(count: int, longest: int, seed: int) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(2, 211) for _ in range(numbers.randint(1, longest))] for _ in range(count)]


def answers_of(engine: Engine, sequences: list[Sequence], chunk: int = 64) -> list[list[int]]:
    run(engine, sequences, Way(step_tokens=chunk, join_every=0))
    return [seq.tokens for seq in sequences]


def reference(path: Path, prompt: list[int], **options: Any) -> list[int]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    answer: list[int] = found[0, len(prompt) :].tolist()
    return answer


@pytest.mark.parametrize("penalty", [1.3, 0.8])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_repetition_penalty_answers_like_transformers(
    family: str, penalty: float, checkpoint: Callable[..., Path], build: Callable[..., Engine]
) -> None:
    asked = prompts(4, 80, seed=5)
    path = checkpoint(family)
    expected = [reference(path, prompt, max_new_tokens=32, repetition_penalty=penalty) for prompt in asked]
    assert expected != [reference(path, prompt, max_new_tokens=32) for prompt in asked]
    params = Sampling(max_tokens=32, temperature=0.0, repetition_penalty=penalty)
    found = answers_of(build(family), [a_sequence(i, prompt, params) for i, prompt in enumerate(asked)], chunk=32)
    assert found == expected


def test_min_tokens_answer_like_transformers(checkpoint: Callable[..., Path], build: Callable[..., Engine]) -> None:
    prompt = prompts(1, 40, seed=6)[0]
    free = reference(checkpoint("Llama"), prompt, max_new_tokens=24)
    stops = sorted({free[0], free[4]})
    expected = reference(
        checkpoint("Llama"), prompt, max_new_tokens=24, min_new_tokens=9, eos_token_id=stops, repetition_penalty=1.2
    )
    params = Sampling(
        max_tokens=24, temperature=0.0, min_tokens=9, stop_token_ids=frozenset(stops), repetition_penalty=1.2
    )
    assert answers_of(build(), [a_sequence(0, prompt, params)]) == [expected]
    assert not set(expected[:9]) & set(stops)


def test_an_answer_may_stop_with_the_first_token_after_min_tokens(build: Callable[..., Engine]) -> None:
    prompt = prompts(1, 40, seed=7)[0]
    params = Sampling(max_tokens=24, temperature=0.0, logit_bias=((9, 100.0),), stop_token_ids=frozenset({9}))
    for least in (0, 1, 2, 7, 24):
        seq = a_sequence(0, prompt, replace(params, min_tokens=least))
        answers_of(build(), [seq])
        assert len(seq.tokens) == min(least + 1, 24)
        assert seq.end_reason() is (EndReason.LENGTH if least == 24 else EndReason.STOP)
        assert (9 in seq.tokens) == (least < 24)


def drawn(number: int, count: int) -> Sampling:
    params = random_params(number)
    return replace(params, max_tokens=count, stop_token_ids=frozenset({11, 12, 13}), min_tokens=params.min_tokens and 9)


def test_alone_or_in_a_batch_of_64_the_answers_are_the_same(build: Callable[..., Engine]) -> None:
    asked = prompts(64, 50, seed=8)
    params = [drawn(number, 24) for number in range(64)]
    engine = build(num_blocks=500)
    sequences = [a_sequence(i, *pair) for i, pair in enumerate(zip(asked, params, strict=True))]
    together = answers_of(engine, sequences, chunk=17)
    alone = [answers_of(engine, [a_sequence(i, *pair)])[0] for i, pair in enumerate(zip(asked, params, strict=True))]
    assert together == alone
    assert sum(len(set(answer)) > 8 for answer in together) > 32


@pytest.mark.parametrize("number", range(8))
def test_a_replayed_sequence_continues_as_it_would_have(number: int, build: Callable[..., Engine]) -> None:
    prompt, engine = prompts(1, 60, seed=number)[0], build()
    (whole,) = answers_of(engine, [a_sequence(0, prompt, drawn(number, 30))])
    for known in (1, len(whole) // 2, len(whole) - 1):
        assert answers_of(engine, [a_sequence(0, prompt, drawn(number, 30), whole[:known])], chunk=23) == [whole]


def test_edits_follow_from_the_tokens_alone() -> None:
    """Whoever adds them: prefill's engine, or a decode worker that was told the first."""
    params, dice = random_params(5), np.random.default_rng(5)
    answer = dice.integers(0, VOCAB, 50).tolist()
    one, other = edits_of(params, [1, 2], answer), edits_of(params, [1, 2], answer[:1])
    assert one is not None
    assert other is not None
    for token in answer[1:]:
        other.add(token)
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert one.values.tolist() == other.values.tolist()
