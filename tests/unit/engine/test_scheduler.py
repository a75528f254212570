"""What is in a step: plans for snapshots made by hand, and what holds of the plan of any snapshot."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.scheduler import Ranking, Snapshot, Stake, StepPlan, plan_step

Row = tuple[int, int, bool]  # tokens that it lacks, blocks that it needs, whether one token too is a chunk


def snapshot(
    rows: Mapping[int, Row], available: int = 100, coming: int = 0, step_tokens: int = 64, min_chunk_tokens: int = 16
) -> Snapshot:
    lacking, needed, chunked = zip(*rows.values(), strict=True) if rows else ((), (), ())
    return Snapshot(
        rows=np.array(list(rows), np.int64),
        lacking=np.array(lacking, np.int64),
        blocks_needed=np.array(needed, np.int64),
        chunked=np.array(chunked, np.bool_),
        available=available,
        coming=coming,
        step_tokens=step_tokens,
        min_chunk_tokens=min_chunk_tokens,
    )


def ranking_of(ranked: Seq[int], flying: Seq[int] = (), blocks: int = 3) -> Ranking:
    """Each of the ranked would give as many blocks."""
    return lambda: (ranked, {row: Stake(blocks, row in flying) for row in ranked})


def not_asked() -> tuple[Seq[int], Mapping[int, Stake]]:
    raise AssertionError("the ranking was asked for while blocks last")


def parts(plan: StepPlan) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    return plan.decode.tolist(), list(plan.chunks), list(plan.preempt)


DECODES, GROWS = (1, 0, False), (1, 1, False)


# While blocks last


def test_nobody_there_is_an_empty_plan() -> None:
    assert parts(plan_step(snapshot({}), not_asked)) == ([], [], [])


def test_while_blocks_last_all_decode_and_the_ranking_is_not_asked_for() -> None:
    rows = {5: GROWS, 2: DECODES, 9: GROWS}
    assert parts(plan_step(snapshot(rows, available=2), not_asked)) == ([5, 2, 9], [], [])


def test_all_decode_though_the_step_has_fewer_tokens() -> None:
    rows = dict.fromkeys(range(100), DECODES)
    assert parts(plan_step(snapshot(rows, step_tokens=8), not_asked)) == (list(range(100)), [], [])


def test_chunks_share_what_decoding_leaves_first_come_first() -> None:
    rows = {3: (30, 2, False), 0: DECODES, 7: (100, 7, False), 1: (50, 4, False)}
    plan = plan_step(snapshot(rows, step_tokens=64), not_asked)
    assert parts(plan) == ([0], [(3, 30), (7, 33)], [])


def test_a_chunk_that_fits_to_the_last_token_leaves_none_of_no_tokens() -> None:
    rows = {3: (40, 2, False), 7: (24, 7, False), 1: (50, 4, False)}
    assert parts(plan_step(snapshot(rows, step_tokens=64), not_asked)) == ([], [(3, 40), (7, 24)], [])


@pytest.mark.parametrize("decoding", [49, 64, 90])
def test_prompts_get_their_least_however_many_decode(decoding: int) -> None:
    rows = {**dict.fromkeys(range(decoding), DECODES), 100: (10, 1, False), 101: (300, 20, False)}
    plan = plan_step(snapshot(rows, step_tokens=64, min_chunk_tokens=16), not_asked)
    assert parts(plan) == (list(range(decoding)), [(100, 10), (101, 6)], [])


def test_one_token_of_a_prompt_that_is_asked_about_is_a_chunk() -> None:
    rows = {0: DECODES, 1: (1, 0, True), 2: (5, 0, True)}
    assert parts(plan_step(snapshot(rows), not_asked)) == ([0], [(1, 1), (2, 5)], [])


# When they do not


def test_the_best_ranked_go_on_and_the_worst_gives_its_blocks_back() -> None:
    rows = {0: GROWS, 1: GROWS, 2: GROWS}
    plan = plan_step(snapshot(rows, available=0), ranking_of([2, 0, 1]))
    assert parts(plan) == ([0, 2], [], [1])


def test_nobody_is_preempted_for_more_than_is_lacking() -> None:
    rows = dict.fromkeys(range(6), GROWS)
    plan = plan_step(snapshot(rows, available=5), ranking_of([0, 1, 2, 3, 4, 5]))
    assert parts(plan) == ([0, 1, 2, 3, 4], [], [])  # the last waits: its blocks help nobody


def test_the_best_ranked_is_never_preempted_though_it_waits_in_vain() -> None:
    plan = plan_step(snapshot({4: (300, 20, False)}, available=19), ranking_of([4]))
    assert parts(plan) == ([], [], [])


def test_who_needs_no_block_goes_on_where_blocks_are_short() -> None:
    rows = {0: GROWS, 1: DECODES}
    assert parts(plan_step(snapshot(rows, available=0, coming=1), ranking_of([0, 1]))) == ([1], [], [])


def test_blocks_of_a_step_under_way_are_waited_for_and_not_used() -> None:
    rows = {0: GROWS, 1: GROWS}
    plan = plan_step(snapshot(rows, available=0), ranking_of([0, 1], flying=[1]))
    assert parts(plan) == ([], [], [1])


def test_blocks_that_come_anyway_save_others_from_preemption() -> None:
    rows = {0: GROWS, 1: DECODES, 2: DECODES}
    assert parts(plan_step(snapshot(rows, available=0, coming=1), ranking_of([0, 1, 2]))) == ([1, 2], [], [])
    assert parts(plan_step(snapshot(rows, available=0), ranking_of([0, 1, 2]))) == ([0, 1], [], [2])


def test_one_that_cannot_run_gives_its_blocks_back_too() -> None:
    """Ready sequences and those whose token is under way hold blocks, but are not in the snapshot."""
    plan = plan_step(snapshot({0: GROWS}, available=0), ranking_of([0, 256, 7]))
    assert parts(plan) == ([0], [], [7])


def test_one_that_cannot_run_is_ranked_and_costs_nothing() -> None:
    plan = plan_step(snapshot({0: GROWS, 1: GROWS}, available=1), ranking_of([7, 0, 1]))
    assert parts(plan) == ([0], [], [])


def test_chunks_of_those_that_fit_share_the_budget_in_the_order_of_coming_not_of_rank() -> None:
    rows = {0: (40, 3, False), 1: (40, 3, False), 2: (40, 3, False), 3: DECODES}
    plan = plan_step(snapshot(rows, available=6, step_tokens=64), ranking_of([2, 1, 3, 0], blocks=0))
    assert parts(plan) == ([3], [(1, 40), (2, 23)], [])


# Any snapshot


@st.composite
def situations(draw: st.DrawFn) -> tuple[Snapshot, list[int], dict[int, Stake]]:
    """All rows of the snapshot are ranked; some that can't run now are, too."""
    there = draw(st.lists(st.integers(0, 40), unique=True, max_size=12))
    rows = {row: (draw(st.just(1) | st.integers(1, 90)), draw(st.integers(0, 6)), draw(st.booleans())) for row in there}
    others = draw(st.lists(st.integers(41, 60), unique=True, max_size=3))
    ranked = draw(st.permutations([*there, *others]))
    stakes = {row: Stake(draw(st.integers(0, 6)), draw(st.booleans())) for row in ranked}
    available, coming = draw(st.integers(0, 20)), draw(st.just(0) | st.integers(0, 6))
    step_tokens, least = draw(st.integers(1, 120)), draw(st.integers(1, 20))
    return snapshot(rows, available, coming, step_tokens, least), list(ranked), stakes


