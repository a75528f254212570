"""Bytes of one of two ranks, on two GPUs of one host, to the other: tokens one way, parts of the logits the other."""

from torch import Tensor

from .build import stream
from .mailbox import NUM_SLOTS, Pair, whole_run


def peer_send(pair: Pair, x: Tensor) -> None:
    """x goes to the other rank, which calls one of the functions below with as many bytes. Any dtype."""
    assert whole_run(x), x.stride()
    here, there = pair.here, pair.there
    pair.library.peer_send(
        x.data_ptr(), there.slots, there.came, here.acked, here.sent, here.stop, x.nbytes, NUM_SLOTS, stream(x.device)
    )


def peer_receive(pair: Pair, x: Tensor) -> Tensor:
    """x becomes what the other rank sends. Returns x."""
    assert whole_run(x), x.stride()
    _receive(pair, None, x, 1, x.nbytes, x.nbytes)
    return x


def peer_receive_beside(pair: Pair, own: Tensor) -> Tensor:
    """[S, n] -> [S, 2 n]: each row of ours, then the row that the other rank sends."""
    assert whole_run(own), own.stride()
    rows, width = own.shape
    out = own.new_empty(rows, 2 * width)
    row = width * own.element_size()
    _receive(pair, own, out, rows, row, 2 * row)
    return out


def _receive(pair: Pair, own: Tensor | None, out: Tensor, rows: int, row: int, stride: int) -> None:
    here, there = pair.here, pair.there
    pair.library.peer_receive(
        None if own is None else own.data_ptr(),
        out.data_ptr(),
        here.slots,
        here.came,
        there.acked,
        here.taken,
        here.stop,
        rows,
        row,
        stride,
        NUM_SLOTS,
        stream(out.device),
    )
