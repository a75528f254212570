"""What is in a step: plans for snapshots made by hand, and what holds of the plan of any snapshot."""

from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.ids import BlockId
from baton.engine.scheduler import Ranking, Snapshot, Stake, StepPlan, plan_step

Row = tuple[int, int, bool]  # tokens that it lacks, blocks that it needs, whether one token too is a chunk


def snapshot(
    rows: Mapping[int, Row], available: int = 100, step_tokens: int = 64, min_chunk_tokens: int = 16
) -> Snapshot:
    lacking, needed, chunked = zip(*rows.values(), strict=True) if rows else ((), (), ())
    return Snapshot(
        rows=np.array(list(rows), np.int64),
        lacking=np.array(lacking, np.int64),
        blocks_needed=np.array(needed, np.int64),
        chunked=np.array(chunked, np.bool_),
        available=available,
        step_tokens=step_tokens,
        min_chunk_tokens=min_chunk_tokens,
    )


def ranking_of(ranked: Seq[int], flying: Seq[int] = (), blocks: int = 3, coming: int = 0) -> Callable[[], Ranking]:
    """Each of the ranked has as many blocks, which nobody shares; so many more come anyway."""
    ids = map(BlockId, count())
    stakes = {row: Stake(list(islice(ids, blocks)), row in flying) for row in ranked}
    return told(Situation(snapshot({}), list(ranked), stakes, [list(islice(ids, coming))]))


@dataclass(frozen=True)
class Situation:
    """outside: blocks that others hold too, who are neither ranked nor going."""

    snapshot: Snapshot
    ranked: list[int]
    stakes: dict[int, Stake]
    going: list[list[BlockId]]
    outside: frozenset[BlockId] = frozenset()

    def holders(self) -> Counter[BlockId]:
        held = Counter(block for stake in self.stakes.values() for block in stake.blocks)
        return held + Counter(block for blocks in self.going for block in blocks) + Counter(self.outside)

    def freed(self, rows: Seq[int]) -> tuple[int, int]:
        """Blocks that nobody holds once these rows and all that are going have given theirs: (now, in all)."""
        given = Counter(block for row in rows for block in self.stakes[row].blocks)
        given += Counter(block for blocks in self.going for block in blocks)
        late = {block for row in rows if self.stakes[row].flying for block in self.stakes[row].blocks}
        late |= {block for blocks in self.going for block in blocks}
        holders = self.holders()
        free = {block for block in given if given[block] == holders[block]}
        return len(free - late), len(free)


def told(situation: Situation) -> Callable[[], Ranking]:
    return lambda: Ranking(situation.ranked, situation.stakes, situation.going, situation.holders())


def not_asked() -> Ranking:
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
    assert parts(plan_step(snapshot(rows, available=0), ranking_of([0, 1], coming=1))) == ([1], [], [])


def test_blocks_of_a_step_under_way_are_waited_for_and_not_used() -> None:
    rows = {0: GROWS, 1: GROWS}
    plan = plan_step(snapshot(rows, available=0), ranking_of([0, 1], flying=[1]))
    assert parts(plan) == ([], [], [1])


def test_blocks_that_come_anyway_save_others_from_preemption() -> None:
    rows = {0: GROWS, 1: DECODES, 2: DECODES}
    assert parts(plan_step(snapshot(rows, available=0), ranking_of([0, 1, 2], coming=1))) == ([1, 2], [], [])
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


def test_a_block_that_two_share_comes_free_with_the_second_of_them() -> None:
    first, second, third = ([BlockId(7), BlockId(one)] for one in (1, 2, 3))
    stakes = {0: Stake([], False), 1: Stake(third, False), 2: Stake(second, False), 3: Stake(first, False)}
    shared = Situation(snapshot({}), [0, 1, 2, 3], stakes, [])
    for needed, gone in ((1, [3]), (2, [3, 2]), (3, [3, 2, 1]), (4, [3, 2, 1])):
        plan = plan_step(snapshot({0: (80, needed, False)}, available=0), told(shared))
        assert parts(plan) == ([], [(0, 64)], gone)
    held = Situation(snapshot({}), [0, 1, 2, 3], stakes, [], frozenset({BlockId(7)}))
    assert parts(plan_step(snapshot({0: (80, 4, False)}, available=0), told(held))) == ([], [], [3, 2, 1])


def test_a_block_that_a_step_holds_twice_comes_free_once() -> None:
    """Two copies are made of it."""
    stakes = {row: Stake([BlockId(row)], False) for row in range(3)}
    copied = Situation(snapshot({}), [0, 1, 2], stakes, [[BlockId(7), BlockId(7)]])
    assert parts(plan_step(snapshot({0: (80, 2, False)}, available=0), told(copied))) == ([], [], [2])


def test_a_shared_block_is_waited_for_where_one_of_its_holders_is_under_way() -> None:
    stakes = {0: Stake([], False), 1: Stake([BlockId(7)], False)}
    late = Situation(snapshot({}), [0, 1], stakes, [[BlockId(7)]])
    assert parts(plan_step(snapshot({0: GROWS}, available=0), told(late))) == ([], [], [1])


# Any snapshot


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """All rows of the snapshot are ranked; some that can't run now are, too. Blocks are shared here and there."""
    there = draw(st.lists(st.integers(0, 40), unique=True, max_size=12))
    rows = {row: (draw(st.just(1) | st.integers(1, 90)), draw(st.integers(0, 6)), draw(st.booleans())) for row in there}
    others = draw(st.lists(st.integers(41, 60), unique=True, max_size=3))
    ranked = draw(st.permutations([*there, *others]))
    some = st.lists(st.integers(0, 40).map(BlockId), unique=True, max_size=6)
    stakes = {row: Stake(draw(some), draw(st.booleans())) for row in ranked}
    going = draw(st.lists(some, max_size=2))
    outside = frozenset(draw(st.lists(st.integers(0, 40).map(BlockId), max_size=4)))
    available = draw(st.integers(0, 20))
    step_tokens, least = draw(st.integers(1, 120)), draw(st.integers(1, 20))
    return Situation(snapshot(rows, available, step_tokens, least), list(ranked), stakes, going, outside)


