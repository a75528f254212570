"""The batch against the fake model, whose next token depends on every token's KV in the sequence's own blocks: an
aliased, lost or stale block changes an answer."""

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.core.errors import ModelFault
from baton.core.ids import BlockId, SequenceId
from baton.core.request import EndReason, Sampling
from baton.engine.accounts import OUTPUT_WEIGHT
from baton.engine.continuous_batch import ContinuousBatch
from baton.engine.engine import Engine
from baton.engine.members import Goal, Member
from baton.engine.policies import POLICIES, policy
from baton.engine.sequence import Sequence
from baton.engine.step_input import StepInput
from baton.engine.step_result import StepResult

from ...fakes import VOCAB, answer, fake_engine

BLOCK_TOKENS = 16


def batch_of(
    num_blocks: int = 64, *, max_batch: int = 8, swap_blocks: int = 0, lookahead: bool = False, step_tokens: int = 40
) -> tuple[Engine, ContinuousBatch]:
    engine = fake_engine(num_blocks, max_batch=max_batch)
    swap_bytes = swap_blocks * engine.geometry.block_bytes
    return engine, ContinuousBatch(
        engine, policy("fcfs"), step_tokens=step_tokens, swap_bytes=swap_bytes, lookahead=lookahead
    )


def sequence(name: str, prompt: Iterable[int], max_tokens: int, **sampling: object) -> Sequence:
    chosen = Sampling(max_tokens=max_tokens, **{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return Sequence(SequenceId(name), tuple(prompt), chosen)


def prompt_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def complete(seq: Sequence) -> list[int]:
    """Its whole answer."""
    tokens = answer(seq.prompt, seq.sampling.max_tokens)
    stop = next((at for at, token in enumerate(tokens, 1) if token in seq.sampling.stop_token_ids), len(tokens))
    return tokens[:stop]


def land(engine: Engine, seq: Sequence) -> None:
    """Write the KV of its prompt, as the fake model would have."""
    pool = engine.kv_cache.pool
    for position in range(seq.computed // BLOCK_TOKENS * BLOCK_TOKENS, len(seq.prompt)):
        block = seq.blocks[position // BLOCK_TOKENS]
        if engine.ledger.holders(block) > 1:
            continue  # borrowed: it is there, and nobody may write it
        pool[block, 0, 0, 0, position % BLOCK_TOKENS] = float(seq.prompt[position])
        pool[block, 0, 1, 0, position % BLOCK_TOKENS] = float(position)


def run(batch: ContinuousBatch) -> list[StepResult]:
    results = []
    while (result := batch.step(0.0)) is not None:
        results.append(result)
        assert len(results) < 5000, "the batch never comes to an end"
    return results


def assert_clean(engine: Engine, batch: ContinuousBatch) -> None:
    engine.ledger.check()
    assert engine.ledger.held_count == 0
    assert (batch.running, batch.waiting, list(batch.holders())) == (0, 0, [])


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize(("num_blocks", "swap_blocks"), [(64, 0), (13, 0), (13, 64), (13, 3)])
def test_answers_do_not_depend_on_room_look_ahead_or_the_way_of_preemption(
    num_blocks: int, swap_blocks: int, lookahead: bool
) -> None:
    engine, batch = batch_of(num_blocks, swap_blocks=swap_blocks, lookahead=lookahead)
    sequences = [sequence(f"s/{i}", prompt_of(i, 1 + 7 * i % 60), 40) for i in range(12)]
    for i, seq in enumerate(sequences):
        batch.add(seq, float(i))
    given: dict[Sequence, list[int]] = {seq: [] for seq in sequences}
    for result in run(batch):
        for seq, token, _ in result.tokens:
            given[seq].append(token)
    for seq in sequences:
        assert given[seq] == seq.tokens == answer(seq.prompt, 40)
    assert_clean(engine, batch)
    counts = batch.preemptions
    assert (counts.swapped + counts.recomputed > 0) == (num_blocks == 13)
    assert (counts.swapped > 0) == (num_blocks == 13 and swap_blocks > 0)


def test_a_stop_token_found_late_costs_one_slot_and_is_never_followed() -> None:
    engine, batch = batch_of(lookahead=True)
    expected = answer([5, 6, 7], 12)
    stop = expected[5]
    seq = sequence("s/0", [5, 6, 7], 12, stop_token_ids=frozenset({stop}))
    batch.add(seq)
    results = run(batch)
    assert seq.tokens == expected[: expected.index(stop) + 1]
    assert [entry for result in results for entry in result.ended] == [(seq, EndReason.STOP)]
    slots = sum(result.stats.decode_tokens for result in results)
    assert slots == len(seq.tokens)  # one for each token but the first, and one that was dropped
    assert_clean(engine, batch)


def test_blocks_of_an_answer_that_ended_stay_while_a_step_under_way_writes_them() -> None:
    engine, batch = batch_of(lookahead=True)
    seq = sequence("s/0", prompt_of(1, 20), 30)
    batch.add(seq)
    batch.step(0.0)
    batch.step(0.0)
    batch.remove(seq)
    assert engine.ledger.held_count == 2
    assert [holder.state for holder in batch.holders()] == ["leaving"]
    run(batch)
    assert_clean(engine, batch)


def test_a_prompt_alone_keeps_its_blocks_until_it_is_removed() -> None:
    engine, batch = batch_of()
    seq = sequence("s/0", prompt_of(1, 50), 30)
    batch.add(seq, goal=Goal.PROMPT)
    results = run(batch)
    assert [seq.computed for result in results for _ in result.advanced] == [50, 50]  # 40, then 10
    assert seq.tokens == answer(seq.prompt, 1)
    assert (batch.running, engine.ledger.held_count) == (0, 4)
    batch.remove(seq)
    batch.remove(seq)
    assert_clean(engine, batch)


def test_a_prompt_whose_only_token_ends_the_answer_is_over_with_it() -> None:
    engine, batch = batch_of()
    batch.add(sequence("s/0", prompt_of(1, 50), 1), goal=Goal.PROMPT)
    assert [reason for result in run(batch) for _, reason in result.ended] == [EndReason.LENGTH]
    assert_clean(engine, batch)


def test_answers_to_one_prompt_share_its_blocks_and_compute_it_once() -> None:
    engine, batch = batch_of(step_tokens=64)
    prompt = prompt_of(3, 59)  # three full blocks and eleven tokens
    sequences = [sequence(f"s/{i}", prompt, 3) for i in range(4)]
    for i, seq in enumerate(sequences):
        batch.add(seq, float(i))
    first = batch.step(0.0)
    assert first is not None
    assert first.started == sequences[:1]  # the others wait for what it computes
    second = batch.step(0.0)
    assert second is not None
    assert second.started == sequences[1:]
    assert [seq.cached_tokens for seq in sequences] == [0, 58, 58, 58]
    shared = set(sequences[0].blocks[:3])
    assert all(set(seq.blocks[:3]) == shared for seq in sequences)
    assert len({seq.blocks[3] for seq in sequences}) == 4  # each borrower copied the last one before it wrote
    run(batch)
    assert [seq.tokens for seq in sequences] == [answer(prompt, 3)] * 4
    assert_clean(engine, batch)


def test_a_borrowed_block_that_its_owner_filled_is_copied_although_the_owner_is_gone() -> None:
    engine, batch = batch_of()
    prompt = prompt_of(5, 20)  # a full block and four tokens
    owner, borrower = sequence("s/0", prompt, 20), sequence("s/1", prompt, 20)
    batch.add(owner, 0.0)
    batch.step(0.0)
    batch.add(borrower, 1.0, Goal.LANDING)
    while owner.tokens != answer(prompt, 20):
        batch.step(0.0)
    assert engine.ledger.holders(borrower.blocks[1]) == 1
    batch.landed(borrower, answer(prompt, 1)[0])
    borrower.tokens[0] = 7  # an answer of its own
    run(batch)
    again = sequence("s/2", [*prompt, *owner.tokens[:13]], 5)
    batch.add(again, 2.0)
    run(batch)
    assert again.cached_tokens == 32
    assert again.tokens == answer(again.prompt, 5)
    assert_clean(engine, batch)


def test_a_tail_is_lent_by_whom_it_belongs_to_alone() -> None:
    engine, batch = batch_of()
    prompt = prompt_of(5, 20)  # a full block and four tokens
    owner, borrower, late = (sequence(f"s/{i}", prompt, length) for i, length in enumerate((4, 30, 3)))
    batch.add(owner, 0.0)
    batch.step(0.0)
    batch.add(borrower, 1.0, Goal.LANDING)  # finds all of the prompt, the owner's last block among it
    batch.step(0.0)
    batch.landed(borrower, answer(prompt, 1)[0])
    while owner.tokens != answer(prompt, 4) or len(borrower.tokens) < 6:
        batch.step(0.0)
    batch.add(late, 2.0)  # the owner is gone, and its block with it
    run(batch)
    assert [borrower.tokens, late.tokens] == [answer(prompt, 30), answer(prompt, 3)]
    assert_clean(engine, batch)


def test_a_borrower_leaves_room_for_its_copy() -> None:
    engine, batch = batch_of(3)
    prompt = prompt_of(5, 20)
    owner, borrower = sequence("s/0", prompt, 8), sequence("s/1", prompt, 8)
    batch.add(owner, 0.0)
    batch.step(0.0)
    kept = engine.ledger.allocate(1)  # the last one
    batch.add(borrower, 1.0, Goal.LANDING)
    batch.step(0.0)
    assert not borrower.blocks
    engine.ledger.release(kept)
    run(batch)
    assert owner.tokens == answer(prompt, 8)
    batch.remove(borrower)
    run(batch)
    assert_clean(engine, batch)


def test_a_sequence_that_comes_back_to_more_than_it_left_goes_on_from_there() -> None:
    """Another has computed more of the same prompt meanwhile: what is shared is not written again."""
    engine, batch = batch_of(swap_blocks=16, step_tokens=32)
    prompt = prompt_of(6, 160)
    slow, quick = sequence("s/0", prompt, 4), sequence("s/1", prompt, 4)
    batch.add(slow, 0.0)
    batch.step(0.0)
    batch.step(0.0)
    assert slow.computed == 64
    residents = batch._residents
    member = residents.of(slow)
    residents.preempt(member)
    residents.waiting.remove(member)  # it is not its turn yet
    batch.add(quick, 1.0)
    run(batch)
    residents.waiting.add(member)
    started = batch.step(0.0)
    assert started is not None
    assert slow.computed >= 144
    run(batch)
    assert [slow.tokens, quick.tokens] == [answer(prompt, 4)] * 2
    assert batch.preemptions.swapped == 1
    assert batch.preemptions.swap_bytes == 4 * engine.geometry.block_bytes  # out; nothing had to come in
    assert_clean(engine, batch)


def test_a_sequence_that_landed_is_not_asked_for_its_prompts_logprobs_when_it_is_computed_again() -> None:
    engine, batch = batch_of(13, step_tokens=48)
    prompt = prompt_of(7, 48)
    landed = sequence("s/0", prompt, 20, prompt_logprobs=1)
    batch.add(sequence("s/1", prompt, 1), 0.0)  # its KV stays known, and so is all that would have to land
    run(batch)
    batch.add(landed, 1.0, Goal.LANDING)
    batch.step(0.0)
    batch.landed(landed, answer(prompt, 1)[0])
    while len(landed.tokens) < 10:
        batch.step(0.0)
    batch._residents.preempt(batch._residents.of(landed))
    run(batch)
    assert landed.tokens == answer(prompt, 20)
    assert batch.preemptions.recomputed == 1
    assert_clean(engine, batch)


def test_a_prompt_that_is_computed_before_it_can_be_preempted_keeps_its_blocks() -> None:
    engine, batch = batch_of(lookahead=True)
    seq = sequence("s/0", prompt_of(8, 30), 5)
    batch.add(seq, goal=Goal.PROMPT)
    batch.step(0.0)  # its only chunk is under way
    batch._residents.preempt(batch._residents.of(seq))
    run(batch)
    assert (len(seq.blocks), seq.tokens) == (2, answer(seq.prompt, 1))
    assert batch.preemptions.recomputed == 0
    batch.remove(seq)
    assert_clean(engine, batch)


def test_newcomers_that_land_do_not_keep_a_preempted_sequence_from_its_row() -> None:
    _, batch = batch_of(64, max_batch=2)
    old = sequence("s/old", prompt_of(9, 20), 30)
    batch.add(old, 0.0)
    batch.step(0.0)
    batch._residents.preempt(batch._residents.of(old))
    waiting: list[Sequence] = []
    for turn in range(200):
        if batch.waiting < 3:
            newcomer = sequence(f"s/{turn}", prompt_of(100 + turn, 20), 6)
            batch.add(newcomer, 1.0 + turn, Goal.LANDING)
            waiting.append(newcomer)
        batch.step(float(turn))
        for seq in [one for one in waiting if one.blocks]:
            waiting.remove(seq)
            batch.landed(seq, 1)
        if old.end_reason() is not None:
            break
    assert old.tokens == answer(old.prompt, 30)


def test_the_oldest_is_never_preempted() -> None:
    engine, batch = batch_of(12, swap_blocks=0)
    sequences = [sequence(f"s/{i}", prompt_of(i, 30), 100) for i in range(5)]
    for i, seq in enumerate(sequences):
        batch.add(seq, float(i))
    ended = [seq for result in run(batch) for seq, _ in result.ended]
    assert ended[0] is sequences[0]
    assert batch.preemptions.recomputed > 0
    assert_clean(engine, batch)


@pytest.mark.parametrize("goal", [Goal.ANSWER, Goal.LANDING])
@pytest.mark.parametrize("swap", [0, 64])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_nobody_is_starved_by_newcomers_however_many_come(name: str, swap: int, goal: Goal) -> None:
    """Blocks are short, rows too, and in each step a newcomer comes that the policy likes better: short, of the highest
    priority, of a tenant of its own. A step takes ten seconds, so ages count."""
    engine = fake_engine(14, max_batch=3)
    swap_bytes = swap * engine.geometry.block_bytes
    batch = ContinuousBatch(engine, policy(name), step_tokens=40, swap_bytes=swap_bytes, lookahead=True)
    sampling = Sampling(max_tokens=60, temperature=0.0)
    old = Sequence(SequenceId("old"), tuple(prompt_of(1, 90)), sampling, priority=-5, tenant="old")
    batch.add(old, 0.0, goal)
    pending: list[Sequence] = []
    for turn in range(3000):
        now = 10.0 * turn
        if batch.waiting < 8:
            short = Sampling(max_tokens=2 + turn % 5, temperature=0.0)
            prompt = tuple(prompt_of(turn, 10 + turn % 40))
            newcomer = Sequence(SequenceId(f"s/{turn}"), prompt, short, priority=5, tenant=f"t{turn}")
            batch.add(newcomer, now, (Goal.ANSWER, Goal.LANDING)[turn % 2])
        result = batch.step(now)
        if result is not None:
            assert all(reason is EndReason.LENGTH for _, reason in result.ended)
            if any(seq is old for seq, _ in result.ended):
                break
            pending += [seq for seq in result.started if not seq.tokens and batch._residents.of(seq).lands]
        for seq in pending:
            land(engine, seq)
            batch.landed(seq, answer(seq.prompt, 1)[0])
        pending = []
    else:
        raise AssertionError(f"{len(old.tokens)} of 60 tokens after 3,000 steps")
    assert old.tokens == answer(old.prompt, 60)


def test_logits_that_are_no_numbers_end_their_sequence_alone() -> None:
    engine, batch = batch_of()
    forward = engine.executor.forward
    good, bad = sequence("s/0", [4, 5], 6), sequence("s/1", [6, 7], 6)
    batch.add(good, 0.0)
    batch.add(bad, 1.0)
    batch.step(0.0)

    def poisoned(step: object) -> object:
        logits = forward(step).clone()  # type: ignore[arg-type]
        logits[-1] = float("nan")
        return logits

    engine.executor.forward = poisoned  # type: ignore[method-assign,assignment]
    result = batch.step(0.0)
    engine.executor.forward = forward  # type: ignore[method-assign]
    assert result is not None
    ((ended, reason),) = result.ended
    assert ended is bad
    assert isinstance(reason, ModelFault)
    assert [seq for seq, _, _ in result.tokens] == [good]
    run(batch)
    assert good.tokens == answer([4, 5], 6)
    assert_clean(engine, batch)


def test_room_is_spared_for_those_that_somebody_waits_for() -> None:
    _, batch = batch_of(8)
    early, urgent = sequence("s/0", prompt_of(1, 60), 9), sequence("s/1", prompt_of(2, 60), 9)
    batch.add(early, 0.0, Goal.PROMPT, spare=6)
    batch.add(urgent, 1.0, Goal.PROMPT, spare=6)
    assert batch.step(0.0) is None
    batch.urge(urgent)
    result = batch.step(0.0)
    assert result is not None
    assert result.started == [urgent]


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("length", [1, 16, 17, 33])
def test_a_prompt_is_told_its_logprobs_once_however_its_last_chunk_falls(lookahead: bool, length: int) -> None:
    engine, batch = batch_of(lookahead=lookahead, step_tokens=16)
    seq = sequence("s/0", prompt_of(1, length), 3, prompt_logprobs=0)
    batch.add(seq)
    run(batch)
    assert seq.tokens == answer(seq.prompt, 3)
    assert [entry is None for entry in seq.prompt_logprobs] == [True, *[False] * (length - 1)]
    assert_clean(engine, batch)


def test_sequences_that_share_a_block_are_worth_it_together() -> None:
    """One lends its prompt's last block to another that has landed. Both give way, and the third needs no more."""
    engine, batch = batch_of(10, step_tokens=128)
    old, other = sequence("a", prompt_of(1, 30), 60), sequence("b", prompt_of(2, 18), 60)
    lender, borrower = (sequence(name, prompt_of(3, 17), 30) for name in "cd")
    for now, seq in enumerate((old, other, lender)):
        batch.add(seq, float(now))
    batch.step(2.0)
    batch.add(borrower, 3.0, Goal.LANDING)
    batch.step(3.0)
    assert lender.blocks == borrower.blocks
    taken = engine.ledger.allocate(engine.ledger.available)  # by a reservation, say
    batch.landed(borrower, answer(borrower.prompt, 1)[0])
    while len(old.blocks) == 2:
        assert batch.step(4.0) is not None
    assert batch.preemptions.recomputed == 2
    assert other.blocks
    engine.ledger.release(taken)
    run(batch)
    assert all(seq.tokens == answer(seq.prompt, len(seq.tokens)) for seq in (old, other, lender, borrower))
    assert_clean(engine, batch)


def test_a_step_that_only_preempts_is_not_the_last() -> None:
    engine, batch = batch_of(10, step_tokens=64)
    old = sequence("a", prompt_of(1, 30), 60)
    lender, borrower = (sequence(name, prompt_of(3, 17), 30) for name in "bc")
    batch.add(old, 0.0)
    batch.add(lender, 2.0)
    batch.step(2.0)
    batch.add(borrower, 3.0, Goal.LANDING)
    batch.step(3.0)
    taken = engine.ledger.allocate(engine.ledger.available)
    batch.landed(borrower, answer(borrower.prompt, 1)[0])
    while batch.step(4.0) is not None:
        pass
    assert batch.step(5.0) is None, "it stopped while something was left to do"
    assert old.tokens == answer(old.prompt, len(old.tokens))
    engine.ledger.release(taken)
    run(batch)
    assert_clean(engine, batch)


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize(("length", "steps"), [(40, 0), (40, 3), (12, 3)])
def test_kv_of_a_step_that_failed_is_found_by_nobody(length: int, steps: int, lookahead: bool) -> None:
    engine, batch = batch_of(step_tokens=64, lookahead=lookahead)
    forward, prompt = engine.executor.forward, prompt_of(1, length)
    bad = sequence("s/0", prompt, 30)

    def poisoned(step: StepInput) -> object:
        logits = forward(step)
        engine.kv_cache.pool[bad.blocks] = float("nan")
        return torch.full_like(logits, float("nan"))

    batch.add(bad)
    for _ in range(steps):
        batch.step(0.0)
    engine.executor.forward = poisoned  # type: ignore[method-assign,assignment]
    result = batch.step(0.0)
    engine.executor.forward = forward  # type: ignore[method-assign]
    if lookahead:
        result = batch.step(0.0)
    assert result is not None
    assert [seq for seq, _ in result.ended] == [bad]
    again = sequence("s/1", prompt, 5)  # at once: a step under way may still have the other's row
    batch.add(again)
    run(batch)
    assert (again.cached_tokens, again.tokens) == (0, answer(prompt, 5))
    assert_clean(engine, batch)


def test_a_pin_of_kv_that_may_be_wrong_is_none() -> None:
    engine, batch = batch_of(16, step_tokens=128)
    first = sequence("a", prompt_of(1, 64), 2)
    batch.add(first)
    run(batch)
    engine.prefix_cache.pin(first.prompt)
    forward = engine.executor.forward
    engine.executor.forward = lambda step: torch.full_like(forward(step), float("nan"))  # type: ignore[method-assign,assignment]
    batch.add(sequence("b", [*first.prompt, 5], 3))
    batch.step(0.0)
    engine.executor.forward = forward  # type: ignore[method-assign]
    assert not engine.prefix_cache.pins()
    assert_clean(engine, batch)


@pytest.mark.parametrize("goal", [Goal.LANDING, Goal.PROMPT])
def test_pins_stay_while_nobody_lacks_blocks(goal: Goal) -> None:
    """One waits for its KV, or for somebody to ask for what it computes."""
    engine, batch = batch_of(40)
    first = sequence("a", prompt_of(1, 64), 3)
    batch.add(first)
    run(batch)
    engine.prefix_cache.pin(first.prompt)
    batch.add(sequence("b", prompt_of(2, 100), 3), 0.0, goal, spare=32 if goal is Goal.PROMPT else 0)
    run(batch)
    assert engine.prefix_cache.pins()


def test_a_swap_is_tried_again_although_some_have_nothing_to_swap() -> None:
    _, batch = batch_of(64, swap_blocks=64)
    preemption = batch._preemption
    assert preemption._space is not None
    preemption._space.bytes_per_s, preemption._tokens_per_s = 1.0, 1e9  # swaps have been slow
    for number in range(4 * 17):
        seq = sequence(f"s/{number}", prompt_of(number, 20), 5)
        batch._holdings.start(seq, 0)
        seq.computed = 0 if number % 16 == 15 else 20
        member = Member(seq, Goal.ANSWER, 0.0)
        preemption.take_blocks(member)
        preemption.drop(member)
    assert preemption.counts.swapped == 4


def test_a_block_that_is_copied_is_held_until_the_copy_is_done() -> None:
    engine, batch = batch_of(lookahead=True)
    owner, borrower = (sequence(name, prompt_of(3, 20), 40) for name in "ab")
    batch.add(owner)
    batch.step(0.0)
    batch.step(0.0)
    batch.add(borrower)
    while not borrower.blocks:
        batch.step(0.0)
    shared = owner.blocks[1]
    batch.remove(owner)
    assert borrower.blocks[1] != shared  # the step under way copies it
    assert engine.ledger.holders(shared) > 0
    batch.step(0.0)
    batch.step(0.0)
    assert engine.ledger.holders(shared) == 0
    run(batch)
    assert borrower.tokens == answer(borrower.prompt, 40)
    assert_clean(engine, batch)


def test_pins_give_way_to_a_sequence_that_cannot_go_on() -> None:
    engine, batch = batch_of(8)
    first = sequence("a", prompt_of(1, 64), 2)
    batch.add(first)
    run(batch)
    assert engine.prefix_cache.pin(first.prompt) == 64
    second = sequence("b", prompt_of(2, 20), 60)
    batch.add(second)
    run(batch)
    assert second.tokens == answer(second.prompt, 60)
    assert not engine.prefix_cache.pins()
    assert_clean(engine, batch)


def test_prompt_tokens_in_host_memory_are_not_ahead() -> None:
    _, batch = batch_of(40, swap_blocks=64, max_batch=1, step_tokens=512)
    seq = sequence("a", prompt_of(1, 400), 9)
    batch.add(seq)
    assert batch.tokens_ahead() == 400
    batch.step(0.0)
    assert batch.tokens_ahead() == 0
    member = batch._residents.of(seq)
    batch._residents.preempt(member)
    assert batch.preemptions.swapped == 1
    assert batch.tokens_ahead() == 0
    batch._residents.start(0.0)
    batch._residents.preempt(member)
    batch.remove(seq)
    assert batch.tokens_ahead() == 0


def test_prompt_tokens_of_one_that_gives_back_are_ahead() -> None:
    _, batch = batch_of(lookahead=True, step_tokens=16)
    seq = sequence("a", prompt_of(1, 100), 9)
    batch.add(seq)
    batch.step(0.0)
    batch._residents.preempt(batch._residents.of(seq))  # a step under way has it
    batch._rows.runnable()
    assert batch.tokens_ahead() == 84


def test_what_landed_rounded_serves_its_own_sequence_and_no_other() -> None:
    engine, batch = batch_of()
    prompt = prompt_of(3, 40)
    first, second = sequence("s/0", prompt, 30), sequence("s/1", prompt, 30)
    batch.add(first, 0.0, Goal.LANDING)
    batch.add(second, 0.0, Goal.LANDING)
    batch.step(0.0)
    assert not second.blocks, "it waits for what the first will have"
    land(engine, first)
    batch.landed(first, answer(prompt, 1)[0], exact=False)
    batch.step(0.0)
    assert set(first.blocks).isdisjoint(second.blocks)
    land(engine, second)
    batch.landed(second, answer(prompt, 1)[0], exact=False)
    run(batch)
    assert first.tokens == second.tokens == answer(prompt, 30)
    late = sequence("s/2", prompt, 2)
    batch.add(late, 1.0)
    run(batch)
    assert late.cached_tokens == 0
    assert_clean(engine, batch)


def test_a_landed_prompt_is_charged_to_nobody_here() -> None:
    engine, _ = batch_of()
    batch = ContinuousBatch(engine, policy("fair"), lookahead=False)
    charged: Counter[str] = Counter()
    charge = batch._turns.charge

    def counted(costs: Mapping[str, float], waiting: Collection[str]) -> None:
        charged.update(costs)  # type: ignore[arg-type]
        charge(costs, waiting)

    batch._turns.charge = counted  # type: ignore[method-assign]
    landing = Sequence(SequenceId("x"), tuple(prompt_of(2, 100)), Sampling(max_tokens=4, temperature=0.0), tenant="x")
    batch.add(landing, 0.0, Goal.LANDING)
    batch.step(0.0)
    batch.add(Sequence(SequenceId("y"), (1, 2), Sampling(max_tokens=60, temperature=0.0), tenant="y"))
    batch.landed(landing, answer(landing.prompt, 1)[0])
    batch._residents.preempt(batch._residents.of(landing))  # before it had a row
    engine.ledger.drop_cached()
    run(batch)
    assert landing.tokens == answer(landing.prompt, 4)
    assert charged["x"] <= 1 + 3 * OUTPUT_WEIGHT  # the prompt's last token is computed here for the first time


def test_what_is_owed_is_forgiven_once_nobody_waits_also_where_nothing_is_read() -> None:
    """On a decode worker no step has chunks."""
    engine, _ = batch_of(max_batch=1)
    batch = ContinuousBatch(engine, policy("fair"), lookahead=False)

    def go(name: str, tenant: str, tokens: int) -> Sequence:
        sampling = Sampling(max_tokens=tokens, temperature=0.0)
        seq = Sequence(SequenceId(name), tuple(prompt_of(ord(name[0]), 20)), sampling, tenant=tenant)
        batch.add(seq, 0.0, Goal.LANDING)
        return seq

    def step() -> bool:
        result = batch.step(0.0)
        for seq in result.started if result is not None else []:
            batch.landed(seq, 1)
        return result is not None

    go("a", "A", 100)
    step()
    step()
    others = [go("b", "B", 2), go("c", "B", 2), go("d", "B", 2)]
    for _ in range(50):
        step()
    assert not batch._turns.even
    for seq in others:
        batch.remove(seq)
    go("e", "C", 300)
    while step():
        pass
    assert batch._turns.even


class BatchMachine(RuleBasedStateMachine):
    """Sequences of all kinds come, land, are removed and preempted; whatever happens, answers are the model's own."""

    @initialize(
        blocks=st.integers(9, 20),
        swap=st.sampled_from([0, 2, 64]),
        lookahead=st.booleans(),
        max_batch=st.integers(1, 5),
        step_tokens=st.sampled_from([16, 23, 64]),
        name=st.sampled_from(sorted(POLICIES)),
    )
    def begin(self, blocks: int, swap: int, lookahead: bool, max_batch: int, step_tokens: int, name: str) -> None:
        self.engine = fake_engine(blocks, max_batch=max_batch)
        swap_bytes = swap * self.engine.geometry.block_bytes
        self.batch = ContinuousBatch(
            self.engine, policy(name), step_tokens=step_tokens, swap_bytes=swap_bytes, lookahead=lookahead
        )
        self.now = 0.0
        self.numbers = 0
        self.failing = False
        self.goals: dict[Sequence, Goal] = {}
        self.given: dict[Sequence, list[int]] = {}
        self.reserved: list[Sequence] = []
        self.done: list[Sequence] = []
        self.outside: list[BlockId] = []  # held by others: loans and reservations

    @rule(
        stem=st.integers(0, 2),
        shared=st.integers(0, 70),
        own=st.integers(1, 20),
        max_tokens=st.integers(2, 40),
        goal=st.sampled_from(Goal),
        priority=st.integers(-1, 1),
        logprobs=st.sampled_from([None, None, 0]),
        stops=st.sampled_from([(), (), tuple(range(0, VOCAB, 7))]),
        twins=st.sampled_from([1, 1, 2, 3]),
    )
    def add(
        self,
        stem: int,
        shared: int,
        own: int,
        max_tokens: int,
        goal: Goal,
        priority: int,
        logprobs: int | None,
        stops: tuple[int, ...],
        twins: int,
    ) -> None:
        prompt = (*prompt_of(stem, shared), *([stem] * own))
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=0.0,
            prompt_logprobs=None if goal is Goal.LANDING else logprobs,
            stop_token_ids=frozenset() if goal is Goal.LANDING else frozenset(stops),
        )
        for _ in range(twins):
            name = SequenceId(f"s/{self.numbers}")
            seq = Sequence(name, prompt, sampling, priority=priority, tenant=f"tenant {stem}")
            self.numbers += 1
            self.goals[seq] = goal
            self.given[seq] = []
            self.batch.add(seq, self.now, goal)

    @precondition(lambda self: self.goals)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self._forget(data.draw(st.sampled_from(list(self.goals))))

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        """Its KV arrives from elsewhere."""
        seq = data.draw(st.sampled_from(self.reserved))
        self.reserved.remove(seq)
        land(self.engine, seq)
        (first,) = answer(seq.prompt, 1)
        self.given[seq].append(first)
        self.batch.landed(seq, first, exact=data.draw(st.booleans()))

    @precondition(lambda self: self.engine.ledger.available > 4)
    @rule(count=st.integers(1, 4))
    def reserve(self, count: int) -> None:
        self.outside += self.engine.ledger.allocate(count)

    @precondition(lambda self: any(seq.computed >= BLOCK_TOKENS for seq in self.goals))
    @rule(data=st.data())
    def lend(self, data: st.DataObject) -> None:
        """Somebody reads a full block of a sequence, whatever becomes of it."""
        seq = data.draw(st.sampled_from([seq for seq in self.goals if seq.computed >= BLOCK_TOKENS]))
        self.engine.ledger.hold(seq.blocks[:1])
        self.outside += seq.blocks[:1]

    @precondition(lambda self: self.outside)
    @rule()
    def return_all(self) -> None:
        self.engine.ledger.release(self.outside)
        self.outside = []

    @precondition(lambda self: self.goals)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        with suppress(ValueError):
            self.engine.prefix_cache.pin(data.draw(st.sampled_from(list(self.goals))).prompt)

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.now += 1.0
            result = self.batch.step(self.now)
            if result is None:
                assert self.batch.step(self.now) is None, "there was something to do after all"
                return
            self._take(result)

    @rule()
    def fail(self) -> None:
        """A step's logits are no numbers, and so may be what it has written."""
        forward = self.engine.executor.forward

        def poisoned(step: StepInput) -> torch.Tensor:
            logits = forward(step)
            for slot in step.slots[: len(step.decode_rows)].tolist():
                self.engine.kv_cache.pool[slot // BLOCK_TOKENS, :, :, :, slot % BLOCK_TOKENS] = float("nan")
            return torch.full_like(logits, float("nan"))

        self.failing = True
        self.engine.executor.forward = poisoned  # type: ignore[method-assign]
        self.step(1)
        self.engine.executor.forward = forward  # type: ignore[method-assign]
        self.step(1)  # takes in what failed, where one step is planned while another runs
        self.failing = False

    def _take(self, result: StepResult) -> None:
        for seq in result.started:
            if self.goals[seq] is Goal.LANDING and not seq.tokens:
                self.reserved.append(seq)
        for seq, token, _ in result.tokens:
            self.given[seq].append(token)
            if self.goals[seq] is Goal.PROMPT:
                self.done.append(seq)
        for seq, reason in result.ended:
            if isinstance(reason, ModelFault):
                assert self.failing
            else:
                assert self.given[seq] == complete(seq)
                stopped = seq.tokens[-1] in seq.sampling.stop_token_ids
                assert reason is (EndReason.STOP if stopped else EndReason.LENGTH)
                assert stopped or seq.blocks == []  # a step that writes a token too many may be under way
            self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        self.batch.remove(seq)
        for where in (self.reserved, self.done):
            if seq in where:
                where.remove(seq)
        del self.goals[seq], self.given[seq]

    @invariant()
    def tokens_are_the_models_own(self) -> None:
        for seq, given in self.given.items():
            assert given == seq.tokens == answer(seq.prompt, len(given))

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        ledger = self.engine.ledger
        ledger.check()
        claimed = Counter(block for holder in self.batch.holders() for block in holder.block_ids)
        claimed.update(block for seq in self.reserved for block in seq.blocks)
        claimed.update(self.outside)
        assert all(ledger.holders(block) == claimed[block] for block in range(ledger.num_blocks))

    def teardown(self) -> None:
        """Everything that landed or computes here comes to its end, and nothing is left."""
        if not hasattr(self, "batch"):
            return
        self.return_all()
        for _ in range(4000):
            for seq in [*self.reserved, *self.done]:
                self._forget(seq)
            self.now += 1.0
            result = self.batch.step(self.now)
            if result is None and not self.reserved:
                break
            if result is not None:
                self._take(result)
        assert self.goals == {}, "a sequence was starved"
        while self.engine.prefix_cache.unpin_oldest():
            pass
        assert_clean(self.engine, self.batch)


TestBatchMachine = BatchMachine.TestCase
TestBatchMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
