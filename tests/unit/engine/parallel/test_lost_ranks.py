"""Ranks that die. Beside the other tests because their processes are of no use after."""

from collections.abc import Iterator

import pytest

from ....ranks import Ranks
from .works import lead_and_die, meet_until_lost


@pytest.fixture
def doomed() -> Iterator[Ranks]:
    group = Ranks(3)
    yield group
    group.close()


def test_a_rank_that_dies_is_missed_by_the_others_long_before_any_deadline(doomed: Ranks) -> None:
    doomed.start(meet_until_lost, 3, 2, 100)
    waited = doomed.results([0, 1])
    assert all(isinstance(seconds, float) and seconds < 10.0 for seconds in waited.values()), waited
    doomed.start(lead_and_die, 2)  # those that are left
    assert doomed.results([1]) == {1: "rank 0 is gone"}
