"""Ranks that meet in shared memory, as real processes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.engine.parallel.alone import Alone
from baton.engine.parallel.communicator import RankLost
from baton.engine.parallel.shared_memory import SharedMemory

from ....ranks import Ranks
from .works import DTYPES, broadcast_ids, come_alone, meet_often, part_of

CASES = st.tuples(
    st.sampled_from(["all_reduce", "broadcast", "gather_last"]),
    st.lists(st.integers(0, 40), min_size=1, max_size=3).map(lambda sizes: (*sizes[:-1], sizes[-1] + 1))
    | st.tuples(st.integers(1, 3000)),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 2**20),
)


@given(size=st.sampled_from([2, 3, 4]), cases=st.lists(CASES, min_size=1, max_size=12))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_meeting_gives_what_it_says_with_the_same_bits_on_all_ranks(
    ranks: Ranks, size: int, cases: list[Any]
) -> None:
    found = ranks.run(meet_often, size, cases)
    for case, (kind, shape, dtype, seed) in enumerate(cases):
        parts = [part_of(rank, shape, DTYPES[dtype], seed) for rank in range(size)]
        results = [found[rank][case] for rank in range(size)]
        if kind == "gather_last":
            assert torch.equal(results[0], torch.cat(parts, -1))
            assert all(other.shape == (*shape[:-1], 0) for other in results[1:])
            continue
        assert all(torch.equal(result, results[0]) for result in results)
        expected = parts[0]
        if kind == "all_reduce":
            wide = parts[0].float()
            for part in parts[1:]:
                wide = wide + part.float()  # in rank order, in float32, rounded once
            expected = wide.to(parts[0].dtype)
        assert torch.equal(results[0], expected)


def test_token_ids_reach_every_rank_as_they_are(ranks: Ranks) -> None:
    assert ranks.run(broadcast_ids, 3) == [[2**40 + i for i in range(5)]] * 3


def test_one_rank_alone_changes_nothing() -> None:
    x = torch.randn(3, 4)
    for kind in ("all_reduce", "gather_last", "broadcast"):
        assert getattr(Alone(), kind)(x) is x


def test_a_rank_that_does_not_come_is_named_after_the_deadline(ranks: Ranks) -> None:
    assert ranks.run(come_alone, 2)[0] == "rank 1 did not come within 0.3 s"


def test_the_memory_has_no_name_and_is_the_owners_alone() -> None:
    before = set(Path("/dev/shm").iterdir())
    with_others = SharedMemory.create(2)
    assert set(Path("/dev/shm").iterdir()) == before
    assert {str(Path(part).parent) for part in with_others.address.split()} == {f"/proc/{os.getpid()}/fd"}
    with_others.close()
    with pytest.raises(RankLost, match="is gone"):
        SharedMemory.join(with_others.address, 1, 2)
