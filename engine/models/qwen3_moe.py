"""Qwen3-MoE (Yang et al., 2025): Qwen3 with experts in all layers but those that the configuration keeps dense."""

from .config import ModelConfig
from .decoder import read_experts, read_mlp
from .layers import Experts, Mlp
from .weights import Weights


def read_feed_forward(weights: Weights, config: ModelConfig, layer: int) -> Mlp | Experts:
    if config.experts is None or layer not in config.experts.layers:
        return read_mlp(weights, config, layer)
    prefix = f"model.layers.{layer}.mlp"
    return read_experts(weights, config, prefix, gate="gate_proj", up="up_proj", down="down_proj")
