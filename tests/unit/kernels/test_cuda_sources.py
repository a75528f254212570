"""What the CUDA sources compute, without a GPU: the cases of tests/gpu, on kernels compiled for the CPU."""

import ctypes

import pytest
import torch

from ...emulation import library as emulation
from ...gpu import test_block_copy, test_paged_attention, test_write_kv

# Cases that are too large, or of the GPU alone.
NOT_HERE = {
    "test_long_contexts",
    "test_many_sequences_of_many_lengths",
    "test_all_lengths_up_to_three_hundred",
    "test_a_pool_past_two_to_the_31_elements",
    "test_blocks_past_two_and_four_gigabytes_are_found",
    "test_a_copy_follows_the_work_of_its_stream",
    "test_a_captured_launch_reads_the_tables_of_its_replay",
    "test_a_sequence_s_answer_does_not_depend_on_its_batch",  # true only while there is a multiprocessor for each tile
}

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=f"emulation: {emulation.missing()}")

for _module in (test_block_copy, test_paged_attention, test_write_kv):
    for _name, _case in vars(_module).items():
        if _name.startswith("test_") and _name not in NOT_HERE and callable(_case):
            globals()[_name] = _case


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    return emulation.compile_for_cpu()


@pytest.fixture
def gpu(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    emulation.use(library, monkeypatch)
    return torch.device("cpu")


@pytest.fixture
def random(gpu: torch.device) -> torch.Generator:
    generator = torch.Generator(gpu)
    print(f"seed {generator.seed()}")
    return generator
