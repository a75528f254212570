"""Qwen3 (Yang et al., 2025), dense: an RMS norm on each head of q and k, before the rotation."""

from ...kernels.rotary_write import HeadNorms
from .config import ModelConfig
from .decoder import read_output, read_qkv
from .layers import Attention
from .weights import Weights


def read_attention(weights: Weights, config: ModelConfig, layer: int) -> Attention:
    prefix, head = f"model.layers.{layer}.self_attn", (config.head_size,)
    return Attention(
        layer=layer,
        head_size=config.head_size,
        window=config.windows[layer],
        qkv=read_qkv(weights, config, layer),
        output=read_output(weights, config, layer),
        head_norms=HeadNorms(
            q=weights.read(f"{prefix}.q_norm.weight", head),
            k=weights.read(f"{prefix}.k_norm.weight", head),
            eps=config.rms_norm_eps,
        ),
    )
