"""Mistral (Jiang et al., 2023): Llama with, in its first release, a window that every layer looks through."""

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
