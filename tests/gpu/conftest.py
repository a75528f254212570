"""Everything here runs on an NVIDIA GPU, with torch and nvcc alone: `tests/gpu/run.sh`."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


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
