"""Mixtral (Jiang et al., 2024): Mistral whose feed-forward layers are all experts, with shares that sum to one."""

from .config import ModelConfig
from .decoder import read_experts
from .layers import Experts
from .weights import Weights


def read_feed_forward(weights: Weights, config: ModelConfig, layer: int) -> Experts:
    return read_experts(weights, config, f"model.layers.{layer}.block_sparse_moe", gate="w1", up="w3", down="w2")
