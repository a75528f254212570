"""Two ranks of one host whose GPUs reach each other's memory: what a decode step meets for, our kernels do, in a
captured graph too; NCCL does the rest, such as the sums of a long prompt's chunk.

Each rank has a mailbox, which the other maps (CUDA IPC). A rank that dies or hangs leaves the other's stream in a
kernel, as with NCCL: see csrc/peer.cuh, and kernels/device_wait.py for who waits for such a stream.
"""

import torch
from torch import Tensor

from ...kernels import norm
from ...kernels.mailbox import Pair
from ...kernels.peer_copy import peer_receive, peer_receive_beside, peer_send
from ...kernels.peer_sum import fits, peer_add_rms_norm, peer_sum
from .communicator import Communicator


class Peers:
    """See communicator.py. One thread uses it, on one stream."""

    def __init__(self, pair: Pair, rest: Communicator) -> None:
        """rest: for what the kernels are not for."""
        self.rank = pair.rank
        self.size = 2
        self._pair = pair
        self._rest = rest
        self._closed = False

    def all_reduce(self, x: Tensor) -> Tensor:
        return peer_sum(self._pair, x) if self._serves(x) else self._rest.all_reduce(x)

    def add_rms_norm(self, delta: Tensor, stream: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See the function of this name."""
        if self._serves(delta):
            return peer_add_rms_norm(self._pair, delta, stream, weight, eps)
        return norm.add_rms_norm(self._rest.all_reduce(delta), stream, weight, eps)

    def gather_last(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if self.rank > 0:
            peer_send(self._pair, x)
            return x.new_empty(*x.shape[:-1], 0)
        rows = x.view(x.shape[:-1].numel(), x.shape[-1])
        return peer_receive_beside(self._pair, rows).view(*x.shape[:-1], 2 * x.shape[-1])

    def broadcast(self, x: Tensor) -> Tensor:
        if self.rank > 0:
            return peer_receive(self._pair, x)
        peer_send(self._pair, x)
        return x

    def barrier(self) -> None:
        self._rest.barrier()

    def close(self) -> None:
        """Not while the other still comes to meetings. Ends the kernel in which it left us."""
        if self._closed:
            return
        self._closed = True
        try:
            self._pair.stop()
        finally:
            self._rest.close()

    def _serves(self, x: Tensor) -> bool:
        return x.ndim == 2 and x.is_contiguous() and fits(x.shape[0], x.shape[1], x.dtype)


def can_be_captured(communicator: Communicator, rows: int, hidden: int, dtype: torch.dtype) -> bool:
    """Whether the meetings of a decode step of so many rows can be part of a CUDA graph."""
    return communicator.size == 1 or (isinstance(communicator, Peers) and fits(rows, hidden, dtype))


def add_rms_norm(
    communicator: Communicator,
    delta: Tensor,
    stream: Tensor,
    weight: Tensor,
    eps: float,
) -> Tensor:
    """stream += the sum of the ranks' deltas, in place; -> its norm.    delta, stream [T, hidden], weight [hidden].

    In one kernel where there is one for these ranks. delta may be changed. Raises RankLost.
    """
    if isinstance(communicator, Peers):
        return communicator.add_rms_norm(delta, stream, weight, eps)
    return norm.add_rms_norm(communicator.all_reduce(delta), stream, weight, eps)