def told(ranked: Seq[int], stakes: Mapping[int, Stake]) -> Ranking:
    return lambda: (ranked, stakes)


def rows_of(snap: Snapshot) -> list[Row]:
    return list(zip(snap.lacking.tolist(), snap.blocks_needed.tolist(), snap.chunked.tolist(), strict=True))


def planned(plan: StepPlan) -> list[int]:
    return [*plan.decode.tolist(), *(row for row, _ in plan.chunks)]


@settings(max_examples=120, deadline=None)
@given(situations())
def test_a_plan_never_takes_more_than_there_is(situation: tuple[Snapshot, list[int], dict[int, Stake]]) -> None:
    snap, ranked, stakes = situation
    plan = plan_step(snap, told(ranked, stakes))
    lacking = dict(zip(snap.rows.tolist(), snap.lacking.tolist(), strict=True))
    needed = dict(zip(snap.rows.tolist(), snap.blocks_needed.tolist(), strict=True))
    going = planned(plan)
    freed = sum(stakes[row].blocks for row in plan.preempt if not stakes[row].flying)
    assert sum(needed[row] for row in going) <= snap.available + freed
    assert len(set(going)) == len(going)
    assert set(going) <= set(lacking)
    assert not set(going) & set(plan.preempt)
    assert all(1 <= count <= lacking[row] for row, count in plan.chunks)
    budget = max(snap.step_tokens - len(plan.decode), snap.min_chunk_tokens)
    assert sum(count for _, count in plan.chunks) <= budget


