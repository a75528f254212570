"""Ranks that each have a GPU: NCCL, through torch. Every meeting is queued on the caller's current stream; the host
waits for none but a barrier. Capturing one in a CUDA graph this way did not end on two H200 (torch 2.11).

A rank that dies or hangs leaves the others' streams in a kernel that does not end, and who waits for such a stream
waits with it, though not for ever: kernels/device_wait.py. The death of a rank ends its worker, from outside.
"""

from typing import Any

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, BroadcastOptions

from ...kernels.device_wait import DeviceStuck, settle
from .communicator import RankLost
from .rendezvous import Rendezvous


class Nccl:
    """See communicator.py. One thread uses it. More than two ranks round bfloat16 at every addition."""

    def __init__(self, rendezvous: Rendezvous, device: torch.device) -> None:
        """Raises RankLost where the others don't come, ValueError where this build of torch has no NCCL."""
        group = getattr(distributed, "ProcessGroupNCCL", None)
        if group is None:
            raise ValueError("this build of torch has no NCCL")
        self.rank = rendezvous.rank
        self.size = rendezvous.size
        self._device = device
        options = group.Options()
        options._timeout = rendezvous.timeout
        self._store = rendezvous.store()
        try:
            self._group: Any = group(self._store, self.rank, self.size, options)
            self._group.eager_connect_single_device(device)  # now: not in a capture, nor in the first request's step
        except RuntimeError as error:
            raise RankLost(f"the ranks did not meet at {rendezvous.url}: {error}") from error

    def exchange(self, name: str, text: str) -> list[str]:
        """Each rank's text, in their order, by way of the meeting point: once for a name. Raises RankLost."""
        try:
            self._store.set(f"{name} {self.rank}", text)
            return [self._store.get(f"{name} {rank}").decode() for rank in range(self.size)]
        except RuntimeError as error:
            raise RankLost(f"a rank is gone or late: {error}") from error

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.numel():
            self._queue(self._group.allreduce, [x], AllreduceOptions())
        return x

    def gather_last(self, x: Tensor) -> Tensor:
        found = x.new_empty(self.size, *x.shape)
        if x.numel():
            self._queue(self._group._allgather_base, found, x.contiguous(), AllgatherOptions())
        if self.rank > 0:
            return x.new_empty(*x.shape[:-1], 0)
        return found.movedim(0, -2).reshape(*x.shape[:-1], self.size * x.shape[-1])

    def broadcast(self, x: Tensor) -> Tensor:
        if x.numel():
            options = BroadcastOptions()
            options.rootRank, options.rootTensor = 0, 0
            self._queue(self._group.broadcast, [x], options)
        return x

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, device=self._device))
        try:
            settle(self._device)
        except DeviceStuck as error:
            raise RankLost(f"a rank did not come: {error}") from error

    def close(self) -> None:
        """Not while a peer still comes to meetings. Waits for no peer, and ends the kernel in which one left us."""
        if self._group is not None:
            self._group.abort()
            self._group = None

    def _queue(self, begin: Any, *arguments: Any) -> None:
        """The last argument is the options. Without asyncOp the work is on the current stream, not on one beside it."""
        arguments[-1].asyncOp = False
        try:
            work = begin(*arguments)
            if work is not None:
                work.wait()  # the stream does; the host goes on
        except RuntimeError as error:
            raise RankLost(f"a rank is gone or late: {error}") from error
