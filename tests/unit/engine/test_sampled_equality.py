"""An answer drawn with a seed is the same alone, in a batch, in chunks, after preemption, and computed by two engines.

In float32. What it is alone is held against transformers' logits, read plainly in float64.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baton.core.ids import SequenceId
from baton.core.request import Sampling
from baton.engine import preemption
from baton.engine.continuous_batch import ContinuousBatch
from baton.engine.engine import Engine
from baton.engine.members import Goal
from baton.engine.policies import policy
from baton.engine.sequence import Sequence

from ...batch_runs import Way, run
from ...near_ties import NearTies, Values, chosen, edited

NEW_TOKENS = 24
VOCAB = 1500  # more than the best that are ranked first, so that every way to draw comes up
AT_ONCE = 64
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 64, 199, 200)  # of prompts; the others' are drawn
BRANCHES = 3  # of every fourth request
STOPS = frozenset(range(5, VOCAB, 25))
MOST_NEAR_TIES = 2  # of 64 answers, about 1500 tokens; none is usual

Answers = list[list[int]]


def sampling_of(number: int) -> dict[str, Any]:
    """A mix of everything; every fifth is without a filter."""
    dice = random.Random(number)
    filters = [
        {"top_k": dice.choice([3, 20, 200, 1100])},
        {"top_p": dice.uniform(0.5, 0.98)},
        {"min_p": dice.uniform(0.01, 0.2)},
        {"top_k": 50, "top_p": dice.uniform(0.7, 0.98), "min_p": 0.01},
        {},
    ]
    edits = [
        {},
        {"repetition_penalty": dice.uniform(1.05, 1.3)},
        {"presence_penalty": dice.uniform(-0.5, 1.0), "frequency_penalty": dice.uniform(-0.3, 0.8)},
        {"logit_bias": tuple((token, dice.uniform(-5, 5)) for token in sorted(dice.sample(range(VOCAB), 6)))},
        {"min_tokens": dice.randint(2, NEW_TOKENS), "stop_token_ids": STOPS},
        {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "logit_bias": ((7, -100.0), (9, 2.0))},
        {"min_tokens": 4, "stop_token_ids": STOPS, "presence_penalty": 0.4},
    ]
    chosen = filters[number % len(filters)] | edits[number % len(edits)]
    return {"temperature": dice.uniform(0.7, 1.3), "seed": dice.getrandbits(64), **chosen}


def requests() -> list[tuple[tuple[int, ...], Sampling]]:
    """The sixty-four, each time anew; the branches of a request stand side by side."""
    numbers, asked = random.Random(8), []
    number = 0
    while len(asked) < AT_ONCE:
        length = LENGTHS[number] if number < len(LENGTHS) else numbers.randint(1, 200)
        prompt = tuple(numbers.randrange(2, VOCAB) for _ in range(length))
        for branch in range(1 if number % 4 else BRANCHES):
            asked.append((prompt, Sampling(max_tokens=NEW_TOKENS, branch=branch, **sampling_of(number))))
        number += 1
    return asked[:AT_ONCE]


def sequences() -> list[Sequence]:
    return [Sequence(SequenceId(f"r/{i}"), prompt, sampling) for i, (prompt, sampling) in enumerate(requests())]


@pytest.fixture(scope="module")
def alone(checkpoint: Callable[..., Path]) -> Answers:
    """Each in a batch of its own, where nothing is cached."""
    path = checkpoint(vocab_size=VOCAB)
    engine = Engine.build(path, torch.float32, torch.device("cpu"), kv_bytes=1 << 22)
    answers = []
    for number, (prompt, sampling) in enumerate(requests()):
        seq = Sequence(SequenceId("r/0"), prompt, sampling, salt=f"{number}")
        run(engine, [seq])
        assert seq.cached_tokens == 0
        answers.append(seq.tokens)
    return answers


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[..., Path], alone: Answers) -> list[Values]:
    """Transformers' logits for every token of those answers, [tokens, V] each, edited as was asked."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(vocab_size=VOCAB), dtype=torch.float32)
    found = []
    for (prompt, sampling), answer in zip(requests(), alone, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :].double().numpy()
        rows = [edited(row, sampling, prompt, answer[:position]) for position, row in enumerate(logits)]
        found.append(np.stack(rows))
    return found


def assert_alike(what: str, answers: Answers, alone: Answers, reference: list[Values]) -> None:
    """But for near-ties, of which there are very few."""
    near_ties = NearTies()
    for number, (tokens, expected, (_, sampling)) in enumerate(zip(answers, alone, requests(), strict=True)):
        near_ties.compare(number, tokens, expected, reference[number].__getitem__, sampling)
    near_ties.report(what, MOST_NEAR_TIES)