def rows_of(snap: Snapshot) -> list[Row]:
    return list(zip(snap.lacking.tolist(), snap.blocks_needed.tolist(), snap.chunked.tolist(), strict=True))


def needs(snap: Snapshot) -> dict[int, int]:
    return dict(zip(snap.rows.tolist(), snap.blocks_needed.tolist(), strict=True))


def planned(plan: StepPlan) -> list[int]:
    return [*plan.decode.tolist(), *(row for row, _ in plan.chunks)]


@settings(max_examples=120, deadline=None)
@given(situations())
def test_a_plan_never_takes_more_than_there_is(situation: Situation) -> None:
    snap = situation.snapshot
    plan = plan_step(snap, told(situation))
    lacking, needed, going = (
        dict(zip(snap.rows.tolist(), snap.lacking.tolist(), strict=True)),
        needs(snap),
        planned(plan),
    )
    freed, _ = situation.freed(plan.preempt)
    assert sum(needed[row] for row in going) <= snap.available + freed
    assert len(set(going)) == len(going)
    assert set(going) <= set(lacking)
    assert not set(going) & set(plan.preempt)
    assert all(1 <= count <= lacking[row] for row, count in plan.chunks)
    budget = max(snap.step_tokens - len(plan.decode), snap.min_chunk_tokens)
    assert sum(count for _, count in plan.chunks) <= budget


@settings(max_examples=120, deadline=None)
@given(situations())
def test_a_plan_takes_all_that_decode_and_chunks_to_the_budget_while_blocks_last(situation: Situation) -> None:
    snap = situation.snapshot
    rows = dict(zip(snap.rows.tolist(), rows_of(snap), strict=True))
    snap = snapshot(rows, int(snap.blocks_needed.sum()), snap.step_tokens, snap.min_chunk_tokens)
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
def test_a_plan_preempts_from_the_worst_never_the_best_and_no_more_than_it_must(situation: Situation) -> None:
    snap, ranked = situation.snapshot, situation.ranked
    plan = plan_step(snap, told(situation))
    gone = len(plan.preempt)
    assert list(plan.preempt) == ranked[::-1][:gone]
    if ranked:
        assert ranked[0] not in plan.preempt
    if gone:  # without the last of them somebody before it had too few
        _, kept = situation.freed(plan.preempt[:-1])
        needed = needs(snap)
        assert sum(needed.get(row, 0) for row in ranked[:-gone]) > snap.available + kept


@settings(max_examples=120, deadline=None)
@given(situations())
def test_when_the_best_can_run_at_least_one_runs(situation: Situation) -> None:
    """With the blocks of all that are ranked behind it, where these are not under way. Where some are, it may wait."""
    snap, ranked = situation.snapshot, situation.ranked
    needed = needs(snap)
    best = next((row for row in ranked if row in needed), None)
    if best is None:
        return
    now, in_all = situation.freed(ranked[ranked.index(best) + 1 :])
    before, coming = situation.freed([])
    assert before == 0
    waits = coming or now < in_all
    if needed[best] <= snap.available or (not waits and needed[best] <= snap.available + now):
        plan = plan_step(snap, told(situation))
        assert planned(plan)
        assert best not in plan.preempt
        decodes = snap.lacking[snap.rows == best][0] == 1 and not snap.chunked[snap.rows == best][0]
        assert not decodes or best in plan.decode  # else others that came first may have used the budget


@settings(max_examples=120, deadline=None)
@given(situations())
def test_once_what_is_under_way_has_come_back_some_row_runs(situation: Situation) -> None:
    """Step after step, each with what came back from the one before, and the preempted gone."""
    snap, ranked, stakes = situation.snapshot, situation.ranked, situation.stakes
    rows = dict(zip(snap.rows.tolist(), rows_of(snap), strict=True))
    best = next((row for row in ranked if row in rows), None)
    _, freed = situation.freed([row for row in ranked if row != best])
    if best is None or ranked[0] != best or rows[best][1] > snap.available + freed:
        return
    available, going = snap.available, situation.going
    for _ in range(len(ranked) + 2):
        now = Situation(
            snapshot(rows, available, snap.step_tokens, snap.min_chunk_tokens), ranked, stakes, going, situation.outside
        )
        plan = plan_step(now.snapshot, told(now))
        if planned(plan):
            return
        available += now.freed(plan.preempt)[1]
        going = []
        ranked = [row for row in ranked if row not in plan.preempt]
        rows = {row: facts for row, facts in rows.items() if row in ranked}
        stakes = {row: stake for row, stake in stakes.items() if row in ranked}
    raise AssertionError("no row ever runs")


@settings(max_examples=60, deadline=None)
@given(situations())
def test_the_same_snapshot_gives_the_same_plan_and_is_left_as_it_was(situation: Situation) -> None:
    snap = situation.snapshot
    before = [array.tolist() for array in (snap.rows, snap.lacking, snap.blocks_needed, snap.chunked)]
    plans = [parts(plan_step(snap, told(situation))) for _ in range(2)]
    assert plans[0] == plans[1]
    assert before == [array.tolist() for array in (snap.rows, snap.lacking, snap.blocks_needed, snap.chunked)]
