"""The product of few rows with a weight matrix on a GPU, in about the time that reading the weights takes."""

import torch
from torch import Tensor
from torch.nn import functional

from .build import cuda_library, multiprocessors, stream

MOST_ROWS = 64  # of one launch
_MOST_TILE_ROWS = 256
_ARRIVALS = 1 << 14  # one for each tile, the smallest of 64 columns of a result


class SkinnyWorkspace:
    """Where thread blocks leave sums for each other, and count themselves. Its size is fixed; made before any capture.

    Launches that share one follow each other: a stream that may run beside another needs its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.blocks = multiprocessors(device)
        size = self.blocks * 2 * (_MOST_TILE_ROWS + 1) * MOST_ROWS
        self.partial = torch.empty(size, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(_ARRIVALS, dtype=torch.int32, device=device)  # each launch leaves it so


def tile_rows(outputs: int, blocks: int) -> int:
    """Rows of the tiles that a weight of so many rows is cut into: 128 or 256. Never by x, whose rows would then meet.

    x is read once for each tile, so higher ones cost fewer bytes, but more of them are shared, and have sums to add up,
    unless there is one for every second of the thread blocks.
    """
    return 256 if outputs >= 128 * blocks else 128


def fits_skinny(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether `skinny_linear` takes these: 2-D, bfloat16, I a multiple of 64, O of 8, rows of whole 16-byte vectors."""
    tensors = [x, weight, *(other for other in others if other is not None)]
    return (
        x.ndim == weight.ndim == 2
        and weight.is_contiguous()
        and weight.shape[1] % 64 == 0
        and weight.shape[0] % 8 == 0
        and weight.shape[0] <= 64 * _ARRIVALS
        and all(_has_vectors(tensor) for tensor in tensors)
    )


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    workspace: SkinnyWorkspace,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gate: bool = False,
    add: bool = False,
    out: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """x W^T + b in float32, rounded once; with `norm`, x is normalised first, with `gate` halves of the result meet.

    x [T, I], weight [O, I], bias [O], all bf16 and as `fits_skinny` says, on a GPU with the CUDA kernels. A row of the
    result is bit for bit the same whatever the other rows are. More than 64 rows read the weights once for each 64.

    norm [I]: of rms_norm(x, norm, eps). x * norm is rounded to bf16 and goes into the product, whose sums are then
    divided by the root of x's mean square in float32. torch's norm rounds once as well, but after that division.
    gate: silu(y[:, :O/2]) * y[:, O/2:], with no rounding between; O/2 a multiple of 8.
    add: into `out`, which is rounded once.
    tile: rows of W that a thread block takes at a time, 128 or 256; None: as `tile_rows` says.
    -> [T, O], or [T, O/2] behind a gate; `out`, if given.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gate else weight.shape[0]
    assert fits_skinny(x, weight, bias, norm, out), (x.shape, x.stride(), weight.shape, weight.stride())
    assert weight.shape[1] == inputs, (x.shape, weight.shape)
    assert bias is None or bias.shape == weight.shape[:1], (bias.shape, weight.shape)
    assert norm is None or norm.shape == (inputs,), (norm.shape, inputs)
    assert outputs % 8 == 0, weight.shape
    assert not (gate and add), "a gated result is not added"
    if out is None:
        assert not add, "nothing to add to"
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    assert out.shape == (rows, outputs), (out.shape, rows, outputs)
    library = cuda_library(x.device)
    assert library is not None, "no CUDA kernels"
    for first in range(0, rows, MOST_ROWS):
        library.skinny_linear(
            x[first].data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if norm is None else norm.data_ptr(),
            out[first].data_ptr(),
            workspace.partial.data_ptr(),
            workspace.arrived.data_ptr(),
            x.stride(0),
            out.stride(0),
            min(MOST_ROWS, rows - first),
            outputs,
            inputs,
            gate,
            add,
            tile or tile_rows(weight.shape[0], workspace.blocks),
            workspace.blocks,
            eps,
            stream(x.device),
        )
    return out


def skinny_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gate: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    """What `skinny_linear` means, operation by operation, in the precision of its arguments."""
    if norm is not None:
        x = x * norm * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    y = functional.linear(x, weight, bias)
    if gate:
        half = y.shape[1] // 2
        y = functional.silu(y[:, :half]) * y[:, half:]
    return y if add is None else y + add


def _has_vectors(x: Tensor) -> bool:
    """bf16 whose rows are runs of 16-byte vectors."""
    return (
        x.dtype == torch.bfloat16
        and x.stride(-1) == 1
        and (x.ndim == 1 or x.stride(0) % 8 == 0)
        and x.data_ptr() % 16 == 0
    )
