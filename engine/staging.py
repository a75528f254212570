"""Small arrays to the device and back without waiting for it."""

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels.device_wait import wait_for

Array = npt.NDArray[np.generic]

_ALIGNMENT = 16  # bytes; of every array in the buffer
_FIRST_ROOM = 1 << 14  # bytes
_TYPES = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
}


class Staging:
    """Sends numpy arrays to one device, all of a call in one copy from a buffer (pinned, for a GPU).

    Two buffers take turns: one that a copy may still be reading is not written.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [self._buffer(_FIRST_ROOM), self._buffer(_FIRST_ROOM)]
        self._events: list[torch.cuda.Event | None] = [None, None]  # of the last copy from each
        self._turn = 0

    def send(self, arrays: Seq[Array], into: Tensor | None = None) -> list[Tensor]:
        """f32, f64, i32 and i64 arrays of any shape, which nobody changes after: on a CPU their memory is shared.

        into: [B] u8 on the device, where they are put, `size_of(arrays)` bytes; None: into memory of their own.
        """
        if self._device.type == "cpu" and into is None:
            return [torch.from_numpy(array) for array in arrays]
        arrays = [np.ascontiguousarray(array) for array in arrays]
        starts, size = [], 0
        for array in arrays:
            starts.append(size)
            size += _aligned(array.nbytes)
        buffer = self._free(size)
        host = buffer.numpy()
        for start, array in zip(starts, arrays, strict=True):
            host[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        if into is None:
            sent = buffer[:size].to(self._device, non_blocking=True, copy=True)
        else:
            sent = into[:size].copy_(buffer[:size], non_blocking=True)
        if self._device.type != "cpu":
            event = self._events[self._turn] = self._events[self._turn] or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
        self._turn ^= 1
        return [
            sent[start : start + array.nbytes].view(_TYPES[array.dtype]).view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        ]

    def _free(self, size: int) -> Tensor:
        """The buffer whose turn it is, large enough, and read by nobody."""
        event = self._events[self._turn]
        if event is not None:
            wait_for(event)  # of the copy before the last: over long ago, unless the device is two steps behind
        if size > len(self._buffers[self._turn]):
            self._buffers[self._turn] = self._buffer(1 << (size - 1).bit_length())
        return self._buffers[self._turn]

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type != "cpu")


def size_of(arrays: Seq[Array]) -> int:
    """Bytes of device memory that they take together."""
    return sum(_aligned(array.nbytes) for array in arrays)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class HostCopy:
    """Tensors on their way to the host. On a CPU they are there at once."""

    def __init__(self, tensors: Seq[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._sources: Seq[Tensor] | None = None
        self._tensors = list(tensors)
        if tensors and tensors[0].is_cuda:
            # Pinned memory comes from torch's cache, which is asked anew each time: a copy not yet read is not lost.
            self._tensors = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in tensors]
            for target, source in zip(self._tensors, tensors, strict=True):
                target.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensors[0].device))
            self._sources = tensors  # until they are read, whatever stream frees them

    def ready(self) -> bool:
        """wait() would not wait."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> list[Tensor]:
        """The tensors on the host, in order. Raises DeviceStuck."""
        if self._event is not None:
            wait_for(self._event)
            self._event = self._sources = None
        return self._tensors
