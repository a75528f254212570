from hypothesis import given
from hypothesis import strategies as st

from baton.core.ids import SequenceId
from baton.prefill_worker.scheduler import Running, Waiting, plan_starts, plan_step


def waiting(*needs: int, expected: str = "0123456789") -> list[Waiting]:
    return [Waiting(SequenceId(str(i)), need, str(i) in expected) for i, need in enumerate(needs)]


def test_prompts_start_first_come_first_while_blocks_last() -> None:
    assert plan_starts(waiting(2, 3, 1), running=0, available=5, max_batch=8, spare=4) == ("0", "1")


def test_a_long_prompt_is_not_starved_by_short_ones_behind_it() -> None:
    assert plan_starts(waiting(9, 1, 1), running=1, available=8, max_batch=8, spare=4) == ()


def test_no_more_prompts_run_than_there_are_places() -> None:
    assert plan_starts(waiting(1, 1, 1), running=2, available=9, max_batch=3, spare=4) == ("0",)


def test_prompts_that_nobody_expects_leave_room_for_any_that_is_expected() -> None:
    assert plan_starts(waiting(2, 2, 2, expected=""), running=0, available=9, max_batch=8, spare=4) == ("0", "1")
    assert plan_starts(waiting(2, 2, 2, expected="0"), running=0, available=7, max_batch=8, spare=4) == ("0",)
    assert plan_starts(waiting(2, 2, 2), running=0, available=6, max_batch=8, spare=4) == ("0", "1", "2")


def test_several_short_prompts_share_a_step_and_a_long_one_takes_many() -> None:
    running = [Running(SequenceId("a"), 5), Running(SequenceId("b"), 100), Running(SequenceId("c"), 3)]
    assert plan_step(running, budget=20).chunks == (("a", 5), ("b", 15))


@given(st.lists(st.integers(1, 50)), st.integers(1, 60))
def test_a_step_uses_its_budget_or_all_there_is(remaining: list[int], budget: int) -> None:
    running = [Running(SequenceId(str(i)), count) for i, count in enumerate(remaining)]
    chunks = plan_step(running, budget).chunks
    assert sum(count for _, count in chunks) == min(budget, sum(remaining))
    assert [key for key, _ in chunks] == [prompt.sequence_id for prompt in running[: len(chunks)]]
    assert all(count == running[i].remaining for i, (_, count) in enumerate(chunks[:-1]))
