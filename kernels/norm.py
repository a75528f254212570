"""Root mean square normalisation (Zhang and Sennrich, 2019), alone and with the residual sum before it."""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from .build import DTYPES, cuda_library, stream, whole_vectors

_MAX_SIZE = 16384  # of a row that csrc/norm.cu keeps in registers


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x / rms(x) * weight over the last axis, in float32 inside.    x [..., D], weight [D] -> `out`, or new: as x."""
    assert weight.shape == x.shape[-1:], (x.shape, weight.shape)
    library = cuda_library(x.device)
    if library is not None and _fits(x):
        return _launch(library, None, x, weight, eps, out)
    normed = _torch_path(x, weight, eps)
    return normed if out is None else out.copy_(normed)


def add_rms_norm(delta: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x += delta, rounded to their dtype; then `rms_norm` of that sum, in one pass where a kernel serves.

    delta, x [..., D], x changed in place; weight [D] -> `out`, or new: as x.
    """
    assert delta.shape == x.shape, (delta.shape, x.shape)
    assert weight.shape == x.shape[-1:], (x.shape, weight.shape)
    library = cuda_library(x.device)
    if library is not None and _fits(x) and _fits(delta):
        return _launch(library, delta, x, weight, eps, out)
    normed = _torch_path(x.add_(delta), weight, eps)
    return normed if out is None else out.copy_(normed)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `rms_norm` means, operation by operation, in the precision of x."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _torch_path(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.is_cuda or x.dtype != torch.float32:
        return functional.rms_norm(x, weight.shape, weight, eps)
    # torch's own is made of many operations on a CPU; these are few, and but one of them makes a tensor as large as x.
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_().mul(x).mul_(weight)


def _fits(x: Tensor) -> bool:
    return x.dtype in DTYPES and x.shape[-1] <= _MAX_SIZE and whole_vectors(x)


def _launch(
    library: ctypes.CDLL, delta: Tensor | None, x: Tensor, weight: Tensor, eps: float, out: Tensor | None
) -> Tensor:
    normed = torch.empty_like(x) if out is None else out
    assert normed.shape == x.shape, (normed.shape, x.shape)
    for tensor in (weight, normed) if delta is None else (weight, normed, delta):
        assert tensor.dtype == x.dtype, (tensor.dtype, x.dtype)
        assert tensor.device == x.device, (tensor.device, x.device)
        assert whole_vectors(tensor), tensor.stride()
    size = x.shape[-1]
    library.add_rms_norm(
        None if delta is None else delta.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        normed.data_ptr(),
        DTYPES[x.dtype],
        x.numel() // size,
        size * x.element_size() // 16,
        eps,
        stream(x.device),
    )
    return normed
