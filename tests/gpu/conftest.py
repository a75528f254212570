"""Everything here runs on an NVIDIA GPU, with torch and nvcc alone: `tests/gpu/run.sh`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ..some_cases import keep_some

VOCABULARY = 211
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """SOME_CASES: run so many of each test alone."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    if some := int(os.environ.get("SOME_CASES", "0")):
        keep_some(config, items, some, lambda item: item.path.is_relative_to(here))


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The device of all tests. Its kernels must be the CUDA ones: a reference tested against itself shows nothing."""
    from baton.kernels.build import cuda_library

    device = torch.device("cuda", torch.cuda.current_device())
    assert cuda_library(device) is not None, "no CUDA kernels: nvcc is missing"
    return device


@pytest.fixture
def random(gpu: torch.device) -> torch.Generator:
    """Fresh numbers each run; the seed is printed where a test fails."""
    generator = torch.Generator(gpu)
    print(f"seed {generator.seed()}")
    return generator


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random model of a family, as transformers saves it."""

    def make(family: str, **changes: Any) -> Path:
        import transformers

        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(family)
        config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(path)
        return path

    return make
