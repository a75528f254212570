"""Rotary embedding's tables: cosine and sine by position, for each way to stretch a context that we know.

Formulae as in the papers and in transformers' modeling_rope_utils, whose float32 order of operations is kept: plain
(Su et al., 2021), linear (Chen et al., 2023), yarn (Peng et al., 2023), llama3 (Llama 3.1's release), dynamic NTK
(emozilla, 2023), longrope (Ding et al., 2024).

A key is rotated once, when it is written, and its block is then shared by whoever has the same beginning. So an angle
may depend on the position alone. Dynamic NTK and longrope choose other frequencies once a sequence is longer than the
length that the model was trained for; transformers then turns new keys otherwise than those it wrote before, and its
answer depends on how the prompt was cut. Up to that length both are fixed: dynamic NTK is plain, longrope has its short
factors. That far they are served, and exact; a table for more positions is refused.
"""

import math

import torch
from torch import Tensor

from ...kernels.rotary import signed_sin
from .config import RopeConfig


def rope_tables(rope: RopeConfig, head_size: int, num_positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, signed sin), each [num_positions, head_size], as `kernels/rotary.py` wants them.

    Raises ValueError where the angles would depend on more than the position.
    """
    trained = rope.original_max_position_embeddings
    if rope.kind in ("dynamic", "longrope") and num_positions > trained:
        raise ValueError(
            f"rope type {rope.kind} is served up to {trained} positions, not {num_positions}: beyond that all angles "
            f"change with a sequence's length, and cached KV would not fit. Set max_model_len to {trained} or less"
        )
    frequencies, factor = inverse_frequencies(rope, head_size)
    half = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat((half, half), -1)
    return (angles.cos() * factor).to(dtype), signed_sin((angles.sin() * factor).to(dtype))


def inverse_frequencies(rope: RopeConfig, head_size: int) -> tuple[Tensor, float]:
    """(radians per position of each pair [head_size / 2] f32, factor on cos and sin)."""
    powers = rope.theta ** (torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size)
    plain = 1.0 / powers
    if rope.kind in ("default", "dynamic"):
        return plain, 1.0
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, powers, head_size), _yarn_factor(rope)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.short_factor) * powers), _longrope_factor(rope)
    raise ValueError(f"rope type {rope.kind!r} is not supported")


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    old_context = rope.original_max_position_embeddings
    low_wavelength = old_context / rope.low_freq_factor
    high_wavelength = old_context / rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > low_wavelength, plain / rope.factor, plain)
    smooth = (old_context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * stretched / rope.factor + smooth * stretched
    medium = (wavelength >= high_wavelength) & (wavelength <= low_wavelength)
    return torch.where(medium, between, stretched)


def _yarn(rope: RopeConfig, powers: Tensor, head_size: int) -> Tensor:
    def dimension(rotations: float) -> float:
        """Which dimension turns this often over the original context."""
        context = rope.original_max_position_embeddings
        return (head_size * math.log(context / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    if low == high:
        high += 0.001  # the ramp would divide by zero
    ramp = torch.clamp((torch.arange(head_size // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _yarn_factor(rope: RopeConfig) -> float:
    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _longrope_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
