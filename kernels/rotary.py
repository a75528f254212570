"""Rotary position embedding (Su et al., 2021), in the layout of Llama checkpoints: dimension i turns with i + D/2."""

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head by its token's angles.    x [T, H, D]; cos, sin [T, 1, D] in x's dtype -> [T, H, D].

    `sin` carries the sign of the turn: its first half is negated (see `signed_sin`).
    """
    half = x.shape[-1] // 2
    assert cos.shape == sin.shape == (x.shape[0], 1, 2 * half), (x.shape, cos.shape, sin.shape)
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    return torch.addcmul(x * cos, swapped, sin)


def signed_sin(sin: Tensor) -> Tensor:
    """sin [..., D] with its first half negated: rotate_half(x) * sin == swap(x) * signed_sin(sin)."""
    half = sin.shape[-1] // 2
    return torch.cat((-sin[..., :half], sin[..., half:]), -1)


def rotary_reference(x: Tensor, angles: Tensor) -> Tensor:
    """What `rotary` means: pairs (x_i, x_{i+D/2}) as complex numbers times e^(i angle).    angles [T, D/2]."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), -1)
