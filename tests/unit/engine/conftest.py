"""Tiny checkpoints with random weights, made on the spot, and an engine over them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.engine.engine import Engine

from ...ranks import Ranks

torch.set_num_threads(1)

TINY: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def save_checkpoint(path: Path, family: str, **changes: Any) -> Path:
    """A random model of a family ("Llama", "Qwen3", ...) as transformers saves it."""
    import transformers

    torch.manual_seed(0)
    shard = changes.pop("max_shard_size", "5GB")
    config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():  # as if trained: biases and norms that do something
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    model.save_pretrained(path, max_shard_size=shard)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """save_checkpoint, each kind once a session."""
    made: dict[str, Path] = {}

    def make(family: str = "Llama", **changes: Any) -> Path:
        name = repr((family, sorted(changes.items())))
        if name not in made:
            made[name] = save_checkpoint(tmp_path_factory.mktemp(family), family, **changes)
        return made[name]

    return make


@pytest.fixture
def build(checkpoint: Callable[..., Path]) -> Callable[..., Engine]:
    """A float32 engine on the CPU, with as many blocks as asked for."""

    def make(
        family: str = "Llama",
        num_blocks: int = 256,
        block_tokens: int = 16,
        max_model_len: int | None = None,
        **changes: Any,
    ) -> Engine:
        path = checkpoint(family, **changes)
        block_bytes = 2 * 2 * 2 * 16 * 4 * block_tokens
        return Engine.build(
            path,
            torch.float32,
            torch.device("cpu"),
            kv_bytes=num_blocks * block_bytes,
            block_tokens=block_tokens,
            max_model_len=max_model_len,
        )

    return make


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes."""
    processes = Ranks(4)
    yield processes
    processes.close()
