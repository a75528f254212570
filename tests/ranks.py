"""Real processes that stand for the ranks of one worker: started once, then given work after work."""

import multiprocessing
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from baton.engine.parallel.shared_memory import SharedMemory

ROOT = str(Path(__file__).resolve().parents[1])
PATIENCE_S = 120.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Rank:
    """What a work is told: who it is, and how to reach the others."""

    def __init__(self, rank: int, size: int, connection: Connection) -> None:
        self.rank = rank
        self.size = size
        self._connection = connection

    def tell(self, value: Any) -> None:
        """Rank 0 to all others."""
        self._connection.send(("told", value))

    def hear(self) -> Any:
        assert self._connection.poll(PATIENCE_S), "rank 0 said nothing"
        return self._connection.recv()

    def agree(self, value: Any) -> Any:
        """Rank 0's value, in all ranks."""
        if self.rank > 0:
            return self.hear()
        self.tell(value)
        return value

    def report(self, value: Any) -> None:
        """To rank 0, which takes one from each of the others."""
        self._connection.send(("reported", (self.rank, value)))

    def reports(self) -> list[Any]:
        found = dict(self.hear() for _ in range(self.size - 1))
        return [found[rank] for rank in range(1, self.size)]

    def meet(self, timeout_s: float = PATIENCE_S, **sizes: int) -> SharedMemory:
        """The same communicator in all ranks."""
        if self.rank == 0:
            communicator = SharedMemory.create(self.size, timeout_s, **sizes)
            self.tell(communicator.address)
            return communicator
        return SharedMemory.join(self.hear(), self.rank, self.size, timeout_s)


Work = Callable[..., Any]


class Ranks:
    """Processes of one torch thread each."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")  # importing torch takes seconds: once for all
        context.set_forkserver_preload(["baton.engine.engine", "baton.engine.parallel.shared_memory"])
        self.processes = []
        self._connections: list[Connection] = []
        self._size = 0  # of the work under way
        sys.path.append(ROOT)  # the children take this path over, and find the tests' own modules on it
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_main, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self.processes.append(process)
                self._connections.append(ours)
        finally:
            sys.path.remove(ROOT)

    def start(self, work: Work, size: int, *args: Any) -> None:
        """Let the first `size` processes each call work(Rank, *args)."""
        self._size = size
        for rank, connection in enumerate(self._connections[:size]):
            connection.send((work, rank, size, args))

    def results(self, ranks: list[int]) -> dict[int, Any]:
        """What the work returned in these ranks, or the exception it raised. Carries word from rank 0 meanwhile."""
        found: dict[int, Any] = {}
        listening = {connection: rank for rank, connection in enumerate(self._connections[: self._size])}
        while not set(ranks) <= set(found):
            ready = wait(list(listening), PATIENCE_S)
            assert ready, f"no word from ranks {sorted(set(ranks) - set(found))}"
            for connection in ready:
                try:
                    kind, value = connection.recv()
                except EOFError:  # it died
                    assert listening.pop(connection) not in ranks
                    continue
                if kind == "told":
                    for other in self._connections[1 : self._size]:
                        other.send(value)
                elif kind == "reported":
                    self._connections[0].send(value)
                else:
                    found[listening.pop(connection)] = value
        return {rank: found[rank] for rank in ranks}

    def run(self, work: Work, size: int, *args: Any) -> list[Any]:
        """In rank order. Raises what a rank raised."""
        self.start(work, size, *args)
        found = self.results(list(range(size)))
        for value in found.values():
            if isinstance(value, Exception):
                raise value
        return [found[rank] for rank in range(size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _main(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    while True:
        try:
            work, rank, size, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("done", work(Rank(rank, size, connection), *args)))
        except Exception as error:
            error.add_note(f"in rank {rank}")
            connection.send(("done", error))
