"""Where the ranks of a group that torch.distributed carries find each other. All of it is said, none of it is read
from the environment, and torch's default group stays as it is: an engine does not own its process."""

from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from .communicator import RankLost


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """url: "tcp://host:port", a free port of rank 0's host, or "file:///path", a new file that all ranks can reach."""

    url: str
    rank: int
    size: int
    meet_s: float = 60.0  # until all are there at first
    timeout_s: float = 60.0  # how late a peer may be at each later meeting
    name: str = "ranks"  # groups of different names may use one url, if not at the same time

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self.timeout_s)

    def store(self) -> Store:
        """Raises RankLost where rank 0 is not there in time, ValueError for another kind of url."""
        where, patience = urlsplit(self.url), timedelta(seconds=self.meet_s)
        if where.scheme == "file":
            store: Store = FileStore(where.path, self.size)
            store.set_timeout(patience)
        elif where.scheme == "tcp" and where.hostname and where.port:
            try:
                store = TCPStore(where.hostname, where.port, self.size, self.rank == 0, patience)
            except RuntimeError as error:
                raise RankLost(f"the ranks did not meet at {self.url}: {error}") from error
        else:
            raise ValueError(f"{self.url!r} is no meeting point: tcp://host:port or file:///path")
        return PrefixStore(self.name, store)
