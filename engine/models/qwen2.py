"""Qwen2 and Qwen2.5 (Yang et al., 2024): biases on q, k and v; some layers may look through a window."""

from .config import ModelConfig
from .decoder import read_output, read_qkv
from .layers import Attention
from .weights import Weights


def read_attention(weights: Weights, config: ModelConfig, layer: int) -> Attention:
    return Attention(
        layer=layer,
        head_size=config.head_size,
        window=config.windows[layer],
        qkv=read_qkv(weights, config, layer),
        output=read_output(weights, config, layer),
    )
