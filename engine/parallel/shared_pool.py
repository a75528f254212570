"""A rank's KV pool where rank 0 of the same host can read and write it: blocks leave and enter a worker there.

On the CPU a pool lies in memory without a name (see segment.py); on CUDA it is an allocation of torch's, whose handle
another process opens (CUDA IPC). A handle is picklable and goes from rank to rank of one host only.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from ...core.segment import Segment
from .communicator import RankLost

# of torch.multiprocessing.reductions.rebuild_cuda_tensor
_DEVICE_ARGUMENT = 6
_NUMBERS = (3, 8, 9, 12, 14)  # where in the allocation, its counter and its event
_BYTES = (7, 11, 13)  # what names these


@dataclass(frozen=True, slots=True)
class HostPoolHandle:
    """address: of a segment, good while its maker has not closed it."""

    address: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class CudaPoolHandle:
    """arguments: of torch's `rebuild_cuda_tensor`, as its own queues would send them."""

    arguments: tuple[Any, ...]

    def to_text(self) -> str:
        """For `of_peer`: no bytes that someone would unpickle."""
        numbers = [int(self.arguments[at]) for at in _NUMBERS]
        return json.dumps([*numbers, *(bytes(self.arguments[at]).hex() for at in _BYTES)])

    def of_peer(self, text: str) -> "CudaPoolHandle":
        """The handle of another rank's pool, of the same shape and dtype as this one's. Raises ValueError."""
        found, arguments = json.loads(text), list(self.arguments)
        for at, number in zip(_NUMBERS, found[: len(_NUMBERS)], strict=True):
            arguments[at] = type(arguments[at])(number)
        for at, name in zip(_BYTES, found[len(_NUMBERS) :], strict=True):
            arguments[at] = bytes.fromhex(name)
        return CudaPoolHandle(tuple(arguments))


PoolHandle = HostPoolHandle | CudaPoolHandle


class SharedPool:
    """A pool of this rank, zeros at first. It lives for as long as a tensor over it, in whatever process."""

    def __init__(self, tensor: Tensor, handle: PoolHandle, segment: Segment | None) -> None:
        self.tensor = tensor
        self.handle = handle
        self._segment = segment

    @classmethod
    def create(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "SharedPool":
        if device.type == "cuda":
            tensor = torch.zeros(shape, dtype=dtype, device=device)
            _, arguments = reduce_tensor(tensor)  # type: ignore[no-untyped-call] # torch's own
            return cls(tensor, CudaPoolHandle(arguments), None)
        segment = Segment.create(torch.Size(shape).numel() * dtype.itemsize)
        return cls(_over(segment, shape, dtype), HostPoolHandle(segment.address, shape, dtype), segment)

    def close(self) -> None:
        """Nobody can open it from now on; those who have keep it. Again: nothing."""
        if self._segment is not None:
            self._segment.close()


def open_pool(handle: PoolHandle, device: torch.device) -> Tensor:
    """A peer's pool, as memory of `device`, which on CUDA reaches it over the link between the two.

    Raises RankLost where the peer is gone.
    """
    if isinstance(handle, HostPoolHandle):
        segment = Segment.open(handle.address)
        try:
            return _over(segment, handle.shape, handle.dtype)
        finally:
            segment.close()  # the mapping stays
    torch.cuda.init()  # type: ignore[no-untyped-call] # torch's own
    arguments = list(handle.arguments)
    # By the peer's count of devices, which need not be ours, and it would make a context of ours on its device.
    arguments[_DEVICE_ARGUMENT] = device.index if device.index is not None else torch.cuda.current_device()
    try:
        tensor: Tensor = rebuild_cuda_tensor(*arguments)  # type: ignore[no-untyped-call] # torch's own
    except RuntimeError as error:
        raise RankLost(f"the pool of another rank can't be opened on {device}: {error}") from error
    return tensor


def _over(segment: Segment, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(segment.shared, dtype=dtype).view(shape)
