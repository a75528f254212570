"""Qwen3 (Yang et al., 2025), dense: an RMS norm on each head of q and k, before the rotation."""

from .config import ModelConfig
from .decoder import read_output, read_qkv
from .layers import Attention, Norm
from .weights import Weights


def read_attention(weights: Weights, config: ModelConfig, layer: int) -> Attention:
    prefix, head = f"model.layers.{layer}.self_attn", (config.head_size,)
    return Attention(
        layer=layer,
        num_heads=len(weights.shard.heads(config.num_heads)),
        num_kv_heads=len(weights.shard.kv_heads(config.num_kv_heads)),
        head_size=config.head_size,
        window=config.windows[layer],
        qkv=read_qkv(weights, config, layer),
        output=read_output(weights, config, layer),
        q_norm=Norm(weights.read(f"{prefix}.q_norm.weight", head), config.rms_norm_eps),
        k_norm=Norm(weights.read(f"{prefix}.k_norm.weight", head), config.rms_norm_eps),
    )
