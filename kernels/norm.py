"""Root mean square normalisation (Zhang and Sennrich, 2019)."""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, in float32 inside.    x [..., D], weight [D] -> [..., D] in x's dtype."""
    assert weight.shape == x.shape[-1:], (x.shape, weight.shape)
    if x.is_cuda or x.dtype != torch.float32:
        return functional.rms_norm(x, weight.shape, weight, eps)
    # torch's own is made of many operations on a CPU; these are few, and but one of them makes a tensor as large as x.
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_().mul(x).mul_(weight)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `rms_norm` means, operation by operation, in the precision of x."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
