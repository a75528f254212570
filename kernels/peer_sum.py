"""The sum of two ranks' tensors on two GPUs of one host, and the residual add and norm that follow it in a layer."""

import torch
from torch import Tensor

from . import mailbox
from .build import DTYPES, stream
from .mailbox import FEW_BYTES, INBOX_BYTES, MOST_ROWS, Pair, whole_run
from .norm import rms_norm_reference

_MOST_VECTORS = 2048  # of 16 bytes in a row


def fits(rows: int, hidden: int, dtype: torch.dtype) -> bool:
    """Tensors [rows, hidden] can be summed here: the others are for a library's all-reduce."""
    row_bytes = hidden * dtype.itemsize
    return (
        dtype in DTYPES
        and row_bytes % 16 == 0
        and row_bytes <= 16 * _MOST_VECTORS
        and rows <= MOST_ROWS
        and rows * row_bytes <= INBOX_BYTES
    )


def peer_sum(pair: Pair, x: Tensor) -> Tensor:
    """x [T, hidden] becomes the sum of both ranks', the same bits on each. Returns x."""
    _launch(pair, x, None, None, x, 0.0)
    return x


def peer_add_rms_norm(pair: Pair, delta: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x += the sum of both ranks' deltas; gives its norm.    delta, x [T, hidden], weight [hidden]

    The sum is float32 and rounded once; the norm is of what x has become.
    """
    assert delta.shape == x.shape, (delta.shape, x.shape)
    assert weight.shape == x.shape[1:], (weight.shape, x.shape)
    out = torch.empty_like(x)
    _launch(pair, delta, x, weight, out, eps)
    return out


def _launch(pair: Pair, x: Tensor, residual: Tensor | None, weight: Tensor | None, out: Tensor, eps: float) -> None:
    rows, hidden = x.shape
    assert fits(rows, hidden, x.dtype), (x.shape, x.dtype)
    assert whole_run(x, (residual, weight, out)), (x.stride(), x.dtype)
    few = x.nbytes <= FEW_BYTES
    here, there = pair.here, pair.there
    pair.library.peer_sum(
        x.data_ptr(),
        there.few if few else there.inbox,
        here.few if few else here.inbox,
        None if few else there.arrived,
        here.arrived,
        here.calls,
        here.stop,
        None if residual is None else residual.data_ptr(),
        None if weight is None else weight.data_ptr(),
        out.data_ptr(),
        2 * mailbox.FEW_BYTES if few else mailbox.INBOX_BYTES,
        DTYPES[x.dtype],
        pair.rank,
        rows,
        hidden,
        eps,
        stream(x.device),
    )


def add_rms_norm_reference(parts: list[Tensor], residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `peer_add_rms_norm` means, in the precision of its arguments: (x after it, its norm)."""
    total = residual + sum(parts[1:], parts[0])
    return total, rms_norm_reference(total, weight, eps)
