"""Folders of a run: one that was killed leaves them to the next one's start. And what signals do."""

import fcntl
import os
import signal
from pathlib import Path

import pytest

from baton.cluster.launch import Interrupted, Signals, _remove_orphans


def a_run(base: Path, name: str) -> Path:
    folder = base / name
    (folder / "logs").mkdir(parents=True)
    (folder / "alive").touch()
    return folder


def test_folders_of_a_run_that_was_killed_are_removed_and_those_of_a_running_one_stay(tmp_path: Path) -> None:
    killed, running, stranger = (a_run(tmp_path, name) for name in ("baton-killed", "baton-running", "other-tool"))
    with (running / "alive").open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        _remove_orphans(tmp_path)
    assert not killed.exists()
    assert running.exists()
    assert stranger.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_the_start_at_once_and_is_remembered_later(number: signal.Signals) -> None:
    with Signals() as signals:
        with pytest.raises(Interrupted), signals.raising():
            os.kill(os.getpid(), number)
        with pytest.raises(Interrupted):
            signals.check()
    with Signals() as signals:
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted):
            signals.check()


def test_a_signal_that_comes_where_nothing_can_be_raised_comes_again() -> None:
    class Deaf:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    def start(signals: Signals) -> None:
        with signals.raising():
            Deaf()
            signal.sigtimedwait([], 30)

    with Signals() as signals, pytest.raises(Interrupted):
        start(signals)


def test_nohup_is_obeyed() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            signals.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_signal_ends_at_once() -> None:
    ended = []
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        signals.now = lambda: ended.append(True)
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [True]
