"""Ranks that meet over TCP, as between hosts."""

from pathlib import Path

import pytest
import torch

from baton.engine.parallel.communicator import RankLost
from baton.engine.parallel.gloo import Gloo
from baton.engine.parallel.rendezvous import Rendezvous

from ....ranks import Ranks, free_port
from .works import DTYPES, meet_over_tcp, part_of

CASES = [
    ("all_reduce", (3, 100), "float32", 1),
    ("all_reduce", (0, 100), "float32", 2),
    ("all_reduce", (70,), "bfloat16", 3),
    ("broadcast", (5, 2), "bfloat16", 4),
    ("gather_last", (4, 31), "float32", 5),
    ("gather_last", (4, 31), "bfloat16", 6),
    ("gather_last", (0, 31), "float32", 7),
]


@pytest.mark.parametrize("scheme", ["tcp", "file"])
def test_meetings_over_tcp_give_what_they_say(scheme: str, ranks: Ranks, tmp_path: Path) -> None:
    url = f"tcp://127.0.0.1:{free_port()}" if scheme == "tcp" else f"file://{tmp_path}/meeting"
    first, *others = ranks.run(meet_over_tcp, 3, url, CASES)
    for case, (kind, shape, dtype, seed) in enumerate(CASES):
        parts = [part_of(rank, shape, DTYPES[dtype], seed) for rank in range(3)]
        if kind == "gather_last":
            assert torch.equal(first[case], torch.cat(parts, -1))
            assert all(other[case].shape == (*shape[:-1], 0) for other in others)
            continue
        assert all(torch.equal(other[case], first[case]) for other in others)
        expected = parts[0] if kind == "broadcast" else torch.stack(parts).float().sum(0)
        torch.testing.assert_close(first[case].float(), expected.float(), rtol=1e-2, atol=1e-2)


def test_a_rank_whose_peer_never_comes_says_so() -> None:
    with pytest.raises(RankLost, match="did not meet at tcp"):
        Gloo(Rendezvous(f"tcp://127.0.0.1:{free_port()}", 0, 2, meet_s=0.3, timeout_s=0.3), "127.0.0.1")


@pytest.mark.parametrize("url", ["127.0.0.1:99", "tcp://127.0.0.1", "env://"])
def test_what_is_no_meeting_point_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="no meeting point"):
        Rendezvous(url, 0, 1).store()
