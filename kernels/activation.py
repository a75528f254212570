"""The gated activation of the feed-forward layer (SwiGLU; Shazeer, 2020)."""

import torch
from torch import Tensor
from torch.nn import functional

from .build import DTYPES, cuda_library, stream, whole_vectors


def silu_gate(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up.    gate_up [..., 2F], the gate in the first half -> [..., F], `out` or new."""
    half = gate_up.shape[-1] // 2
    assert gate_up.shape[-1] == 2 * half, gate_up.shape
    library = cuda_library(gate_up.device)
    if library is None or gate_up.dtype not in DTYPES or not whole_vectors(gate_up, parts=2):
        gated = functional.silu(gate_up[..., :half]).mul_(gate_up[..., half:])
        return gated if out is None else out.copy_(gated)
    gated = gate_up.new_empty(*gate_up.shape[:-1], half) if out is None else out
    assert gated.shape == (*gate_up.shape[:-1], half), (gated.shape, gate_up.shape)
    assert gated.dtype == gate_up.dtype, (gated.dtype, gate_up.dtype)
    assert gated.device == gate_up.device, (gated.device, gate_up.device)
    assert whole_vectors(gated), gated.stride()
    library.silu_gate(
        gate_up.data_ptr(),
        gated.data_ptr(),
        DTYPES[gate_up.dtype],
        gated.numel() // half,
        half * gated.element_size() // 16,
        stream(gate_up.device),
    )
    return gated


def silu_gate_reference(gate_up: Tensor) -> Tensor:
    """What `silu_gate` means, in the precision of gate_up."""
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up
