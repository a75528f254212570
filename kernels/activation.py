"""The gated activation of the feed-forward layer (SwiGLU; Shazeer, 2020)."""

from torch import Tensor
from torch.nn import functional


def silu_gate(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.    gate_up [T, 2F], the gate in the first half -> [T, F]."""
    half = gate_up.shape[-1] // 2
    assert gate_up.shape[-1] == 2 * half, gate_up.shape
    return functional.silu(gate_up[..., :half]).mul_(gate_up[..., half:])
