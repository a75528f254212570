"""Folders of a run: one that was killed leaves them to the next one's start."""

import fcntl
from pathlib import Path

from baton.cluster.launch import _remove_orphans


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
