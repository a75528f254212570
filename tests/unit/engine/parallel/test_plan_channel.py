"""Steps on their way from rank 0 to the others, as real processes."""

import pytest

from baton.engine.parallel.communicator import RankLost
from baton.engine.parallel.plan_channel import PlanReader, PlanWriter

from ....ranks import Ranks
from .steps import a_step, number_of
from .works import SLOT_BYTES, hand_on_plans, lead_and_follow, sleep_for_plans


@pytest.mark.parametrize("slow_rank", [0, 2])
def test_every_reader_takes_every_step_in_order_however_slow_one_is(ranks: Ranks, slow_rank: int) -> None:
    sizes = [(17 * number) % 400 for number in range(60)]  # up to four slots a step
    written, *read = ranks.run(hand_on_plans, 3, sizes, slow_rank)
    assert read == [written, written]


def test_a_step_may_be_longer_than_all_slots_together(ranks: Ranks) -> None:
    written, read = ranks.run(hand_on_plans, 2, [5000, 1, 5000], 0)
    assert read == written


def test_a_reader_that_waits_long_sleeps_and_is_woken(ranks: Ranks) -> None:
    _, used_s = ranks.run(sleep_for_plans, 2, 10)
    assert used_s < 0.3, used_s  # of one second


def test_followers_do_what_the_leader_does(ranks: Ranks) -> None:
    led, *followed = ranks.run(lead_and_follow, 3, 50)
    assert len(led) == 50
    assert len({tokens for _, tokens in led}) > 40
    assert followed == [led, led]


def test_a_reader_that_takes_nothing_holds_the_writer_up_until_its_deadline() -> None:
    writer = PlanWriter(1, slot_bytes=SLOT_BYTES, timeout_s=0.05)
    reader = PlanReader.join(writer.addresses[0], 1, 2)
    for number in range(8):
        writer.put(a_step(number))
    with pytest.raises(RankLost, match=r"did not come within 0\.05 s"):
        writer.put(a_step(8))
    step = reader.take()
    assert step is not None
    assert number_of(step) == 0
    writer.put(a_step(8))
    writer.close()
    writer.close()
    reader.close()


def test_nobody_joins_a_writer_that_has_closed() -> None:
    writer = PlanWriter(1)
    (address,) = writer.addresses
    writer.close()
    with pytest.raises(RankLost):
        PlanReader.join(address, 1, 2)
