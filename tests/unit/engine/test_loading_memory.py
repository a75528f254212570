"""Loading a checkpoint holds its weights and, beside them, no more than one tensor."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from baton.engine.models import ModelConfig, load_model

CPU = torch.device("cpu")
EXPERTS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
}


class MostBytes(TorchDispatchMode):
    """After each operation: how many bytes tensors hold that were not there before."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen = max(self.seen, held_bytes())
        return result


def held_bytes() -> int:
    """Of all tensors but frozen ones; views of one storage count as the largest of them."""
    sizes: dict[int, int] = {}
    for tensor in (found for found in gc.get_objects() if isinstance(found, torch.Tensor)):
        place = id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()
        sizes[place] = max(sizes.get(place, 0), tensor.nbytes)
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", EXPERTS)
def test_loading_holds_the_weights_and_one_tensor(
    family: str, dtype: torch.dtype, checkpoint: Callable[..., Path]
) -> None:
    # One layer, no head: what is read last is the feed-forward, so that anything held twice shows.
    path = checkpoint(family, **EXPERTS[family], num_hidden_layers=1, tie_word_embeddings=True)
    config = ModelConfig.from_dir(path)
    gc.collect()
    gc.freeze()
    try:
        with MostBytes() as most:
            model = load_model(path, config, dtype, CPU, num_positions=16)
        weights = held_bytes()
    finally:
        gc.unfreeze()
    largest = model.embedding.numel() * 4  # as on disk
    print(f"{weights} bytes of weights, {most.seen} held at most, {largest} is the largest tensor")
    assert weights <= most.seen <= weights + largest
