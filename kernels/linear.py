"""The product with a weight matrix and what comes after it; and the weight's layout where the CPU has a better one."""

import torch
from torch import Tensor
from torch.nn import functional

from .activation import silu_gate
from .build import cuda_library
from .skinny_linear import MOST_ROWS, SkinnyWorkspace, fits_skinny, skinny_linear


def most_skinny_rows(outputs: int, inputs: int) -> int:
    """Up to how many rows `skinny_linear` serves a weight [O, I]; more are torch's (cuBLAS)."""
    return MOST_ROWS  # of any shape: the rows at which cuBLAS is faster have not been measured


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    workspace: SkinnyWorkspace | None = None,
    invariant: bool = False,
) -> Tensor:
    """x W^T + b.

    x [T, I], weight [O, I], as it is or packed, bias [O] -> [T, O].
    workspace: lets few rows on a GPU go to `skinny_linear`. invariant: any number of rows do, where it fits them, so
    that a row's result does not depend on how many there are.
    """
    if is_skinny(x, weight, workspace, invariant, bias):
        assert workspace is not None
        return skinny_linear(x, weight, workspace, bias)
    if weight.is_mkldnn:
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return packed
    return functional.linear(x, weight, bias)


def add_linear(
    stream: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    workspace: SkinnyWorkspace | None = None,
    invariant: bool = False,
) -> Tensor:
    """stream += x W^T + b, in place.    stream [T, O] -> itself; the rest as `linear` has it."""
    if is_skinny(x, weight, workspace, invariant, bias, stream):
        assert workspace is not None
        return skinny_linear(x, weight, workspace, bias, add=True, out=stream)
    return stream.add_(linear(x, weight, bias))


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    workspace: SkinnyWorkspace | None = None,
    invariant: bool = False,
) -> Tensor:
    """silu(gate) * up of a product whose columns are the gate's, then up's.

    x [T, I], weight [2F, I], the gate's rows first, bias [2F] -> [T, F]; the rest as `linear` has it.
    """
    if weight.shape[0] % 16 == 0 and is_skinny(x, weight, workspace, invariant, bias):
        assert workspace is not None
        return skinny_linear(x, weight, workspace, bias, gate=True)
    return silu_gate(linear(x, weight, bias))


def is_skinny(
    x: Tensor, weight: Tensor, workspace: SkinnyWorkspace | None, invariant: bool, *others: Tensor | None
) -> bool:
    """Whether these go to `skinny_linear`, where what follows a product costs nothing: else it is an operation more."""
    if workspace is None or cuda_library(x.device) is None or not fits_skinny(x, weight, *others):
        return False
    return invariant or x.shape[0] <= most_skinny_rows(*weight.shape)


def pack_weight(weight: Tensor) -> Tensor:
    """The weight as `linear` reads it fastest: itself, but for a copy in another layout where the CPU has a better one.

    bfloat16: oneDNN's blocks. Plain rows are put into that layout again for every product, which at one token costs
    more than the product: on a Zen 5 core, [2048, 2048] takes 103 us packed and 252 us plain. The operations are those
    that torch.compile emits.

    float32 with more rows than columns: column after column, read as a view of rows. On an AMD core MKL's product of
    few tokens is then up to three times as fast, [4096, 256] at one token 157 us for 440; at many they are even.
    """
    if weight.device.type != "cpu" or weight.ndim != 2:
        return weight
    if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        return packed
    if weight.dtype == torch.float32 and weight.shape[0] > weight.shape[1]:
        return weight.t().contiguous().t()
    return weight
