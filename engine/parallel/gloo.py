"""Ranks of several hosts on the CPU: torch's gloo, over TCP. Takes ten times as long as shared memory does on one."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from .communicator import RankLost
from .rendezvous import Rendezvous


class Gloo:
    """See communicator.py. One thread uses it."""

    def __init__(self, rendezvous: Rendezvous, host: str) -> None:
        """host: this rank's address as the others reach it. Raises RankLost."""
        self.rank = rendezvous.rank
        self.size = rendezvous.size
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined] # its stub lacks them
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = rendezvous.timeout
        try:
            self._group: Any = ProcessGroupGloo(rendezvous.store(), self.rank, self.size, options)
        except RuntimeError as error:
            raise RankLost(f"the ranks did not meet at {rendezvous.url}: {error}") from error

    def all_reduce(self, x: Tensor) -> Tensor:
        wide = x.float()
        if x.numel():
            _wait_for(self._group.allreduce, [wide])
        return x if wide is x else x.copy_(wide)

    def gather_last(self, x: Tensor) -> Tensor:
        own = x.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)] if self.rank == 0 else []
        if x.numel():
            _wait_for(self._group.gather, parts, own, 0)
        return torch.cat(parts, -1) if parts else x.new_empty(*x.shape[:-1], 0)

    def broadcast(self, x: Tensor) -> Tensor:
        if x.numel():
            _wait_for(self._group.broadcast, x, 0)
        return x

    def barrier(self) -> None:
        _wait_for(self._group.barrier)

    def close(self) -> None:
        self._group = None


def _wait_for(begin: Any, *arguments: Any) -> None:
    """What gloo raises is that a peer is gone or late; it says so in words of its own."""
    try:
        begin(*arguments).wait()
    except RuntimeError as error:
        raise RankLost(f"a rank is gone or late: {error}") from error
