"""Loading a checkpoint holds its weights, or a rank's share of them, and, beside them, no more than one tensor."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from baton.engine.models import Model, ModelConfig, load_model
from baton.engine.models.safetensors_file import SafetensorsDir
from baton.engine.parallel.alone import Alone
from baton.engine.parallel.communicator import Communicator

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


class OneOf(Alone):
    """One rank of several, which never meets the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def load(path: Path, dtype: torch.dtype, communicator: Communicator) -> tuple[int, int, Model]:
    """(bytes of weights, bytes held at most meanwhile, the model)."""
    config = ModelConfig.from_dir(path)
    gc.collect()
    gc.freeze()
    try:
        with MostBytes() as most:
            model = load_model(path, config, dtype, CPU, num_positions=16, communicator=communicator)
        return held_bytes(), most.seen, model
    finally:
        gc.unfreeze()


# One layer, no head: what is read last is the feed-forward, so that anything held twice shows.
ONE_LAYER = {"num_hidden_layers": 1, "tie_word_embeddings": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", EXPERTS)
def test_loading_holds_the_weights_and_one_tensor(
    family: str, dtype: torch.dtype, checkpoint: Callable[..., Path]
) -> None:
    weights, most, model = load(checkpoint(family, **EXPERTS[family], **ONE_LAYER), dtype, Alone())
    largest = model.embedding.weight.numel() * 4  # as on disk
    print(f"{weights} bytes of weights, {most} held at most, {largest} is the largest tensor")
    assert weights <= most <= weights + largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", EXPERTS)
def test_a_rank_holds_its_share_of_the_weights_and_of_one_tensor(
    family: str, dtype: torch.dtype, checkpoint: Callable[..., Path]
) -> None:
    path = checkpoint(family, **EXPERTS[family], **ONE_LAYER)
    loaded, _, _ = load(path, dtype, Alone())
    whole = max(loaded, SafetensorsDir(path).total_bytes) if dtype == torch.float32 else loaded  # float32 stays mapped
    for rank in range(2):
        weights, most, model = load(path, dtype, OneOf(rank, 2))
        largest = model.embedding.weight.numel() * 4  # as on disk
        print(f"{weights} of {whole} bytes of weights, {most} held at most, {largest} is the largest part of a tensor")
        assert weights < 0.55 * whole  # norms, router and rotary tables are everywhere
        assert weights <= most <= weights + largest
