from baton.core.ids import SequenceId
from baton.decode_worker.scheduler import Waiting, plan_reservations, plan_step

A, B, C, D = (SequenceId(name) for name in "abcd")


def test_all_that_run_go_on_and_the_landed_join_in_order_while_there_are_places() -> None:
    plan = plan_step([A, B], [C, D], max_batch=3)
    assert plan.run == (A, B, C)
    assert plan.join == (C,)


def test_nobody_joins_a_full_batch() -> None:
    assert plan_step([A, B], [C], max_batch=2).join == ()


def test_an_idle_worker_has_nothing_to_run() -> None:
    assert plan_step([], [], max_batch=2).run == ()


def test_reservations_are_granted_first_come_first_while_blocks_last() -> None:
    waiting = [Waiting(A, 3), Waiting(B, 2), Waiting(C, 1)]
    assert plan_reservations(waiting, available=5) == (A, B)


def test_a_large_reservation_is_not_starved_by_small_ones_behind_it() -> None:
    assert plan_reservations([Waiting(A, 6), Waiting(B, 1)], available=5) == ()
