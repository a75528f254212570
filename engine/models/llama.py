"""Llama (Touvron et al., 2023; Llama 3: Dubey et al., 2024): grouped-query attention, biases only if configured."""

from .config import ModelConfig
from .decoder import read_output, read_qkv
from .layers import Attention
from .weights import Weights


def read_attention(weights: Weights, config: ModelConfig, layer: int) -> Attention:
    return Attention(
        layer=layer,
        head_size=config.head_size,
        window=None,
        qkv=read_qkv(weights, config, layer),
        output=read_output(weights, config, layer),
    )