def test_the_requests_are_of_every_kind(alone: Answers) -> None:
    asked = [sampling for _, sampling in requests()]
    assert len(asked) == len(alone) == AT_ONCE
    for name in ("top_k", "min_p", "min_tokens", "branch", "presence_penalty", "frequency_penalty"):
        assert sum(getattr(sampling, name) != 0 for sampling in asked) >= 10, name
    assert sum(sampling.top_p < 1 for sampling in asked) >= 10
    assert sum(sampling.repetition_penalty != 1 for sampling in asked) >= 10
    assert sum((sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1.0, 0.0) for sampling in asked) >= 10
    assert len({len(prompt) for prompt, _ in requests()}) > 20
    assert len({tuple(answer) for answer in alone}) == AT_ONCE  # branches differ too
    assert sum(len(answer) < NEW_TOKENS for answer in alone) >= 2  # stop tokens are chosen
    assert sum(map(len, alone)) > 0.8 * AT_ONCE * NEW_TOKENS


def test_alone_every_token_is_what_a_plain_reading_of_transformers_logits_draws(
    alone: Answers, reference: list[Values]
) -> None:
    """Given the tokens before it, so that nothing goes uncompared behind a near-tie."""
    near_ties = NearTies()
    for number, (answer, (_, sampling)) in enumerate(zip(alone, requests(), strict=True)):
        for position, token in enumerate(answer):
            values = reference[number][position]
            expected = [*answer[:position], chosen(values, sampling, position)]
            near_ties.compare(number, [*answer[:position], token], expected, lambda _, found=values: found, sampling)
    near_ties.report("alone, token by token", MOST_NEAR_TIES)


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("step_tokens", [16, 64, 512])
def test_chunks_batches_and_look_ahead_change_no_draw(
    step_tokens: int, lookahead: bool, alone: Answers, reference: list[Values], build: Callable[..., Engine]
) -> None:
    engine, asked = build(num_blocks=700, vocab_size=VOCAB), sequences()
    run(engine, asked, Way(step_tokens=step_tokens, lookahead=lookahead))
    assert_alike(f"chunks of {step_tokens}", [seq.tokens for seq in asked], alone, reference)


def test_sixty_four_in_one_step_draw_what_each_draws_alone(
    alone: Answers, reference: list[Values], build: Callable[..., Engine]
) -> None:
    engine, asked = build(num_blocks=700, vocab_size=VOCAB), sequences()
    batch = ContinuousBatch(engine, policy("fcfs"), step_tokens=8192)
    random.Random(3).shuffle(asked)  # so that no row is the place of its request
    for seq in asked:
        batch.add(seq)
    largest = 0
    while (result := batch.step(0.0)) is not None:
        largest = max(largest, len(result.tokens))
    assert largest == AT_ONCE
    answers = {seq.sequence_id: seq.tokens for seq in asked}
    assert_alike("64 in a step", [answers[seq.sequence_id] for seq in sequences()], alone, reference)


@pytest.mark.parametrize("kind", ["swap", "recompute"])
@pytest.mark.parametrize(
    "way",
    [Way(step_tokens=64, join_every=0), Way(step_tokens=48, lookahead=True)],
    ids=["all at once", "one by one, look-ahead"],
)
def test_preemption_at_random_steps_changes_no_draw(
    way: Way,
    kind: str,
    alone: Answers,
    reference: list[Values],
    build: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preemption, "cheaper_to_swap", lambda *_: True)  # else measured times decide, and vary
    swap_blocks, happened = 160 if kind == "swap" else 0, 0
    for steps in (1, 2):  # each time others
        engine, asked = build(num_blocks=50, vocab_size=VOCAB), sequences()
        counts = run(engine, asked, replace(way, swap_blocks=swap_blocks, ballast=steps))
        assert_alike(f"preempted, {counts}", [seq.tokens for seq in asked], alone, reference)
        happened += counts.swapped if swap_blocks else counts.recomputed
    assert happened >= 20


@pytest.mark.parametrize("lookahead", [False, True])
def test_an_answer_whose_prompt_another_engine_computed_draws_the_same(
    lookahead: bool, alone: Answers, reference: list[Values], build: Callable[..., Engine]
) -> None:
    source, reader = (build(num_blocks=700, vocab_size=VOCAB) for _ in range(2))
    computing = ContinuousBatch(source, policy("fcfs"), step_tokens=64, lookahead=lookahead)
    landing = ContinuousBatch(reader, policy("fcfs"), step_tokens=64, lookahead=lookahead)
    there, here = sequences(), sequences()
    for seq in there:
        computing.add(seq, goal=Goal.PROMPT)
    while computing.step(0.0) is not None:
        pass
    for seq in here:
        landing.add(seq, goal=Goal.LANDING)
    theirs = {seq.sequence_id: seq for seq in there}
    landed = 0
    while (result := landing.step(0.0)) is not None:
        for seq in result.started:
            lent, block_tokens = theirs[seq.sequence_id], reader.geometry.block_tokens
            for place in range(-(-seq.computed // block_tokens), len(seq.blocks)):  # others hold those before it too
                moved = source.kv_cache.block_bytes_view[lent.blocks[place]]
                reader.kv_cache.block_bytes_view[seq.blocks[place]] = moved
            landing.landed(seq, lent.tokens[0])
            computing.remove(lent)
            landed += 1
    assert landed == AT_ONCE
    assert {len(seq.tokens) for seq in there} == {1}
    assert_alike("by two engines", [seq.tokens for seq in here], alone, reference)
    for engine in (source, reader):
        engine.ledger.check()
        assert engine.ledger.held_count == 0
