import os
import select
import stat
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.worker.ring import Ring, RingFull, RingPair


@given(st.lists(st.one_of(st.binary(max_size=40), st.none()), max_size=60), st.integers(16, 90))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_put_comes_out_whole_and_in_order_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, moves: list[bytes | None], capacity: int
) -> None:
    path = tmp_path_factory.mktemp("ring") / "r"
    writer = Ring.create(path, capacity)
    reader = Ring.open(path)
    waiting: deque[bytes] = deque()
    for move in moves:
        if move is None:
            assert reader.take() == list(waiting)
            waiting.clear()
            continue
        room = capacity - sum(4 + len(record) for record in waiting)
        if len(move) + 4 <= room:
            writer.put(move[:3], move[3:])
            waiting.append(move)
        else:
            with pytest.raises(RingFull):
                writer.put(move)
    assert reader.take() == list(waiting)
    writer.close()
    reader.close()
    writer.unlink()


def test_the_doorbell_rings_while_records_wait_and_is_silent_after(tmp_path: Path) -> None:
    writer = Ring.create(tmp_path / "r", 1 << 16)
    reader = Ring.open(tmp_path / "r")
    poll = select.poll()
    poll.register(reader.fd, select.POLLIN)
    assert poll.poll(0) == []
    for _ in range(3):
        writer.put(b"x")
    assert poll.poll(0)
    assert len(reader.take()) == 3
    assert poll.poll(0) == []


def test_only_the_owner_may_open_its_files(tmp_path: Path) -> None:
    with RingPair.for_rank(tmp_path / "rings", "w.1"):
        files = list((tmp_path / "rings").iterdir())
        assert len(files) == 4
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        assert stat.S_IMODE((tmp_path / "rings").stat().st_mode) == 0o700


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rings").mkdir()
    (tmp_path / "rings").chmod(0o777)
    with pytest.raises(PermissionError, match="by others"):
        RingPair.for_rank(tmp_path / "rings", "w.1")
    assert list((tmp_path / "rings").iterdir()) == []


def test_nothing_stays_behind_when_the_service_has_opened_it(tmp_path: Path) -> None:
    with RingPair.for_rank(tmp_path, "w.1") as rank, RingPair.for_service(tmp_path, "w.1") as service:
        service.unlink()
        assert list(tmp_path.iterdir()) == []
        rank.outgoing.put(b"hello")
        service.outgoing.put(b"there")
        assert service.incoming.take() == [b"hello"]
        assert rank.incoming.take() == [b"there"]
        assert service.incoming.writer_pid == os.getpid()


def test_a_service_that_takes_the_files_the_moment_they_are_there_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks again and again, so it may open and remove them before the rank's `create` has returned."""
    link, taken = os.link, []

    def link_and_take(source: Path, path: Path) -> None:
        link(source, path)
        taken.append(Ring.open(path))
        taken[-1].unlink()

    monkeypatch.setattr(os, "link", link_and_take)
    writer = Ring.create(tmp_path / "r", 64)
    writer.put(b"hello")
    assert taken[0].take() == [b"hello"]
    for ring in (writer, *taken):
        ring.close()
    assert list(tmp_path.iterdir()) == []


def test_a_ring_that_nobody_has_made_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RingPair.for_service(tmp_path, "w.1")


_ECHO = """
import os, select, sys
from pathlib import Path
from baton.worker.ring import RingFull, RingPair

with RingPair.for_service(Path(sys.argv[1]), "w.1") as pair:
    poll = select.poll()
    poll.register(pair.incoming.fd, select.POLLIN)
    record = b""
    while record != b"end":
        poll.poll(10_000)
        for record in pair.incoming.take():
            while True:
                try:
                    pair.outgoing.put(record)
                    break
                except RingFull:
                    os.sched_yield()
"""


def test_two_processes_exchange_many_records_of_all_sizes(tmp_path: Path) -> None:
    with RingPair.for_rank(tmp_path, "w.1", capacity=5000) as pair:
        peer = subprocess.Popen([sys.executable, "-c", _ECHO, str(tmp_path)])
        sent = deque([bytes([i % 251]) * (i * 37 % 1500) for i in range(3000)] + [b"end"])
        expected, got = list(sent), []
        poll = select.poll()
        poll.register(pair.incoming.fd, select.POLLIN)
        while len(got) < len(expected):
            while sent:
                try:
                    pair.outgoing.put(sent[0])
                except RingFull:
                    break
                sent.popleft()
            assert poll.poll(60_000), "the peer fell silent"
            got += pair.incoming.take()
        assert peer.wait(30) == 0
        assert got == expected
