"""One rank, which has the whole model: every meeting is over as it begins."""

from torch import Tensor


class Alone:
    """See communicator.py. The model has one way, so this costs a call where other ranks would wait."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather_last(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        return x

    def barrier(self) -> None:
        return

    def close(self) -> None:
        return
