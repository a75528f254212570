"""`baton serve` leaves nothing behind: no process, no shared memory, no folder."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from baton.client import InferenceClient, Sampling

from .cluster import serve


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets need a short path, pytest's own is too long for them."""
    folder = Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def processes_that_know(secret: str) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and secret.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def test_ctrl_c_ends_every_process_and_removes_every_folder(short_folder: Path, tmp_path: Path) -> None:
    with serve(tmp_path, env={"TMPDIR": str(short_folder)}) as cluster:
        with InferenceClient(cluster.grpc_address) as client:
            assert client.generate("A list", sampling=Sampling(max_tokens=4)).usage.completion_tokens == 4
        runs = list(short_folder.glob("baton-*"))
        assert len(runs) == 1
        rings = Path("/dev/shm") / runs[0].name
        assert rings.stat().st_mode & 0o777 == runs[0].stat().st_mode & 0o777 == 0o700
        assert len(processes_that_know(cluster.token)) > 5
    assert cluster.process.returncode == 0
    assert processes_that_know(cluster.token) == []
    assert not runs[0].exists()
    assert not rings.exists()
