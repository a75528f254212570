"""How the ranks of one worker meet, whatever carries the bytes."""

from typing import Protocol

from torch import Tensor

from ...core.segment import RankLost

__all__ = ["Communicator", "RankLost"]


class Communicator(Protocol):
    """The meetings of `size` ranks. Every rank calls the same methods in the same order with tensors of equal shape.

    Each raises RankLost where a peer is gone or late; after that, and after `close`, it is of no further use. The
    worker ends then: the other ranks are of no use.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """x becomes the sum over all ranks, the same bits on each, whoever came first. Returns x.

        On the CPU bfloat16 is added in float32 and rounded once.
        """

    def gather_last(self, x: Tensor) -> Tensor:
        """Rank 0: the ranks' x side by side along the last axis, in their order. Others: an empty tensor [..., 0].

        x [..., n] -> [..., size * n].
        """

    def broadcast(self, x: Tensor) -> Tensor:
        """x becomes rank 0's. Any dtype. Returns x."""

    def barrier(self) -> None:
        """Returns once every rank has called it."""

    def close(self) -> None:
        """Give back what this rank holds. Again: nothing."""