@settings(max_examples=120, deadline=None)
@given(situations())
def test_a_plan_takes_all_that_decode_and_chunks_to_the_budget_while_blocks_last(
    situation: tuple[Snapshot, list[int], dict[int, Stake]],
) -> None:
    snap = situation[0]
    rows = dict(zip(snap.rows.tolist(), rows_of(snap), strict=True))
    enough = int(snap.blocks_needed.sum())
    snap = snapshot(rows, enough, 0, snap.step_tokens, snap.min_chunk_tokens)
    plan = plan_step(snap, not_asked)
    decoding = (snap.lacking == 1) & ~snap.chunked
    assert plan.decode.tolist() == snap.rows[decoding].tolist()
    assert plan.preempt == ()
    budget = max(snap.step_tokens - int(decoding.sum()), snap.min_chunk_tokens)
    computing, left = snap.rows[~decoding].tolist(), snap.lacking[~decoding]
    assert [row for row, _ in plan.chunks] == computing[: len(plan.chunks)]
    assert sum(count for _, count in plan.chunks) == min(budget, int(left.sum()))
    assert [count for _, count in plan.chunks[:-1]] == left[: max(len(plan.chunks) - 1, 0)].tolist()


@settings(max_examples=120, deadline=None)
@given(situations())
def test_a_plan_preempts_from_the_worst_never_the_best_and_no_more_than_it_must(
    situation: tuple[Snapshot, list[int], dict[int, Stake]],
) -> None:
    snap, ranked, stakes = situation
    plan = plan_step(snap, told(ranked, stakes))
    gone = len(plan.preempt)
    assert list(plan.preempt) == ranked[::-1][:gone]
    if ranked:
        assert ranked[0] not in plan.preempt
    if gone:  # without the last of them somebody before it had too few
        kept = sum(stakes[row].blocks for row in plan.preempt[:-1])
        needed = dict(zip(snap.rows.tolist(), snap.blocks_needed.tolist(), strict=True))
        assert sum(needed.get(row, 0) for row in ranked[:-gone]) > snap.available + snap.coming + kept


@settings(max_examples=120, deadline=None)
@given(situations())
def test_when_the_best_can_run_at_least_one_runs(situation: tuple[Snapshot, list[int], dict[int, Stake]]) -> None:
    """With the blocks of all that are ranked behind it, where these are not under way. Where some are, it may wait."""
    snap, ranked, stakes = situation
    needed = dict(zip(snap.rows.tolist(), snap.blocks_needed.tolist(), strict=True))
    best = next((row for row in ranked if row in needed), None)
    if best is None:
        return
    behind = [stakes[row] for row in ranked[ranked.index(best) + 1 :]]
    waits = snap.coming or any(stake.flying for stake in behind)
    if needed[best] <= snap.available or (
        not waits and needed[best] <= snap.available + sum(stake.blocks for stake in behind)
    ):
        plan = plan_step(snap, told(ranked, stakes))
        assert planned(plan)
        assert best not in plan.preempt
        decodes = snap.lacking[snap.rows == best][0] == 1 and not snap.chunked[snap.rows == best][0]
        assert not decodes or best in plan.decode  # else others that came first may have used the budget


@settings(max_examples=120, deadline=None)
@given(situations())
def test_once_what_is_under_way_has_come_back_some_row_runs(
    situation: tuple[Snapshot, list[int], dict[int, Stake]],
) -> None:
    """Step after step, each with what came back from the one before, and the preempted gone."""
    snap, ranked, stakes = situation
    rows = dict(zip(snap.rows.tolist(), rows_of(snap), strict=True))
    best = next((row for row in ranked if row in rows), None)
    everything = snap.available + snap.coming + sum(stakes[row].blocks for row in ranked if row != best)
    if best is None or ranked[0] != best or rows[best][1] > everything:
        return
    available, coming = snap.available, snap.coming
    for _ in range(len(ranked) + 2):
        now = snapshot(rows, available, coming, snap.step_tokens, snap.min_chunk_tokens)
        plan = plan_step(now, told(ranked, stakes))
        if planned(plan):
            return
        available += coming + sum(stakes[row].blocks for row in plan.preempt)
        coming = 0
        ranked = [row for row in ranked if row not in plan.preempt]
        rows = {row: facts for row, facts in rows.items() if row in ranked}
    raise AssertionError("no row ever runs")


@settings(max_examples=60, deadline=None)
@given(situations())
def test_the_same_snapshot_gives_the_same_plan_and_is_left_as_it_was(
    situation: tuple[Snapshot, list[int], dict[int, Stake]],
) -> None:
    snap, ranked, stakes = situation
    before = [array.tolist() for array in (snap.rows, snap.lacking, snap.blocks_needed, snap.chunked)]
    plans = [parts(plan_step(snap, lambda: (tuple(ranked), dict(stakes)))) for _ in range(2)]
    assert plans[0] == plans[1]
    assert before == [array.tolist() for array in (snap.rows, snap.lacking, snap.blocks_needed, snap.chunked)]
