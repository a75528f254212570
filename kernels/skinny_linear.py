"""The product with a weight matrix on a GPU: of few rows in about the time that reading the weights takes, and of any
number of rows with the same bits in each."""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from .build import cuda_library, multiprocessors, stream

MOST_ROWS = 64  # up to which the time is that of reading the weights
_TILE_ROWS = 128
_ARRIVALS = 1 << 14  # one for each tile, the smallest of 64 columns of a result


class SkinnyWorkspace:
    """Where thread blocks leave sums for each other, and count themselves. Its size is fixed, 9 MB on an H200; made
    before any capture.

    Launches that share one follow each other: a stream that may run beside another needs its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.blocks = multiprocessors(device)
        size = self.blocks * 2 * _TILE_ROWS * MOST_ROWS
        self.partial = torch.empty(size, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(_ARRIVALS, dtype=torch.int32, device=device)  # each launch leaves it so


def has_skinny(device: torch.device) -> bool:
    """Whether there is a kernel for `skinny_linear`, which no number of rows is too many for."""
    return cuda_library(device) is not None


def skinny_workspace(device: torch.device) -> SkinnyWorkspace | None:
    """None where there are no CUDA kernels."""
    return SkinnyWorkspace(device) if has_skinny(device) else None


def fits_skinny(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether `skinny_linear` takes these: 2-D, bfloat16, I a multiple of 64, O of 8, rows of whole 16-byte vectors."""
    tensors = [x, weight, *(other for other in others if other is not None)]
    return (
        x.ndim == weight.ndim == 2
        and weight.is_contiguous()
        and (x.shape[0] < 2 or x.stride(0) >= x.shape[1])
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
    gate: bool = False,
    add: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """x W^T + b in float32, rounded once; with `gate` halves of the result meet.

    x [T, I], weight [O, I], bias [O], all bf16 and as `fits_skinny` says, on a GPU with the CUDA kernels. A row of the
    result is bit for bit the same whatever the other rows are and however many. The weight is read while earlier
    kernels of the stream may still run, so it must not be what one of ours makes: see csrc/launch.cuh.

    gate: silu(y[:, :O/2]) * y[:, O/2:], with no rounding between; O/2 a multiple of 8.
    add: into `out`, which is rounded once.
    -> [T, O], or [T, O/2] behind a gate; `out`, if given.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gate else weight.shape[0]
    assert fits_skinny(x, weight, bias, out), (x.shape, x.stride(), weight.shape, weight.stride())
    assert weight.shape[1] == inputs, (x.shape, weight.shape)
    assert bias is None or bias.shape == weight.shape[:1], (bias.shape, weight.shape)
    assert outputs % 8 == 0, weight.shape
    assert not (gate and add), "a gated result is not added"
    if out is None:
        assert not add, "nothing to add to"
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    assert out.shape == (rows, outputs), (out.shape, rows, outputs)
    library = cuda_library(x.device)
    assert library is not None, "no CUDA kernels"
    is_hopper = _is_hopper(x.device)
    launch, at_once = (library.hopper_linear, max(rows, 1)) if is_hopper else (library.skinny_linear, MOST_ROWS)
    for first in range(0, rows, at_once):
        launch(
            x[first].data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out[first].data_ptr(),
            workspace.partial.data_ptr(),
            workspace.arrived.data_ptr(),
            max(x.stride(0), inputs),  # of one row it may be anything
            out.stride(0),
            min(at_once, rows - first),
            outputs,
            inputs,
            gate,
            add,
            workspace.blocks,
            stream(x.device),
        )
    return out


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    """Whether the kernel for Hopper serves; the other one takes 64 rows at a time."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)


def skinny_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    """What `skinny_linear` means, operation by operation, in the precision of its arguments."""
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
