"""The sum of two ranks' tensors on two GPUs of one host, and the residual add and norm that follow it in a layer."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import DTYPES, cuda_library, stream
from .norm import rms_norm_reference

_MOST_VECTORS = 4096  # of 16 bytes in a row


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Where a rank's peer writes, made by the rank and mapped by the peer.

    inbox [2, R, hidden]: rows of the call under way and of the one before; arrived [R] i32: the call in which each row
    came last; calls [2] i32: how many there were, for its owner alone.
    """

    inbox: Tensor
    arrived: Tensor
    calls: Tensor

    @classmethod
    def make(cls, rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> "Mailbox":
        return cls(
            torch.zeros(2, rows, hidden, dtype=dtype, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.zeros(2, dtype=torch.int32, device=device),
        )


class PeerSum:
    """One rank's side. Both call the same methods in the same order, with tensors of equal shape; each call waits, on
    the device, for the other's."""

    def __init__(self, rank: int, here: Mailbox, there: Mailbox) -> None:
        """rank: 0 or 1. there: the peer's, as memory that this device reaches. Of equal shapes."""
        assert rank in (0, 1), rank
        assert here.inbox.shape == there.inbox.shape, (here.inbox.shape, there.inbox.shape)
        library = cuda_library(here.inbox.device)
        assert library is not None, "no CUDA kernels"
        self._library: ctypes.CDLL = library
        self._rank = rank
        self._here, self._there = here, there

    def fits(self, x: Tensor) -> bool:
        """x [T, hidden] can be summed here: the others are for a library's all-reduce."""
        _, rows, hidden = self._here.inbox.shape
        per_vec = 16 // x.element_size()
        return (
            x.ndim == 2
            and x.shape[0] <= rows
            and x.shape[1] == hidden
            and hidden % per_vec == 0
            and hidden // per_vec <= _MOST_VECTORS
            and x.dtype == self._here.inbox.dtype
        )

    def sum(self, x: Tensor) -> Tensor:
        """x [T, hidden] becomes the sum of both ranks', the same bits on each. Returns x."""
        self._launch(x, None, None, x, 0.0)
        return x

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += the sum of both ranks' x; gives its norm.    x, residual [T, hidden], weight [hidden]

        The sum is float32 and rounded once; the norm is of what the residual has become.
        """
        assert residual.shape == x.shape, (residual.shape, x.shape)
        assert weight.shape == x.shape[1:], (weight.shape, x.shape)
        out = torch.empty_like(x)
        self._launch(x, residual, weight, out, eps)
        return out

    def _launch(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, out: Tensor, eps: float) -> None:
        assert self.fits(x), (x.shape, x.dtype, self._here.inbox.shape)
        for tensor in (x, residual, weight, out):
            assert tensor is None or (tensor.is_contiguous() and tensor.dtype == x.dtype), tensor
        _, rows, hidden = self._here.inbox.shape
        self._library.peer_sum(
            x.data_ptr(),
            self._there.inbox.data_ptr(),
            self._here.inbox.data_ptr(),
            self._there.arrived.data_ptr(),
            self._here.arrived.data_ptr(),
            self._here.calls.data_ptr(),
            None if residual is None else residual.data_ptr(),
            None if weight is None else weight.data_ptr(),
            out.data_ptr(),
            DTYPES[x.dtype],
            self._rank,
            x.shape[0],
            rows,
            hidden,
            eps,
            stream(x.device),
        )


def add_rms_norm_reference(parts: list[Tensor], residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `PeerSum.add_rms_norm` means, in the precision of its arguments: (the residual after it, its norm)."""
    total = residual + sum(parts[1:], parts[0])
    return total, rms_norm_reference(total, weight, eps)
