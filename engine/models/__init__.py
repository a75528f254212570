"""Our own code for the families that are served; one file each. Code from a checkpoint is never executed."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..parallel.alone import Alone
from ..parallel.communicator import Communicator
from . import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from .config import ModelConfig
from .decoder import Model, ReadAttention, ReadFeedForward, read_mlp, read_model
from .safetensors_file import SafetensorsDir
from .shard import Shard
from .weights import Weights

__all__ = ["Model", "ModelConfig", "Shard", "load_model"]

_FAMILIES: dict[str, tuple[ReadAttention, ReadFeedForward]] = {
    "llama": (llama.read_attention, read_mlp),
    "mistral": (mistral.read_attention, read_mlp),
    "mixtral": (mistral.read_attention, mixtral.read_feed_forward),
    "qwen2": (qwen2.read_attention, read_mlp),
    "qwen3": (qwen3.read_attention, read_mlp),
    "qwen3_moe": (qwen3.read_attention, qwen3_moe.read_feed_forward),
}


def load_model(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    num_positions: int | None = None,
    communicator: Communicator | None = None,
    exact: bool = False,
) -> Model:
    """Read a checkpoint's safetensors files: of each tensor the part that this rank computes with.

    progress: called with (bytes done, bytes in all). num_positions: how long a sequence may become; None: as long as
    the configuration says. communicator: with the ranks that hold the other parts; None: this one holds all. exact:
    logits are bit for bit the same whatever else is in a step, where the executor does its part. Raises
    ValueError where files and configuration do not fit each other, or the model doesn't split over so many ranks.
    """
    peers: Communicator = Alone() if communicator is None else communicator
    Shard(peers.rank, peers.size).check(config)
    weights = Weights(SafetensorsDir(path), dtype, device, peers, progress, exact)
    return read_model(weights, config, num_positions or config.max_position_embeddings, *_FAMILIES[config.architecture])
